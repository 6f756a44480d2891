"""Request heads that were read before: the same bytes mean the same again.

A backend sends the same head over and over, to the byte: its own name, its secret, the length of
bodies that are all alike.  aiohttp's parser reads each of them once, and a handler makes of it what
it can (`WholeRequest.facts`): whose secret it is, which trace it belongs to.  What comes with the
same bytes afterwards is looked up, and not read.

A trace is another one with each request, and tells nothing about the rest: the value of a
`traceparent` that is written as W3C Trace Context has it is left out of what is compared, and given
to the handler apart (`WholeRequest.trace`).

Only where that is so for certain: the parser stands between two messages (`lane_connection`), and
the head has nothing that tells how to go on reading.  Whatever differs by a byte is read.

Bounded: two generations of a dict, of heads that came twice and are no longer than most.
"""

import re

from aiohttp.http import RawRequestMessage
from msgspec import Struct
from typing_extensions import override

from broker.tables import Generations
from broker.web.whole_request import LaneHandler
from broker.wire.request import TRACEPARENT

MAX_KNOWN = 1024
"""Heads of a generation.  Backends have a few each; with the parser's own objects a head takes some
4 KiB, so both generations take 8 MiB at most."""

LONGEST = 2048
"""Bytes of a head that is kept: longer ones have cookies or tokens, and seldom come again."""

MAX_ONCE = 4096
"""Heads that came once, as a number each: more than this many new ones in between, and a head that
comes again is taken for new."""

_TELLING = frozenset(
    {
        "connection",
        "content-encoding",
        "expect",
        "origin",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that say how to go on, or who may ask: a head with one of them is read each time."""


_END = b"\r\n\r\n"
"""Ends a head.  In what is compared of one it stands for a trace: nowhere else can it be."""

_VALUE = TRACEPARENT.encode()

_TRACE = re.compile(rb"\r\n(?i:traceparent): (" + _VALUE + rb")(?=\r\n)")

_is_trace = re.compile(_VALUE).fullmatch

TRACE = 55
"""Characters of a trace."""


class Head(Struct, frozen=True, gc=False):
    """A head by what is before its trace, and behind it.

    Without one that is left out `opening` is all of it, and `at`, where the trace is, 0.  `end` is
    the length of the head as it came.
    """

    opening: bytes
    closing: bytes
    at: int
    end: int

    @property
    def compared(self) -> bytes:
        """What it is looked up by."""
        return self.opening + _END + self.closing if self.at else self.opening

    def trace_in(self, data: bytes) -> str:
        """Return the trace of this head."""
        return data[self.at : self.at + TRACE].decode() if self.at else ""


def split(data: bytes) -> Head:
    """Return the head that these bytes begin with."""
    end = data.find(_END) + len(_END)
    found = _TRACE.search(data, 0, end)
    if found is None:
        return Head(data[:end], b"", 0, end)
    at, behind = found.span(1)
    return Head(data[:at], data[behind:end], at, end)


class KnownHead(Struct, frozen=True):
    """One head: what aiohttp and a handler have read of it; `size` is its length with its body."""

    head: Head
    size: int
    message: RawRequestMessage
    handler: LaneHandler
    given_id: str
    facts: object

    @override
    def __repr__(self) -> str:
        return f"KnownHead({self.message.method}, {self.size} bytes)"


class KnownHeads(Generations[bytes, KnownHead]):
    """Heads by their bytes."""

    def __init__(self) -> None:
        self._once: set[int] = set()
        super().__init__(MAX_KNOWN)

    @override
    def clear(self) -> None:
        super().clear()
        self._once.clear()
        self._last: KnownHead | None = None  # which most requests have again
        self.is_traced = False  # and each with another trace

    def known_in(self, data: bytes) -> KnownHead | None:
        """Return what is known of the head of this request, if it is and the body is all there.

        A trace is where `KnownHead.head` says.
        """
        last = self._last
        if last is not None and last.size == len(data) and data.startswith(last.head.opening):
            at = last.head.at
            behind = at + TRACE
            if not at or (
                data.startswith(last.head.closing, behind) and _is_trace(data, at, behind)
            ):
                return last
        known = self.find(data[: data.find(_END) + len(_END)])
        if known is None:
            head = split(data)
            known = self.find(head.compared) if head.at else None
        if known is None or known.size != len(data):
            return None
        self._last, self.is_traced = known, known.head.at > 0
        return known

    def came_before(self, head: bytes) -> bool:
        """Whether a head that is not known has come before; that it came is noted."""
        number = hash(head)
        if number in self._once:
            return True
        if len(self._once) >= MAX_ONCE:
            self._once.clear()
        self._once.add(number)
        return False

    def keep(self, head: bytes, known: KnownHead) -> None:
        """Keep what was read of a head, unless it has to be read each time.

        `head` is what is compared of it.
        """
        if len(head) <= LONGEST and not any(map(_is_telling, known.message.headers.items())):
            self._once.discard(hash(head))
            self[head] = known


def _is_telling(field: tuple[str, str]) -> bool:
    name, value = field[0].lower(), field[1].lower()
    return name in _TELLING and (name, value) != ("connection", "keep-alive")
