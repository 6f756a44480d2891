"""The store's server as the rest of the broker sees it: every call guarded, timed and counted.

A call that fails, or that is not made because too many have failed, raises StoreFailed; what
happens then is for the caller to decide.  Successes are tallied twice a second and not one by one:
that would cost more than the call.
"""

import contextlib
import random
from collections.abc import Awaitable, Callable, Mapping
from enum import Enum
from time import perf_counter
from typing import ClassVar, Protocol

import structlog
from msgspec import Struct
from typing_extensions import override

from broker.model import Clock
from broker.rules.breaker import Outcome, Permit, Phase, StoreBreaker
from broker.tasks import TaskSet
from broker.telemetry.cells import Counter
from broker.units import SECOND
from broker.valkey.client.connection import PipelinedConnection
from broker.valkey.client.errors import NoScript, Reason, Redirect, StoreFailed
from broker.valkey.client.packing import Packed
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script, ScriptKeys
from broker.valkey.client.shapes import ANYTHING, Shape
from broker.valkey.client.topology import Topology, call_in_full

log = structlog.get_logger()

_CLOSED = Phase.CLOSED
"""The name of an enum's member is looked up in a fifth of a microsecond (Python 3.11)."""


class Operation(Enum):
    """What a call is for: label of `broker_store_duration_seconds`."""

    __hash__ = object.__hash__  # Enum's own is Python code

    VISIT = "visit"
    LEAD = "lead"
    AGENT = "agent"
    KEEP = "keep"
    RELEASE = "release"
    RENEW = "renew"
    BUDGET = "budget"
    HEARTBEAT = "heartbeat"
    REFUSAL = "refusal"
    SESSION = "session"


class Observer(Protocol):
    """Takes a number of seconds."""

    def observe(self, value: float) -> None:
        """Count one value."""
        ...


class StoreStats(Protocol):
    """Where calls are counted: by operation, and failures by reason."""

    @property
    def duration(self) -> Mapping[str, Observer]:
        """Seconds from asking to the answer or the failure."""
        ...

    @property
    def errors(self) -> Mapping[str, Counter]:
        """Calls that failed."""
        ...


class Question(Struct, eq=False):
    """A call whose end is told where the reply arrives, and for which no future is made.

    `permit` is the server's, `began` the `perf_counter` at which it is asked.  What is told must
    raise nothing: others' replies are behind it.
    """

    operation: ClassVar[Operation]

    server: "StoreClient"
    permit: Permit
    began: float

    def take(self, reply: Reply) -> None:
        """Go on with the reply."""
        raise NotImplementedError

    def fail(self, error: StoreFailed | None) -> None:
        """Go on without one; None: nothing was done, `StoreClient.run` knows what to do."""
        raise NotImplementedError

    def done(self) -> bool:
        """Return False: it is told once."""
        return False

    def set_result(self, reply: Reply, /) -> None:
        """Count it, and go on."""
        self.server.note_success(self.permit, self.operation, self.began)
        self.take(reply)

    def set_exception(self, error: Exception, /) -> None:
        """Count what means a failure, and go on."""
        failed = error if isinstance(error, StoreFailed) else None  # or NoScript, or Redirect
        if failed is not None:
            self.server.note_failure(self.permit, self.operation, self.began, failed)
        self.fail(failed)


