"""Tokens relayed from the vendor: every mint it allows, none that it does not.

Around one call (`vendor_client`) and its meaning (`vendor_api`), in this order:

    remembered refusal, open breaker? -> a turn in the budget -> breakers: a permit each -> call
    -> settle -> next key, or one retry -> remember, pause, or hand the token on

The slot of a turn is given back where the call ends, not where its caller's patience does
(`calls`); one that no call was made with goes to whoever is next.

Theory of operation.  Breakers are asked twice: before the turn, so that nobody queues for a call
that will not be made, and after it, where the permit is taken and the key is chosen.  So what
happened in the queue counts: mints that waited while the key was refused do not try it one by one,
and the probe is whoever gets a turn first, not somebody who still waits for one.  Keys are an
ordered list: the first good one is used, one that the vendor refuses is passed over until the list
is replaced or all of them were refused.  A retry and a second key take a turn like the first call,
because the vendor counts them like the first call.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import assert_never

import structlog
from typing_extensions import override

from broker import errors
from broker.issuers.base import Issuer, Turn
from broker.issuers.negative_cache import LocalNegativeCache, NegativeCache
from broker.issuers.vendor.api import build_request, read_answer
from broker.issuers.vendor.calls import Calls
from broker.issuers.vendor.client import Answer, CallFailed, VendorClient
from broker.issuers.vendor.egress import Proxy
from broker.issuers.vendor.headers import rate_limit_hint
from broker.issuers.vendor.replies import (
    BadKey,
    Broken,
    Granted,
    Refused,
    Reply,
    Throttled,
    reason_of,
)
from broker.model import Clock, Minted, Secret, TokenRequest
from broker.pacing.pacer import BudgetPacer
from broker.pacing.slots import Slot
from broker.rules.backoff import full_jitter
from broker.rules.breaker import FailureRateBreaker, KeyBreaker, KeyOutcome, Outcome, Permit
from broker.telemetry.labels import Reason
from broker.telemetry.metrics import UpstreamMetrics
from broker.units import SECOND

log = structlog.get_logger()

DEFAULT_PAUSE = 5 * SECOND
"""Microseconds that the budget pauses after a 429 that does not say for how long."""

LONGEST_ELSEWHERE = 60 * SECOND
"""Microseconds that the budget pauses at most for a 429 on a route that does not mint: the vendor's
buckets refill within a minute, and a longer wait is that route's own affair."""

RETRY_BASE = 250_000
"""Microseconds: the one retry comes after up to this long, at random."""

_RETRIED = frozenset(
    {
        Reason.STATUS_5XX,
        Reason.CONNECT,
        Reason.DNS,
        Reason.RESET,
        Reason.PROXY_CONNECT,
        Reason.PROXY_REFUSED,
    }
)
"""What a second try may cure within a visitor's patience.  A time-out has used that up."""


