-- A replica wants to mint for a key: it becomes the leader, or is told why it need not or must not.
--
-- KEYS  1 bucket of the visitor's mints   2 token   3 the visitor's epoch   4 lease
-- ARGV  1 burst   2 interval (us)   3 carried wait (us)   4 "1" if the limit is a dry run
--       5 version of a token that is not good enough   6 this replica   7 length of a lease (us)
--       8 fence of the leader that was waited for, "" if none   9 how long a lease is remembered (us)
--       10 how long an epoch is (us)
-- Reply {"token", version, life left (us), epoch, sealed token}   somebody has minted
--       {"wait", fence, lease left (us)}      somebody else leads; this replica will be woken
--       {"failed", error}                     the leader that was waited for failed, and how
--       {"denied", wait until full (us)}      the limit of the visitor's mints
--       {"lead", fence, epoch, allowed, wait until full (us)}    it leads
--
-- Atomic, because between looking for a leader and becoming one nobody else may do the same.  A
-- fence is larger than every one before: than the last lease's, the token's, and in case both are
-- forgotten it is the time.  A lease that ends later than a new one would is cut to that: the
-- server's clock has stepped back.  What nobody of ours wrote: a lease's fence, and it is over; its
-- end, and it lasts as long as a new one; a token's version or end, and there is no token; an epoch,
-- and a new one begins, so that what was ended stays ended.

local now = now_us()
local epoch = epoch_at(KEYS[3])
if not epoch then
  epoch = text(now)
  redis.call('SET', KEYS[3], epoch, 'PX', px(tonumber(ARGV[10])))
end
local token = redis.call('HMGET', KEYS[2], 'version', 'dies', 'epoch')
local version, left = stored(token[1], 0, LATEST), stored(token[2], 0, LATEST, 0) - now
if version and token[3] == epoch and left > 0 and token[1] ~= ARGV[5] then
  return {'token', token[1], left, epoch, redis.call('HGET', KEYS[2], 'sealed')}
end

local lease = redis.call('HMGET', KEYS[4], 'fence', 'holder', 'ends', 'error')
local length = tonumber(ARGV[7])
local before = stored(lease[1], 0, LATEST)
local lasts = lease[3] and math.min(stored(lease[3], 0, LATEST, LATEST) - now, length) or 0
if lease[4] and before and lease[1] == ARGV[8] then
  return {'failed', lease[4]}
end
if before and lasts > 0 and lease[2] ~= ARGV[6] then
  redis.call('HSET', KEYS[4], 'waiter:' .. ARGV[6], '1', 'ends', text(now + lasts))
  return {'wait', lease[1], lasts}
end

local allowed, wait = spend(KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), now)
if not allowed and ARGV[4] ~= '1' then
  return {'denied', wait}
end
local fence = text(math.max(now, (before or 0) + 1, (version or 0) + 1))
redis.call('HSET', KEYS[4], 'fence', fence, 'holder', ARGV[6], 'ends', text(now + length))
redis.call('HDEL', KEYS[4], 'error')
redis.call('PEXPIRE', KEYS[4], px(tonumber(ARGV[9])))
return {'lead', fence, epoch, allowed and 1 or 0, wait}
