"""Replicas as operators run them: broker processes on one store, before one vendor, and askers.

The vendor is the test's own; brokers and stores are processes that a test kills, pauses, cuts off.
"""

import asyncio
import secrets
import signal
import time
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import aiohttp
from msgspec import Struct
from processes import Broker, Tree, good, merged, secret_in
from redis.exceptions import RedisError
from servers import AnyServer, StoreServer, free_port

from broker.app.app import App
from broker.config import load as config
from broker.testing import FakeVendor, VendorSettings

AGENT = "A78WKV4515"
TOKEN_PATH = "/v1/embed-tokens/request"

UNLIMITED = VendorSettings(ip=None)
"""A vendor that fails only where a test says so."""

WIDE = {"rate": 600_000, "per": "60s", "burst": 100_000}
"""A limit that no test meets."""

LONG_STORE_TIMEOUT = {"store.timeout": "2s"}
"""For replicas that must share: other tests may take the machine for longer than 50 ms."""

TIMEOUT = 30.0
"""Seconds for an asker; longer than any answer may take."""


def visitor() -> str:
    """Make a new visitor's fingerprint."""
    return secrets.token_hex(16)


def tree_for(folder: Path, store: AnyServer | str, vendor: FakeVendor | None = None) -> Tree:
    """Return settings of a replica on this store; before a vendor it relays, with a wide budget."""
    url = store if isinstance(store, str) else store.url
    tree = good(folder) | {
        "store": {"url": url, "encryption_key": secrets.token_urlsafe(48)},
        "limits": {"fingerprint": WIDE, "fingerprint_mints": WIDE, "agent": WIDE},
        "log": {"level": "info"},
    }
    if vendor is None:
        return tree
    return merged(
        tree,
        {
            "issuer.kind": "upstream",
            "issuer.upstream": {"base_url": vendor.url, "api_secret": vendor.secret.reveal()},
            "issuer.budget": {"rate": 600_000, "burst": 1000, "max_wait": "8s", "window": 601_000},
        },
    )


class Reply(Struct):
    """What a replica answered, after how many seconds; status 0 where it did not."""

    status: int
    body: Any
    headers: Mapping[str, str]
    seconds: float

    @property
    def token(self) -> str:
        """The token; the request must have got one."""
        assert self.status == 200, self.body
        token: str = self.body["data"]["token"]
        return token

    @property
    def session(self) -> str:
        """Its session."""
        assert self.status == 200, self.body
        session: str = self.body["data"]["session_id"]
        return session

    @property
    def reused(self) -> bool:
        """Whether it was a hit."""
        return self.headers["Cache-Status"] == "embed-token-broker; hit"


