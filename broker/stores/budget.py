"""The vendor's budget, kept in the shared store: one for all replicas.

Theory of operation.  A replica whose line is not empty reserves the next call, waits until it may
be made, and gives it to whoever is first in its line; then it reserves again.  So no replica holds
more than one, and those that have a line take turns.  What stands in the lines of the others comes
back with each reservation, and predictions count with it.

While the server is away the replica spends its share, from a bucket of its own that starts empty,
and only after the others have noticed that it is lost: anew each time, for with every heartbeat
that gets through they give the share back to all.  When the server is back the shared bucket
starts empty, too: nobody knows what all have spent.
"""

import asyncio
import contextlib
from collections.abc import Callable

import structlog
from typing_extensions import override

from broker.rules.reuse import SECOND
from broker.slots import Budget, LocalSlots, Slots
from broker.stores.failures import StoreFailed
from broker.stores.fleet import ALONE_AFTER, ALONE_FOR, Fleet
from broker.stores.names import Names
from broker.stores.scripts import Script, command
from broker.stores.server import Operation, Server

log = structlog.get_logger()

AHEAD = 5.0
"""Seconds that a call may be reserved ahead: a dozen replicas may wait for their turn."""

REMEMBERED = 3600 * SECOND
"""Microseconds: an hour without a call, and the budget starts empty."""

LONGEST_NAP = 1.0
"""Seconds after which a refused reservation is tried again: a pause may have been cut short."""

QUEUE_TOLD = 7.0
"""Seconds after which a replica's line is taken for empty, because it died: longer than it sleeps
for a call that it has reserved, and a nap."""

LATE = 1.0
"""Seconds after its moment in which a reserved call may still be made: a process that was suspended
must not make its call on top of what others were given meanwhile."""

PAUSED = b"paused"
"""The news that the vendor asked for a pause; for how long, the server tells."""


