"""What happens to sessions when the shared store does not answer: written here, once.

"There is none" and "I cannot know" are two answers, and only the server can give the first: without
it nobody is told that a session or a token is unknown, but 503.

`local`: this replica goes on with the tokens and ends that it knows itself.  A token that is signed
still proves itself; one of the vendor's is known to the replica that handed it out.  `closed`:
whoever asks is told 503.  To look at a session, to list them and to end one needs the server in
either case: an end that only one replica knows would be none, and one that was ended elsewhere
would be shown as live.

Coming back: what is recorded meanwhile is unknown to operators and to other replicas, so it is
written as soon as the server can be reached, a few at a time, and what is left of it on drain.
Until then another replica may be asked to end a token of which the server has no record: it leaves
a note (`disown`), and whoever writes the record ends the session.  Each writes first and looks
afterwards, so that one of the two sees the other.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from itertools import islice

from typing_extensions import override

from broker.errors import ServiceUnavailable, SessionTaken, StoreAway
from broker.model import Session
from broker.sessions.admin import RevokesVisitors
from broker.sessions.base import Place, Query, SessionsFull, SessionStore
from broker.sessions.memory import SLICE, MemorySessions
from broker.valkey.client.errors import StoreFailed
from broker.valkey.sessions import ValkeySessions

CATCH_UP = 1.0
"""Seconds between looks whether something is to be written still; while the breaker of the store is
open, such a look costs nothing."""

BATCH = 20
"""Sessions written at a time, about a hundred commands: visitors wait on the same connection."""

LAST_WORDS = 2.0
"""Seconds that a drain may take for it: some thousands of sessions."""


class SharedSessions(SessionStore):
    """The sessions on the server, and this replica's own while that is away.

    `alone` has what this replica handed out; `store` ends visitors on the same server.
    """

    def __init__(
        self, remote: ValkeySessions, alone: MemorySessions, store: RevokesVisitors, *, closed: bool
    ) -> None:
        self._remote = remote
        self._alone = alone
        self._store = store
        self._closed = closed
        self._unwritten: dict[str, None] = {}

    @override
    async def record(self, session: Session) -> None:
        await self._alone.record(session)
        try:
            await self._remote.record(session)
        except SessionTaken:
            await self._alone.forget(session)
            raise
        except StoreFailed as failed:
            self._require_open(failed)
            self._unwritten[session.session_id] = None

    @override
    async def find(self, session_id: str) -> Session | None:
        try:
            found = await self._remote.find(session_id)
        except StoreFailed as failed:
            raise StoreAway from failed  # known here or not, it may have been ended elsewhere
        return found or await self._only_here(await self._alone.find(session_id))

    @override
    async def find_token(self, digest: bytes) -> Session | None:
        try:
            found = await self._remote.find_token(digest)
        except StoreFailed as failed:
            self._require_open(failed)
            known = await self._alone.find_token(digest)
            if known is None:
                raise StoreAway from failed
            return known
        return found or await self._only_here(await self._alone.find_token(digest))

    @override
    async def disown(self, digest: bytes, client: str) -> Session | None:
        try:
            await self._remote.disown(digest, client)
            return await self._remote.find_token(digest)
        except StoreFailed as failed:
            raise StoreAway from failed

    @override
    async def page(self, query: Query, after: Place, limit: int) -> Sequence[Session]:
        try:
            return await self._remote.page(query, after, limit)
        except StoreFailed as failed:
            raise StoreAway from failed  # a part of a list would be taken for the whole

    @override
    async def mark(self, session: Session, *, by_client: bool) -> None:
        try:
            await self._remote.mark(session)
        except StoreFailed as failed:
            raise StoreAway from failed
        with contextlib.suppress(SessionsFull):  # ended for all; only an outage would miss it here
            await self._alone.mark(session, by_client=by_client)

    @override
    async def forget(self, session: Session) -> None:
        try:
            await self._remote.forget(session)
        except StoreFailed as failed:
            raise StoreAway from failed
        await self._alone.forget(session)
        self._unwritten.pop(session.session_id, None)

    @override
    async def ended(self, session_id: str) -> bool:
        try:
            return await self._remote.ended(session_id)
        except StoreFailed as failed:
            self._require_open(failed)
        return await self._alone.ended(session_id)

    def purge_expired(self) -> bool:
        """Give back some of what has expired: call it now and then; False if that was all."""
        for session_id in list(islice(self._unwritten, SLICE)):
            del self._unwritten[session_id]
            if session_id in self._alone:
                self._unwritten[session_id] = None  # behind those that were not looked at
        return self._alone.purge_expired()

    async def keep_written(self) -> None:
        """Write what could not be written, for ever; owned by whoever opens the store."""
        while True:
            await asyncio.sleep(CATCH_UP)
            await self.catch_up()

    async def close(self) -> None:
        """Write what is left, unless that takes too long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await self.catch_up()

    async def catch_up(self) -> None:
        """Write what could not be written; stops at the first that fails, for a later time."""
        while some := list(islice(self._unwritten, BATCH)):
            if not all(await asyncio.gather(*map(self._write, some))):
                return

    def __len__(self) -> int:
        return len(self._alone)

    async def _only_here(self, session: Session | None) -> Session | None:
        """Return a session that the server does not know because it was away, and tell it."""
        if session is None or session.session_id not in self._unwritten:
            return None
        await self._write(session.session_id)
        return await self._alone.find(session.session_id)

    async def _write(self, session_id: str) -> bool:
        """Write what is known here only; False if the server fails.

        Another replica may have ended the session while this one could not know, for a vendor gives
        one to both, or was asked to: what was ended stays so.  In this order, because it may be
        ended meanwhile.
        """
        session = await self._alone.find(session_id)
        if session is not None:
            try:
                await self._remote.record(session)
                if await self._remote.disowned(session):
                    await self.mark(session, by_client=True)
                    await self._store.revoke_visitor(
                        session.client, session.fingerprint, session.key
                    )
                if await self._remote.ended(session_id):
                    await self._remote.forget(session)
                    await self._alone.forget(session)
            except SessionTaken:  # given to two while nobody could tell: the other one has it
                await self._alone.forget(session)
            except (StoreFailed, ServiceUnavailable):
                return False  # counted
        self._unwritten.pop(session_id, None)
        return True

    def _require_open(self, failed: StoreFailed) -> None:
        if self._closed:
            raise StoreAway from failed

    @override
    def __repr__(self) -> str:
        return f"SharedSessions(closed={self._closed}, unwritten={len(self._unwritten)})"
