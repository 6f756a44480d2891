"""What a token is worth now, and the end of a session.

    token -> the issuer: does it prove itself?  -> the store: was its session ended?
          -> otherwise the store: was it handed out here, and is it recorded still?

Knows neither HTTP nor limits.  Ending a session is final in this order: the mark first, so that no
token of it is good any more; then the visitor's epoch, so that a mint in flight is not handed out
and what is held for reuse is gone; the record last, by which an end that failed half-way is found
when it is asked for again.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import structlog

from broker.errors import ServiceUnavailable
from broker.issuers.base import Issuer
from broker.issuers.keyring import BadToken
from broker.issuers.vendor.token import MAX_TOKEN
from broker.model import Session
from broker.sessions.base import Place, Query, SessionsFull, SessionStore, place_of
from broker.telemetry.metrics import SessionMetrics

log = structlog.get_logger()

PAGE = 100
"""Sessions in a page."""

FULL_WAIT = 60_000_000
"""Microseconds after which ends are worth another try when too many are remembered."""


class RevokesVisitors(Protocol):
    """What ending a session needs of a store."""

    async def revoke_visitor(self, client: str, fingerprint: str, *keys: str) -> None:
        """Forget every token of this visitor, also those that are being minted at this moment.

        `keys` are those of tokens that are known to be theirs.
        """
        ...


class NotRecorded(BadToken):
    """A token that does not prove itself, and of which there is no record."""


class SessionAdmin:
    """Finds sessions and ends them: for operators, who have no token."""

    def __init__(
        self, session_store: SessionStore, store: RevokesVisitors, metrics: SessionMetrics
    ) -> None:
        self._session_store = session_store
        self._store = store
        self._metrics = metrics

    async def find(self, session_id: str) -> Session | None:
        """Return a live session."""
        return await self._session_store.find(session_id)

    async def page(self, query: Query, after: Place, limit: int) -> Sequence[Session]:
        """Return up to `limit` live sessions beyond a place, by expiry and id."""
        return await self._session_store.page(query, after, limit)

    async def end(self, session_id: str, *, visitor: bool) -> int:
        """End a session, or all that its visitor has; returns how many, 0 for an unknown one."""
        session = await self._session_store.find(session_id)
        if session is None:
            return 0
        others = await self._end_others(session) if visitor else 0
        await self._end(session)  # last: by it the rest is found when this is asked for again
        return others + 1

    async def _end_others(self, session: Session) -> int:
        query, after, ended = Query(fingerprint=session.fingerprint), Place(), 0
        while page := await self._session_store.page(query, after, PAGE):
            after = place_of(page[-1])
            for other in page:
                if other.client == session.client and other.session_id != session.session_id:
                    await self._end(other)
                    ended += 1
        return ended

    async def _end(self, session: Session, *, by_client: bool = False) -> None:
        try:
            await self._session_store.mark(session, by_client=by_client)
        except SessionsFull:
            raise ServiceUnavailable(
                "too many sessions were ended within an hour; try again later", FULL_WAIT
            ) from None
        await self._store.revoke_visitor(session.client, session.fingerprint, session.key)
        await self._session_store.forget(session)
        self._metrics.ended.inc()
        log.info(
            "broker.session_ended",
            session=session.session_id,
            client=session.client,
            by="client" if by_client else "operator",
        )


class TokenIntrospector(SessionAdmin):
    """Answers for tokens, too."""

    def __init__(
        self,
        issuer: Issuer,
        session_store: SessionStore,
        store: RevokesVisitors,
        metrics: SessionMetrics,
    ) -> None:
        super().__init__(session_store, store, metrics)
        self._issuer = issuer

    def check_at_once(self, token: str) -> Session | None:
        """Return what `check` does, and raise what it raises; None where it has to wait for that.

        A proxy asks about each of a viewer's requests, and a token that proves itself needs nothing
        but memory.
        """
        try:
            session = self._proven(token)
        except BadToken:
            self._metrics.checks["refused"].inc()
            raise
        is_ended = None if session is None else self._session_store.knows_end(session.session_id)
        if is_ended is None:
            return None
        if is_ended:
            self._metrics.checks["refused"].inc()
            raise BadToken("revoked")
        self._metrics.checks["good"].inc()
        return session

    async def check(self, token: str) -> Session:
        """Return the session of a token that is good at this moment; raises BadToken."""
        try:
            session = await self._check(token)
        except BadToken:
            self._metrics.checks["refused"].inc()
            raise
        self._metrics.checks["good"].inc()
        return session

    async def _check(self, token: str) -> Session:
        session = await self._session_of(token)
        if await self._session_store.ended(session.session_id):
            raise BadToken("revoked")
        return session

    def _proven(self, token: str) -> Session | None:
        """Return the session of a token that proves itself; raises BadToken for what is no token.

        None where only a record can tell.
        """
        if len(token) > MAX_TOKEN:
            raise BadToken(f"longer than {MAX_TOKEN} characters")
        return self._issuer.prove(token)

    async def _session_of(self, token: str) -> Session:
        """Return the session of a token that was good until it was ended; raises BadToken."""
        session = self._proven(token)
        if session is None:
            session = await self._session_store.find_token(digest_of(token))
            if session is None:
                raise NotRecorded("not handed out here, or expired, or revoked")
        return session

    async def introspect(self, token: str, client: str) -> Session | None:
        """Return the session of a good token that was handed to this client; None otherwise."""
        try:
            session = self.check_at_once(token) or await self.check(token)
        except BadToken:
            return None
        return await self._if_of(client, session)

    async def _if_of(self, client: str, session: Session) -> Session | None:
        """Return the session if it is this client's."""
        if not session.client:  # it does not say whose it is: what is recorded does
            session = await self._session_store.find(session.session_id) or session
        return session if session.client == client else None

    async def revoke(self, token: str, client: str) -> bool:
        """End the session of a token that was handed to this client; False otherwise.

        Again, if it was ended: the first time may have failed half-way.  Raises errors.StoreAway
        where nobody can know, ServiceUnavailable where it cannot be noted.
        """
        try:
            session = await self._session_of(token)
        except NotRecorded:
            recorded = await self._disown(token, client)
            if recorded is None:
                return False
            session = recorded
        except BadToken:
            return False
        mine = await self._if_of(client, session)
        if mine is None:
            return False
        await self._end(mine, by_client=True)
        return True

    async def _disown(self, token: str, client: str) -> Session | None:
        try:
            return await self._session_store.disown(digest_of(token), client)
        except SessionsFull:
            raise ServiceUnavailable(
                "too many tokens that are not on record were to be ended within an hour; end those"
                " that were handed out, or try again later",
                FULL_WAIT,
            ) from None


def digest_of(token: str) -> bytes:
    """Return the SHA-256 by which a token is recorded: the token itself is not kept twice."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