class Replica:
    """A broker process, and a backend that asks it."""

    def __init__(self, broker: Broker, secret: str) -> None:
        self.broker = broker
        self._secret = secret
        self.http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=TIMEOUT)
        )

    async def request_token(self, fingerprint: str | None = None, agent: str = AGENT) -> Reply:
        """Ask for a token; a fingerprint left out is a new visitor's."""
        body = {"agent_id": agent, "fingerprint": fingerprint or visitor()}
        began = time.perf_counter()
        async with self.http.post(
            self.broker.url + TOKEN_PATH, json=body, headers={"api-secret": self._secret}
        ) as answer:
            said = await answer.json()
            return Reply(answer.status, said, answer.headers, time.perf_counter() - began)

    async def metric(self, sample: str) -> float:
        """Return the value of one sample, named as in the exposition."""
        async with self.http.get(f"{self.broker.admin_url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split(" ")[0] == sample)

    async def probe(self, path: str) -> tuple[int, Any]:
        """Return status and body of a probe on the admin listener."""
        async with self.http.get(f"{self.broker.admin_url}{path}") as answer:
            return answer.status, await answer.json(content_type=None)

    async def is_degraded(self) -> bool:
        """Whether it says that it works without the store."""
        return await self.metric("broker_store_degraded") == 1

    async def kill(self) -> None:
        """End it as the kernel does; not awaited is nothing, because it has no time to say more."""
        self.broker.send(signal.SIGKILL)
        await asyncio.to_thread(self.broker.wait)

    async def close(self) -> None:
        """End it in order, unless it was killed; a defect in its log is a failure."""
        await self.http.close()
        with self.broker as broker:
            if broker.process.poll() is None:
                code = await asyncio.to_thread(broker.end)
                assert code == 0, broker.log()
            for bug in ("broker.defect", "broker.background_restarted"):
                assert bug not in broker.log(), broker.log()
            assert "Traceback" not in broker.log(), broker.log()


async def start(
    folder: Path,
    tree: Tree,
    prefix: Sequence[str] = (),
    **variables: str,
) -> Replica:
    """Start one replica in a folder of its own, while the test's loop goes on."""
    own = folder / secrets.token_hex(4)
    own.mkdir()
    secret = secret_in(tree["clients"]["web"]["secret_file"])
    broker = await asyncio.to_thread(Broker.configured, own, tree, prefix, **variables)
    return Replica(broker, secret)


@asynccontextmanager
async def replicas(folder: Path, tree: Tree, count: int = 2) -> AsyncIterator[list[Replica]]:
    """Run replicas on the same settings, each on ports of its own."""
    async with AsyncExitStack() as stack:
        started = await asyncio.gather(*(start(folder, tree) for _ in range(count)))
        for replica in started:
            stack.push_async_callback(replica.close)
        await joined(started)
        yield list(started)


@contextmanager
def pair(folder: Path, tree: Tree) -> Iterator[list[Broker]]:
    """Run two replicas for several tests; each test asks them with sessions of its own loop."""
    with ThreadPoolExecutor(2) as pool:
        started = list(pool.map(partial(_configured, folder, tree), range(2)))
    with started[0], started[1]:
        yield started
        for broker in started:
            code = broker.end()
            assert code == 0, broker.log()


def _configured(folder: Path, tree: Tree, place: int) -> Broker:
    own = folder / str(place)
    own.mkdir()
    return Broker.configured(own, tree)


async def joined(fleet: Iterable[Replica]) -> None:
    """Return when every one has said so at the store, twice: then each has seen the others."""
    beats = 'broker_store_duration_seconds_count{operation="heartbeat"}'
    for replica in fleet:
        seen = await replica.metric(beats)

        async def again(replica: Replica = replica, seen: float = seen) -> bool:
            return await replica.metric(beats) >= seen + 2

        await until(again, "a heartbeat")


async def store_errors(fleet: Iterable[Replica]) -> float:
    """Count the calls to the store that failed."""
    reasons = ("timeout", "connection", "script", "cluster_down", "readonly", "other")
    samples = [f'broker_store_errors_total{{reason="{reason}"}}' for reason in reasons]
    return sum([await replica.metric(sample) for replica in fleet for sample in samples])


@asynccontextmanager
async def undisturbed(fleet: Sequence[Replica]) -> AsyncIterator[None]:
    """Make sure that the replicas shared: every call to the store was answered."""
    before = await store_errors(fleet)
    yield
    assert await store_errors(fleet) == before


def fixed_place(tree: Tree) -> Tree:
    """Give a replica a port that it finds again after a restart, and with it its name."""
    return merged(tree, {"server.listen": f"127.0.0.1:{free_port()}"})


class Crowd:
    """Askers who never stop: whoever is due asks, whatever became of those before."""

    def __init__(self) -> None:
        self.replies: list[tuple[float, str, Reply]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._callers: list[asyncio.Task[None]] = []

    def let(
        self, kind: str, replica: Replica, rate: float, fingerprints: Sequence[str] = ()
    ) -> None:
        """Let somebody ask `rate` times a second: these visitors in turn, or always a new one."""
        self._callers.append(
            asyncio.create_task(self._keep_requesting(kind, replica, rate, fingerprints))
        )

    async def stop(self) -> None:
        """Let nobody ask any more, and wait for the answers."""
        for caller in self._callers:
            caller.cancel()
        await asyncio.gather(*self._callers, *self._tasks, return_exceptions=True)
        self._callers.clear()

    def of(self, kind: str, since: float = 0.0, until: float = float("inf")) -> list[Reply]:
        """Return the replies to one kind of asker, asked between two moments."""
        return [reply for at, who, reply in self.replies if who == kind and since <= at < until]

    def statuses(self, kind: str, since: float = 0.0, until: float = float("inf")) -> Counter[int]:
        """Count them by status."""
        return Counter(reply.status for reply in self.of(kind, since, until))

    def slowest(self, kind: str) -> float:
        """Return the seconds that the slowest reply took."""
        return max(reply.seconds for reply in self.of(kind))

    async def _keep_requesting(
        self, kind: str, replica: Replica, rate: float, fingerprints: Sequence[str]
    ) -> None:
        count = 0
        while True:
            fingerprint = fingerprints[count % len(fingerprints)] if fingerprints else visitor()
            task = asyncio.create_task(self._request_token(kind, replica, fingerprint))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            count += 1
            await asyncio.sleep(1 / rate)

    async def _request_token(self, kind: str, replica: Replica, fingerprint: str) -> None:
        asked = time.monotonic()
        try:
            reply = await replica.request_token(fingerprint)
        except (aiohttp.ClientError, TimeoutError) as error:
            reply = Reply(0, repr(error), {}, time.monotonic() - asked)
        self.replies.append((asked, kind, reply))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


@asynccontextmanager
async def replica_here(tree: Tree) -> AsyncIterator[App]:
    """Run one in this process, for what no route can ask of it, and drain it."""
    settings = config.load(None, {}, tree)
    app = App(settings, lambda: settings, {})
    await app.start()
    try:
        yield app
    finally:
        app.stop()
        await app.run()


async def until(look: Any, what: str, timeout: float = TIMEOUT) -> float:
    """Ask every 10 ms until `await look()` is true; returns the seconds that it took."""
    began = time.monotonic()
    while not await look():
        assert time.monotonic() - began < timeout, f"waited {timeout:g} s for {what}"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def back(fleet: Iterable[Replica]) -> float:
    """Return the seconds until no replica is degraded any more."""
    began = time.monotonic()
    for replica in fleet:

        async def well(replica: Replica = replica) -> bool:
            return not await replica.is_degraded()

        await until(well, "the store to be back")
    return time.monotonic() - began


async def away(fleet: Iterable[Replica]) -> float:
    """Return the seconds until every replica says that it is degraded."""
    began = time.monotonic()
    for replica in fleet:
        await until(replica.is_degraded, "a replica to notice")
    return time.monotonic() - began


async def leases(server: StoreServer) -> int:
    """Count the leases that are held at this moment."""

    def count() -> int:
        with server.client() as client:
            try:
                names = list(client.scan_iter(match="etb:*lease:*", count=1000))
                return sum(client.hexists(name, "holder") for name in names)
            except RedisError:
                return 0

    return await asyncio.to_thread(count)
