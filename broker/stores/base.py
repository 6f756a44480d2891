"""What every store promises.

A store keeps what requests share: buckets, tokens, and who mints for a key.  It decides by the
rules of `broker.rules` and counts what it decided; it does not know HTTP, issuers or flights.
Methods are coroutines although memory needs none: a shared store answers `admit` with one round
trip.  Nearly all requests end with it, so where it waits for nothing it can be had by a call
(`visit`), and where it waits for one reply by a listener (`start_visit`), which needs no task
either.

Theory of operation.  A mint for a key has one leader among all processes that share the store.
`lead` makes its caller the leader, unless somebody else is: then it waits for their outcome.  What
a leader was given, the lease, comes back by `keep`, `release` or `abandon`.  Its `fence` is larger
than that of every lease before it, so a leader that was suspended for longer than its lease cannot
overwrite the token of its successor; its `epoch` is the visitor's at that moment, so a token whose
visitor was ended while it was minted is neither kept nor handed out.
"""

from collections.abc import Callable
from enum import Enum
from typing import Protocol

from msgspec import Struct

from broker.errors import RateLimited
from broker.model import EmbedToken, LimitName, TokenRequest
from broker.rules.bucket import Verdict


class Rejection(Struct, frozen=True, gc=False):
    """A limit that refused, and what its bucket said."""

    limit: LimitName
    verdict: Verdict

    def error(self) -> RateLimited:
        """Return it as the error that is answered."""
        return RateLimited(self.limit, self.verdict)


class Visit(Struct, frozen=True, gc=False):
    """What the store knows when a visitor asks.

    `verdict` is the fingerprint limit's, for the headers of the answer; `rejection` is set when a
    limit refused, and then nothing was charged by it; `token` is what is held for this key, dead
    or alive: `rules.reuse` tells.
    """

    verdict: Verdict | None
    rejection: Rejection | None
    token: EmbedToken | None


class Lease(Struct, frozen=True, gc=False):
    """Leave to mint for one key."""

    fence: int
    epoch: int


class Kept(Enum):
    """What became of a token that was to be kept."""

    KEPT = "kept"
    """It is what the next request gets."""
    SUPERSEDED = "superseded"
    """A later leader has kept a newer one; this one is good, but not for reuse."""
    ENDED = "ended"
    """The visitor was ended while it was minted: it must not be handed out."""


class VisitListener(Protocol):
    """Who started a visit to a store that is elsewhere."""

    def tell(self, said: Visit | Exception | None) -> None:
        """Take what `Store.admit` returns or raises; None: nothing was done yet, call that."""
        ...


class Store(Protocol):
    """What requests share."""

    def visit(self, _request: TokenRequest, _now: int) -> Visit | None:
        """Do what `admit` does, if nothing of it waits; None where it does.

        `now` is the monotonic clock at this moment, in microseconds.
        """
        return None

    def start_visit(self, _request: TokenRequest, _now: int, _listener: VisitListener) -> bool:
        """Begin what `admit` does, and tell `_listener` of its end; False where only `admit` can.

        It is told later, never within this call, and may have lost interest by then.
        """
        return False

    async def admit(self, request: TokenRequest, key: str) -> Visit:
        """Charge the limits that every request meets, and look for a token under `key`."""
        ...

    async def charge_client(self, client: str) -> Rejection | None:
        """Charge the client's limit, where there is one, for a request that is not for a token."""
        ...

    async def peek(self, request: TokenRequest, key: str) -> EmbedToken | None:
        """Look for a token without charging anything."""
        ...

    async def lead(
        self, request: TokenRequest, key: str, good: Callable[[EmbedToken], bool]
    ) -> Lease | EmbedToken | Rejection:
        """Become the one who mints for `key`, and charge the limits that only a mint meets.

        Returns a token instead if one is there now that is `good`, uncharged, or the limit that
        refused.  While somebody else leads it waits for their token; raises their error.
        """
        ...

    async def keep(self, request: TokenRequest, key: str, token: EmbedToken, lease: Lease) -> Kept:
        """Hold a token for reuse until it is dead; ends the lease."""
        ...

    async def release(self, request: TokenRequest, key: str, lease: Lease) -> bool:
        """End a lease whose token is not to be held for reuse, but handed out.

        False if its visitor was ended meanwhile: then it must not be handed out either.
        """
        ...

    def abandon(
        self, request: TokenRequest, key: str, lease: Lease, error: BaseException | None
    ) -> None:
        """End a lease without a token; those who wait elsewhere get `error` if it is an answer."""
        ...

    async def revoke_visitor(self, client: str, fingerprint: str, *keys: str) -> None:
        """Forget every token of this visitor, also those that are being minted at this moment.

        `keys` are those of tokens that are known to be theirs.
        """
        ...
