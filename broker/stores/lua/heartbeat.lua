-- A replica says that it is there, and learns who else is.
--
-- KEYS  1 members   2 budget
-- ARGV  1 this replica's name   2 number drawn at its start   3 "1" if it has said so before
--       4 after how long without a word a member is lost (us)   5 and when it is forgotten (us)
--       6 replicas by configuration, 0 to count them
--       7... name, parts: members that this replica knows
-- Reply {0}  somebody else uses this name   or   {1, parts, withheld (millionths), name, parts,
--       name, parts, ...}
--
-- Whoever loses the server goes on with its share of everything: one part in as many as it was told
-- last.  So all shares that were told must never make more than a whole together: a member gets an
-- equal part of what is not withheld, one part more than there are members, and no more than the
-- others leave; a newcomer's grows as they come by.  The part that is left over is for who comes
-- after a whole fleet has died: there is always something to begin with.  The share of a member that is lost is withheld until it is back, says farewell, or is
-- forgotten.  A server that does not know somebody who has been there has lost its memory, and is
-- told of the others.  Atomic, so that shares are counted once.

local now = now_us()
local me, drawn = ARGV[1], ARGV[2]
local lost, forgotten = tonumber(ARGV[4]), tonumber(ARGV[5])
local mine = redis.call('HGET', KEYS[1], me)
local owner = mine and string.match(mine, '^%d+ (%S+) ') or '?'
if ARGV[3] == '1' and owner == '?' then
  for place = 7, #ARGV, 2 do
    if ARGV[place] ~= me then
      redis.call('HSETNX', KEYS[1], ARGV[place], text(now - lost) .. ' ? ' .. ARGV[place + 1])
    end
  end
elseif ARGV[3] == '1' and owner ~= drawn then
  return {0}
end

local alive, withheld, given, reply = 1, 0, 0, {}
local members = redis.call('HGETALL', KEYS[1])
for place = 1, #members, 2 do
  local name = members[place]
  local seen, who, parts = string.match(members[place + 1], '^(%d+) (%S+) (%d+)$')
  local silence = now - tonumber(seen or '0')
  if not parts or tonumber(parts) < 1 then -- nobody of ours wrote this
    redis.call('HDEL', KEYS[1], name)
  elseif name ~= me and silence > forgotten then
    redis.call('HDEL', KEYS[1], name)
  elseif name ~= me then
    if silence < 0 then -- the clock has stepped back: count from here
      redis.call('HSET', KEYS[1], name, text(now) .. ' ' .. who .. ' ' .. parts)
    end
    local share = 1 / tonumber(parts)
    given = given + share
    if silence < lost then
      alive = alive + 1
    else
      withheld = withheld + share
    end
    if #reply < 1000 then -- what one reply can hold, and more than one fleet has
      reply[#reply + 1] = name
      reply[#reply + 1] = tonumber(parts)
    end
  end
end

local parts = tonumber(ARGV[6])
if parts == 0 then
  local share = math.min((1 - withheld) / (alive + 1), 1 - given)
  parts = share > 0.001 and math.ceil(1 / share - 0.000001) or 1000
end
withheld = math.min(math.ceil(withheld * 1000000 - 0.001), 1000000)
redis.call('HSET', KEYS[1], me, text(now) .. ' ' .. drawn .. ' ' .. text(parts))
redis.call('PEXPIRE', KEYS[1], px(forgotten))
redis.call('HSET', KEYS[2], 'withheld', withheld)
redis.call('PEXPIRE', KEYS[2], px(forgotten))
return {1, parts, withheld, unpack(reply)}
