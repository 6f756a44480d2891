"""What a request costs without a network: the broker's own part, by case, and of a hit by step.

    python tests/bench/profile_lane.py [--rounds 9] [--requests 20000] [--cases hit,crowd,...]
        [--steps] [--instructions]

A broker is put together as `serve` does it, and its connection is given bytes, and a transport that
drops what is written.  What is left of a request is the code between `data_received` and
`transport.write`: kernel, event loop and load generator are not in it, so neighbours disturb little
and the smallest round counts.  `fixed` is a handler in the lane that returns one ready answer: the
floor of this connection class.

`--steps` measures the parts of a hit one by one.  `--instructions` counts instructions a request
instead, with callgrind, which disturbs nobody and is disturbed by nobody.
"""

import argparse
import asyncio
import gc
import json
import re
import secrets
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import uvloop
from cpu import CONFIGURATION, CROWD, INTROSPECT, PATH, VERIFY
from typing_extensions import override

from broker.app import wiring
from broker.app.gc_tuning import GcTuner
from broker.app.wiring import Parts
from broker.clock import SystemClock
from broker.config import load
from broker.issue import IssuedToken
from broker.model import Outcome
from broker.stores.memory import MemoryStore
from broker.telemetry import logs
from broker.web.response import JSON_TYPE, Answer, head
from broker.web.whole_request import Request, WholeRequest

CASES = ("fixed", "hit", "crowd", "traced", "429", "invalid", "verify", "introspect", "mint")

AGENT, VISITOR = "A78WKV4515", "9f86d081884c7d659a2feaa0c55ad015"

FIXED = "/fixed"

COUNTED = 1_000
"""Requests of a round whose instructions are counted."""


def main() -> None:
    """Measure and print."""
    options = parse_options()
    if options.instructions:
        for case in options.cases.split(","):
            print(f"{case:11}{instructions_of(case):>10,.0f} instructions", flush=True)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(options))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=20_000, help="of each round")
    parser.add_argument("--cases", default=",".join(CASES), help="of " + ",".join(CASES))
    parser.add_argument("--steps", action="store_true", help="of a hit, one by one")
    parser.add_argument("--instructions", action="store_true", help="counted by valgrind")
    return parser.parse_args()


