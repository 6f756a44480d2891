"""Circuit breakers as states: no clock, no tasks, no I/O.  Microseconds and integers.

A breaker is asked before a call to the vendor and told how the call ended.  `FailureRateBreaker`
stops calls while the vendor is unwell, `KeyBreaker` while our key is bad: the vendor counts failed
authentication against our address, so a dead key must not be tried at the rate of the traffic.
Does not know what a call is, nor which answers count as failures: its caller sorts them.

                 too many failures,                 the moment has come:
                 or a bad key                       one call, the probe
        CLOSED ----------------------->  OPEN  ------------------------->  HALF_OPEN
           ^                               ^                                |   |
           |                               +--------------------------------+   |
           |                                 failed, or told us nothing         |
           +--------------------------------------------------------------------+
                                         succeeded

Theory of operation.  `allow` hands out a permit, which comes back with the outcome.  Every change
of phase begins a new epoch, and a permit counts only in the epoch in which it was given.  So
the thousand calls that an outage left behind cannot disturb the probe, a slow failure of
yesterday's outage cannot open today's breaker, and a probe of the old key says nothing about
the new one.

Invariants: while a breaker is not closed, at most one permit is valid; whatever is cancelled,
lost or left unsaid, a call is let through again after `LONGEST_PAUSE` at the latest.  `until`
is cut to that on each refusal, so a clock that stepped back locks nobody out for longer.
"""

from collections.abc import Callable
from enum import Enum
from typing import ClassVar, NewType, Self, assert_never

from msgspec import Struct
from msgspec.structs import replace
from typing_extensions import override

from broker.units import SECOND

WINDOW = 30 * SECOND
"""Failures are weighed over this time; kept by the second, so a call counts for 29 to 30."""

MIN_CALLS = 10
"""Calls in the window below which no ratio means anything."""

FIRST_PAUSE, LONGEST_PAUSE = 5 * SECOND, 60 * SECOND
"""Microseconds that calls stop: first 5 s, doubled by each probe that fails, never over 60 s."""

JITTER = 0.2
"""Share of a pause that a draw may take away, so that replicas do not probe in step."""

KEY_PAUSE = 30 * SECOND
"""Microseconds between two tries of a bad key: two a minute, where the vendor allows 30."""

UNLEARNED_PAUSE = 10 * SECOND
"""Microseconds after a probe of the key that told nothing.  It may have been counted as a failed
authentication all the same, so six a minute at most."""

PROBE_RETRY = SECOND
"""Microseconds that those are told to wait who come while a probe is out."""

Permit = NewType("Permit", int)
"""Leave to make one call; returned with its outcome."""


class Phase(Enum):
    """What a breaker does with calls."""

    CLOSED = "closed"
    """Lets them through."""
    OPEN = "open"
    """Stops them until its moment has come, then lets one through."""
    HALF_OPEN = "probing"
    """Stops them while that one is under way."""


class Outcome(Enum):
    """How a call ended, as far as the vendor's health goes."""

    SUCCEEDED = "succeeded"
    """An answer; a refusal is one too."""
    FAILED = "failed"
    """No answer, or none to build on."""
    ABANDONED = "abandoned"
    """Given up on our side before it could tell."""


class KeyOutcome(Enum):
    """How a call ended, as far as our key goes."""

    ACCEPTED = "accepted"
    """An answer that only a good key gets."""
    REJECTED = "rejected"
    """The key is bad and no other is left."""
    ROTATED = "rotated"
    """The key is bad, and the next one takes its place."""
    THROTTLED = "throttled"
    """429: after a bad key it is the throttle for failed authentication."""
    UNKNOWN = "unknown"
    """Nothing about the key: no answer, or not one of the vendor's own."""
    ABANDONED = "abandoned"
    """Given up on our side before it was sent."""


class Breaker(Struct, frozen=True):
    """What both breakers share: the phases, and one probe at a time.

    `until` is the microsecond at which the next probe may go: in OPEN the end of the pause, in
    HALF_OPEN the moment at which the probe under way is taken for lost.
    """

    longest: ClassVar[int] = LONGEST_PAUSE

    phase: Phase = Phase.CLOSED
    epoch: int = 0
    until: int = 0

    def allow(self, now: int) -> tuple[Self, Permit | None]:
        """Ask for leave to make a call at `now`; without a permit it must not be made."""
        if self.phase is Phase.CLOSED:
            return self, Permit(self.epoch)
        if now < self.until:
            return replace(self, until=min(self.until, now + self.longest)), None
        probing = self._enter(Phase.HALF_OPEN, now + self.longest)
        return probing, Permit(probing.epoch)

    def wait(self, now: int) -> int:
        """Return the microseconds after which a call may be let through; 0 for at once."""
        if self.phase is Phase.CLOSED:
            return 0
        left = min(max(self.until - now, 0), self.longest)
        return min(left, PROBE_RETRY) if self.phase is Phase.HALF_OPEN else left

    @property
    def is_open(self) -> bool:
        """Whether calls are being stopped."""
        return self.phase is not Phase.CLOSED

    def _enter(self, phase: Phase, until: int) -> Self:
        return replace(self, phase=phase, epoch=self.epoch + 1, until=until)


class Tally(Struct, frozen=True, gc=False):
    """The calls that ended within one second; `second` is that second's number."""

    second: int
    calls: int
    failures: int


