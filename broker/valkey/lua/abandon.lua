-- A leader gives up: its lease ends without a token.
--
-- KEYS  1 lease
-- ARGV  1 fence   2 error for those who wait, "" if the next one shall try
--       3 how long fence and error are remembered (us)
-- Reply {replica that waits, ...}
--
-- Atomic, so that only the holder ends its lease.  The error stays for a moment, for those who were
-- not woken; whoever did not wait for this leader does not hear of it.  The fence stays with it, so
-- that the next one is larger also if the server's clock steps back.

if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[1] then
  return {}
end
local waiting = {}
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  local waiter = string.match(field, '^waiter:(.*)$')
  if waiter then
    waiting[#waiting + 1] = waiter
  end
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'fence', ARGV[1])
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[1], 'error', ARGV[2])
end
redis.call('PEXPIRE', KEYS[1], px(tonumber(ARGV[3])))
return waiting