class SharedSlots(Slots):
    """Slots that are reserved on the server.  `hold` is told of others' pauses (seconds)."""

    def __init__(
        self,
        budget: Budget,
        server: Server,
        names: Names,
        fleet: Fleet,
        replica: str,
        *,
        closed: bool,
    ) -> None:
        self._budget = budget
        self._server = server
        self._names = names
        self._fleet = fleet
        self._replica = replica.encode()
        self._closed = closed
        self.hold: Callable[[float], None] = lambda _seconds: None
        self._alone: LocalSlots | None = None
        self._alone_from = 0.0
        self._alone_since = 0
        self._returned = True
        self._full_at = 0.0
        self._lines: list[int] = []
        self._lines_told = 0.0
        self._asking = False
        self._tasks: set[asyncio.Task[None]] = set()
        interval = b"%d" % -int(-budget.interval * SECOND // 1)
        self._numbers = (b"%d" % budget.burst, interval)

    @override
    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._full_at = self._loop.time() + self._budget.depth

    @override
    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    @override
    def is_free(self) -> bool:
        return False  # only the server knows

    @property
    @override
    def remaining(self) -> int:
        if self._alone is not None:
            return self._alone.remaining
        spare = self._budget.depth - max(self._full_at - self._loop.time(), 0.0)
        return int(spare / self._budget.interval + 1e-9)

    @property
    @override
    def shortage(self) -> str:
        if self._alone is None and not self._server.is_away:
            return super().shortage
        return "the shared store is away, and this broker's share of the vendor's budget is used up"

    @override
    async def take(self, waiting: Callable[[], int]) -> bool:
        while line := waiting():
            try:
                reserved, wait = await self._reserve(line)
            except StoreFailed:
                if await self._take_alone():
                    return True
                continue
            if not reserved:
                await asyncio.sleep(min(wait, LONGEST_NAP))
                continue
            due = self._loop.time() + wait
            await asyncio.sleep(wait)
            if self._loop.time() - due < LATE:
                return True
        return False

    @override
    async def take_if_plenty(self) -> bool:
        try:
            reserved, _ = await self._reserve(0, modest=True)
        except StoreFailed:
            alone = self._alone
            if alone is None or self._loop.time() < self._alone_from:
                return False
            return await alone.take_if_plenty()
        return reserved

    @override
    def predict(self, ahead: int, start: float, *, drained: bool) -> float:
        if self._alone is not None:
            return max(self._alone.predict(ahead, start, drained=drained), self._alone_from)
        if self._server.is_away:  # and nobody has asked for a call since
            share = self._budget.share(self._fleet.parts)
            return max(start, self._loop.time() + ALONE_AFTER) + (ahead + 1) * share.interval
        budget = self._budget
        recent = self._loop.time() - self._lines_told < QUEUE_TOLD
        lines = self._lines if recent else []
        turns = ahead + 1 + sum(min(line, ahead + 1) for line in lines)
        level = start + budget.depth if drained else max(self._full_at, start)
        return max(level + turns * budget.interval - budget.depth, start)

    @override
    def pause(self, seconds: float) -> None:
        """Tell the server, and the others at once: they have reserved calls already."""
        self._own(self._pause(int(seconds * SECOND)))

    @override
    async def resume(self) -> None:
        """Nothing to do: the script left no burst behind the pause; our own bucket is drained."""
        self._full_at = self._loop.time() + self._budget.depth
        if self._alone is not None:
            await self._alone.resume()

    @override
    async def correct(self, remaining: int) -> None:
        if remaining >= self.remaining:
            return
        if self._alone is not None:
            await self._alone.correct(remaining)
            return
        self._own(self._hold(0, max(remaining, 0)))

    async def _reserve(self, waiting: int, *, modest: bool = False) -> tuple[bool, float]:
        """Ask for the next call; returns whether it is ours, and seconds to wait.

        `modest` takes it only if nobody else could want it.
        """
        reply = await self._server.run(
            Operation.BUDGET,
            Script.BUDGET,
            (self._names.budget, self._names.queues),
            *self._numbers,
            self._replica,
            b"%d" % waiting,
            b"%d" % int(AHEAD * SECOND),
            b"0" if self._returned else b"1",
            b"%d" % REMEMBERED,
            b"%d" % int(QUEUE_TOLD * SECOND),
            b"1" if modest else b"0",
        )
        match reply:
            case [int(reserved), int(wait), int(free), int(paused), *lines]:
                self._returned, self._alone = True, None
                self._lines = [line for line in lines if isinstance(line, int)]
                self._lines_told = self._loop.time()
                self._note(wait / SECOND, free, reserved=bool(reserved))
                if paused and not reserved:
                    self.hold(paused / SECOND)
                return bool(reserved), wait / SECOND
            case _:
                return False, LONGEST_NAP

    def _note(self, wait: float, free: int, *, reserved: bool) -> None:
        """Remember how full the bucket was: with free slots, or with calls reserved ahead."""
        now, budget = self._loop.time(), self._budget
        if wait:
            self._full_at = now + wait + budget.depth - (0 if reserved else budget.interval)
        else:
            self._full_at = now + budget.depth - free * budget.interval

    async def _take_alone(self) -> bool:
        """Take a slot of this replica's share; False if there is none yet."""
        if self._closed:
            await asyncio.sleep(LONGEST_NAP)
            return False
        alone = self._alone
        if alone is None or self._alone_since != self._fleet.beats:
            alone = LocalSlots(self._budget.share(self._fleet.parts))
            self._alone, self._returned = alone, False
            await alone.start()
            self._alone_from = self._loop.time() + ALONE_AFTER
            self._alone_since = self._fleet.beats
            log.warning("broker.budget_alone", parts=self._fleet.parts)
        if (early := self._alone_from - self._loop.time()) > 0:
            await asyncio.sleep(min(early, LONGEST_NAP))
            if early > LONGEST_NAP or self._alone is not alone:
                return False  # the server may be back, or is
            await alone.resume()  # what gathered meanwhile is the others'
        if self._loop.time() > self._alone_from + ALONE_FOR and not self._fleet.is_fixed:
            await asyncio.sleep(LONGEST_NAP)
            return False  # by now the others have this share
        return await alone.take(lambda: 1)

    async def _pause(self, us: int) -> None:
        await self._hold(us, -1)
        channel = self._names.channel
        self._server.tell(Operation.BUDGET, channel, command(b"PUBLISH", channel, PAUSED))

    async def _hold(self, us: int, remaining: int) -> None:
        """Tell the server (0 and -1 tell it nothing), and follow the pause in force there."""
        with contextlib.suppress(StoreFailed):  # counted; this replica itself holds to it
            left = await self._server.run(
                Operation.BUDGET,
                Script.HOLD,
                (self._names.budget,),
                *self._numbers,
                b"%d" % us,
                b"%d" % remaining,
                b"%d" % REMEMBERED,
            )
            if isinstance(left, int) and left > 0:
                self.hold(left / SECOND)

    def heard(self, news: bytes) -> None:
        """Look for a pause that another replica was told of: channels are open to more than we."""
        if news == PAUSED and not self._asking:
            self._asking = True
            self._own(self._follow_news())

    async def _follow_news(self) -> None:
        try:
            await self._hold(0, -1)
        finally:
            self._asking = False

    def _own(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @override
    def __repr__(self) -> str:
        return f"SharedSlots(remaining={self.remaining}, alone={self._alone is not None})"
