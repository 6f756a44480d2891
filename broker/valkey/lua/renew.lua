-- A leader that still mints keeps its lease.
--
-- KEYS  1 lease
-- ARGV  1 fence   2 length of a lease (us)   3 how long a lease is remembered (us)
-- Reply 1, or 0 where somebody else leads
--
-- Atomic, so that a lease which was taken over is not given a new end.

if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[1], 'ends', text(now_us() + tonumber(ARGV[2])))
redis.call('PEXPIRE', KEYS[1], px(tonumber(ARGV[3])))
return 1
