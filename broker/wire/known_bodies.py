"""Bodies of token requests that were read before: the same bytes ask for the same again.

A visitor's page asks again with the same body, to the byte, for as long as its token is reused.
What was read of a body is kept, with the client that sent it; not what came of it.  What is wrong
with one is kept, too, in a small table of its own: a broken page sends one body again and again,
and many different ones must not push out what is good.

Bounded: two generations of a dict, of short bodies.
"""

from broker.errors import BrokerError
from broker.model import TokenRequest
from broker.tables import Generations
from broker.wire.request import parse

MAX_KNOWN = 8192
"""Bodies of a generation.  At 0.6 KB each both take 10 MB, and twice that if all are as long as can
be; half as much again for a while after one was given up.  Of more visitors than both hold, some
have their bodies decoded anew: a microsecond for each request."""

MAX_WRONG = 64
"""Wrong bodies of a generation."""

LONGEST = 512
"""Bytes of a body that is kept: one with three fields has 200."""


class KnownBodies(Generations[bytes, TokenRequest]):
    """Reads bodies."""

    def __init__(self) -> None:
        super().__init__(MAX_KNOWN)
        self._wrong: Generations[bytes, BrokerError] = Generations(MAX_WRONG)

    def known(self, body: bytes, client: str) -> TokenRequest | None:
        """Return what this client was found to ask for by this body: good by any rule."""
        known = self.find(body)
        if known is None or known.client != client:  # two clients seldom have one visitor
            return None
        return known

    def read(
        self, body: bytes, client: str, *, any_fingerprint: bool
    ) -> TokenRequest | BrokerError:
        """Return what `parse` returns or raises, and keep it: for a body that is not `known`."""
        wrong = None if any_fingerprint else self._wrong.find(body)
        if wrong is not None:
            return wrong
        # what is good by the strict rule is good by any, whatever is configured later; what is
        # wrong by it may be good by any
        is_kept = not any_fingerprint and len(body) <= LONGEST
        try:
            request = parse(body, client, any_fingerprint=any_fingerprint)
        except BrokerError as error:
            if is_kept:
                self._wrong[body] = _bare(error)
            return error
        if is_kept:
            self[body] = request
        return request


def _bare(error: BrokerError) -> BrokerError:
    """Return an error that holds on to nothing of the request that it was raised for."""
    error.__context__ = None
    return error.with_traceback(None)
