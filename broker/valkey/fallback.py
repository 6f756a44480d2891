"""What happens when the shared store does not answer: written here, once.

`local`: this replica goes on by itself, with its share of every limit (rate and burst divided by
the replicas seen last), the tokens in its near cache, and flights of its own.  No limit is
multiplied; but at that moment buckets here are full, whatever was spent there: up to one burst
more, divided like the rest.  A visitor may get a second token from another replica.  No session can
be ended; those that were ended before stay so, as far as this replica has heard of it.  `closed`:
every request that needs the store is refused with 503.

Coming back grants no second burst: for as long as any bucket takes to refill, each call carries
what was charged here meanwhile, and the script takes the later of both.  A mint that began alone is
kept in the near cache only: at its next visit the server says whether its visitor was ended, and is
told of the token if not.
"""

import asyncio
from collections.abc import Callable, Mapping

from typing_extensions import override

from broker.errors import StoreAway
from broker.limits.buckets import BucketTable
from broker.limits.policy import Limits, share_of
from broker.model import Clock, EmbedToken, LimitName, TokenRequest
from broker.stores.base import Kept, Lease, Rejection, Store, Visit, VisitListener
from broker.stores.memory import MemoryStore
from broker.valkey.client.errors import StoreFailed
from broker.valkey.client.guarded import StoreClient
from broker.valkey.leases import RENEWAL
from broker.valkey.store import ValkeyStore


class SharedStore(Store):
    """The store on the server, and this replica's own while that is away.

    `alone` is that store; its tokens are the near cache's.  `closed` refuses instead.  `replicas`
    tells by how many a share is divided.
    """

    def __init__(
        self,
        server: StoreClient,
        remote: ValkeyStore,
        alone: MemoryStore,
        limits: Limits,
        replicas: Callable[[], int],
        *,
        closed: bool,
    ) -> None:
        self._server = server
        self._remote = remote
        self._alone = alone
        self._limits = limits
        self._replicas = replicas
        self._closed = closed
        self._divided_by = 1
        self._led_alone: set[int] = set()

    @property
    def buckets(self) -> Mapping[LimitName, BucketTable]:
        """What is held here: buckets are on the server while it is there."""
        return self._alone.buckets

    def use_limits(self, limits: Limits) -> None:
        """Put other limits in force, for the next request on."""
        self._limits = limits
        self._remote.use_limits(limits)
        self._alone.use_limits(share_of(limits, self._divided_by))

    @override
    def start_visit(self, request: TokenRequest, now: int, listener: VisitListener) -> bool:
        return self._remote.visits.start_visit(request, now, listener, self._instead)

    def _instead(self, request: TokenRequest, now: int, failed: StoreFailed) -> Visit:
        """Return what a visit meets here, because it failed there; raises StoreAway."""
        self._go_alone(failed)
        return self._alone.visit(request, now)

    @override
    async def admit(self, request: TokenRequest, key: str) -> Visit:
        try:
            return await self._remote.admit(request, key)
        except StoreFailed as failed:
            self._go_alone(failed)
        return await self._alone.admit(request, key)

    @override
    async def charge_client(self, client: str) -> Rejection | None:
        try:
            return await self._remote.charge_client(client)
        except StoreFailed as failed:
            self._go_alone(failed)
        return await self._alone.charge_client(client)

    @override
    async def peek(self, request: TokenRequest, key: str) -> EmbedToken | None:
        try:
            return await self._remote.peek(request, key)
        except StoreFailed as failed:
            self._go_alone(failed)
        return await self._alone.peek(request, key)

    @override
    async def lead(
        self, request: TokenRequest, key: str, good: Callable[[EmbedToken], bool]
    ) -> Lease | EmbedToken | Rejection:
        try:
            return await self._remote.lead(request, key, good)
        except StoreFailed as failed:
            self._go_alone(failed)
        lead = await self._alone.lead(request, key, good)
        if isinstance(lead, Lease):
            self._led_alone.add(lead.fence)
        return lead

    @override
    async def keep(self, request: TokenRequest, key: str, token: EmbedToken, lease: Lease) -> Kept:
        if lease.fence in self._led_alone:
            self._led_alone.discard(lease.fence)
            return await self._alone.keep(request, key, token, lease)
        try:
            return await self._remote.keep(request, key, token, lease)
        except StoreFailed as failed:
            self._go_alone(failed)
        return await self._alone.keep(request, key, token, lease)

    @override
    async def release(self, request: TokenRequest, key: str, lease: Lease) -> bool:
        if lease.fence in self._led_alone:
            self._led_alone.discard(lease.fence)
            return await self._alone.release(request, key, lease)
        try:
            return await self._remote.release(request, key, lease)
        except StoreFailed as failed:
            self._go_alone(failed)
        return await self._alone.release(request, key, lease)

    @override
    def abandon(
        self, request: TokenRequest, key: str, lease: Lease, error: BaseException | None
    ) -> None:
        if lease.fence in self._led_alone:
            self._led_alone.discard(lease.fence)
        else:
            self._remote.abandon(request, key, lease, error)

    @override
    async def revoke_visitor(self, client: str, fingerprint: str, *keys: str) -> None:
        """End it at the server, or not at all: it must hold for every replica."""
        try:
            await self._remote.revoke_visitor(client, fingerprint, *keys)
        except StoreFailed:
            raise StoreAway from None

    def purge_expired(self) -> bool:
        """Give back some of what has expired, tally calls; False if that was all."""
        self._server.tidy()
        return self._alone.purge_expired()

    async def keep_leases(self) -> None:
        """Renew leases, for ever; owned by the application."""
        while True:
            await asyncio.sleep(RENEWAL)
            await self.renew_leases()

    async def renew_leases(self) -> None:
        """Renew those that are held, once."""
        await self._remote.leases.renew()

    async def close(self) -> None:
        """Say to the server what is still to be said."""
        await self._remote.close()

    def _go_alone(self, failed: StoreFailed) -> None:
        """Follow the policy; counted where the call failed."""
        if self._closed:
            raise StoreAway from failed
        replicas = max(self._replicas(), 1)
        if replicas != self._divided_by:
            self._divided_by = replicas
            self._alone.use_limits(share_of(self._limits, replicas))

    @override
    def __repr__(self) -> str:
        return f"SharedStore(closed={self._closed}, {self._remote!r})"


class OutageDebt:
    """What was charged here while the server was away, for as long as that matters."""

    def __init__(self, alone: MemoryStore, clock: Clock) -> None:
        self._alone = alone
        self._clock = clock

    def __call__(self, limit: LimitName, key: str) -> int:
        """Return the microseconds until this bucket is full, by what was charged here."""
        bucket = self._alone.buckets[limit]
        if not len(bucket):
            return 0
        return bucket.owed(key, self._clock.mono())
