"""Bodies of token requests that were read before: the same bytes ask for the same again.

A visitor's page asks again with the same body, to the byte, for as long as its token is reused.
What was read of a body is kept, not what came of it; nothing about its client is.

Bounded: two generations of a dict, of short bodies that were good.
"""

from broker.model import TokenRequest
from broker.tables import Generations
from broker.wire.request import parse

MAX_KNOWN = 8192
"""Bodies of a generation; at some 500 bytes each both take 8 MB."""

LONGEST = 512
"""Bytes of a body that is kept: one with three fields has 200."""


class KnownBodies(Generations[bytes, TokenRequest]):
    """Reads bodies."""

    def __init__(self) -> None:
        super().__init__(MAX_KNOWN)

    def read(
        self, body: bytes, client: str, request_id: str, traceparent: str, *, any_fingerprint: bool
    ) -> TokenRequest:
        """Return what `parse` does, and raise what it raises; `traceparent` is well-formed."""
        known = self._young.get(body)
        if known is None:
            known = self.find(body) or parse(body, "", any_fingerprint=any_fingerprint)
            # what is good by the strict rule is good by any, whatever is configured later
            if not any_fingerprint and len(body) <= LONGEST:
                self[body] = known
        agent, fingerprint, model = known.agent, known.fingerprint, known.model
        return TokenRequest(client, agent, fingerprint, model, known.fresh, request_id, traceparent)
