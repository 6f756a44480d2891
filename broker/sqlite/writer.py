"""Writes to the state file, from a thread of its own: no request waits for a disk unless it asks.

Theory of operation.  The event loop adds records to a queue; the thread takes all of them at once,
seals them and commits.  Whoever must know waits for the commit after their record: then the thread
does not wait for others to gather.  The order in the file is the order of adding, which is what
makes an end stronger than the tokens before it.

What could not be written is kept and tried again, with all that came since; those who waited are
told at once.  While that is so, or while one commit takes long, the writer is degraded.  What waits
is bounded, and what the thread has in hand counts with it: mints beyond the bound are lost to the
file, and ends beyond theirs are refused before they are made (`takes_end`).  The thread sets plain
attributes and calls nothing of the loop's but `call_soon_threadsafe`.
"""

import asyncio
import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from typing import TypeVar

import structlog
from typing_extensions import override

from broker.model import Secret
from broker.rules.durable import Moment
from broker.sqlite import data_key
from broker.sqlite.ledger import Row
from broker.sqlite.opening import Opened
from broker.sqlite.records import (
    BUCKETS,
    ENDS,
    MINTS,
    BucketsSpent,
    End,
    Kind,
    Other,
    Record,
    seal,
)
from broker.sqlite.state_file import StateFileFailed
from broker.telemetry.labels import FileError

log = structlog.get_logger()

_T = TypeVar("_T")

GATHER = 0.03
"""Seconds in which records gather when nobody waits: with the commit itself they stay below the 50
ms that a crash may cost a local issuer."""

ROUND = 1.0
"""Seconds between rounds of housekeeping in the file."""

RETRY = 0.5
"""Seconds until what failed is tried again."""

CHECKPOINT = 5.0
"""Seconds between the moments at which all mints are put onto the disk: what a power failure may
cost, which a crash of the process does not."""

LATE = 1.0
"""Seconds that a mint waits for its commit; longer ones make the writer degraded."""

END_WAIT = 5.0
"""Seconds that an end waits: whoever asked for it wants to know, and has a deadline."""

CLOSING = 5.0
"""Seconds that the end of the process waits for the last commit."""

IN_ROW = {MINTS: 500, ENDS: 500, BUCKETS: 20}
"""Records of a row: about a megabyte of tokens, 10,000 buckets."""

PROBE = 500
"""Records of the first commit after one that failed: to seal all of them for each try would take
the interpreter's time from requests."""

MOST_DEFECTS = 2
"""Defects in a row after which what could not be written is given up."""

DROPPED_AT_ONCE, FREED_AT_ONCE = 50, 256
"""Rows, and pages, that a round gives back before it looks whether somebody waits."""

WAITING_ENDS = 100_000
"""Ends that may wait for a disk that fails, of about 150 bytes, two for each session: whoever asked
for one was answered with 503.  The operator may have twice as many, so that no client takes all."""


