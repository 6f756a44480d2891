"""Header lines as hints: bounded whatever they hold, and right where they make sense."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from multidict import CIMultiDict

from broker.issuers.vendor.headers import (
    LONGEST_RETRY,
    MOST_REMAINING,
    SHORTEST_RETRY,
    RateLimitHint,
    encoded,
    parse_retry_after,
    rate_limit_hint,
    values,
    vendor_date,
)
from broker.units import SECOND

NOON = 1_795_348_800
NOW = NOON * SECOND
"""Sun, 22 Nov 2026 12:00:00 GMT."""

DATE = "Sun, 22 Nov 2026 12:00:00 GMT"
LATER = "Sun, 22 Nov 2026 12:00:40 GMT"

_numbers = st.integers().map(str) | st.floats().map(str) | st.from_regex(r"[-+]?[0-9.]{1,400}")
_dateish = st.text("SunMonJaOct, 0123456789:GMT+-", max_size=40)


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [
        pytest.param([], None, id="absent"),
        pytest.param(["17"], 17, id="seconds"),
        pytest.param([" 17 "], 17, id="blanks"),
        pytest.param(["+17"], 17, id="plus"),
        pytest.param(["2.5"], 2.5, id="fraction"),
        pytest.param([".5"], 1, id="below-a-second"),
        pytest.param(["1.000001"], 1.000001, id="a-microsecond-more"),
        pytest.param(["0"], 1, id="zero"),
        pytest.param(["-30"], 1, id="negative"),
        pytest.param(["300"], 300, id="longest"),
        pytest.param(["301"], 300, id="too-long"),
        pytest.param(["9" * 20], 300, id="huge"),
        pytest.param(["9" * 1000], 300, id="beyond-floats"),
        pytest.param(["-" + "9" * 1000], 1, id="beyond-floats-negative"),
        pytest.param([LATER], 40, id="date"),
        pytest.param(["Sunday, 22-Nov-26 12:00:40 GMT"], 40, id="date-rfc-850"),
        pytest.param(["Sun Nov 22 12:00:40 2026"], 40, id="date-asctime"),
        pytest.param(["Sun, 22 Nov 2026 13:00:40 +0100"], 40, id="date-with-zone"),
        pytest.param(["Sun, 22 Nov 2026 11:00:00 GMT"], 1, id="date-past"),
        pytest.param(["Sun, 22 Nov 2099 12:00:00 GMT"], 300, id="date-far"),
        pytest.param(["5", "20"], 20, id="twice"),
        pytest.param(["20", "5"], 20, id="twice-reversed"),
        pytest.param(["20", LATER], 40, id="number-and-date"),
        pytest.param(["5, 20"], 20, id="joined"),
        pytest.param(["soon", "20"], 20, id="one-is-garbage"),
        pytest.param(["soon"], None, id="garbage"),
        pytest.param([""], None, id="empty"),
        pytest.param(["nan"], None, id="nan"),
        pytest.param(["inf"], None, id="infinity"),
        pytest.param(["1e3"], None, id="exponent"),
        pytest.param(["1_000"], None, id="underscore"),
        pytest.param(["\u0661\u0662"], None, id="other-digits"),
        pytest.param(["."], None, id="point"),
        pytest.param(["Wed, 31 Feb 2026 00:00:00 GMT"], None, id="no-such-day"),
        pytest.param(["Sun, 22 Nov 2026 12:00:40 +9999"], None, id="no-such-zone"),
        pytest.param([LATER + " " * 200], None, id="overlong-date"),
    ],
)
def test_V1_retry_after(lines: list[str], seconds: float | None) -> None:
    """Every way of saying when to come back, and every way of failing to."""
    expected = None if seconds is None else round(seconds * SECOND)
    assert parse_retry_after(lines, NOW) == expected


def test_V1_a_date_without_a_zone_is_not_in_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form without "GMT" means GMT too, wherever the broker runs."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        wait = parse_retry_after(["Sun Nov 22 12:00:40 2026"], NOW)
    time.tzset()
    assert wait == 40 * SECOND


@given(st.lists(st.text(max_size=40) | _numbers | _dateish, max_size=4), st.integers(0, 2**62))
@example(["Mon, 01 Jan 0001 00:00:00 +2359"], 0)
@example(["3, 7\x1f, 4"], 0)
def test_V1_a_pause_is_never_a_hot_loop_and_never_an_afternoon(lines: list[str], now: int) -> None:
    """Whatever is sent, the pause is within a second and five minutes, or is not known."""
    wait = parse_retry_after(lines, now)
    assert wait is None or SHORTEST_RETRY <= wait <= LONGEST_RETRY
    assert (SHORTEST_RETRY, LONGEST_RETRY) == (1_000_000, 300_000_000)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_V1_of_several_pauses_the_longest_counts(seconds: list[int]) -> None:
    """On lines of their own or joined in one, in any order."""
    texts = [str(each) for each in seconds]
    assert parse_retry_after(texts, NOW) == max(seconds) * SECOND
    assert parse_retry_after([", ".join(texts)], NOW) == max(seconds) * SECOND


def test_names_match_in_any_case_and_more_than_once() -> None:
    """A multidict gives every line, a plain mapping its one; outer blanks are not part of it."""
    twice = CIMultiDict([("Retry-After", " 5"), ("X", "1"), ("retry-after", "20 ")])
    assert values(twice, "retry-after") == ("5", "20")
    assert values({"RETRY-AFTER": "5"}, "retry-after") == ("5",)
    assert values({}, "retry-after") == ()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], False),
        ([""], False),
        (["identity"], False),
        (["Identity"], False),
        (["gzip"], True),
        (["br"], True),
        (["identity", "gzip"], True),
        (["identity, gzip"], True),
        (["\u202e"], True),
    ],
)
def test_V4_a_compressed_body_is_noticed(lines: list[str], expected: bool) -> None:
    """Whatever is not plainly `identity` is compressed."""
    headers = CIMultiDict([("Content-Encoding", line) for line in lines])
    assert encoded(headers) is expected


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [
        ([DATE], 0),
        ([LATER], 40),
        ([DATE, LATER], 40),
        ([LATER, DATE], 40),
        (["Sun, 22 Nov 2026 11:55:00 GMT"], -300),
        (["Mon, 23 Nov 2026 12:00:00 GMT"], 86400),
        (["Mon, 23 Nov 2026 12:00:01 GMT"], None),
        (["Sat, 21 Nov 2026 11:59:59 GMT"], None),
        (["Sun, 22 Nov 2099 12:00:00 GMT"], None),
        (["Sun, 22 Nov 2099 12:00:00 GMT", LATER], 40),
        (["noon"], None),
        ([], None),
    ],
)
def test_T6_the_vendors_clock_is_believed_within_a_day(
    lines: list[str], seconds: int | None
) -> None:
    """Skew is a fact to reckon with, decades are nonsense."""
    headers = CIMultiDict([("Date", line) for line in lines])
    assert vendor_date(headers, NOW) == (None if seconds is None else NOW + seconds * SECOND)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ({}, None),
        ({"X-RateLimit-Limit": "120"}, None),
        ({"X-RateLimit-Reset": str(NOON + 30)}, None),
        ({"X-RateLimit-Remaining": "7"}, RateLimitHint(7, None)),
        ({"x-ratelimit-remaining": " 0 "}, RateLimitHint(0, None)),
        (
            {"X-RateLimit-Remaining": "7", "X-RateLimit-Reset": str(NOON + 30)},
            RateLimitHint(7, 30 * SECOND),
        ),
        (
            {"X-RateLimit-Remaining": "7", "X-RateLimit-Reset": str(NOON + 70), "Date": LATER},
            RateLimitHint(7, 30 * SECOND),
        ),
        ({"X-RateLimit-Remaining": "7", "X-RateLimit-Reset": str(NOON - 1)}, RateLimitHint(7, 0)),
        ({"X-RateLimit-Remaining": "7", "X-RateLimit-Reset": "30"}, RateLimitHint(7, 0)),
        (
            {"X-RateLimit-Remaining": "7", "X-RateLimit-Reset": str(NOON + 9999)},
            RateLimitHint(7, 300 * SECOND),
        ),
        ({"X-RateLimit-Remaining": "7", "X-RateLimit-Reset": "soon"}, RateLimitHint(7, None)),
        ({"X-RateLimit-Remaining": "-1"}, None),
        ({"X-RateLimit-Remaining": "7.5"}, None),
        ({"X-RateLimit-Remaining": "many"}, None),
        ({"X-RateLimit-Remaining": "1000001"}, None),
        ({"X-RateLimit-Remaining": "9" * 5000}, None),
    ],
)
def test_what_is_left_of_the_vendors_bucket(
    lines: dict[str, str], expected: RateLimitHint | None
) -> None:
    """A count is needed; the reset is taken by the vendor's clock and cut to five minutes."""
    assert rate_limit_hint(lines, NOW) == expected


def test_of_two_counts_the_smaller_is_believed() -> None:
    """Two buckets may be told of: the emptier one is the one to mind, until both are full."""
    headers = CIMultiDict(
        [
            ("X-RateLimit-Remaining", "50"),
            ("X-RateLimit-Remaining", "3"),
            ("X-RateLimit-Reset", str(NOON + 40)),
            ("X-RateLimit-Reset", str(NOON + 10)),
        ]
    )
    assert rate_limit_hint(headers, NOW) == RateLimitHint(3, 40 * SECOND)


@given(
    st.dictionaries(
        st.sampled_from(["Date", "X-RateLimit-Remaining", "X-RateLimit-Reset"]),
        st.text(max_size=30) | _numbers | _dateish,
    ),
    st.integers(0, 2**62),
)
def test_hints_are_bounded_or_absent(headers: dict[str, str], now: int) -> None:
    """No header raises, and no hint leaves its bounds."""
    hint = rate_limit_hint(headers, now)
    if hint is not None:
        assert 0 <= hint.remaining <= MOST_REMAINING
        assert hint.reset_in is None or 0 <= hint.reset_in <= 300 * SECOND
