"""What the relay adds to a mint, and what a slow vendor costs those who need none.

    python tests/bench/relay.py [--rounds 9] [--seconds 2] [--rate 200]

First: new visitors ask at a constant rate, in turns of the vendor directly and of the broker before
it (budget raised); each round's order rotates, what counts is the difference of the medians.
Second: two brokers side by side, one before a vendor that takes 5 ms, one before a vendor that
takes 2 s; known visitors whose tokens are in their renewal window ask both alternately, and the
99th percentiles of the reuse hits are compared.

The fake vendor, the broker and the load are processes of their own, on loopback.
"""

import argparse
import asyncio
import json
import secrets
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp

from broker.testing import FakeVendor, VendorSettings, serve_forever

OVERHEAD, SLOWDOWN = 1.0, 1.2
"""Targets: milliseconds between the medians, and the ratio of the 99th percentiles."""

HERE = Path(__file__).resolve()

TOKEN_PATH = "/v1/embed-tokens/request"

LIFETIME = 20
"""Seconds of a token's life in the second part: its renewal window opens at half of it."""

KNOWN = 60
"""Visitors in the second part: their renewals (24 a second) fit into the client's connections."""

CONFIGURATION = """
[server]
listen = "127.0.0.1:0"
drain = "1s"
drain_lead = "0s"
[admin]
listen = "127.0.0.1:0"
[clients.bench]
secret = "{secret}"
agents = ["*"]
[issuer]
kind = "upstream"
[issuer.upstream]
base_url = "{base_url}"
api_secret = "{secret}"
[issuer.budget]
rate = 600000
burst = 1000
window = 601000
[limits.fingerprint]
rate = 60000000
burst = 1000000
[limits.fingerprint_mints]
rate = 60000000
burst = 1000000
[limits.agent]
rate = 6000000
burst = 1000000
"""


async def be_the_vendor(latency: float, lifetime: int, secret: str) -> None:
    """Run a vendor without limits, and say where."""
    settings = VendorSettings(ip=None, latency=latency, lifetime=lifetime)

    def introduce(vendor: FakeVendor) -> None:
        print(json.dumps({"url": vendor.url}), flush=True)

    await serve_forever("127.0.0.1", 0, started=introduce, settings=settings, secrets=[secret])


@asynccontextmanager
async def process(*command: str, stdout: int, stderr: int) -> AsyncIterator[Process]:
    """Run one of our own until the block ends."""
    running = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=stdout, stderr=stderr
    )
    try:
        yield running
    finally:
        running.kill()
        await running.wait()


class Target:
    """Somebody who can be asked for tokens."""

    def __init__(self, http: aiohttp.ClientSession, url: str, secret: str) -> None:
        self._http = http
        self._url = url + TOKEN_PATH
        self._headers = {"api-secret": secret}
        self.hits: list[float] = []
        self.misses: list[float] = []

    async def request_token(self, fingerprint: str) -> None:
        """Ask once and note how many milliseconds it took."""
        request = {"agent_id": "A78WKV4515", "fingerprint": fingerprint}
        began = time.perf_counter()
        async with self._http.post(self._url, json=request, headers=self._headers) as response:
            await response.read()
            took = (time.perf_counter() - began) * 1000
            if response.status != 200:
                raise SystemExit(f"answered {response.status}")
            hit = response.headers.get("Cache-Status", "").endswith("hit")
            (self.hits if hit else self.misses).append(took)


@asynccontextmanager
async def targets(
    folder: Path, name: str, latency: float, lifetime: int
) -> AsyncIterator[tuple[Target, Target]]:
    """Run a vendor and a broker before it."""
    secret = secrets.token_urlsafe(24)
    me = str(HERE)
    vendor = (me, "--vendor", secret, str(latency), str(lifetime))
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(process(*vendor, stdout=PIPE, stderr=DEVNULL))
        assert running.stdout is not None
        vendor_url = json.loads(await running.stdout.readline())["url"]
        config = folder / f"{name}.toml"
        text = CONFIGURATION.format(secret=secret, base_url=vendor_url)
        await asyncio.to_thread(config.write_text, text)
        broker = ("-m", "broker", "serve", "--config", str(config))
        served = await stack.enter_async_context(process(*broker, stdout=DEVNULL, stderr=PIPE))
        assert served.stderr is not None
        event = json.loads(await served.stderr.readline())
        while event["event"] != "broker.started":
            event = json.loads(await served.stderr.readline())
        reading = asyncio.create_task(_read_away(served.stderr))
        connector = aiohttp.TCPConnector(limit=0)
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        yield Target(http, vendor_url, secret), Target(http, event["url"], secret)
        reading.cancel()


