"""Silence, as a rule: who is killed for it, and who is not."""

from hypothesis import given
from hypothesis import strategies as st

from broker.rules import hangs
from broker.rules.hangs import QUIET, Pulse

ROUND = 0.5
DRAIN = 32.0

pauses = st.floats(0, 1e6)
"""Seconds between two looks: a machine may sleep for days."""


def watch(pulse: Pulse, looks: list[tuple[float, float]]) -> Pulse:
    """Look at a ready worker; each look is (beat, seconds since the last)."""
    for beat, elapsed in looks:
        pulse = pulse.after(beat, elapsed, ready=True)
    return pulse


@given(pauses)
def test_N10_one_that_stands_is_killed_within_ten_seconds(beat: float) -> None:
    """By looks twice a second; it is not counted on before that."""
    pulse, seconds = Pulse(beat + 1, 0.0, ready=True), 0.0
    quiet_after = None
    while not pulse.is_hung(DRAIN):
        pulse = watch(pulse, [(beat + 1, ROUND)])
        seconds += ROUND
        if pulse.is_quiet and quiet_after is None:
            quiet_after = seconds
    assert seconds + ROUND <= 10
    assert quiet_after is not None
    assert quiet_after < seconds


@given(st.lists(st.floats(0, hangs.QUIET - hangs.LONGEST_LOOK), min_size=1))
def test_N10_a_slow_loop_is_not_killed(pauses: list[float]) -> None:
    """It stands for two seconds again and again: a slow disk, a collection; it is counted on."""
    pulse, beat = Pulse(), 1.0
    for pause in pauses:
        looks = int(pause / ROUND)
        pulse = watch(pulse, [(beat, ROUND)] * looks)
        beat += pause + ROUND
        assert not pulse.is_quiet
        pulse = watch(pulse, [(beat, ROUND)])
        assert not pulse.is_hung(DRAIN)


@given(st.lists(pauses, max_size=30), pauses)
def test_N10_who_was_away_itself_has_missed_nothing(pauses: list[float], away: float) -> None:
    """A suspended machine: the watcher wakes first, and sees old beats and a clock far ahead."""
    pulse, beat = Pulse(1.0, 0.0, ready=True), 1.0
    for pause in pauses:
        pulse = watch(pulse, [(beat, away), (beat, pause)])
        assert not pulse.is_quiet
        beat += 0.5
        pulse = watch(pulse, [(beat, ROUND)])


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_N10_any_change_of_the_beat_is_a_sign_of_life(before: float, after: float) -> None:
    """Whatever the clocks of two processes say: only the difference counts."""
    pulse = Pulse(before, hangs.HUNG * 2, ready=True)
    assert pulse.after(after, 60.0, ready=True).is_hung(DRAIN) is (before == after and before > 0)


def test_N10_a_start_has_its_own_time_and_no_more() -> None:
    """Signs of life do not prolong it; and who is ready at last begins anew."""
    pulse, seconds = Pulse(), 0.0
    while not pulse.is_hung(DRAIN):
        assert not pulse.is_quiet
        last, pulse = pulse, pulse.after(seconds, ROUND, ready=False)
        seconds += ROUND
    assert seconds == hangs.START
    ready = last.after(last.beat, ROUND, ready=True)
    assert (ready.quiet, ready.is_hung(DRAIN)) == (0.0, False)


def test_N10_one_that_drains_by_itself_has_the_time_of_a_drain() -> None:
    """It was told to end, beats no more, and its last requests may take long."""
    pulse, seconds = Pulse(5.0, 0.0, ready=True), 0.0
    while not pulse.is_hung(DRAIN):
        pulse = watch(pulse, [(0.0, ROUND)])
        seconds += ROUND
    assert DRAIN <= seconds <= DRAIN + 2 * ROUND


def test_N10_silence_counts_from_its_last_second_on() -> None:
    """Quiet after `QUIET` seconds and not before; stuck only if it did not say that it drains."""
    pulse = Pulse().after(7.0, 1.0, ready=True)
    for second in range(1, int(QUIET) + 1):
        pulse = pulse.after(7.0, 1.0, ready=True)
        assert pulse.is_quiet is pulse.is_stuck is (second >= QUIET)
    drains = pulse.after(0.0, 1.0, ready=True)
    assert not drains.is_quiet
    for _ in range(int(QUIET)):
        drains = drains.after(0.0, 1.0, ready=True)
    assert (drains.is_quiet, drains.is_stuck) == (True, False)
    assert not Pulse(1.0, 2 * QUIET, ready=False).is_quiet
