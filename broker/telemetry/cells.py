"""The numbers that are counted: cells in a row, one row for each process that counts.

Each process writes its own row only, so nothing is locked, and whoever is asked for the sum reads
all rows.  A process by itself keeps its row in a list; workers and their supervisor keep theirs
side by side in shared memory, where a row outlives the process that wrote it: what a killed worker
had counted stays counted, to the last request, and its replacement counts on.

A `MetricLayout` hands out the cells of one row in the order in which it is asked, so processes that
ask in the same order agree on the meaning of every cell.  Which that is, `metrics` decides; this
file knows no names but those it is told.

Theory of operation.  A cell is a float64: whole numbers are exact up to 2^53.  Cells are aligned,
and eight aligned bytes are written and read at once, so a reader never sees half a number.  It may
see one cell of a histogram already counted and the next not yet, which the next scrape puts right.
"""

import mmap
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from itertools import product
from typing import Protocol, Self, TypeVar

from msgspec import Struct
from msgspec.structs import replace

CELL = 8
"""Bytes of a cell."""

_T = TypeVar("_T")


class Row(Protocol):
    """One row: a list, or a view of shared memory."""

    def __getitem__(self, index: int, /) -> float: ...

    def __setitem__(self, index: int, value: float, /) -> None: ...

    def __len__(self) -> int: ...


class Counter:
    """A number that only grows: `counter += 1`, or `inc()` where it is somebody else's attribute.

    Without a cell it counts by itself, for parts that are used without metrics.
    """

    __slots__ = ("_cells", "_index")

    def __init__(self, cells: Row | None = None, index: int = 0) -> None:
        self._cells = [0.0] if cells is None else cells
        self._index = index

    def __iadd__(self, amount: float) -> Self:
        self._cells[self._index] += amount
        return self

    def inc(self) -> None:
        """Count one more."""
        self._cells[self._index] += 1

    @property
    def value(self) -> float:
        """How much was counted in this row."""
        return self._cells[self._index]


class Gauge:
    """A number that is set."""

    __slots__ = ("_cells", "_index")

    def __init__(self, cells: Row, index: int) -> None:
        self._cells = cells
        self._index = index

    def set(self, value: float) -> None:
        """Replace the number."""
        self._cells[self._index] = value

    @property
    def value(self) -> float:
        """What was set in this row."""
        return self._cells[self._index]

    def of(self, row: Row) -> "Gauge":
        """Return the same gauge of another process."""
        return Gauge(row, self._index)


class Histogram:
    """Counts values by size: a cell for each bound, one for what is above, one for the sum."""

    __slots__ = ("_bounds", "_cells", "_first", "_sum")

    def __init__(self, cells: Row, index: int, bounds: Sequence[float]) -> None:
        self._cells = cells
        self._first = index
        self._bounds = bounds
        self._sum = index + len(bounds) + 1

    def observe(self, value: float) -> None:
        """Count one value: it costs a fifth of a microsecond, so requests can afford it."""
        cells = self._cells
        cells[self._first + bisect_left(self._bounds, value)] += 1
        cells[self._sum] += value


class Kind(Enum):
    """How the rows of a family become one number, and what is shown."""

    COUNTER = "counter"
    HISTOGRAM = "histogram"
    COUNT = "count"
    """A counter of its own that shows how many values a histogram has."""
    TOTAL = "total"
    """A gauge: the sum over all processes."""
    MAXIMUM = "maximum"
    """A gauge: what the worst or fullest process says."""
    PRIVATE = "private"
    """A gauge that is never shown: what processes tell each other."""


class Family(Struct, frozen=True):
    """One metric: where its series are, by the values of its labels."""

    kind: Kind
    name: str
    text: str
    labels: tuple[str, ...]
    series: dict[tuple[str, ...], int]
    bounds: tuple[float, ...] = ()
    shown: bool = True


