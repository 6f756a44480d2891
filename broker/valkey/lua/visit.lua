-- A visitor asks: charge what every request meets, and look for a token.
--
-- KEYS  1 bucket of the visitor's requests   2 token   3 the visitor's epoch
-- ARGV  1 burst   2 interval (us)   3 carried wait (us)   4 "1" to charge, "0" to look only
--       5 "1" if the limit is a dry run   6 version that the caller has already   7 its epoch
-- Reply wait until full (us): allowed, and what the caller has is the token, and in force; or
--       {allowed, wait until full (us), epoch [, version, life left (us) [, sealed token]]}
--       allowed 0: nothing follows; no version: no token; no sealed token: the caller has it
--
-- Nearly every reply is that one number: arrays take the caller three times as long to read.
--
-- Atomic, so that a token which is handed out belongs to an epoch that was in force at the moment
-- when its request was counted: after an end has been answered, nobody is told of it.

local now = now_us()
local allowed, wait = true, 0
if ARGV[4] == '1' then
  allowed, wait = spend(KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), now)
end
local said = allowed and 1 or 0
if not allowed and ARGV[5] ~= '1' then
  return {said, wait}
end
local epoch = epoch_at(KEYS[3])
local token = redis.call('HMGET', KEYS[2], 'version', 'dies', 'epoch')
local left = stored(token[2], 0, LATEST, 0) - now
if not stored(token[1], 0, LATEST) or token[3] ~= epoch or left <= 0 then
  return {said, wait, epoch or '-1'} -- no token's, until whoever leads begins a new one
end
if token[1] == ARGV[6] then
  if allowed and epoch == ARGV[7] then
    return wait
  end
  return {said, wait, epoch, token[1], left}
end
return {said, wait, epoch, token[1], left, redis.call('HGET', KEYS[2], 'sealed')}
