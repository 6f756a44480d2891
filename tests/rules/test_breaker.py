"""Both breakers: every state meets every input, then when and for how long, rows V3 and V8.

Random histories of many callers are in `test_breaker_histories.py`.
"""

from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.rules.breaker import (
    FIRST_PAUSE,
    JITTER,
    KEY_PAUSE,
    LONGEST_PAUSE,
    MIN_CALLS,
    PROBE_RETRY,
    UNLEARNED_PAUSE,
    WINDOW,
    FailureRateBreaker,
    KeyBreaker,
    KeyOutcome,
    Outcome,
    Permit,
    Phase,
    Tally,
)
from broker.units import SECOND

T0 = 1_000_000 * SECOND
"""A moment to start from, on a second's boundary."""

LATE = Permit(-1)
"""A permit of an epoch long gone."""


def full_pause() -> float:
    """Draw no jitter."""
    return 0.0


def permitted(breaker: KeyBreaker, now: int) -> tuple[KeyBreaker, Permit]:
    """Ask for leave that must be given."""
    breaker, permit = breaker.allow(now)
    assert permit is not None
    return breaker, permit


def call(health: FailureRateBreaker, outcome: Outcome, now: int = T0) -> FailureRateBreaker:
    """Make one call that must be let through."""
    health, permit = health.allow(now)
    assert permit is not None
    return health.settle(permit, outcome, now, full_pause)


def calls(health: FailureRateBreaker, outcomes: str, now: int = T0) -> FailureRateBreaker:
    """Make calls: `+` succeeds, `-` fails."""
    for sign in outcomes:
        health = call(health, Outcome.SUCCEEDED if sign == "+" else Outcome.FAILED, now)
    return health


# --- health: every state x every input

