"""One thing that `broker doctor` examined."""

from msgspec import Struct
from typing_extensions import override


class Finding(Struct, frozen=True):
    """One examined thing; `text` has the remedy if it is not ok."""

    ok: bool
    name: str
    text: str

    @override
    def __str__(self) -> str:
        return f"{'ok     ' if self.ok else 'problem'}  {self.name}: {self.text}"
