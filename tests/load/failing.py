"""Requests that fail must leave nothing behind, however many there are.

    python tests/load/failing.py [--requests 1000000] [--kinds not_http,reset]

Starts a broker before a fake vendor and sends it that many requests of each kind: bytes that are
not HTTP, half a head, answers that nobody reads, a wrong secret, 429, a pause of the vendor,
callers that go while they wait, connections that are reset.  Prints for each kind the memory of the
broker after the first 200,000 and at the end, and which types of objects grew; exits with 1 if
memory grew by more than 10 MB or a type by more than a few hundred objects.

The broker's code runs unchanged, in a child that also answers on its standard input and output:
there is no route for this in the product.
"""

import argparse
import asyncio
import gc
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvloop
from typing_extensions import override

from broker import cli
from broker.key_backoff import KEYS
from broker.testing import FakeVendor, Refusal, VendorSettings
from broker.testing.vendor import faults

FIRST = 200_000
"""Requests after which caches are full (two generations of bodies, and one that is being freed; who
resets a connection is often gone before one is read) and pools have their size."""

MOST_BYTES = 10 * 1024 * 1024
"""How much memory may grow after that."""

MOST_OBJECTS = 500
"""How many objects of one type may come: what is under way at the moment of counting."""

BOUNDED = {
    "broker.key_backoff._Failing": KEYS,
    "cachetools.TTLCache._Link": KEYS,
}
"""Types that something with a bound fills: they may grow up to it."""

BY_SECOND = frozenset({"array.array", "list"})
"""Types of which tables keep one for each second of the coming hour in which something ends."""

TIMEOUT = 60.0
"""Seconds for something that should happen at once, on a machine that is busy."""

AGENT, LIMITED = "A78WKV4515", "A78WKV4516"

CONFIGURATION = """
[server]
listen = "{listen}"
drain = "1s"
drain_lead = "0s"
[admin]
listen = "{admin}"
[clients.web]
secret = "{secret}"
agents = ["*"]
[issuer]
kind = "upstream"
[issuer.upstream]
base_url = "{vendor}"
api_secret = "{key}"
[issuer.budget]
rate = 600
burst = 10
window = 610
max_wait = "2s"
[reuse]
max_tokens = 1000
[sessions]
max_recorded = 1000
[limits]
max_tracked = 5000
[limits.fingerprint]
rate = 600000
burst = 100000
[limits.fingerprint.overrides.{limited}]
rate = 1
burst = 1
[limits.agent]
rate = 600000
burst = 100000
[log]
level = "error"
"""


