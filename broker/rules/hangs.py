"""When a worker that is there does nothing any more: no clock, no process, only signs of life.

A worker writes a number twice a second and whoever watches it looks as often.  Silence is counted
in looks, each worth a second at most: a watcher that was away itself (the machine or its cgroup was
suspended, a debugger held it) comes back and has missed nothing, whatever the clocks say, so nobody
is killed for a pause of all.
"""

from dataclasses import dataclass

LONGEST_LOOK = 1.0
"""Seconds for which one look counts at most: twice the usual distance between two."""

QUIET = 3.0
"""Seconds of silence after which a worker is not counted on: above what a slow disk or a collection
of garbage takes."""

HUNG = 8.0
"""Seconds of silence after which a worker that takes requests is killed: with the distance of looks
within 10 s, and three times what any pause of a working one was measured to take."""

START = 30.0
"""Seconds in which a new process must be ready: it takes one, twenty on a starved machine."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """What was last heard of a worker, and the seconds for which nothing new was.

    `beat` is the number it last wrote, 0 before the first and after the last; a process that is
    not `ready` is judged by its start, which signs of life do not prolong.
    """

    beat: float = 0.0
    quiet: float = 0.0
    ready: bool = False

    def after(self, beat: float, elapsed: float, *, ready: bool) -> "Pulse":
        """Return what one more look tells, `elapsed` seconds after the last."""
        heard = ready and beat != self.beat
        if heard or ready is not self.ready:
            return Pulse(beat, 0.0, ready)
        return Pulse(beat, self.quiet + min(elapsed, LONGEST_LOOK), ready)

    @property
    def is_quiet(self) -> bool:
        """Whether it cannot be counted on at the moment."""
        return self.ready and self.quiet >= QUIET

    @property
    def is_stuck(self) -> bool:
        """Whether it is quiet without having said that it drains, as its last beat does."""
        return self.is_quiet and self.beat != 0

    def is_hung(self, drain: float) -> bool:
        """Whether it will not come back.

        One that drains by itself says no more, and has `drain` seconds to end.
        """
        if not self.ready:
            return self.quiet >= START
        return self.quiet >= (HUNG if self.beat else max(drain, HUNG))