class MetricLayout:
    """Hands out the cells of one row, each once, and keeps what they mean.

    Without `cells` the row is a list that grows as it is asked.  Without `shown`, cells are handed
    out all the same (every process has the same layout) and their family stays hidden.
    """

    def __init__(self, cells: Row | None = None) -> None:
        self._grown: list[float] = []
        self.cells: Row = self._grown if cells is None else cells
        self.families: list[Family] = []
        self.width = 0

    def counters(
        self, name: str, text: str, *, shown: bool = True, **labels: Iterable[str]
    ) -> dict[tuple[str, ...], Counter]:
        """Return a counter for every combination of label values."""
        return self._each(Kind.COUNTER, name, text, labels, Counter, shown=shown)

    def totals(
        self, name: str, text: str, *, shown: bool = True, **labels: Iterable[str]
    ) -> dict[tuple[str, ...], Gauge]:
        """Return gauges that are added up over all processes."""
        return self._each(Kind.TOTAL, name, text, labels, Gauge, shown=shown)

    def maxima(
        self, name: str, text: str, *, shown: bool = True, **labels: Iterable[str]
    ) -> dict[tuple[str, ...], Gauge]:
        """Return gauges of which the greatest of all processes is shown."""
        return self._each(Kind.MAXIMUM, name, text, labels, Gauge, shown=shown)

    def private(self, name: str) -> Gauge:
        """Return a gauge that no scrape shows."""
        return self._each(Kind.PRIVATE, name, "", {}, Gauge, shown=False)[()]

    def histograms(
        self,
        name: str,
        text: str,
        bounds: tuple[float, ...],
        *,
        shown: bool = True,
        **labels: Iterable[str],
    ) -> dict[tuple[str, ...], Histogram]:
        """Return a histogram for every combination of label values."""

        def make(cells: Row, index: int) -> Histogram:
            return Histogram(cells, index, bounds)

        return self._each(Kind.HISTOGRAM, name, text, labels, make, bounds, shown=shown)

    def count(self, name: str, text: str, *, of: str) -> None:
        """Show how many values the histogram of this name has, as a counter too."""
        counted = next(family for family in self.families if family.name == of)
        self.families.append(replace(counted, kind=Kind.COUNT, name=name, text=text))

    def drop_gauges(self, cells: Row) -> None:
        """Forget what a process that is gone said about itself; what it counted stays."""
        for family in self.families:
            if family.kind in (Kind.TOTAL, Kind.MAXIMUM, Kind.PRIVATE):
                for index in family.series.values():
                    cells[index] = 0.0

    def _each(
        self,
        kind: Kind,
        name: str,
        text: str,
        labels: dict[str, Iterable[str]],
        make: Callable[[Row, int], _T],
        bounds: tuple[float, ...] = (),
        *,
        shown: bool,
    ) -> dict[tuple[str, ...], _T]:
        size = len(bounds) + 2 if kind is Kind.HISTOGRAM else 1
        series = {values: self._take(size) for values in product(*labels.values())}
        self.families.append(Family(kind, name, text, tuple(labels), series, bounds, shown))
        return {values: make(self.cells, index) for values, index in series.items()}

    def _take(self, size: int) -> int:
        first = self.width
        self.width += size
        if self.cells is self._grown:
            self._grown += [0.0] * size
        return first


class SharedCells:
    """All rows.  `rows[0]` is the supervisor's, or that of the only process."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def total(self, index: int) -> float:
        """Add up one cell over all rows."""
        return sum(row[index] for row in self.rows)

    def maximum(self, index: int) -> float:
        """Return the greatest value of one cell."""
        return max(row[index] for row in self.rows)


def share(rows: int, width: int) -> int:
    """Make shared memory for rows of `width` cells, all 0; returns its file descriptor.

    It has no name, and is gone with the last process that has it.
    """
    handle = os.memfd_create("embed-token-broker")
    os.ftruncate(handle, rows * width * CELL)
    return handle


def shared(handle: int, width: int) -> SharedCells:
    """Look at shared memory as rows of `width` cells."""
    memory = mmap.mmap(handle, 0)
    cells = memoryview(memory).cast("d")
    return SharedCells([cells[first : first + width] for first in range(0, len(cells), width)])