def child() -> int:
    """Run the broker's command line; tell what is alive whenever a line comes in."""

    def tell() -> None:
        for _ in sys.stdin:
            gc.collect()
            gc.collect()
            kinds = Counter(_name(type(each)) for each in gc.get_objects())
            kinds["frozen"] = gc.get_freeze_count()
            print(json.dumps({"rss": resident(), "objects": kinds}), flush=True)

    threading.Thread(target=tell, daemon=True).start()
    return cli.main(sys.argv[2:])


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Broker:
    """A broker in a child; leave the context to end it."""

    def __init__(self, folder: Path, vendor: FakeVendor) -> None:
        self.secret = secrets.token_urlsafe(24)
        key = vendor.secret.reveal()
        self.port, admin = free_port(), f"127.0.0.1:{free_port()}"
        self.admin = f"http://{admin}"
        text = CONFIGURATION.format(
            listen=f"127.0.0.1:{self.port}",
            admin=admin,
            secret=self.secret,
            vendor=vendor.url,
            key=key,
            limited=LIMITED,
        )
        (folder / "broker.toml").write_text(text, encoding="utf-8")
        self._log = folder / "log"
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", "serve", "--config", folder / "broker.toml"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("wb"),
        )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        ends = time.monotonic() + TIMEOUT
        while time.monotonic() < ends and self._process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{self.admin}/readyz"):
                return
            time.sleep(0.05)
        raise SystemExit(f"the broker did not start:\n{self._log.read_text(encoding='utf-8')}")

    async def measure(self) -> dict[str, Any]:
        """Wait until nobody is connected, then ask what is alive."""
        ends = time.monotonic() + TIMEOUT
        while await asyncio.to_thread(self._connections):
            if time.monotonic() > ends:
                raise SystemExit("connections stay open")
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.2)  # two rounds of housekeeping
        return await asyncio.to_thread(self._request_token)

    def _connections(self) -> float:
        with urllib.request.urlopen(f"{self.admin}/metrics") as answer:
            text = answer.read().decode()
        lines = (line.split() for line in text.splitlines())
        return next(float(it[1]) for it in lines if it[0] == "broker_connections")

    def _request_token(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(TIMEOUT)


class Talk(asyncio.Protocol):
    """One connection: counts the answers that come and says when a number of them is there."""

    def __init__(self) -> None:
        self._wanted = asyncio.Event()
        self._tail = b""
        self._want = 0
        self.answers = 0
        self.closed = asyncio.Event()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport  # uvloop's own class, which is no asyncio.Transport

    @override
    def data_received(self, data: bytes) -> None:
        data = self._tail + data
        self.answers += data.count(b"HTTP/1.1 ")
        self._tail = data[-8:]
        if self.answers >= self._want:
            self._wanted.set()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self._wanted.set()

    async def answered(self, count: int) -> None:
        """Wait for so many answers in all, or for the end of the connection."""
        self._want = count
        if self.answers < count and not self.closed.is_set():
            self._wanted.clear()
            await asyncio.wait_for(self._wanted.wait(), TIMEOUT)

    def reset(self) -> None:
        """Close with RST."""
        sock = self.transport.get_extra_info("socket")
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class Callers:
    """Everybody who fails; each method sends some requests and returns how many they were."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._count = 0

    async def _connect(self) -> Talk:
        loop = asyncio.get_running_loop()
        for _ in range(100):
            with suppress(OSError):
                _, talk = await loop.create_connection(Talk, "127.0.0.1", self._broker.port)
                return talk
            await asyncio.sleep(0.1)
        raise SystemExit("the broker takes no connection")

    def _request(self, *, visitor: str = "", agent: str = AGENT, secret: str = "") -> bytes:
        self._count += 1
        visitor = visitor or f"{self._count:016x}"
        body = f'{{"agent_id":"{agent}","fingerprint":"{visitor}"}}'
        return (
            "POST /v1/embed-tokens/request HTTP/1.1\r\nHost: broker\r\n"
            f"api-secret: {secret or self._broker.secret}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()

    async def _pipelined(self, requests: list[bytes]) -> int:
        """Send them at once on one connection and read what is answered."""
        talk = await self._connect()
        talk.transport.write(b"".join(requests))
        await talk.answered(len(requests))
        talk.transport.close()
        await talk.closed.wait()
        return max(talk.answers, 1)

    async def not_http(self) -> int:
        """Something else speaks: it is told so, or cut off."""
        talk = await self._connect()
        talk.transport.write(b"SSH-2.0-OpenSSH_9.6\r\n\x00\xff\r\n\r\n")
        await talk.answered(1)
        talk.transport.close()
        await talk.closed.wait()
        return 1

    async def half_a_head(self) -> int:
        """The head never ends: its sender goes."""
        talk = await self._connect()
        talk.transport.write(self._request()[:90])
        talk.transport.close()
        await talk.closed.wait()
        return 1

    async def unread(self) -> int:
        """Pipelined requests whose answers nobody reads, until the broker can write no more."""
        talk = await self._connect()
        talk.transport.pause_reading()
        visitor = "00000000000000aa"
        requests = [self._request(visitor=visitor)] * 4000
        talk.transport.write(b"".join(requests))
        await asyncio.sleep(0.1)
        talk.reset()
        return len(requests)

    async def wrong_secret(self) -> int:
        """Nobody's secret."""
        secret = secrets.token_urlsafe(16)
        return await self._pipelined([self._request(secret=secret) for _ in range(50)])

    async def limited(self) -> int:
        """One visitor who asks without end."""
        visitor = "00000000000000bb"
        requests = [self._request(visitor=visitor, agent=LIMITED) for _ in range(50)]
        return await self._pipelined(requests)

    async def paused(self) -> int:
        """Visitors who come while the vendor asks for a pause."""
        return await self._pipelined([self._request() for _ in range(20)])

    async def cancelled(self) -> int:
        """A visitor who goes while a mint is waited for."""
        talk = await self._connect()
        talk.transport.write(self._request())
        await asyncio.sleep(0.005)
        talk.transport.close()
        await talk.closed.wait()
        return 1

    async def reset(self) -> int:
        """A connection that is reset in the head, before the body, and after the request."""
        request = self._request()
        head = request.index(b"\r\n\r\n") + 4
        for end in (90, head, len(request)):
            talk = await self._connect()
            talk.transport.write(request[:end])
            await asyncio.sleep(0)
            talk.reset()
        return 3


def kinds(callers: Callers) -> Iterator[tuple[str, Callable[[], Awaitable[int]], int]]:
    """Yield each kind with its name and how many do it at the same time."""
    yield "not_http", callers.not_http, 40
    yield "half_a_head", callers.half_a_head, 40
    yield "unread", callers.unread, 8
    yield "wrong_secret", callers.wrong_secret, 20
    yield "limited", callers.limited, 20
    yield "paused", callers.paused, 20
    yield "cancelled", callers.cancelled, 15
    yield "reset", callers.reset, 20


async def repeat(send: Callable[[], Awaitable[int]], count: int, at_once: int) -> None:
    """Let so many senders go on until `count` requests were sent."""
    sent = 0

    async def sender() -> None:
        nonlocal sent
        while sent < count:
            more = await send()  # in a line of its own: `+=` would have read `sent` before
            sent += more

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(sender())


def grown(before: dict[str, int], after: dict[str, int], seconds: float) -> dict[str, int]:
    """Return the types with more objects than can be under way after so long, and by how many."""
    more = {name: count - before.get(name, 0) for name, count in after.items()}
    return {
        name: count
        for name, count in more.items()
        if count > MOST_OBJECTS + (min(seconds, 3600) if name in BY_SECOND else 0)
        and after[name] > BOUNDED.get(name, 0)
    }


async def run(requests: int, wanted: set[str]) -> int:
    """Send everything, print and judge; returns the exit code."""
    failures = 0
    quick = VendorSettings(ip=None, latency=0.02)
    with tempfile.TemporaryDirectory() as folder:
        async with FakeVendor(quick, seed=1) as vendor:
            broker = await asyncio.to_thread(Broker, Path(folder), vendor)
            callers = Callers(broker)
            try:
                for name, send, at_once in kinds(callers):
                    if wanted and name not in wanted:
                        continue
                    vendor.heal()
                    if name == "paused":
                        vendor.fail(faults.error(Refusal.RATE_LIMITED, retry_after="5"))
                    failures += await one(broker, name, send, at_once, requests)
            finally:
                await asyncio.to_thread(broker.close)
    return 1 if failures else 0


async def one(
    broker: Broker, name: str, send: Callable[[], Awaitable[int]], at_once: int, requests: int
) -> int:
    """Send one kind; returns how many things grew."""
    first = min(FIRST, requests // 2)
    began = time.monotonic()
    await repeat(send, first, at_once)
    before = await broker.measure()
    await repeat(send, requests - first, at_once)
    after = await broker.measure()
    more = grown(before["objects"], after["objects"], time.monotonic() - began)
    bytes_more = after["rss"] - before["rss"]
    good = not more and bytes_more <= MOST_BYTES
    print(
        f"{'ok    ' if good else 'FAILED'} {name:13} {requests:>8} requests"
        f" {time.monotonic() - began:6.1f} s  RSS {before['rss'] / 2**20:6.1f} ->"
        f" {after['rss'] / 2**20:6.1f} MiB  objects {sum(before['objects'].values())} ->"
        f" {sum(after['objects'].values())}  {more or ''}",
        flush=True,
    )
    return 0 if good else 1


def main() -> int:
    """Read the command line and run; returns the exit code."""
    if "--child" in sys.argv[1:2]:
        return child()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000, help="of each kind")
    parser.add_argument("--kinds", default="", help="names with commas between; all if left out")
    options = parser.parse_args()
    return uvloop.run(run(options.requests, set(filter(None, options.kinds.split(",")))))


if __name__ == "__main__":
    sys.exit(main())
