"""Puts the shared store together, and owns what runs beside it: heartbeats, leases, news."""

import secrets
import socket
from collections.abc import Callable

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
from broker.valkey.client.guarded import OPERATION_TIMEOUT, StoreClient
from broker.valkey.client.pubsub import listen
from broker.valkey.client.topology import nodes_at
from broker.valkey.fallback import OutageDebt, SharedStore
from broker.valkey.key_names import Names
from broker.valkey.membership import Fleet
from broker.valkey.negative_cache import SharedNegativeCache
from broker.valkey.session_fallback import SharedSessions
from broker.valkey.sessions import ValkeySessions
from broker.valkey.slots import SharedSlots
from broker.valkey.store import ValkeyStore

FIRST_BEATS = 10
"""Heartbeats at the start, one after the other, until the server has answered or is known to be
away: the first answers depend on it."""


class SharedBackend:
    """The store on a server, and everything that needs the same server.

    `place` names this process among those of its host, the same after a restart; `origins` are the
    issuer's; `is_first` says that it is the first of its instance's workers.  Made in the event
    loop's thread; `open` before the first request.
    """

    def __init__(
        self,
        settings: Settings,
        address: StoreAddress,
        access: Access,
        key: Secret,
        limits: Limits,
        front: TokenCache,
        clock: Clock,
        metrics: Metrics,
        place: str,
        origins: Callable[[], frozenset[str]],
        timeout: float = OPERATION_TIMEOUT,
        *,
        is_first: bool = True,
    ) -> None:
        store = settings.store
        self._replica = secrets.token_hex(8)
        self._origins = origins
        self._closed = store.on_error == "closed"
        fixed = store.replicas if isinstance(store.replicas, int) else None
        self.names = names_of(settings, key)
        self.server = StoreClient(nodes_at(address, access, timeout), clock, metrics.store)
        self.seal = Seal(key)
        name = f"{socket.gethostname()}/{place}"
        self.fleet = Fleet(
            self.server, self.names, name, fixed, settings.server.workers, is_first=is_first
        )
        ends = KnownEnds(lambda visitor: self.names.visitor(visitor).epoch, clock.mono)
        self.alone = MemoryStore(limits, front, clock, metrics.limits.counts, ends, clock.wall)
        self._remote = ValkeyStore(
            self.server,
            self.names,
            self.seal,
            front,
            limits,
            clock,
            metrics.limits.counts,
            self._replica,
            origins,
            OutageDebt(self.alone, clock),
            ends,
        )
        self.store = SharedStore(
            self.server,
            self._remote,
            self.alone,
            limits,
            lambda: self.fleet.replicas,
            closed=self._closed,
        )
        most = settings.sessions.max_recorded
        box = Box(key, "sessions in a shared store")
        self.book = SharedSessions(
            ValkeySessions(self.server, self.names, box, most, clock),
            MemorySessions(most, clock),
            self.store,
            closed=self._closed,
        )
        self.refusals = SharedNegativeCache(self.server, self.names, LocalNegativeCache(clock))
        self._slots: SharedSlots | None = None
        self._counts = metrics.process.background
        self._background = Background(self._counts)

    def slots(self, budget: Budget) -> SharedSlots:
        """Return the budget's slots, one source for all replicas."""
        self._slots = SharedSlots(
            budget,
            self.server,
            self.names,
            self.fleet,
            self._replica,
            self._counts,
            closed=self._closed,
        )
        return self._slots

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
        self._background.start(BackgroundTask.RECORDS, self.book.keep_written)
        self._background.start(BackgroundTask.SUBSCRIPTION, self._listen)

    def use_access(self, access: Access) -> None:
        """Be let in otherwise, from the next connection on."""
        self.server.nodes.use_access(access)

    async def close(self) -> None:
        """Say farewell and close every connection."""
        await self._background.close()
        await self.store.close()
        await self.book.close()
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
        channels = (self.names.wake(self._replica.encode()), self.names.channel)
        await listen(self.server.nodes, channels, self._heard)

    def _heard(self, channel: bytes, message: bytes) -> None:
        if channel == self.names.channel:
            self._remote.heard_news(message)
            if self._slots is not None:
                self._slots.heard(message)
        else:
            self._remote.leases.heard(message)


def names_of(settings: Settings, key: Secret) -> Names:
    """Return the names of keys in the store."""
    return Names(derive(key, "key names"), _vendor_of(settings))


def _vendor_of(settings: Settings) -> str:
    """Name whose budget it is: two brokers before one vendor share it; `config` has one form."""
    if settings.issuer.kind == "upstream":
        return settings.issuer.upstream.base_url
    return f"local {settings.issuer.local.issuer}"
