-- Charge one bucket that is not the visitor's: an agent's mints, a client's requests.
--
-- KEYS  1 bucket
-- ARGV  1 burst   2 interval (us)   3 carried wait (us)
-- Reply {allowed, wait until full (us)}
--
-- Atomic, so that of many at once no more than the burst pass.

local allowed, wait =
  spend(KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), now_us())
return {allowed and 1 or 0, wait}
