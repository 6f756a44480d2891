"""What every store of sessions promises.

A session is written down when its token is made and stays until the token has expired, whether the
token is still held for reuse or not.  Ending one removes the record and leaves a mark for as long
as any token of it could still be shown: a token that is signed proves itself, so that only the mark
tells that it is no longer good.  The mark comes first, the record goes last (see `admin`): an end
that failed half-way can be asked for again.  Methods are coroutines although memory needs none.
"""

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from broker.issuers.keyring import LEEWAY, MAX_LIFE
from broker.model import Session
from broker.units import SECOND

MARK_LIFE = (MAX_LIFE + 2 * LEEWAY) * SECOND
"""Microseconds for which an ended session is remembered: the longest life of a token, and the
leeway by which its begin and its expiry are forgiven."""

MOST_DISOWNED = 10_000
"""Tokens without a record that a client may want ended within an hour: more than a vendor's default
budget can make in that time (6,360), so a store that lost its records is made up for.  Anything can
be said to be a token, and each takes about 300 bytes of the store."""


class Place(Struct, frozen=True, order=True):
    """Where a listing goes on: after the session that expires then and has this id."""

    expires: int = 0
    session_id: str = ""


class Query(Struct, frozen=True):
    """Which sessions are wanted: of an agent, a visitor, or both; one of them has to be said."""

    agent: str = ""
    fingerprint: str = ""

    def wants(self, session: Session) -> bool:
        """Whether this one is."""
        return self.agent in ("", session.agent) and self.fingerprint in (
            "",
            session.fingerprint,
        )


class SessionsFull(Exception):
    """Nothing further can be ended: forgetting an earlier end would bring that one back."""


class SessionStore(Protocol):
    """Sessions from mint to expiry."""

    async def record(self, session: Session) -> None:
        """Write a session down until it expires.

        Raises errors.SessionTaken if its id or its token is on record for another client, agent,
        fingerprint or model: one of them would be handed the other's, and to end it for one would
        leave it to the other.
        """
        ...

    async def find(self, session_id: str) -> Session | None:
        """Return a session that was recorded, has not expired and was not forgotten.

        None is an answer, "there is none"; a store that cannot know raises errors.StoreAway.
        """
        ...

    async def find_token(self, digest: bytes) -> Session | None:
        """Return the same by the SHA-256 of its token, for those recorded with one."""
        ...

    async def disown(self, digest: bytes, client: str) -> Session | None:
        """Take note that a client wants a token ended of which no record is known.

        Whoever writes one later, because it could not when the token was made, ends its session.
        Returns the session if it was written meanwhile: then nothing else will end it.  Raises
        BookFull for a client that has MOST_DISOWNED such notes.
        """
        ...

    async def page(self, query: Query, after: Place, limit: int) -> Sequence[Session]:
        """Return up to `limit` live sessions beyond a place, by expiry and id."""
        ...

    async def mark(self, session: Session, *, by_client: bool) -> None:
        """Remember that a session was ended; raises BookFull, for a client earlier than for others.

        May be repeated.  The record stays.
        """
        ...

    async def forget(self, session: Session) -> None:
        """Drop the record of a session; may be repeated."""
        ...

    def knows_end(self, _session_id: str) -> bool | None:
        """Return what `ended` does, where it need not wait; None where it does."""
        return None

    async def ended(self, session_id: str) -> bool:
        """Whether this session was ended, for as long as a token of it could be shown."""
        ...


def place_of(session: Session) -> Place:
    """Return the place of this session in a listing."""
    return Place(session.expires, session.session_id)
