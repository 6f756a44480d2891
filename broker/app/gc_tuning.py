"""Keeps garbage collection short and thorough, however many tokens are held.

What is held by the million (tokens, sessions, buckets) lies in containers that CPython's collector
does not look into: see `stores.tokens`.  So a full collection visits connections and what is under
way, and can be had often; whatever is left in a cycle is freed by the next one.

`gc.freeze` is used once, on what the imports and the configuration left: nothing of a request
exists yet.  Nothing that is alive later is frozen, because a cycle that is frozen while it is alive
stays for ever, with all that hangs on it: a connection, a request, a client's secret.
"""

import gc
import time
from collections.abc import Callable

YOUNG_THRESHOLD = 2_000
"""Container allocations between young collections; a request leaves few behind, so the default
of 700 would run one every dozen requests for nothing."""

MIDDLE_THRESHOLD = 5
"""Young collections between middle ones, which then visit 12,000 objects at most: a millisecond."""

OLD_THRESHOLD = 100
"""Middle collections between full ones, should housekeeping ever stand still: a million containers
and more."""

SHARE = 0.005
"""Of the time, for full collections: one of 1 ms may come every round of housekeeping, one of 30 ms
(ten thousand connections) every six seconds."""


class GcTuner:
    """Owns the process' garbage collector between `start` and `stop`; `now` returns seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._thresholds = gc.get_threshold()
        self._active = False
        self._next = 0.0

    def start(self) -> None:
        """Freeze what the imports left and take over: call it before anything is opened."""
        self._active = True
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_THRESHOLD, MIDDLE_THRESHOLD, OLD_THRESHOLD)

    def stop(self) -> None:
        """Give everything back to the collector."""
        if not self._active:
            return
        self._active = False
        gc.set_threshold(*self._thresholds)
        gc.unfreeze()

    def tidy(self) -> None:
        """Collect, unless the last collection took so long that this one would come too soon."""
        began = self._now()
        if self._active and began >= self._next:
            gc.collect()
            ended = self._now()
            self._next = ended + (ended - began) / SHARE
