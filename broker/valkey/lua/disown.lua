-- A client wants a token ended of which there is no record: noted, up to a bound.
--
-- KEYS  1 mark of the token   2 the marks of its client
-- ARGV  1 how many marks a client may have   2 how long one is kept (us)
-- Reply 1, or 0 for one too many
--
-- A token that is noted already takes no further place.  Atomic, or many at once would pass the
-- bound together.

local now = now_us()
local ends, lives = text(now + tonumber(ARGV[2])), px(tonumber(ARGV[2]))
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', text(now))
local known = redis.call('ZADD', KEYS[2], 'XX', 'CH', ends, KEYS[1]) > 0
if not known and redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[1]) then
  return 0
end
redis.call('ZADD', KEYS[2], ends, KEYS[1])
redis.call('PEXPIRE', KEYS[2], lives)
redis.call('SET', KEYS[1], '1', 'PX', lives)
return 1
