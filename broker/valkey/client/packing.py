"""Parts of commands that come often, in the protocol's form (RESP) once."""

from msgspec import Struct


class Packed(Struct, frozen=True, gc=False):
    """Some parts of a command in the protocol's form; `parts` is how many."""

    data: bytes
    parts: int


def pack(*parts: bytes) -> Packed:
    """Pack these parts."""
    return Packed(b"".join([b"$%d\r\n%b\r\n" % (len(p), p) for p in parts]), len(parts))
