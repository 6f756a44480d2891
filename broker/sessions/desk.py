"""What a token is worth now, and the end of a session.

    token -> the issuer: does it prove itself?  -> the book: was its session ended?
          -> otherwise the book: was it handed out here, and is it recorded still?

Knows neither HTTP nor limits.  Ending a session is final in this order: the mark first, so that no
token of it is good any more; then the visitor's epoch, so that a mint in flight is not handed out
and what is held for reuse is gone.
"""

import hashlib

from broker.issuers.base import Issuer
from broker.issuers.keyring import BadToken
from broker.issuers.vendor_token import MAX_TOKEN
from broker.model import Session
from broker.sessions.base import SessionBook


class SessionDesk:
    """Answers for tokens and sessions."""

    def __init__(self, issuer: Issuer, book: SessionBook) -> None:
        self._issuer = issuer
        self._book = book

    async def check(self, token: str) -> Session:
        """Return the session of a token that is good at this moment; raises BadToken."""
        if len(token) > MAX_TOKEN:
            raise BadToken(f"longer than {MAX_TOKEN} characters")
        session = self._issuer.prove(token)
        if session is None:
            session = await self._book.find_token(digest_of(token))
            if session is None:
                raise BadToken("not handed out here, or expired, or revoked")
        elif await self._book.ended(session.session_id):
            raise BadToken("revoked")
        return session


def digest_of(token: str) -> bytes:
    """Return the SHA-256 by which a token is recorded: the token itself is not kept twice."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
