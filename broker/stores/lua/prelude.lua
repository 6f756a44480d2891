-- Put in front of every script: time and arithmetic.
--
-- Time is the server's, in microseconds since 1970, so replicas with other clocks agree.  Such
-- numbers have 16 digits: exact in a double, but `tostring` would cut them, hence `text`.

local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function text(number)
  return string.format('%.0f', number)
end

-- Milliseconds for PX, rounded up: a key must not be gone before what it says is over, and 0 would
-- delete it at once.
local function px(us)
  return text(math.max(math.ceil(us / 1000), 1))
end

-- The fleet's own time (us), for all that guards the vendor's budget: replicas move it, the server's
-- clock does not, because a clock that steps forwards again and again would refill the budget with
-- each step.  `vouched` is how far it has come at least by the monotonic clock of the replica that
-- calls (see broker/stores/fleet_time.py): never more than has really passed, so the largest counts.
-- `era` names this time: one that began anew, on a server that forgot it, is another.  Where there is
-- none it goes on as the caller knows it, or begins with the server's clock.  Returns time and era.
local function fleet_us(key, era, vouched)
  local kept = redis.call('HMGET', key, 'era', 'time')
  local time = tonumber(kept[2] or '')
  vouched = tonumber(vouched)
  if not kept[1] or not time then
    time = vouched > 0 and vouched or now_us()
  elseif kept[1] ~= era or vouched <= time then
    return time, kept[1]
  else
    time = vouched
  end
  redis.call('HSET', key, 'era', era, 'time', text(time))
  return time, era
end

-- The rule of broker/rules/bucket.py, number for number: the moment at which the bucket at `key` is
-- full again moves one interval on, or the request is refused.  `carried` is a wait (us) that this
-- replica granted while the server was away.  Returns whether it is allowed, and the wait until full.
local function spend(key, burst, interval, carried, now)
  local depth = burst * interval
  local stored = tonumber(redis.call('GET', key) or '0')
  local wait = math.max(stored - now, carried, 0)
  if not (wait <= depth) then -- nor is it what is no number: others may write here
    wait = depth
  end
  local allowed = wait + interval <= depth
  if allowed then
    wait = wait + interval
  end
  if now + wait ~= stored and wait > 0 then
    redis.call('SET', key, text(now + wait), 'PX', px(wait))
  end
  return allowed, wait
end
