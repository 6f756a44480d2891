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
from broker.stores.fleet import ALONE_AFTER, Fleet
from broker.stores.names import Names
from broker.stores.scripts import Script, command
from broker.stores.server import Operation, Server

log = structlog.get_logger()

AHEAD = 5.0
"""Seconds that a call may be reserved ahead: a dozen replicas may wait for their turn."""

REMEMBERED = 3600 * SECOND
"""Microseconds: an hour without a call, and the budget starts empty."""

QUEUE_TOLD = 3 * SECOND
"""Microseconds after which a replica's line is taken for empty: it died, or nobody waits."""

LONGEST_NAP = 1.0
"""Seconds after which a refused reservation is tried again: a pause may have been cut short."""

PAUSED = b"paused "
"""The news that the vendor asked for a pause, and for how long (us)."""


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

    @override
    async def take(self, waiting: int) -> None:
        while True:
            try:
                reserved, wait = await self._reserve(waiting)
            except StoreFailed:
                if await self._take_alone():
                    return
                continue
            if reserved:
                await asyncio.sleep(wait)
                return
            await asyncio.sleep(min(wait, LONGEST_NAP))

    @override
    def predict(self, ahead: int, start: float, *, drained: bool) -> float:
        if self._alone is not None:
            return max(self._alone.predict(ahead, start, drained=drained), self._alone_from)
        budget = self._budget
        turns = ahead + 1 + sum(min(line, ahead + 1) for line in self._lines)
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

    async def _reserve(self, waiting: int) -> tuple[bool, float]:
        """Ask for the next call; returns whether it is ours, and seconds to wait."""
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
            b"%d" % QUEUE_TOLD,
        )
        match reply:
            case [int(reserved), int(wait), int(free), int(paused), *lines]:
                self._returned, self._alone = True, None
                self._lines = [line for line in lines if isinstance(line, int)]
                self._note(wait / SECOND, free, reserved=bool(reserved))
                if paused and not reserved:
                    self.hold(paused / SECOND)
                return bool(reserved), wait / SECOND
            case _:
                return False, LONGEST_NAP

    def _note(self, wait: float, free: int, *, reserved: bool) -> None:
        """Remember how full the bucket was: with free slots, or with calls reserved ahead."""
        now, budget = self._loop.time(), self._budget
        if wait or not reserved:
            self._full_at = now + wait + budget.depth - (0 if reserved else budget.interval)
        else:
            self._full_at = now + budget.depth - free * budget.interval

    async def _take_alone(self) -> bool:
        """Take a slot of this replica's share; False if there is none yet."""
        if self._closed:
            await asyncio.sleep(LONGEST_NAP)
            return False
        if self._alone is None or self._alone_since != self._fleet.beats:
            share = self._budget.share(self._fleet.replicas)
            self._alone, self._returned = LocalSlots(share), False
            await self._alone.start()
            self._alone_from = self._loop.time() + ALONE_AFTER
            self._alone_since = self._fleet.beats
            log.warning("broker.budget_alone", replicas=self._fleet.replicas)
        if (early := self._alone_from - self._loop.time()) > 0:
            await asyncio.sleep(min(early, LONGEST_NAP))
            if early > LONGEST_NAP:
                return False  # the server may be back
            await self._alone.resume()  # what gathered meanwhile is the others'
        await self._alone.take(0)
        return True

    async def _pause(self, us: int) -> None:
        await self._hold(us, -1)
        channel = self._names.channel
        packed = command(b"PUBLISH", channel, PAUSED + b"%d" % us)
        self._server.tell(Operation.BUDGET, channel, packed)

    async def _hold(self, us: int, remaining: int) -> None:
        with contextlib.suppress(StoreFailed):  # counted; this replica itself holds to it
            await self._server.run(
                Operation.BUDGET,
                Script.HOLD,
                (self._names.budget,),
                *self._numbers,
                b"%d" % us,
                b"%d" % remaining,
                b"%d" % REMEMBERED,
            )

    def heard(self, news: bytes) -> None:
        """Follow a pause that another replica was told of."""
        if news.startswith(PAUSED) and news.removeprefix(PAUSED).isdigit():
            self.hold(int(news.removeprefix(PAUSED)) / SECOND)

    def _own(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @override
    def __repr__(self) -> str:
        return f"SharedSlots(remaining={self.remaining}, alone={self._alone is not None})"