class FailureRateBreaker(Breaker, frozen=True):
    """Stops calls while half of them or more fail.

    `window` holds the tallies of the last `span`, oldest first; `pause` is how long the present
    opening was meant to last, 0 while closed.
    """

    span: ClassVar[int] = WINDOW
    min_calls: ClassVar[int] = MIN_CALLS
    first: ClassVar[int] = FIRST_PAUSE

    window: tuple[Tally, ...] = ()
    pause: int = 0

    def settle(self, permit: Permit, outcome: Outcome, now: int, draw: Callable[[], float]) -> Self:
        """Take a permit back; `draw` returns a number in [0, 1) that may shorten a pause."""
        if permit != self.epoch:
            return self
        if self.phase is Phase.CLOSED:
            return self._weigh(outcome, now, draw)
        match outcome:
            case Outcome.SUCCEEDED:
                return replace(self._enter(Phase.CLOSED, 0), pause=0)
            case Outcome.FAILED:
                return self._open(now, 2 * self.pause, draw)
            case Outcome.ABANDONED:
                return self._enter(Phase.OPEN, now)
            case _:
                assert_never(outcome)

    def _weigh(self, outcome: Outcome, now: int, draw: Callable[[], float]) -> Self:
        """Count a call; only a failure opens, so a pause always begins at one."""
        if outcome is Outcome.ABANDONED:
            return self
        failed = outcome is Outcome.FAILED
        window = _count(self.window, self.span, now, 1, int(failed))
        calls = sum(tally.calls for tally in window)
        failures = sum(tally.failures for tally in window)
        if failed and calls >= self.min_calls and 2 * failures >= calls:
            return self._open(now, self.first, draw)
        return replace(self, window=window)

    def _open(self, now: int, pause: int, draw: Callable[[], float]) -> Self:
        pause = min(pause, self.longest)
        until = now + pause - int(pause * JITTER * draw())
        return replace(self._enter(Phase.OPEN, until), window=(), pause=pause)


class StoreBreaker(FailureRateBreaker, frozen=True):
    """The same for a store nearby, which answers thousands of calls a second, each at once.

    Without it there is another way to go on, so it opens after a second at most, and probes soon.
    """

    longest = 5 * SECOND
    """Microseconds: replicas that are back at a store soon share their limits again soon."""
    span = SECOND
    """Microseconds: successes of the time before a hang must not outweigh it for long."""
    min_calls = 5
    """One that is slow, and a few that fail while a server restarts, do not count."""
    first = SECOND // 2
    """Microseconds: a restart of the server takes about as long."""

    streak: int = 0
    """Failures without a success between: with `min_calls` of them it opens, however slowly they
    came, because at night there is only a heartbeat a second."""

    def succeeded(self, calls: int, now: int) -> Self:
        """Count calls that went well, several at once: one by one would cost more than a call."""
        return replace(self, window=_count(self.window, self.span, now, calls, 0), streak=0)

    @override
    def _weigh(self, outcome: Outcome, now: int, draw: Callable[[], float]) -> Self:
        if outcome is not Outcome.FAILED:
            return super()._weigh(outcome, now, draw)
        failing = replace(self, streak=self.streak + 1)
        if failing.streak >= self.min_calls:
            return failing._open(now, self.first, draw)  # noqa: SLF001 - it is one of us
        return super(StoreBreaker, failing)._weigh(outcome, now, draw)

    @override
    def _open(self, now: int, pause: int, draw: Callable[[], float]) -> Self:
        return replace(super()._open(now, pause, draw), streak=0)


class KeyBreaker(Breaker, frozen=True):
    """Stops calls while no key is good.

    `rejected` says that the last answer about a key was a refusal.  It outlives a change of the
    key file: until a key was accepted, a 429 is the throttle for failed authentication.
    """

    rejected: bool = False

    def settle(self, permit: Permit, outcome: KeyOutcome, now: int) -> Self:  # noqa: PLR0911 - a line an outcome
        """Take a permit back."""
        if permit != self.epoch:
            return self
        match outcome:
            case KeyOutcome.ACCEPTED:
                return self._accept()
            case KeyOutcome.REJECTED:
                return self._reject(now + KEY_PAUSE)
            case KeyOutcome.ROTATED:
                return self._next_key(now, rejected=True)
            case KeyOutcome.THROTTLED:
                return self._throttle(now)
            case KeyOutcome.UNKNOWN:
                return self._learned_nothing(now + UNLEARNED_PAUSE)
            case KeyOutcome.ABANDONED:
                return self._learned_nothing(now)
            case _:
                assert_never(outcome)

    def keys_changed(self, now: int) -> Self:
        """Take note of new keys: permits of the old ones are void, and a probe may go at once."""
        return self._next_key(now, rejected=self.rejected)

    def _accept(self) -> Self:
        closed = self._enter(Phase.CLOSED, 0) if self.is_open else self
        return replace(closed, rejected=False)

    def _reject(self, until: int) -> Self:
        return replace(self._enter(Phase.OPEN, until), rejected=True)

    def _throttle(self, now: int) -> Self:
        if self.rejected:
            return self._reject(now + KEY_PAUSE)
        return self._learned_nothing(now + UNLEARNED_PAUSE)

    def _next_key(self, now: int, *, rejected: bool) -> Self:
        """Begin anew with a key of which nothing is known; once open, it has to pass a probe."""
        phase = Phase.OPEN if self.is_open else Phase.CLOSED
        return replace(self._enter(phase, now), rejected=rejected)

    def _learned_nothing(self, until: int) -> Self:
        return self._enter(Phase.OPEN, until) if self.is_open else self


def _count(
    window: tuple[Tally, ...], span: int, now: int, calls: int, failures: int
) -> tuple[Tally, ...]:
    """Add calls to the tally of their second; drop those that have left the window."""
    second = now // SECOND
    kept = [tally for tally in window if 0 <= second - tally.second < span // SECOND]
    last = kept.pop() if kept and kept[-1].second == second else Tally(second, 0, 0)
    return (*kept, Tally(second, last.calls + calls, last.failures + failures))
