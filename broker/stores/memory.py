"""The embedded store: everything in this process.

One process, one broker: nothing here survives a restart by itself (see `broker.sqlite`) and nothing
is shared with a second instance.
"""

from collections.abc import Callable, Mapping

from typing_extensions import override

from broker.limits.buckets import BucketTable
from broker.limits.policy import LimitPolicy, LimitRule, Limits
from broker.model import Clock, EmbedToken, LimitName, TokenRequest, visitor_of
from broker.rules.bucket import Verdict
from broker.stores.base import Kept, Lease, Rejection, Store, Visit
from broker.stores.epochs import Epochs
from broker.stores.token_cache import TokenCache
from broker.telemetry.counts import BucketCounts

_FINGERPRINT, _MINTS = LimitName.FINGERPRINT, LimitName.FINGERPRINT_MINTS


class MemoryStore(Store):
    """Buckets and tokens of one process.

    Limits can be replaced at any time (`use_limits`); what was spent stays spent.  Nobody else
    mints here, so leading is a matter of limits only: this process' flights see to the rest.
    Fences are larger than those of before, and no less than `fence_floor` says at that moment.
    """

    def __init__(
        self,
        limits: Limits,
        tokens: TokenCache,
        clock: Clock,
        counts: Mapping[LimitName, BucketCounts] | None = None,
        epochs: Epochs | None = None,
        fence_floor: Callable[[], int] = lambda: 0,
    ) -> None:
        self._clock = clock
        self.tokens = tokens
        self._limits = limits
        counts = counts or {}
        now = clock.mono()
        self.buckets = {
            limit_set.name: BucketTable(
                limits.max_tracked, limit_set.horizon, now, counts.get(limit_set.name)
            )
            for limit_set in (limits.fingerprint, limits.fingerprint_mints, limits.agent)
        }
        self.buckets[LimitName.CLIENT] = BucketTable(
            limits.max_tracked,
            limits.client.horizon if limits.client else 1,
            now,
            counts.get(LimitName.CLIENT),
        )
        self._fingerprint, self._mints = self.buckets[_FINGERPRINT], self.buckets[_MINTS]
        self._epochs = epochs or Epochs()
        self._fence = 0
        self._fence_floor = fence_floor

    def use_limits(self, limits: Limits) -> None:
        """Put other limits in force, for the next request on."""
        for limit_set in (
            limits.fingerprint,
            limits.fingerprint_mints,
            limits.agent,
            limits.client,
        ):
            if limit_set is not None:
                self.buckets[limit_set.name].adjust(limit_set.horizon, limits.max_tracked)
        self._limits = limits

    @override
    def visit(self, request: TokenRequest, now: int) -> Visit:
        limits = self._limits
        if limits.client is not None:
            rejection = self._charge(limits.client, request.client, request.agent, now)
            if rejection is not None:
                return Visit(None, rejection, None)
        rule, key = limits.fingerprint.met_by(request)
        verdict = self._fingerprint.take(key, rule.limit, now, dry_run=rule.dry_run)
        if not verdict.allowed and not rule.dry_run:
            return Visit(verdict, Rejection(_FINGERPRINT, verdict), None)
        token = self.tokens.find_at(request.key, now)  # as `find` does
        if token is None or self._epochs.holds(request.visitor, token.epoch):
            return Visit(verdict, None, token)
        self.tokens.discard(request.key)
        return Visit(verdict, None, None)

    @override
    async def admit(self, request: TokenRequest, key: str) -> Visit:
        return self.visit(request, self._clock.mono())

    @override
    async def charge_client(self, client: str) -> Rejection | None:
        limit_set = self._limits.client
        if limit_set is None:
            return None
        return self._charge(limit_set, client, "", self._clock.mono())

    def find(self, visitor: str, key: str) -> EmbedToken | None:
        """Return what is held under `key`, unless its visitor was ended since."""
        token = self.tokens.find_at(key, self._clock.mono())
        if token is None or self._epochs.holds(visitor, token.epoch):
            return token
        self.tokens.discard(key)
        return None

    @override
    async def peek(self, request: TokenRequest, key: str) -> EmbedToken | None:
        return self.find(request.visitor, key)

    @override
    async def lead(
        self, request: TokenRequest, key: str, good: Callable[[EmbedToken], bool]
    ) -> Lease | EmbedToken | Rejection:
        token = self.find(request.visitor, key)
        if token is not None and good(token):
            return token
        return self.lead_at_once(request, self._clock.mono())

    def lead_at_once(self, request: TokenRequest, now: int) -> Lease | Rejection:
        """Lead without a look for a token, for who has just looked (`now`, monotonic us)."""
        rejection = self.charge_mint(request, now)
        if rejection is not None:
            return rejection
        self._fence = max(self._fence + 1, self._fence_floor())
        return Lease(self._fence, self._epochs.of(request.visitor))

    def charge_mint(self, request: TokenRequest, now: int) -> Rejection | None:
        """Charge the limits that only a started mint meets; None means go ahead."""
        limits, agent = self._limits, request.agent
        rule, key = limits.fingerprint_mints.met_by(request)
        verdict = self._mints.take(key, rule.limit, now, dry_run=rule.dry_run)
        if not verdict.allowed and not rule.dry_run:
            return Rejection(_MINTS, verdict)
        return self._charge(limits.agent, agent, agent, now)

    @override
    async def keep(self, request: TokenRequest, key: str, token: EmbedToken, lease: Lease) -> Kept:
        if not self._epochs.holds(request.visitor, lease.epoch):
            return Kept.ENDED
        self.tokens[key] = token
        return Kept.KEPT

    def keep_at_once(self, _request: TokenRequest, key: str, token: EmbedToken, now: int) -> None:
        """Hold a token for reuse whose visitor was not ended meanwhile (`now`, monotonic us)."""
        self.tokens.keep(key, token, now)

    @override
    async def release(self, request: TokenRequest, key: str, lease: Lease) -> bool:
        return self._epochs.holds(request.visitor, lease.epoch)

    @override
    def abandon(
        self, request: TokenRequest, key: str, lease: Lease, error: BaseException | None
    ) -> None:
        """Nobody else waits for it."""

    @override
    async def revoke_visitor(self, client: str, fingerprint: str, *keys: str) -> None:
        self._epochs.end(visitor_of(client, fingerprint))

    def purge_expired(self) -> bool:
        """Give back some of what has expired, so that no request has to; False if that was all.

        Call it about once a second, and until that was all, with others' turns between.
        """
        now = self._clock.mono()
        return any(
            [self.tokens.expire(now), *(b.purge_expired(now) for b in self.buckets.values())]
        )

    def _charge(self, limit_set: LimitPolicy, key: str, agent: str, now: int) -> Rejection | None:
        rule: LimitRule = limit_set.for_agent(agent)
        verdict: Verdict = self.buckets[limit_set.name].take(
            key, rule.limit, now, dry_run=rule.dry_run
        )
        if verdict.allowed or rule.dry_run:
            return None
        return Rejection(limit_set.name, verdict)
