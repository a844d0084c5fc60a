-- Adds one to a counter that forgets some time after its first count.
--
-- KEYS 1 counter
-- ARGV 1 that time
-- Replies the count, and when it forgets.

local count = tonumber(redis.call('GET', KEYS[1]) or 0) + 1
local left = redis.call('PTTL', KEYS[1])
if left < 0 then
  left = tonumber(ARGV[1])
end
redis.call('SET', KEYS[1], count, 'PX', math.max(left, 1))
return { count, left }
