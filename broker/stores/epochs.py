"""Whose tokens were ended: a number a visitor, in a fixed amount of memory.

A token belongs to the epoch in which its mint began, and is over as soon as its visitor's epoch is
another one.  Epochs are kept by hash in a fixed number of cells, so no flood of ends can push one
out and so bring a token back; the price is that ending one visitor ends, once in `CELLS` cases, a
stranger's token, who is then given a new one.
"""

from array import array

from typing_extensions import override

CELLS = 65_536
"""Half a megabyte, made when the first visitor is ended."""


class Epochs:
    """The epochs of all visitors."""

    def __init__(self) -> None:
        self._cells: array[int] | None = None

    def of(self, visitor: str) -> int:
        """Return the visitor's present epoch."""
        return 0 if self._cells is None else self._cells[hash(visitor) % CELLS]

    def holds(self, visitor: str, epoch: int) -> bool:
        """Whether what was minted in this epoch may still be handed out."""
        return epoch == self.of(visitor)

    def end(self, visitor: str) -> None:
        """Begin a new epoch."""
        if self._cells is None:
            self._cells = array("Q", bytes(8 * CELLS))
        self._cells[hash(visitor) % CELLS] += 1


class EpochsUnknown(Epochs):
    """While the store that knows them is away: what is held is believed to be good."""

    @override
    def holds(self, visitor: str, epoch: int) -> bool:
        return True
