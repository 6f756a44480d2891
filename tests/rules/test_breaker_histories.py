"""Random histories of all breakers: any callers, any patience, any order, any clock."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from typing_extensions import override

from broker.rules.breaker import (
    Breaker,
    FailureRateBreaker,
    KeyBreaker,
    KeyOutcome,
    Outcome,
    Permit,
    Phase,
    StoreBreaker,
)
from broker.units import SECOND

T0 = 1_000_000 * SECOND


class _History(RuleBasedStateMachine):
    """Any number of callers, of any patience, at any time, on either breaker."""

    outcomes: tuple[Outcome | KeyOutcome, ...]
    breaker: Breaker

    def __init__(self) -> None:
        super().__init__()
        self.now = T0
        self.out: list[Permit] = []
        self.void: list[Permit] = []
        self.last_news = T0

    def settle(self, permit: Permit, outcome: Outcome | KeyOutcome, drawn: float) -> None:
        """Hand a permit back."""
        raise NotImplementedError

    @rule(by=st.integers(0, 90 * SECOND))
    def time_passes(self, by: int) -> None:
        """Up to a minute and a half."""
        self.now += by

    @rule()
    def time_passes_as_promised(self) -> None:
        """To the moment that those who were refused were told."""
        self.now += self.breaker.wait(self.now)

    @rule(callers=st.integers(1, 5))
    def callers_come(self, callers: int) -> None:
        """Several at the same moment; while it is not closed, at most one is let through."""
        was_open, wait = self.breaker.is_open, self.breaker.wait(self.now)
        given_leave = 0
        for _ in range(callers):
            self.breaker, permit = self.breaker.allow(self.now)
            if permit is not None:
                given_leave += 1
                self.out.append(permit)
        assert given_leave == (wait == 0 if was_open else callers)
        if given_leave:
            self.last_news = self.now

    @precondition(lambda self: self.out)
    @rule(data=st.data(), drawn=st.floats(0, 1, exclude_max=True))
    def a_call_ends(self, data: st.DataObject, drawn: float) -> None:
        """Any of those under way, in any order, with any outcome."""
        permit = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        before = self.breaker
        counts = permit == before.epoch
        self.settle(permit, data.draw(st.sampled_from(self.outcomes)), drawn)
        if counts:
            self.last_news = self.now
        else:
            assert self.breaker is before

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def a_call_is_lost(self, data: st.DataObject) -> None:
        """Its permit never comes back."""
        self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))

    @invariant()
    def at_most_one_permit_counts_unless_closed(self) -> None:
        """However many calls are under way."""
        if self.breaker.is_open:
            assert self.out.count(Permit(self.breaker.epoch)) <= 1

    @invariant()
    def nobody_waits_longer_than_the_longest_pause_since_the_last_news(self) -> None:
        """Count from the last leave that was given, or outcome that counted."""
        longest = self.breaker.longest
        assert 0 <= self.breaker.wait(self.now) <= longest
        assert self.breaker.allow(self.last_news + longest)[1] is not None

    @invariant()
    def who_waits_as_told_is_let_through_or_sees_a_probe(self) -> None:
        """Keep the promise of `wait`: at that moment a call may go, or one is under way."""
        ready = self.now + self.breaker.wait(self.now)
        probing = self.breaker.phase is Phase.HALF_OPEN
        assert probing or self.breaker.allow(ready)[1] is not None


class _HealthHistory(_History):
    outcomes = tuple(Outcome)

    @initialize()
    def begin(self) -> None:
        """Start closed, with nothing counted."""
        self.breaker: FailureRateBreaker = FailureRateBreaker()
        self.last_failure = T0

    @override
    def settle(self, permit: Permit, outcome: Outcome | KeyOutcome, drawn: float) -> None:
        assert isinstance(outcome, Outcome)
        before = self.breaker
        self.breaker = before.settle(permit, outcome, self.now, lambda: drawn)
        if outcome is Outcome.FAILED and self.breaker is not before:
            self.last_failure = self.now

    @rule(failures=st.integers(1, 12))
    def the_vendor_is_down(self, failures: int) -> None:
        """Let calls fail as soon as they are made."""
        for _ in range(failures):
            self.breaker, permit = self.breaker.allow(self.now)
            if permit is not None:
                self.last_news = self.now
                self.settle(permit, Outcome.FAILED, 0.0)

    @invariant()
    def no_pause_outlasts_the_longest_after_the_last_failure(self) -> None:
        """Then it is closed, has a probe out, or lets one go."""
        if self.breaker.phase is Phase.OPEN:
            assert self.breaker.until <= self.last_failure + self.breaker.longest or (
                self.breaker.allow(self.now)[1] is not None
            )

    @invariant()
    def the_window_is_bounded(self) -> None:
        """And empty unless calls are being counted."""
        assert len(self.breaker.window) <= self.breaker.span // SECOND
        assert not (self.breaker.is_open and self.breaker.window)
        assert self.breaker.is_open == bool(self.breaker.pause)


class _StoreHealthHistory(_HealthHistory):
    @initialize()
    @override
    def begin(self) -> None:
        """Start closed, with nothing counted."""
        self.breaker: StoreBreaker = StoreBreaker()
        self.last_failure = T0

    @precondition(lambda self: not self.breaker.is_open)
    @rule(calls=st.integers(1, 10_000))
    def calls_went_well(self, calls: int) -> None:
        """Tally them all at once: that opens nothing, and ends a row of failures."""
        self.breaker = self.breaker.succeeded(calls, self.now)
        assert not self.breaker.is_open
        assert self.breaker.streak == 0

    @rule()
    def the_store_is_gone(self) -> None:
        """Five failures without a success between are enough, however slowly they come."""
        for _ in range(self.breaker.min_calls):
            if self.breaker.is_open:
                return
            self.now += 2 * self.breaker.span
            self.breaker, permit = self.breaker.allow(self.now)
            assert permit is not None
            self.last_news = self.now
            self.settle(permit, Outcome.FAILED, 0.0)
        assert self.breaker.is_open

    @invariant()
    def a_row_of_failures_is_short(self) -> None:
        """Or it would have opened."""
        assert 0 <= self.breaker.streak < self.breaker.min_calls
        assert not (self.breaker.is_open and self.breaker.streak)


class _CredentialsHistory(_History):
    outcomes = tuple(KeyOutcome)

    @initialize()
    def begin(self) -> None:
        """Start closed, with no key ever refused."""
        self.breaker: KeyBreaker = KeyBreaker()

    @override
    def settle(self, permit: Permit, outcome: Outcome | KeyOutcome, drawn: float) -> None:
        assert isinstance(outcome, KeyOutcome)
        self.breaker = self.breaker.settle(permit, outcome, self.now)

    @rule()
    def the_key_file_changes(self) -> None:
        """Whatever is under way no longer counts, and a call may go at once."""
        self.breaker = self.breaker.keys_changed(self.now)
        self.last_news = self.now
        assert self.breaker.epoch not in self.out
        assert self.breaker.wait(self.now) == 0

    @invariant()
    def shut_means_that_a_key_was_refused(self) -> None:
        """So a 429 on a probe is always about the key."""
        assert self.breaker.rejected or not self.breaker.is_open


TestHealthHistories = _HealthHistory.TestCase
TestStoreHealthHistories = _StoreHealthHistory.TestCase
TestCredentialsHistories = _CredentialsHistory.TestCase
