"""How the fake vendor behaves while nothing is wrong with it: values, nothing else.

Times are seconds.  `msgspec.structs.replace` makes a changed copy.
"""

from collections.abc import Callable, Mapping
from random import Random

from msgspec import Struct

from broker.testing.vendor.replies import Refusal, Shape


class Allowance(Struct, frozen=True):
    """So many requests every `per` seconds, refilled continuously; all of them may come at once."""

    count: float
    per: float = 60.0

    def __post_init__(self) -> None:
        """Raise ValueError for what would refuse everything for ever."""
        if not (self.count >= 1 and self.per > 0):
            raise ValueError("an allowance needs a count of 1 or more and a time above 0")


class Clocks(Struct, frozen=True):
    """`monotonic` gives seconds that never go back, `wall` Unix seconds."""

    monotonic: Callable[[], float]
    wall: Callable[[], float]


class VendorSettings(Struct, frozen=True, kw_only=True):
    """How the vendor behaves while nothing is wrong with it."""

    ip: Allowance | None = Allowance(120)
    """Mints for each client IP; None: no limit."""

    account: Allowance | None = None
    """Mints for the account as a whole, from whichever IP and with whichever secret."""

    failures: Allowance = Allowance(30)
    """Failed authentications for each client IP; those beyond get 429 instead of their error."""

    lockout: bool = False
    """Whether an IP with no failures left gets 429 even with a good secret."""

    shape: Shape = Shape.NEWEST
    """The form of a successful answer."""

    lifetime: int = 3600
    """Seconds from a token's `iat` to its `exp`."""

    skew: float = 0.0
    """Seconds by which the vendor's clock is ahead: in `iat`, `exp`, Date and rate headers."""

    latency: float | Callable[[Random], float] = 0.0
    """Seconds before each answer, or a function that draws them.  Tokens are made before the
    wait, so a slow answer brings an older token."""

    models: tuple[str, ...] = ()
    """Models that exist, the agents' default first; others get 400.  Empty: every name exists."""

    unknown_agents: frozenset[str] = frozenset()
    """Agents that get 404."""

    model_errors: Mapping[tuple[str, str], Refusal] = {}
    """The refusal for an agent and a model."""

    rate_headers: bool = True
    """Whether mints are answered with X-RateLimit-Limit, -Remaining and -Reset."""
