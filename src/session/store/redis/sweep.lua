-- Looks at the sessions that may have expired.
--
-- ARGV 3 how many to look at, and to tell of
-- Replies how many ends were lost for want of somebody to tell, and then the first ends in the outbox.

for _, member in ipairs(redis.call('ZRANGE', registry, '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[3])) do
  local left = redis.call('PTTL', session(member))
  if left == -2 then
    finish(member, 'expired')
  else
    -- What was put here without an expiry is not ours to end.
    redis.call('ZADD', registry, now + (left < 0 and HOUR or left + 1), member)
  end
end

local reply = redis.call('LRANGE', outbox, 0, ARGV[3] - 1)
table.insert(reply, 1, tonumber(redis.call('HGET', users, 'lost') or 0))
redis.call('HDEL', users, 'lost')
return reply
