"""Tokens held for reuse, on cachetools: bounded, least recently used first, gone when dead."""

from collections.abc import Callable

from cachetools import TLRUCache
from msgspec import Struct, field
from typing_extensions import override

from broker.board import Counter
from broker.model import EmbedToken


class TokenCounts(Struct):
    """Tokens that left: `evicted` ones alive, to make room; `expired` ones died here."""

    evicted: Counter = field(default_factory=Counter)
    expired: Counter = field(default_factory=Counter)


class TokenCache(TLRUCache[str, EmbedToken]):
    """Ready answers by key; `counts` counts what left, without it the cache counts by itself."""

    def __init__(
        self,
        maxsize: int,
        keep_until: Callable[[EmbedToken], int],
        mono: Callable[[], int],
        counts: TokenCounts | None = None,
    ) -> None:
        super().__init__(maxsize, ttu=lambda _key, token, _now: keep_until(token), timer=mono)
        self.counts = counts or TokenCounts()

    def find(self, key: str) -> EmbedToken | None:
        """Return what is held under this key: `get` at half its cost, which asks twice."""
        try:
            return self[key]
        except KeyError:
            return None

    @override
    def popitem(self) -> tuple[str, EmbedToken]:
        self.counts.evicted.inc()
        return super().popitem()

    @override
    def expire(self, time: float | None = None) -> list[tuple[str, EmbedToken]]:
        gone = list(super().expire(time))
        self.counts.expired += len(gone)
        return gone

    @override
    def __repr__(self) -> str:
        evicted = self.counts.evicted.value
        return f"TokenCache(held={len(self)}, evicted={evicted:.0f})"  # keys hold fingerprints
