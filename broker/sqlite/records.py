"""What is written: records of what happened, in the order in which it did.

A row of the file is a part of what one commit wrote: a list of records of one kind and the moment,
sealed as a whole (`broker.sealing`), with its place in the file as associated data.  So a row that
was copied to another place does not open, and nothing of tokens, fingerprints and client names can
be read.  Times are spans at that moment; `rules.durable` tells what is left of them later.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec
from msgspec import Struct
from typing_extensions import override

from broker.model import EmbedToken, Session
from broker.rules.durable import Moment
from broker.sealing import Box
from broker.sessions.base import MARK_LIFE
from broker.units import SECOND


class Kind(Struct, frozen=True, gc=False):
    """What a row is to those that cannot open it: how long it stays, and what may push it out."""

    number: int


MINTS, ENDS, BUCKETS = Kind(0), Kind(1), Kind(2)


class TokenKept(Struct, frozen=True, gc=False):
    """A token is held for reuse under this key, in place of any before it."""

    kind: ClassVar[Kind] = MINTS
    key: str
    token: EmbedToken

    def row(self, moment: Moment) -> "TokenRow":
        """Return it as it is written: what it has left, in place of moments of this process."""
        token = self.token
        left = token.left(moment.mono, moment.wall)
        return TokenRow(self.key, token.body, left, token.lifetime, token.mark, token.origin)

    @override
    def __repr__(self) -> str:
        return f"TokenKept({self.token!r})"


class SessionMade(Struct, frozen=True, gc=False):
    """A session is on record."""

    kind: ClassVar[Kind] = MINTS
    session: Session

    def row(self, _moment: Moment) -> "SessionRow":
        """Return it as it is written."""
        session = self.session
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


class SessionForgotten(Struct, frozen=True, array_like=True, tag=3, gc=False):
    """It is no more."""

    kind: ClassVar[Kind] = MINTS
    session_id: str

    def row(self, _moment: Moment) -> "SessionForgotten":
        """Return it as it is written: as it is."""
        return self

    def life(self, _moment: Moment) -> int:
        """Longer than what it is about, which stands before it."""
        return MARK_LIFE


class SessionEnded(Struct, frozen=True, array_like=True, tag=4, gc=False):
    """A session was ended."""

    kind: ClassVar[Kind] = ENDS
    session_id: str
    client: str

    def row(self, _moment: Moment) -> "SessionEnded":
        """Return it as it is written: as it is."""
        return self

    def life(self, _moment: Moment) -> int:
        """Longer than what it is about, which stands before it."""
        return MARK_LIFE


class VisitorEnded(Struct, frozen=True, array_like=True, tag=5, gc=False):
    """Every token of a visitor is over that is on record so far."""

    kind: ClassVar[Kind] = ENDS
    visitor: str

    def row(self, _moment: Moment) -> "VisitorEnded":
        """Return it as it is written: as it is."""
        return self

    def life(self, _moment: Moment) -> int:
        """Longer than what it is about, which stands before it."""
        return MARK_LIFE

    @override
    def __repr__(self) -> str:
        return "VisitorEnded()"


class BucketsSpent(Struct, frozen=True):
    """Monotonic microseconds at which buckets are full, by key; later ones replace earlier ones.

    `whole`: this, and what is written with it, stands for all that was written before.
    """

    kind: ClassVar[Kind] = BUCKETS
    limit: str
    full_at: Mapping[str, int]
    whole: bool = False

    def row(self, moment: Moment) -> "BucketsRow":
        """Return it as it is written: how long each takes to be full."""
        now = moment.mono
        left = {key: max(full_at - now, 0) for key, full_at in self.full_at.items()}
        return BucketsRow(self.limit, left, self.whole)

    @override
    def __repr__(self) -> str:
        return f"BucketsSpent({self.limit!r}, buckets={len(self.full_at)})"


End = SessionEnded | VisitorEnded
"""What must not be lost: that costs more than a mint."""

Other = TokenKept | SessionMade | SessionForgotten | BucketsSpent
"""What may be lost: beside an end nothing is made good again by forgetting a session."""

Record = End | Other
"""What is handed to the writer."""


class TokenRow(Struct, frozen=True, array_like=True, tag=1, gc=False):
    """`TokenKept` as it is written: what it has left, in place of moments of this process."""

    key: str
    body: bytes
    left: int
    lifetime: int
    mark: int
    origin: str

    def life(self, _moment: Moment) -> int:
        """Microseconds for which it is worth anything."""
        return self.left

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

    def life(self, moment: Moment) -> int:
        """Microseconds for which it is worth anything."""
        return self.expires * SECOND - moment.wall

    def session(self) -> Session:
        """Return it as the noun."""
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

    def life(self, _moment: Moment) -> int:
        """Microseconds for which it is worth anything."""
        return max(self.left.values(), default=0)

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


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Batch).decode


def seal(
    box: Box, place: int, kind: Kind, moment: Moment, records: Sequence[Record]
) -> tuple[bytes, int]:
    """Return a row's content, for this place in the file only, and its life.

    That is the microseconds after which nothing in it is worth anything.
    """
    rows = [record.row(moment) for record in records]
    plain = _encode(Batch((moment.boot, moment.mono, moment.wall), rows))
    life = max([row.life(moment) for row in rows])
    return box.close(_bound_to(place, kind.number), plain), life


def unseal(box: Box, place: int, kind: int, sealed: bytes) -> Batch | None:
    """Return what a row holds, None for one that is damaged or from elsewhere."""
    plain = box.open(_bound_to(place, kind), sealed)
    try:
        return None if plain is None else _decode(plain)
    except (ValueError, msgspec.DecodeError):
        return None


def _bound_to(place: int, kind: int) -> str:
    return f"row {place} of kind {kind}"
