-- Reserve the next call to the vendor, and say which are over.
--
-- KEYS  1 budget   2 queues   3 calls
-- ARGV  1 burst   2 interval (us)   3 this replica   4 how many wait there   5 how far ahead a call
--       may be reserved (us)   6 "1" after a time without the server   7 how long all this is
--       remembered (us)   8 after how long a queue that was not told of is over (us)
--       9 "reserve", "modest" to reserve only what nobody needs (at once, no queue anywhere, half the
--       burst left), "tell" to reserve nothing   10 era   11 vouched (us): the fleet's time
--       12 number of this message, one more each time   13 calls of this replica that are out: made or
--       reserved, and not over   14 how many it has settled since its start   15 how many it has
--       abandoned since its start: they may yet arrive   16 how long ago (us) the vendor last answered
--       it, -1 for never   17 after how long (us) a replica that has calls out and tells nothing is
--       silent   18 how many calls may be out while others are owed
-- Reply {reserved, wait (us), free, paused (us), era, time (us), silence (us), owed, queue of
--       another replica, ...}
--       reserved 1: one call may be made after `wait`; 0: ask again after `wait`, none was taken
--       silence: since the last reservation, while only the end of a call makes room; else -1
--
-- A token bucket that may be overdrawn: its moment lies up to `ahead` beyond a full drain, so calls
-- that wait stand in one line, whichever replica they wait in.  A call that is out may arrive at any
-- moment until it is settled: all that are out count as if they arrived last, and each is charged when
-- it is settled.  So no more are out at once than the burst holds, and whenever they arrive, a window
-- holds burst and refill.
--
-- Calls that were abandoned, and those of a silent replica, are owed (rules/outstanding.py): they do
-- not block, but until the vendor has answered somebody, few others go.  They are charged when that
-- begins, because they may just have arrived, and when it ends: so much of it as has refilled since,
-- because they may have arrived only now.  An answer from before they were owed says nothing of them.
-- An absent budget starts empty and with a burst owed, because nobody knows what was spent before.
--
-- A message that was overtaken by a later one changes nothing.  What is cut (a pause is five minutes
-- at most) is stored as it was cut.  Atomic, so that no slot is given twice.
--
-- What is none of our numbers counts as the strictest that it can have been: overdrawn as far as may
-- be, all withheld, three bursts owed, a burst lost of the calls of a replica.  All of that is over
-- with the next heartbeat, the next answer, or in the time in which the budget refills.  Only a pause
-- is none then: if there was one, the vendor says so again with the next call.

local now, era = fleet_us(KEYS[1], ARGV[10], ARGV[11])
local burst, interval, ahead = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[5])
local remembered, silent = tonumber(ARGV[7]), tonumber(ARGV[17])
local depth = burst * interval
local budget = redis.call('HMGET', KEYS[1], 'full_at', 'paused_until', 'withheld', 'owed', 'owed_at',
  'reserved_at')
local paused = math.min(math.max(stored(budget[2], 0, LATEST, 0) - now, 0), 300000000)
local withheld = budget[3] and stored(budget[3], 0, 1000000, 1000000) or 0
local share = 1 - withheld / 1000000
local step = 3600000000
if share > 0 then
  step = math.min(math.ceil(interval / share), step)
end
depth = math.max(depth, step) -- however little is left, one call at a time is a burst
local fullest = paused + 2 * depth + ahead
local wait_full = math.min(math.max(full_at_of(budget[1], now, depth) - now, 0), fullest)
if ARGV[6] == '1' then
  wait_full = math.max(wait_full, depth)
end

local message, out = tonumber(ARGV[12]), tonumber(ARGV[13])
local settled, abandoned = tonumber(ARGV[14]), tonumber(ARGV[15])
local function read(value)
  local told = {string.match(value or '', '^(%d+) (%d+) (%d+) (%d+) (%d+)$')}
  for place = 1, 5 do
    told[place] = stored(told[place], 0, LATEST)
    if not told[place] then
      return nil
    end
  end
  return unpack(told)
end
local latest, _, _, _, told_at = read(redis.call('HGET', KEYS[3], ARGV[3]))
if latest and message <= latest and math.abs(now - told_at) <= silent then
  local owed = budget[4] and stored(budget[4], 0, 3 * burst, 3 * burst) or burst
  return {0, interval, 0, paused, era, now, -1, owed}
