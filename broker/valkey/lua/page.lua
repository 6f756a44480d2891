-- A page of a list of sessions, in the order of expiry and id.
--
-- KEYS  1 list
-- ARGV  1 expiry (Unix seconds) and 2 id of the session before it   3 how many
-- Reply {expiry, id, expiry, id, ...}
--
-- The place is searched for, because the session before it may be gone: among those that expire in
-- the same second, which are in the order of their ids, by halves.  Atomic, so that ranks hold.

local low = redis.call('ZCOUNT', KEYS[1], '-inf', '(' .. ARGV[1])
local high = redis.call('ZCOUNT', KEYS[1], '-inf', ARGV[1])
while low < high do
  local middle = math.floor((low + high) / 2)
  if redis.call('ZRANGE', KEYS[1], middle, middle)[1] <= ARGV[2] then
    low = middle + 1
  else
    high = middle
  end
end
local last = redis.call('ZCOUNT', KEYS[1], '-inf', text(LATEST)) -- none of ours expires later
last = math.min(low + tonumber(ARGV[3]), last) - 1
local page = last < low and {} or redis.call('ZRANGE', KEYS[1], low, last, 'WITHSCORES')
local reply = {}
for place = 1, #page, 2 do
  reply[#reply + 1] = text(tonumber(page[place + 1]))
  reply[#reply + 1] = page[place]
end
return reply
