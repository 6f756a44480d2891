"""Parts of commands that come often, in the protocol's form (RESP) once."""

from collections.abc import Sequence
from typing import Self, overload

from typing_extensions import override


class Packed(bytes):
    """Some parts of a command in the protocol's form; `parts` is how many."""

    parts: int

    @classmethod
    def of(cls, *parts: bytes) -> Self:
        """Pack these parts."""
        packed = cls(b"".join([b"$%d\r\n%b\r\n" % (len(p), p) for p in parts]))
        packed.parts = len(parts)
        return packed


class Keys(Sequence[bytes]):
    """The keys of a script that is called often with them; `packed` are their number and they."""

    __slots__ = ("_keys", "packed")

    def __init__(self, *keys: bytes) -> None:
        self._keys = keys
        self.packed = Packed.of(b"%d" % len(keys), *keys)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[bytes, ...]: ...

    @override
    def __getitem__(self, index: int | slice) -> bytes | tuple[bytes, ...]:
        return self._keys[index]

    @override
    def __len__(self) -> int:
        return len(self._keys)
