"""From the rows of a file to what is true now: records are applied in the order of their writing.

A token counts if its signer does, if its visitor was not ended after it, and as long as
`rules.durable` leaves it life; what was ended stays ended whatever the clock says.
"""

from collections.abc import Callable

from msgspec import Struct, field
from typing_extensions import override

from broker.model import SEPARATOR, EmbedToken, Session, visitor_of
from broker.rules.durable import Moment, age, left_of
from broker.sessions.base import MARK_LIFE
from broker.sqlite.records import (
    Batch,
    BucketsSpent,
    SessionEnded,
    SessionForgotten,
    SessionRow,
    TokenRow,
    VisitorEnded,
    WrittenRecord,
)
from broker.units import SECOND


class Terms(Struct, frozen=True):
    """What decides on tokens: whose are good, the floor for a lifetime (it may have been raised),
    and how many are held."""  # noqa: D205, D209 - one sentence

    signer_ids: frozenset[str]
    floor: Callable[[int], int]
    most: int


class State(Struct):
    """What a start takes over; times are those of this process."""

    tokens: dict[str, EmbedToken] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    buckets: dict[str, dict[str, int]] = field(default_factory=dict)
    """Microseconds until full, by limit and key."""

    @override
    def __repr__(self) -> str:
        return f"State(tokens={len(self.tokens)}, sessions={len(self.sessions)})"


class Fold:
    """Applies batch after batch; `state` says what is true then."""

    def __init__(self) -> None:
        self._tokens: dict[str, tuple[TokenRow, int, Moment]] = {}
        self._ended: dict[str, int] = {}
        self._sessions: dict[str, Session] = {}
        self._marks: dict[str, str] = {}
        self._buckets: dict[str, dict[str, tuple[int, Moment]]] = {}
        self._number = 0
        self.last = Moment("", 0, 0)

    def apply(self, batch: Batch) -> None:
        """Apply what one commit wrote."""
        written = batch.written
        self.last = Moment("", 0, max(self.last.wall, written.wall))
        for record in batch.records:
            self._number += 1
            match record:
                case TokenRow():
                    self._tokens.pop(record.key, None)  # to the end: the order is that of minting
                    self._tokens[record.key] = record, self._number, written
                case SessionRow():
                    self._sessions[record.session_id] = record.session()
                case SessionForgotten():
                    self._sessions.pop(record.session_id, None)
                case SessionEnded():
                    self._marks[record.session_id] = record.client
                case VisitorEnded():
                    self._ended[record.visitor] = self._number
                case BucketsSpent():
                    table = self._buckets.setdefault(record.limit, {})
                    table.update((key, (wait, written)) for key, wait in record.waits.items())

    def state(self, terms: Terms, now: Moment) -> State:
        """Return what is true now; of tokens the latest `terms.most`."""
        state = State(sessions=self._sessions, marks=self._marks)
        for key, (row, number, written) in self._tokens.items():
            if row.origin not in terms.signer_ids or self._was_ended(key, number):
                continue
            left = left_of(row.left, row.lifetime, age(written, now, self.last))
            if left > 0:
                state.tokens[key] = EmbedToken(
                    body=row.body,
                    dies_mono=now.mono + left,
                    dies_wall=now.wall + left,
                    lifetime=row.lifetime,
                    mark=max(row.mark, terms.floor(row.lifetime)),
                    origin=row.origin,
                )
        for key in list(state.tokens)[: -terms.most]:
            del state.tokens[key]
        for session_id in self._marks:
            self._sessions.pop(session_id, None)
        for limit, table in self._buckets.items():
            state.buckets[limit] = {
                key: wait - age(written, now, self.last) for key, (wait, written) in table.items()
            }
        return state

    def _was_ended(self, key: str, number: int) -> bool:
        if not self._ended:
            return False
        client, _agent, fingerprint, _model = key.split(SEPARATOR)
        return self._ended.get(visitor_of(client, fingerprint), 0) > number


def lifetime_of(batch: Batch, now: Moment, last: Moment) -> int:
    """Microseconds for which a row is still to be kept.

    One with an end stays its whole time where only a wall clock says how old it is: a clock that is
    ahead must not bring back what was ended.
    """
    written = batch.written
    passed = age(written, now, last)
    by_mono = now.mono - written.mono if written.boot and written.boot == now.boot else 0

    def life_of(record: WrittenRecord) -> int:
        match record:
            case TokenRow():
                return record.left - passed
            case SessionRow():
                return record.expires * SECOND - now.wall
            case BucketsSpent():
                return max(record.waits.values(), default=0) - passed
            case SessionForgotten() | SessionEnded() | VisitorEnded():
                return MARK_LIFE - by_mono

    return max(map(life_of, batch.records))
