"""The store and the sessions of one process, with a file behind them.

Everything is decided in memory, by what these are made from; here it is told to the writer, in the
order in which it happened.  A hit tells nothing and waits for nothing.  A token of the vendor's is
in the file before it is handed out, with its session, which is told before it; one that was signed
here is not waited for.  An end is on the disk before it is answered: it holds in memory first, so
an end that cannot be written holds as long as the process.
"""

from collections.abc import Sequence

from typing_extensions import override

from broker.errors import NotDurable, NotEnded
from broker.limits.policy import Limits
from broker.model import Clock, EmbedToken, Session, TokenRequest, visitor_of
from broker.sessions.memory import MemorySessions
from broker.sqlite.records import (
    Other,
    SessionEnded,
    SessionForgotten,
    SessionMade,
    TokenKept,
    VisitorEnded,
)
from broker.sqlite.writer import Writer
from broker.stores.base import Kept, Lease
from broker.stores.memory import MemoryStore
from broker.stores.token_cache import TokenCache
from broker.tables import Generations
from broker.telemetry.cells import Counter
from broker.telemetry.metrics import Metrics

MOST_TOLD = 50_000
"""Visitors, the latest, and as many again, of whom is known that their end is in the file or waits
for it, and no token after it: all whose end may wait (`writer.WAITING_ENDS`)."""


class WriterSlot:
    """The writer, once the file is open: nothing is asked of a store before."""

    def __init__(self) -> None:
        self._writer: Writer | None = None

    def fill(self, writer: Writer) -> None:
        """Write to the file from now on."""
        self._writer = writer

    @property
    def writer(self) -> Writer:
        """The writer."""
        assert self._writer is not None  # `open` comes before the first request
        return self._writer

    def add_all(self, records: Sequence[Other]) -> None:
        """Write these soon, in one commit."""
        self.writer.add_all(records)

    @property
    def is_filled(self) -> bool:
        """Whether the file is open."""
        return self._writer is not None


class DurableStore(MemoryStore):
    """The store.

    `waits`: whether a token is handed out only when it is in the file; those that were not are
    counted.
    """

    def __init__(
        self,
        limits: Limits,
        tokens: TokenCache,
        clock: Clock,
        metrics: Metrics,
        slot: WriterSlot,
        *,
        waits: bool,
    ) -> None:
        super().__init__(limits, tokens, clock, metrics.limits.counts)
        self._slot = slot
        self.waits = waits
        self._late: Counter = metrics.state_file.late
        self._ends_told: Generations[str, bool] = Generations(MOST_TOLD)

    @override
    async def keep(self, request: TokenRequest, key: str, token: EmbedToken, lease: Lease) -> Kept:
        if self.waits and self._epochs.holds(request.visitor, lease.epoch):
            self._tell_kept(request.visitor, key, token)
            await self._settle()
        kept = await super().keep(request, key, token, lease)  # it may be over by now
        if not self.waits and kept is Kept.KEPT:
            self._tell_kept(request.visitor, key, token)
        return kept

    @override
    def keep_at_once(self, request: TokenRequest, key: str, token: EmbedToken, now: int) -> None:
        super().keep_at_once(request, key, token, now)
        self._tell_kept(request.visitor, key, token)

    def _tell_kept(self, visitor: str, key: str, token: EmbedToken) -> None:
        self._ends_told.discard(visitor)
        self._slot.writer.add(TokenKept(key, token))

    @override
    async def release(self, request: TokenRequest, key: str, lease: Lease) -> bool:
        if self.waits:
            await self._settle()  # its session is told already
        return await super().release(request, key, lease)

    @override
    async def revoke_visitor(self, client: str, fingerprint: str, *keys: str) -> None:
        """As the store in memory does; raises NotDurable if a restart would forget it.

        What is ended again, with no token in between, takes no room in the file a second time.
        """
        await super().revoke_visitor(client, fingerprint, *keys)
        visitor = visitor_of(client, fingerprint)
        if not self._ends_told.find(visitor) or self._slot.writer.gave_up:
            self._ends_told[visitor] = True
            self._slot.writer.add_end(VisitorEnded(visitor))
        if not await self._slot.writer.end_written():
            raise NotDurable

    async def _settle(self) -> None:
        if not await self._slot.writer.mint_written():
            self._late.inc()


class DurableSessions(MemorySessions):
    """Sessions that survive the process."""

    def __init__(self, most: int, clock: Clock, slot: WriterSlot) -> None:
        super().__init__(most, clock)
        self._slot = slot

    @override
    def record_at_once(self, session: Session) -> None:
        super().record_at_once(session)
        self._slot.writer.add(SessionMade(session))

    @override
    async def mark(self, session: Session, *, by_client: bool) -> None:
        """As the sessions in memory do; what is ended again is told once.

        Raises NotEnded, NotDurable for one that was ended, while as many ends as may wait for the
        disk.  `DurableStore.revoke_visitor` follows, and waits for both.
        """
        writer, is_new = self._slot.writer, not await self.ended(session.session_id)
        if not writer.takes_end(by_client=by_client):
            raise NotEnded if is_new else NotDurable
        await super().mark(session, by_client=by_client)
        if is_new or writer.gave_up:
            writer.add_end(SessionEnded(session.session_id, session.client))

    @override
    async def forget(self, session: Session) -> None:
        is_known = session.session_id in self._sessions
        await super().forget(session)
        if is_known:
            self._slot.writer.add(SessionForgotten(session.session_id))
