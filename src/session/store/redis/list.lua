-- Some sessions of a user, or of the bucket.
--
-- KEYS 5 index of the user, or the registry
-- ARGV 3 rank of the first  4 how many to look at
-- Replies how many it looked at, how many of these left the index; then of each that lives its member, record and time
-- to live. Those that are gone leave an index here, and the registry in a sweep, which tells of them.

local members = redis.call('ZRANGE', KEYS[5], ARGV[3], ARGV[3] + ARGV[4] - 1)
local reply = { #members, 0 }

for _, member in ipairs(members) do
  if lives(member) then
    local record, left = redis.pcall('GET', session(member)), redis.call('PTTL', session(member))
    if type(record) == 'string' and 0 <= left then
      table.insert(reply, member)
      table.insert(reply, record)
      table.insert(reply, left)
    end
  elseif KEYS[5] ~= registry then
    reply[2] = reply[2] + redis.call('ZREM', KEYS[5], member)
  end
end
return reply
