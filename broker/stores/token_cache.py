"""Tokens held for reuse: bounded, least recently used first, gone when dead.

The collector visits none of them, however many there are: a dict of strings and numbers, and of
values without `gc`, is nothing that it tracks, and into an array it does not look.  A million of
cachetools' links would be visited one by one at every full collection.

Theory of operation.  A token has a place, a small number.  The places form a ring in the order of
use, in two arrays; place 0 is where newest and oldest meet.  When tokens die is kept in slots of a
second: each has the places whose token is over when the second is.  A place that was given up or
filled anew since is passed over then, so that nothing is searched when a token goes early; until
then it costs eight bytes a token that was ever held.
"""

import heapq
from array import array
from collections.abc import Callable, Iterator

from typing_extensions import override

from broker.model import EmbedToken
from broker.telemetry.counts import TokenCounts
from broker.units import SECOND


class TokenCache:
    """Ready answers by key, at most `maxsize`.

    `keep_until` says to which microsecond of `mono` a token is kept.  `counts` counts what left,
    without it the cache counts by itself.
    """

    def __init__(
        self,
        maxsize: int,
        keep_until: Callable[[EmbedToken], int],
        mono: Callable[[], int],
        counts: TokenCounts | None = None,
    ) -> None:
        self._maxsize = maxsize
        self._keep_until = keep_until
        self._mono = mono
        self.counts = counts or TokenCounts()
        self.clear()

    def clear(self) -> None:
        """Drop everything; nothing is counted."""
        self._place_of: dict[str, int] = {}
        self._keys: dict[int, str] = {}
        self._tokens: dict[int, EmbedToken] = {}
        self._older, self._newer = array("q", [0]), array("q", [0])
        self._ends = array("q", [0])
        self._free = array("q")
        self._due: dict[int, array[int]] = {}
        self._seconds: list[int] = []

    def find(self, key: str) -> EmbedToken | None:
        """Return what is held under this key, which is then the newest; None for what is dead."""
        place = self._place_of.get(key)
        if place is None:
            return None
        if self._mono() >= self._ends[place]:
            self._drop(key)
            self.counts.expired.inc()
            return None
        if self._older[0] != place:
            self._unlink(place)
            self._link(place)
        return self._tokens[place]

    def __setitem__(self, key: str, token: EmbedToken) -> None:
        """Hold a token, unless it is dead; the dead make room for it before the living."""
        now = self._mono()
        self.expire(now)
        ends = self._keep_until(token)
        if now >= ends:
            self.discard(key)
            return
        place = self._place_of.get(key)
        if place is None:
            place = self._take_place(key, now)
        else:
            self._unlink(place)
        self._tokens[place] = token
        self._ends[place] = ends
        self._link(place)
        self._note_end(place, ends)

    def discard(self, key: str) -> None:
        """Give a token up, if there is one; nothing is counted."""
        if key in self._place_of:
            self._drop(key)

    def expire(self, now: int) -> None:
        """Drop what is dead since the last whole second; `find` hands out none of the others."""
        while self._seconds and self._seconds[0] * SECOND <= now:
            second = heapq.heappop(self._seconds)
            for place in self._due.pop(second):
                if place in self._keys and self._ends[place] <= now:
                    self._drop(self._keys[place])
                    self.counts.expired.inc()

    def items(self) -> Iterator[tuple[str, EmbedToken]]:
        """Yield key and token of all that live; nothing may be changed meanwhile."""
        now = self._mono()
        for key, place in self._place_of.items():
            if now < self._ends[place]:
                yield key, self._tokens[place]

    def _take_place(self, key: str, now: int) -> int:
        if len(self._place_of) >= self._maxsize:
            oldest = self._newer[0]
            alive = now < self._ends[oldest]
            self._drop(self._keys[oldest])
            (self.counts.evicted if alive else self.counts.expired).inc()
        if self._free:
            place = self._free.pop()
        else:
            place = len(self._ends)
            for column in (self._older, self._newer, self._ends):
                column.append(0)
        self._place_of[key] = place
        self._keys[place] = key
        return place

    def _drop(self, key: str) -> None:
        place = self._place_of.pop(key)
        del self._keys[place], self._tokens[place]
        self._unlink(place)
        self._free.append(place)

    def _link(self, place: int) -> None:
        """Put a place at the newest end."""
        older, newer = self._older, self._newer
        last = older[0]
        older[place], newer[place] = last, 0
        newer[last] = older[0] = place

    def _unlink(self, place: int) -> None:
        older, newer = self._older[place], self._newer[place]
        self._newer[older], self._older[newer] = newer, older

    def _note_end(self, place: int, ends: int) -> None:
        second = -(-ends // SECOND)
        places = self._due.get(second)
        if places is None:
            places = self._due[second] = array("q")
            heapq.heappush(self._seconds, second)
        places.append(place)

    def __len__(self) -> int:
        return len(self._place_of)

    @override
    def __repr__(self) -> str:
        evicted = self.counts.evicted.value
        return f"TokenCache(held={len(self)}, evicted={evicted:.0f})"  # keys hold fingerprints
