"""Token buckets as arithmetic: no clock, no store, no I/O.

A bucket is one integer, the microsecond at which it will be full again (the theoretical
arrival time of GCRA, ITU-T I.371).  Spending moves that moment later; idle time needs no
bookkeeping.  Integers throughout, so that this file and a script in a shared store can be
held to the same answers.

A bucket whose moment has passed is full, and so equals one that was never seen: only such
buckets may be forgotten.
"""

import math

from msgspec import Struct

MAX_RATE = 1_000_000
"""Tokens per second that a bucket can express: one per microsecond, its unit of time."""

MAX_BURST = 2**31 - 1
"""A larger burst is a typing error, and with long intervals it would leave 64-bit integers."""

MAX_DEPTH = 2**63 - 1
"""Microseconds from empty to full that a 64-bit integer can express."""


_ALLOWED, _REFUSED = True, False
"""What a verdict begins with; by position, for each request makes one, and names cost as much."""


class Limit(Struct, frozen=True, gc=False):
    """At most `burst` tokens at once, one more every `interval` microseconds.

    `interval` is `ceil(per / rate)`, so rounding can only make a limit stricter.
    """

    burst: int
    interval: int

    @property
    def depth(self) -> int:
        """Microseconds from empty to full (tau)."""
        return self.burst * self.interval


class Verdict(Struct, frozen=True, gc=False):
    """What a bucket said, and what it looks like afterwards.

    `remaining` is in [0, burst]; `full_in` and `retry_after` are microseconds, the latter 0
    when the request was allowed.
    """

    allowed: bool
    remaining: int
    full_in: int
    retry_after: int
    limit: Limit

    @property
    def next_in(self) -> int:
        """Microseconds until one more token is there; 0 when the bucket is full."""
        if not self.full_in:
            return 0
        return (self.full_in - 1) % self.limit.interval + 1


def limit(rate: float, per: int, burst: int) -> Limit:
    """Turn `rate` tokens every `per` microseconds into a limit.

    Raises ValueError for what has no meaning (zero, negative, NaN) or no room (over a million
    a second, a burst over 2^31 - 1): "unlimited" and "forbidden" are said by leaving a limit
    out and by not granting access, never by a number.
    """
    if not rate > 0 or rate == float("inf"):
        raise ValueError("rate must be a positive, finite number")
    if per <= 0:
        raise ValueError("per must be longer than 0")
    if not 1 <= burst <= MAX_BURST:
        raise ValueError(f"burst must be between 1 and {MAX_BURST}")
    if rate * 1_000_000 > MAX_RATE * per:
        raise ValueError(f"rate must not exceed {MAX_RATE} a second")
    interval = -(-per // rate)
    if not interval * burst <= MAX_DEPTH:
        raise ValueError("rate is too low for this burst: it would take ages to refill")
    return Limit(burst=burst, interval=int(interval))


def spend(full_at: int, limit: Limit, now: int) -> tuple[int, Verdict]:
    """Take one token at `now` (microseconds); a refusal charges nothing.

    Returns the moment to store, also after a refusal, and the verdict.  That moment is never
    further away than a full drain: a clock that stepped, a store that failed over or a limit
    that was lowered cannot lock anybody out for longer.
    """
    interval = limit.interval
    depth = limit.burst * interval
    wait = full_at - now
    if wait < 0:
        wait = 0
    elif wait > depth:
        wait = depth
    spare = depth - wait - interval
    if spare < 0:
        return now + wait, Verdict(_REFUSED, 0, wait, -spare, limit)
    wait += interval
    return now + wait, Verdict(_ALLOWED, spare // interval, wait, 0, limit)


def verdict_from_wait(wait: int, limit: Limit, *, allowed: bool) -> Verdict:
    """Return the verdict of a bucket elsewhere, which told only this; `wait` is us until full.

    Raises ValueError for what no bucket says: out of bounds, or a refusal that has room for one.
    """
    interval = limit.interval
    spare = limit.burst * interval - wait  # no property: each hit on a shared store asks
    if wait < 0 or spare < 0:
        raise ValueError("a bucket out of bounds")
    if allowed:
        return Verdict(_ALLOWED, spare // interval, wait, 0, limit)
    if spare >= interval:
        raise ValueError("a bucket that would not refuse")
    return Verdict(_REFUSED, 0, wait, interval - spare, limit)


def peek(full_at: int, limit: Limit, now: int) -> Verdict:
    """Say what `spend` would say at `now`; nothing is taken, so `remaining` counts one more."""
    wait = min(max(full_at - now, 0), limit.depth)
    spare = limit.depth - wait
    remaining = spare // limit.interval
    return Verdict(remaining > 0, remaining, wait, max(limit.interval - spare, 0), limit)


def most_in_window(rate: float, per: int, burst: int, window: int) -> int:
    """Return the most tokens that are spent in any `window`: a burst, and what refills in it.

    `per` and `window` are microseconds.  Never less than what `limit` admits, whose interval is
    rounded up; a part of a token counts as one.
    """
    return burst + math.ceil(rate * window / per - 1e-9)
