"""The journal's arithmetic and the vendor's buckets, against simpler ways to say the same."""

from hypothesis import given
from hypothesis import strategies as st

from broker.rules import bucket
from broker.testing.vendor.journal import MINT_PATH, Call, Journal, Window
from broker.testing.vendor.mint import Bucket
from broker.testing.vendor.settings import Allowance

gaps = st.lists(st.integers(0, 400), max_size=120)
"""Quarters of a second between two calls: sums of them are exact as floats."""


def moments(gaps: list[int]) -> list[float]:
    now, times = 0, []
    for gap in gaps:
        now += gap
        times.append(now / 4)
    return times


def journal_of(times: list[float], path: str = MINT_PATH) -> Journal:
    journal = Journal()
    for number, now in enumerate(times):
        agent = "even" if number % 2 == 0 else "odd"
        journal.arrive(Call(now, now, "POST", path, "127.0.0.1", agent=agent))
    return journal


@given(gaps=gaps, seconds=st.sampled_from([0.25, 1.0, 7.5, 60.0]))
def test_windows_are_counted_like_by_hand(gaps: list[int], seconds: float):
    """The fullest window begins at some call and holds what arrived before its end."""
    times = moments(gaps)
    by_hand = [
        sum(start <= it < start + seconds for it in times[n:]) for n, start in enumerate(times)
    ]
    assert journal_of(times).in_window(seconds) == max(by_hand, default=0)


@given(gaps=gaps)
def test_seconds_add_up(gaps: list[int]):
    """Every call is in exactly one second, the first in the first."""
    counts = journal_of(moments(gaps)).per_second()
    assert sum(counts) == len(gaps)
    assert not counts or (counts[0] > 0 and counts[-1] > 0)


def test_windows_have_a_place_and_can_be_narrowed():
    """The earliest of equals; only mints; only those that are asked for."""
    journal = journal_of([0, 10, 20, 100, 110, 120])
    assert journal.worst_window() == Window(0, 3)
    assert journal.worst_window(20) == Window(0, 2)
    assert journal.in_window(60, where=lambda call: call.agent == "even") == 2
    assert journal_of([1, 2], "/v1/validate").in_window(60) == 0
    assert Journal().worst_window() == Window(0, 0)
    assert journal_of([0, 0.5, 3]).per_second() == [2, 0, 0, 1]


@given(gaps=gaps, count=st.sampled_from([1, 5, 60, 120]))
def test_buckets_agree_with_the_brokers_rule(gaps: list[int], count: int):
    """Two implementations that share no line admit the same calls and name the same waits."""
    allowance, mine = Allowance(count), Bucket()
    limit, full_at = bucket.limit(count, 60_000_000, count), 0
    for now in moments(gaps):
        full_at, verdict = bucket.spend(full_at, limit, int(now * 1_000_000))
        wait = mine.take(allowance, now)
        assert (wait == 0) == verdict.allowed
        assert abs(wait - verdict.retry_after / 1_000_000) < 1e-6


@given(gaps=gaps, count=st.integers(1, 130), seconds=st.sampled_from([1.0, 60.0, 100.0]))
def test_buckets_admit_burst_plus_refill(gaps: list[int], count: int, seconds: float):
    """In no window more than the burst and what refilled."""
    allowance, mine = Allowance(count), Bucket()
    admitted = [now for now in moments(gaps) if not mine.take(allowance, now)]
    assert journal_of(admitted).in_window(seconds) <= count + seconds * count / 60
