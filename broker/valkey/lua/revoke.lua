-- A visitor is ended: every token that was minted for them, or is being minted, is over.
--
-- KEYS  1 the visitor's epoch   2... tokens that the caller knows of
-- ARGV  1 how long an epoch is remembered (us): longer than any token lives
--       2 "" for an end; an epoch that was in force, if this server may have forgotten it
-- Reply the epoch in force
--
-- The epoch is what ends tokens; those that are known go at once, so that not even a server that
-- forgets the epoch brings them back.  Atomic, because an epoch never comes twice, also if the
-- server's clock steps back.

local before = stored(redis.call('GET', KEYS[1]), 1, LATEST, 0)
local epoch = text(math.max(now_us(), before + 1))
if ARGV[2] ~= '' then
  epoch = text(math.max(tonumber(ARGV[2]), before))
end
redis.call('SET', KEYS[1], epoch, 'PX', px(tonumber(ARGV[1])))
if #KEYS > 1 then
  redis.call('DEL', unpack(KEYS, 2))
end
return epoch
