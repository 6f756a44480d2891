"""A visit of the shared store: what it asks of its script, and what the reply means.

Nearly every request ends with one.  So it can be asked for in two ways: in a task, as everything
else of the store, or by a question that is answered where the reply arrives (`Question`), without
task and future.  The latter has one round trip and nothing else; what needs more is left to the
former, and begins there anew.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from time import perf_counter
from typing import Any

import structlog
from typing_extensions import override

from broker.limits.policy import LimitRule, Limits
from broker.model import Clock, EmbedToken, LimitName, TokenRequest
from broker.rules.bucket import Limit, Verdict, verdict_from_wait
from broker.stores.base import Rejection, Visit, VisitListener
from broker.telemetry.counts import BucketCounts
from broker.valkey.client.errors import Reason, StoreFailed
from broker.valkey.client.guarded import Operation, Question, StoreClient
from broker.valkey.client.packing import Packed, pack
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script
from broker.valkey.key_names import Names, ReadyCall, VisitorKeys
from broker.valkey.near_cache import NearCache

log = structlog.get_logger()

_SHAPE = Script.VISIT.shape

Instead = Callable[[TokenRequest, int, StoreFailed], Visit]
"""What a visit becomes that failed at the monotonic microsecond; raises what is answered."""


class Visits:
    """Asks and reads; `limits` are those in force.

    `near_cache` holds what was read; `counts` are told of decisions; `carried` tells the
    microseconds that a bucket was charged while the server was away.
    """

    def __init__(
        self,
        server: StoreClient,
        names: Names,
        near_cache: NearCache,
        limits: Limits,
        clock: Clock,
        counts: Mapping[LimitName, BucketCounts],
        carried: Callable[[LimitName, str], int],
    ) -> None:
        self._server = server
        self._names = names
        self._near_cache = near_cache
        self.limits = limits
        self._clock = clock
        self._counts = counts[LimitName.FINGERPRINT]
        self._carried = carried

    async def make(self, request: TokenRequest, key: str) -> Visit:
        """Charge what every request of a visitor meets, and look for a token."""
        kind = self.limits.fingerprint
        rule, bucket = kind.met_by(request)
        cached = self._near_cache.find(key)
        numbers = _numbers(rule.limit, self._carried(kind.name, bucket), rule.dry_run)
        return self.read(request, rule, cached, await self._run(request, key, cached, numbers))

    async def peek(self, request: TokenRequest, key: str) -> EmbedToken | None:
        """Look for a token, charging nothing."""
        cached = self._near_cache.find(key)
        reply = await self._run(request, key, cached, _numbers(None))
        return self._near_cache.read(request, key, reply, cached)

    def start_visit(
        self, request: TokenRequest, now: int, listener: VisitListener, instead: Instead
    ) -> bool:
        """Do what `make` does, and tell `listener`: see `Store.start_visit`."""
        limits = self.limits
        if limits.client is not None:  # a second question
            return False
        kind, key = limits.fingerprint, request.key
        rule, bucket = kind.met_by(request)
        cached = self._near_cache.find_at(key, now)
        names, carried = self._names.visitor(request.visitor), self._carried(kind.name, bucket)
        server, call = self._server, names.last_call
        link = server.link(names.epoch)
        if link is None:
            return False
        if (
            call is None
            or cached is None
            or carried
            or call.key != key
            or call.rule is not rule
            or call.version != cached.version
            or call.epoch != cached.epoch
        ):
            packed = self._pack(request, names, rule, carried, cached)
        else:
            packed = call.packed
        began = perf_counter()
        question = _Visit(
            server, server.permit, began, self, request, rule, cached, listener, instead
        )
        link.send_for(packed, _SHAPE, question)
        return True

    def _pack(
        self,
        request: TokenRequest,
        names: VisitorKeys,
        rule: LimitRule,
        carried: int,
        cached: EmbedToken | None,
    ) -> bytes:
        """Pack a visit; kept is that of a cached token, if nothing is owed at this moment."""
        numbers = _numbers(rule.limit, carried, rule.dry_run)
        keys = self._keys(request, request.key, names)
        packed = Script.VISIT.by_name(keys, (numbers, *_known(cached)))
        if cached is not None and not carried:
            call = ReadyCall(request.key, rule, cached.version, cached.epoch, packed)
            names.last_call = call
        return packed

    def visit_without(self, question: "_Visit", failed: StoreFailed) -> Visit:
        """Return what a failure means; raises what is answered."""
        return question.instead(question.request, self._clock.mono(), failed)

    def read(
        self, request: TokenRequest, rule: LimitRule, cached: EmbedToken | None, reply: Reply
    ) -> Visit:
        """Return what the script said of a visit; raises StoreFailed for what it would not say."""
        limit = rule.limit
        if type(reply) is not int or cached is None:
            return self._read_more(request, rule, cached, reply)
        verdict = verdict_of(reply, limit, allowed=1)
        if verdict.remaining * 2 < limit.burst:  # most have more, and nobody has to know
            self._counts.note(verdict, dry_run=rule.dry_run)
        is_in_force = self._near_cache.holds(request.visitor, cached.epoch)
        return Visit(verdict, None, cached if is_in_force else None)

    def _read_more(
        self, request: TokenRequest, rule: LimitRule, cached: EmbedToken | None, reply: Reply
    ) -> Visit:
        """Read as `read` what is not just that the request is allowed, and what is held is good."""
        if not isinstance(reply, list):
            raise StoreFailed(Reason.OTHER)
        allowed: Any
        wait: Any
        allowed, wait, *_ = reply  # numbers, by the script's shape
        verdict = verdict_of(wait, rule.limit, allowed=allowed)
        self._counts.note(verdict, dry_run=rule.dry_run)
        if not verdict.allowed and not rule.dry_run:
            return Visit(verdict, Rejection(LimitName.FINGERPRINT, verdict), None)
        return Visit(verdict, None, self._near_cache.read(request, request.key, reply, cached))

    async def _run(
        self, request: TokenRequest, key: str, cached: EmbedToken | None, numbers: Packed
    ) -> Reply:
        keys = self._keys(request, key, self._names.visitor(request.visitor))
        known = _known(cached)
        return await self._server.run(Operation.VISIT, Script.VISIT, keys, numbers, *known)

    def _keys(
        self, request: TokenRequest, key: str, names: VisitorKeys
    ) -> tuple[bytes, bytes, bytes]:
        bucket = names.bucket("requests", self.limits.fingerprint.own_bucket(request.agent))
        return bucket, names.token(self._names.token_name(key)), names.epoch


class _Visit(Question):
    """A visit that was asked for by a call."""

    operation = Operation.VISIT

    visits: Visits
    request: TokenRequest
    rule: LimitRule
    cached: EmbedToken | None
    listener: VisitListener
    instead: Instead

    @override
    def take(self, reply: Reply) -> None:
        said: Visit | Exception
        try:
            said = self.visits.read(self.request, self.rule, self.cached, reply)
        except StoreFailed as failed:
            self.fail(failed)
            return
        except Exception as error:  # noqa: BLE001 - raised where it is answered
            said = error
        try:
            self.listener.tell(said)
        except Exception as error:  # others' replies are behind it
            log.error("broker.defect", exc_info=error)

    @override
    def fail(self, error: StoreFailed | None) -> None:
        said: Visit | Exception | None = None
        try:
            if error is not None:
                said = self.visits.visit_without(self, error)
        except Exception as answered:  # noqa: BLE001 - as in `take`
            said = answered
        try:
            self.listener.tell(said)
        except Exception as defect:  # as in `take`
            log.error("broker.defect", exc_info=defect)


def verdict_of(wait: int, limit: Limit, *, allowed: int) -> Verdict:
    """Return what a bucket on the server said; raises StoreFailed for what none would say.

    Scripts count in doubles: a bucket that takes ages may be off by as little as they are.
    """
    try:
        return verdict_from_wait(wait, limit, allowed=bool(allowed))
    except ValueError:
        depth = limit.depth
        if not depth < wait <= int(float(depth)):
            raise StoreFailed(Reason.OTHER, "a bucket out of bounds") from None
    return verdict_from_wait(depth, limit, allowed=bool(allowed))


def _known(cached: EmbedToken | None) -> tuple[bytes, bytes]:
    """Return version and epoch of what is held here, as the script takes them."""
    return (b"", b"") if cached is None else (b"%d" % cached.version, b"%d" % cached.epoch)


@lru_cache(maxsize=1024)
def numbers_of(limit: Limit) -> tuple[bytes, bytes]:
    """Return burst and interval as scripts take them."""
    return b"%d" % limit.burst, b"%d" % limit.interval


@lru_cache(maxsize=1024)
def _numbers(limit: Limit | None, carried: int = 0, dry_run: bool = False) -> Packed:  # noqa: FBT001, FBT002 - hot path: positional is half the cost
    """Return burst, interval, what is carried, whether to charge, and whether to deny."""
    burst, interval = (b"1", b"1") if limit is None else numbers_of(limit)
    charge = b"0" if limit is None else b"1"
    return pack(burst, interval, b"%d" % carried, charge, b"1" if dry_run else b"0")
