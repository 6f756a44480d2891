-- A visitor is ended: every token that was minted for them, or is being minted, is over.
--
-- KEYS  1 the visitor's epoch
-- ARGV  1 how long an epoch is remembered (us): longer than any token lives
-- Reply the new epoch
--
-- Atomic, because an epoch never comes twice, also if the server's clock steps back.

local before = tonumber(redis.call('GET', KEYS[1]) or '0')
local epoch = text(math.max(now_us(), before + 1))
redis.call('SET', KEYS[1], epoch, 'PX', px(tonumber(ARGV[1])))
return epoch
