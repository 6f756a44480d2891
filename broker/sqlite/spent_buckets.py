"""Which buckets a crash must not refill: those more than half spent, told to the file in rounds.

Each round tells those that decided since the last.  When much more was told than is still true, or
the file could not be told, the round tells all that is, in place of everything before: so the file
holds a bucket a few times, however long somebody leans on it.  A round is done in steps, because a
flood spends 100,000 buckets in a second.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

from broker.limits.buckets import MOST_NOTED, BucketTable
from broker.model import LimitName
from broker.sqlite.records import BucketsSpent
from broker.tables import PartedDict
from broker.units import SECOND

MOST = MOST_NOTED
"""Buckets of a limit that are told; a flood of more strangers than this is mostly of those who
never come back, and a restart forgives them the half of a burst."""

SLACK = 1_000
"""Buckets that may be told in vain before all are told anew."""

SLICE = 500
"""Buckets of a step and of a record: half a millisecond."""

INTERVAL = SECOND
"""Microseconds between rounds: what a crash may refill."""

_OVER = object()


class SpentBuckets:
    """Remembers what was told, until it is full again; `tell` hands records to the file."""

    def __init__(
        self,
        tables: Mapping[LimitName, BucketTable],
        mono: Callable[[], int],
        tell: Callable[[Sequence[BucketsSpent]], None],
    ) -> None:
        self._tables = tables
        self._mono = mono
        self._tell = tell
        self._full_at: dict[LimitName, PartedDict[str, int]] = {
            name: PartedDict(MOST) for name in tables
        }
        self._written = 0
        self._all_due = False
        self._can_tell = True
        self._steps: Iterator[None] = iter(())
        self._next_round = mono()

    def adopt(self, name: LimitName, entries: Mapping[str, int], now: int) -> None:
        """Take note of what an earlier process told: microseconds until full, by key."""
        known = self._full_at[name]
        for key, wait in entries.items():
            if wait > 0:
                known[key] = now + wait
        self._written += len(entries)

    def step(self, *, can_tell: bool) -> bool:
        """Do some of a round, or begin one when it is time; False if that was all.

        Without `can_tell` the file takes nothing: what is noted is drained all the same, and the
        round after that tells everything.
        """
        self._can_tell = can_tell
        now = self._mono()
        if next(self._steps, _OVER) is not _OVER:
            return True
        if now < self._next_round:
            return False
        self._next_round = now + INTERVAL
        self._steps = self._round()
        return True

    def finish(self) -> None:
        """Tell what is left, at the end of the process."""
        self._can_tell = True
        for _ in self._steps:
            pass
        for _ in self._round():
            pass

    def _round(self) -> Iterator[None]:
        for name, table in self._tables.items():
            noted, known = table.take_spent(), self._full_at[name]
            if len(known) + len(noted) > MOST:  # those that are full again make room for others
                for _ in self._slices(known):
                    yield
            while noted:
                self._tell_some(name, noted)
                yield
        told = sum(map(len, self._full_at.values()))
        if self._can_tell and (self._all_due or self._written > 2 * told + SLACK):
            yield from self._tell_all()

    def _tell_some(self, name: LimitName, noted: dict[str, None]) -> None:
        table, known, now = self._tables[name], self._full_at[name], self._mono()
        room = MOST - len(known)
        changed: dict[str, int] = {}
        for _ in range(min(SLICE, len(noted))):
            key, _ = noted.popitem()
            wait = table.owed(key, now)
            if wait <= 0:
                continue
            if key not in known:
                if room <= 0:
                    continue
                room -= 1
            known[key] = changed[key] = now + wait
        if not self._can_tell:
            self._all_due = True
        elif changed:
            self._written += len(changed)
            self._tell([BucketsSpent(name.value, changed)])

    def _tell_all(self) -> Iterator[None]:
        records: list[BucketsSpent] = []
        for name, known in self._full_at.items():
            for some in self._slices(known):
                if some:
                    records.append(BucketsSpent(name.value, some, whole=True))
                yield
        self._all_due = not self._can_tell
        if self._can_tell:  # an empty one, so that what was told before is gone
            self._written = sum(len(record.full_at) for record in records)
            self._tell(records or [BucketsSpent(LimitName.FINGERPRINT.value, {}, whole=True)])

    def _slices(self, known: PartedDict[str, int]) -> Iterator[dict[str, int]]:
        """Yield what is not full yet, and forget what is, a slice at a time."""
        for part in known.parts:
            entries = iter(list(part.items()))
            while some := list(islice(entries, SLICE)):
                now = self._mono()
                for key, full_at in some:
                    if full_at <= now:
                        del part[key]
                yield {key: full_at for key, full_at in some if full_at > now}