class StoreClient:
    """Calls to the server, behind a breaker."""

    def __init__(
        self,
        nodes: Topology,
        clock: Clock,
        stats: StoreStats,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.nodes = nodes
        self._clock = clock
        self._stats = stats
        self._duration = {each: stats.duration[each.value] for each in Operation}
        self._draw = draw
        self._health = StoreBreaker()
        self._well = 0
        self._tasks = TaskSet()

    @property
    def is_away(self) -> bool:
        """Whether calls are not made at this moment: the broker is on its own."""
        return self._health.is_open

    async def run(
        self,
        operation: Operation,
        script: Script,
        keys: ScriptKeys,
        *arguments: bytes | Packed,
    ) -> Reply:
        """Run a script where its keys are; raises StoreFailed.

        A server that does not have it (a restart, SCRIPT FLUSH, a new replica) gets it in full.
        """
        permit = self._enter()
        began = perf_counter()
        try:  # as `_watch`, without a coroutine between
            packed = script.by_name(keys, arguments)
            answer = await self.nodes.send(keys[0], packed, script.shape)
        except NoScript:
            in_full = call_in_full(self.nodes, script, keys, arguments)
            return await self._watch(permit, operation, in_full)
        except Redirect:  # a node of a cluster that was configured as if it were alone
            failed = StoreFailed(Reason.CLUSTER_DOWN)
            self.note_failure(permit, operation, began, failed)
            raise failed from None
        except BaseException as error:
            self.note_failure(permit, operation, began, error)
            raise
        self.note_success(permit, operation, began)
        return answer

    def link(self, key: bytes) -> PipelinedConnection | None:
        """Return the connection to where `key` is, to send a question there under `permit`.

        None where `run` has more to do than that: where the server is away or tried again, or a
        cluster has to be followed.
        """
        return self.nodes.link(key) if self._health.phase is _CLOSED else None

    @property
    def permit(self) -> Permit:
        """Leave to send on what `link` returns, at this moment."""
        return Permit(self._health.epoch)

    async def command(
        self, operation: Operation, key: bytes, packed: bytes, shape: Shape = ANYTHING
    ) -> Reply:
        """Send one command to where `key` is; a reply of this shape, raises StoreFailed."""
        permit = self._enter()
        return await self._watch(permit, operation, self.nodes.command(key, packed, shape))

    def tell(
        self, operation: Operation, key: bytes, packed: bytes, shape: Shape = ANYTHING
    ) -> None:
        """Send a command whose outcome nobody waits for; a failure is counted."""
        self._tasks.start(self._tell(operation, key, packed, shape))

    async def settle(self) -> None:
        """Wait for what is still being said."""
        await self._tasks.finish()

    async def close(self) -> None:
        """Wait for what is still being said, then close every connection."""
        await self.settle()
        await self.nodes.close()

    def tidy(self) -> None:
        """Tally what went well: call it about twice a second."""
        if self._well and not self._health.is_open:
            self._health = self._health.succeeded(self._well, self._clock.mono())
        self._well = 0

    async def _tell(self, operation: Operation, key: bytes, packed: bytes, shape: Shape) -> None:
        with contextlib.suppress(StoreFailed):
            _ = await self.command(operation, key, packed, shape)

    def _enter(self) -> Permit:
        """Ask the breaker; raises StoreFailed, uncounted, for a call that is not to be made."""
        health = self._health
        if health.phase is _CLOSED:
            return Permit(health.epoch)
        self._health, permit = health.allow(self._clock.mono())
        if permit is None:
            raise StoreFailed(Reason.CONNECTION)
        return permit

    async def _watch(self, permit: Permit, operation: Operation, reply: Awaitable[Reply]) -> Reply:
        began = perf_counter()
        try:
            answer = await reply
        except BaseException as error:
            self.note_failure(permit, operation, began, error)
            raise
        self.note_success(permit, operation, began)
        return answer

    def note_success(self, permit: Permit, operation: Operation, began: float) -> None:
        """Count a call that was answered; `began` is its `time.perf_counter`."""
        self._duration[operation].observe(perf_counter() - began)
        if self._health.phase is _CLOSED:
            self._well += 1
        else:
            self._note(permit, Outcome.SUCCEEDED)

    def note_failure(
        self, permit: Permit, operation: Operation, began: float, error: BaseException
    ) -> None:
        """Count one that was not, or not well."""
        if not isinstance(error, StoreFailed):
            self._note(permit, Outcome.ABANDONED)
            return
        self._duration[operation].observe(perf_counter() - began)
        self._stats.errors[error.reason.value].inc()
        # an answer about one poisoned key is an answer: it must not part us from all others
        self._note(permit, Outcome.SUCCEEDED if error.of_key else Outcome.FAILED, error)

    def _note(self, permit: Permit, outcome: Outcome, failed: StoreFailed | None = None) -> None:
        was_away = self.is_away
        now = self._clock.mono()
        self.tidy()
        self._health = self._health.settle(permit, outcome, now, self._draw)
        if self.is_away and not was_away:
            reason, detail = (failed.reason.value, failed.detail) if failed else ("", "")
            wait = self._health.wait(now) / SECOND
            log.error("broker.store_away", reason=reason, detail=detail, wait_s=wait)
        elif was_away and not self.is_away:
            log.warning("broker.store_back")

    @override
    def __repr__(self) -> str:
        return f"StoreClient(away={self.is_away}, {self.nodes!r})"
