-- Ends the first sessions of a user, or of the bucket.
--
-- KEYS 5 index of the user, or the registry
-- ARGV 3 how many to look at  4 ending  5 member that stays, or nothing
-- Replies how many it looked at, and the members that lived.

local members = redis.call('ZRANGE', KEYS[5], 0, ARGV[3] - 1)
local ended = {}

for _, member in ipairs(members) do
  if member ~= ARGV[5] then
    if finish(member, ARGV[4]) == 1 then
      table.insert(ended, member)
    end
    redis.call('ZREM', KEYS[5], member)
  end
end
return { #members, unpack(ended) }
