"""What a record on disk is worth to the process that reads it, and what a file is: pure rules.

A record says what was left at the moment when it was written.  How long ago that was, three clocks
tell: the wall clock, which may have been set; the monotonic one, which counts on from one process
to the next until the machine restarts; and the records themselves, because the last of them was
written before it is read.  The longest answer counts: a clock that was set back lengthens no life
and no refusal.  One that was set forward shortens lives, as it does in a running process.
"""

from enum import Enum

from msgspec import Struct

APPLICATION = 0x45544231
"""What a state file says of itself in its header, `application_id` of SQLite: "ETB1"."""

TABLE = "embed_token_broker_log"
"""The table of records; its name stands in the first page, too."""

HEAD = 4096
"""Bytes of the first page."""

_MAGIC = b"SQLite format 3\x00"
_VERSIONS_AT = slice(18, 20)
_VERSIONS = b"\x01\x02"
_APPLICATION_AT = slice(68, 72)
_SURE = 2


class Moment(Struct, frozen=True, gc=False):
    """A moment by both clocks, in microseconds; `boot` names the start of the machine."""

    boot: str
    mono: int
    wall: int


def age(then: Moment, now: Moment, last: Moment) -> int:
    """Microseconds since `then`, at least; `last` is the latest moment that is on record."""
    by_wall = max(now.wall, last.wall) - then.wall
    by_mono = now.mono - then.mono if then.boot and then.boot == now.boot else 0
    return max(by_wall, by_mono, 0)


def left_of(left: int, most: int, age: int) -> int:
    """What is left now of what was left then, never more than `most`; 0 or less: nothing."""
    return min(left, most) - age


def says_who_may_write(head: bytes) -> bool:
    """Whether the header has a file format that SQLite writes; with another it would only read."""
    return all(version in _VERSIONS for version in head[_VERSIONS_AT])


class FileKind(Enum):
    """What stands where the state file is to be."""

    EMPTY = "empty"
    OURS = "ours"
    """A state file, whole or damaged."""
    FOREIGN = "foreign"
    """Something else, which is not to be touched."""


def file_kind(head: bytes) -> FileKind:
    """Tell by the first page: two of three signs are enough, so no one damage hides what it is."""
    if not head:
        return FileKind.EMPTY
    signs = (
        head.startswith(_MAGIC),
        head[_APPLICATION_AT] == APPLICATION.to_bytes(4, "big"),
        TABLE.encode() in head,
    )
    return FileKind.OURS if sum(signs) >= _SURE else FileKind.FOREIGN
