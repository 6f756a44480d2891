"""G6: which rows stay in a file, for any sequence of commits: bounded, and no end is pushed out."""

from hypothesis import given
from hypothesis import strategies as st

from broker.sqlite.ledger import Ledger, Row
from broker.sqlite.records import BUCKETS, ENDS, MINTS, Kind

KINDS = (MINTS, ENDS, BUCKETS)
COMMITS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(1, 100), st.integers(1, 20)), max_size=60
)


def drained(ledger: Ledger, now: int) -> list[tuple[int, int]]:
    """Drop everything that is due, a few rows at a time."""
    gone: list[tuple[int, int]] = []
    while found := ledger.due(now, 3):
        ledger.dropped(found)
        gone += found
    return gone


@given(commits=COMMITS)
def test_what_is_over_goes_and_what_is_too_much(commits: list[tuple[Kind, int, int]]) -> None:
    """The oldest of its kind first; of mints as many as fit stay, of ends as many as they may."""
    ledger = Ledger(50, 80)
    for place, (kind, until, count) in enumerate(commits, 1):
        ledger.note(kind.number, Row(place, until, count))
        gone = drained(ledger, 0)
        for number, most in ((MINTS.number, 50), (ENDS.number, 80)):
            assert ledger._counts[number] <= most
            left = [row.place for row in ledger._rows[number]]
            assert all(
                place < min(left, default=place + 1) for each, place in gone if each == number
            )
    assert ledger.next_place == len(commits) + 1
    drained(ledger, 101)
    assert len(ledger) == 0
    assert set(ledger._counts.values()) == {0}


@given(commits=COMMITS, now=st.integers(0, 101))
def test_what_is_of_use_stays(commits: list[tuple[Kind, int, int]], now: int) -> None:
    """Within the bounds nothing goes before its time, nor before what is older."""
    ledger = Ledger(10_000, 10_000)
    for place, (kind, until, count) in enumerate(commits, 1):
        ledger.note(kind.number, Row(place, until, count))
    gone = {place for _, place in drained(ledger, now)}
    assert all(commits[place - 1][1] <= now for place in gone)


@given(commits=COMMITS, gone=st.sampled_from(KINDS))
def test_what_is_forgotten_is_not_counted(commits: list[tuple[Kind, int, int]], gone: Kind) -> None:
    """All of one kind, and nothing of another; what comes later counts from none."""
    ledger, rest = Ledger(50, 80), Ledger(50, 80)
    for place, (kind, until, count) in enumerate(commits, 1):
        ledger.note(kind.number, Row(place, until, count))
        if kind is not gone:
            rest.note(kind.number, Row(place, until, count))
    assert ledger.places_of(gone) == [
        place for place, (kind, _, _) in enumerate(commits, 1) if kind is gone
    ]
    ledger.forget(gone)
    assert (ledger._counts, ledger._rows) == (rest._counts, rest._rows)
    assert ledger.next_place == len(commits) + 1
