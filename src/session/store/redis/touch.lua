-- Sets the idle clock of a session back, if it lives.
--
-- ARGV 3 member  4 idle time  5 absolute end
-- Replies 0 if it does not live, 1 if its life could not grow, 2 if it lives longer now.

local member, ends = ARGV[3], tonumber(ARGV[5])

if not lives(member) then
  return { 0 }
end
if ends <= now then
  finish(member, 'expired')
  return { 0 }
end
local expires = math.min(now + ARGV[4], ends)
local longer = keep(session(member), expires)
keep(trail(member), expires)
-- One that began before there was a registry comes into it so.
if redis.call('ZADD', registry, 'NX', expires, member) == 1 then
  keep(registry, ends + DAY)
end
return { longer and 2 or 1 }
