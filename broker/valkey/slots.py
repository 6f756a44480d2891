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

While the server is away the replica spends its share, from a bucket of its own that starts empty at
`Fleet.alone_from`: then the others have noticed that it is lost, whether or not anybody asks for a
call here.  It makes none before those are settled that were out at the loss, for the others' share
does not count them.  When the server is back the shared bucket starts empty, too: nobody knows what
all have spent; what is still out is told.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable, Mapping

import structlog
from msgspec import Struct
from typing_extensions import override

from broker.pacing.slots import Budget, LocalSlots, SlotSource
from broker.rules import outstanding
from broker.rules.outstanding import PROBES
from broker.rules.reuse import SECOND
from broker.tasks import Background, TaskSet
from broker.telemetry.cells import Counter
from broker.telemetry.labels import BackgroundTask
from broker.valkey.client.errors import Reason, StoreFailed, number
from broker.valkey.client.guarded import Operation, StoreClient
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script, command
from broker.valkey.client.shapes import COUNTED
from broker.valkey.fleet_time import era_of
from broker.valkey.key_names import Names
from broker.valkey.membership import ALONE_AFTER, Fleet

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

TELL_AGAIN = 1.0
"""Seconds between two messages while calls are out here, only the end of one makes room, or every
newcomer is refused: what was told last may be over, or never have been true."""

SILENT = 5.0
"""Seconds without a message after which the calls that a replica has out are owed: it was killed,
or is cut off and begins to spend its own share.  A few messages may be late."""

LOOK = 0.5
"""Seconds between two looks at whether the share begins or ends, at most."""

PAUSED = b"paused"
"""The news that the vendor asked for a pause; for how long, the server tells."""


class _Told(Struct, frozen=True):
    """What the server says of the next call; times in microseconds, `silence` -1 for none."""

    reserved: bool
    wait: int
    free: int
    paused: int
    era: bytes
    time: int
    silence: int
    owed: int
    lines: list[int]


