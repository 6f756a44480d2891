"""The budget: no more mints than the vendor allows, each in its turn.

Theory of operation.  `slots` decide *when* a call may be made, the queue here *whose* it is.

- Slots come one by one from the first second on: a restart adds no burst.
- Who cannot be served within `max_wait` is refused at arrival with the true time, not after
  having waited for nothing.  Refused callers are given times one slot apart, so those who come
  back when they were told find their slot instead of each other.
- Order: what is fair between clients, then urgency, then arrival (see `line`).  A client that
  asks a hundred times as much waits behind itself, not in front of the others.
- A renewal ahead of time never queues: it takes a slot only if nobody waits and half the burst
  is left, because every slot it takes is one that a first visitor may need.
- A slot whose taker went away in the same moment is passed on; if nobody waits, it lapses.
- A slot stays outstanding until its taker gives it back (`Slot`): what was sent and has not been
  answered may arrive at the vendor at any moment, and counts as if it did now.

All times are seconds of the event loop's clock.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Protocol

from typing_extensions import override

from broker.errors import BudgetExhausted, ServiceUnavailable
from broker.pacing.fair_queue import FairQueue, Waiter
from broker.pacing.slots import UNCOUNTED, Budget, LocalSlots, Slot, SlotSource
from broker.tasks import Background
from broker.telemetry.cells import Counter
from broker.telemetry.labels import BackgroundTask

MAX_PROMISE = 300.0
"""Seconds: nobody is told to come back later than this; the vendor's own pauses end here too."""

JITTER = 0.1
"""Share of the predicted time that is added at random to Retry-After."""

LATENESS = 0.1
"""Seconds by which a slot may come later than predicted: timers fire late, and whoever was let
into the queue for a wait of just `max_wait` must not be turned away at its end."""


UNANSWERED = "the vendor does not answer: calls that are out use up the budget"
"""What those are told who are refused in a stall."""


class Priority(Enum):
    """Why a mint is wanted, most urgent first."""

    FIRST = "first"
    """The visitor has nothing to show."""
    MANDATORY = "mandatory"
    """The visitor has a token that works for a while: it is below the floor, or not `fresh`."""
    AHEAD = "ahead"
    """The token is good; its successor would only be convenient."""


_RANKS = {Priority.FIRST: 0, Priority.MANDATORY: 1}
"""Those who queue, by urgency."""


class Pacer(Protocol):
    """Hands out slots."""

    @property
    def has_headroom(self) -> bool:
        """Whether a renewal ahead of time may take a slot now."""
        ...

    async def acquire(self, priority: Priority, client: str) -> Slot:
        """Return when the caller may make one call to the vendor; the slot has to be given back.

        Raises `ServiceUnavailable` with the predicted time when that would take too long.
        """
        ...


class NoPacing(Pacer):
    """No budget: for an issuer that costs nothing."""

    @property
    @override
    def has_headroom(self) -> bool:
        return True

    @override
    async def acquire(self, priority: Priority, client: str) -> Slot:
        return UNCOUNTED

    @override
    def __repr__(self) -> str:
        return "NoPacing()"


