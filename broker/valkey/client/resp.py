"""Reads the server's replies from its bytes (RESP2), within bounds.

The broker never asks for another version of the protocol, so every other type (pushes, maps, sets,
attributes, doubles) is a fault.  The client library's parser (hiredis) is not used: it takes all of
them, fails in its own ways where a map has a list for a key, and makes room for as many elements as
an array claims to have.  A proxy, or whoever sits between, can say anything; here that costs a
connection, never memory: what is held is what was sent, and at most `LONGEST_REPLY` of it.

Numbers, as nearly every visit is answered, are read in one step where nothing else has arrived.  Of
arrays hiredis would read one of five elements in 0.5 us where this takes 6, and take 16 GB for one
that claims to have two thousand million.

A reader that has raised is of no use any more.  It knows nothing of who asked for what.
"""

from collections.abc import Sequence
from typing import Any, Literal

from broker.valkey.client.errors import Reason, StoreFailed, error_of

LONGEST_REPLY = 2**20
"""Bytes of a reply, far above any of ours: a page of 1000 sessions has 100 000, a list of 1000
members as many, a token or a session less."""

LONGEST_LINE = 8192
"""Bytes of a line: a number or an error.  Errors say what failed and quote no script."""

MOST_ELEMENTS = LONGEST_REPLY // 4
"""Elements of an array: the shortest has four bytes, `:1` and the end of its line."""

DEEPEST = 8
"""Arrays within arrays; of what is asked for, CLUSTER SLOTS has most: four."""

Reply = int | bytes | list["Reply"] | None
"""What the server answers."""

_END = b"\r\n"
_NEXT_NUMBER = b"\r\n:"
_ARRAY, _ERROR, _NUMBER, _STATUS, _TEXT = b"*-:+$"
_NOTHING = b"-1"
_EMPTY = (_NOTHING, b"0")
_DIGITS = 20
"""Of a number of 64 bits, its sign included."""

_OF_NUMBERS = b"0123456789-:\r\n"
"""What replies that are numbers are made of."""


class Reader:
    """What one connection has brought, and how far that is read."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._data = b""
        self._at = 0
        self._held = 0
        self._wanted = 1
        self._before = 0
        self._begun: list[tuple[list[Reply], int]] = []

    @property
    def is_amid(self) -> bool:
        """Whether a reply has begun and not ended."""
        return bool(self._held or self._begun)

    def numbers(self, data: bytes) -> list[int] | None:
        """Return the replies that have arrived, if all are whole, and numbers.

        None, and nothing is taken in, if they are not: then they are for `feed`.
        """
        if self._held or self._begun or not (data.startswith(b":") and data.endswith(_END)):
            return None
        lines = data[1:-2].split(_NEXT_NUMBER)
        try:
            if (
                data.count(b"\r") == data.count(b"\n") == len(lines)
                and max(map(len, lines)) <= _DIGITS
                and not data.translate(None, _OF_NUMBERS)  # else `int` would take 1_0, too
            ):
                return [*map(int, lines)]
        except ValueError:
            pass
        return None

    def feed(self, data: bytes) -> None:
        """Take in what has arrived; `take` until it says False."""
        self._pieces.append(data)
        self._held += len(data)

    def take(self) -> Reply | Exception | Literal[False]:
        """Return the next reply, an error as what it means; False if there is no whole one.

        Raises StoreFailed for what is no reply, or larger than any.
        """
        if self._held < self._wanted:
            return False
        if self._pieces:
            self._data = b"".join((self._data[self._at :], *self._pieces))
            self._pieces, self._at = [], 0
        try:
            return self._read()
        except ValueError:
            raise StoreFailed(Reason.OTHER, "not RESP2") from None

    def _read(self) -> Reply | Exception | Literal[False]:
        """Read as `take`; raises ValueError."""
        data, begun, first = self._data, self._begun, self._at
        at, wanted = first, 0
        while (end := data.find(_END, at)) >= 0:
            kind, line, stop = data[at], data[at + 1 : end], end
            value: Any  # a reply, or an error that stands alone
            if kind == _TEXT and line != _NOTHING:
                stop = end + 2 + _count(line, LONGEST_REPLY)
                if stop + 2 > len(data):
                    wanted = stop + 2 - at
                    break
                value = _text(data, end + 2, stop)
            elif kind == _ARRAY and line not in _EMPTY:
                self._begin(line)
                at = end + 2
                continue
            else:
                value = _plain(kind, line, begun)
            at = stop + 2
            while begun:
                array, count = begun[-1]
                array.append(value)
                if len(array) < count:
                    break
                value = begun.pop()[0]
            else:
                self._at, self._before = at, 0
                whole: Reply | Exception = value
                return whole
        self._wait(at, at - first, wanted)
        return False

    def _begin(self, line: bytes) -> None:
        if len(self._begun) == DEEPEST:
            raise ValueError("too deep")
        self._begun.append(([], _count(line, MOST_ELEMENTS)))

    def _wait(self, at: int, read: int, wanted: int) -> None:
        """Note what is read, and how many bytes the next element has; 0: its line has no end."""
        self._at, self._held = at, len(self._data) - at
        self._before += read
        self._wanted = wanted or self._held + 1
        if self._before + self._wanted > LONGEST_REPLY or (
            not wanted and self._held > LONGEST_LINE
        ):
            raise ValueError("too long")


def _integer(line: bytes) -> int:
    """Read a number; raises ValueError, also for what only Python takes for one (`1_0`, ` 1`)."""
    if len(line) > _DIGITS or not line.removeprefix(b"-").isdigit():
        raise ValueError("no number")
    return int(line)


def _count(line: bytes, most: int) -> int:
    """Read a length; raises ValueError."""
    if not 0 <= (count := _integer(line)) <= most:
        raise ValueError("no length")
    return count


def _text(data: bytes, start: int, stop: int) -> bytes:
    if not data.startswith(_END, stop):
        raise ValueError("longer than it says")
    return data[start:stop]


def _plain(kind: int, line: bytes, begun: Sequence[object]) -> Reply | Exception:
    """Read what is one line; raises ValueError, also for an error within an array."""
    if kind == _NUMBER:
        return _integer(line)
    if kind == _STATUS:
        return line
    if kind == _ERROR and not begun:
        return error_of(line.decode("utf-8", "replace"))
    if kind in (_TEXT, _ARRAY):
        return [] if line == b"0" else None
    raise ValueError("another type")
