"""How long a key whose mint failed has to wait: doubling, at random, and forgotten in time.

Knows keys and failures, not why they happened.  Waiting is per key, so that one agent that the
vendor cannot serve does not slow the others down.
"""

import asyncio
from collections.abc import Callable

from cachetools import TTLCache
from msgspec import Struct
from typing_extensions import override

from broker.model import Clock
from broker.rules.backoff import full_jitter
from broker.units import SECOND

BASE, CAP = 250_000, 5_000_000
"""Microseconds: a key whose mint failed waits up to 0.25 s, then twice that, never over 5 s."""

MEMORY = 60
"""Seconds after its last failure in which a key is still treated as a failing one."""

KEYS = 10_000
"""Failing keys remembered; under more, the least recent ones merely lose their patience."""


class _Failing(Struct):
    """How often in a row, and when (monotonic microseconds) to try again."""

    failures: int
    not_before: int


class KeyBackoff:
    """What each failing key has to wait for; `draw` returns a number in [0, 1).

    From the moment `forgotten_at` (monotonic microseconds) on no key is treated as a failing one.
    """

    def __init__(self, clock: Clock, draw: Callable[[], float]) -> None:
        self._clock = clock
        self._draw = draw
        self._failing: TTLCache[str, _Failing] = TTLCache(KEYS, MEMORY * SECOND, timer=clock.mono)
        self.forgotten_at = 0

    def note_failure(self, key: str) -> None:
        """Double this key's wait."""
        failures = self.failures(key) + 1
        wait = full_jitter(failures, BASE, CAP, self._draw)
        now = self._clock.mono()
        self._failing[key] = _Failing(failures, now + wait)
        self.forgotten_at = now + MEMORY * SECOND

    def forget(self, key: str) -> None:
        """Take note that the key's mint succeeded."""
        if self._clock.mono() < self.forgotten_at:  # mostly nothing has failed
            self._failing.pop(key, None)

    def failures(self, key: str) -> int:
        """How often in a row this key has failed."""
        known = self._failing.get(key)
        return known.failures if known else 0

    def left(self, key: str) -> int:
        """Microseconds until this key may be tried again; 0 for now."""
        now = self._clock.mono()
        known = self._failing.get(key) if now < self.forgotten_at else None
        return 0 if known is None else min(max(known.not_before - now, 0), CAP)

    async def wait(self, key: str) -> None:
        """Return when the key may be tried again."""
        if wait := self.left(key):
            await asyncio.sleep(wait / SECOND)

    def __len__(self) -> int:
        return len(self._failing)

    @override
    def __repr__(self) -> str:
        return f"KeyBackoff(keys={len(self)})"
