"""When a token may be handed out again: every mark, every strange claim, every clock."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.model import EmbedToken
from broker.rules.reuse import (
    DEFAULT_LIFETIME,
    MAX_LIFETIME,
    RENEWAL_LEAD,
    Floors,
    Life,
    floors,
    life,
    lifetime_of,
    renewal_mark,
)
from broker.units import SECOND

AHEAD, FLOOR, OUTAGE = 900 * SECOND, 300 * SECOND, 60 * SECOND
"""The settings' defaults."""

HOUR = 3600 * SECOND
NOON = 1_800_000_000
"""A date in Unix seconds."""

spans = st.integers(0, 2 * HOUR)
draws = st.floats(min_value=0, max_value=1, exclude_max=True)


@st.composite
def marked(draw: st.DrawFn) -> tuple[int, Floors, int]:
    """Draw a lifetime, its marks under any settings, and the renewal mark that was drawn."""
    lifetime = draw(st.one_of(st.integers(0, 20), st.integers(0, MAX_LIFETIME)))
    marks = floors(lifetime, draw(spans), draw(spans), draw(spans))
    luck = draw(draws)
    return lifetime, marks, renewal_mark(marks, lambda: luck)


# --- the marks


@given(marked())
def test_marks_keep_their_order_and_leave_most_of_a_life(made: tuple[int, Floors, int]) -> None:
    """Outage <= floor <= mark <= ahead; a floor takes a quarter of a life, renewal half at most."""
    lifetime, marks, mark = made
    assert 0 <= marks.outage <= marks.floor <= mark <= marks.ahead <= lifetime
    assert marks.floor <= lifetime // 4
    assert marks.ahead <= lifetime // 2


def test_an_hour_under_the_defaults_has_the_documented_marks() -> None:
    """Renewal between 15 min and the floor plus 2 min, floor 5 min, 1 min in an outage."""
    marks = floors(HOUR, AHEAD, FLOOR, OUTAGE)
    assert marks == Floors(ahead=AHEAD, floor=FLOOR, outage=OUTAGE)
    assert renewal_mark(marks, lambda: 0.0) == FLOOR + RENEWAL_LEAD
    assert renewal_mark(marks, lambda: 1 - 2**-53) == AHEAD - 1


def test_T1_marks_of_one_burst_are_spread_evenly() -> None:
    """Ten thousand tokens of one second renew over eight minutes, a tenth of them in each tenth."""
    marks = floors(HOUR, AHEAD, FLOOR, OUTAGE)
    draw = random.Random(3).random
    width = AHEAD - FLOOR - RENEWAL_LEAD
    tenths = [0] * 10
    for _ in range(10_000):
        tenths[(renewal_mark(marks, draw) - FLOOR - RENEWAL_LEAD) * 10 // width] += 1
    assert min(tenths) > 850
    assert max(tenths) < 1_150


@pytest.mark.parametrize("lifetime", [0, 1, 3, SECOND, 60 * SECOND])
def test_T7_a_short_life_is_mostly_reused(lifetime: int) -> None:
    """A vendor that issues one-second tokens causes two mints a second, not one per request.

    A token without any life is dead when it is born.
    """
    marks = floors(lifetime, AHEAD, FLOOR, OUTAGE)
    mark = renewal_mark(marks, lambda: 1 - 2**-53)
    assert mark <= lifetime // 2
    born = life(lifetime, mark, marks)
    assert born is (Life.FRESH if lifetime else Life.DEAD)


# --- T8: at the edge


EDGES = Floors(ahead=AHEAD, floor=FLOOR, outage=OUTAGE)


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (HOUR, Life.FRESH),
        (500 * SECOND + 1, Life.FRESH),
        (500 * SECOND, Life.RENEW),
        (500 * SECOND - 1, Life.RENEW),
        (FLOOR + 1, Life.RENEW),
        (FLOOR, Life.RENEW),
        (FLOOR - 1, Life.STALE),
        (OUTAGE + 1, Life.STALE),
        (OUTAGE, Life.STALE),
        (OUTAGE - 1, Life.DEAD),
        (1, Life.DEAD),
        (0, Life.DEAD),
        (-1, Life.DEAD),
        (-HOUR, Life.DEAD),
    ],
)
def test_T8_each_edge_to_the_microsecond(left: int, expected: Life) -> None:
    """Exactly the floor is still enough life; one microsecond less is not."""
    assert life(left, 500 * SECOND, EDGES) is expected


@pytest.mark.parametrize(("left", "expected"), [(1, Life.RENEW), (0, Life.DEAD), (-1, Life.DEAD)])
def test_T8_without_floors_the_end_is_still_the_end(left: int, expected: Life) -> None:
    """Floors of zero allow the last microsecond, and nothing after it."""
    assert life(left, 10, Floors(ahead=20, floor=0, outage=0)) is expected


@given(marked(), st.integers(-HOUR, HOUR))
def test_T8_handing_out_always_leaves_the_floor(made: tuple[int, Floors, int], left: int) -> None:
    """G3: FRESH and RENEW mean the floor is there, STALE the floor in an outage.

    All of them mean that it has not expired.
    """
    _, marks, mark = made
    match life(left, mark, marks):
        case Life.FRESH:
            assert left > mark >= marks.floor
        case Life.RENEW:
            assert marks.floor <= left <= mark
            assert left > 0
        case Life.STALE:
            assert marks.outage <= left < marks.floor
            assert left > 0
        case Life.DEAD:
            assert left < marks.outage or left <= 0


