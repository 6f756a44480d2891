"""All buckets of one limit, in bounded memory.

Two generations of a dict, in parts (`broker.tables`).  New and touched buckets live in the young
one; every `horizon` (the longest time any of them takes to fill) the young one becomes the old one
and the old one is given up.  By then each bucket in it is full again, and a full bucket equals an
absent one: so forgetting never resets a limit that is exhausted.

At `max_tracked` *new* keys share a fixed number of overflow buckets, by hash: strangers may
then be refused for each other's sake, but nobody escapes, and who is tracked stays tracked.
A key that is tracked when there is room again starts from what its overflow bucket says: it may
have spent there.

An entry is one integer under one string: objects with a lock and a timestamp each (aiolimiter's
AsyncLimiter among them) cost five to ten times the memory and time, and wait where an inbound
limit must answer.
"""

from typing_extensions import override

from broker.rules.bucket import Limit, Verdict, peek, spend, verdict_from_wait
from broker.tables import Leftovers, PartedDict
from broker.telemetry.counts import BucketCounts

OVERFLOW_BUCKETS = 4096
"""Enough to keep strangers apart under a flood, few enough (128 KiB) to exist for every limit."""

SWEEP_BATCH = 2
"""Entries of a given-up generation that one new key frees: freeing as fast as filling keeps what
waits bounded."""

MOST_NOTED = 100_000
"""Spent buckets that are noted between two rounds that write them down."""

NOTHING_YET = verdict_from_wait(0, Limit(burst=1, interval=1), allowed=True)
"""Of no limit that anybody has."""

SLICE = 2_000
"""What housekeeping frees before others get their turn: half a millisecond."""


