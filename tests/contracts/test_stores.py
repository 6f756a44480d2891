"""Every store keeps the contract; beside it, what only the store in memory can show."""

import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from msgspec.structs import replace
from replica import Replica, opened
from servers import AnyServer, StoreCluster, StoreServer
from state_files import Broker

pytest.register_assert_rewrite("store_contract")

from store_contract import (  # noqa: E402 - rewritten first
    AwaitedVisit,
    Opened,
    OpenStore,
    StoreContract,
    keep,
    limits_of,
    mint_denied,
    request_of,
    token_at,
    visit,
)

from broker.limits.policy import Limits  # noqa: E402
from broker.model import LimitName  # noqa: E402
from broker.rules.bucket import Limit  # noqa: E402
from broker.stores.base import Visit  # noqa: E402
from broker.stores.memory import MemoryStore  # noqa: E402
from broker.stores.token_cache import TokenCache  # noqa: E402
from broker.testing import FakeClock  # noqa: E402

SECOND = 1_000_000
HOUR = 3600 * SECOND


class OpenedMemory(Opened):
    """The store in memory, on a clock that stands still."""

    def __init__(self, limits: Limits) -> None:
        self.clock = FakeClock()
        tokens = TokenCache(1000, keep_until=lambda token: token.dies_mono, mono=self.clock.mono)
        self.store: MemoryStore = MemoryStore(limits, tokens, self.clock)

    def moments(self) -> tuple[int, int]:
        return self.clock.mono(), self.clock.wall()

    async def pass_time(self, us: int) -> None:
        self.clock.advance(us / SECOND)

    def use_limits(self, limits: Limits) -> None:
        self.store.use_limits(limits)


class TestMemoryStore(StoreContract):
    """The contract, in memory."""

    @pytest.fixture
    def open_store(self) -> OpenStore:
        async def opened(limits: Limits) -> Opened:
            return OpenedMemory(limits)

        return opened


class OpenedDurable(Opened):
    """The store with a file behind it, on a clock that stands still."""

    def __init__(self, broker: Broker, store: MemoryStore) -> None:
        self.clock = broker.clock
        self.store: MemoryStore = store

    def moments(self) -> tuple[int, int]:
        return self.clock.mono(), self.clock.wall()

    async def pass_time(self, us: int) -> None:
        self.clock.advance(us / SECOND)

    def use_limits(self, limits: Limits) -> None:
        self.store.use_limits(limits)


class TestDurableStore(StoreContract):
    """The contract, with a file: each mint waits for it, as a relay's do."""

    @pytest.fixture
    async def open_store(self, tmp_path: Path) -> AsyncIterator[OpenStore]:
        async with AsyncExitStack() as stack:

            async def open_one(limits: Limits) -> Opened:
                broker = Broker(tmp_path / f"{secrets.token_hex(4)}.db")
                broker.limits = limits
                backend = await stack.enter_async_context(broker.opened())
                return OpenedDurable(broker, backend.store)

            yield open_one


class OpenedShared(Opened):
    """A store on a server, whose clock the test moves together with the replica's."""

    def __init__(self, server: AnyServer, limits: Limits) -> None:
        self.replica = Replica(server.address, limits, now=lambda: self.now)
        self.store = self.replica.store
        self.now = 1_790_000_000_123_456  # us; a date of sixteen digits, as servers have

    def moments(self) -> tuple[int, int]:
        return self.replica.moments()

    async def pass_time(self, us: int) -> None:
        await self.replica.settled()
        self.now += us
        self.replica.clock.advance(us / SECOND)

    def use_limits(self, limits: Limits) -> None:
        self.replica.use_limits(limits)


class SharedStoreContract(StoreContract):
    """The contract on a server: no call may fail, or the store in memory would answer instead."""

    @pytest.fixture
    async def open_store(self, server: AnyServer) -> AsyncIterator[OpenStore]:
        async with AsyncExitStack() as stack:

            async def open_one(limits: Limits) -> Opened:
                server.flush()
                each = OpenedShared(server, limits)
                await stack.enter_async_context(opened(each.replica))
                replicas.append(each.replica)
                return each

            replicas: list[Replica] = []
            yield open_one
            for replica in replicas:
                await replica.settled()
                assert replica.errors == {}


