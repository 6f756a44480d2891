-- A replica says that it is there, and learns who else is.
--
-- KEYS  1 members   2 budget
-- ARGV  1 this replica's name   2 number drawn at its start   3 "1" if it has said so before
--       4 after how long without a word a member is lost (us)   5 and when it is forgotten (us)
--       6 replicas by configuration, 0 to count them   7 era   8 vouched (us): the fleet's time
--       9 "1" if this replica has not been answered lately, and may be spending its share
--       10... name, parts: members that this replica knows
-- Reply {0}  somebody else uses this name   or   {1, parts, withheld (millionths), era, time (us),
--       name, parts, name, parts, ...}; no parts: this replica has no share, there was none left
--
-- Whoever loses the server goes on with its share of everything: one part in as many as it was told
-- last.  So all shares that were told must never make more than a whole together: a member gets an
-- equal part of what is not withheld, one part more than there are members, and no more than the
-- others leave; a newcomer's grows as they come by.  The part that is left over is for who comes
-- after a whole fleet has died.  The share of a member that is lost is withheld until it is back, says
-- farewell, or is forgotten.  With a configured number each has one part in as many, and of those who
-- are lost no more can live than are missing; one more than configured has no share.  A server that
-- does not know somebody who has been there has lost its memory, and is told of the others.  Silence
-- is measured by the fleet's own time, so a server whose clock steps forwards forgets nobody.  That
-- time stands still while no member is heard: a newcomer, who cannot tell for how long, has the
-- server's clock say which of them are lost by now.  A member whose answers do not reach it is lost,
-- although it is heard.  Atomic, so that shares are counted once.

local now, era = fleet_us(KEYS[2], ARGV[7], ARGV[8])
local me, drawn = ARGV[1], ARGV[2]
local lost, forgotten = tonumber(ARGV[4]), tonumber(ARGV[5])
local fixed = tonumber(ARGV[6])
local mine = redis.call('HGET', KEYS[1], me)
local owner = mine and string.match(mine, '^%d+ (%S+) ') or '?'
if ARGV[3] == '1' and owner == '?' then
  for place = 10, #ARGV, 2 do
    if ARGV[place] ~= me then
      redis.call('HSETNX', KEYS[1], ARGV[place], text(now - lost) .. ' ? ' .. ARGV[place + 1])
    end
  end
elseif ARGV[3] == '1' and owner ~= drawn then
  return {0}
end

local clock, is_newcomer = now_us(), not (ARGV[7] == era and tonumber(ARGV[8]) > 0)
local alive, holders, silent, withheld, given, reply = 1, 0, 0, 0, 0, {}
local members = redis.call('HGETALL', KEYS[1])
for place = 1, #members, 2 do
  local name = members[place]
  local seen, who, parts, at = string.match(members[place + 1], '^(%d+) (%S+) (%d+) ?(%d*)$')
  seen, parts = stored(seen, 0, LATEST, LATEST), stored(parts, 0, LATEST)
  local silence = now - seen
  if not parts then -- nobody of ours wrote this
    redis.call('HDEL', KEYS[1], name)
  elseif name ~= me and silence > forgotten then
    redis.call('HDEL', KEYS[1], name)
  elseif name ~= me then
    local least = 0
    if is_newcomer and at ~= '' then
      least = math.max(math.min(clock - stored(at, 0, LATEST, LATEST), lost), 0)
    end
    if silence < least then -- or it is another era's: count from here
      silence = least
      local since = text(math.max(now - least, 0))
      redis.call('HSET', KEYS[1], name, table.concat({since, who, text(parts), at}, ' '))
    end
    local share = parts > 0 and 1 / parts or 0
    given = given + share
    local holds = share > 0 and 1 or 0
    if silence < lost then
      alive = alive + 1
      holders = holders + holds
    else
      silent = silent + holds
      withheld = withheld + share
    end
    if #reply < 1000 then -- what one reply can hold, and more than one fleet has
      reply[#reply + 1] = name
      reply[#reply + 1] = parts
    end
  end
end

local share = math.min((1 - withheld) / (alive + 1), 1 - given)
local parts = share > 0.001 and math.ceil(1 / share - 0.000001) or 0
if fixed > 0 then
  parts = holders < fixed and fixed or 0
  withheld = math.min(silent, math.max(fixed - alive, 0)) / fixed
end
withheld = math.min(math.ceil(withheld * 1000000 - 0.001), 1000000) + 0 -- nothing is -0 else
local seen = now -- or when it was sent: one that a server kept for a while is old
if not is_newcomer then
  seen = math.min(now, tonumber(ARGV[8]))
end
if ARGV[9] == '1' then
  seen = math.max(seen - lost, 0)
end
redis.call('HSET', KEYS[1], me, table.concat({text(seen), drawn, text(parts), text(clock)}, ' '))
redis.call('PEXPIRE', KEYS[1], px(forgotten))
redis.call('HSET', KEYS[2], 'withheld', text(withheld))
redis.call('PEXPIRE', KEYS[2], px(forgotten))
return {1, parts, withheld, era, now, unpack(reply)}