class BucketTable:
    """The buckets of one limit, by key.  Times are microseconds of one clock.

    `counts` counts decisions; without it the bucket counts by itself.  Refusals are counted where
    they are answered: joiners of a refused mint are refused with it.
    """

    def __init__(
        self, max_tracked: int, horizon: int, now: int, counts: BucketCounts | None = None
    ) -> None:
        self._young: PartedDict[str, int] = PartedDict(max_tracked)
        self._old: PartedDict[str, int] = PartedDict(1)
        self._tracked = 0
        self._swept = Leftovers()
        self._overflow = [0] * OVERFLOW_BUCKETS
        self._is_shared = False  # whether anything was ever put into an overflow bucket
        self._max_tracked = max_tracked
        self._horizon = horizon
        self._deepest = horizon
        self._rotate_at = now + horizon
        self.counts = counts or BucketCounts()
        self._first = NOTHING_YET  # what a full bucket of one limit says is the same each time
        self._spent: dict[str, None] | None = None  # no set: the collector looks into those

    def take(self, key: str, limit: Limit, now: int, *, dry_run: bool = False) -> Verdict:
        """Spend one token of `key`; a refusal charges nothing.

        With `dry_run` a refusal is counted apart and the request goes on: the verdict still says
        what would have been.
        """
        if now >= self._rotate_at:
            self._rotate(now)
        young, mark = self._young, hash(key)
        part = young.parts[mark & young.mask]
        full_at = part.get(key)
        if full_at is None:
            full_at = self._enter(key, mark)
        if full_at is None:
            verdict = self._take_overflow(key, limit, now)
        elif full_at > now:
            part[key], verdict = spend(full_at, limit, now)
        else:
            part[key] = now + limit.interval
            verdict = self._first
            if verdict.limit is not limit:
                _, verdict = spend(now, limit, now)
                self._first = verdict
        if verdict.remaining * 2 < limit.burst:  # most have more, and nobody has to know
            self.counts.note(verdict, dry_run=dry_run)
            if self._spent is not None:
                self._note_spent(key, self._spent)
        return verdict

    def _note_spent(self, key: str, spent: dict[str, None]) -> None:
        """Note a bucket of its own: an overflow bucket is nobody's, and is not written."""
        if key in self._young and len(spent) < MOST_NOTED:
            spent[key] = None

    def peek(self, key: str, limit: Limit, now: int) -> Verdict:
        """Say what `take` would say, and take nothing."""
        full_at = self._young.get(key) or self._old.get(key)
        if full_at is None:
            full_at = self._overflow[hash(key) % OVERFLOW_BUCKETS]
        return peek(full_at, limit, now)

    def owed(self, key: str, now: int) -> int:
        """Microseconds until this bucket is full, as far as it is known here."""
        full_at = self._young.get(key) or self._old.get(key) or 0
        return max(full_at - now, 0)

    def _enter(self, key: str, mark: int) -> int | None:
        """Return when the bucket is full of a key (`mark`, its hash) that is not in the young ones.

        It is tracked from now on; None if there is no room for it.
        """
        old = self._old
        full_at = old.parts[mark & old.mask].pop(key, None)
        if full_at is None:
            if self._swept.dicts:
                self._swept.free(SWEEP_BATCH)
            if self._is_full():
                return None
            self._tracked += 1
            full_at = self._overflow[mark % OVERFLOW_BUCKETS] if self._is_shared else 0
        return full_at

    def _take_overflow(self, key: str, limit: Limit, now: int) -> Verdict:
        self.counts.overflowed.inc()
        self._is_shared = True
        place = hash(key) % OVERFLOW_BUCKETS
        before = self._overflow[place]
        full_at, verdict = spend(before, limit, now)
        # `spend` cuts to its own limit's depth; a deeper one may have been exhausted here
        self._overflow[place] = max(full_at, min(before, now + self._deepest))
        return verdict

    def _is_full(self) -> bool:
        return self._tracked >= self._max_tracked

    def _rotate(self, now: int) -> None:
        """Give up what has not been touched for a whole horizon."""
        idle = now - self._rotate_at >= self._horizon
        self._swept.add(self._old.parts)
        if idle:
            self._swept.add(self._young.parts)
        self._old = PartedDict(1) if idle else self._young
        self._young = PartedDict(self._max_tracked)
        self._tracked = len(self._old)
        self._rotate_at = now + self._horizon

    def purge_expired(self, now: int) -> bool:
        """Give some memory back while nobody asks; False if there is no more to give."""
        if now >= self._rotate_at:
            self._rotate(now)
        self._swept.free(SLICE)
        return bool(self._swept)

    def adjust(self, horizon: int, max_tracked: int) -> None:
        """Follow changed limits.

        The horizon only grows: a shorter one would give up buckets that the old limit had exhausted
        for longer.  The next rotation stays where it is: what it gives up was spent under the old
        horizon, and reloads that follow each other must not put it off for ever.
        """
        self._horizon = max(self._horizon, horizon)
        self._deepest = horizon
        self._max_tracked = max_tracked

    def take_spent(self) -> dict[str, None]:
        """Return the keys that were left more than half spent, which is the caller's from now on.

        Of those that decided since the last call and have a bucket of their own, `MOST_NOTED` at
        most; the first call begins to note them, for what outlives the process.
        """
        noted, self._spent = self._spent or {}, {}
        return noted

    def restore(self, entries: dict[str, int], now: int) -> None:
        """Take over microseconds until full, as an earlier process told them.

        What finds no room goes into the overflow buckets.
        """
        for key, wait in entries.items():
            full_at = now + min(wait, self._horizon)
            if self._is_full():
                place = hash(key) % OVERFLOW_BUCKETS
                self._overflow[place] = max(self._overflow[place], full_at)
                self._is_shared = True
            elif wait > 0:
                self._swept.free(SWEEP_BATCH)
                self._tracked += self._old.pop(key) is None and key not in self._young
                self._young[key] = full_at

    def __len__(self) -> int:
        return self._tracked

    @override
    def __repr__(self) -> str:
        return f"BucketTable(tracked={len(self)}, overflowed={self.counts.overflowed.value:.0f})"
