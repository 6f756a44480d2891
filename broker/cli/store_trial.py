"""Does once what a broker does with its store all day, and tells what failed: for `broker doctor`.

With the broker's own code, user and scripts, under names that nobody else has: in a fleet that was
just made up, so no budget, member or visitor of a running broker is touched.  What it wrote it
deletes.  A server that takes no writes, a right that is missing, a memory that is full: each shows
itself where a broker would meet it, and not by what the server says of itself.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from msgspec.structs import replace
from typing_extensions import override

from broker.app import factory
from broker.app.shared_backend import SharedBackend, StoreConnection, StoreTarget
from broker.clock import SystemClock
from broker.config.addresses import Access, StoreAddress
from broker.config.settings import LimitSettings, LimitsSettings, SessionSettings, Settings
from broker.errors import BrokerError
from broker.issuers.vendor.replies import Refused, Scope
from broker.model import EmbedToken, Secret, Session, TokenRequest
from broker.pacing.slots import Budget
from broker.sessions.base import Place, Query
from broker.stores.base import Lease
from broker.stores.token_cache import TokenCache
from broker.telemetry.metrics import Metrics
from broker.units import SECOND
from broker.valkey.client.errors import NoScript, Reason, Redirect, StoreFailed
from broker.valkey.client.pubsub import Subscription, subscribe
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import command
from broker.valkey.client.shapes import ANYTHING, Shape
from broker.valkey.client.target import Target
from broker.valkey.client.topology import Topology

TIMEOUT = 3.0
"""Seconds for a call: the first one connects, too."""

VISITORS = 12
"""Visitors of a trial: on a cluster their keys lie in some seventy slots, on every primary."""

LIFE = 60
"""Seconds that a made-up token lives: no floor is applied to it, and nobody is given it."""


class Witness(Topology):
    """Passes calls on; keeps what failed, how long the fastest took, and the keys of all."""

    def __init__(self, nodes: Topology) -> None:
        self._nodes = nodes
        self.failures: list[StoreFailed] = []
        self.fastest = TIMEOUT
        self.keys: set[bytes] = set()

    @override
    async def open(self) -> None:
        await self._nodes.open()

    @override
    async def close(self) -> None:
        await self._nodes.close()

    @override
    async def command(self, key: bytes, packed: bytes, shape: Shape = ANYTHING) -> Reply:
        self.keys.update(_keys_of(packed) or (key,))
        began = time.perf_counter()
        try:
            reply = await self._nodes.command(key, packed, shape)
        except StoreFailed as failed:
            self.failures.append(failed)
            raise
        self.fastest = min(self.fastest, time.perf_counter() - began)
        return reply

    @override
    def anywhere(self) -> Target:
        return self._nodes.anywhere()

    @override
    def use_access(self, access: Access) -> None:
        self._nodes.use_access(access)

    async def call(self, *words: bytes) -> Reply | StoreFailed:
        """Send a command that a broker would not; what fails is told, not kept."""
        try:
            return await self._nodes.command(b"etb:", command(*words))
        except StoreFailed as failed:
            return failed

    async def clean_up(self) -> None:
        """Delete what was written."""
        for key in self.keys:
            with suppress(StoreFailed, NoScript, Redirect):
                _ = await self._nodes.command(key, command(b"DEL", key))


@asynccontextmanager
async def trial(address: StoreAddress, access: Access) -> AsyncIterator[Witness]:
    """Do everything once; the server can be asked more afterwards."""
    fleet, key = secrets.token_hex(8), Secret(secrets.token_urlsafe(48))
    first, second = (_broker(address, access, fleet, key) for _ in range(2))
    witness = first.server.nodes = second.server.nodes = Witness(first.server.nodes)
    await witness.open()
    try:
        await _membership(first, second, witness)
        if not witness.failures:
            await _visits(first, second)
            await _news(first, witness)
        yield witness
    finally:
        await witness.clean_up()
        await witness.close()


def _broker(address: StoreAddress, access: Access, fleet: str, key: Secret) -> SharedBackend:
    """Put a broker's part of the store together, in a fleet of its own."""
    settings = Settings(
        limits=LimitsSettings(client=LimitSettings(rate=6000, burst=1000)),
        sessions=SessionSettings(max_recorded=1),
    )
    local = replace(settings.issuer.local, issuer=f"doctor {fleet}")
    settings = replace(settings, issuer=replace(settings.issuer, local=local))
    clock = SystemClock()
    connection = StoreConnection(
        settings,
        StoreTarget(address, access, key, TIMEOUT),
        clock,
        Metrics("local", budget=True, shared_store=True),
        f"doctor {secrets.token_hex(4)}",
    )
    token_cache = TokenCache(VISITORS, keep_until=lambda token: token.dies_mono, mono=clock.mono)
    return connection.backend(factory.limits(settings), token_cache, lambda: frozenset({fleet}))


