"""When a token may be handed out again: pure arithmetic over microseconds of life left.

Life runs on our own clocks.  A token's `exp - iat` says how long it lives; our clocks at the
*start* of the mint say since when.  So a vendor whose clock is five minutes off changes
nothing, and of our two clocks the one that leaves less life wins: the wall clock notices a
suspended machine, the monotonic clock notices a wall clock that was set back.

    minted                                                     expiry
    |-------- FRESH --------|--- RENEW ---|-- STALE --|-- DEAD --|
                            ^ mark        ^ floor     ^ floor in outage

The mark is drawn once per token, so tokens minted in one burst are not renewed in one burst;
drawing again at each access would make busy keys renew at the far edge together.
"""

from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from typing import TypeGuard

from msgspec import Struct

from broker.units import NO_DATE, SECOND

DEFAULT_LIFETIME = 3600 * SECOND
"""The vendor's documented token life; assumed where a token does not tell its own."""

MAX_LIFETIME = 3600 * SECOND
"""No token is reused for longer than the vendor's documented hour, whatever its `exp` says."""

RENEWAL_LEAD = 120 * SECOND
"""The renewal window closes this long before the floor, so a renewal has time to be retried."""


class Life(Enum):
    """What may be done with a token that is held."""

    FRESH = "fresh"
    """Hand it out."""
    RENEW = "renew"
    """Hand it out, and mint its successor in the background."""
    STALE = "stale"
    """Mint first; hand it out only if that fails for a passing reason."""
    DEAD = "dead"
    """Never hand it out."""


class Floors(Struct, frozen=True, gc=False):
    """The three marks before expiry, in microseconds of life left."""

    ahead: int
    """From here a renewal may start."""
    floor: int
    """Below this a mint is tried before the token is handed out."""
    outage: int
    """Below this the token is not handed out at all."""


@lru_cache(maxsize=1024)  # a mint by the vendor asks three times, and lives are few
def floors(lifetime: int, ahead: int, floor: int, outage: int) -> Floors:
    """Fit the configured marks to a token of `lifetime`.

    A floor never takes more than a quarter of a life and the renewal window never more than
    half: a vendor that starts to issue one-minute tokens must not cause a mint per request.
    """
    floor = min(floor, lifetime // 4)
    return Floors(
        ahead=max(min(ahead, lifetime // 2), floor), floor=floor, outage=min(outage, floor)
    )


def renewal_mark(marks: Floors, draw: Callable[[], float]) -> int:
    """Draw the life left at which this token asks for its successor; `draw` is in [0, 1)."""
    nearest, width = renewal_window(marks)
    return nearest + int(draw() * width)


def renewal_window(marks: Floors) -> tuple[int, int]:
    """Return where a mark lies at least, in life left, and how much farther it may lie."""
    nearest = min(marks.floor + RENEWAL_LEAD, (marks.floor + marks.ahead) // 2)
    return nearest, marks.ahead - nearest


def life(left: int, mark: int, marks: Floors) -> Life:
    """Classify a token by the life it has left (microseconds)."""
    if left <= 0 or left < marks.outage:
        return Life.DEAD
    if left < marks.floor:
        return Life.STALE
    return Life.FRESH if left > mark else Life.RENEW


class ReusePolicy(Struct, frozen=True):
    """When tokens are reused: microseconds of life left; `enabled` False mints each time."""

    enabled: bool
    ahead: int
    floor: int
    outage: int

    def marks(self, lifetime: int) -> Floors:
        """Fit the configured marks to a token of this lifetime."""
        return floors(lifetime, self.ahead, self.floor, self.outage)


def lifetime_of(claims: object) -> int:
    """Read a token's life in microseconds from its claims (`exp - iat`, RFC 7519 section 4.1).

    Claims come from outside and are hints: whatever is not two finite numbers counts as the
    documented hour, longer ones are cut to it, and `exp <= iat` gives 0: expired on arrival.
    """
    if not isinstance(claims, dict):
        return DEFAULT_LIFETIME
    exp, iat = claims.get("exp"), claims.get("iat")
    if not (_is_date(exp) and _is_date(iat)):
        return DEFAULT_LIFETIME
    seconds = min(exp - iat, MAX_LIFETIME // SECOND)
    return max(int(seconds * SECOND), 0)


def _is_date(value: object) -> TypeGuard[int | float]:
    """Whether this can be a NumericDate at all: NaN, infinities and astronomers' years cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < NO_DATE
