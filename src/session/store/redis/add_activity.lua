-- Adds to the trail of a session, if it lives.
--
-- ARGV 3 member  4 how many stay, at least 1  5... what is added, the latest last
-- Replies 1 if it lives.

local member = ARGV[3]

if not lives(member) then
  return { 0 }
end
for added = 5, #ARGV do
  redis.call('RPUSH', trail(member), ARGV[added])
end
redis.call('LTRIM', trail(member), -ARGV[4], -1)
keep(trail(member), now + math.max(redis.call('PTTL', session(member)), 1))
return { 1 }
