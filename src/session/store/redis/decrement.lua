-- Takes one back from a counter; one that has forgotten is not begun again, for it would never forget.
--
-- KEYS 1 counter
-- Replies the count.

local count = tonumber(redis.call('GET', KEYS[1]) or 0)
if 0 < count then
  count = count - 1
  redis.call('SET', KEYS[1], count, 'KEEPTTL')
end
return { count }
