"""From the rows of a file to what is true now: the newest row first, so that what is found counts.

A token counts if its signer does, if its visitor was not ended after it, and as long as
`rules.durable` leaves it life; what was ended stays ended whatever the clock says.  A start does
this for 200,000 of them: each record is met once, and made into what is held at once.
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
    WrittenRecord,
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
    """What a start takes over, the newest first; times are those of this process."""

    tokens: dict[str, EmbedToken] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    buckets: dict[str, dict[str, int]] = field(default_factory=dict)
    """Microseconds until full, by limit and key."""

    @override
    def __repr__(self) -> str:
        return f"State(tokens={len(self.tokens)}, sessions={len(self.sessions)})"


class Worth(Struct, frozen=True, gc=False):
    """How long a row was of use when it was written, and which wall clock says when it is over.

    `left` is a span; `expires` the Unix second of a session's end, 0 for none.
    """

    written: Moment
    left: int
    expires: int
    has_end: bool

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
    """Applies batch after batch, the newest first; `state` says what is true then.

    `last` is the latest moment on record, of the first batch if it is not known before; `latest`
    the latest that was met: if that is later, a clock was set back in between, and what was applied
    is worth less than it seemed.
    """

    def __init__(self, terms: Terms, now: Moment, last: Moment | None = None) -> None:
        self._terms = terms
        self._now = now
        self._is_known = last is not None
        self.last = self.latest = last or Moment("", 0, 0)
        self._floors = dict[int, int]()  # the same for many
        self._tokens: dict[str, EmbedToken] = {}
        self._over = set[str]()  # keys whose newest token is not good
        self._ended = set[str]()
        self._sessions: dict[str, Session] = {}
        self._forgotten = set[str]()
        self._marks: dict[str, str] = {}
        self._buckets: dict[str, dict[str, int]] = {}

    def apply(self, batch: Batch) -> Worth:
        """Apply what one commit wrote before all that was applied; returns its row's worth."""
        written = batch.written
        if not self._is_known:
            self._is_known, self.last = True, written
        if written.wall > self.latest.wall:
            self.latest = written
        passed = age(written, self._now, self.last)
        sessions, left, expires, has_end = self._sessions, 0, 0, False
        for record in reversed(batch.records):
            if type(record) is TokenRow:  # half a microsecond less than `match` for all others
                left = max(left, record.left)
                self._apply_token(record, passed)
            elif type(record) is SessionRow:
                expires = max(expires, record.expires)
                session_id = record.session_id
                if session_id not in sessions and session_id not in self._forgotten:
                    sessions[session_id] = record.session()
            elif type(record) is BucketsRow:
                left = max(left, *record.left.values(), 0)
                self._apply_buckets(record, passed)
            else:
                has_end = True
                self._apply_end(record)
        return Worth(written, left, expires, has_end)

    def _apply_token(self, row: TokenRow, passed: int) -> None:
        key, lifetime, tokens = row.key, row.lifetime, self._tokens
        if key in tokens or key in self._over:
            return
        left = left_of(row.left, lifetime, passed)
        terms = self._terms
        if (
            left <= 0
            or row.origin not in terms.signer_ids
            or (self._ended and self._was_ended(key))
        ):
            self._over.add(key)
            return
        if len(tokens) >= terms.most:
            return
        floor = self._floors.get(lifetime)
        if floor is None:
            floor = self._floors[lifetime] = terms.floor(lifetime)
        now, mark = self._now, max(row.mark, floor)
        tokens[key] = EmbedToken(
            row.body, now.mono + left, now.wall + left, lifetime, mark, 0, 0, row.origin
        )

    def _was_ended(self, key: str) -> bool:
        """Whether the visitor of this key was ended later: ends of later rows are known by now."""
        client, _agent, fingerprint, _model = key.split(SEPARATOR)
        return visitor_of(client, fingerprint) in self._ended

    def _apply_buckets(self, row: BucketsRow, passed: int) -> None:
        table = self._buckets.setdefault(row.limit, {})
        for key, wait in row.left.items():
            table.setdefault(key, wait - passed)

    def _apply_end(self, record: WrittenRecord) -> None:
        match record:
            case SessionForgotten():
                self._forgotten.add(record.session_id)
            case SessionEnded():
                self._marks.setdefault(record.session_id, record.client)
            case VisitorEnded():
                self._ended.add(record.visitor)
            case _:
                raise AssertionError  # all others have been met

    def state(self) -> State:
        """Return what is true now; of tokens the latest `terms.most`."""
        for session_id in self._marks:
            self._sessions.pop(session_id, None)
        return State(self._tokens, self._sessions, self._marks, self._buckets)
