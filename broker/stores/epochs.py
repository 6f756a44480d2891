"""Whose tokens were ended: a number a visitor, in a fixed amount of memory.

A token belongs to the epoch in which its mint began, and is over as soon as its visitor's epoch is
another one.  Epochs are kept by hash in a fixed number of cells, so no flood of ends can push one
out and so bring a token back; the price is that ending one visitor ends, once in `CELLS` cases, a
stranger's token, who is then given a new one.
"""

from array import array
from collections.abc import Callable

from typing_extensions import override

from broker.units import SECOND

CELLS = 65_536
"""Half a megabyte, made when the first visitor is ended."""

ENDS_KNOWN = 50_000
"""Ends of a shared store that one replica knows, about 200 bytes each, and half as many at least;
the store knows all."""

ENDS_LAST = 2 * 3600 * SECOND
"""Microseconds that it knows them at least: longer than a token lives and its mint takes.  Twice as
long at most."""

LATEST_END = 2**52
"""Microseconds since 1970, in 2112: half of what a store's scripts can count to.  A later one was
written by somebody else, and would be told to every store that has forgotten it."""


class Epochs:
    """The epochs of all visitors."""

    def __init__(self) -> None:
        self._cells: array[int] | None = None

    def of(self, visitor: str) -> int:
        """Return the visitor's present epoch."""
        return 0 if self._cells is None else self._cells[hash(visitor) % CELLS]

    def holds(self, visitor: str, epoch: int) -> bool:
        """Whether what was minted in this epoch may still be handed out."""
        return epoch == (0 if self._cells is None else self._cells[hash(visitor) % CELLS])

    def end(self, visitor: str) -> None:
        """Begin a new epoch."""
        if self._cells is None:
            self._cells = array("Q", bytes(8 * CELLS))
        self._cells[hash(visitor) % CELLS] += 1


class KnownEnds(Epochs):
    """The ends that this replica has caused or heard of, of a store that knows all of them.

    Epochs are the server's here: the microsecond of the end.  What is older than a known end is
    over also while the server is away, and when it has lost its memory.  By the `name` of an
    epoch's key, which all replicas have in common.

    Two generations of a dict: fifty thousand that expire together would stop a cachetools cache,
    and with it the loop, for 23 ms, and the collector for 4 ms each time.
    """

    def __init__(self, name: Callable[[str], bytes], mono: Callable[[], int]) -> None:
        super().__init__()
        self._name = name
        self._mono = mono
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        self._turns = 0

    @override
    def of(self, visitor: str) -> int:
        if not self._young and not self._old:
            return 0
        return self._known(self._name(visitor))

    @override
    def holds(self, visitor: str, epoch: int) -> bool:
        return not (self._young or self._old) or epoch >= self.of(visitor)

    def note(self, name: bytes, epoch: int) -> None:
        """Take note of an end; of one that is no moment of ours nothing is known."""
        if epoch > LATEST_END:
            return
        epoch = max(epoch, self._known(name))
        if name not in self._young and len(self._young) >= max(ENDS_KNOWN // 2, 1):
            self._turn()
        self._young[name] = epoch

    def _known(self, name: bytes) -> int:
        if self._mono() >= self._turns:
            self._turn()
        return self._young.get(name) or self._old.get(name, 0)

    def _turn(self) -> None:
        """Forget the old generation; both, if nobody asked for as long as ends last."""
        now = self._mono()
        idle = now >= self._turns + ENDS_LAST
        self._old, self._young = {} if idle else self._young, {}
        self._turns = now + ENDS_LAST
