"""What every store promises.

A store keeps what requests share.  It decides by the rules of `broker.rules` and counts what it
decided; it does not know HTTP, issuers or flights.  Methods are coroutines although memory
needs none: a shared store answers `visit` with one round trip.
"""

from typing import Protocol

from msgspec import Struct

from broker.model import Ask, EmbedToken, LimitName
from broker.rules.bucket import Verdict


class Denial(Struct, frozen=True, gc=False):
    """A limit that refused, and what its bucket said."""

    limit: LimitName
    verdict: Verdict


class Visit(Struct, frozen=True, gc=False):
    """What the store knows when a visitor asks.

    `verdict` is the fingerprint limit's, for the headers of the answer; `denial` is set when a
    limit refused, and then nothing was charged by it; `token` is what is held for this key, dead
    or alive: `rules.reuse` tells.
    """

    verdict: Verdict | None
    denial: Denial | None
    token: EmbedToken | None


class Store(Protocol):
    """What requests share."""

    async def visit(self, ask: Ask, key: str) -> Visit:
        """Charge the limits that every request meets, and look for a token under `key`."""
        ...

    async def admit_mint(self, ask: Ask) -> Denial | None:
        """Charge the limits that only a started mint meets; None means go ahead."""
        ...

    async def look(self, key: str) -> EmbedToken | None:
        """Look for a token without charging anything."""
        ...

    async def keep(self, key: str, token: EmbedToken) -> None:
        """Hold a token for reuse until it is dead."""
        ...