async def _membership(first: SharedBackend, second: SharedBackend, witness: Witness) -> None:
    """Join, learn of each other, tell a server that has forgotten, take a call from the budget."""
    await second.fleet.beat()
    await first.fleet.beat()
    members = first.names.members
    with suppress(StoreFailed):
        _ = await witness.command(members, command(b"DEL", members))
    await first.fleet.beat()
    slots = first.connection.slots(Budget(rate=6000, per=60, burst=100, max_wait=5))
    await slots.start()
    with suppress(StoreFailed):
        _ = await slots.take_if_headroom()
    await slots.close()
    await first.fleet.leave()


async def _visits(first: SharedBackend, second: SharedBackend) -> None:
    """Mint and reuse, record and look up, wait for somebody, give up, end."""
    await asyncio.gather(*(_visit(first, second, number) for number in range(VISITORS)))
    await first.store.close()
    await second.store.close()
    await first.server.settle()
    await second.server.settle()


async def _visit(first: SharedBackend, second: SharedBackend, number: int) -> None:
    # what fails was seen; the broker's own policy decides what follows, here as everywhere
    with suppress(StoreFailed, BrokerError):
        await _come_and_go(
            first, second, TokenRequest("doctor", "doctor", secrets.token_hex(16)), number
        )


async def _come_and_go(
    first: SharedBackend, second: SharedBackend, request: TokenRequest, number: int
) -> None:
    store = first.store
    _ = await store.charge_client(request.client)
    _ = await store.admit(request, request.key)
    lease = await _lead(first, request)
    await first.store.renew_leases()
    waiting = asyncio.create_task(second.store.lead(request, request.key, lambda _token: True))
    await asyncio.sleep(0.05)
    session = _session(request, number)
    await first.sessions.record(session)
    _ = await store.keep(request, request.key, _token(first, lease), lease)
    await asyncio.wait([waiting], timeout=TIMEOUT)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    _ = await second.store.peek(request, request.key)
    _ = await first.sessions.find(session.session_id)
    _ = await first.sessions.find_token(session.digest)
    _ = await first.sessions.page(Query(agent=request.agent), Place(), 10)
    await first.sessions.mark(session, by_client=False)
    await store.revoke_visitor(request.client, request.fingerprint, request.key)
    await first.sessions.forget(session)
    store.abandon(request, request.key, await _lead(first, request), None)
    first.refusals.remember(request, Refused(404, "NOT_FOUND", "no", Scope.AGENT_MODEL))
    first.refusals.forget(request)
    _ = await first.refusals.find(request)


async def _news(broker: SharedBackend, witness: Witness) -> None:
    """Subscribe as a broker does, and hear what it publishes."""
    channel = broker.names.wake(b"doctor" + secrets.token_hex(8).encode())
    heard = asyncio.Event()
    channels = (channel, broker.names.channel)
    target = witness.anywhere()
    subscription = Subscription(
        channels, b"".join(target.greeting()), lambda _channel, _message: heard.set()
    )
    try:
        await subscribe(target, subscription)
        _ = await witness.command(channel, command(b"PUBLISH", channel, b"-"))
        async with asyncio.timeout(TIMEOUT):
            await heard.wait()
    except StoreFailed as failed:
        witness.failures.append(failed)
    except (OSError, TimeoutError):
        witness.failures.append(StoreFailed(Reason.TIMEOUT, "what is published is not heard"))
    finally:
        subscription.close()


async def _lead(broker: SharedBackend, request: TokenRequest) -> Lease:
    lead = await broker.store.lead(request, request.key, lambda _token: False)
    if not isinstance(lead, Lease):
        raise StoreFailed(Reason.OTHER)
    return lead


def _token(broker: SharedBackend, lease: Lease) -> EmbedToken:
    clock, (origin,) = SystemClock(), broker.origins
    life = LIFE * SECOND
    return EmbedToken(
        b"-", clock.mono() + life, clock.wall() + life, life, life, lease.fence, lease.epoch, origin
    )


def _session(request: TokenRequest, number: int) -> Session:
    expires = SystemClock().wall() // SECOND + LIFE + number
    return Session(
        secrets.token_hex(16),
        request.client,
        request.agent,
        request.fingerprint,
        "",
        expires - LIFE,
        expires,
        secrets.token_bytes(32),
    )


def _keys_of(packed: bytes) -> list[bytes]:
    """Read the keys of a packed script call; none for any other command."""
    parts_ = packed.split(b"\r\n")
    if parts_[2] not in (b"EVALSHA", b"EVAL"):
        return []
    return parts_[8 : 8 + 2 * int(parts_[6]) : 2]