end
local all_out, charged, lost = out, 0, 0
local calls = redis.call('HGETALL', KEYS[3])
for place = 1, #calls, 2 do
  local last, left, before, gone, told = read(calls[place + 1])
  local is_mine = calls[place] == ARGV[3]
  if not last or is_mine and (before > settled or gone > abandoned) then
    redis.call('HDEL', KEYS[3], calls[place]) -- nobody of ours wrote this
    lost = lost + burst
  elseif is_mine then
    charged = charged + settled - before
    lost = lost + abandoned - gone
  elseif math.abs(now - told) > silent then
    redis.call('HDEL', KEYS[3], calls[place])
    lost = lost + left
  else
    all_out = all_out + left
  end
end

local owed, owed_at = burst, now
if budget[4] then
  owed, owed_at = stored(budget[4], 0, 3 * burst, 3 * burst), stored(budget[5], 0, now)
  if not owed_at then -- whatever has refilled since then was not earned
    charged, owed_at = charged + owed, now
  end
end
local refilled = math.min(owed, math.floor((now - owed_at) / step))
local answered = tonumber(ARGV[16])
if answered >= 0 and now - answered >= owed_at then
  charged = charged + refilled
  owed, refilled = 0, 0
end
if lost > 0 then
  charged = charged + refilled + lost
  owed, owed_at = math.min(owed + lost, 3 * burst), now
end
wait_full = math.min(wait_full + charged * step, fullest)

if ARGV[9] ~= 'tell' then
  if tonumber(ARGV[4]) > 0 then
    redis.call('HSET', KEYS[2], ARGV[3], text(now) .. ' ' .. ARGV[4])
  else
    redis.call('HDEL', KEYS[2], ARGV[3])
  end
end
local others = {}
local queues = redis.call('HGETALL', KEYS[2])
for place = 1, #queues, 2 do
  local told, waiting = string.match(queues[place + 1], '^(%d+) (%d+)$')
  told, waiting = stored(told, 0, LATEST), stored(waiting, 0, LATEST)
  if not told or not waiting or math.abs(now - told) > tonumber(ARGV[8]) then
    redis.call('HDEL', KEYS[2], queues[place])
  elseif queues[place] ~= ARGV[3] then
    others[#others + 1] = waiting
  end
end
redis.call('PEXPIRE', KEYS[2], px(tonumber(ARGV[8])))

local most = owed > 0 and math.min(tonumber(ARGV[18]), burst) or burst
local taken = wait_full + math.min(all_out, 3 * burst) * step -- more than a burst is never given
local wait = math.max(taken + step - depth, paused, 0)
if all_out >= most then
  wait = math.max(wait, step)
end
local plenty = wait == 0 and #others == 0 and (depth - taken) / step * 2 >= burst
local asked = ARGV[9] == 'reserve' or ARGV[9] == 'modest' and plenty
local reserved, reserved_at = 0, stored(budget[6], now - remembered, LATEST, now)
if asked and share > 0 and wait <= ahead and all_out < most and (all_out + 1) * step <= depth then
  reserved, reserved_at = 1, now + wait
  out = out + 1
  all_out = all_out + 1
  taken = taken + step
end
local silence = -1
if all_out >= most or (all_out + 1) * step > depth then
  silence = math.max(now - reserved_at, 0)
end
redis.call('HSET', KEYS[1], 'full_at', text(now + wait_full))
redis.call('HSET', KEYS[1], 'paused_until', text(paused > 0 and now + paused or 0))
redis.call('HSET', KEYS[1], 'owed', text(owed), 'owed_at', text(owed_at))
redis.call('HSET', KEYS[1], 'reserved_at', text(reserved_at))
redis.call('PEXPIRE', KEYS[1], px(remembered))
local told = {text(message), text(out), text(settled), text(abandoned), text(now)}
redis.call('HSET', KEYS[3], ARGV[3], table.concat(told, ' '))
redis.call('PEXPIRE', KEYS[3], px(remembered))
local free = paused > 0 and 0 or math.max(math.floor((depth - taken) / step), 0)
return {reserved, wait, free, paused, era, now, silence, owed, unpack(others)}
