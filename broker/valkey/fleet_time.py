"""A time that all replicas of a store agree on, and no clock step can hurry.

Theory of operation.  The vendor's budget refills with time.  If that were the store's clock, a
store that steps forwards again and again (a bad peer of its time daemon) would refill it with each
step.  So the time of a fleet is a number in the store that only its replicas move, each by its
monotonic clock: a reply told `told`, so at `now` at least `told + (now - received)` has passed, for
the reply was on its way for a while.  Whoever calls vouches for that much; the largest counts.

Nobody vouches for more than has passed, however calls are delayed, lost or interleaved, so the time
never runs faster than the fastest monotonic clock.  It runs as fast as that, less one way of a
reply every `KEPT`: of what a replica was told lately it keeps what leads furthest.  It does not
keep that for longer, or two clocks that drift apart would come apart for good.
"""

import time
from collections.abc import Callable

from typing_extensions import override

from broker.valkey.client.errors import Reason, StoreFailed

KEPT = 60_000_000
"""Microseconds after which what was told is no longer vouched for: twice that at most."""


LONGEST_ERA = 64
"""Bytes of an era's name, which goes with every call: replicas draw sixteen."""


class FleetTime:
    """What this replica knows of the fleet's time; `mono` is its monotonic clock (microseconds).

    `newborn` names the era that begins if the store knows none and neither do we.
    """

    def __init__(
        self, newborn: bytes, mono: Callable[[], int] = lambda: time.monotonic_ns() // 1000
    ) -> None:
        self.mono = mono
        self._era = newborn
        self._lead: int | None = None
        self._lead_before: int | None = None
        self._turned = 0

    def vouched(self) -> tuple[bytes, bytes]:
        """Return the two arguments of every script that goes by this time: just before a call."""
        leads = [lead for lead in (self._lead, self._lead_before) if lead is not None]
        return self._era, b"%d" % (max(leads) + self.mono() if leads else 0)

    def learn(self, era: bytes, told: int) -> None:
        """Take note of what a reply tells: just after it came."""
        now = self.mono()
        if era != self._era:
            self._era, self._lead, self._lead_before = era, None, None
        if self._lead is None or now - self._turned > KEPT:
            self._lead_before, self._lead, self._turned = self._lead, told - now, now
        self._lead = max(self._lead, told - now)

    @override
    def __repr__(self) -> str:
        return f"FleetTime(era={self._era!r}, lead={self._lead})"


def era_of(told: bytes) -> bytes:
    """Return the name of an era that was told; raises StoreFailed for what is none."""
    if not 0 < len(told) <= LONGEST_ERA:
        raise StoreFailed(Reason.OTHER, "an era without a name")
    return told
