-- Adds one to a counter that forgets some time after its first count.
--
-- KEYS 1 counter
-- ARGV 1 that time
-- Replies the count, and when it forgets.

local count = redis.call('INCR', KEYS[1])
local left = redis.call('PTTL', KEYS[1])
if left < 0 then
  left = tonumber(ARGV[1])
  redis.call('SET', KEYS[1], count, 'PX', left)
end
return { count, left }
