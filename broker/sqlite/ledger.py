"""Which rows the file has, how long each is worth its place, and which must go before.

By this process' monotonic clock, so that no step of a wall clock drops what is still needed.  Rows
of a kind live about as long as each other, so the oldest goes first.
"""

from collections import deque

from msgspec import Struct

from broker.sqlite.records import BUCKETS, ENDS, MINTS, Kind


class Row(Struct, frozen=True, gc=False):
    """A row: where it is, until which monotonic microsecond it is of use, how many are in it."""

    place: int
    until: int
    count: int


class Ledger:
    """The rows, by kind; `most` bounds what mints, and what ends, may be in them."""

    def __init__(self, most_mints: int, most_ends: int) -> None:
        self._rows: dict[int, deque[Row]] = {
            kind.number: deque() for kind in (MINTS, ENDS, BUCKETS)
        }
        self._counts = dict.fromkeys(self._rows, 0)
        self._most = {MINTS.number: most_mints, ENDS.number: most_ends}
        self.next_place = 1

    def note(self, kind: int, row: Row) -> None:
        """Take note of a row that was written, or found."""
        self._rows[kind].append(row)
        self._counts[kind] += row.count
        self.next_place = max(self.next_place, row.place + 1)

    def due(self, now: int, batch: int) -> list[tuple[int, int]]:
        """Return kind and place of up to `batch` rows that are over, or too many; oldest first."""
        found: list[tuple[int, int]] = []
        for kind, rows in self._rows.items():
            beyond = self._counts[kind] - self._most.get(kind, self._counts[kind])
            for row in rows:
                if len(found) >= batch or (row.until > now and beyond <= 0):
                    break
                beyond -= row.count
                found.append((kind, row.place))
        return found

    def dropped(self, found: list[tuple[int, int]]) -> None:
        """Take note that what `due` named is gone."""
        for kind, place in found:
            row = self._rows[kind].popleft()
            assert row.place == place  # only the oldest go
            self._counts[kind] -= row.count

    def places_of(self, kind: Kind) -> list[int]:
        """Return the place of every row of this kind."""
        return [row.place for row in self._rows[kind.number]]

    def forget(self, kind: Kind) -> None:
        """Take note that all of this kind are gone."""
        self._rows[kind.number].clear()
        self._counts[kind.number] = 0

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))
