"""What the vendor's answer headers tell us: when to come back, what is left, what time it is there.

Pure functions over header lines; time comes in.  Knows nothing of bodies, tokens or of who acts
on what it finds: everything here is a hint, for the vendor sends these headers on some routes
and not on others.

Invariants: no function raises, whatever stands in a header; every time that comes out lies
within its documented bounds; a header that makes no sense is treated as absent.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import ceil
from typing import Protocol

from msgspec import Struct

from broker.units import SECOND

SHORTEST_RETRY, LONGEST_RETRY = SECOND, 300 * SECOND
"""Microseconds: `Retry-After` is cut to 1 s - 5 min.  Shorter would be a hot loop, and one
mistaken header must not silence a site for an afternoon."""

LONGEST_RESET = 300 * SECOND
"""Microseconds: the vendor's buckets refill within a minute; a later reset is not believed."""

DATE_TOLERANCE = 24 * 3600 * SECOND
"""Microseconds: a `Date` further than a day from our clock is nonsense, not skew: at such a
distance no certificate would have been accepted either."""

MOST_REMAINING = 1_000_000
"""Requests: the largest documented bucket holds 720; a number above this was never a count."""

_LONGEST_VALUE = 128
"""Characters: no date and no honest number is longer."""

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_COUNT = re.compile(r"[0-9]{1,15}")


class Headers(Protocol):
    """Header lines: a plain mapping, or a multidict in which a name occurs twice."""

    def items(self) -> Iterable[tuple[str, str]]:
        """Return name and value of every line."""
        ...


class RateLimitHint(Struct, frozen=True, gc=False):
    """What the vendor says is left of a bucket; it does not say of which one.

    `remaining` counts requests, `reset_in` is microseconds until the bucket is full, in
    [0, 5 min], None where the answer did not tell.
    """

    remaining: int
    reset_in: int | None


def values(headers: Headers, name: str) -> tuple[str, ...]:
    """Return the values of all lines of this name (lower case), in order, without outer blanks."""
    return tuple(value.strip() for key, value in headers.items() if key.lower() == name)


def encoded(headers: Headers) -> bool:
    """Whether the body was compressed although we asked for it as it is.

    It is not unpacked: a hundred kilobytes of gzip unfold to a hundred megabytes.
    """
    return any(
        value.lower() not in {"", "identity"} for value in values(headers, "content-encoding")
    )


def vendor_date(headers: Headers, now: int) -> int | None:
    """Return the vendor's wall clock (Unix microseconds) from `Date`; None if absent or absurd.

    `now` is our wall clock.  Given twice, the later one counts: it makes tokens older, not
    younger.
    """
    dates = [_http_date(value) for value in values(headers, "date")]
    near = [date for date in dates if date is not None and abs(date - now) <= DATE_TOLERANCE]
    return max(near, default=None)


def parse_retry_after(lines: Sequence[str], now: int) -> int | None:
    """Return how long `Retry-After` asks us to wait, in microseconds within [1 s, 5 min].

    RFC 9110 section 10.2.3 allows whole seconds or an HTTP date; fractions are seen in the
    field.  A date is compared with `now` (Unix microseconds), which should be the vendor's own
    clock where it is known.  Of several values, on lines of their own or joined by a proxy, the
    longest counts.  Negative and past ones mean "at once", which is one second here.  None if
    there is no value that means anything: the caller has to choose its own pause.
    """
    waits = [wait for line in lines for wait in _waits(line, now)]
    return min(max(*waits, SHORTEST_RETRY), LONGEST_RETRY) if waits else None


def rate_limit_hint(headers: Headers, now: int) -> RateLimitHint | None:
    """Read `X-RateLimit-Remaining` and `-Reset` (Unix seconds); None without a usable count.

    The reset is measured against the vendor's `Date` where there is one, else against `now`
    (Unix microseconds).  Given twice, the smaller count and the later reset win.
    """
    counts = _counts(headers, "x-ratelimit-remaining")
    remaining = min(counts, default=None)
    if remaining is None or remaining > MOST_REMAINING:
        return None
    reset = max(_counts(headers, "x-ratelimit-reset"), default=None)
    if reset is None:
        return RateLimitHint(remaining, None)
    wait = reset * SECOND - (vendor_date(headers, now) or now)
    return RateLimitHint(remaining, min(max(wait, 0), LONGEST_RESET))


def _counts(headers: Headers, name: str) -> list[int]:
    return [int(value) for value in values(headers, name) if _COUNT.fullmatch(value)]


def _waits(line: str, now: int) -> Iterable[int]:
    """Read a line as numbers between commas, or else as one date (which has a comma itself)."""
    numbers = [part for part in map(str.strip, line.split(",")) if _NUMBER.fullmatch(part)]
    if numbers:
        # Cut as floats: a thousand digits are an infinity, which no integer can hold.
        yield from (ceil(min(max(float(number), 0), 1e9) * SECOND) for number in numbers)
        return
    date = _http_date(line)
    if date is not None:
        yield date - now


def _http_date(value: str) -> int | None:
    """Read any of the three forms of RFC 9110 section 5.6.7; Unix microseconds."""
    if len(value) > _LONGEST_VALUE:
        return None
    try:
        date = parsedate_to_datetime(value)
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        return int((date - _EPOCH).total_seconds()) * SECOND
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