async def _read_away(stream: asyncio.StreamReader) -> None:
    while await stream.readline():
        pass


async def at_rate(rate: float, seconds: float, both: "list[tuple[Target, list[str]]]") -> None:
    """Ask these targets in turn, at a constant rate in all; an empty list means new visitors."""
    count = int(rate * seconds)
    due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            target, known = both[number % len(both)]
            fingerprint = (
                known[number // len(both) % len(known)] if known else secrets.token_hex(16)
            )
            group.create_task(target.request_token(fingerprint))
            due += 1 / rate
            await asyncio.sleep(max(due - time.perf_counter(), 0))


async def overhead(folder: Path, rounds: int, seconds: float, rate: float) -> float:
    """Return the milliseconds that the relay adds to the median."""
    async with targets(folder, "overhead", latency=0.0, lifetime=3600) as pair:
        for target in pair:
            await at_rate(rate, 1.0, [(target, [])])
        medians: dict[Target, list[float]] = {target: [] for target in pair}
        for number in range(rounds):
            for target in pair if number % 2 else reversed(pair):
                target.misses.clear()
                await at_rate(rate, seconds, [(target, [])])
                medians[target].append(statistics.median(target.misses))
    direct, relayed = (statistics.median(medians[target]) for target in pair)
    differences = [after - before for before, after in zip(*medians.values(), strict=True)]
    low, _, high = statistics.quantiles(differences, n=4)
    print(f"a mint at {rate:g}/s: direct {direct:.3f} ms, relayed {relayed:.3f} ms (medians)")
    difference = statistics.median(differences)
    print(f"  difference {difference:.3f} ms, quartiles {low:.3f} - {high:.3f}, {rounds} rounds")
    return difference


async def slowdown(folder: Path, rate: float) -> float:
    """Return the ratio of the hits' 99th percentiles: 2 s vendor over 5 ms vendor."""
    async with (
        targets(folder, "fast", latency=0.005, lifetime=LIFETIME) as (_, fast),
        targets(folder, "slow", latency=2.0, lifetime=LIFETIME) as (_, slow),
    ):
        known = [secrets.token_hex(16) for _ in range(KNOWN)]
        both = [(fast, known), (slow, known)]
        await asyncio.gather(*(target.request_token(each) for target, _ in both for each in known))
        await at_rate(rate, LIFETIME / 2, both)
        for target, _ in both:
            target.hits.clear()
            target.misses.clear()
        await at_rate(rate, LIFETIME, both)  # two renewals of everybody
        for name, target in (("5 ms", fast), ("2 s", slow)):
            cuts = statistics.quantiles(target.hits, n=100)
            print(
                f"hits before a vendor of {name}: p50 {cuts[49]:.3f} ms, p99 {cuts[98]:.3f} ms,"
                f" {len(target.hits)} hits, {len(target.misses)} that waited for a mint"
            )
        ratio = (
            statistics.quantiles(slow.hits, n=100)[98] / statistics.quantiles(fast.hits, n=100)[98]
        )
    print(f"  ratio of the 99th percentiles {ratio:.2f}")
    return ratio


async def bench(rounds: int, seconds: float, rate: float) -> bool:
    """Run both parts; returns whether both targets are met."""
    with tempfile.TemporaryDirectory() as folder:
        added = await overhead(Path(folder), rounds, seconds, rate)
        ratio = await slowdown(Path(folder), rate)
    met = added <= OVERHEAD and ratio <= SLOWDOWN
    print("targets met" if met else f"targets missed: {OVERHEAD:g} ms and {SLOWDOWN:g}")
    return met


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description="What does the relay add?")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--vendor", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.vendor:
        secret, latency, lifetime = arguments.vendor
        asyncio.run(be_the_vendor(float(latency), int(lifetime), secret))
        return 0
    return 0 if asyncio.run(bench(arguments.rounds, arguments.seconds, arguments.rate)) else 1


if __name__ == "__main__":
    sys.exit(main())