CLOSED = calls(FailureRateBreaker(), "++--")
BEFORE = Tally(T0 // SECOND, 4, 2)
TWICE = 2 * FIRST_PAUSE
OPEN = calls(FailureRateBreaker(), "-" * 10)
HALF_OPEN, PROBE = OPEN.allow(T0 + FIRST_PAUSE)
NOON = T0 + FIRST_PAUSE
AT = NOON + SECOND
"""When the inputs arrive: the pause is over, a probe is one second under way."""
GOOD, BAD = Tally(AT // SECOND, 1, 0), Tally(AT // SECOND, 1, 1)
REOPENED = FailureRateBreaker(Phase.OPEN, 3, AT + TWICE, (), TWICE)
AGAIN = FailureRateBreaker(Phase.OPEN, 3, AT, (), FIRST_PAUSE)


def test_the_three_states_are_what_they_are_called() -> None:
    """The table below starts from here."""
    assert (CLOSED.phase, OPEN.phase, HALF_OPEN.phase) == (
        Phase.CLOSED,
        Phase.OPEN,
        Phase.HALF_OPEN,
    )
    assert PROBE is not None
    assert (CLOSED.is_open, OPEN.is_open, HALF_OPEN.is_open) == (False, True, True)


@pytest.mark.parametrize(
    ("state", "permit", "outcome", "expected"),
    [
        (CLOSED, Permit(0), Outcome.SUCCEEDED, FailureRateBreaker(window=(BEFORE, GOOD))),
        (CLOSED, Permit(0), Outcome.FAILED, FailureRateBreaker(window=(BEFORE, BAD))),
        (CLOSED, Permit(0), Outcome.ABANDONED, CLOSED),
        (CLOSED, LATE, Outcome.SUCCEEDED, CLOSED),
        (CLOSED, LATE, Outcome.FAILED, CLOSED),
        (CLOSED, LATE, Outcome.ABANDONED, CLOSED),
        (OPEN, LATE, Outcome.SUCCEEDED, OPEN),
        (OPEN, LATE, Outcome.FAILED, OPEN),
        (OPEN, LATE, Outcome.ABANDONED, OPEN),
        (HALF_OPEN, PROBE, Outcome.SUCCEEDED, FailureRateBreaker(Phase.CLOSED, 3, 0)),
        (HALF_OPEN, PROBE, Outcome.FAILED, REOPENED),
        (HALF_OPEN, PROBE, Outcome.ABANDONED, AGAIN),
        (HALF_OPEN, LATE, Outcome.SUCCEEDED, HALF_OPEN),
        (HALF_OPEN, LATE, Outcome.FAILED, HALF_OPEN),
        (HALF_OPEN, LATE, Outcome.ABANDONED, HALF_OPEN),
    ],
)  # fmt: skip
def test_health_every_state_takes_every_outcome(
    state: FailureRateBreaker, permit: Permit, outcome: Outcome, expected: FailureRateBreaker
) -> None:
    """A permit of this epoch counts, one of another changes nothing, in any state."""
    assert state.settle(permit, outcome, AT, full_pause) == expected


@pytest.mark.parametrize(
    ("state", "now", "phase", "given_leave", "wait"),
    [
        (CLOSED, T0, Phase.CLOSED, True, 0),
        (CLOSED, T0 + WINDOW, Phase.CLOSED, True, 0),
        (OPEN, T0, Phase.OPEN, False, FIRST_PAUSE),
        (OPEN, NOON - 1, Phase.OPEN, False, 1),
        (OPEN, NOON, Phase.HALF_OPEN, True, 0),
        (OPEN, NOON + WINDOW, Phase.HALF_OPEN, True, 0),
        (HALF_OPEN, NOON, Phase.HALF_OPEN, False, PROBE_RETRY),
        (HALF_OPEN, NOON + LONGEST_PAUSE - 1, Phase.HALF_OPEN, False, 1),
        (HALF_OPEN, NOON + LONGEST_PAUSE, Phase.HALF_OPEN, True, 0),
    ],
)
def test_every_state_answers_a_call(
    state: FailureRateBreaker,
    now: int,
    phase: Phase,
    given_leave: bool,
    wait: int,
) -> None:
    """Leave exactly from the moment that `wait` had promised, not a microsecond earlier."""
    after, permit = state.allow(now)
    assert (after.phase, permit is not None, state.wait(now)) == (phase, given_leave, wait)


# --- health: when it opens


def test_nine_failures_are_not_enough_and_the_tenth_is() -> None:
    """Below ten calls no ratio means anything."""
    assert not calls(FailureRateBreaker(), "-" * (MIN_CALLS - 1)).is_open
    assert calls(FailureRateBreaker(), "-" * MIN_CALLS).is_open


@pytest.mark.parametrize(
    ("outcomes", "opens"),
    [
        ("+++++-----", True),
        ("++++++----", False),
        ("++++++-----", False),
        ("++++++------", True),
        ("-----+++++", False),
        ("---------+", False),
        ("---------+-", True),
    ],
)
def test_half_of_the_calls_have_to_fail(outcomes: str, opens: bool) -> None:
    """Half is enough, less is not; and only a failure opens, never a success."""
    assert calls(FailureRateBreaker(), outcomes).is_open is opens


@pytest.mark.parametrize(("apart", "opens"), [(29, True), (30, False), (3600, False)])
def test_failures_are_forgotten_after_the_window(apart: int, opens: bool) -> None:
    """Nine old failures and a new one open only within thirty seconds."""
    health = calls(FailureRateBreaker(), "-" * 9)
    assert calls(health, "-", T0 + apart * SECOND).is_open is opens


def test_the_window_holds_no_more_than_its_seconds() -> None:
    """Memory is bounded however long the vendor is called and however often."""
    health = FailureRateBreaker()
    for n in range(2000):
        health = calls(health, "++-", T0 + n * SECOND // 10)
    assert len(health.window) == WINDOW // SECOND
    assert sum(tally.calls for tally in health.window) == 900


def test_failures_in_the_future_do_not_count() -> None:
    """After a clock that stepped back, what was counted before it is forgotten."""
    health = calls(FailureRateBreaker(), "-" * 9, T0 + 3600 * SECOND)
    assert not calls(health, "-").is_open


# --- health: how long


def test_pauses_double_up_to_a_minute_and_begin_anew_after_a_success() -> None:
    """5, 10, 20, 40, 60, 60 seconds; a probe that succeeds makes it as if nothing had been."""
    health = calls(FailureRateBreaker(), "-" * 10)
    pauses = []
    for _ in range(6):
        before = health.until
        pauses.append(health.pause // SECOND)
        health = call(health, Outcome.FAILED, before)
        assert health.until - before == health.pause
    assert pauses == [5, 10, 20, 40, 60, 60]
    health = call(health, Outcome.SUCCEEDED, health.until)
    assert (health.phase, health.window, health.pause) == (Phase.CLOSED, (), 0)
    again = calls(health, "-" * 10)
    assert (again.pause, again.until) == (FIRST_PAUSE, T0 + FIRST_PAUSE)


def test_after_a_success_it_takes_ten_failures_again() -> None:
    """What was counted during the outage is not held against the vendor that is back."""
    health = call(calls(FailureRateBreaker(), "-" * 10), Outcome.SUCCEEDED, NOON)
    assert not calls(health, "-" * 9, NOON).is_open


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 8))
def test_jitter_only_shortens_a_pause_and_never_by_much(drawn: float, failed_probes: int) -> None:
    """A minute stays the longest pause; replicas that opened together probe apart."""
    health = calls(FailureRateBreaker(), "-" * 10)
    for _ in range(failed_probes):
        health = call(health, Outcome.FAILED, health.until)
    now = health.until
    health, permit = health.allow(now)
    assert permit is not None
    health = health.settle(permit, Outcome.FAILED, now, lambda: drawn)
    assert health.pause * (1 - JITTER) <= health.until - now <= health.pause <= LONGEST_PAUSE


def test_an_abandoned_probe_does_not_lengthen_the_pause() -> None:
    """It says nothing: the next failure doubles what the last failure had set."""
    health = call(OPEN, Outcome.ABANDONED, NOON)
    health = call(health, Outcome.FAILED, NOON)
    assert health.pause == 2 * FIRST_PAUSE


@pytest.mark.parametrize("state", [OPEN, HALF_OPEN])
def test_a_clock_that_steps_back_locks_nobody_out(state: FailureRateBreaker) -> None:
    """The deadline follows the clock down, so the next call is a minute away at most."""
    after, permit = state.allow(T0 - 3600 * SECOND)
    assert permit is None
    assert after.until == T0 - 3600 * SECOND + LONGEST_PAUSE
    assert after.wait(T0 - 3600 * SECOND) <= LONGEST_PAUSE
    assert state.wait(T0 - 3600 * SECOND) <= LONGEST_PAUSE


# --- V8


def test_V8_of_a_thousand_waiters_one_probes() -> None:
    """The pause is over, all ask at once: one goes, the others are told to come in a second."""
    health, tickets = OPEN, []
    for _ in range(1000):
        health, permit = health.allow(NOON)
        tickets.append(permit)
    assert sum(permit is not None for permit in tickets) == 1
    assert health.wait(NOON) == PROBE_RETRY


def test_V8_a_cancelled_probe_hands_its_turn_on() -> None:
    """Each time a prober goes away the next caller probes, at once, and again only one."""
    health = OPEN
    for _ in range(100):
        health, first = health.allow(NOON)
        health, second = health.allow(NOON)
        assert first is not None
        assert second is None
        health = health.settle(first, Outcome.ABANDONED, NOON, full_pause)
        assert health.wait(NOON) == 0


def test_V8_a_lost_probe_is_replaced_and_its_late_word_is_void() -> None:
    """Nobody reports back for a minute: another probe goes, and only that one counts."""
    assert PROBE is not None
    health, second = HALF_OPEN.allow(NOON + LONGEST_PAUSE)
    assert second is not None
    assert health.settle(PROBE, Outcome.FAILED, NOON + LONGEST_PAUSE, full_pause) is health
    assert health.settle(PROBE, Outcome.ABANDONED, NOON + LONGEST_PAUSE, full_pause) is health
    settled = health.settle(second, Outcome.SUCCEEDED, NOON + LONGEST_PAUSE, full_pause)
    assert not settled.is_open


def test_V8_calls_from_before_the_outage_do_not_disturb_the_probe() -> None:
    """A thousand calls that hung through it fail one by one, before, during and after."""
    closed = FailureRateBreaker()
    closed, slow = closed.allow(T0)
    assert slow is not None
    opened = calls(closed, "-" * 10)
    assert opened.settle(slow, Outcome.FAILED, NOON, full_pause) is opened
    probing, permit = opened.allow(NOON)
    assert permit is not None
    assert probing.settle(slow, Outcome.FAILED, NOON, full_pause) is probing
    assert probing.settle(slow, Outcome.SUCCEEDED, NOON, full_pause) is probing
    recovered = probing.settle(permit, Outcome.SUCCEEDED, NOON, full_pause)
    assert recovered.settle(slow, Outcome.FAILED, NOON, full_pause) is recovered


# --- credentials: every state x every input

GOOD = KeyBreaker()
DOUBTED = GOOD.settle(Permit(0), KeyOutcome.ROTATED, T0)
SHUT = GOOD.settle(Permit(0), KeyOutcome.REJECTED, T0)
TRIED, TRIAL = permitted(SHUT, T0 + KEY_PAUSE)
THEN = T0 + KEY_PAUSE + SECOND

_KeyCase: TypeAlias = tuple[KeyBreaker, int, KeyOutcome, KeyBreaker]


def _shut(epoch: int, until: int) -> KeyBreaker:
    return KeyBreaker(Phase.OPEN, epoch, until, rejected=True)


def _key_cases() -> list[_KeyCase]:
    table: list[_KeyCase] = [
        (GOOD, GOOD.epoch, KeyOutcome.ACCEPTED, GOOD),
        (GOOD, GOOD.epoch, KeyOutcome.REJECTED, _shut(1, THEN + KEY_PAUSE)),
        (GOOD, GOOD.epoch, KeyOutcome.ROTATED, KeyBreaker(Phase.CLOSED, 1, THEN, rejected=True)),
        (GOOD, GOOD.epoch, KeyOutcome.THROTTLED, GOOD),
        (GOOD, GOOD.epoch, KeyOutcome.UNKNOWN, GOOD),
        (GOOD, GOOD.epoch, KeyOutcome.ABANDONED, GOOD),
        (DOUBTED, 1, KeyOutcome.ACCEPTED, KeyBreaker(Phase.CLOSED, 1, T0)),
        (DOUBTED, 1, KeyOutcome.REJECTED, _shut(2, THEN + KEY_PAUSE)),
        (DOUBTED, 1, KeyOutcome.ROTATED, KeyBreaker(Phase.CLOSED, 2, THEN, rejected=True)),
        (DOUBTED, 1, KeyOutcome.THROTTLED, _shut(2, THEN + KEY_PAUSE)),
        (DOUBTED, 1, KeyOutcome.UNKNOWN, DOUBTED),
        (DOUBTED, 1, KeyOutcome.ABANDONED, DOUBTED),
        (TRIED, TRIAL, KeyOutcome.ACCEPTED, KeyBreaker(Phase.CLOSED, 3, 0)),
        (TRIED, TRIAL, KeyOutcome.REJECTED, _shut(3, THEN + KEY_PAUSE)),
        (TRIED, TRIAL, KeyOutcome.ROTATED, _shut(3, THEN)),
        (TRIED, TRIAL, KeyOutcome.THROTTLED, _shut(3, THEN + KEY_PAUSE)),
        (TRIED, TRIAL, KeyOutcome.UNKNOWN, _shut(3, THEN + UNLEARNED_PAUSE)),
        (TRIED, TRIAL, KeyOutcome.ABANDONED, _shut(3, THEN)),
    ]
    late: list[_KeyCase] = [
        (state, LATE, outcome, state)
        for state in (GOOD, DOUBTED, SHUT, TRIED)
        for outcome in KeyOutcome
    ]
    return table + late


@pytest.mark.parametrize(("state", "permit", "outcome", "expected"), _key_cases())
def test_credentials_every_state_takes_every_outcome(
    state: KeyBreaker, permit: Permit, outcome: KeyOutcome, expected: KeyBreaker
) -> None:
    """A permit of this epoch counts, one of another changes nothing, in any state."""
    assert state.settle(permit, outcome, THEN) == expected


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (GOOD, KeyBreaker(Phase.CLOSED, 1, THEN)),
        (DOUBTED, KeyBreaker(Phase.CLOSED, 2, THEN, rejected=True)),
        (SHUT, _shut(2, THEN)),
        (TRIED, _shut(3, THEN)),
    ],
)
def test_every_state_takes_new_keys(state: KeyBreaker, expected: KeyBreaker) -> None:
    """Old tickets are void; what was shut lets one call through at once."""
    assert state.keys_changed(THEN) == expected


