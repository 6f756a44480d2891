"""Tokens held for reuse, on cachetools: bounded, least recently used first, gone when dead."""

from collections.abc import Callable

from cachetools import TLRUCache
from typing_extensions import override

from broker.model import EmbedToken


class TokenCache(TLRUCache[str, EmbedToken]):
    """Ready answers by key; counts what left before its time.

    `evicted` counts live tokens that had to make room, `expired` those that died here.
    """

    def __init__(
        self, maxsize: int, keep_until: Callable[[EmbedToken], int], mono: Callable[[], int]
    ) -> None:
        super().__init__(maxsize, ttu=lambda _key, token, _now: keep_until(token), timer=mono)
        self.evicted = 0
        self.expired = 0

    def find(self, key: str) -> EmbedToken | None:
        """Return what is held under this key: `get` at half its cost, which asks twice."""
        try:
            return self[key]
        except KeyError:
            return None

    @override
    def popitem(self) -> tuple[str, EmbedToken]:
        self.evicted += 1
        return super().popitem()

    @override
    def expire(self, time: float | None = None) -> list[tuple[str, EmbedToken]]:
        gone = list(super().expire(time))
        self.expired += len(gone)
        return gone

    @override
    def __repr__(self) -> str:
        return f"TokenCache(held={len(self)}, evicted={self.evicted})"  # keys hold fingerprints
