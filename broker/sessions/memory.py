"""The book of one process: records in the order of minting, and marks in two generations.

Bounded: beyond `most` sessions the oldest record of the client that has most of them goes, so that
none pushes out another's; the oldest is the one nearest to its expiry.  A signed token of it is
still good, and can still be ended by the token itself.  Marks are never dropped early; beyond
`MOST_ENDED` nothing more can be ended.  A client may end as long as it has fewer marks than are
free: one gets half of them, k at once a k+1st each, and as much is always left to the operator and
to whoever comes next.
"""

import asyncio
import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice

from typing_extensions import override

from broker.errors import SessionTaken
from broker.model import Clock, Session
from broker.sessions.base import MARK_LIFE, BookFull, Place, Query, SessionStore, place_of
from broker.units import SECOND

MOST_ENDED = 1_000_000
"""Ended sessions that are remembered, about 150 bytes each: far more than anybody ends in an
hour by hand, and a bound for those who have a machine do it."""

_Order = OrderedDict[str, None]
"""Ids of a client's sessions in the order of minting; a dict would be slow at its front."""

_SLICE = 2_000
"""Records looked at before others get their turn: under a millisecond."""


class MemorySessions(SessionStore):
    """Sessions of this process."""

    def __init__(self, most: int, clock: Clock, most_ended: int = MOST_ENDED) -> None:
        self._most = most
        self._most_ended = most_ended
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._orders: dict[str, _Order] = {}
        self._by_digest: dict[bytes, str] = {}
        self._young: dict[str, str] = {}
        self._old: dict[str, str] = {}
        self._marks_of: Counter[str] = Counter()
        self._turns = clock.mono() + MARK_LIFE

    @override
    async def record(self, session: Session) -> None:
        for other_id in (session.session_id, self._by_digest.get(session.digest, "")):
            other = await self.find(other_id)
            if other is not None and other.key != session.key:
                raise SessionTaken
        self._forget(session.session_id)  # or it would keep its place in the order
        if len(self._sessions) >= self._most:
            most = max(self._orders, key=lambda client: len(self._orders[client]))
            self._forget(next(iter(self._orders[most])))
        self._write(session)

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
        everything = iter(list(self._sessions.values()))
        while some := list(islice(everything, _SLICE)):
            beyond = (s for s in some if query.wants(s) and place_of(s) > after and self._lives(s))
            found = heapq.nsmallest(limit, (*found, *beyond), key=place_of)
            await asyncio.sleep(0)
        return found

    @override
    async def mark(self, session: Session, *, by_client: bool) -> None:
        if await self.ended(session.session_id):
            return
        free = self._most_ended - len(self._young) - len(self._old)
        if free <= (self._marks_of[session.client] if by_client else 0):
            raise BookFull
        self._young[session.session_id] = session.client
        self._marks_of[session.client] += 1

    @override
    async def forget(self, session: Session) -> None:
        self._forget(session.session_id)

    @override
    async def ended(self, session_id: str) -> bool:
        return session_id in self._young or session_id in self._old

    @property
    def marks(self) -> Mapping[str, str]:
        """The client of every session that was ended and not forgotten since."""
        return self._old | self._young

    @property
    def ids(self) -> AbstractSet[str]:
        """The id of every record that is held."""
        return self._sessions.keys()

    @property
    def sessions(self) -> Iterable[Session]:
        """Every record that is held."""
        return self._sessions.values()

    def restore(self, sessions: Iterable[Session], marks: Mapping[str, str]) -> None:
        """Take over what another process had."""
        for session in islice(sessions, self._most):
            if self._lives(session):
                self._write(session)
        self._young.update(marks)
        self._marks_of.update(marks.values())

    def purge_expired(self) -> None:
        """Give back what has expired: call it now and then."""
        for order in list(self._orders.values()):
            while order and not self._lives(self._sessions[next(iter(order))]):
                self._forget(next(iter(order)))
        now = self._clock.mono()
        if now >= self._turns:
            self._young, self._old = {}, self._young
            self._marks_of = Counter(self._old.values())
            self._turns = now + MARK_LIFE

    def _lives(self, session: Session) -> bool:
        return self._clock.wall() < session.expires * SECOND

    def _write(self, session: Session) -> None:
        self._sessions[session.session_id] = session
        self._orders.setdefault(session.client, OrderedDict())[session.session_id] = None
        if session.digest:
            self._by_digest[session.digest] = session.session_id

    def _forget(self, session_id: str) -> None:
        session = self._sessions.pop(session_id, None)
        if session is None:
            return
        order = self._orders[session.client]
        del order[session_id]
        if not order:
            del self._orders[session.client]
        if self._by_digest.get(session.digest) == session_id:
            del self._by_digest[session.digest]

    def __len__(self) -> int:
        return len(self._sessions)

    @override
    def __repr__(self) -> str:
        return f"MemorySessions(sessions={len(self)}, ended={len(self._young) + len(self._old)})"
