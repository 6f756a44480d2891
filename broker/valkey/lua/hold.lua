-- The vendor says that less is left, or that nothing is for a while.
--
-- KEYS  1 budget
-- ARGV  1 burst   2 interval (us)   3 pause (us), 0 for none   4 calls left, -1 if it did not say
--       5 how long this is remembered (us)   6 era   7 vouched (us): the fleet's time
-- Reply pause left (us)
--
-- A pause only grows and leaves no burst behind it.  Atomic, so that of two answers at once the
-- stricter one stands.

local now = fleet_us(KEYS[1], ARGV[6], ARGV[7])
local interval = tonumber(ARGV[2])
local depth = tonumber(ARGV[1]) * interval
local budget = redis.call('HMGET', KEYS[1], 'full_at', 'paused_until')
local full_at = full_at_of(budget[1], now, depth)
local paused_until = math.min(stored(budget[2], 0, LATEST, 0), now + 300000000)
local pause, left = tonumber(ARGV[3]), tonumber(ARGV[4])
if pause > 0 then
  paused_until = math.max(paused_until, now + pause)
  full_at = math.max(full_at, paused_until + depth)
end
if left >= 0 then
  full_at = math.max(full_at, now + depth - left * interval)
end
redis.call('HSET', KEYS[1], 'full_at', text(full_at), 'paused_until', text(paused_until))
redis.call('PEXPIRE', KEYS[1], px(tonumber(ARGV[5])))
return math.max(paused_until - now, 0)
