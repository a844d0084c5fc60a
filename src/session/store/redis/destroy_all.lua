-- Ends the first sessions of a user, or of the bucket.
--
-- KEYS 5 index of the user, or the registry
-- ARGV 3 how many to look at  4 ending  5 member that stays, or nothing
-- Replies how many lived, and how many it looked at.

local members = redis.call('ZRANGE', KEYS[5], 0, ARGV[3] - 1)
local lived = 0

for _, member in ipairs(members) do
  if member ~= ARGV[5] then
    lived = lived + finish(member, ARGV[4])
    redis.call('ZREM', KEYS[5], member)
  end
end
return { lived, #members }
