"""Calls to the vendor that are out, each with the slot of the budget that it holds.

A caller's patience ends before its call does.  What was written to a connection may arrive at the
vendor long after: a process that is suspended reads it when it goes on, from a buffer that outlives
the connection (Linux keeps what was received even when the peer resets).  So a time-out frees the
caller, not the slot: the call goes on in a task of its own until

- the head of its answer is there: it has arrived, whatever becomes of the body;
- it fails: nothing was sent, or the connection is gone (`vendor_client` has the kernel end one
  whose peer has vanished, after `VANISHED` seconds);
- the vendor answers a younger call, and this one is older than `SEEN`: the vendor reads, so it has
  most likely read this one, and hangs on it;
- all that are out hang and leave no room for a younger one, and the vendor answers a question that
  is no mint: it or its edge reads;
- `LONGEST` has passed, or this process ends.

In the last three cases the call may yet arrive: a proxy or an edge may hold it, or one of the
vendor's processes that stands still while others answer.  Then its slot is abandoned, and owed
(`rules.outstanding`).  Only a mint that is answered clears what is owed: the answer to the question
makes room for two that may try, no more, and not again and again.

An answer that nobody waits for any more is read for what it says of the budget, and its token is
dropped: the visitor has been told that there is none, may have been ended since, and a token that
was never handed out costs the vendor nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context

import structlog
from typing_extensions import override

from broker.issuers.vendor.client import CONNECT_TIMEOUT, VANISHED, Answer, CallFailed
from broker.pacing.pacer import MAX_PROMISE
from broker.pacing.slots import Slot
from broker.tasks import TaskSet
from broker.telemetry.labels import Reason

log = structlog.get_logger()

LONGEST = MAX_PROMISE
"""Seconds that a call holds its slot without any sign: as long as the longest pause that the vendor
may ask for.  Without an end, a vendor that answers nothing would block the budget for ever; a stall
that is longer finds the slots owed, and two more calls each time."""

SEEN = VANISHED + CONNECT_TIMEOUT
"""Seconds after which a call has been received by whoever is next on the way to the vendor, if its
connection still lives: bytes that nobody acknowledged would have ended it."""

LOOK = 1.0
"""Seconds between two looks at calls that hang while there is room beside them."""

Send = Callable[[Callable[[], None]], Awaitable[Answer]]
"""Makes a call; is given what to call when the head of the answer is there."""


class _Call:
    """One call: `began` is the loop's time, `task` makes it."""

    __slots__ = ("awaited", "began", "slot", "task")

    def __init__(self, began: float, slot: Slot) -> None:
        self.began = began
        self.slot = slot
        self.awaited = True
        self.task: asyncio.Task[Answer]


class Calls:
    """All calls that are out.  `late` is told of each answer that nobody waits for any more.

    `reads` asks the vendor what costs it no mint, and tells whether it answered at all.
    """

    def __init__(
        self,
        timeout: float,
        late: Callable[[Answer], Awaitable[None]],
        reads: Callable[[], Awaitable[bool]],
    ) -> None:
        self._timeout = timeout
        self._late = late
        self._reads = reads
        self._out: set[_Call] = set()
        self._probing = TaskSet()

    async def make(self, send: Send, slot: Slot) -> Answer:
        """Make one call; raises CallFailed, with TIMEOUT while it may still be under way."""
        slot.keep()
        loop = asyncio.get_running_loop()
        call = _Call(loop.time(), slot)
        call.task = loop.create_task(self._see_through(call, send), context=Context())
        self._out.add(call)
        call.task.add_done_callback(lambda task: self._over(call, task))
        try:
            await asyncio.wait((call.task,), timeout=self._timeout)
        finally:
            call.awaited = False
            if slot.is_settled:
                call.task.cancel()  # no effect on one that is done; the body of another is no use
            elif not len(self._probing):
                self._probing.start(self._probe())
        if not call.task.done() or call.task.cancelled():
            raise CallFailed(Reason.TIMEOUT)
        return call.task.result()

    async def close(self) -> None:
        """End all calls: the process ends, and its connections with it.

        What they have written may lie unread before a vendor that stands still.
        """
        await self._probing.close()
        for call in self._out:
            call.slot.abandon()
            call.task.cancel()
        if self._out:
            await asyncio.wait([call.task for call in self._out])

    async def _see_through(self, call: _Call, send: Send) -> Answer:
        try:
            async with asyncio.timeout(LONGEST):
                answer = await send(lambda: self._arrived(call))
        except TimeoutError as error:
            call.slot.abandon()
            raise CallFailed(Reason.TIMEOUT) from error
        finally:
            call.slot.settle()
        if not call.awaited:
            await self._late(answer)
        return answer

    def _arrived(self, call: _Call) -> None:
        """The vendor reads: give back this slot, and those of calls that hang."""
        now = asyncio.get_running_loop().time()
        call.slot.answered()
        self._give_up(min(call.began, now - SEEN))

    async def _probe(self) -> None:
        """Ask whether the vendor reads, as long as calls hang and keep all others back."""
        loop = asyncio.get_running_loop()
        asked = -SEEN
        while self._out:
            now = loop.time()
            due = max(asked, *(call.began for call in self._out)) + SEEN
            if now < due:
                await asyncio.sleep(due - now)
            elif not self._are_in_the_way:
                await asyncio.sleep(LOOK)
            else:
                asked = now
                if await self._reads():
                    self._give_up(asked)

    @property
    def _are_in_the_way(self) -> bool:
        """Whether nobody waits for any of these calls, and there is no room for another."""
        slots = [call.slot for call in self._out]
        return not any(call.awaited for call in self._out) and any(s.may_give_up for s in slots)

    def _give_up(self, before: float) -> None:
        """Abandon the calls that hang: made before this moment, and nobody waits for them."""
        for call in self._out:
            if not call.awaited and call.began < before:
                call.slot.abandon()
                call.task.cancel()

    def _over(self, call: _Call, task: "asyncio.Task[Answer]") -> None:
        self._out.discard(call)
        if task.cancelled():
            return
        failure = task.exception()  # or it would be reported as never retrieved
        if failure is not None and not call.awaited and not isinstance(failure, CallFailed):
            log.error("broker.defect", exc_info=failure)  # nobody waits: it would vanish

    def __len__(self) -> int:
        return len(self._out)

    @override
    def __repr__(self) -> str:
        return f"Calls(out={len(self._out)})"
