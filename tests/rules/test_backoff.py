"""The wait after failures: bounded, spread, and cheap however long it has failed."""

import random

from hypothesis import given
from hypothesis import strategies as st

from broker.rules.backoff import full_jitter

BASE, CAP = 250_000, 5_000_000
ALMOST_ONE = 1 - 2**-53
"""The largest number that a draw in [0, 1) gives."""

draws = st.floats(min_value=0, max_value=1, exclude_max=True)


@given(st.integers(1, 10**9), st.integers(1, 10**7), st.integers(1, 10**9), draws)
def test_T9_a_wait_is_never_longer_than_its_cap(
    failures: int, base: int, cap: int, draw: float
) -> None:
    """Whole microseconds in [0, cap], also for a key that has failed for a year."""
    wait = full_jitter(failures, base, cap, lambda: draw)
    assert isinstance(wait, int)
    assert 0 <= wait <= cap


def test_T9_the_longest_wait_doubles_up_to_the_cap() -> None:
    """A quarter of a second, then twice that each time, never over five seconds."""
    longest = [full_jitter(n, BASE, CAP, lambda: ALMOST_ONE) for n in range(1, 9)]
    assert longest == [
        249_999,
        499_999,
        999_999,
        1_999_999,
        3_999_999,
        4_999_999,
        4_999_999,
        4_999_999,
    ]


@given(st.integers(1, 50), draws)
def test_T9_another_failure_never_shortens_the_wait(failures: int, draw: float) -> None:
    """With the same luck, patience only grows."""
    assert full_jitter(failures, BASE, CAP, lambda: draw) <= full_jitter(
        failures + 1, BASE, CAP, lambda: draw
    )


def test_T9_waits_are_spread_over_all_of_it() -> None:
    """Full jitter: ten thousand keys that failed together come back evenly, not at an edge."""
    draw = random.Random(7).random
    tenths = [0] * 10
    for _ in range(10_000):
        tenths[full_jitter(5, BASE, CAP, draw) * 10 // 4_000_000] += 1
    assert min(tenths) > 850
    assert max(tenths) < 1_150


def test_T9_one_draw_decides() -> None:
    """The wait costs one draw, so that a test can say what the luck was."""
    luck = iter([0.5])
    assert full_jitter(3, BASE, CAP, lambda: next(luck)) == 500_000
