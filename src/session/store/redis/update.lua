-- Puts a record in the place of another one of the same session, which lives on for as long as it would have.
--
-- ARGV 3 member  4 the record as it was read  5 the new one
-- Replies 1, or 2 and the record that is there instead, or 0 where none lives.

local member = ARGV[3]

if not lives(member) then
  return { 0 }
end
local value = redis.call('GET', session(member))
if value ~= ARGV[4] then
  return { 2, value }
end
redis.call('SET', session(member), ARGV[5], 'KEEPTTL')
return { 1 }
