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


_TRACE = re.compile(
    rb"\r\n(?i:traceparent): ([0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})(?=\r\n)"
)

_PLACE = b"\0"
"""Stands for a trace in what is compared; in a head that is one it cannot be."""


def split(head: bytes) -> tuple[bytes, str]:
    """Return what of a head is compared, and its trace, empty if it has none that is left out."""
    found = _TRACE.search(head)
    if found is None:
        return head, ""
    start, end = found.span(1)
    return head[:start] + _PLACE + head[end:], found[1].decode()


class KnownHead(Struct, frozen=True):
    """One head: what aiohttp and a handler have read of it, and how long its body is."""

    message: RawRequestMessage
    handler: LaneHandler
    length: int
    given_id: str
    facts: object


class KnownHeads(Generations[bytes, KnownHead]):
    """Heads by their bytes."""

    def __init__(self) -> None:
        self._once: set[int] = set()
        super().__init__(MAX_KNOWN)

    @override
    def clear(self) -> None:
        super().clear()
        self._once.clear()

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
        """Keep what was read of a head, unless it has to be read each time."""
        if len(head) <= LONGEST and not any(map(_is_telling, known.message.headers.items())):
            self._once.discard(hash(head))
            self[head] = known


def _is_telling(field: tuple[str, str]) -> bool:
    name, value = field[0].lower(), field[1].lower()
    return name in _TELLING and (name, value) != ("connection", "keep-alive")