def _read(reply: Reply) -> _Told:
    """Read it; raises StoreFailed for what the script would not say."""
    match reply:
        case [0 | 1 as reserved, wait, free, paused, bytes(era), time, int(silence), owed, *lines]:
            return _Told(
                bool(reserved),
                number(wait, int(AHEAD * SECOND)) if reserved else number(wait),
                number(free),
                number(paused),
                era_of(era),
                number(time),
                silence if silence < 0 else number(silence),
                number(owed),
                [line for line in lines if isinstance(line, int) and line > 0],
            )
        case _:
            raise StoreFailed(Reason.OTHER, "budget: another reply")


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
        self._server = server
        self._names = names
        self._fleet = fleet
        self._replica = replica.encode()
        self._closed = closed
        self._told_of_pause: Callable[[float], None] = _nobody
        self._alone: LocalSlots | None = None
        self._carried = 0
        self._started = 0.0
        self._failed = False
        self._returned = True
        self._full_at = 0.0
        self._lines: list[int] = []
        self._lines_told = 0.0
        self._asking = False
        self._tasks = TaskSet()
        self._background = Background(counts)
        interval = b"%d" % -int(-budget.interval * SECOND // 1)
        self._numbers = (b"%d" % budget.burst, interval)
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
        self._started = self._loop.time()
        self._full_at = self._started + self._budget.depth
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
            return self._alone.remaining if self._alone is not None and self._may_spend else 0
        spare = self._budget.depth - max(self._full_at - self._loop.time(), 0.0)
        return int(spare / self._budget.interval + 1e-9)

    @property
    @override
    def outstanding(self) -> int:
        return self._out

    @property
    @override
    def interval(self) -> float:
        share = self._share if self._is_alone else self._budget
        return self._budget.interval if share is None else share.interval

    @property
    @override
    def shortage(self) -> str:
        if not self._is_alone:
            return super().shortage
        if self._share is None:
            return (
                "the shared store is away, and this process has no share of the vendor's budget;"
                " set [store] replicas to the number of processes"
            )
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
    async def take_if_plenty(self) -> bool:
        try:
            reserved, _ = await self._reserve(0, modest=True)
        except StoreFailed:
            alone = self._alone
            if alone is None or not self._may_spend or not await alone.take_if_plenty():
                return False
            self._out += 1
            return True
        return reserved

    @override
    def settle(self) -> None:
        if self._alone is not None:
            self._alone.settle()
        self._settled += 1
        self._note_end()

    @override
    def abandon(self) -> None:
        if self._alone is not None:
            self._alone.abandon()
        self._abandoned += 1
        self._note_end()

    def _note_end(self) -> None:
        """Tell the server, at once; after what was out at the loss the share begins anew."""
        self._out -= 1
        self._untold += 1
        if self._carried:
            self._carried -= 1
            if self._alone is not None:
                self._alone.drain()  # before whoever waits for a slot of it goes on
        self._freed.set()
        if not self._telling:
            self._telling = True
            self._tasks.start(self._tell_ended())

    @override
    def answered(self) -> None:
        """Note it for the next message: a slot whose call was answered is settled with it."""
        self._answered_at = self._loop.time()
        if self._alone is not None:
            self._alone.answered()

    @property
    @override
    def stuck_for(self) -> float | None:
        if self._is_alone:
            return None if self._alone is None else self._alone.stuck_for
        return None if self._stuck_since is None else self._loop.time() - self._stuck_since

    @property
    @override
    def may_give_up(self) -> bool:
        """Also what was out at the loss: the share waits for it, and the others do not count it."""
        if self._is_alone:
            return self._carried > 0 or (self._alone is not None and self._alone.may_give_up)
        within = outstanding.may_give_up(self._owed, self._budget.limit)
        return within and self._stuck_since is not None

    @override
    def predict(self, ahead: int, start: float, *, drained: bool) -> float:
        """Where only the end of a call makes room, expect it after as long again."""
        if self._is_alone:
            return self._predict_alone(ahead, start, drained=drained)
        budget, now = self._budget, self._loop.time()
        lines = self._lines if now - self._lines_told < QUEUE_TOLD else []
        turns = ahead + 1 + sum(min(line, ahead + 1) for line in lines)
        level = start + budget.depth if drained else max(self._full_at, start)
        due = max(level + turns * budget.interval - budget.depth, start)
        return due + (self.stuck_for or 0.0)

    def _predict_alone(self, ahead: int, start: float, *, drained: bool) -> float:
        share = self._share
        if share is None or self._closed:
            return math.inf
        if self._alone is not None:
            moment = self._alone.predict(ahead, start, drained=drained)
        else:
            moment = max(start, self._alone_from) + (ahead + 1) * share.interval
        return moment if moment < self._fleet.alone_until else math.inf

    @override
    def pause(self, seconds: float) -> None:
        """Tell the server, and the others at once: they have reserved calls already."""
        self._tasks.start(self._pause(int(seconds * SECOND)))

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

    async def _send(self, waiting: int, what: bytes) -> "_Told":
        """Send one message, after the one before: it tells what is out, and what is over."""
        async with self._turn:
            self._messages += 1
            untold, now = self._untold, self._loop.time()
            self._told_at = now
            answered = self._answered_at
            try:
                reply = await self._server.run(
                    Operation.BUDGET,
                    Script.BUDGET,
                    (self._names.budget, self._names.queues, self._names.calls),
                    *self._numbers,
                    self._replica,
                    b"%d" % waiting,
                    b"%d" % int(AHEAD * SECOND),
                    b"0" if self._returned else b"1",
                    b"%d" % REMEMBERED,
                    b"%d" % int(QUEUE_TOLD * SECOND),
                    what,
                    *self._fleet.time.vouched(),
                    b"%d" % self._messages,
                    b"%d" % self._out,
                    b"%d" % self._settled,
                    b"%d" % self._abandoned,
                    b"-1" if answered is None else b"%d" % int((now - answered) * SECOND),
                    b"%d" % int(SILENT * SECOND),
                    b"%d" % PROBES,
                )
                told = _read(reply)
            except StoreFailed:
                self._failed = True
                raise
            self._fleet.time.learn(told.era, told.time)
            self._note(told.wait / SECOND, told.free, reserved=told.reserved)
            self._failed, self._returned, self._alone = False, True, None
            self._untold -= untold
            self._out += told.reserved
            self._stuck_since = now - told.silence / SECOND if told.silence >= 0 else None
            self._owed = told.owed
            return told

    async def _tell_ended(self) -> None:
        """Tell what is over, unless a reservation does; the next look tries again."""
        try:
            await asyncio.sleep(0)
            while self._untold and not self._server.is_away and await self._tell():
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
        return self._server.is_away or unheard or self._fleet.is_lost

    @property
    def _refuses_all(self) -> bool:
        """Whether every newcomer is refused: then nobody is in line to learn that it is over."""
        now = self._loop.time()
        wait = self.predict(0, now, drained=False) - now
        return not self._is_alone and wait > self._budget.max_wait

    @property
    def _is_alone(self) -> bool:
        return self._alone is not None or self._is_lost

    @property
    def _share(self) -> Budget | None:
        """This replica's part of the budget; None if there is none for it."""
        return self._budget.share(self._fleet.parts) if self._fleet.parts else None

    @property
    def _alone_from(self) -> float:
        return max(self._fleet.alone_from, self._started + ALONE_AFTER)

    @property
    def _may_spend(self) -> bool:
        """Whether the share is ours now, and nothing is out that it does not count."""
        now = self._loop.time()
        return not self._carried and self._alone_from <= now < self._fleet.alone_until

    async def _watch(self) -> None:
        """Begin and end the share when its time has come, and tell what has to be told."""
        while True:
            await self._look()
            left = self._alone_from - self._loop.time()
            await asyncio.sleep(min(left, LOOK) if left > 0 else LOOK)

    async def _look(self) -> None:
        due = self._alone_from <= self._loop.time()
        if self._alone is not None and not (due and self._is_lost):
            self._alone = None  # it was heard: the others have this share again
        elif self._alone is None and due and self._is_lost:
            await self._begin_share()
        since = self._loop.time() - self._told_at
        wants_news = bool(self._out) or self._stuck_since is not None or self._refuses_all
        due = bool(self._untold) or (wants_news and since >= TELL_AGAIN)
        if due and not self._telling and not self._server.is_away:
            _ = await self._tell()

    async def _begin_share(self) -> None:
        share = self._share
        if share is None or self._closed:
            return
        self._returned = False
        alone = LocalSlots(share, out=self._out)
        await alone.start()
        self._alone, self._carried = alone, self._out
        log.warning("broker.budget_alone", parts=self._fleet.parts)

    async def _take_alone(self) -> bool:
        """Take a slot of this replica's share; False if there is none yet."""
        alone, now = self._alone, self._loop.time()
        if alone is None or not self._may_spend:
            await self._nap(max(self._alone_from - now, LOOK / 5))
            return False
        if not alone.is_free:
            await self._nap(alone.predict(0, now, drained=False) - now)
            return False  # the server may be back
        taken = await alone.take(lambda: 1)
        self._out += taken
        if not taken or (self._alone is alone and self._may_spend):
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
        channel = self._names.channel
        self._server.tell(Operation.BUDGET, channel, command(b"PUBLISH", channel, PAUSED), COUNTED)

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
                *self._fleet.time.vouched(),
            )
            if wait := number(left):
                self._told_of_pause(wait / SECOND)

    @override
    def on_pause(self, hold: Callable[[float], None]) -> None:
        self._told_of_pause = hold

    def heard(self, news: bytes) -> None:
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
        alone = self._alone is not None
        return f"SharedSlots(remaining={self.remaining}, out={self._out}, alone={alone})"


def _nobody(_seconds: float) -> None:
    """Stands for whoever would be told of a pause."""