class Writer:
    """The thread, and what the event loop says to it; `moment` is asked in the thread."""

    def __init__(self, opened: Opened, moment: Callable[[], Moment], most: int) -> None:
        self._file, self._box = opened.file, opened.box
        self._data_key, self._ledger = opened.data_key, opened.ledger
        self._moment = moment
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._awake, self._urgent = threading.Event(), threading.Event()
        self._pending: deque[Record] = deque()
        self._in_hand = 0
        self._ends_added = self._ends_done = 0  # by the loop, and by the thread
        self._waiting: deque[asyncio.Future[bool]] = deque()
        self._keys: list[bytes] | None = None
        self._began: float | None = None
        self._stop = threading.Event()
        self._is_dirty, self._has_more = False, False
        self._round_at, self._checkpoint_at = 0.0, 0.0
        self.failure: StateFileFailed | None = None
        self._is_gone = False
        self._defects = 0
        self.gave_up = False
        self.failures: Counter[FileError] = Counter()
        self.lost = 0
        self.size = opened.file.size()
        self._thread = threading.Thread(target=self._run, name="state file", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def add(self, record: Other) -> None:
        """Write this soon; it is lost, counted, if as many as may wait for a disk do so already."""
        pending = self._pending
        waiting = len(pending) + self._in_hand  # ends, which are not meant, seldom matter
        if waiting >= self._most and waiting - self._waiting_ends() >= self._most:
            self.lost += 1
            return
        pending.append(record)
        if not self._awake.is_set():
            self._awake.set()

    def add_end(self, record: End) -> None:
        """Write this soon; ask `takes_end` before there is anything to write."""
        self._ends_added += 1
        self._pending.append(record)
        self._awake.set()

    def takes_end(self, *, by_client: bool) -> bool:
        """Whether another end has room to wait in: for a client earlier not than for others."""
        return self._waiting_ends() < (WAITING_ENDS if by_client else 2 * WAITING_ENDS)

    def _waiting_ends(self) -> int:
        return self._ends_added - self._ends_done

    def add_all(self, records: Sequence[Other]) -> None:
        """Write these soon, and in one commit: the thread takes all of them or none."""
        self._pending.extend(records)
        self._awake.set()

    def use_keys(self, keys: Sequence[Secret]) -> None:
        """Let these keys open the file, and no others."""
        wrapped = data_key.wrapped(self._data_key, keys)
        with self._lock:
            self._keys = wrapped
        self._awake.set()

    @property
    def owes_keys(self) -> bool:
        """Whether the file opens with the keys of before, and not yet with those of now."""
        return self._keys is not None

    @property
    def is_degraded(self) -> bool:
        """Whether what is added is not sure to be written, or not soon."""
        return self.failure is not None or self._is_gone or self._takes() > LATE

    def _takes(self) -> float:
        """Seconds since the commit under way began."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    async def mint_written(self) -> bool:
        """Wait for what was added, but not long; whether it is in the file."""
        return not self.is_degraded and await self._written(LATE)

    async def end_written(self) -> bool:
        """Wait longer, because that is what was asked for; whether it is on the disk."""
        return self._takes() <= END_WAIT and await self._written(END_WAIT)

    async def _written(self, timeout: float) -> bool:
        done: asyncio.Future[bool] = self._loop.create_future()
        self._waiting.append(done)
        self._urgent.set()
        self._awake.set()
        late = self._loop.call_later(timeout, partial(_settle, [done], written=False))
        try:
            return await done
        finally:
            late.cancel()

    def close(self) -> bool:
        """Write what is left and close the file; False if it takes longer than CLOSING.

        Blocks: for another thread.
        """
        self._stop.set()
        self._urgent.set()
        self._awake.set()
        self._thread.join(CLOSING)
        return not self._thread.is_alive()

    def _run(self) -> None:
        more = False
        while not self._stop.is_set():
            self._awake.wait(0 if more else ROUND)
            self._awake.clear()
            if self._pending and not self._waiting:
                self._urgent.wait(GATHER)
            self._urgent.clear()
            more = self._do_round()
            if self.failure is not None:
                self._stop.wait(RETRY)
        _ = self._do_round()
        with contextlib.suppress(StateFileFailed):
            self._file.checkpoint()
        self._file.close()

    def _do_round(self) -> bool:
        """Write what there is, and keep house now and then; whether there is more to do.

        Who waits is told after `failure` says how it went: they look at it next.
        """
        # first: what was added before them is there by now
        waiting = _taken(self._waiting, len(self._waiting))
        committed = self._succeeds(self._commit)
        self._tell(waiting, written=committed and not self._is_gone)
        if committed and self._succeeds(self._do_rounds):
            return self._has_more
        return bool(self._pending or self._keys)

    def _succeeds(self, step: Callable[[], None]) -> bool:
        """Take a step; what keeps it from its end is counted, and makes the writer degraded."""
        try:
            step()
        except StateFileFailed as failed:
            self.failures[failed.kind] += 1
            self.failure, self._defects = failed, 0
        except Exception:  # a defect: without the thread nothing would be written any more
            self.failures[FileError.OTHER] += 1
            self.failure = StateFileFailed(FileError.OTHER, "a defect, see the log")
            self._defects += 1
            log.exception("broker.defect")
        else:
            return True
        finally:
            self._began = None
        return False

    def _commit(self) -> None:
        self._began = time.monotonic()
        self._write_keys()
        if self.failure is not None:
            self._write_pending(PROBE)
        self._write_pending(None)

    def _write_keys(self) -> None:
        keys = self._keys
        if keys is None:
            return
        self._file.use_keys(keys)
        with self._lock:
            if self._keys is keys:  # or others came meanwhile
                self._keys = None

    def _write_pending(self, most: int | None) -> None:
        """Commit what is pending, the first `most` of it; it is pending again if that fails.

        After two defects in a row it is given up: one record must not keep all others out for ever.
        """
        self._in_hand = min(len(self._pending), most or len(self._pending))  # never counted short
        records = _taken(self._pending, self._in_hand)
        if not records:
            return
        try:
            self._write(records)
        except BaseException:
            if self._defects < MOST_DEFECTS:
                self._pending.extendleft(reversed(records))
            else:
                self.lost += len(records)
                self._ends_done += sum(record.kind is ENDS for record in records)
                self.gave_up = True
            raise
        finally:
            self._in_hand = 0
        self.failure, self._defects = None, 0

    def _write(self, records: Sequence[Record]) -> None:
        """Commit records, in rows of one kind."""
        moment, place = self._moment(), self._ledger.next_place
        rows: list[tuple[int, int, bytes]] = []
        notes: list[tuple[Kind, Row]] = []
        whole = False
        for kind, part in _parts(records):
            sealed, life = seal(self._box, place, kind, moment, part)
            rows.append((place, kind.number, sealed))
            notes.append((kind, Row(place, moment.mono + life, len(part))))
            place += 1
            if kind is BUCKETS:
                whole |= any(isinstance(record, BucketsSpent) and record.whole for record in part)
        instead = self._ledger.places_of(BUCKETS) if whole else []
        ends = sum(row.count for kind, row in notes if kind is ENDS)
        self._file.append(rows, full=bool(ends), instead=instead)
        self._ends_done += ends
        if whole:
            self._ledger.forget(BUCKETS)
        for kind, row in notes:
            self._ledger.note(kind.number, row)
        self._is_dirty = True
        if ends:  # into the file, where damage is found: a damaged log is cut off without a word
            self._checkpoint_at = 0.0

    def _do_rounds(self) -> None:
        """Give back what is over; once in a while put everything onto the disk."""
        self._has_more, now = False, time.monotonic()
        if now < self._round_at:
            return
        if self._is_gone or not self._file.is_in_place():
            self._is_gone, self._round_at = True, now + ROUND
            raise StateFileFailed(FileError.OTHER, "it was taken away: restart the broker")
        due = self._ledger.due(self._moment().mono, DROPPED_AT_ONCE)
        if due:
            self._file.drop([place for _, place in due])
            self._ledger.dropped(due)
            self._is_dirty = True
        unused = self._file.shrink(FREED_AT_ONCE)
        more = unused > FREED_AT_ONCE or len(due) == DROPPED_AT_ONCE
        self._is_dirty = self._is_dirty or unused > 0
        if self._is_dirty and now >= self._checkpoint_at:
            self._file.checkpoint()
            self._is_dirty, self._checkpoint_at = False, now + CHECKPOINT
        self.size, self.failure = self._file.size(), None
        self._has_more = more
        if not more:
            self._round_at = now + ROUND

    def _tell(self, waiting: Sequence["asyncio.Future[bool]"], *, written: bool) -> None:
        if not waiting:
            return
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            self._loop.call_soon_threadsafe(partial(_settle, waiting, written=written))

    @override
    def __repr__(self) -> str:
        return f"Writer(pending={len(self._pending)}, degraded={self.is_degraded})"


def _taken(queue: "deque[_T]", count: int) -> list[_T]:
    """Take so many, which are there; the other thread may append meanwhile."""
    return [queue.popleft() for _ in range(count)]


def _parts(records: Sequence[Record]) -> Iterator[tuple[Kind, Sequence[Record]]]:
    """Cut into rows, also where the kind changes: each kind has a bound of its own."""
    for kind, run in groupby(records, attrgetter("kind")):
        while part := list(islice(run, IN_ROW[kind])):
            yield kind, part


def _settle(waiting: Sequence["asyncio.Future[bool]"], *, written: bool) -> None:
    for done in waiting:
        if not done.done():
            done.set_result(written)
