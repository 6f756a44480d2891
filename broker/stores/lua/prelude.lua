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
