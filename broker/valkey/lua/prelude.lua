-- Put in front of every script: time, arithmetic, and what others may have written.
--
-- Time is the server's, in microseconds since 1970, so replicas with other clocks agree.  Such
-- numbers have 16 digits: exact in a double, but `tostring` would cut them, hence `text`.

local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

-- A number as `stored` reads it: without an exponent, and without the sign that a zero may have.
local function text(number)
  return string.format('%.0f', number + 0)
end

-- Milliseconds for PX, rounded up: a key must not be gone before what it says is over, and 0 would
-- delete it at once.
local function px(us)
  return text(math.max(math.ceil(us / 1000), 1))
end

local DAY = 86400000000
local LATEST = 9007199254740991 -- 2^53 - 1: larger numbers are not exact in a double

-- A number that was stored, or `otherwise` where none of ours is there: others may write to the
-- store, other versions too.  Ours are whole, in [low, high], in decimal digits; `tonumber` would
-- also take "nan", "inf", "0x10" and " 12 ".
local function stored(value, low, high, otherwise)
  local number = string.match(value or '', '^%d+$') and tonumber(value)
  if number and number >= low and number <= high then
    return number
  end
  return otherwise
end

-- A visitor's epoch as text, '0' before the first end; nil if nobody of ours wrote what is there:
-- then no token is known to be good.
local function epoch_at(key)
  local value = redis.call('GET', key)
  local number = stored(value, 1, LATEST)
  return not value and '0' or number and text(number) or nil
end

-- The moment (us) at which the budget is full again.  An absent one is empty now, for nobody knows
-- what was spent.  What is no moment of ours, or 30 days old, counts as the furthest one: budget.lua
-- cuts it to the most that a budget is ever overdrawn, so it heals within seconds.
local function full_at_of(value, now, depth)
  if not value then
    return now + depth
  end
  return stored(value, now - 30 * DAY, LATEST, LATEST)
end

-- The fleet's own time (us), for all that guards the vendor's budget: replicas move it, the server's
-- clock does not, because a clock that steps forwards again and again would refill the budget with
-- each step.  `vouched` is how far it has come at least by the monotonic clock of the replica that
-- calls (see broker/stores/fleet_time.py): never more than has really passed, so the largest counts.
-- `era` names this time: one that began anew, on a server that forgot it, is another.  Where there is
-- none, or none of ours, it goes on as the caller knows it, or begins with the server's clock; a
-- budget of an era that was lost counts as overdrawn.  A time that is over a day beyond what is
-- vouched for, and as far from the server's clock, was written by somebody else: it goes on as
-- vouched, under another name, for a newcomer may have believed it.  Returns time and era.
local function fleet_us(key, era, vouched)
  local kept = redis.call('HMGET', key, 'era', 'time', 'full_at')
  local time, clock = stored(kept[2], 1, LATEST), now_us()
  vouched = stored(vouched, 1, LATEST)
  if not kept[1] or #kept[1] > 64 or not time then
    if kept[3] and not (vouched and kept[1] == era) then
      redis.call('HSET', key, 'full_at', text(LATEST))
    end
    time = vouched or clock
  elseif kept[1] ~= era or not vouched then
    return time, kept[1]
  elseif time - vouched > DAY and math.abs(time - clock) > DAY then
    time, era = vouched, text(clock)
  elseif vouched <= time then
    return time, kept[1]
  else
    time = vouched
  end
  redis.call('HSET', key, 'era', era, 'time', text(time))
  return time, era
end

-- The rule of broker/rules/bucket.py, number for number: the moment at which the bucket at `key` is
-- full again moves one interval on, or the request is refused.  `carried` is a wait (us) that this
-- replica granted while the server was away.  A moment that is none of ours is an exhausted bucket.
-- Returns whether it is allowed, and the wait until full.
local function spend(key, burst, interval, carried, now)
  local depth = burst * interval
  local value = redis.call('GET', key)
  local full_at = value and stored(value, 1, LATEST, LATEST) or 0
  local wait = math.min(math.max(full_at - now, carried, 0), depth)
  local allowed = wait + interval <= depth
  if allowed then
    wait = wait + interval
  end
  if now + wait ~= full_at and wait > 0 then
    redis.call('SET', key, text(now + wait), 'PX', px(wait))
  end
  return allowed, wait
end
