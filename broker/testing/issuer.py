"""An issuer whose mints happen when, and fail as, a test wants."""

import asyncio
import hashlib
from collections.abc import Callable

from typing_extensions import override

from broker.issuers.base import Issuer, Turn
from broker.model import Minted, TokenRequest
from broker.rules.reuse import DEFAULT_LIFETIME
from broker.units import SECOND


class FakeIssuer(Issuer):
    """Makes unsigned tokens that name their visitor, so that one that crossed is noticed.

    `delay` is seconds a mint takes; `fail` is called before each mint with the request and may
    raise; `lifetime` is microseconds; `same` makes it return the last token of that visitor again.
    `closed` is raised by `check`, as by an open breaker.  `requests` lists every mint that was
    started.
    """

    name = "local"

    def __init__(self, *, delay: float = 0.0, lifetime: int = DEFAULT_LIFETIME) -> None:
        self.delay = delay
        self.lifetime = lifetime
        self.fail: Callable[[TokenRequest], None] | None = None
        self.closed: Exception | None = None
        self.same = False
        self.requests: list[TokenRequest] = []
        self._last: dict[str, Minted] = {}

    @property
    @override
    def signer_id(self) -> str:
        return "fake"

    @property
    @override
    def signer_ids(self) -> frozenset[str]:
        return frozenset({"fake"})

    @override
    async def check(self, request: TokenRequest) -> None:
        if self.closed is not None:
            raise self.closed

    @override
    async def mint(self, request: TokenRequest, turn: Turn) -> Minted:
        await turn()
        self.requests.append(request)
        number = len(self.requests)
        if self.delay:
            await asyncio.sleep(self.delay)
        if self.fail is not None:
            self.fail(request)
        if self.same and request.key in self._last:
            return self._last[request.key]
        minted = Minted(
            token=f"token-{visitor_mark(request)}-{number}",
            session_id=f"{visitor_mark(request)}-{number}",
            expires_at=self.lifetime // SECOND,
            lifetime=self.lifetime,
        )
        self._last[request.key] = minted
        return minted


def visitor_mark(request: TokenRequest) -> str:
    """What a token's session id begins with: a name of the whole key."""
    return hashlib.sha256(request.key.encode()).hexdigest()[:16]
