"""What every issuer promises.

An issuer makes one token for one request.  It knows nothing of reuse, limits or flights: whoever
calls it has already decided that a token must be made.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

from broker.model import Minted, Session, TokenRequest
from broker.pacing.slots import Slot

Turn = Callable[[], Awaitable[Slot]]
"""Waits for a slot in the budget.  Awaited before every call that costs somebody something: a
retry or a second key is a call like the first.  Raises `errors.BudgetExhausted`.  The slot is given
back when the mint ends, unless the issuer keeps it for a call that may outlive the mint."""


class Issuer(Protocol):
    """Makes tokens."""

    name: str
    """Label of `broker_mint_duration_seconds`: `local` or `upstream`."""

    proves: bool = False
    """Whether its tokens prove themselves, so that `prove` can tell a good one from any other."""

    @property
    def signer_id(self) -> str:
        """Name what signs new tokens, for what outlives a process; tells nothing of a key."""
        ...

    @property
    def signer_ids(self) -> frozenset[str]:
        """Every `signer_id` whose tokens are still good."""
        ...

    async def check(self, request: TokenRequest) -> None:
        """Raise at once if its mint is known to fail: before any limit is charged."""
        ...

    async def mint(self, request: TokenRequest, turn: Turn) -> Minted:
        """Make a token for this visitor.

        Raises `errors.VendorError` or `errors.ServiceUnavailable`, never a foreign exception.
        May be cancelled by its owner's timeout, never by a single caller.
        """
        ...

    def prove(self, token: str) -> Session | None:  # noqa: ARG002 - the default knows of no proof
        """Return the session of a token that proves itself and is good now.

        None where they do not (`proves`), and only a record of what was handed out can tell.
        Raises `keyring.BadToken` for a token that is not good.
        """
        return None
