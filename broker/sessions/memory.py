"""The session store of one process: records by the second of their expiry, marks in generations.

Bounded: beyond `most` sessions the record of the client that has most of them goes which is nearest
to its expiry, so that none pushes out another's.  A signed token of it is
still good, and can still be ended by the token itself.  Marks are never dropped early; beyond
`MOST_ENDED` nothing more can be ended.  A client may end as long as it has fewer marks than are
free: one gets half of them, k at once a k+1st each, and as much is always left to the operator and
to whoever comes next.

Nothing stops the loop, and the collector looks into nothing of it: see `broker.tables`.
"""

import asyncio
import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

from typing_extensions import override

from broker.errors import SessionTaken
from broker.model import Clock, Session
from broker.sessions.base import MARK_LIFE, Place, Query, SessionsFull, SessionStore, place_of
from broker.tables import BySecond, Leftovers, PartedDict
from broker.units import SECOND

MOST_ENDED = 1_000_000
"""Ended sessions that are remembered, about 150 bytes each: far more than anybody ends in an
hour by hand, and a bound for those who have a machine do it."""

SLICE = 250
"""Records and marks that housekeeping drops before others get their turn: a millisecond."""

FREED_AT_ONCE = 2
"""Marks that were given up which a new one frees: as fast as they can come."""


class MemorySessions(SessionStore):
    """Sessions of this process."""

    def __init__(self, most: int, clock: Clock, most_ended: int = MOST_ENDED) -> None:
        self._most = most
        self._most_ended = most_ended
        self._clock = clock
        self._sessions: PartedDict[str, Session] = PartedDict(most)
        self._held = 0
        self._orders: dict[str, BySecond[str]] = {}  # of a client, by their expiry
        self._by_digest: PartedDict[bytes, str] = PartedDict(most)
        self._young: PartedDict[str, str] = PartedDict(most_ended)
        self._old: PartedDict[str, str] = PartedDict(1)
        self._young_of: Counter[str] = Counter()
        self._old_of: Counter[str] = Counter()
        self._leftovers = Leftovers()
        self._turns = clock.mono() + MARK_LIFE

    @override
    async def record(self, session: Session) -> None:
        self.record_at_once(session)

    def record_at_once(self, session: Session) -> None:
        """Do what `record` does, where nothing of it waits."""
        session_id, digest = session.session_id, session.digest
        part = self._sessions.part(session_id)
        if digest or session_id in part:  # not so where ids are drawn here
            if self._is_anothers(session_id, session) or self._is_anothers(
                self._by_digest.get(digest) or "", session
            ):
                raise SessionTaken
            self._forget(session_id)  # or it would keep its place in the order
        if self._held >= self._most:
            most = max(self._orders, key=lambda client: len(self._orders[client]))
            self._forget(self._orders[most].first() or "")
        part[session_id] = session
        self._held += 1
        self._order_of(session.client).add(session_id, session.expires)
        if digest:
            self._by_digest[digest] = session_id

    def _is_anothers(self, session_id: str, session: Session) -> bool:
        other = self._sessions.get(session_id)
        return other is not None and other.key != session.key and self._lives(other)

    @override
    async def find(self, session_id: str) -> Session | None:
        session = self._sessions.get(session_id)
        return session if session is not None and self._lives(session) else None

    @override
    async def find_token(self, digest: bytes) -> Session | None:
        session_id = self._by_digest.get(digest)
        return None if session_id is None else await self.find(session_id)

    @override
    async def disown(self, digest: bytes, client: str) -> Session | None:
        return None  # what this process does not know, nobody will write later

    @override
    async def page(self, query: Query, after: Place, limit: int) -> Sequence[Session]:
        found: list[Session] = []
        for part in self._sessions.parts:
            everything = iter(list(part.values()))
            while some := list(islice(everything, SLICE)):
                found = heapq.nsmallest(
                    limit, chain(found, self._wanted(some, query, after)), key=place_of
                )
                await asyncio.sleep(0)
        return found

    def _wanted(self, sessions: Iterable[Session], query: Query, after: Place) -> Iterator[Session]:
        for session in sessions:
            if query.wants(session) and place_of(session) > after and self._lives(session):
                yield session

    @override
    async def mark(self, session: Session, *, by_client: bool) -> None:
        if await self.ended(session.session_id):
            return
        self._leftovers.free(FREED_AT_ONCE)
        theirs = self._young_of[session.client] + self._old_of[session.client]
        if self._most_ended - self.ended_count <= (theirs if by_client else 0):
            raise SessionsFull
        self._mark(session.session_id, session.client)

    @override
    async def forget(self, session: Session) -> None:
        self._forget(session.session_id)

    @override
    def knows_end(self, session_id: str) -> bool:
        return session_id in self._young or session_id in self._old

    @override
    async def ended(self, session_id: str) -> bool:
        return self.knows_end(session_id)

    @property
    def ended_count(self) -> int:
        """How many ended sessions are remembered."""
        return self._young_of.total() + self._old_of.total()

    def restore(self, sessions: Iterable[Session], marks: Mapping[str, str]) -> None:
        """Take over what another process had, before the first of one's own.

        Of sessions that live the latest that fit; no two have one id.  As one by one, in half the
        time: a start does it 200,000 times.
        """
        now, ids, digests = self._clock.wall(), self._sessions, self._by_digest
        for session in deque((it for it in sessions if now < it.expires * SECOND), self._most):
            session_id, digest = session.session_id, session.digest
            ids.parts[hash(session_id) & ids.mask][session_id] = session
            self._order_of(session.client).add(session_id, session.expires)
            if digest:
                digests.parts[hash(digest) & digests.mask][digest] = session_id
        self._held = len(ids)
        for session_id, client in marks.items():
            if session_id not in self._young:
                self._mark(session_id, client)

    def purge_expired(self) -> bool:
        """Give back some of what has expired: call it now and then; False if that was all."""
        self._leftovers.free(SLICE)
        now = self._clock.mono()
        if now >= self._turns:
            self._leftovers.add(self._old.parts)
            self._old, self._young = self._young, PartedDict(self._most_ended)
            self._old_of, self._young_of = self._young_of, Counter()
            self._turns = now + MARK_LIFE
        return self._drop_expired(SLICE) or bool(self._leftovers)

    def _drop_expired(self, most: int) -> bool:
        """Drop up to so many; False if there are no more."""
        for order in list(self._orders.values()):
            while (first := order.first()) and not self._lives(self._record_of(first)):
                if not most:
                    return True
                most -= 1
                self._forget(first)
        return False

    def _record_of(self, session_id: str) -> Session:
        return self._sessions.part(session_id)[session_id]

    def _lives(self, session: Session) -> bool:
        return self._clock.wall() < session.expires * SECOND

    def _mark(self, session_id: str, client: str) -> None:
        self._young[session_id] = client
        self._young_of[client] += 1

    def _order_of(self, client: str) -> BySecond[str]:
        order = self._orders.get(client)
        if order is None:
            order = self._orders[client] = BySecond()
        return order

    def _forget(self, session_id: str) -> None:
        session = self._sessions.pop(session_id)
        if session is None:
            return
        self._held -= 1
        order = self._orders[session.client]
        order.remove(session_id, session.expires)
        if not order:
            del self._orders[session.client]
        if self._by_digest.get(session.digest) == session_id:
            self._by_digest.pop(session.digest)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._sessions

    def __len__(self) -> int:
        return self._held

    @override
    def __repr__(self) -> str:
        return f"MemorySessions(sessions={len(self)}, ended={self.ended_count})"
