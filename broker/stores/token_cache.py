"""Tokens held for reuse: bounded, those in use kept, gone when dead.

Nothing here stops the loop, however many are held, and the collector visits none of them: see
`broker.tables`.  cachetools' time-aware cache would build its heap anew (50 to 670 ms at a
million), drop everything that expires together at once, and have its links visited at every full
collection.

Theory of operation.  When a token dies is known when it comes: the keys of those that die within
one second stand in the slot of that second, and housekeeping takes the slots that are over, some
keys at a time.  A key whose token goes early, or is renewed, leaves its slot with it: what is noted
never outnumbers what is held.

At the bound the dead go first.  Then one goes that was not asked for since its part was last looked
through: a part is a queue, and who comes to its front after having been used goes to its end once
more (second chance, also called clock).  It keeps what an exact order of use would keep, within a
hundredth of the hits, and a look-up costs one byte instead of six places of memory.  That byte is
found by the key's hash; two keys that share one keep each other.

A look-up asks `keep_until` only of tokens as near to their death as that has ever been (`_near`).
"""

from collections.abc import Callable, Iterable

from typing_extensions import override

from broker.model import EmbedToken
from broker.tables import BySecond, Leftovers, PartedDict
from broker.telemetry.counts import TokenCounts
from broker.units import SECOND

USED_CELLS = 1 << 20
"""Bytes that note what was used: a megabyte of virtual memory, taken page by page when written."""

SECOND_CHANCES = 64
"""Tokens in use that one newcomer passes over, at most, before one of them has to go: 30 us."""

FREED_AT_ONCE = 4
"""Dead or given-up ones that a newcomer frees: faster than they can come, in some microseconds."""

SLICE = 500
"""What housekeeping frees before others get their turn: a millisecond."""


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
        self._leftovers = Leftovers()
        self._used = bytearray(USED_CELLS)
        self._turn = 0
        self._near = 0
        self._begin()

    def _begin(self) -> None:
        self._tokens: PartedDict[str, EmbedToken] = PartedDict(self._maxsize)
        self._held = 0
        self._due: BySecond[str] = BySecond()

    def clear(self) -> None:
        """Drop everything; nothing is counted."""
        self._leftovers.add(self._tokens.parts)
        self._leftovers.add(self._due.parts)
        self._begin()

    def find(self, key: str) -> EmbedToken | None:
        """Return what is held under this key; None for what is dead."""
        return self.find_at(key, self._mono())

    def find_at(self, key: str, now: int) -> EmbedToken | None:
        """Return the same for a caller that has just read the clock."""
        mark = hash(key)
        tokens = self._tokens
        token = tokens.parts[mark & tokens.mask].get(key)
        if token is None:
            return None
        if now >= token.dies_mono - self._near and now >= self._keep_until(token):
            self._drop(key)
            self.counts.expired.inc()
            return None
        self._used[mark % USED_CELLS] = 1
        return token

    def __setitem__(self, key: str, token: EmbedToken) -> None:
        """Hold a token, unless it is dead; the dead make room for it before the living."""
        self.keep(key, token, self._mono())

    def keep(self, key: str, token: EmbedToken, now: int) -> None:
        """Do the same for a caller that has just read the clock."""
        if self._leftovers.dicts:
            self._leftovers.free(FREED_AT_ONCE)
        if self._due.has_until(now // SECOND):
            self._expire(now, FREED_AT_ONCE)
        ends = self._keep_until(token)
        if now >= ends:
            self.discard(key)
            return
        self._near = max(self._near, token.dies_mono - ends)
        mark, tokens = hash(key), self._tokens
        part = tokens.parts[mark & tokens.mask]
        old = part.get(key)
        if old is not None:
            self._used[mark % USED_CELLS] = 1
            self._due.remove(key, self._second_of(old))
        else:
            if self._held >= self._maxsize:
                self._make_room(now)
            self._held += 1
            self._used[mark % USED_CELLS] = 0
        part[key] = token
        self._due.add(key, -(-ends // SECOND))

    def restore(self, tokens: Iterable[tuple[str, EmbedToken]]) -> None:
        """Hold what another process held, at most as many as fit, in an empty cache.

        As one by one, in half the time: a start does it 200,000 times.
        """
        now, near, keep_until = self._mono(), self._near, self._keep_until
        parts, mask, note = self._tokens.parts, self._tokens.mask, self._due.add
        for key, token in tokens:
            ends = keep_until(token)
            if now < ends:
                parts[hash(key) & mask][key] = token
                note(key, -(-ends // SECOND))
                near = max(near, token.dies_mono - ends)
        self._near, self._held = near, len(self._tokens)

    def discard(self, key: str) -> None:
        """Give a token up, if there is one; nothing is counted."""
        if key in self._tokens:
            self._drop(key)

    def expire(self, now: int) -> bool:
        """Drop some of what is dead since the last whole second; False if that was all."""
        self._leftovers.free(SLICE)
        return self._expire(now, SLICE) or bool(self._leftovers)

    def _expire(self, now: int, most: int) -> bool:
        """Drop up to so many whose second is over; False if there are no more."""
        second = now // SECOND
        for _ in range(most):
            key = self._due.pop_until(second)
            if key is None:
                return False
            self._tokens.pop(key)
            self._held -= 1
            self.counts.expired.inc()
        return True

    def _make_room(self, now: int) -> None:
        """Drop one that is dead, or else one that was not used, of the next part that has any."""
        parts = self._tokens.parts
        while True:
            self._turn = (self._turn + 1) % len(parts)
            if part := parts[self._turn]:
                break
        for _ in range(SECOND_CHANCES):
            key = next(iter(part))
            cell = hash(key) % USED_CELLS
            if not self._used[cell]:
                break
            self._used[cell] = 0
            part[key] = part.pop(key)
        key = next(iter(part))
        alive = now < self._keep_until(part[key])
        self._drop(key)
        (self.counts.evicted if alive else self.counts.expired).inc()

    def _drop(self, key: str) -> None:
        token = self._tokens.pop(key)
        assert token is not None  # callers have seen it
        self._held -= 1
        self._due.remove(key, self._second_of(token))

    def _second_of(self, token: EmbedToken) -> int:
        """Return the whole second at which a token is dead: it is kept to a microsecond in it."""
        return -(-self._keep_until(token) // SECOND)

    def __len__(self) -> int:
        return self._held

    @override
    def __repr__(self) -> str:
        evicted = self.counts.evicted.value
        return f"TokenCache(held={len(self)}, evicted={evicted:.0f})"  # keys hold fingerprints
