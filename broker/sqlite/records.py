"""What is written: records of what happened, in the order in which it did.

A row of the file is a part of what one commit wrote: a list of records of one kind and the moment,
sealed as a whole (`broker.sealing`), with its place in the file as associated data.  So a row that
was copied to another place does not open, and nothing of tokens, fingerprints and client names can
be read.  Times are spans at that moment; `rules.durable` tells what is left of them later.
"""

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Struct
from typing_extensions import override

from broker.model import EmbedToken, Session
from broker.rules.durable import Moment
from broker.sealing import Box
from broker.sessions.base import MARK_LIFE
from broker.units import SECOND


class TokenKept(Struct, frozen=True, gc=False):
    """A token is held for reuse under this key, in place of any before it."""

    key: str
    token: EmbedToken

    @override
    def __repr__(self) -> str:
        return f"TokenKept({self.token!r})"


class SessionMade(Struct, frozen=True, gc=False):
    """A session is on record."""

    session: Session


class SessionForgotten(Struct, frozen=True, array_like=True, tag=3, gc=False):
    """It is no more."""

    session_id: str


class SessionEnded(Struct, frozen=True, array_like=True, tag=4, gc=False):
    """A session was ended."""

    session_id: str
    client: str


class VisitorEnded(Struct, frozen=True, array_like=True, tag=5, gc=False):
    """Every token of a visitor is over that is on record so far."""

    visitor: str

    @override
    def __repr__(self) -> str:
        return "VisitorEnded()"


class BucketsSpent(Struct, frozen=True):
    """Monotonic microseconds at which buckets are full, by key; later ones replace earlier ones.

    `whole`: this, and what is written with it, stands for all that was written before.
    """

    limit: str
    full_at: Mapping[str, int]
    whole: bool = False

    @override
    def __repr__(self) -> str:
        return f"BucketsSpent({self.limit!r}, buckets={len(self.full_at)})"


Record = TokenKept | SessionMade | SessionForgotten | SessionEnded | VisitorEnded | BucketsSpent
"""What is handed to the writer."""


class TokenRow(Struct, frozen=True, array_like=True, tag=1, gc=False):
    """`TokenKept` as it is written: what it has left, in place of moments of this process."""

    key: str
    body: bytes
    left: int
    lifetime: int
    mark: int
    origin: str

    @override
    def __repr__(self) -> str:
        return f"TokenRow(left={self.left})"


class SessionRow(Struct, frozen=True, array_like=True, tag=2, gc=False):
    """`SessionMade` as it is written."""

    session_id: str
    client: str
    agent: str
    fingerprint: str
    model: str
    issued: int
    expires: int
    digest: bytes

    def session(self) -> Session:
        """Return it as the noun; field by field, because a start does it 200,000 times."""
        return Session(
            self.session_id,
            self.client,
            self.agent,
            self.fingerprint,
            self.model,
            self.issued,
            self.expires,
            self.digest,
        )

    @override
    def __repr__(self) -> str:
        return f"SessionRow({self.session_id!r})"


class BucketsRow(Struct, frozen=True, array_like=True, tag=6):
    """`BucketsSpent` as it is written: microseconds until full, by key."""

    limit: str
    left: Mapping[str, int]
    whole: bool = False

    @override
    def __repr__(self) -> str:
        return f"BucketsRow({self.limit!r}, buckets={len(self.left)})"


WrittenRecord = TokenRow | SessionRow | SessionForgotten | SessionEnded | VisitorEnded | BucketsRow


class Batch(Struct, frozen=True, array_like=True):
    """What one commit wrote, and when."""

    moment: tuple[str, int, int]
    records: list[WrittenRecord]

    @property
    def written(self) -> Moment:
        """When it was written."""
        return Moment(*self.moment)

    @override
    def __repr__(self) -> str:
        return f"Batch(records={len(self.records)})"


class Kind(Struct, frozen=True, gc=False):
    """What a row is to those that cannot open it: how long it stays, and what may push it out."""

    number: int


MINTS, ENDS, BUCKETS = Kind(0), Kind(1), Kind(2)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Batch).decode


def kind_of(record: Record) -> Kind:
    """Return the kind of the row that this is written to."""
    if isinstance(record, SessionEnded | VisitorEnded):
        return ENDS
    return BUCKETS if isinstance(record, BucketsSpent) else MINTS


def life_of(records: Sequence[Record], moment: Moment) -> int:
    """Microseconds after which nothing of these is worth anything."""
    return max(_life_of(record, moment) for record in records)


def _life_of(record: Record, moment: Moment) -> int:
    match record:
        case TokenKept():
            return record.token.left(moment.mono, moment.wall)
        case SessionMade():
            return record.session.expires * SECOND - moment.wall
        case BucketsSpent():
            return max(record.full_at.values(), default=moment.mono) - moment.mono
        case SessionForgotten() | SessionEnded() | VisitorEnded():
            return MARK_LIFE  # longer than what it is about, which stands before it


def seal(box: Box, place: int, kind: Kind, moment: Moment, records: Sequence[Record]) -> bytes:
    """Return a row's content, for this place in the file only."""
    rows = [_row_of(record, moment) for record in records]
    plain = _encode(Batch((moment.boot, moment.mono, moment.wall), rows))
    return box.close(_bound_to(place, kind.number), plain)


def unseal(box: Box, place: int, kind: int, sealed: bytes) -> Batch | None:
    """Return what a row holds, None for one that is damaged or from elsewhere."""
    plain = box.open(_bound_to(place, kind), sealed)
    try:
        return None if plain is None else _decode(plain)
    except (ValueError, msgspec.DecodeError):
        return None


def _bound_to(place: int, kind: int) -> str:
    return f"row {place} of kind {kind}"


def _row_of(record: Record, moment: Moment) -> WrittenRecord:
    match record:
        case TokenKept():
            token = record.token
            return TokenRow(
                record.key,
                token.body,
                token.left(moment.mono, moment.wall),
                token.lifetime,
                token.mark,
                token.origin,
            )
        case SessionMade():
            session = record.session
            return SessionRow(
                session.session_id,
                session.client,
                session.agent,
                session.fingerprint,
                session.model,
                session.issued,
                session.expires,
                session.digest,
            )
        case BucketsSpent():
            now = moment.mono
            left = {key: max(full_at - now, 0) for key, full_at in record.full_at.items()}
            return BucketsRow(record.limit, left, record.whole)
        case _:
            return record
