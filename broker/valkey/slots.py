"""The vendor's budget, kept in the shared store: one for all replicas.

Theory of operation.  A replica whose line is not empty reserves the next call, waits until it may
be made, and gives it to whoever is first in its line; then it reserves again.  So no replica holds
more than one reservation, and those that have a line take turns.  What stands in the lines of the
others comes back with each reservation, and predictions count with it.

A call is out from its reservation until it is settled or abandoned.  Each message to the server
tells how many are out here, and how many were settled and abandoned since the start: totals,
numbered, so that a message that is lost or late does no harm.  What is over is told at once, or
with a reservation that goes anyway; what stays out is told again each second, for a replica that
has calls out and tells nothing is taken for dead.  Calls that were abandoned, and those of a dead
replica, are owed, as in `rules.outstanding`: `PROBES` calls at most are out until the vendor has
answered one.  How long ago it last answered is told with each message.

While the server is away the replica spends its share (`budget_share`).  When it is back the shared
bucket starts empty: nobody knows what all have spent; what is still out is told.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping

from typing_extensions import override

from broker.pacing.slots import Budget, SlotSource
from broker.rules import outstanding
from broker.tasks import Background, TaskSet
from broker.telemetry.cells import Counter
from broker.telemetry.labels import BackgroundTask
from broker.units import SECOND
from broker.valkey.budget_script import PAUSED, QUEUE_TOLD, BudgetMessage, BudgetReply, BudgetScript
from broker.valkey.budget_share import BudgetShare
from broker.valkey.client.errors import StoreFailed
from broker.valkey.client.guarded import StoreClient
from broker.valkey.key_names import Names
from broker.valkey.membership import Fleet

LONGEST_NAP = 1.0
"""Seconds after which a refused reservation is tried again: a pause may have been cut short."""

LATE = 1.0
"""Seconds after its moment in which a reserved call may still be made: a process that was suspended
must not make its call on top of what others were given meanwhile."""

TELL_AGAIN = 1.0
"""Seconds between two messages while calls are out here, only the end of one makes room, or every
newcomer is refused: what was told last may be over, or never have been true."""

LOOK = 0.5
"""Seconds between two looks at whether the share begins or ends, at most."""


class SharedSlots(SlotSource):
    """Slots that are reserved on the server."""

    def __init__(
        self,
        budget: Budget,
        server: StoreClient,
        names: Names,
        fleet: Fleet,
        replica: str,
        counts: Mapping[BackgroundTask, Counter] | None = None,
        *,
        closed: bool,
    ) -> None:
        self._budget = budget
        self._script = BudgetScript(budget, server, names, fleet.time, replica)
        self._fleet = fleet
        self._told_of_pause: Callable[[float], None] = lambda _seconds: None
        self._share = BudgetShare(budget, fleet, closed=closed)
        self._failed = False
        self._returned = True
        self._full_at = 0.0
        self._lines: list[int] = []
        self._lines_told = 0.0
        self._asking = False
        self._tasks = TaskSet()
        self._background = Background(counts)
        self._turn = asyncio.Lock()
        self._messages = 0
        self._out = 0
        self._settled = 0
        self._abandoned = 0
        self._untold = 0
        self._told_at = 0.0
        self._answered_at: float | None = None
        self._stuck_since: float | None = None
        self._owed = 0
        self._telling = False
        self._freed = asyncio.Event()

    @override
    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._share.start()
        self._full_at = self._loop.time() + self._budget.depth
        self._background.start(BackgroundTask.SHARE, self._watch)

    @override
    async def close(self) -> None:
        await self._background.close()
        await self._tasks.close()
        if self._untold:
            await self._tell()

    @property
    @override
    def is_free(self) -> bool:
        return False  # only the server knows

    @property
    @override
    def remaining(self) -> int:
        if self._is_alone:
            return self._share.remaining
        spare = self._budget.depth - max(self._full_at - self._loop.time(), 0.0)
        return int(spare / self._budget.interval + 1e-9)

    @property
    @override
    def outstanding(self) -> int:
        return self._out

    @property
    @override
    def interval(self) -> float:
        share = self._share.budget if self._is_alone else self._budget
        return self._budget.interval if share is None else share.interval

    @property
    @override
    def shortage(self) -> str:
        return self._share.shortage if self._is_alone else super().shortage

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
                await self._nap(wait)
                continue
            due = self._loop.time() + wait
            try:
                await asyncio.sleep(wait)
            except BaseException:
                self.settle()
                raise
            if self._loop.time() - due < LATE:
                return True
            self.settle()  # it lapses
        return False

    @override
    async def take_if_headroom(self) -> bool:
        try:
            reserved, _ = await self._reserve(0, modest=True)
        except StoreFailed:
            taken = await self._share.take_if_headroom()
            self._out += taken
            return taken
        return reserved

    @override
    def settle(self) -> None:
        self._share.settle()
        self._settled += 1
        self._note_end()

    @override
    def abandon(self) -> None:
        self._share.abandon()
        self._abandoned += 1
        self._note_end()

    def _note_end(self) -> None:
        """Tell the server, at once; after what was out at the loss the share begins anew."""
        self._out -= 1
        self._untold += 1
        self._share.note_end()
        self._freed.set()
        if not self._telling:
            self._telling = True
            self._tasks.start(self._tell_ended())

    @override
    def answered(self) -> None:
        """Note it for the next message: a slot whose call was answered is settled with it."""
        self._answered_at = self._loop.time()
        self._share.answered()

    @property
    @override
    def stuck_for(self) -> float | None:
        if self._is_alone:
            return self._share.stuck_for
        return None if self._stuck_since is None else self._loop.time() - self._stuck_since

    @property
    @override
    def may_give_up(self) -> bool:
        if self._is_alone:
            return self._share.may_give_up
        within = outstanding.may_give_up(self._owed, self._budget.limit)
        return within and self._stuck_since is not None

    @override
    def predict(self, ahead: int, start: float, *, drained: bool) -> float:
        """Where only the end of a call makes room, expect it after as long again."""
        if self._is_alone:
            return self._share.predict(ahead, start, drained=drained)
        budget, now = self._budget, self._loop.time()
        lines = self._lines if now - self._lines_told < QUEUE_TOLD else []
        turns = ahead + 1 + sum(min(line, ahead + 1) for line in lines)
        level = start + budget.depth if drained else max(self._full_at, start)
        due = max(level + turns * budget.interval - budget.depth, start)
        return due + (self.stuck_for or 0.0)

    @override
    def pause(self, seconds: float) -> None:
        """Tell the server, and the others at once: they have reserved calls already."""
        self._tasks.start(self._pause(int(seconds * SECOND)))

    @override
    async def resume(self) -> None:
        """Nothing to do: the script left no burst behind the pause; our own bucket is drained."""
        self._full_at = self._loop.time() + self._budget.depth
        await self._share.resume()

    @override
    async def sync_remaining(self, remaining: int) -> None:
        if remaining >= self.remaining:
            return
        if self._share.slots is not None:
            await self._share.slots.sync_remaining(remaining)
        else:
            self._tasks.start(self._hold(0, max(remaining, 0)))

    async def _reserve(self, waiting: int, *, modest: bool = False) -> tuple[bool, float]:
        """Ask for the next call; returns whether it is ours, and seconds to wait.

        `modest` takes it only if nobody else could want it.
        """
        told = await self._send(waiting, b"modest" if modest else b"reserve")
        self._lines = told.lines
        self._lines_told = self._loop.time()
        if told.paused and not told.reserved:
            self._told_of_pause(told.paused / SECOND)
        return told.reserved, told.wait / SECOND

    async def _send(self, waiting: int, what: bytes) -> BudgetReply:
        """Send one message, after the one before: it tells what is out, and what is over."""
        async with self._turn:
            self._messages += 1
            untold, now = self._untold, self._loop.time()
            self._told_at = now
            try:
                told = await self._script.send(self._message(what, waiting, now))
            except StoreFailed:
                self._failed = True
                raise
            self._note(told.wait / SECOND, told.free, reserved=told.reserved)
            self._failed, self._returned, self._share.slots = False, True, None
            self._untold -= untold
            self._out += told.reserved
            self._stuck_since = now - told.silence / SECOND if told.silence >= 0 else None
            self._owed = told.owed
            return told

    def _message(self, what: bytes, waiting: int, now: float) -> BudgetMessage:
        return BudgetMessage(
            what=what,
            waiting=waiting,
            number=self._messages,
            out=self._out,
            settled=self._settled,
            abandoned=self._abandoned,
            silence=-1 if self._answered_at is None else int((now - self._answered_at) * SECOND),
            lost=not self._returned,
        )

    async def _tell_ended(self) -> None:
        """Tell what is over, unless a reservation does; the next look tries again."""
        try:
            await asyncio.sleep(0)
            while self._untold and not self._script.is_away and await self._tell():
                pass
        finally:
            self._telling = False

    async def _tell(self) -> bool:
        try:
            _ = await self._send(0, b"tell")
        except StoreFailed:
            return False  # counted; totals are told again
        return True

    def _note(self, wait: float, free: int, *, reserved: bool) -> None:
        """Remember how full the bucket was: with free slots, or with calls reserved ahead."""
        now, budget = self._loop.time(), self._budget
        if wait:
            self._full_at = now + wait + budget.depth - (0 if reserved else budget.interval)
        else:
            self._full_at = now + budget.depth - free * budget.interval

    @property
    def _is_lost(self) -> bool:
        """Whether the server is away, as far as it is known here."""
        unheard = self._failed and not self._fleet.is_heard
        return self._script.is_away or unheard or self._fleet.is_lost

    @property
    def _refuses_all(self) -> bool:
        """Whether every newcomer is refused: then nobody is in line to learn that it is over."""
        now = self._loop.time()
        wait = self.predict(0, now, drained=False) - now
        return not self._is_alone and wait > self._budget.max_wait

    @property
    def _is_alone(self) -> bool:
        return self._share.slots is not None or self._is_lost

    async def _watch(self) -> None:
        """Begin and end the share when its time has come, and tell what has to be told."""
        while True:
            await self._look()
            left = self._share.begins - self._loop.time()
            await asyncio.sleep(min(left, LOOK) if left > 0 else LOOK)

    async def _look(self) -> None:
        due = self._share.is_due
        if self._share.slots is not None and not (due and self._is_lost):
            self._share.slots = None  # it was heard: the others have this share again
        elif self._share.slots is None and due and self._is_lost and self._share.exists:
            self._returned = False
            await self._share.begin(self._out)
        since = self._loop.time() - self._told_at
        wants_news = bool(self._out) or self._stuck_since is not None or self._refuses_all
        due = bool(self._untold) or (wants_news and since >= TELL_AGAIN)
        if due and not self._telling and not self._script.is_away:
            _ = await self._tell()

    async def _take_alone(self) -> bool:
        """Take a slot of this replica's share; False if there is none yet."""
        alone, now = self._share.slots, self._loop.time()
        if alone is None or not self._share.may_spend:
            await self._nap(max(self._share.begins - now, LOOK / 5))
            return False
        if not alone.is_free:
            await self._nap(alone.predict(0, now, drained=False) - now)
            return False  # the server may be back
        taken = await alone.take(lambda: 1)
        self._out += taken
        if not taken or (self._share.slots is alone and self._share.may_spend):
            return taken
        self.settle()  # this process was suspended meanwhile: by now the others have the share
        return False

    async def _nap(self, seconds: float) -> None:
        """Wait so long, or until a call is over: it may have been what kept the next one back."""
        self._freed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, LONGEST_NAP)):
                _ = await self._freed.wait()

    async def _pause(self, us: int) -> None:
        await self._hold(us, -1)
        self._script.publish_pause()

    async def _hold(self, us: int, remaining: int) -> None:
        """Tell the server (0 and -1 tell it nothing), and follow the pause in force there."""
        with contextlib.suppress(StoreFailed):  # counted; this replica itself holds to it
            if wait := await self._script.hold(us, remaining):
                self._told_of_pause(wait / SECOND)

    @override
    def on_pause(self, hold: Callable[[float], None]) -> None:
        self._told_of_pause = hold

    def on_message(self, news: bytes) -> None:
        """Look for a pause that another replica was told of: channels are open to more than we."""
        if news == PAUSED and not self._asking:
            self._asking = True
            self._tasks.start(self._follow_news())

    async def _follow_news(self) -> None:
        try:
            await self._hold(0, -1)
        finally:
            self._asking = False

    @override
    def __repr__(self) -> str:
        return f"SharedSlots(remaining={self.remaining}, out={self._out}, {self._share!r})"
