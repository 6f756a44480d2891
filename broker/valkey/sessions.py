"""The sessions that replicas share, on a server of the Redis protocol.

A record lies, sealed, under a name made of its session's id, and one that is looked for by its
token also under a name made of the token's digest.  Each name has a slot of its own, so a cluster
spreads them, and is gone with its session.  Lists, one an agent and one a fingerprint, are ids in
the order of expiry; they may name what is gone, for they are read with the records.  Fingerprints
and tokens are in no name: they go into it as HMAC.

Every method raises StoreFailed: what happens then is `shared`'s affair.
"""

import asyncio
from collections.abc import Sequence

import msgspec
from typing_extensions import override

from broker.errors import SessionTaken
from broker.model import Clock, Session
from broker.sealing import Box
from broker.sessions.base import MARK_LIFE, MOST_DISOWNED, Place, Query, SessionsFull, place_of
from broker.units import SECOND
from broker.valkey.client.errors import Reason, StoreFailed, number
from broker.valkey.client.guarded import Operation, StoreClient
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script, command
from broker.valkey.client.shapes import COUNTED, GET, SET, SET_IF_NEW, Shape
from broker.valkey.key_names import Names
from broker.valkey.leases import texts

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Session).decode


class ValkeySessions:
    """Sessions on a server; `most` is how many a list may have."""

    def __init__(
        self,
        server: StoreClient,
        names: Names,
        box: Box,
        most: int,
        clock: Clock,
        most_disowned: int = MOST_DISOWNED,
    ) -> None:
        self._server = server
        self._names = names
        self._box = box
        self._most = most
        self._most_disowned = most_disowned
        self._clock = clock

    async def record(self, session: Session) -> None:
        """Write a session down, under each of its names and in both of its lists.

        A name is claimed before anything is written over it, for two replicas may be given the
        same session at once.  Raises SessionTaken, with what was claimed given back.
        """
        left = session.expires * SECOND - self._clock.wall()
        if left <= 0:
            return
        names = self._names
        sealed = _encode(session)
        keys = [names.session(session.session_id)]
        if session.digest:
            keys.append(names.handed_out(session.digest))
        values = [self._box.close(key.decode(), sealed) for key in keys]
        claims = await asyncio.gather(
            *(self._claim(key, value, left) for key, value in zip(keys, values, strict=True))
        )
        if any(holder is not None and holder.key != session.key for _, holder in claims):
            for key, (is_ours, _) in zip(keys, claims, strict=True):
                if is_ours:
                    _ = await self._command(COUNTED, key, b"DEL", key)
            raise SessionTaken
        lists = (names.of_agent(session.agent), names.of_visitor(session.fingerprint))
        await asyncio.gather(
            *(
                self._put(key, value, left)
                for key, value, (is_ours, _) in zip(keys, values, claims, strict=True)
                if not is_ours
            ),
            *(self._enlist(key, session, left) for key in lists),
        )

    async def find(self, session_id: str) -> Session | None:
        """Return a live session by its id."""
        return await self._read(self._names.session(session_id))

    async def find_token(self, digest: bytes) -> Session | None:
        """Return a live session by its token's SHA-256."""
        return await self._read(self._names.handed_out(digest)) if digest else None

    async def disown(self, digest: bytes, client: str) -> None:
        """Remember that a client wants a token ended of which there is no record.

        Raises BookFull for a client with too many of them.
        """
        noted = await self._server.run(
            Operation.SESSION,
            Script.DISOWN,
            (self._names.disowned(client, digest), self._names.all_disowned(client)),
            b"%d" % self._most_disowned,
            b"%d" % MARK_LIFE,
        )
        if noted != 1:
            raise SessionsFull

    async def disowned(self, session: Session) -> bool:
        """Whether its client wanted its token ended before it was written down."""
        if not session.digest:
            return False
        key = self._names.disowned(session.client, session.digest)
        return await self._command(GET, key, b"GET", key) is not None

    async def page(self, query: Query, after: Place, limit: int) -> Sequence[Session]:
        """Return live sessions beyond a place; lists name some that are gone, so it reads on."""
        names = self._names
        listed = (
            names.of_visitor(query.fingerprint)
            if query.fingerprint
            else names.of_agent(query.agent)
        )
        found: list[Session] = []
        left = 2 * self._most + limit  # it grows while it is read, but not for ever
        while len(found) < limit:
            places = await self._places(listed, after, limit)
            if not places:
                break
            after, left = places[-1], left - len(places)
            if left < 0:
                raise StoreFailed(Reason.OTHER, "a list without end")
            sessions = await asyncio.gather(*(self.find(place.session_id) for place in places))
            found += [
                session
                for session, place in zip(sessions, places, strict=True)
                if session is not None and query.wants(session) and place_of(session) == place
            ]
        return found[:limit]

    async def mark(self, session: Session) -> None:
        """Remember that a session was ended."""
        await self._put(self._names.ended(session.session_id), b"1", MARK_LIFE)

    async def forget(self, session: Session) -> None:
        """Drop the record of a session.

        What a client finds it by goes last: if the server fails in between, the client's next try
        completes it, and no list shows a session that is over.
        """
        names = self._names
        gone = [names.session(session.session_id)]
        if session.digest:
            gone.append(names.handed_out(session.digest))
        for key in gone:
            _ = await self._command(COUNTED, key, b"DEL", key)

    async def ended(self, session_id: str) -> bool:
        """Whether this session was ended: anything in the mark's place is one."""
        key = self._names.ended(session_id)
        try:
            return await self._command(GET, key, b"GET", key) is not None
        except StoreFailed as failed:
            if failed.is_foreign:
                return True
            raise

    async def _claim(self, key: bytes, value: bytes, life: int) -> tuple[bool, Session | None]:
        """Write where there is nothing; returns whether that was so, and whose live record it is.

        What nobody of ours wrote is nobody's, and may be written over.
        """
        lasts = b"%d" % -(-life // 1000)
        try:
            old = await self._command(
                SET_IF_NEW, key, b"SET", key, value, b"NX", b"GET", b"PX", lasts
            )
        except StoreFailed as failed:
            if failed.is_foreign:
                return False, None
            raise
        return old is None, self._opened(key, old)

    async def _put(self, key: bytes, value: bytes, life: int) -> None:
        _ = await self._command(SET, key, b"SET", key, value, b"PX", b"%d" % -(-life // 1000))

    async def _enlist(self, key: bytes, session: Session, left: int) -> None:
        _ = await self._server.run(
            Operation.SESSION,
            Script.LIST,
            (key,),
            b"%d" % session.expires,
            session.session_id.encode(),
            b"%d" % self._most,
            b"%d" % left,
        )

    async def _places(self, listed: bytes, after: Place, limit: int) -> list[Place]:
        expires, session_id = b"%d" % after.expires, after.session_id.encode()
        reply = await self._server.run(
            Operation.SESSION, Script.PAGE, (listed,), expires, session_id, b"%d" % limit
        )
        told = texts(reply)
        places = [
            Place(number(when), name.decode("utf-8", "replace"))
            for when, name in zip(told[::2], told[1::2], strict=False)
        ]
        if len(places) > limit or (places and places[-1] <= after):
            raise StoreFailed(Reason.OTHER, "a page that leads nowhere")
        return places

    async def _read(self, key: bytes) -> Session | None:
        try:
            sealed = await self._command(GET, key, b"GET", key)
        except StoreFailed as failed:
            if failed.is_foreign:  # nobody of ours wrote it: no record, like one that does not open
                return None
            raise
        return self._opened(key, sealed)

    def _opened(self, key: bytes, sealed: Reply) -> Session | None:
        """Return the live session that a value holds, None for anything else."""
        plain = self._box.open(key.decode(), sealed) if isinstance(sealed, bytes) else None
        if plain is None:
            return None
        try:
            session = _decode(plain)
        except msgspec.DecodeError:  # of another version
            return None
        return session if self._clock.wall() < session.expires * SECOND else None

    async def _command(self, shape: Shape, key: bytes, *parts: bytes) -> Reply:
        return await self._server.command(Operation.SESSION, key, command(*parts), shape)

    @override
    def __repr__(self) -> str:
        return f"ValkeySessions({self._server!r})"
