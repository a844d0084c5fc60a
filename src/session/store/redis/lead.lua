-- One instance leads, for a while.
--
-- KEYS 1 who leads
-- ARGV 1 instance  2 for so many ms
-- Replies 1 if it is this one.

local leader = redis.call('GET', KEYS[1])
if leader and leader ~= ARGV[1] then
  return { 0 }
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return { 1 }
