-- Begins a session.
--
-- KEYS 5 index of its user
-- ARGV 3 member  4 record  5 idle time  6 absolute end  7 user, or nothing where nobody wants to know of its end
--      8 how many the user may have, 0 = any number  9 'evict_oldest' or 'refuse'  10 member that it replaces, or nothing
-- Replies the members that made room, or -1: the user has as many as they may have.

local index, member, ends, limit, replaced = KEYS[5], ARGV[3], tonumber(ARGV[6]), tonumber(ARGV[8]), ARGV[10]
local displaced = {}

if limit == 0 then
  -- Each login looks at the two oldest, so that those that are gone do not pile up.
  for _, other in ipairs(redis.call('ZRANGE', index, 0, 1)) do
    if not lives(other) then
      redis.call('ZREM', index, other)
    end
  end
elseif limit <= redis.call('ZCARD', index) then
  local others = {}
  for _, other in ipairs(redis.call('ZRANGE', index, 0, -1)) do
    if not lives(other) then
      redis.call('ZREM', index, other)
    elseif other ~= replaced then
      table.insert(others, other)
    end
  end
  local surplus = #others + 1 - limit
  if 0 < surplus and ARGV[9] == 'refuse' then
    return { -1 }
  end
  for oldest = 1, surplus do
    finish(others[oldest], 'displaced')
    redis.call('ZREM', index, others[oldest])
    table.insert(displaced, others[oldest])
  end
end
if replaced ~= '' then
  finish(replaced, 'replaced')
  redis.call('ZREM', index, replaced)
end

local expires = math.max(math.min(now + ARGV[5], ends), now + 1)
redis.call('SET', session(member), ARGV[4], 'PX', expires - now)
redis.call('ZADD', index, ends, member)
keep(index, ends)
-- Longer than any session of it, so that ends can be told of when nobody swept for a while.
redis.call('ZADD', registry, expires, member)
keep(registry, ends + DAY)
if ARGV[7] ~= '' then
  redis.call('HSET', users, member, ARGV[7])
  keep(users, ends + DAY)
end
return displaced