class UpstreamIssuer(Issuer):
    """Relays mints to a vendor-compatible API.  Owns its client: `close` it."""

    name = "upstream"

    def __init__(
        self,
        client: VendorClient,
        keys: Sequence[Secret],
        pacer: BudgetPacer,
        clock: Clock,
        metrics: UpstreamMetrics,
        draw: Callable[[], float] = random.random,
        refusals: NegativeCache | None = None,
    ) -> None:
        self._client = client
        self._calls = Calls(client.timeout, self._learn_late, self._reads)
        self._pacer = pacer
        self._clock = clock
        self._metrics = metrics
        self._draw = draw
        self._keys = list(keys)
        self._passed_over: set[Secret] = set()
        self._reported: set[Secret] = set()
        self.health = FailureRateBreaker()
        self.credentials = KeyBreaker()
        self._refusals = refusals or LocalNegativeCache(clock)
        self._refusals.use_keys(self._keys)

    async def close(self) -> None:
        """End the calls that are out, and close the connections to the vendor."""
        await self._calls.close()
        await self._client.close()

    def use_keys(self, keys: Sequence[Secret]) -> None:
        """Replace the list of keys; if it differs, a broken key is forgiven at once."""
        if list(keys) == self._keys:
            return
        self._keys = list(keys)
        self._passed_over.clear()  # whoever was refused before is asked for again, if still there
        self._reported.clear()
        self._refusals.use_keys(self._keys)
        self.credentials = self.credentials.keys_changed(self._clock.mono())

    def use_proxy(self, proxy: Proxy | None) -> None:
        """Send the next calls through this proxy; None: directly."""
        self._client.proxy = proxy

    def heed_elsewhere(self, answer: Answer) -> bool:
        """Pause the budget if a call that was no mint was one too many; returns whether it was.

        It left by the same address, and the vendor counts by that.
        """
        reply = read_answer(answer.status, answer.headers, answer.body, self._clock.wall())
        if not isinstance(reply, Throttled):
            return False
        wait = min(reply.retry_after or DEFAULT_PAUSE, LONGEST_ELSEWHERE)
        self._pause(Throttled(wait))
        return True

    @property
    @override
    def signer_id(self) -> str:
        return f"upstream {self._client.base_url}"

    @property
    @override
    def signer_ids(self) -> frozenset[str]:
        return frozenset({self.signer_id})

    @override
    async def check(self, request: TokenRequest) -> None:
        try:
            await self._check(request)
        except errors.BrokerError as error:
            error.remembered = True
            raise

    async def _check(self, request: TokenRequest) -> None:
        self._check_breakers()
        refused = await self._refusals.find(request)
        if refused is not None:
            raise _refusal(refused)

    @override
    async def mint(self, request: TokenRequest, turn: Turn) -> Minted:
        reply, key = await self._attempt(request, turn)
        if self._deserves_another(reply, key):
            if isinstance(reply, Broken):
                await asyncio.sleep(full_jitter(1, RETRY_BASE, RETRY_BASE, self._draw) / SECOND)
            reply = await self._second_attempt(request, turn, reply)
        return self._conclude(request, reply)

    async def _second_attempt(self, request: TokenRequest, turn: Turn, first: Reply) -> Reply:
        """Try once more; if there is no room for that, the first failure is what happened."""
        try:
            reply, _ = await self._attempt(request, turn)
        except errors.ServiceUnavailable:
            if isinstance(first, Broken):
                return first
            raise
        return reply

    @property
    def _key(self) -> Secret:
        """The first key that the vendor has not refused."""
        return next(filter(self._is_good, self._keys))

    def _is_good(self, key: Secret) -> bool:
        return key not in self._passed_over

    def _deserves_another(self, reply: Reply, used: Secret) -> bool:
        match reply:
            case Broken(reason):
                return reason in _RETRIED and not self.health.is_open
            case BadKey():
                return self._key != used
            case Throttled():
                return not self.credentials.rejected
            case Granted() | Refused():
                return False
            case _:
                assert_never(reply)

    async def _attempt(self, request: TokenRequest, turn: Turn) -> tuple[Reply, Secret]:
        """Make one call: turn, permits, call, settlement; returns the key that was used, too."""
        self._check_breakers()
        slot = await turn()
        try:
            key_permit, health_permit = self._enter()
        except errors.BrokerError:
            slot.unused()
            raise
        key = self._key
        try:
            reply = await self._call(request, key, slot)
        except BaseException:
            self._settle(key_permit, KeyOutcome.UNKNOWN, health_permit, Outcome.ABANDONED)
            raise
        self._learn(reply, key, key_permit, health_permit)
        return reply, key

    def _check_breakers(self) -> None:
        """Raise if no call may be made now; takes nothing."""
        now = self._clock.mono()
        if self.credentials.wait(now):
            raise _our_key_is_bad()
        if wait := self.health.wait(now):
            raise _vendor_is_unwell(wait)

    def _enter(self) -> tuple[Permit, Permit]:
        """Take a permit of each breaker; raises if one has none to give."""
        now = self._clock.mono()
        self.credentials, key_permit = self.credentials.allow(now)
        if key_permit is None:
            raise _our_key_is_bad()
        self.health, health_permit = self.health.allow(now)
        if health_permit is None:
            self.credentials = self.credentials.settle(key_permit, KeyOutcome.ABANDONED, now)
            raise _vendor_is_unwell(self.health.wait(now))
        return key_permit, health_permit

    async def _call(self, request: TokenRequest, key: Secret, slot: Slot) -> Reply:
        headers = {"X-Request-Id": request.request_id} if request.request_id else {}
        if request.traceparent:
            headers["traceparent"] = request.traceparent
        body = build_request(request)
        try:
            answer = await self._calls.make(
                lambda arrived: self._client.mint(key, body, headers, arrived), slot
            )
        except CallFailed as failed:
            self._metrics.count_status(None)
            return Broken(failed.reason)
        self._metrics.count_status(answer.status)
        wall = self._clock.wall()
        await self._correct(answer, wall)
        private = (key.reveal(), request.fingerprint)
        return read_answer(answer.status, answer.headers, answer.body, wall, private)

    async def _correct(self, answer: Answer, wall: int) -> None:
        hint = rate_limit_hint(answer.headers, wall)
        if hint is not None:
            await self._pacer.sync_remaining(hint.remaining)

    async def _learn_late(self, answer: Answer) -> None:
        """Heed what an answer says of the budget, though its caller has gone: all else is told."""
        wall = self._clock.wall()
        await self._correct(answer, wall)
        reply = read_answer(answer.status, answer.headers, answer.body, wall)
        if isinstance(reply, Throttled):
            self._pause(reply)

    async def _reads(self) -> bool:
        """Ask what is no mint; whatever the answer says, a breaker learns nothing from it."""
        try:
            _ = await self._client.validate(self._key)
        except CallFailed:
            self._metrics.validations["none"].inc()
            return False
        self._metrics.validations["answered"].inc()
        return True

    def _pause(self, throttled: Throttled) -> None:
        """Pause the budget, unless it is failed authentication that is throttled."""
        if not self.credentials.rejected:
            self._pacer.pause((throttled.retry_after or DEFAULT_PAUSE) / SECOND)

    def _learn(self, reply: Reply, key: Secret, key_permit: Permit, health_permit: Permit) -> None:
        """Let both breakers, the key list and the budget draw their conclusions."""
        reason = reason_of(reply)
        if reason is not None:
            self._metrics.errors[reason.value].inc()
        health = Outcome.FAILED if isinstance(reply, Broken) else Outcome.SUCCEEDED
        match reply:
            case Granted() | Refused():
                outcome = KeyOutcome.ACCEPTED
                self._reported.discard(key)
            case BadKey(code):
                outcome = self._pass_over(key, code)
            case Throttled():
                outcome = KeyOutcome.THROTTLED
                self._pause(reply)
            case Broken():
                outcome = KeyOutcome.UNKNOWN
            case _:
                assert_never(reply)
        self._settle(key_permit, outcome, health_permit, health)

    def _pass_over(self, key: Secret, code: str) -> KeyOutcome:
        """Go on to the next key.  When all were refused, the next probe goes through all again."""
        if key not in self._keys:
            return KeyOutcome.ROTATED
        if key not in self._reported:
            self._reported.add(key)
            log.error("broker.upstream_key_refused", key=self._keys.index(key) + 1, code=code)
        self._passed_over.add(key)
        if any(map(self._is_good, self._keys)):
            return KeyOutcome.ROTATED
        self._passed_over.clear()
        return KeyOutcome.REJECTED

    def _settle(
        self, key_permit: Permit, key: KeyOutcome, health_permit: Permit, health: Outcome
    ) -> None:
        now = self._clock.mono()
        self.credentials = self.credentials.settle(key_permit, key, now)
        was_open = self.health.is_open
        self.health = self.health.settle(health_permit, health, now, self._draw)
        if self.health.is_open and not was_open:
            log.error("broker.upstream_unwell", wait_s=self.health.wait(now) / SECOND)

    def _conclude(self, request: TokenRequest, reply: Reply) -> Minted:
        """Return the token, or raise what the caller gets."""
        match reply:
            case Granted(minted):
                self._refusals.forget(request)
                return minted
            case BadKey():
                raise _our_key_is_bad()
            case Refused():
                self._refusals.remember(request, reply)
                raise _refusal(reply)
            case Throttled(retry_after):
                if self.credentials.rejected:
                    raise _our_key_is_bad()
                wait = retry_after or DEFAULT_PAUSE
                raise errors.BudgetExhausted("the vendor asked us to slow down", wait)
            case Broken(Reason.TIMEOUT):
                raise errors.UpstreamTimeout("the vendor did not answer in time")
            case Broken(reason):
                failed = errors.UpstreamUnavailable(f"no token from the vendor: {reason.value}")
                failed.reason = reason.value
                raise failed
            case _:
                assert_never(reply)

    @override
    def __repr__(self) -> str:
        return f"UpstreamIssuer(keys={len(self._keys)}, passed_over={len(self._passed_over)})"


def _our_key_is_bad() -> errors.UpstreamUnavailable:
    return errors.UpstreamUnavailable(
        "the vendor refuses the broker's own key; its operator is told"
    )


def _vendor_is_unwell(wait: int) -> errors.ServiceUnavailable:
    return errors.ServiceUnavailable("the vendor keeps failing; no call is made for now", wait)


def _refusal(refused: Refused) -> errors.UpstreamRefused:
    return errors.UpstreamRefused(refused.status, refused.code, refused.message)
