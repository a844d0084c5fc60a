-- Gives a claimed name back.
--
-- KEYS 1 claim
-- ARGV 1 holder
-- Replies 1 if he had it.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return { 0 }
end
return { redis.call('DEL', KEYS[1]) }
