"""When a process that died is started again: soon at first, later if it keeps dying."""

FIRST, LONGEST = 0.1, 5.0
"""Seconds before the first restart, and at most: requests should not miss a worker for long, and a
worker that cannot live must not keep the machine busy with its births."""

WELL = 10.0
"""Seconds after which a worker counts as well: its death is a new story."""


def delay(previous: float, lived: float) -> float:
    """Return the seconds until the next start.

    `previous` is what the last restart waited (0: there was none), `lived` how long the process
    then was alive.
    """
    if lived >= WELL:
        return FIRST
    return min(max(previous * 2, FIRST), LONGEST)