class BudgetPacer(Pacer):
    """A budget.  Between `start` and `close` it owns a task.

    `waited` is called with the seconds that each granted caller waited.  Without `slots` they are
    this process' own.  `counts` counts restarts of the task.
    """

    def __init__(
        self,
        budget: Budget,
        waited: Callable[[float], object],
        slots: SlotSource | None = None,
        counts: Mapping[BackgroundTask, Counter] | None = None,
    ) -> None:
        self._budget = budget
        self._slots = slots or LocalSlots(budget, successor=True)
        self._slots.on_pause(self.pause_for)
        self._waited = waited
        self._paused = False
        self._paused_until = 0.0
        self._promised: dict[str, float] = {}
        self._line = FairQueue(len(_RANKS))
        self._wanted = asyncio.Event()
        self._background = Background(counts)

    async def start(self) -> None:
        """Begin with no slot, so that a restart does not add a burst, and begin to serve."""
        self._loop = asyncio.get_running_loop()
        await self._slots.start()
        self._background.start(BackgroundTask.PACING, self._serve)

    async def close(self) -> None:
        """Stop serving; whoever waits is told that the broker stops."""
        if BackgroundTask.PACING in self._background:
            await self._background.close()
            await self._slots.close()
        while place := self._line.next():
            if not place.granted.done():
                place.granted.set_exception(_stopping())

    @override
    async def acquire(self, priority: Priority, client: str) -> Slot:
        if priority is Priority.AHEAD:
            await self._take_if_headroom()
        elif not self.depth and not self._paused and self._slots.is_free:
            _ = await self._slots.take(lambda: 1)
            self._waited(0.0)
        else:
            await self._queue(priority, client)
        return Slot(self._slots, self._pass_on)

    def pause(self, seconds: float) -> None:
        """Give out nothing for this long (the vendor said so), and no burst afterwards."""
        self.pause_for(seconds)
        self._slots.pause(min(seconds, MAX_PROMISE))

    def pause_for(self, seconds: float) -> None:
        """Follow a pause, whoever was told of it.

        Who waits and would not be served in time is told so now, not at the end of their patience.
        """
        now = self._loop.time()
        self._paused_until = max(now + min(seconds, MAX_PROMISE), self._paused_until)
        self._paused = True
        self._wanted.set()
        for place in self._line.places():
            if place.until <= self._paused_until and not place.granted.done():
                wait = self._promise(place.client, self._paused_until - now)
                place.granted.set_exception(self._used_up(wait))

    async def sync_remaining(self, remaining: int) -> None:
        """Believe the vendor when it says that fewer calls are left than we think."""
        await self._slots.sync_remaining(remaining)

    @property
    def depth(self) -> int:
        """How many wait."""
        return len(self._line)

    @property
    def outstanding(self) -> int:
        """Calls that are out, and may arrive at the vendor yet."""
        return self._slots.outstanding

    @property
    def remaining(self) -> int:
        """Slots that could be taken at this moment."""
        return 0 if self._paused else self._slots.remaining

    @property
    @override
    def has_headroom(self) -> bool:
        """Whether nobody waits and half the burst is left."""
        return not self.depth and self.remaining * 2 >= self._budget.burst

    async def _queue(self, priority: Priority, client: str) -> None:
        if BackgroundTask.PACING not in self._background:
            raise _stopping()
        rank = _RANKS[priority]
        predicted = self._predict(client, rank)
        if predicted > self._budget.max_wait:
            raise self._used_up(self._promise(client, predicted))
        arrived = self._loop.time()
        timeout = self._budget.max_wait + LATENESS
        place = Waiter(client, rank, arrived + timeout, self._loop.create_future())
        self._line.join(place)
        self._wanted.set()
        try:
            async with asyncio.timeout(timeout):
                await place.granted
        except TimeoutError as error:
            self._give_up(place)
            wait = self._promise(client, self._predict(client, rank))
            raise self._used_up(wait) from error
        except BaseException:
            self._give_up(place)
            raise
        self._waited(self._loop.time() - arrived)

    def _predict(self, client: str, rank: int) -> float:
        """Seconds until a newcomer gets a slot, if nobody else comes."""
        now = self._loop.time()
        ahead = self._line.ahead_of(client, rank)
        start = max(now, self._paused_until)
        return self._slots.predict(ahead, start, drained=self._paused) - now

    def _promise(self, client: str, predicted: float) -> int:
        """Choose when to come back: a slot after what this client was last told.  In us."""
        now = self._loop.time()
        last = self._promised.get(client, 0.0)
        moment = max(last + self._slots.interval, now + predicted)
        self._promised[client] = moment = min(moment, now + MAX_PROMISE / (1 + JITTER))
        wait = moment - now
        return int((wait + wait * JITTER * random.random()) * 1_000_000)  # noqa: S311 - spreads callers, guards nothing

    def _used_up(self, wait: int) -> BudgetExhausted:
        """Say why: answers that take less than the burst's refill leave the budget its pace."""
        silence = None if self._paused else self._slots.stuck_for
        if silence is not None and silence > self._budget.depth:
            return BudgetExhausted(UNANSWERED, wait)
        return BudgetExhausted(self._slots.shortage, wait)

    async def _take_if_headroom(self) -> None:
        if not self.depth and not self._paused and await self._slots.take_if_headroom():
            if not self._paused:
                return
            self._slots.settle()  # a pause began meanwhile
        raise BudgetExhausted("the vendor's budget is needed elsewhere", 1_000_000)

    async def _serve(self) -> None:
        while True:
            await self._wanted.wait()
            await self._serve_next()
            if not self.depth and not self._paused:
                self._wanted.clear()

    async def _serve_next(self) -> None:
        await self._sleep_out_pause()
        if self.depth and await self._slots.take(lambda: self.depth):
            try:
                await self._sleep_out_pause()
            except BaseException:
                self._slots.settle()
                raise
            self._pass_on()

    async def _sleep_out_pause(self) -> None:
        """Wait until the vendor's pause is over, then start as drained as after a start."""
        if not self._paused:
            return
        while (left := self._paused_until - self._loop.time()) > 0:  # noqa: ASYNC110 - may be extended
            await asyncio.sleep(left)
        self._paused = False
        await self._slots.resume()

    def _pass_on(self) -> None:
        """Give the slot at hand to whoever is next; if nobody is, or in a pause, it lapses."""
        while not self._paused and (place := self._line.next()):
            if not place.granted.done():
                place.granted.set_result(None)
                return
        self._slots.settle()

    def _give_up(self, place: Waiter) -> None:
        """Leave the queue; a slot that was granted in the same moment goes to the next."""
        self._line.leave(place)
        granted = place.granted
        had_slot = granted.done() and not granted.cancelled() and granted.exception() is None
        if had_slot:
            self._pass_on()

    @override
    def __repr__(self) -> str:
        return (
            f"BudgetPacer(waiting={self.depth}, remaining={self.remaining}, "
            f"outstanding={self.outstanding})"
        )


def _stopping() -> ServiceUnavailable:
    return ServiceUnavailable("the broker is stopping", 1_000_000)
