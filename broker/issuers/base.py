"""What every issuer promises.

An issuer makes one token for one ask.  It knows nothing of reuse, limits or flights: whoever
calls it has already decided that a token must be made and has taken its slot in the budget.
"""

from typing import Protocol

from broker.model import Ask, Minted


class Issuer(Protocol):
    """Makes tokens."""

    name: str
    """Label of `broker_mint_duration_seconds`: `local` or `upstream`."""

    async def mint(self, ask: Ask) -> Minted:
        """Make a token for this visitor.

        Raises `errors.VendorError` or `errors.ServiceUnavailable`, never a foreign exception.
        May be cancelled by its owner's timeout, never by a single caller.
        """
        ...
