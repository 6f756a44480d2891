"""Which buckets a crash must not refill: those more than half spent, told to the file in rounds.

Each round tells those that decided since the last.  When much more was told than is still true, the
next round tells all that is, in place of everything before: so the file holds a bucket a few times,
however long somebody leans on it.
"""

from collections.abc import Mapping

from broker.limits.buckets import BucketTable
from broker.model import LimitName
from broker.sqlite.records import BucketsSpent

MOST = 100_000
"""Buckets of a limit that are told; a flood of more strangers than this is mostly of those who
never come back, and a restart forgives them the half of a burst."""

SLACK = 1_000
"""Buckets that may be told in vain before all are told anew."""

IN_RECORD = 10_000
"""Buckets of a record: a millisecond of the interpreter's time."""


class SpentBuckets:
    """Remembers what was told, until it is full again."""

    def __init__(self, tables: Mapping[LimitName, BucketTable]) -> None:
        self._tables = tables
        self._full_at: dict[LimitName, dict[str, int]] = {name: {} for name in tables}
        self._told = 0

    def adopt(self, name: LimitName, waits: Mapping[str, int], now: int) -> None:
        """Take note of what an earlier process told: microseconds until full, by key."""
        self._full_at[name].update((key, now + wait) for key, wait in waits.items() if wait > 0)
        self._told += len(waits)

    def round(self, now: int) -> list[BucketsSpent]:
        """Return what is to be written at this monotonic microsecond."""
        changed = {name: self._changed(name, table, now) for name, table in self._tables.items()}
        self._told += sum(map(len, changed.values()))
        if self._told <= 2 * sum(map(len, self._full_at.values())) + SLACK:
            return _records(changed, whole=False)
        for known in self._full_at.values():
            for key in [key for key, full_at in known.items() if full_at <= now]:
                del known[key]
        left = {
            name: {key: full_at - now for key, full_at in known.items()}
            for name, known in self._full_at.items()
        }
        self._told = sum(map(len, left.values()))
        if not self._told:  # an empty one, so that what was told before is gone
            return [BucketsSpent(LimitName.FINGERPRINT.value, {}, whole=True)]
        return _records(left, whole=True)

    def _changed(self, name: LimitName, table: BucketTable, now: int) -> dict[str, int]:
        known = self._full_at[name]
        changed: dict[str, int] = {}
        for key, wait in table.take_spent(now).items():
            if key in known or len(known) < MOST:
                known[key] = now + wait
                changed[key] = wait
        return changed


def _records(waits: Mapping[LimitName, Mapping[str, int]], *, whole: bool) -> list[BucketsSpent]:
    found: list[BucketsSpent] = []
    for name, each in waits.items():
        entries = list(each.items())
        found += [
            BucketsSpent(name.value, dict(entries[start : start + IN_RECORD]), whole)
            for start in range(0, len(entries), IN_RECORD)
        ]
    return found
