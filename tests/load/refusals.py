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
import secrets
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from cpu import PATH, TICK, found_in, port_in, ticks_of

MOST_LINES = 1000

CONFIGURATION = """
[server]
listen = "127.0.0.1:0"
drain_lead = "0s"
[admin]
listen = "127.0.0.1:0"
[clients.flood]
secret = "{secret}"
agents = ["*"]
[issuer.local.keys.flood]
secret = "{key}"
[limits.fingerprint]
rate = 1
burst = 1
[limits.agent]
rate = 1
burst = 1
"""

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
        with broker(folder) as (pid, secret):
            log = folder / "broker.log"
            refusals, cpu = flood(folder, pid, secret, options.refusals)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    told = Counter(line["limit"] for line in lines if "limit" in line)
    for line in lines:
        if line["event"] == "broker.refusals" and line["kind"] in refusals:
            told[line["kind"]] += line["unwritten"]
    print(f"{sum(refusals.values())} refusals: {refusals}")
    print(f"CPU per 429: {cpu:.1f} us")
    print(f"lines: {len(lines)}; they tell of {told.total()} refusals")
    good = len(lines) < MOST_LINES and dict(told) == refusals
    return 0 if good and set(refusals) == {"fingerprint", "agent", "auth"} else 1


def flood(folder: Path, pid: int, secret: str, wanted: int) -> tuple[dict[str, int], float]:
    """Drive until there are enough; returns refusals by limit, and CPU microseconds per 429."""
    script = folder / "flood.lua"
    script.write_text(FLOOD)
    text = (folder / "broker.log").read_text()
    url = found_in(text, r'"url": "(http://[^"]+)"')
    admin = found_in(text, r'"admin_url": "(http://[^"]+)"')
    before, answered, number = sum(ticks_of(pid)), 0, 0
    while answered < wanted:
        command = ["wrk", "-t1", "-c32", "-d2", "-s", str(script), f"{url}{PATH}", "--"]
        done = subprocess.run(
            [*command, secret, str(number)], check=True, capture_output=True, text=True
        )
        answered += int(found_in(done.stdout, r"Non-2xx or 3xx responses: (\d+)"))
        number += 1
    cpu = (sum(ticks_of(pid)) - before) * TICK / answered
    with urllib.request.urlopen(f"{admin}/metrics", timeout=10) as answer:
        found = re.findall(
            r'broker_rejections_total\{limit="(\w+)"\} (\S+)', answer.read().decode()
        )
    return {limit: int(float(count)) for limit, count in found if float(count)}, cpu


@contextmanager
def broker(folder: Path) -> Iterator[tuple[int, str]]:
    """Run the broker; yields its pid and the client's secret; ends it as a supervisor does."""
    secret, config = secrets.token_urlsafe(24), folder / "broker.toml"
    config.write_text(CONFIGURATION.format(secret=secret, key=secrets.token_urlsafe(48)))
    command = [sys.executable, "-m", "broker", "serve", "--config", str(config)]
    with (
        (folder / "broker.log").open("w") as errors,
        subprocess.Popen(command, stderr=errors) as process,
    ):
        try:
            port_in(folder / "broker.log")
            yield process.pid, secret
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
