"""Tables of a million entries that never stop the loop.

A dict that grows, or that is full and has many coming and going, is built anew from time to time:
at a million strings that takes 50 to 100 ms, and to free one takes as long.  In parts of some
thousand entries each part is built anew by itself, in a tenth of a millisecond, and what is given
up is freed some entries at a time.

Values must be nothing that the collector tracks (strings, bytes, numbers, structs without `gc`):
then it does not look into the parts either, however many there are.
"""

import heapq
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from typing_extensions import override

PART = 4096
"""Entries of a part, about, when its table is full: 0.1 ms to build it anew."""

SPARSE = 256
"""Bytes of a table for each of its keys from which on it is built anew: it takes 25 to 50 when
keys only come, and does not give memory back when they go."""

K = TypeVar("K", str, bytes, int)
V = TypeVar("V")


class PartedDict(Generic[K, V]):
    """A dict in `parts`, for about `most` entries; it takes more, too.

    The part of a key is `parts[hash(key) & mask]`: for those who look up once a request; `part`
    says the same.
    """

    __slots__ = ("mask", "parts")

    def __init__(self, most: int) -> None:
        count = 1 << max(most // PART, 1).bit_length() - 1
        self.parts: tuple[dict[K, V], ...] = tuple({} for _ in range(count))
        self.mask = count - 1

    def part(self, key: K) -> dict[K, V]:
        """Return the dict that this key is in, if it is anywhere."""
        return self.parts[hash(key) & self.mask]

    def get(self, key: K) -> V | None:
        """Return what is held under this key."""
        return self.parts[hash(key) & self.mask].get(key)

    def __contains__(self, key: K) -> bool:
        return key in self.parts[hash(key) & self.mask]

    def __setitem__(self, key: K, value: V) -> None:
        self.parts[hash(key) & self.mask][key] = value

    def pop(self, key: K) -> V | None:
        """Take out what is held under this key."""
        return self.parts[hash(key) & self.mask].pop(key, None)

    def items(self) -> Iterator[tuple[K, V]]:
        """Yield all; nothing may be changed meanwhile."""
        for part in self.parts:
            yield from part.items()

    def __len__(self) -> int:
        """Count: a few microseconds at a million entries."""
        return sum(map(len, self.parts))

    @override
    def __repr__(self) -> str:
        return f"PartedDict(entries={len(self)}, parts={len(self.parts)})"


class BySecond(Generic[K]):
    """Keys by the second that something happens to them, within one in the order they came.

    Who takes a key out says which second it was noted for, so nothing is searched for, and nothing
    stays of what was taken out.
    """

    def __init__(self) -> None:
        self._slots: dict[int, list[dict[K, None]]] = {}
        self._seconds: list[int] = []
        self._held = 0

    @property
    def parts(self) -> Iterator[dict[K, None]]:
        """All dicts that hold keys."""
        for slot in self._slots.values():
            yield from slot

    def add(self, key: K, second: int) -> None:
        """Note a key that is not noted."""
        slot = self._slots.get(second)
        if slot is None:
            slot = self._slots[second] = []
            heapq.heappush(self._seconds, second)
        if not slot or len(slot[-1]) >= PART:
            slot.append({})
        slot[-1][key] = None
        self._held += 1

    def remove(self, key: K, second: int) -> None:
        """Forget a key that is noted for this second."""
        slot = self._slots[second]
        for place, part in enumerate(slot):
            if key in part:
                del part[key]
                self._held -= 1
                if not part:
                    del slot[place]  # the slot stays until its second: it may be in the heap once
                elif sys.getsizeof(part) > SPARSE * (len(part) + 1):
                    slot[place] = dict(part)
                return

    def first(self) -> K | None:
        """Return the key whose second is the first."""
        slot = self._first_slot()
        return next(iter(slot[0])) if slot else None

    def has_until(self, second: int) -> bool:
        """Whether there may be a key whose second is not after this one."""
        seconds = self._seconds
        return bool(seconds) and seconds[0] <= second

    def pop_until(self, second: int) -> K | None:
        """Take out a key whose second is not after this one; None if there is no more."""
        slot = self._first_slot() if self.has_until(second) else None
        if not slot or self._seconds[0] > second:
            return None
        key, _ = slot[-1].popitem()
        self._held -= 1
        if not slot[-1]:
            slot.pop()
        return key

    def _first_slot(self) -> list[dict[K, None]] | None:
        while self._seconds:
            if slot := self._slots[self._seconds[0]]:
                return slot
            del self._slots[heapq.heappop(self._seconds)]
        return None

    def __len__(self) -> int:
        return self._held

    @override
    def __repr__(self) -> str:
        return f"BySecond(keys={len(self)}, seconds={len(self._seconds)})"


class Leftovers:
    """What was given up, and is freed a few entries at a time; `dicts` is empty when all is."""

    def __init__(self) -> None:
        self.dicts: list[dict[object, object]] = []

    def add(self, dicts: Iterable[dict[K, V]]) -> None:
        """Take over dicts that nobody uses any more."""
        self.dicts += [each for each in dicts if each]  # type: ignore[misc]  # only ever emptied

    def free(self, most: int) -> None:
        """Free so many entries."""
        while most > 0 and self.dicts:
            last = self.dicts[-1]
            some = min(most, len(last))
            for _ in range(some):
                last.popitem()
            most -= some
            if not last:
                self.dicts.pop()

    def __len__(self) -> int:
        return sum(map(len, self.dicts))

    @override
    def __repr__(self) -> str:
        return f"Leftovers(entries={len(self)})"


class Generations(Generic[K, V]):
    """What was kept lately, in two generations of a small dict: at most twice `most` values.

    What is found in the old one is of the young one again; one that is given up is freed a few
    values at a time.  Values are never None.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._young: dict[K, V] = {}
        self._old: dict[K, V] = {}
        self._leftovers = Leftovers()

    def find(self, key: K) -> V | None:
        """Return what is kept under this key."""
        value = self._young.get(key)
        if value is None and self._old and (value := self._old.get(key)) is not None:
            self[key] = value
        return value

    def discard(self, key: K) -> None:
        """Forget what is kept under this key, if it is."""
        self._young.pop(key, None)
        self._old.pop(key, None)

    def __setitem__(self, key: K, value: V) -> None:
        if self._leftovers.dicts:
            self._leftovers.free(2)
        if len(self._young) >= self._most:
            self._leftovers.add([self._old])
            self._young, self._old = {}, self._young
        self._young[key] = value

    def __len__(self) -> int:
        return len(self._young.keys() | self._old.keys())

    @override
    def __repr__(self) -> str:
        return f"Generations(entries={len(self)})"


class Recent(Generic[K, V]):
    """What `make` made of keys lately: at most `most` values, which are never None.

    `functools.lru_cache` has a link for each, which the collector visits: 10 ms at 50,000.
    """

    def __init__(self, make: Callable[[K], V], most: int) -> None:
        self._make: Callable[[K], V] = make
        self._half = max(most // 2, 1)
        self._young: PartedDict[K, V] = PartedDict(self._half)
        self._old: PartedDict[K, V] = PartedDict(1)
        self._count = 0
        self._leftovers = Leftovers()

    def __call__(self, key: K) -> V:
        """Return what is made of this key."""
        young = self._young
        part = young.parts[hash(key) & young.mask]
        value = part.get(key)
        if value is None:
            value = self._old.pop(key)
            if value is None:
                value = self._make(key)
            self._add(key, value)
        return value

    def _add(self, key: K, value: V) -> None:
        self._leftovers.free(2)
        if self._count >= self._half:
            self._leftovers.add(self._old.parts)
            self._old, self._young = self._young, PartedDict(self._half)
            self._count = 0
        self._young[key] = value
        self._count += 1

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    @override
    def __repr__(self) -> str:
        return f"Recent(entries={len(self)})"
