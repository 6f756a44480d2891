"""Parts of commands that come often, in the protocol's form (RESP) once.

Those of tens of thousands of visitors are held, so the collector must have nothing to visit.
"""

from collections.abc import Iterator

from msgspec import Struct


class Packed(Struct, frozen=True, gc=False):
    """Some parts of a command in the protocol's form; `parts` is how many."""

    data: bytes
    parts: int


class Keys(Struct, frozen=True, gc=False):
    """The keys of a script that is called often with them; `packed` are their number and they."""

    names: tuple[bytes, ...]
    packed: Packed

    def __getitem__(self, place: int) -> bytes:
        return self.names[place]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def pack(*parts: bytes) -> Packed:
    """Pack these parts."""
    return Packed(b"".join([b"$%d\r\n%b\r\n" % (len(p), p) for p in parts]), len(parts))


def pack_keys(*names: bytes) -> Keys:
    """Pack the names of keys."""
    return Keys(names, pack(b"%d" % len(names), *names))
