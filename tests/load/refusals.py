"""A flood of refusals must not become a flood of lines.

    python tests/load/refusals.py [--refusals 100000]

Starts a broker that writes JSON at `info`, as in production, and drives it with wrk until it has
answered that many 429s of three kinds: one visitor without end, one agent that is used up, and a
secret that nobody has.  Prints the lines that it wrote and the CPU per 429; exits with 1 if there
are a thousand lines or more, or if the lines and the counters do not add up to the answers.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parts"))
from cpu import TICK, found_in, ticks_of
from running import Broker, broker

MOST_LINES = 1000

SETTINGS = {
    "limits.fingerprint.rate": 1,
    "limits.fingerprint.burst": 1,
    "limits.agent.rate": 1,
    "limits.agent.burst": 1,
    "log.format": "json",
}
"""A broker that refuses from the second request on, and logs as in production."""

FLOOD = """
local secret, round, seen = "", 0, 0
function init(args)
  secret, round = args[1], tonumber(args[2])
end
function request()
  seen = seen + 1
  local mine, visitor = secret, "9f86d081884c7d659a2feaa0c55ad015"
  if seen % 3 == 1 then visitor = string.format("%08x%08x", round, seen) end
  if seen % 3 == 2 then mine = "nobody" end
  local body = string.format('{"agent_id":"A78WKV4515","fingerprint":"%s"}', visitor)
  return wrk.format("POST", nil, {["api-secret"] = mine}, body)
end
"""


def main() -> int:
    """Flood and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--refusals", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with broker(folder, SETTINGS) as it:
            refusals, cpu = flood(folder, it, options.refusals)
        lines = [json.loads(line) for line in it.log.splitlines()]
    told = Counter(line["limit"] for line in lines if "limit" in line)
    for line in lines:
        if line["event"] == "broker.refusals" and line["kind"] in refusals:
            told[line["kind"]] += line["unwritten"]
    print(f"{sum(refusals.values())} refusals: {refusals}")
    print(f"CPU per 429: {cpu:.1f} us")
    print(f"lines: {len(lines)}; they tell of {told.total()} refusals")
    good = len(lines) < MOST_LINES and dict(told) == refusals
    return 0 if good and set(refusals) == {"fingerprint", "agent", "auth"} else 1


def flood(folder: Path, it: Broker, wanted: int) -> tuple[dict[str, int], float]:
    """Drive until there are enough; returns refusals by limit, and CPU microseconds per 429."""
    script = folder / "flood.lua"
    script.write_text(FLOOD)
    before, answered, number = sum(ticks_of(it.pid)), 0, 0
    while answered < wanted:
        command = ["wrk", "-t1", "-c32", "-d2", "-s", str(script), it.token_url, "--"]
        done = subprocess.run(
            [*command, it.secret, str(number)], check=True, capture_output=True, text=True
        )
        answered += int(found_in(done.stdout, r"Non-2xx or 3xx responses: (\d+)"))
        number += 1
    cpu = (sum(ticks_of(it.pid)) - before) * TICK / answered
    with urllib.request.urlopen(f"{it.admin_url}/metrics", timeout=10) as answer:
        found = re.findall(
            r'broker_rejections_total\{limit="(\w+)"\} (\S+)', answer.read().decode()
        )
    return {limit: int(float(count)) for limit, count in found if float(count)}, cpu


if __name__ == "__main__":
    sys.exit(main())