# --- V3


def test_V3_a_dead_key_is_tried_twice_a_minute_whatever_the_traffic() -> None:
    """A thousand asks a second for ten minutes: one call, then one every thirty seconds."""
    breaker, tried = KeyBreaker(), []
    for n in range(600_000):
        now = T0 + n * SECOND // 1000
        breaker, permit = breaker.allow(now)
        if permit is not None:
            tried.append(now - T0)
            breaker = breaker.settle(permit, KeyOutcome.REJECTED, now)
    assert tried == [n * KEY_PAUSE for n in range(20)]


def test_V3_a_throttle_after_a_bad_key_is_about_the_key() -> None:
    """401, then 429 on each probe: shut until a key is accepted, then 429 is pace again."""
    breaker = SHUT
    for n in range(1, 5):
        breaker, permit = permitted(breaker, T0 + n * KEY_PAUSE)
        breaker = breaker.settle(permit, KeyOutcome.THROTTLED, T0 + n * KEY_PAUSE)
        assert breaker.rejected
        assert breaker.wait(T0 + n * KEY_PAUSE) == KEY_PAUSE
    breaker, permit = permitted(breaker, T0 + 5 * KEY_PAUSE)
    breaker = breaker.settle(permit, KeyOutcome.ACCEPTED, T0 + 5 * KEY_PAUSE)
    breaker, permit = permitted(breaker, T0 + 5 * KEY_PAUSE)
    assert breaker.settle(permit, KeyOutcome.THROTTLED, T0 + 5 * KEY_PAUSE) == breaker
    assert not breaker.rejected


