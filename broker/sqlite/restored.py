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
    BucketsRow,
    SessionEnded,
    SessionForgotten,
    SessionRow,
    TokenRow,
    VisitorEnded,
)
from broker.units import SECOND


class Terms(Struct, frozen=True):
    """What decides on tokens: whose are good, and how many are held.

    `floor` gives the floor for a lifetime: it may have been raised meanwhile.
    """

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


class Worth(Struct, gc=False):
    """For how long a row is of use: spans at its moment, and the Unix second of a session's end."""

    written: Moment
    left: int = 0
    expires: int = 0
    has_end: bool = False
    age: int = -1
    """Microseconds since then, once it is known."""

    def still(self, now: Moment, last: Moment) -> int:
        """Microseconds for which the row is still to be kept.

        One with an end stays its whole time where only a wall clock says how old it is: a clock
        that is ahead must not bring back what was ended.
        """
        written = self.written
        of_tokens = self.left - age(written, now, last)
        of_sessions = self.expires * SECOND - now.wall
        same = written.boot and written.boot == now.boot
        of_ends = MARK_LIFE - (now.mono - written.mono if same else 0)
        return max(of_tokens, of_sessions, of_ends if self.has_end else 0)


class Fold:
    """Applies batch after batch; `state` says what is true then."""

    def __init__(self) -> None:
        self._tokens: dict[str, tuple[TokenRow, int, Worth]] = {}
        self._ended: dict[str, int] = {}
        self._sessions: dict[str, Session] = {}
        self._marks: dict[str, str] = {}
        self._buckets: dict[str, dict[str, tuple[int, Moment]]] = {}
        self._number = 0
        self.last = Moment("", 0, 0)

    def apply(self, batch: Batch) -> Worth:
        """Apply what one commit wrote; returns for how long its row is of use."""
        written = batch.written
        worth = Worth(written)
        self.last = Moment("", 0, max(self.last.wall, written.wall))
        for record in batch.records:
            self._number += 1
            match record:
                case TokenRow():
                    self._tokens.pop(record.key, None)  # to the end: the order is that of minting
                    self._tokens[record.key] = record, self._number, worth
                    worth.left = max(worth.left, record.left)
                case SessionRow():
                    self._sessions.pop(record.session_id, None)  # to the end, as above
                    self._sessions[record.session_id] = record.session()
                    worth.expires = max(worth.expires, record.expires)
                case BucketsRow():
                    table = self._buckets.setdefault(record.limit, {})
                    table.update((key, (wait, written)) for key, wait in record.left.items())
                    worth.left = max(worth.left, *record.left.values(), 0)
                case _:
                    worth.has_end = True
                    self._apply_end(record)
        return worth

    def _apply_end(self, record: SessionForgotten | SessionEnded | VisitorEnded) -> None:
        match record:
            case SessionForgotten():
                self._sessions.pop(record.session_id, None)
            case SessionEnded():
                self._marks[record.session_id] = record.client
            case VisitorEnded():
                self._ended[record.visitor] = self._number

    def state(self, terms: Terms, now: Moment) -> State:
        """Return what is true now; of tokens the latest `terms.most`."""
        state = State(sessions=self._sessions, marks=self._marks)
        state.tokens = self._live_tokens(terms, now)
        for key in list(state.tokens)[: -terms.most]:
            del state.tokens[key]
        for session_id in self._marks:
            self._sessions.pop(session_id, None)
        for limit, table in self._buckets.items():
            state.buckets[limit] = {
                key: wait - age(written, now, self.last) for key, (wait, written) in table.items()
            }
        return state

    def _live_tokens(self, terms: Terms, now: Moment) -> dict[str, EmbedToken]:
        floors = dict[int, int]()  # the same for many
        tokens: dict[str, EmbedToken] = {}
        for key, (row, number, worth) in self._tokens.items():
            if row.origin not in terms.signer_ids or self._was_ended(key, number):
                continue
            if worth.age < 0:
                worth.age = age(worth.written, now, self.last)
            if row.lifetime not in floors:
                floors[row.lifetime] = terms.floor(row.lifetime)
            left = left_of(row.left, row.lifetime, worth.age)
            if left > 0:
                tokens[key] = EmbedToken(
                    body=row.body,
                    dies_mono=now.mono + left,
                    dies_wall=now.wall + left,
                    lifetime=row.lifetime,
                    mark=max(row.mark, floors[row.lifetime]),
                    origin=row.origin,
                )
        return tokens

    def _was_ended(self, key: str, number: int) -> bool:
        if not self._ended:
            return False
        client, _agent, fingerprint, _model = key.split(SEPARATOR)
        return self._ended.get(visitor_of(client, fingerprint), 0) > number
