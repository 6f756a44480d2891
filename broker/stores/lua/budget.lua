-- Reserve the next call to the vendor.
--
-- KEYS  1 budget   2 queues
-- ARGV  1 burst   2 interval (us)   3 this replica   4 how many wait there   5 how far ahead a call
--       may be reserved (us)   6 "1" after a time without the server   7 how long all this is
--       remembered (us)   8 after how long a queue that was not told of is over (us)
--       9 "1" to reserve only what nobody needs: at once, no queue anywhere, half the burst left
-- Reply {reserved, wait (us), free, paused (us), queue of another replica, ...}
--       reserved 1: one call may be made after `wait`; 0: ask again after `wait`, none was taken
--
-- A token bucket that may be overdrawn: its moment lies up to `ahead` beyond a full drain, so calls
-- that wait stand in one line, whichever replica they wait in.  An absent budget starts empty,
-- because nobody knows what was spent before.  What is cut (a pause is five minutes at most) is stored
-- as it was cut, or a clock that stepped back would hold for as long as it stepped.  Atomic, so that
-- no slot is given twice.

local now = now_us()
local burst, interval, ahead = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[5])
local depth = burst * interval
local budget = redis.call('HMGET', KEYS[1], 'full_at', 'paused_until', 'withheld')
local paused = math.min(math.max(tonumber(budget[2] or '0') - now, 0), 300000000)
local share = math.min(1 - tonumber(budget[3] or '0') / 1000000, 1)
local step = 3600000000
if share > 0 then
  step = math.min(math.ceil(interval / share), step)
end
depth = math.max(depth, step) -- however little is left, one call at a time is a burst
local wait_full = depth
if budget[1] then
  wait_full = math.min(math.max(tonumber(budget[1]) - now, 0), paused + depth + ahead)
end
if ARGV[6] == '1' then
  wait_full = math.max(wait_full, depth)
end

if tonumber(ARGV[4]) > 0 then
  redis.call('HSET', KEYS[2], ARGV[3], text(now) .. ' ' .. ARGV[4])
else
  redis.call('HDEL', KEYS[2], ARGV[3])
end
local others = {}
local queues = redis.call('HGETALL', KEYS[2])
for place = 1, #queues, 2 do
  local told, waiting = string.match(queues[place + 1], '^(%d+) (%d+)$')
  if not told or math.abs(now - tonumber(told)) > tonumber(ARGV[8]) then
    redis.call('HDEL', KEYS[2], queues[place])
  elseif queues[place] ~= ARGV[3] then
    others[#others + 1] = tonumber(waiting)
  end
end
redis.call('PEXPIRE', KEYS[2], px(tonumber(ARGV[8])))

local wait = math.max(wait_full + step - depth, paused, 0)
local reserved = 0
local plenty = wait == 0 and #others == 0 and (depth - wait_full) / step * 2 >= burst
if share > 0 and wait <= ahead and (ARGV[9] ~= '1' or plenty) then
  reserved = 1
  wait_full = wait_full + step
end
redis.call('HSET', KEYS[1], 'full_at', text(now + wait_full))
redis.call('HSET', KEYS[1], 'paused_until', text(paused > 0 and now + paused or 0))
redis.call('PEXPIRE', KEYS[1], px(tonumber(ARGV[7])))
local free = paused > 0 and 0 or math.max(math.floor((depth - wait_full) / step), 0)
return {reserved, wait, free, paused, unpack(others)}
