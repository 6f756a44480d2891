"""What the vendor refused, remembered for a while, so that it is not asked again for nothing.

Bounded, and filled by verdicts only: a timeout or a cancelled call is nobody's refusal.  With a
shared store `shared_refusals` remembers for all replicas.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from cachetools import TTLCache
from typing_extensions import override

from broker.issuers.vendor.replies import Refused, Scope
from broker.model import Clock, Secret, TokenRequest
from broker.units import SECOND

ACCOUNT_MEMORY, AGENT_MEMORY = 15, 30
"""Seconds that a refusal is remembered: for the whole account shortly, because a top-up should be
felt at once; for an agent and model longer, because generating one takes minutes."""

AGENTS_REMEMBERED = 10_000
"""Agent and model pairs whose refusal is remembered; a random one is refused by the vendor anew."""


class NegativeCache(Protocol):
    """A memory of refusals."""

    async def find(self, request: TokenRequest) -> Refused | None:
        """Return what the vendor would answer to this request, as far as it is known."""
        ...

    def remember(self, request: TokenRequest, refused: Refused) -> None:
        """Remember a refusal where it holds for everybody."""
        ...

    def forget(self, request: TokenRequest) -> None:
        """Let a success put right what was remembered."""
        ...

    def use_keys(self, keys: Sequence[Secret]) -> None:
        """Belong to the account of these keys, and forget what was said of another one."""
        ...


class _Account(Enum):
    """The key of the one entry that the account-wide memory can have."""

    ALL = "all"


class LocalNegativeCache(NegativeCache):
    """The memory of one process."""

    def __init__(self, clock: Clock) -> None:
        self._account: TTLCache[_Account, Refused] = TTLCache(
            1, ACCOUNT_MEMORY * SECOND, timer=clock.mono
        )
        self._agents: TTLCache[tuple[str, str | None], Refused] = TTLCache(
            AGENTS_REMEMBERED, AGENT_MEMORY * SECOND, timer=clock.mono
        )

    @override
    async def find(self, request: TokenRequest) -> Refused | None:
        return self.here(request)

    def here(self, request: TokenRequest) -> Refused | None:
        """As `find`, without waiting for anybody."""
        return self._account.get(_Account.ALL) or self._agents.get((request.agent, request.model))

    @override
    def remember(self, request: TokenRequest, refused: Refused) -> None:
        match refused.scope:
            case Scope.ACCOUNT:
                self._account[_Account.ALL] = refused
            case Scope.AGENT_MODEL:
                self._agents[request.agent, request.model] = refused
            case Scope.NEVER:
                pass

    @override
    def forget(self, request: TokenRequest) -> None:
        self._account.clear()
        self._agents.pop((request.agent, request.model), None)

    @override
    def use_keys(self, keys: Sequence[Secret]) -> None:
        self._account.clear()
