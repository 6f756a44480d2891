"""When the vendor may be called next.  `pacer` decides who it is that calls.

Slots of one process come from aiolimiter, which paces what is *sent*.  It starts full, so every
restart would add a burst: it is drained first, and again after each pause.  Its waiters are
unbounded and overtake each other: only one at a time ever waits here, the pacer's server.

What *arrives* at the vendor is bounded by the ledger of `rules.outstanding`: a slot is outstanding
from `take` until `settle`.  As long as answers come, the ledger has room whenever the limiter has;
when they do not, the ledger says no, however much the limiter has refilled.

All times are seconds of the event loop's clock, which is the clock the limiter runs on; the ledger
has the same in whole microseconds.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

from aiolimiter import AsyncLimiter
from msgspec import Struct
from typing_extensions import override

from broker.rules import outstanding
from broker.rules.bucket import Limit
from broker.rules.outstanding import Ledger
from broker.units import SECOND

LEAST_RATE = 0.01
"""Part of the rate that bursts of one must leave, or there is no share: it would take hours."""


class Budget(Struct, frozen=True):
    """`rate` calls every `per` seconds, `burst` at once; nobody waits over `max_wait` seconds."""

    rate: float
    per: float
    burst: int
    max_wait: float

    @property
    def interval(self) -> float:
        """Seconds between two slots."""
        return self.per / self.rate

    @property
    def depth(self) -> float:
        """Seconds from no slot to a burst of them."""
        return self.burst * self.interval

    @property
    def limit(self) -> Limit:
        """The same in whole microseconds, rounded to the safe side."""
        return Limit(burst=self.burst, interval=-int(-self.interval * SECOND // 1))

    def share(self, replicas: int) -> "Budget | None":
        """Return one part in `replicas`: in no window do all parts allow more than the whole.

        A burst under one is one.  What that is too much in all, the rate gives back, within one
        `per` and within the vendor's window: each holds a burst and what refills in it.  None if
        that leaves no rate: so many parts of one call each are more than the whole.
        """
        burst = max(self.burst // replicas, 1)
        excess = max(burst * replicas - self.burst, 0)
        rate = (self.rate - excess * max(self.per * SECOND / outstanding.WINDOW, 1)) / replicas
        if rate * replicas < self.rate * LEAST_RATE:
            return None
        return Budget(rate, self.per, burst, self.max_wait)


class SlotSource(Protocol):
    """A source of slots."""

    async def start(self) -> None:
        """Begin empty."""
        ...

    async def close(self) -> None:
        """End."""
        ...

    @property
    def is_free(self) -> bool:
        """Whether `take` returns at once."""
        ...

    @property
    def remaining(self) -> int:
        """How many could be taken at this moment, as far as it is known here."""
        ...

    @property
    def outstanding(self) -> int:
        """How many slots were taken, and neither settled nor abandoned."""
        ...

    async def take(self, waiting: Callable[[], int]) -> bool:
        """Return True when a call may be made, False when `waiting` says that nobody is in line.

        The slot is outstanding until it is settled, or abandoned.
        """
        ...

    async def take_if_headroom(self) -> bool:
        """Take a slot if it is there at once, nobody waits, and half the burst is left."""
        ...

    def settle(self) -> None:
        """Charge a slot that was taken: its call can no longer arrive at the vendor."""
        ...

    def abandon(self) -> None:
        """Give up a slot whose call may yet arrive, though nobody here can see when: it is owed."""
        ...

    def answered(self) -> None:
        """Take note that the vendor answered a call, just now."""
        ...

    @property
    def stuck_for(self) -> float | None:
        """Seconds since the last slot, if only the end of a call makes room for one; else None."""
        ...

    @property
    def may_give_up(self) -> bool:
        """Whether only the end of a call makes room, and calls that hang may be abandoned early."""
        ...

    @property
    def shortage(self) -> str:
        """Why there are no more, for whoever is refused one."""
        return "the vendor's budget is used up"

    def predict(self, ahead: int, start: float, *, drained: bool) -> float:
        """Return when (the loop's time) a newcomer gets a slot behind `ahead` others in line.

        Not before `start`; `drained` says that the bucket will be empty then.
        """
        ...

    def pause(self, seconds: float) -> None:
        """Take note that the vendor wants no call for this long."""
        ...

    def on_pause(self, hold: Callable[[float], None]) -> None:
        """Call `hold` with the seconds of each pause that somebody else was told of."""
        ...

    async def resume(self) -> None:
        """The pause is over: begin as empty as after a start."""
        ...

    async def sync_remaining(self, remaining: int) -> None:
        """Believe the vendor when it says that fewer calls are left than we think."""
        ...

    @property
    def interval(self) -> float:
        """Seconds between two slots, at this moment."""
        ...


class LocalSlots(SlotSource):
    """The budget of one process, on aiolimiter.

    A `successor` takes the place of a process that may have left calls out; `out` calls are out
    already, and to be settled or abandoned here.
    """

    def __init__(self, budget: Budget, *, successor: bool = False, out: int = 0) -> None:
        self._budget = budget
        self._successor = successor
        self._out = out
        self._limit = budget.limit
        self._limiter = AsyncLimiter(budget.burst, self._limit.depth / SECOND)
        self._ledger = Ledger()
        self._settled = asyncio.Event()
        self._stuck_since = 0.0

    @override
    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stuck_since = self._loop.time()
        await self._drain_limiter()
        if self._successor:
            self._ledger = outstanding.started(self._limit, self._now)
        else:
            self._ledger = Ledger(outstanding=self._out)
            self.drain()

    @override
    async def close(self) -> None:
        """Nothing is held."""

    @property
    @override
    def is_free(self) -> bool:
        return self._limiter.has_capacity() and self._wait == 0

    @property
    @override
    def remaining(self) -> int:
        return outstanding.remaining(self._ledger, self._limit, self._now)

    @property
    @override
    def outstanding(self) -> int:
        return self._ledger.outstanding

    @override
    async def take(self, waiting: Callable[[], int]) -> bool:
        await self._limiter.acquire()
        while (wait := self._wait) != 0:
            if not waiting():
                return False
            self._settled.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if wait is None else wait / SECOND):
                    await self._settled.wait()
        self._ledger = outstanding.take(self._ledger)
        self._stuck_since = self._loop.time()
        return True

    @override
    async def take_if_headroom(self) -> bool:
        if self.remaining * 2 < self._budget.burst or not self.is_free:
            return False
        return await self.take(lambda: 1)

    @override
    def settle(self) -> None:
        self._ledger = outstanding.settle(self._ledger, self._limit, self._now)
        self._settled.set()

    @override
    def abandon(self) -> None:
        self._ledger = outstanding.abandon(self._ledger, self._limit, self._now)
        self._settled.set()

    @override
    def answered(self) -> None:
        now = self._now
        self._ledger = outstanding.answered(self._ledger, self._limit, now, now)
        self._settled.set()

    @property
    @override
    def stuck_for(self) -> float | None:
        return self._loop.time() - self._stuck_since if self._wait is None else None

    @property
    @override
    def may_give_up(self) -> bool:
        return self._wait is None and outstanding.may_give_up(self._ledger.owed, self._limit)

    @override
    def predict(self, ahead: int, start: float, *, drained: bool) -> float:
        """Where only an answer makes room, expect it to take as long again as it has taken."""
        at = max(int(start * SECOND), self._now)
        ledger = self._ledger
        if drained:
            ledger = outstanding.drained(ledger, self._limit, at)
        calls = ledger.outstanding + ahead + 1
        due = max(ledger.full_at, at) + calls * self._limit.interval - self._limit.depth
        return max(due / SECOND, start) + (self.stuck_for or 0.0)

    @override
    def pause(self, seconds: float) -> None:
        """Nobody else needs to know."""

    @override
    def on_pause(self, hold: Callable[[float], None]) -> None:
        """Slots of one process hear of no pause but their pacer's."""

    @override
    async def resume(self) -> None:
        await self._drain_limiter()
        self.drain()

    def drain(self) -> None:
        """Begin as empty as after a start, at once: the ledger's word is enough."""
        self._ledger = outstanding.drained(self._ledger, self._limit, self._now)

    @override
    async def sync_remaining(self, remaining: int) -> None:
        excess = self.remaining - max(remaining, 0)
        if excess > 0:
            self._ledger = outstanding.charge(self._ledger, self._limit, self._now, excess)

    @property
    def _now(self) -> int:
        return int(self._loop.time() * SECOND)

    @property
    def _wait(self) -> int | None:
        return outstanding.wait(self._ledger, self._limit, self._now)

    async def _drain_limiter(self) -> None:
        while self._limiter.has_capacity():
            await self._limiter.acquire()

    @property
    @override
    def interval(self) -> float:
        return self._budget.interval

    @override
    def __repr__(self) -> str:
        return f"LocalSlots(remaining={self.remaining}, outstanding={self.outstanding})"


class Slot:
    """Leave to make one call, of which the budget takes note until it is given back, once.

    Whoever takes over (`keep`) gives it back; otherwise the end of the mint does.
    """

    __slots__ = ("_slots", "_unused", "kept")

    def __init__(self, slots: SlotSource | None, unused: Callable[[], object]) -> None:
        self._slots = slots
        self._unused = unused
        self.kept = False

    def keep(self) -> None:
        """Give it back yourself: the call may outlive the mint."""
        self.kept = True

    def settle(self) -> None:
        """The call arrived, or never will."""
        if slots := self._ended():
            slots.settle()

    def answered(self) -> None:
        """The vendor answered it, just now."""
        if slots := self._slots:
            slots.answered()
        self.settle()

    def abandon(self) -> None:
        """The call may yet arrive, and nobody waits any longer to see it."""
        if slots := self._ended():
            slots.abandon()

    def unused(self) -> None:
        """No call was made: the slot is whoever's who is next."""
        if self._ended():
            self._unused()

    @property
    def may_give_up(self) -> bool:
        """Whether it is one of those that leave no room for another call, and may be abandoned."""
        return self._slots is not None and self._slots.may_give_up

    @property
    def is_settled(self) -> bool:
        """Whether it was given back."""
        return self._slots is None

    def _ended(self) -> SlotSource | None:
        slots, self._slots = self._slots, None
        return slots


class _Uncounted(Slot):
    """Nothing to give back, so everybody may have the same one: it never changes."""

    __slots__ = ()

    @override
    def keep(self) -> None:
        """Whoever gives it back, nobody takes note."""


UNCOUNTED: Slot = _Uncounted(None, lambda: None)
"""The slot of an issuer that has no budget."""
