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
- `LONGEST` has passed, or this process ends.

In the last two cases the call may yet arrive: a proxy may hold it, or one of the vendor's processes
that stands still while others answer.  Then its slot is abandoned, and owed (`rules.outstanding`).

An answer that nobody waits for any more is read for what it says of the budget, and its token is
dropped: the visitor has been told that there is none, may have been ended since, and a token that
was never handed out costs the vendor nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context

from typing_extensions import override

from broker.issuers.vendor_client import CONNECT_TIMEOUT, VANISHED, Answer, CallFailed
from broker.issuers.vendor_replies import Reason
from broker.pacer import MAX_PROMISE
from broker.slots import Slot

LONGEST = MAX_PROMISE
"""Seconds that a call holds its slot without any sign: as long as the longest pause that the vendor
may ask for.  Without an end, a vendor that reads and never answers would block the budget for ever;
a stall that is longer finds the slots owed, and two more calls each time."""

SEEN = VANISHED + CONNECT_TIMEOUT
"""Seconds after which a call has been received by whoever is next on the way to the vendor, if its
connection still lives: bytes that nobody acknowledged would have ended it."""

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
    """All calls that are out.  `late` is told of each answer that nobody waits for any more."""

    def __init__(self, timeout: float, late: Callable[[Answer], Awaitable[None]]) -> None:
        self._timeout = timeout
        self._late = late
        self._out: set[_Call] = set()

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
        if not call.task.done() or call.task.cancelled():
            raise CallFailed(Reason.TIMEOUT)
        return call.task.result()

    async def close(self) -> None:
        """End all calls: the process ends, and its connections with it.

        What they have written may lie unread before a vendor that stands still.
        """
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
        call.slot.answered(now - call.began)
        for other in self._out:
            if not other.awaited and other.began < min(call.began, now - SEEN):
                other.slot.abandon()
                other.task.cancel()

    def _over(self, call: _Call, task: "asyncio.Task[Answer]") -> None:
        self._out.discard(call)
        if not task.cancelled():
            task.exception()  # or it would be reported as never retrieved

    def __len__(self) -> int:
        return len(self._out)

    @override
    def __repr__(self) -> str:
        return f"Calls(out={len(self._out)})"
