-- A leader has minted: its token is what the next request gets, and its lease ends.
--
-- KEYS  1 token   2 the visitor's epoch   3 lease
-- ARGV  1 fence   2 epoch in which the mint began   3 life left (us)   4 sealed token
--       5 how long an epoch is remembered (us)
-- Reply {"kept" | "superseded" | "ended", replica that waits, ...}
--
-- Atomic, so that neither an older leader nor a mint that began before its visitor was ended can
-- put its token over a newer one's.  The epoch comes first: a leader that was succeeded is told to
-- hand its token out, one whose visitor was ended is not.  Only its own lease ends, and only those
-- who wait for that are woken.  An epoch that nobody of ours wrote is another one than any; a fence
-- or version that nobody of ours wrote is none.

local now = now_us()
local fence = tonumber(ARGV[1])
local epoch = epoch_at(KEYS[2])
local lease = redis.call('HGETALL', KEYS[3])
local waiting, leader = {}, 0
for place = 1, #lease, 2 do
  local waiter = string.match(lease[place], '^waiter:(.*)$')
  if waiter then
    waiting[#waiting + 1] = waiter
  elseif lease[place] == 'fence' then
    leader = stored(lease[place + 1], 0, LATEST, 0)
  end
end
if leader > fence then
  waiting = {}
else
  redis.call('DEL', KEYS[3])
end
if epoch ~= ARGV[2] then
  return {'ended', unpack(waiting)}
end
if leader > fence or stored(redis.call('HGET', KEYS[1], 'version'), 0, LATEST, 0) > fence then
  return {'superseded', unpack(waiting)}
end
local left = tonumber(ARGV[3])
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'dies', text(now + left), 'epoch', epoch, 'sealed', ARGV[4])
redis.call('PEXPIRE', KEYS[1], px(left))
if epoch ~= '0' then
  redis.call('PEXPIRE', KEYS[2], px(tonumber(ARGV[5])))
end
return {'kept', unpack(waiting)}
