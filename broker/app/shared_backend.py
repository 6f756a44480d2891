"""Puts the shared store together, and owns what runs beside it: heartbeats, leases, news."""

import secrets
import socket
from collections.abc import Callable

from msgspec import Struct

from broker.config.addresses import Access, StoreAddress
from broker.config.settings import Settings
from broker.issuers.negative_cache import LocalNegativeCache
from broker.limits.policy import Limits
from broker.model import Clock, Secret
from broker.pacing.slots import Budget
from broker.sealing import Box, Seal, derive
from broker.sessions.memory import MemorySessions
from broker.stores.epochs import KnownEnds
from broker.stores.memory import MemoryStore
from broker.stores.token_cache import TokenCache
from broker.tasks import Background
from broker.telemetry.labels import BackgroundTask
from broker.telemetry.metrics import Metrics
from broker.valkey.client.guarded import StoreClient
from broker.valkey.client.pubsub import listen
from broker.valkey.client.topology import nodes_at
from broker.valkey.fallback import OutageDebt, SharedStore
from broker.valkey.key_names import Names
from broker.valkey.membership import Fleet
from broker.valkey.negative_cache import SharedNegativeCache
from broker.valkey.session_fallback import SharedSessions
from broker.valkey.sessions import ValkeySessions
from broker.valkey.slots import SharedSlots
from broker.valkey.store import KnownHere, ServerAccess, ValkeyStore

FIRST_BEATS = 10
"""Heartbeats at the start, one after the other, until the server has answered or is known to be
away: the first answers depend on it."""


class StoreTarget(Struct, frozen=True):
    """Where the server is, how it lets the broker in, and the key that seals what is kept there.

    `timeout` is seconds for a call (`[store] timeout`).
    """

    address: StoreAddress
    access: Access
    key: Secret
    timeout: float


class StoreConnection:
    """What the server is for besides the store: membership, the budget, refusals of the vendor.

    It knows no issuer: an issuer and its pacer are made with it, the store after them.  `place`
    names this process among those of its host, the same after a restart; `is_first` says that it is
    the first of its instance's workers.
    """

    def __init__(
        self,
        settings: Settings,
        target: StoreTarget,
        clock: Clock,
        metrics: Metrics,
        place: str,
        *,
        is_first: bool = True,
    ) -> None:
        store = settings.store
        self.settings = settings
        self.key = target.key
        self.clock = clock
        self.metrics = metrics
        self.replica = secrets.token_hex(8)
        self.closed = store.on_error == "closed"
        self.names = names_of(settings, target.key)
        nodes = nodes_at(target.address, target.access, target.timeout)
        self.server = StoreClient(nodes, clock, metrics.store)
        fixed = store.replicas if isinstance(store.replicas, int) else None
        name = f"{socket.gethostname()}/{place}"
        self.fleet = Fleet(
            self.server, self.names, name, fixed, settings.server.workers, is_first=is_first
        )
        self.refusals = SharedNegativeCache(self.server, self.names, LocalNegativeCache(clock))
        self._slots: SharedSlots | None = None

    def slots(self, budget: Budget) -> SharedSlots:
        """Return the budget's slots, one source for all replicas."""
        self._slots = SharedSlots(
            budget,
            self.server,
            self.names,
            self.fleet,
            self.replica,
            self.metrics.process.background,
            closed=self.closed,
        )
        return self._slots

    def backend(
        self, limits: Limits, token_cache: TokenCache, origins: Callable[[], frozenset[str]]
    ) -> "SharedBackend":
        """Put the store of this server together; `origins` are the issuer's."""
        return SharedBackend(self, limits, token_cache, origins)

    def on_message(self, news: bytes) -> None:
        """Take note of news of the budget."""
        if self._slots is not None:
            self._slots.on_message(news)


class SharedBackend:
    """The store on a server, and everything that needs the same server.

    `token_cache` is where tokens are held; `origins` are the issuer's.  Made in the event loop's
    thread; `open` before the first request.
    """

    def __init__(
        self,
        connection: StoreConnection,
        limits: Limits,
        token_cache: TokenCache,
        origins: Callable[[], frozenset[str]],
    ) -> None:
        self.connection = connection
        self.names = connection.names
        self.server = connection.server
        self.fleet = connection.fleet
        self.refusals = connection.refusals
        self.seal = Seal(connection.key)
        self._origins = origins
        self._closed = connection.closed
        clock, metrics = connection.clock, connection.metrics
        ends = KnownEnds(lambda visitor: self.names.visitor(visitor).epoch, clock.mono)
        self.alone = MemoryStore(
            limits, token_cache, clock, metrics.limits.counts, ends, clock.wall
        )
        self._remote = ValkeyStore(
            ServerAccess(self.server, self.names, connection.replica),
            self.seal,
            origins,
            token_cache,
            limits,
            clock,
            metrics.limits.counts,
            KnownHere(OutageDebt(self.alone, clock), ends),
        )
        self.store = SharedStore(
            self.server,
            self._remote,
            self.alone,
            limits,
            lambda: self.fleet.replicas,
            closed=self._closed,
        )
        most = connection.settings.sessions.max_recorded
        box = Box(connection.key, "sessions in a shared store")
        self.sessions = SharedSessions(
            ValkeySessions(self.server, self.names, box, most, clock),
            MemorySessions(most, clock),
            self.store,
            closed=self._closed,
        )
        self._background = Background(metrics.process.background)

    async def open(self) -> None:
        """Begin; a server that is not there makes a degraded start, not a failed one."""
        await self.server.nodes.open()
        for _ in range(FIRST_BEATS):
            if self.fleet.is_member or self.server.is_away:
                break
            await self.fleet.beat()
        # A replica whose heart or ears stopped would be a danger to the others.
        self._background.start(BackgroundTask.HEARTBEATS, self.fleet.run)
        self._background.start(BackgroundTask.LEASES, self.store.keep_leases)
        self._background.start(BackgroundTask.RECORDS, self.sessions.keep_written)
        self._background.start(BackgroundTask.SUBSCRIPTION, self._listen)

    def use_access(self, access: Access) -> None:
        """Be let in otherwise, from the next connection on."""
        self.server.nodes.use_access(access)

    async def close(self) -> None:
        """Say farewell and close every connection."""
        await self._background.close()
        await self.store.close()
        await self.sessions.close()
        await self.fleet.leave()
        await self.server.close()

    @property
    def origins(self) -> frozenset[str]:
        """Names of what signs tokens that are good."""
        return self._origins()

    @property
    def is_degraded(self) -> bool:
        """Whether this process works without the server, or the fleet without this process."""
        return self.server.is_away or not self.fleet.is_heard

    @property
    def refuses(self) -> bool:
        """Whether it refuses to, because it was told so."""
        return self._closed and self.server.is_away

    async def _listen(self) -> None:
        channels = (self.names.wake(self.connection.replica.encode()), self.names.channel)
        await listen(self.server.nodes, channels, self._on_message)

    def _on_message(self, channel: bytes, message: bytes) -> None:
        if channel == self.names.channel:
            self._remote.on_message(message)
            self.connection.on_message(message)
        else:
            self._remote.leases.on_message(message)


def names_of(settings: Settings, key: Secret) -> Names:
    """Return the names of keys in the store."""
    return Names(derive(key, "key names"), _vendor_of(settings))


def _vendor_of(settings: Settings) -> str:
    """Name whose budget it is: two brokers before one vendor share it; `config` has one form."""
    if settings.issuer.kind == "upstream":
        return settings.issuer.upstream.base_url
    return f"local {settings.issuer.local.issuer}"