def instructions_of(case: str) -> float:
    """Return how many instructions one request of this case takes."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    command += ["--collect-atstart=no", "--toggle-collect=builtin_any"]  # `time_of` is within that
    command += [sys.executable, __file__, "--rounds", "1", "--cases", case]
    command += ["--requests", str(COUNTED)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found is not None
    return int(found[1]) / COUNTED


class Nowhere(asyncio.Transport):
    """Drops what is written, and keeps the last of it."""

    last = b""

    @override
    def write(self, data: Any) -> None:
        self.last = data

    @override
    def is_closing(self) -> bool:
        return False

    @override
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    @override
    def close(self) -> None: ...

    @override
    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 50_000) if name == "peername" else default


class Bench:
    """A broker, one connection of it, and what is sent on that."""

    def __init__(self, store: str = "memory://") -> None:
        self.secret = secrets.token_urlsafe(24)
        key = secrets.token_urlsafe(48)
        text = CONFIGURATION.format(secret=self.secret, key=key, store=store)
        settings = load.from_tree(tomllib.loads(text))
        logs.configure(settings.log)
        self.parts: Parts = wiring.build(settings, {}, SystemClock(), None)
        self.parts.routes.add_to_lane(FIXED, "POST", _fixed())
        self.wire = Nowhere()
        self.connection: Any = self.parts.server()
        self.connection.connection_made(self.wire)

    def send(self, data: bytes) -> bytes:
        """Return the answer to one request."""
        self.connection.data_received(data)
        return self.wire.last

    def asking(
        self, fields: dict[str, str], path: str = PATH, lines: tuple[str, ...] = ()
    ) -> bytes:
        """Write a request as wrk does in `cpu.py`."""
        return written(path, json.dumps(fields, separators=(",", ":")), self.secret, lines)

    def requests(self, case: str, number: int) -> list[bytes]:
        """Return so many requests of a case, all different where the case has it so."""
        visitor = {"agent_id": AGENT, "fingerprint": VISITOR}
        if case == "fixed":
            some = [self.asking(visitor, FIXED)]
        elif case == "429":
            some = [self.asking({**visitor, "agent_id": "tight"})]
        elif case == "invalid":
            some = [self.asking({"agent_id": AGENT})]
        elif case in ("verify", "introspect"):
            token = json.loads(self.send(self.asking(visitor)).partition(b"\r\n\r\n")[2])
            some = [asking_about(token["data"]["token"], case, self.secret)]
        elif case == "traced":
            trace = "traceparent: 00-77%030x-b7ad6b7169203331-01"
            some = [self.asking(visitor, lines=(trace % next(NUMBERS),)) for _ in range(number)]
        elif case in ("crowd", "mint"):
            first = "c" if case == "crowd" else "d"
            most = CROWD if case == "crowd" else number
            numbers = range(most) if case == "crowd" else islice(NUMBERS, most)
            some = [self.asking({**visitor, "fingerprint": f"{first}{n:031x}"}) for n in numbers]
        else:
            some = [self.asking(visitor)]
        return list(islice(cycle(some), number))


NUMBERS = iter(range(1, 1 << 40))


def written(
    path: str, body: str, secret: str, lines: tuple[str, ...] = (), kind: str = "json"
) -> bytes:
    """Write a POST."""
    lines = ("Host: broker", f"api-secret: {secret}", f"Content-Type: application/{kind}", *lines)
    lines = (f"POST {path} HTTP/1.1", *lines, f"Content-Length: {len(body)}", "", body)
    return "\r\n".join(lines).encode()


def asking_about(token: str, case: str, secret: str) -> bytes:
    """Write a question about a token."""
    if case == "verify":
        return f"GET {VERIFY} HTTP/1.1\r\nHost: broker\r\nX-Embed-Token: {token}\r\n\r\n".encode()
    return written(INTROSPECT, f"token={token}", secret, kind="x-www-form-urlencoded")


def _fixed() -> Callable[[Request, str], Any]:
    text = head(200, 2, JSON_TYPE, "id", "date").encode()

    async def fixed(request: Request, _request_id: str) -> Answer:
        request.facts = True  # type: ignore[union-attr]  # the head may be known
        return Answer(200, text, b"{}")

    return fixed


STATUS = {"429": b"429", "invalid": b"400"}


def steps_of(bench: Bench) -> dict[str, Callable[[], object]]:
    """Return the parts of a hit, each by itself; what is indented is within what stands above."""
    (data,) = set(bench.requests("hit", 3))
    for _ in range(3):
        bench.send(data)  # by now head and body are known
    routes, clock, store = bench.parts.routes, bench.parts.clock, bench.parts.store
    service, metrics, lane = bench.parts.token_service, bench.parts.metrics, bench.connection._lane
    assert isinstance(store, MemoryStore)
    known = lane.known_in(data)
    end = known.head.end
    request = WholeRequest(known.message, data[end:], bench.connection, known.facts, "")
    token_request = routes.tokens._bodies.read(data[end:], "bench", any_fingerprint=False)
    now, wall = clock.mono(), clock.wall()
    rule, key = store._limits.fingerprint.met_by(token_request)
    read = routes.tokens._bodies.read
    issued = service.begin(token_request, now)
    assert isinstance(issued, IssuedToken)
    verdict, body, date = issued.verdict, issued.token.body, routes.http_date(wall)
    assert verdict is not None
    line = "Cache-Status: embed-token-broker; hit\r\n"
    seconds, reused = metrics.requests[Outcome.REUSED].observe, metrics.remaining.observe
    start = routes.heads.write(line, len(body), "id", date, verdict, wall)
    answer = Answer(200, start, body)
    return {
        "nothing": lambda: None,
        "all of it": lambda: bench.connection.data_received(data),
        "  head known": lambda: lane.known_in(data),
        "  request object": lambda: WholeRequest(known.message, data[end:], None, known.facts, ""),  # type: ignore[arg-type]
        "  request id": lane.new_id,
        "  route": lambda: routes.tokens(request, "id"),
        "    clock, one reading of three": clock.mono,
        "    body known": lambda: read(data[end:], "bench", any_fingerprint=False),
        "    story, with a reading of the clock": lambda: service.begin(
            token_request, clock.mono()
        ),
        "      bucket, likewise": lambda: store._fingerprint.take(key, rule.limit, clock.mono()),
        "      token": lambda: store.tokens.find_at(token_request.key, now),
        "    answer of what the story says": lambda: routes.tokens._issued(
            issued, "id", now, token_request
        ),
        "      head": lambda: routes.heads.write(line, len(body), "id", date, verdict, wall),
        "      two histograms": lambda: (reused(3594.0), seconds(0.00001)),
        "      answer object": lambda: Answer(200, start, body, False),
        "  bytes put together": answer.whole,
    }


def measure_steps(bench: Bench, options: argparse.Namespace) -> None:
    """Print the smallest round of each part of a hit."""
    steps, best = steps_of(bench), dict[str, float]()
    for _ in range(options.rounds):
        for name, step in steps.items():
            began = time.thread_time_ns()
            any(step() is NotImplemented for _ in range(options.requests))
            took = (time.thread_time_ns() - began) / options.requests / 1000
            best[name] = min(took, best.get(name, took))
    for name, took in best.items():
        print(f"{name:42}{took - best['nothing']:>6.2f} us")


async def measure(options: argparse.Namespace) -> None:
    """Print the smallest round of each case."""
    tuner = GcTuner()
    bench = Bench()
    await asyncio.sleep(0.05)
    tuner.start()
    if options.steps:
        measure_steps(bench, options)
        return
    best: dict[str, float] = {}
    for _ in range(options.rounds):
        for case in options.cases.split(","):
            requests = bench.requests(case, options.requests)
            for request in set(requests[:CROWD]) if case == "crowd" else requests[:3]:
                bench.send(request)
            took = time_of(bench, requests)
            status = bench.wire.last[9:12]
            if status != STATUS.get(case, b"200"):
                sys.exit(f"{case}: {bench.wire.last!r}")
            best[case] = min(took, best.get(case, took))
            await asyncio.sleep(0)
    for case, took in best.items():
        print(f"{case:11}{took:>8.2f} us")


def time_of(bench: Bench, requests: list[bytes]) -> float:
    """Return microseconds of CPU of one of these requests."""
    gc.collect()
    receive = bench.connection.data_received
    began = time.thread_time_ns()
    any(map(receive, requests))
    return (time.thread_time_ns() - began) / len(requests) / 1000


if __name__ == "__main__":
    main()
