"""The bucket as arithmetic: against a level that is refilled by hand, and row by row."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.rules import bucket
from broker.rules.bucket import MAX_BURST, MAX_RATE, Limit, Verdict, peek, spend

T0 = 1_000_000_000_000
"""A moment to start from: a fortnight after the machine was switched on."""

SECOND = 1_000_000
NEVER_SEEN = 0
"""What a store knows of a key it does not hold."""

rates = st.one_of(
    st.floats(min_value=0.001, max_value=1),
    st.floats(min_value=1, max_value=1000),
    st.floats(min_value=1000, max_value=MAX_RATE),
)
"""Tokens a second: below one, about one, above a thousand."""

limits = st.builds(
    bucket.limit,
    rate=rates,
    per=st.just(SECOND),
    burst=st.one_of(st.integers(1, 5), st.integers(1, 1000)),
)

small_limits = st.builds(
    Limit, burst=st.integers(1, 6), interval=st.sampled_from([1, 2, 7, 1000, SECOND, 90 * SECOND])
)
"""Few tokens, so that a short schedule meets both ends of the bucket."""


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Limit, list[int]]:
    """Draw a limit and gaps between requests; many of them near a multiple of its interval."""
    limit = draw(small_limits)
    near = st.builds(
        lambda times, off: max(times * limit.interval + off, 0),
        st.integers(0, 8),
        st.integers(-1, 1),
    )
    gap = st.one_of(st.just(0), near, st.integers(0, 2 * limit.depth))
    return limit, draw(st.lists(gap, min_size=1, max_size=40))


@given(schedule=schedules())
def test_a_verdict_is_known_from_its_wait(schedule: tuple[Limit, list[int]]) -> None:
    """What a bucket elsewhere tells is enough."""
    limit, gaps = schedule
    for _, said in run(limit, gaps):
        assert bucket.verdict_from_wait(said.full_in, limit, allowed=said.allowed) == said


@given(limit=small_limits, beyond=st.integers(1, 10 * SECOND))
def test_what_no_bucket_says_makes_no_verdict(limit: Limit, beyond: int) -> None:
    """Fuller than full, emptier than empty, or a refusal with room for one."""
    for wait, allowed in (
        (-beyond, True),
        (limit.depth + beyond, True),
        (limit.depth + beyond, False),
        (max(limit.depth - limit.interval - beyond + 1, 0), False),
    ):
        with pytest.raises(ValueError, match="a bucket"):
            bucket.verdict_from_wait(wait, limit, allowed=allowed)


def run(limit: Limit, gaps: list[int]) -> list[tuple[int, Verdict]]:
    """Ask after each gap; return each moment with its verdict."""
    full_at, now, told = NEVER_SEEN, T0, []
    for gap in gaps:
        now += gap
        full_at, verdict = spend(full_at, limit, now)
        told.append((now, verdict))
    return told


def exhausted(limit: Limit, now: int = T0) -> int:
    """Spend all at `now`; return the moment to store."""
    full_at = NEVER_SEEN
    for left in reversed(range(limit.burst)):
        full_at, verdict = spend(full_at, limit, now)
        assert (verdict.allowed, verdict.remaining) == (True, left)
    return full_at


# --- against a second opinion


@given(schedules())
def test_decides_like_a_level_that_is_refilled(schedule: tuple[Limit, list[int]]) -> None:
    """One integer says the same as a level that grows with time and loses an interval a request."""
    limit, gaps = schedule
    level = limit.depth
    for gap, (_, verdict) in zip(gaps, run(limit, gaps), strict=True):
        level = min(level + gap, limit.depth)
        if level >= limit.interval:
            level -= limit.interval
            expected = Verdict(True, level // limit.interval, limit.depth - level, 0, limit)
        else:
            wait = limit.interval - level
            expected = Verdict(False, 0, limit.depth - level, wait, limit)
        assert verdict == expected


@given(small_limits, st.integers(0, T0), st.integers(0, 20))
def test_a_full_bucket_equals_one_never_seen(limit: Limit, past: int, gap: int) -> None:
    """Whatever moment has passed says the same as none: only such buckets may be forgotten."""
    assert spend(T0 - past, limit, T0 + gap) == spend(NEVER_SEEN, limit, T0 + gap)


# --- L1, L2, L3


@given(schedules())
def test_L1_every_window_admits_no_more_than_burst_and_refill(
    schedule: tuple[Limit, list[int]],
) -> None:
    """Between any two admissions there are at most the burst and what was refilled meanwhile."""
    limit, gaps = schedule
    admitted = [now for now, verdict in run(limit, gaps) if verdict.allowed]
    for first, start in enumerate(admitted):
        for last in range(first, len(admitted)):
            window = admitted[last] - start
            assert last - first + 1 <= limit.burst + window // limit.interval


@given(rates, st.integers(1, 1000))
def test_L1_the_interval_never_exceeds_the_configured_rate(rate: float, burst: int) -> None:
    """Rounding makes a limit stricter, by less than a microsecond a token."""
    limit = bucket.limit(rate, SECOND, burst)
    exact = Fraction(SECOND) / Fraction(rate)
    assert exact <= limit.interval < exact + 1


@pytest.mark.parametrize(
    ("rate", "burst"),
    [(0.01, 1), (0.5, 3), (1, 1), (1, 20), (60, 5), (2_000, 1), (50_000, 500), (MAX_RATE, 1)],
)
def test_L1_a_flood_gets_exactly_burst_and_refill(rate: float, burst: int) -> None:
    """Who asks ten times per interval gets the burst, the refill, and not one more or less."""
    limit = bucket.limit(rate, SECOND, burst)
    step = max(limit.interval // 10, 1)
    per_interval = limit.interval // step
    gaps = [0] * burst + [step] * (per_interval * 30)
    admitted = [now for now, verdict in run(limit, gaps) if verdict.allowed]
    assert len(admitted) == burst + step * per_interval * 30 // limit.interval


@pytest.mark.parametrize("rate", [3, 1_000, 250_000, MAX_RATE])
def test_L2_a_burst_that_refills_within_half_a_second_still_limits(rate: int) -> None:
    """Sixty requests of one moment: the burst passes, fifty-nine or so do not."""
    limit = bucket.limit(rate, SECOND, 1)
    assert limit.depth < SECOND / 2
    told = [verdict.allowed for _, verdict in run(limit, [0] * 60)]
    assert told == [True] + [False] * 59


@given(small_limits, st.data())
def test_L3_idling_for_less_than_the_refill_leaves_the_bucket_short(
    limit: Limit, data: st.DataObject
) -> None:
    """After a drain there is one token per interval gone by, and full only after all of them."""
    idle = data.draw(st.integers(0, limit.depth - 1))
    verdict = peek(exhausted(limit), limit, T0 + idle)
    assert verdict.remaining == idle // limit.interval < limit.burst


def test_L6_a_look_after_a_clock_that_stepped_back_promises_no_longer_wait() -> None:
    """Nobody is told to wait for more than a full drain: what `spend` says, `peek` says."""
    limit = Limit(burst=3, interval=SECOND)
    far = T0 + 1000 * limit.depth
    assert peek(far, limit, T0) == spend(far, limit, T0)[1]
    assert peek(far, limit, T0).full_in == limit.depth


# --- L5, L6, L9, L10


@given(small_limits, st.lists(st.integers(0, 3), max_size=20))
def test_L5_a_refusal_charges_nothing(limit: Limit, gaps: list[int]) -> None:
    """Somebody who hammers a closed door is let in at the same moment as somebody who waits."""
    full_at, now = exhausted(limit), T0
    for gap in gaps:
        now += gap
        if not peek(full_at, limit, now).allowed:
            after, verdict = spend(full_at, limit, now)
            assert (after, verdict.allowed) == (full_at, False)


@given(limits)
def test_L9_waiting_exactly_retry_after_succeeds_and_a_tick_less_fails(limit: Limit) -> None:
    """The wait that a refusal names is the shortest one that helps, and never zero."""
    full_at = exhausted(limit)
    full_at, refused = spend(full_at, limit, T0)
    assert not refused.allowed
    assert refused.retry_after >= 1
    early = spend(full_at, limit, T0 + refused.retry_after - 1)[1]
    assert early == Verdict(False, 0, refused.full_in - refused.retry_after + 1, 1, limit)
    assert spend(full_at, limit, T0 + refused.retry_after)[1].allowed


@given(schedules())
def test_L9_every_refusal_of_a_schedule_names_the_true_wait(
    schedule: tuple[Limit, list[int]],
) -> None:
    """Not only a full drain: any refusal is lifted at its word and not before."""
    limit, gaps = schedule
    full_at, now = NEVER_SEEN, T0
    for gap in gaps:
        now += gap
        full_at, verdict = spend(full_at, limit, now)
        if verdict.allowed:
            assert verdict.retry_after == 0
        else:
            assert 1 <= verdict.retry_after <= limit.interval
            assert spend(full_at, limit, now + verdict.retry_after)[1].allowed
            assert not spend(full_at, limit, now + verdict.retry_after - 1)[1].allowed


@given(schedules())
def test_L10_remaining_agrees_with_the_next_decisions(schedule: tuple[Limit, list[int]]) -> None:
    """It lies within the burst, and exactly that many more requests of this moment pass."""
    limit, gaps = schedule
    full_at, now = NEVER_SEEN, T0
    for gap in gaps:
        now += gap
        foreseen = peek(full_at, limit, now)
        full_at, verdict = spend(full_at, limit, now)
        assert foreseen.allowed == verdict.allowed
        assert foreseen.retry_after == verdict.retry_after
        assert foreseen.remaining == verdict.remaining + verdict.allowed
        assert 0 <= verdict.remaining <= limit.burst
        trial = full_at
        for _ in range(verdict.remaining):
            trial, more = spend(trial, limit, now)
            assert more.allowed
        assert not spend(trial, limit, now)[1].allowed


@given(schedules())
def test_L10_the_times_in_a_verdict_are_true(schedule: tuple[Limit, list[int]]) -> None:
    """The next token comes after `next_in` and the last after `full_in`, neither earlier."""
    limit, gaps = schedule
    full_at, now = NEVER_SEEN, T0
    for gap in gaps:
        now += gap
        full_at, verdict = spend(full_at, limit, now)
        left, later = verdict.remaining, now + verdict.next_in
        assert peek(full_at, limit, later).remaining == left + 1
        assert peek(full_at, limit, later - 1).remaining == left
        assert peek(full_at, limit, now + verdict.full_in).remaining == limit.burst
        assert peek(full_at, limit, now + verdict.full_in - 1).remaining < limit.burst
    assert peek(full_at, limit, full_at).next_in == 0


# --- L8: what is no limit


@pytest.mark.parametrize(
    ("rate", "per", "burst"),
    [
        (0, SECOND, 1),
        (-1, SECOND, 1),
        (float("nan"), SECOND, 1),
        (float("inf"), SECOND, 1),
        (float("-inf"), SECOND, 1),
        (1, 0, 1),
        (1, -SECOND, 1),
        (1, SECOND, 0),
        (1, SECOND, -1),
        (1, SECOND, MAX_BURST + 1),
        (1, SECOND, 2**63),
        (MAX_RATE + 1, SECOND, 1),
        (2, 1, 1),
        (5e-324, SECOND, 1),
        (1e-300, SECOND, 1),
        (1e-9, SECOND, MAX_BURST),
    ],
)
def test_L8_a_limit_without_meaning_is_refused(rate: float, per: int, burst: int) -> None:
    """Zero, negative, NaN, infinite, too fine, too slow: a ValueError that says what is wrong."""
    with pytest.raises(ValueError, match=r"^(rate|per|burst) "):
        bucket.limit(rate, per, burst)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), float("-inf")])
def test_L8_the_message_names_what_is_wrong(rate: float) -> None:
    """Somebody who wrote NaN is told about the rate and not about a century."""
    with pytest.raises(ValueError, match=r"^rate must be a positive, finite number$"):
        bucket.limit(rate, SECOND, 1)


@given(st.floats(), st.integers(-10, 2**40), st.integers(-10, 2**40))
def test_L8_any_numbers_are_a_limit_or_a_value_error(rate: float, per: int, burst: int) -> None:
    """Nothing else is raised, and what is accepted limits: in range, exact in 64 bits."""
    try:
        limit = bucket.limit(rate, per, burst)
    except ValueError:
        return
    assert limit.interval >= 1
    assert 1 <= limit.burst == burst <= MAX_BURST
    assert limit.depth < 2**63


@pytest.mark.parametrize(
    ("rate", "per", "burst", "interval"),
    [
        (60, 60 * SECOND, 20, SECOND),
        (6, 60 * SECOND, 6, 10 * SECOND),
        (7, SECOND, 1, 142_858),
        (0.1, SECOND, 1, 10 * SECOND),
        (MAX_RATE, SECOND, MAX_BURST, 1),
        (1, 3600 * SECOND, 1, 3600 * SECOND),
    ],
)
def test_a_limit_is_what_was_configured(rate: float, per: int, burst: int, interval: int) -> None:
    """`ceil(per / rate)`: a token due after 142,857.1 us comes a moment later, not early."""
    assert bucket.limit(rate, per, burst) == Limit(burst=burst, interval=interval)


# --- L11, T5: limits that change, clocks that step


@given(small_limits, small_limits)
def test_L11_a_lowered_or_raised_limit_holds_at_once(old: Limit, new: Limit) -> None:
    """Nobody waits longer than one interval of the new limit, whatever the old one had noted."""
    full_at, verdict = spend(exhausted(old), new, T0)
    if verdict.allowed:
        assert verdict.remaining == (new.depth - old.depth) // new.interval - 1
    else:
        assert verdict.retry_after <= new.interval
        assert spend(full_at, new, T0 + verdict.retry_after)[1].allowed


@given(limits, st.integers(-(2**62), 2**62))
def test_T5_no_stored_moment_locks_anybody_out_for_longer_than_a_drain(
    limit: Limit, stored: int
) -> None:
    """After any step of the clock the next token is an interval away at most, also if refused."""
    after, verdict = spend(stored, limit, T0)
    assert T0 <= after <= T0 + limit.depth
    assert verdict.full_in == after - T0
    if not verdict.allowed:
        assert 1 <= verdict.retry_after <= limit.interval
    assert spend(after, limit, T0 + limit.depth)[1].remaining == limit.burst - 1


def test_T5_a_refusal_stores_the_shortened_wait() -> None:
    """The clock went back an hour: after one refusal the wait runs as if it had not."""
    limit = bucket.limit(60, 60 * SECOND, 20)
    full_at = exhausted(limit)
    now = T0 - 3600 * SECOND
    full_at, verdict = spend(full_at, limit, now)
    assert verdict == Verdict(False, 0, 20 * SECOND, SECOND, limit)
    assert full_at == now + 20 * SECOND


@given(
    rate=rates,
    per=st.sampled_from([SECOND, 60 * SECOND, 3600 * SECOND]),
    burst=st.integers(1, 1000),
    window=st.integers(0, 120 * SECOND),
    late=st.integers(0, 10**6),
)
def test_no_window_holds_more_than_was_reckoned(
    rate: float, per: int, burst: int, window: int, late: int
) -> None:
    """However a full bucket is spent: the reckoning is what a budget is judged by at the start."""
    limit = bucket.limit(rate * per / SECOND, per, burst)
    most = bucket.most_in_window(rate * per / SECOND, per, burst, window)
    assert burst + window // limit.interval <= most
    assert most <= burst + rate * window / SECOND + 1
    begin = T0 + late
    ends = (begin + limit.interval * count for count in range(1, 40))
    moments = [begin] * (burst + 1) + [end for end in ends if end <= begin + window]
    full_at, spent = NEVER_SEEN, 0
    for moment in moments:
        full_at, verdict = spend(full_at, limit, moment)
        spent += verdict.allowed
    assert spent <= most