@pytest.mark.parts
class TestValkey(SharedStoreContract):
    """The contract on Valkey 9, through a Unix socket."""

    @pytest.fixture
    def server(self, valkey: StoreServer) -> StoreServer:
        return valkey

    async def test_visits_are_asked_for_by_a_question(self, open_store: OpenStore) -> None:
        """So the contract above holds for those; what is told says that something was done."""
        opened, request = await open_store(limits_of()), request_of()
        await visit(opened, request)  # the server has the script from then on
        asked = AwaitedVisit()
        assert opened.store.start_visit(request, opened.moments()[0], asked)
        assert isinstance(await asked.said, Visit)

    async def test_two_tokens_of_a_visitor_are_asked_for_apart(self, open_store: OpenStore) -> None:
        """G8: by a process that holds neither, one after the other."""
        opened = await open_store(limits_of())
        requests = [request_of("9f86d081"), replace(request_of("9f86d081"), model="m")]
        tokens = [await keep(opened, request, token_at(opened)) for request in requests]
        assert isinstance(opened, OpenedShared)
        opened.replica.token_cache.clear()
        found = [(await visit(opened, request)).token for request in requests]
        assert [token and token.body for token in found] == [token.body for token in tokens]


@pytest.mark.parts
class TestRedis(SharedStoreContract):
    """The contract on Redis 7, by TCP."""

    @pytest.fixture
    def server(self, redis7: StoreServer) -> StoreServer:
        return redis7


@pytest.mark.parts
class TestS7Cluster(SharedStoreContract):
    """The contract on a cluster: no script touches two slots."""

    @pytest.fixture
    def server(self, valkey_cluster: StoreCluster) -> StoreCluster:
        return valkey_cluster


async def test_M1_tidying_gives_back_what_is_over() -> None:
    """Tokens and buckets of visitors who left: an hour later nothing is tracked or held."""
    opened = OpenedMemory(limits_of(*[Limit(300, SECOND)] * 4))
    for _ in range(200):
        request = request_of()
        await opened.store.admit(request, request.key)
        await keep(opened, request, token_at(opened, HOUR))
    sizes = {name: len(bucket) for name, bucket in opened.store.buckets.items()}
    assert sizes == {
        LimitName.FINGERPRINT: 200,
        LimitName.FINGERPRINT_MINTS: 200,
        LimitName.AGENT: 1,
        LimitName.CLIENT: 1,
    }
    assert len(opened.store.tokens) == 200
    for _ in range(60):
        await opened.pass_time(60 * SECOND)
        opened.store.purge_expired()
    assert [len(bucket) for bucket in opened.store.buckets.values()] == [0] * 4
    assert opened.store.tokens.counts.expired.value == 200
    assert len(opened.store.tokens) == 0


async def test_L12_a_dry_run_is_counted_by_limit() -> None:
    """Each refusal that was spared, under the limit that would have refused; the others stay 0."""
    limit = Limit(2, HOUR)
    opened = OpenedMemory(limits_of(limit, limit, dry_run=frozenset({LimitName.FINGERPRINT})))
    request = request_of()
    for _ in range(7):
        await opened.store.admit(request, request.key)
        await mint_denied(opened, request)
    counted = {
        name: bucket.counts.dry_run_denied.value for name, bucket in opened.store.buckets.items()
    }
    assert counted == {
        LimitName.FINGERPRINT: 5,
        LimitName.FINGERPRINT_MINTS: 0,
        LimitName.AGENT: 0,
        LimitName.CLIENT: 0,
    }


async def test_L7_a_flood_over_the_bound_leaves_an_exhausted_visitor_exhausted() -> None:
    """G6: more visitors than are tracked, in every limit; the gauges stop at the bound."""
    limits = limits_of(Limit(2, HOUR), Limit(1, HOUR))
    opened = OpenedMemory(limits)
    opened.use_limits(
        Limits(limits.fingerprint, limits.fingerprint_mints, limits.agent, None, max_tracked=1000)
    )
    victim = request_of()
    for _ in range(3):
        await opened.store.admit(victim, victim.key)
        await mint_denied(opened, victim)
    for _ in range(20_000):
        request = request_of()
        await opened.store.admit(request, request.key)
        await mint_denied(opened, request)
    assert (await opened.store.admit(victim, victim.key)).rejection is not None
    assert await mint_denied(opened, victim) is not None
    visitors = opened.store.buckets[LimitName.FINGERPRINT]
    assert (len(visitors), visitors.counts.overflowed.value) == (1000, 19_001)
