"""Keeps garbage collection short, however many tokens are held.

CPython's full collection visits every container there is: a million tokens in cachetools' links
would stop the loop for a few hundred milliseconds.  Tokens are freed by reference counting alone,
so the collector never finds anything among them.  Hence: what has survived a young collection is
moved out of its sight (`gc.freeze`) as soon as enough has gathered, and full collections look only
at what came since.

What is frozen is still freed when its last reference goes; only a *cycle* frozen while alive would
stay.  Ours are broken where they arise (see `flight`), and uvloop's connections have none.  Those
of asyncio's own loop have one each, so under that loop nothing is frozen.
"""

import asyncio
import gc

YOUNG_THRESHOLD = 2_000
"""Container allocations between young collections; a request leaves few behind, so the default
of 700 would run one every dozen requests for nothing."""

MIDDLE_THRESHOLD = 1
"""Young collections between middle ones, which then visit 6,000 objects at most.  Each costs 0.2 us
while memory is fresh and 2 us when tokens have come and gone all over it: 12 ms, measured."""

FREEZE_AFTER = 1
"""Middle collections between freezes: a full collection visits the survivors of one, and of those
that a round of housekeeping's mints cause."""

_NEVER = 1_000_000
"""A threshold that is not reached: full collections are ours to start."""


class PauseKeeper:
    """Owns the process' garbage collector between `start` and `stop`."""

    def __init__(self) -> None:
        self._thresholds = gc.get_threshold()
        self._middle = 0
        self._active = False

    def start(self) -> None:
        """Freeze what the start-up left and take over; does nothing on a loop other than uvloop."""
        if not type(asyncio.get_running_loop()).__module__.startswith("uvloop"):
            return
        self._active = True
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_THRESHOLD, MIDDLE_THRESHOLD, _NEVER)
        gc.callbacks.append(self._after)

    def stop(self) -> None:
        """Give everything back to the collector."""
        if not self._active:
            return
        self._active = False
        gc.callbacks.remove(self._after)
        gc.set_threshold(*self._thresholds)
        gc.unfreeze()

    def tidy(self) -> None:
        """Collect what came since the last freeze, and freeze what is left, if it is enough."""
        if self._active and self._middle >= FREEZE_AFTER:
            self._middle = 0
            gc.collect()
            gc.freeze()

    def _after(self, phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == 1:
            self._middle += 1
