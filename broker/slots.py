"""When the vendor may be called next.  `pacer` decides who it is that calls.

Slots of one process come from aiolimiter.  It starts full, so every restart would add a burst: it
is drained first, and again after each pause.  Its waiters are unbounded and overtake each other:
only one at a time ever waits here, the pacer's server.

All times are seconds of the event loop's clock, which is the clock the limiter runs on.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from aiolimiter import AsyncLimiter
from msgspec import Struct
from typing_extensions import override

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

    def share(self, replicas: int) -> "Budget | None":
        """Return one part in `replicas`: in no window do all parts allow more than the whole.

        A burst under one is one.  What that is too much in all, the rate gives back: the vendor's
        window is one `per` long, and holds a burst and a `per` of refill.  None if that leaves no
        rate: so many parts of one call each are more than the whole.
        """
        burst = max(self.burst // replicas, 1)
        rate = (self.rate - max(burst * replicas - self.burst, 0)) / replicas
        if rate * replicas < self.rate * LEAST_RATE:
            return None
        return Budget(rate, self.per, burst, self.max_wait)


class Slots(Protocol):
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

    async def take(self, waiting: Callable[[], int]) -> bool:
        """Return True when a call may be made, False when `waiting` says that nobody is in line."""
        ...

    async def take_if_plenty(self) -> bool:
        """Take a slot if it is there at once, nobody waits, and half the burst is left."""
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

    async def resume(self) -> None:
        """The pause is over: begin as empty as after a start."""
        ...

    async def correct(self, remaining: int) -> None:
        """Believe the vendor when it says that fewer calls are left than we think."""
        ...

    def settle(self, calls: int = 1) -> None:
        """Take note that so many calls that were granted are over: none can arrive any more."""
        ...

    @property
    def interval(self) -> float:
        """Seconds between two slots, at this moment."""
        ...


class LocalSlots(Slots):
    """The budget of one process, on aiolimiter."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._limiter = AsyncLimiter(budget.burst, budget.depth)
        self._full_at = 0.0

    @override
    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._limiter.acquire(self._budget.burst)
        self._full_at = self._loop.time() + self._budget.depth

    @override
    async def close(self) -> None:
        """Nothing is held."""

    @property
    @override
    def is_free(self) -> bool:
        return self._limiter.has_capacity()

    @property
    @override
    def remaining(self) -> int:
        spare = self._budget.depth - max(self._full_at - self._loop.time(), 0.0)
        return int(spare / self._budget.interval + 1e-9)

    @override
    async def take(self, waiting: Callable[[], int]) -> bool:
        await self._limiter.acquire()
        self._full_at = max(self._full_at, self._loop.time()) + self._budget.interval
        return True

    @override
    async def take_if_plenty(self) -> bool:
        if self.remaining * 2 < self._budget.burst or not self._limiter.has_capacity():
            return False
        return await self.take(lambda: 1)

    @override
    def predict(self, ahead: int, start: float, *, drained: bool) -> float:
        budget = self._budget
        level = start + budget.depth if drained else max(self._full_at, start)
        return max(level + (ahead + 1) * budget.interval - budget.depth, start)

    @override
    def pause(self, seconds: float) -> None:
        """Nobody else needs to know."""

    @override
    async def resume(self) -> None:
        if free := self.remaining:
            await self._limiter.acquire(free)
        self._full_at = self._loop.time() + self._budget.depth

    @override
    async def correct(self, remaining: int) -> None:
        excess = self.remaining - max(remaining, 0)
        if excess > 0 and self._limiter.has_capacity(excess):
            await self._limiter.acquire(excess)
            self._full_at = max(self._full_at, self._loop.time())
            self._full_at += excess * self._budget.interval

    @override
    def settle(self, calls: int = 1) -> None:
        """Charged when they were granted."""

    @property
    @override
    def interval(self) -> float:
        return self._budget.interval

    @override
    def __repr__(self) -> str:
        return f"LocalSlots(remaining={self.remaining})"
