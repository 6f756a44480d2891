"""G11, G9: what a start makes of the rows, for any history: as if it had been lived once more."""

from hypothesis import given
from hypothesis import strategies as st

from broker.model import EmbedToken, Session, token_key, visitor_of
from broker.rules.durable import Moment, age
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
from broker.sqlite.restored import Fold, State, Terms, Worth
from broker.units import SECOND

NAMES = st.sampled_from("abc")
NOW = Moment("boot", 500 * SECOND, 1_000 * SECOND)
MOST = 2
LIFE = 300 * SECOND


def key_of(name: str) -> str:
    """The key of a visitor's token."""
    return token_key("web", "agent", name, "")


RECORDS: st.SearchStrategy[WrittenRecord] = st.one_of(
    st.builds(
        TokenRow,
        key=NAMES.map(key_of),
        body=st.binary(max_size=2),
        left=st.integers(0, 200).map(lambda seconds: seconds * SECOND),
        lifetime=st.just(LIFE),
        mark=st.integers(0, 9),
        origin=st.sampled_from(["us", "us", "gone"]),
    ),
    st.builds(
        SessionRow,
        session_id=NAMES,
        client=st.just("web"),
        agent=st.just("agent"),
        fingerprint=NAMES,
        model=st.just(""),
        issued=st.integers(0, 9),
        expires=st.integers(900, 1100),
        digest=st.just(b""),
    ),
    st.builds(SessionForgotten, NAMES),
    st.builds(SessionEnded, NAMES, NAMES),
    st.builds(VisitorEnded, NAMES.map(lambda name: visitor_of("web", name))),
    st.builds(
        BucketsRow,
        limit=NAMES,
        left=st.dictionaries(NAMES, st.integers(0, 100).map(lambda seconds: seconds * SECOND)),
    ),
)
MOMENTS = st.builds(
    lambda boot, mono, wall: (boot, mono * SECOND, wall * SECOND),
    st.sampled_from(["boot", "earlier", ""]),
    st.integers(0, 500),
    st.integers(0, 1100),
)
HISTORIES = st.lists(st.builds(Batch, MOMENTS, st.lists(RECORDS, max_size=4)), max_size=8)
TERMS = Terms(frozenset({"us"}), lambda _lifetime: 4, MOST)


class Lived:
    """A process that lived through it, from the begin."""

    def __init__(self, history: list[Batch]) -> None:
        walls = [batch.written for batch in history]
        self.last = max(walls, key=lambda at: at.wall, default=NOW)
        self.state = State()
        self.newest: dict[str, tuple[TokenRow, int] | None] = {}
        for batch in history:
            passed = age(batch.written, NOW, self.last)
            for record in batch.records:
                self.meet(record, passed)
        for session_id in self.state.marks:
            self.state.sessions.pop(session_id, None)
        self.hold()

    def meet(self, record: WrittenRecord, passed: int) -> None:
        state = self.state
        match record:
            case TokenRow():
                self.newest.pop(record.key, None)
                self.newest[record.key] = record, passed
            case SessionRow():
                state.sessions.pop(record.session_id, None)
                state.sessions[record.session_id] = record.session()
            case SessionForgotten():
                state.sessions.pop(record.session_id, None)
            case SessionEnded():
                state.marks[record.session_id] = record.client
            case VisitorEnded():
                over = [name for name in "abc" if visitor_of("web", name) == record.visitor]
                self.newest.update(dict.fromkeys(map(key_of, over)))
            case BucketsRow():
                table = state.buckets.setdefault(record.limit, {})
                table.update((key, wait - passed) for key, wait in record.left.items())

    def hold(self) -> None:
        """Hold what is good, as much as fits."""
        tokens = self.state.tokens
        for key, found in self.newest.items():
            row, passed = found or (None, 0)
            if row is not None and row.origin == "us" and row.left > passed:
                tokens[key] = EmbedToken(
                    body=row.body,
                    dies_mono=NOW.mono + row.left - passed,
                    dies_wall=NOW.wall + row.left - passed,
                    lifetime=LIFE,
                    mark=max(row.mark, 4),
                    origin="us",
                )
        for key in list(tokens)[:-MOST]:
            del tokens[key]


def folded(history: list[Batch]) -> State:
    """Go through it as a start does."""
    fold = Fold(TERMS, NOW)
    for batch in reversed(history):
        fold.apply(batch)
    if fold.latest.wall > fold.last.wall:
        fold = Fold(TERMS, NOW, fold.latest)
        for batch in reversed(history):
            fold.apply(batch)
    return fold.state()


@given(history=HISTORIES)
def test_G11_the_newest_first_comes_to_the_same(history: list[Batch]) -> None:
    """Tokens, sessions, ends and buckets, and the order in which they came."""
    there, here = Lived(history).state, folded(history)
    assert list(reversed(here.tokens.items())) == list(there.tokens.items())
    assert list(reversed(here.sessions.items())) == list(there.sessions.items())
    assert here.marks == there.marks
    assert here.buckets == there.buckets
    assert all(isinstance(session, Session) for session in here.sessions.values())


def test_G9_an_end_is_kept_its_whole_time_where_nobody_can_tell_its_age() -> None:
    """Machines that restarted count from elsewhere: an end is not older for that, or younger."""
    minute, day = 60 * SECOND, 24 * 3600 * SECOND
    worth = Worth(Moment("a", day, day), 0, 0, has_end=True)
    for boot, mono, left in (
        ("a", day + minute, MARK_LIFE - minute),
        ("b", day + minute, MARK_LIFE),
        ("b", minute, MARK_LIFE),
        ("", day + minute, MARK_LIFE),
    ):
        now = Moment(boot, mono, day + minute)
        assert worth.still(now, worth.written) == left
