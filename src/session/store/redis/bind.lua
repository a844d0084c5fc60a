-- Binds a session to a name by which somebody else can end it.
--
-- KEYS 1 the sessions bound to that name
-- ARGV 1 session  2 for so many ms  3 how many there may be
-- Replies those that had to make room: never this one, which its login is about to begin.

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ends = now + ARGV[2]

for _, gone in ipairs(redis.call('ZRANGE', KEYS[1], '-inf', now, 'BYSCORE', 'LIMIT', 0, 100)) do
  redis.call('ZREM', KEYS[1], gone)
end
redis.call('ZADD', KEYS[1], ends, ARGV[1])
local surplus = {}
local count = redis.call('ZCARD', KEYS[1]) - ARGV[3]
if 0 < count then
  for _, first in ipairs(redis.call('ZRANGE', KEYS[1], 0, count)) do
    if first ~= ARGV[1] and #surplus < count then
      redis.call('ZREM', KEYS[1], first)
      table.insert(surplus, first)
    end
  end
end
if redis.call('PTTL', KEYS[1]) < ends - now then
  redis.call('PEXPIREAT', KEYS[1], ends)
end
return surplus
