-- A replica says that it is there, and learns who else is.
--
-- KEYS  1 members   2 budget
-- ARGV  1 this replica's name   2 number drawn at its start   3 "1" if it has said so before
--       4 after how long without a word a member is lost (us)   5 and when it is forgotten (us)
--       6 replicas by configuration, 0 to count them
--       7... name, replicas: members that this replica knew before the server was away
-- Reply {0}  somebody else uses this name   or   {1, members alive, withheld (millionths), name,
--       replicas, name, replicas, ...}
--
-- A member that is lost may go on by itself, with its share of the budget: one part in as many
-- replicas as it last saw.  That share is withheld from the others until it comes back, says
-- farewell, or is forgotten.  Atomic, so that shares are counted once.

local now = now_us()
local me, drawn = ARGV[1], ARGV[2]
local lost, forgotten = tonumber(ARGV[4]), tonumber(ARGV[5])
local mine = redis.call('HGET', KEYS[1], me)
if mine and ARGV[3] == '1' and string.match(mine, '^%d+ (%S+) ') ~= drawn then
  return {0}
end
for place = 7, #ARGV, 2 do
  if ARGV[place] ~= me then
    redis.call('HSETNX', KEYS[1], ARGV[place], text(now - lost) .. ' ? ' .. ARGV[place + 1])
  end
end
local alive, withheld, reply = 1, 0, {}
local members = redis.call('HGETALL', KEYS[1])
for place = 1, #members, 2 do
  local name = members[place]
  local seen, _, replicas = string.match(members[place + 1], '^(%d+) (%S+) (%d+)$')
  local silence = now - tonumber(seen)
  if name == me then
    replicas = nil
  elseif silence > forgotten then
    redis.call('HDEL', KEYS[1], name)
  else
    if silence < lost then
      alive = alive + 1
    else
      withheld = withheld + 1 / tonumber(replicas)
    end
    reply[#reply + 1] = name
    reply[#reply + 1] = tonumber(replicas)
  end
end
local parts = tonumber(ARGV[6]) > 0 and ARGV[6] or alive
redis.call('HSET', KEYS[1], me, text(now) .. ' ' .. drawn .. ' ' .. parts)
redis.call('PEXPIRE', KEYS[1], px(forgotten))
withheld = math.min(math.ceil(withheld * 1000000), 1000000)
redis.call('HSET', KEYS[2], 'withheld', withheld)
redis.call('PEXPIRE', KEYS[2], px(forgotten))
return {1, alive, withheld, unpack(reply)}
