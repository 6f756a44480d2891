"""Bodies of token requests that were read before: the same bytes ask for the same again.

A visitor's page asks again with the same body, to the byte, for as long as its token is reused.
What was read of a body is kept, with the client that sent it; not what came of it.

Bounded: two generations of a dict, of short bodies that were good.
"""

from broker.model import TokenRequest
from broker.tables import Generations
from broker.wire.request import parse

MAX_KNOWN = 8192
"""Bodies of a generation; at some 700 bytes each both take 12 MB."""

LONGEST = 512
"""Bytes of a body that is kept: one with three fields has 200."""


class KnownBodies(Generations[bytes, TokenRequest]):
    """Reads bodies."""

    def __init__(self) -> None:
        super().__init__(MAX_KNOWN)

    def read(self, body: bytes, client: str, *, any_fingerprint: bool) -> TokenRequest:
        """Return what `parse` does, and raise what it raises."""
        known = self._young.get(body) or self.find(body)
        if known is not None and known.client == client:  # two clients seldom have one visitor
            return known
        request = parse(body, client, any_fingerprint=any_fingerprint)
        # what is good by the strict rule is good by any, whatever is configured later
        if not any_fingerprint and len(body) <= LONGEST:
            self[body] = request
        return request