def test_V3_new_keys_are_tried_at_once_and_by_one_call() -> None:
    """A second after the file changed the site is back; until then one call, not a burst."""
    breaker = SHUT.keys_changed(T0 + SECOND)
    breaker, permit = permitted(breaker, T0 + SECOND)
    assert breaker.allow(T0 + SECOND)[1] is None
    assert not breaker.settle(permit, KeyOutcome.ACCEPTED, T0 + SECOND).is_open


def test_V3_a_probe_of_the_old_key_says_nothing_about_the_new_one() -> None:
    """The file changed while the old key was out: its 401 does not shut the new key's door."""
    changed = TRIED.keys_changed(THEN)
    assert changed.settle(TRIAL, KeyOutcome.REJECTED, THEN) is changed
    assert changed.wait(THEN) == 0


def test_V3_a_call_with_the_old_key_does_not_shut_out_the_new_one() -> None:
    """The same while all was well: calls under way end with 401 after the keys were changed."""
    breaker, permit = permitted(KeyBreaker(), T0)
    changed = breaker.keys_changed(T0)
    assert not changed.settle(permit, KeyOutcome.REJECTED, T0).is_open


def test_V3_a_burst_under_way_when_the_key_dies_counts_once() -> None:
    """Eight calls end with 401 together: shut once, thirty seconds from the first."""
    breaker, tickets = KeyBreaker(), []
    for _ in range(8):
        breaker, permit = permitted(breaker, T0)
        tickets.append(permit)
    for n, permit in enumerate(tickets):
        breaker = breaker.settle(permit, KeyOutcome.REJECTED, T0 + n)
    assert breaker == SHUT


def test_V3_with_a_second_key_nobody_is_stopped() -> None:
    """The first of two keys dies under load: calls go on, and the late 401s change nothing."""
    breaker, old = permitted(KeyBreaker(), T0)
    breaker = breaker.settle(old, KeyOutcome.ROTATED, T0)
    breaker, new = permitted(breaker, T0)
    breaker = breaker.settle(new, KeyOutcome.ACCEPTED, T0)
    assert breaker.settle(old, KeyOutcome.REJECTED, T0) is breaker
    assert (breaker.is_open, breaker.rejected) == (False, False)
