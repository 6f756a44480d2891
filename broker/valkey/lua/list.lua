-- A session is put into a list: of its agent, or of its visitor.
--
-- KEYS  1 list
-- ARGV  1 expiry (Unix seconds)   2 session id   3 how many the list may have   4 life left (us)
-- Reply how many it has
--
-- What expired more than a minute ago leaves: a minute for clocks that differ, and of a list that is
-- too long what expires first.  Atomic, so that its time to live is that of its longest member.

local now = now_us()
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', text(math.floor(now / 1000000) - 60))
redis.call('ZREMRANGEBYSCORE', KEYS[1], '(' .. text(LATEST), '+inf') -- nobody of ours wrote these
redis.call('ZADD', KEYS[1], ARGV[1], ARGV[2])
local over = redis.call('ZCARD', KEYS[1]) - tonumber(ARGV[3])
if over > 0 then
  redis.call('ZREMRANGEBYRANK', KEYS[1], 0, over - 1)
end
local lives = px(tonumber(ARGV[4]))
if redis.call('PTTL', KEYS[1]) < tonumber(lives) then
  redis.call('PEXPIRE', KEYS[1], lives)
end
return redis.call('ZCARD', KEYS[1])
