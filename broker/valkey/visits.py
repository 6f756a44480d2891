"""A visit of the shared store: what it asks of its script, and what the reply means.

Nearly every request ends with one.  So it can be asked for in two ways: in a task, as everything
else of the store, or by a question that is answered where the reply arrives (`Question`), without
task and future.  The latter has one round trip and nothing else; what needs more is left to the
former, and begins there anew.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import structlog
from typing_extensions import override

from broker.limits.policy import LimitRule, Limits
from broker.model import Clock, EmbedToken, LimitName, TokenRequest
from broker.rules.bucket import Limit, Verdict, verdict_from_wait
from broker.stores.base import Asker, Rejection, Visit
from broker.telemetry.counts import BucketCounts
from broker.valkey.client import shapes
from broker.valkey.client.errors import Reason, StoreFailed
from broker.valkey.client.guarded import Operation, Question, StoreClient
from broker.valkey.client.packing import Packed, pack
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script
from broker.valkey.key_names import Names, ReadyCall, VisitorKeys
from broker.valkey.near_cache import NearCache

log = structlog.get_logger()

Instead = Callable[[TokenRequest, int, StoreFailed], Visit]
"""What a visit becomes that failed at the monotonic microsecond; raises what is answered."""


class Visits:
    """Asks and reads; `limits` are those in force.

    `front` holds what was read; `counts` are told of decisions; `carried` tells the microseconds
    that a bucket was charged while the server was away.
    """

    def __init__(
        self,
        server: StoreClient,
        names: Names,
        front: NearCache,
        limits: Limits,
        clock: Clock,
        counts: Mapping[LimitName, BucketCounts],
        carried: Callable[[LimitName, str], int],
    ) -> None:
        self._server = server
        self._names = names
        self._front = front
        self.limits = limits
        self._clock = clock
        self._counts = counts[LimitName.FINGERPRINT]
        self._carried = carried

    async def make(self, ask: TokenRequest, key: str) -> Visit:
        """Charge what every request of a visitor meets, and look for a token."""
        kind = self.limits.fingerprint
        rule, bucket = kind.met_by(ask)
        front = self._front.find(key)
        numbers = _numbers(rule.limit, self._carried(kind.name, bucket), rule.dry_run)
        return self.read(ask, rule, front, await self._run(ask, key, front, numbers))

    async def peek(self, ask: TokenRequest, key: str) -> EmbedToken | None:
        """Look for a token, charging nothing."""
        front = self._front.find(key)
        reply = await self._run(ask, key, front, _numbers(None))
        return self._front.read(ask, key, reply, front)

    def ask(self, ask: TokenRequest, now: int, asker: Asker, instead: Instead) -> bool:
        """Do what `make` does, and tell `asker`: see `Store.ask`."""
        limits = self.limits
        if limits.client is not None:  # a second question
            return False
        kind = limits.fingerprint
        rule, bucket = kind.met_by(ask)
        front = self._front.find_at(ask.key, now)
        names, carried = self._names.visitor(ask.visitor), self._carried(kind.name, bucket)
        version, epoch = (0, 0) if front is None else (front.version, front.epoch)
        call = names.last_call
        if (
            call is None
            or carried
            or call.key != ask.key
            or call.rule is not rule
            or call.version != version
            or call.epoch != epoch
        ):
            numbers = _numbers(rule.limit, carried, rule.dry_run)
            keys = self._keys(ask, ask.key, names)
            packed = Script.VISIT.by_name(keys, (numbers, *_known(front)))
            call = ReadyCall(ask.key, rule, version, epoch, packed)
            if not carried:
                names.last_call = call
        question = _Visit(self, ask, rule, front, asker, instead)
        return self._server.ask(question, names.epoch, call.packed, shapes.VISIT)

    def visit_without(self, question: "_Visit", failed: StoreFailed) -> Visit:
        """Return what a failure means; raises what is answered."""
        return question.instead(question.ask, self._clock.mono(), failed)

    def read(
        self, ask: TokenRequest, rule: LimitRule, front: EmbedToken | None, reply: Reply
    ) -> Visit:
        """Return what the script said of a visit; raises StoreFailed for what it would not say."""
        if isinstance(reply, int):
            allowed: Any = 1
            wait: Any = reply
        elif isinstance(reply, list):
            allowed, wait, *_ = reply  # numbers, by the script's shape
        else:
            raise StoreFailed(Reason.OTHER)
        verdict = verdict_of(wait, rule.limit, allowed=allowed)
        if verdict.remaining * 2 < rule.limit.burst:  # most have more, and nobody has to know
            self._counts.note(verdict, dry_run=rule.dry_run)
        if not verdict.allowed and not rule.dry_run:
            return Visit(verdict, Rejection(LimitName.FINGERPRINT, verdict), None)
        return Visit(verdict, None, self._front.read(ask, ask.key, reply, front))

    async def _run(
        self, ask: TokenRequest, key: str, front: EmbedToken | None, numbers: Packed
    ) -> Reply:
        keys = self._keys(ask, key, self._names.visitor(ask.visitor))
        known = _known(front)
        return await self._server.run(Operation.VISIT, Script.VISIT, keys, numbers, *known)

    def _keys(self, ask: TokenRequest, key: str, names: VisitorKeys) -> tuple[bytes, bytes, bytes]:
        bucket = names.bucket("requests", self.limits.fingerprint.own_bucket(ask.agent))
        return bucket, names.token(self._names.token_name(key)), names.epoch


class _Visit(Question):
    """A visit that was asked for by a call."""

    __slots__ = ("_asker", "_visits", "ask", "front", "instead", "rule")

    operation = Operation.VISIT

    def __init__(
        self,
        visits: Visits,
        ask: TokenRequest,
        rule: LimitRule,
        front: EmbedToken | None,
        asker: Asker,
        instead: Instead,
    ) -> None:
        self._visits = visits
        self.ask = ask
        self.rule = rule
        self.front = front
        self._asker = asker
        self.instead = instead

    @override
    def take(self, reply: Reply) -> None:
        said: Visit | Exception
        try:
            said = self._visits.read(self.ask, self.rule, self.front, reply)
        except StoreFailed as failed:
            self.fail(failed)
            return
        except Exception as error:  # noqa: BLE001 - raised where it is answered
            said = error
        try:
            self._asker.hear(said)
        except Exception as error:  # others' replies are behind it
            log.error("broker.defect", exc_info=error)

    @override
    def fail(self, error: StoreFailed | None) -> None:
        said: Visit | Exception | None = None
        try:
            if error is not None:
                said = self._visits.visit_without(self, error)
        except Exception as answered:  # noqa: BLE001 - as in `take`
            said = answered
        try:
            self._asker.hear(said)
        except Exception as defect:  # as in `take`
            log.error("broker.defect", exc_info=defect)


def verdict_of(wait: int, limit: Limit, *, allowed: int) -> Verdict:
    """Return what a bucket on the server said; raises StoreFailed for what none would say.

    Scripts count in doubles: a bucket that takes ages may be off by as little as they are.
    """
    depth = limit.burst * limit.interval
    if not 0 <= wait <= depth:
        if not 0 <= wait <= int(float(depth)):
            raise StoreFailed(Reason.OTHER, "a bucket out of bounds")
        wait = depth
    if not allowed and wait + limit.interval <= depth:
        raise StoreFailed(Reason.OTHER, "a bucket out of bounds")
    return verdict_from_wait(wait, limit, allowed=bool(allowed))


def _known(front: EmbedToken | None) -> tuple[bytes, bytes]:
    """Return version and epoch of what is held here, as the script takes them."""
    return (b"", b"") if front is None else (b"%d" % front.version, b"%d" % front.epoch)


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
