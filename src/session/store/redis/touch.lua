-- Sets the idle clock of a session back, if it lives.
--
-- ARGV 3 member  4 idle time  5 absolute end
-- Replies 1 if it lives.

local member, ends = ARGV[3], tonumber(ARGV[5])

if not lives(member) then
  return { 0 }
end
if ends <= now then
  finish(member, 'expired')
  return { 0 }
end
local expires = math.min(now + ARGV[4], ends)
keep(session(member), expires)
keep(trail(member), expires)
-- One that began before there was a registry comes into it so.
if redis.call('ZADD', registry, 'NX', expires, member) == 1 then
  keep(registry, ends + DAY)
end
return { 1 }
