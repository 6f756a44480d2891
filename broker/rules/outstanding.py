"""A budget that counts arrivals, not departures: no clock, no tasks, no I/O.

The vendor counts a call when it arrives.  While the vendor or the network stands still, calls are
sent and arrive later, together; a bucket that is charged when they are sent refills meanwhile, and
allows as many again.  So a call is charged when it is *settled*: answered, failed, or over
otherwise.  Until then it is *outstanding* and counts as if it were to arrive at this moment.

    admit:   max(full_at, now) + (outstanding + 1) * interval <= now + burst * interval
    settle:  outstanding -= 1;  full_at = max(full_at, now) + interval

Why that suffices.  A call arrives between its admission and its settlement.  Take any window that
begins at `s`, and the last admission `u` in it.  Of the calls that arrive in the window, `k` were
settled between `s` and `u`, so `full_at >= s + k * interval`; the others were outstanding at `u`.
The admission at `u` then says: `k + outstanding <= burst + (u - s) / interval`.

Without a stall the rule costs nothing: a settled call leaves as much room as an outstanding one
takes, so a saturated budget gives a slot every `interval` as long as answers take less than
`(burst - 1) * interval`.

*Owed* are calls of which nobody here can see the end: those of the process before this one, which
may have been killed in the middle of a stall, and those that were given up.  While there are any,
`PROBES` calls at most are out at once.  They are charged when that begins, because they may just
have arrived, and when it ends: as much of it as has refilled since, because they may have arrived
only now.  It ends with the first answer from after it began: the vendor reads.

Integers throughout, microseconds.  Limits come from `bucket`.  `stores/lua/budget.lua` decides the
same for a fleet.
"""

from msgspec import Struct
from msgspec.structs import replace

from broker.rules.bucket import Limit

WINDOW = 60_000_000
"""Microseconds in which the vendor counts calls: its limits are per minute."""

PROBES = 2
"""Calls that may be out while others are owed.  A process that starts cannot know of more than one
before it, so each further restart within one stall of the vendor adds so many to the worst window:
the default budget leaves room for four restarts (106 + 8 + 3 * 2 = 120).  A shared store knows.
Slots come one by one after a start, so with answers within a slot's interval two are as good as a
burst."""

REMEMBERED = 3
"""Bursts: the most that is remembered as owed, so that a vendor that never answers for an hour
wakes to no endless debt."""

SPARED = 2
"""Bursts that may be owed before no call is given up early any more: a vendor that holds mints and
answers all else is sent two more each half minute only so often, then as rarely as one that answers
nothing; and a last burst that is given up is still remembered."""


class Ledger(Struct, frozen=True, gc=False):
    """What was charged, and what may yet arrive.

    `full_at` is the microsecond at which all that was charged is refilled; `outstanding` counts
    the calls that are out, `owed` those that are out of sight, the last of them since `owed_at`.
    """

    full_at: int = 0
    outstanding: int = 0
    owed: int = 0
    owed_at: int = 0


def started(limit: Limit, now: int) -> Ledger:
    """Begin empty, and with what a process before this one may have left out."""
    return Ledger(full_at=now + limit.depth, owed=limit.burst, owed_at=now)


def wait(ledger: Ledger, limit: Limit, now: int) -> int | None:
    """Return the microseconds until one more call may be sent; 0 for at once.

    None if time alone does not bring it: first a call must be settled.
    """
    most = min(PROBES, limit.burst) if ledger.owed else limit.burst
    if ledger.outstanding >= most:
        return None
    return max(_level(ledger, limit, now) + limit.interval - limit.depth, 0)


def may_give_up(owed: int, limit: Limit) -> bool:
    """Whether calls that hang may be given up early: those owed already leave room for that."""
    return owed < SPARED * limit.burst


def remaining(ledger: Ledger, limit: Limit, now: int) -> int:
    """How many calls could be sent at this moment, if what is owed does not arrive after all."""
    return max((limit.depth - _level(ledger, limit, now)) // limit.interval, 0)


def take(ledger: Ledger) -> Ledger:
    """Send a call."""
    return replace(ledger, outstanding=ledger.outstanding + 1)


def settle(ledger: Ledger, limit: Limit, now: int, calls: int = 1) -> Ledger:
    """Charge calls that were out and can no longer arrive later than now."""
    return replace(charge(ledger, limit, now, calls), outstanding=ledger.outstanding - calls)


def abandon(ledger: Ledger, limit: Limit, now: int) -> Ledger:
    """Give up a call that may yet arrive, or just has."""
    charged = charge(ledger, limit, now, _refilled(ledger, limit, now) + 1)
    owed = min(ledger.owed + 1, REMEMBERED * limit.burst)
    return replace(charged, outstanding=ledger.outstanding - 1, owed=owed, owed_at=now)


def answered(ledger: Ledger, limit: Limit, now: int, at: int) -> Ledger:
    """Take note that the vendor answered a call at this moment, which is not after now.

    An answer from before calls were owed says nothing of them.
    """
    if not ledger.owed or at < ledger.owed_at:
        return ledger
    return replace(charge(ledger, limit, now, _refilled(ledger, limit, now)), owed=0)


def charge(ledger: Ledger, limit: Limit, now: int, calls: int) -> Ledger:
    """Count calls that arrived, by whoever's doing."""
    return replace(ledger, full_at=max(ledger.full_at, now) + calls * limit.interval)


def drained(ledger: Ledger, limit: Limit, now: int) -> Ledger:
    """Leave nothing to be sent at this moment; what is outstanding is part of that."""
    empty_at = now + limit.depth - ledger.outstanding * limit.interval
    return replace(ledger, full_at=max(ledger.full_at, empty_at))


def _level(ledger: Ledger, limit: Limit, now: int) -> int:
    """Microseconds of refill that everything takes which was charged or is out."""
    return max(ledger.full_at - now, 0) + ledger.outstanding * limit.interval


def _refilled(ledger: Ledger, limit: Limit, now: int) -> int:
    """How many of the calls that are owed have refilled since they were charged."""
    return min(ledger.owed, (now - ledger.owed_at) // limit.interval)
