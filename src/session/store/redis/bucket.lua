-- What the scripts of one bucket have in common.
--
-- KEYS 1 registry  2 users  3 outbox  4 one that is never there
-- ARGV 1 what the name of a session begins with  2 the same of a trail
--
-- Sessions and trails are named here and not in KEYS: they are of the same slot. While a Cluster moves that slot, some of
-- them are on one node and some on the other. Because KEYS 4 is on neither, both nodes answer TRYAGAIN until all is
-- moved, and no script ever runs on half of a bucket. Times are Unix ms.

local registry, users, outbox = KEYS[1], KEYS[2], KEYS[3]

local OUTBOX_MAX = 10000
local HOUR = 3600 * 1000
local DAY = 24 * HOUR
-- For so long whoever comes with a session is told how it ended. Where it was replaced, its browser has another one, and
-- only what was under way still comes with this.
local TOLD = { displaced = HOUR, revoked = HOUR, replaced = HOUR / 60 }

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function session(member)
  return ARGV[1] .. member
end

local function trail(member)
  return ARGV[2] .. member
end

-- A tombstone, which begins with byte 0, does not. What is no string is no session of ours, but it is there.
local function lives(member)
  local value = redis.pcall('GET', session(member))
  if type(value) == 'table' then
    return string.find(value.err, '^WRONGTYPE') or error(value)
  end
  return value and string.byte(value) ~= 0
end

-- A key that is there stays at least until then; whether that is longer than it would have.
local function keep(key, moment)
  local longer = redis.call('PTTL', key) < moment - now
  if longer then
    redis.call('PEXPIREAT', key, moment)
  end
  return longer
end

-- For whoever wants to know of ends: there is a user in the hash only then.
local function tell(member, ending)
  local user = redis.call('HGET', users, member)
  if not user then
    return
  end
  redis.call('HDEL', users, member)
  local length = redis.call('RPUSH', outbox, string.format('%s %.0f %s %s', ending, now, member, user))
  if OUTBOX_MAX < length then
    redis.call('LTRIM', outbox, -OUTBOX_MAX, -1)
    redis.call('HSET', users, 'lost', (redis.call('HGET', users, 'lost') or 0) + length - OUTBOX_MAX)
    keep(users, now + 7 * DAY)
  end
  keep(outbox, now + 7 * DAY)
end

-- Ends a session; 1 if it lived. One that had expired before, and was not told of, has expired.
local function finish(member, ending)
  local lived = lives(member)
  local told = TOLD[ending]
  if lived and told then
    local left = redis.call('PTTL', session(member))
    if left < 0 or told < left then
      left = told
    end
    redis.call('SET', session(member), '\0' .. ending, 'PX', math.max(left, 1))
  elseif lived then
    redis.call('DEL', session(member))
  end
  redis.call('DEL', trail(member))
  if redis.call('ZREM', registry, member) == 1 then
    tell(member, lived and ending or 'expired')
  end
  return lived and 1 or 0
end

