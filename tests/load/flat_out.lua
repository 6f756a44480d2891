-- wrk, closed loop, as fast as the broker answers:  wrk -s flat_out.lua URL -- SECRET VISITORS AGENTS
local secret, visitors, agents = "", 10000, 50
local answers = {}

function init(args)
  secret = args[1]
  visitors = tonumber(args[2]) or visitors
  agents = tonumber(args[3]) or agents
  math.randomseed(os.time())
end

function request()
  local visitor = math.random(0, visitors - 1)
  local body = string.format(
    '{"agent_id":"agent-%d","fingerprint":"c0ffee00%08x"}', visitor % agents, visitor)
  return wrk.format("POST", nil, {["api-secret"] = secret, ["Content-Type"] = "application/json"}, body)
end