@given(marked(), st.lists(st.integers(-HOUR, HOUR), min_size=2, max_size=2))
def test_a_token_only_ever_grows_older(made: tuple[int, Floors, int], lefts: list[int]) -> None:
    """With less life left a token is never in a better state."""
    _, marks, mark = made
    order = [Life.DEAD, Life.STALE, Life.RENEW, Life.FRESH]
    older, younger = (order.index(life(left, mark, marks)) for left in sorted(lefts))
    assert older <= younger


# --- T4, T6, T2: what a token says of itself


@pytest.mark.parametrize(
    "claims",
    [
        None,
        [],
        "exp",
        42,
        {},
        {"exp": NOON},
        {"iat": NOON},
        {"exp": None, "iat": NOON},
        {"exp": str(NOON + 60), "iat": NOON},
        {"exp": NOON + 60, "iat": str(NOON)},
        {"exp": float("nan"), "iat": NOON},
        {"exp": NOON, "iat": float("nan")},
        {"exp": float("inf"), "iat": NOON},
        {"exp": float("-inf"), "iat": NOON},
        {"exp": True, "iat": False},
        {"exp": [NOON], "iat": NOON},
        {"exp": 10**400, "iat": NOON},
        {"exp": NOON, "iat": -(10**400)},
    ],
)
def test_T4_claims_that_tell_no_life_count_as_the_documented_hour(claims: object) -> None:
    """Absent, text, NaN, infinite, astronomical: 1 h, and never an exception."""
    assert lifetime_of(claims) == DEFAULT_LIFETIME == HOUR


@pytest.mark.parametrize(
    ("exp", "iat", "expected"),
    [
        (NOON + 3600, NOON, HOUR),
        (NOON + 60, NOON, 60 * SECOND),
        (NOON + 1, NOON, SECOND),
        (NOON + 0.25, NOON, SECOND // 4),
        (NOON + 60.5, NOON + 0.5, 60 * SECOND),
        (253_402_300_799, NOON, HOUR),
        (NOON + 7200, NOON, HOUR),
        (NOON, NOON, 0),
        (NOON - 1, NOON, 0),
        (-NOON, NOON, 0),
        (0, NOON, 0),
        (-1, -61, 60 * SECOND),
    ],
)
def test_T4_a_life_is_read_cut_to_an_hour_and_never_negative(
    exp: float, iat: float, expected: int
) -> None:
    """Year 9999 is an hour; `exp <= iat` (T2) is expired on arrival."""
    assert lifetime_of({"exp": exp, "iat": iat}) == expected


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
       st.none() | st.integers() | st.floats() | st.text())  # fmt: skip
def test_T4_nothing_a_token_says_is_believed_for_longer_than_an_hour(
    exp: object, iat: object
) -> None:
    """Whole microseconds in [0, 1 h] for every JSON value, and more, in either claim."""
    for claims in (exp, {"exp": exp, "iat": iat}, {"exp": iat, "iat": exp}):
        lifetime = lifetime_of(claims)
        assert isinstance(lifetime, int)
        assert 0 <= lifetime <= MAX_LIFETIME


@given(st.integers(0, 7200), st.integers(-NOON, NOON))
def test_T6_the_vendors_clock_does_not_matter(seconds: int, offset: int) -> None:
    """A clock that is five minutes off, or fifty years, gives the same lifetime."""
    true = lifetime_of({"exp": NOON + seconds, "iat": NOON})
    assert lifetime_of({"exp": NOON + seconds + offset, "iat": NOON + offset}) == true


def test_T2_expired_on_arrival_is_dead_at_once() -> None:
    """`exp < iat` leaves no life under any settings."""
    lifetime = lifetime_of({"exp": NOON - 10, "iat": NOON})
    marks = floors(lifetime, AHEAD, FLOOR, OUTAGE)
    assert life(lifetime, renewal_mark(marks, lambda: 0.5), marks) is Life.DEAD


# --- T5: two clocks


def token(lifetime: int, mono: int, wall: int) -> EmbedToken:
    """Make a token whose mint began at these moments."""
    return EmbedToken(
        body=b"{}", dies_mono=mono + lifetime, dies_wall=wall + lifetime, lifetime=lifetime, mark=0
    )


@given(
    st.integers(1, MAX_LIFETIME), spans, st.integers(-HOUR, HOUR), st.integers(-HOUR, HOUR)
)  # fmt: skip
def test_T5_whichever_clock_is_wrong_a_token_is_never_younger_than_it_is(
    lifetime: int, elapsed: int, stall: int, step: int
) -> None:
    """The wall clock steps by up to an hour, or the monotonic clock stalls: the other one tells."""
    held = token(lifetime, mono=5 * HOUR, wall=NOON * SECOND)
    stepped = held.left(5 * HOUR + elapsed, NOON * SECOND + elapsed + step)
    assert stepped == lifetime - elapsed - max(step, 0)
    stalled = held.left(5 * HOUR + min(elapsed, abs(stall)), NOON * SECOND + elapsed)
    assert stalled == lifetime - elapsed
    for left in (stepped, stalled):
        if elapsed >= lifetime:
            assert life(left, 0, Floors(ahead=0, floor=0, outage=0)) is Life.DEAD
