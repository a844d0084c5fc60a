-- Ends one session.
--
-- KEYS 5 index of its user, if known
-- ARGV 3 member  4 ending
-- Replies 1 if it lived.

if KEYS[5] then
  redis.call('ZREM', KEYS[5], ARGV[3])
end
return { finish(ARGV[3], ARGV[4]) }
