"""The story of a request, whole: rows F1-F9, T1-T9, L5, L6, M2 and M4 at the token service.

The promises that the service keeps across these rows are in `test_promises.py`.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service import AGENT, Service, belongs_to, limits, session_of, visitor

from broker import errors
from broker.issue import IssuedToken
from broker.issuers.base import Turn
from broker.key_backoff import CAP as BACKOFF_CAP
from broker.model import LimitName, Minted, Outcome, TokenRequest
from broker.pacing.pacer import BudgetPacer
from broker.pacing.slots import Budget
from broker.stores.base import Kept, Rejection
from broker.testing import FakeClock, run_virtual
from broker.units import SECOND

A_BIT = 0.01
"""Seconds: more than the ticks of a virtual loop add up to."""

HOUR = 3600

ONE_AT_A_TIME = Budget(rate=60, per=60, burst=1, max_wait=30)
"""A slot a second, so that a mint queues first."""


async def queueing(budget: Budget = ONE_AT_A_TIME) -> BudgetPacer:
    """A budget whose next slot is an interval away."""
    pacer = BudgetPacer(budget, lambda _seconds: None)
    await pacer.start()
    return pacer


def failing(error: Exception, times: int = 1_000_000) -> Callable[[TokenRequest], None]:
    """Fail so many mints, then none."""
    left = iter(range(times))

    def fail(_request: TokenRequest) -> None:
        if next(left, None) is not None:
            raise error

    return fail


def fixed(*draws: float) -> Callable[[], float]:
    """Draw these, then the last one for ever."""

    def numbers() -> Iterator[float]:
        yield from draws
        while True:
            yield draws[-1]

    return numbers().__next__


# --- flights --------------------------------------------------------------------------------------


def test_F1_a_thousand_first_requests_are_one_mint_one_token_one_charge() -> None:
    """One vendor call, one session, one charge of the agent and of the visitor's mints."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock, limits=limits(mints=(0.001, 1000), agent=(0.001, 1000)))
        service.issuer.delay = 1.0
        answers = await asyncio.gather(*(service.hand_out(visitor()) for _ in range(1000)))
        assert service.mints == 1
        assert {answer.token.body for answer in answers} == {answers[0].token.body}
        assert Counter(answer.outcome for answer in answers) == {
            Outcome.MINTED: 1,
            Outcome.COALESCED: 999,
        }
        assert service.charged(LimitName.AGENT, AGENT) == 1
        assert service.charged(LimitName.FINGERPRINT_MINTS, visitor().visitor) == 1
        await service.settled()

    run_virtual(main)


def test_F2_the_first_caller_leaves_in_the_middle_of_the_mint() -> None:
    """The others get their token, and it is held for the next ones."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        service.issuer.delay = 1.0
        first = service.begin(visitor())
        others = [service.begin(visitor()) for _ in range(3)]
        await asyncio.sleep(0.5)
        first.cancel()
        answers = await asyncio.gather(*others)
        again = await service.hand_out(visitor())
        assert {answer.token for answer in answers} == {again.token}
        assert [answer.outcome for answer in answers] == [Outcome.COALESCED] * 3
        assert (first.cancelled(), again.outcome, service.mints) == (True, Outcome.REUSED, 1)
        await service.settled()

    run_virtual(main)


def test_F3_all_leave_while_the_mint_queues_and_its_place_goes_on() -> None:
    """Nothing is minted for those who went; who waits behind them moves up."""

    async def main(clock: FakeClock) -> None:
        pacer = await queueing()
        service = Service(clock, pacer=pacer)
        leavers = [service.begin(visitor("aaaa")) for _ in range(5)]
        stayer = service.begin(visitor("bbbb"))
        await asyncio.sleep(0.5)
        assert pacer.depth == 2
        for leaver in leavers:
            leaver.cancel()
        began = asyncio.get_running_loop().time()
        answer = await stayer
        assert asyncio.get_running_loop().time() - began == pytest.approx(0.5, abs=A_BIT)
        assert answer.outcome is Outcome.MINTED
        assert [request.fingerprint for request in service.issuer.requests] == ["bbbb"]
        assert (len(service.tokens), len(service.minter.backoff), pacer.depth) == (1, 0, 0)
        await pacer.close()
        await service.settled()

    run_virtual(main)


def test_F3_all_leave_while_a_second_try_queues_and_it_is_given_up() -> None:
    """As while the first one does: the call that would be made next is for nobody."""

    async def main(clock: FakeClock) -> None:
        pacer = await queueing()
        service = Service(clock, pacer=pacer)
        calls = 0

        async def mint(_: TokenRequest, turn: Turn) -> Minted:
            nonlocal calls
            await turn()
            calls += 1
            await turn()
            calls += 1
            return Minted("t", "s", 0, lifetime=HOUR * SECOND)

        service.issuer.mint = mint  # type: ignore[method-assign]
        leaver = service.begin(visitor())
        await asyncio.sleep(1.5)
        assert (calls, pacer.depth) == (1, 1)
        leaver.cancel()
        await asyncio.sleep(5)
        assert (calls, pacer.depth) == (1, 0)
        await pacer.close()
        await service.settled()

    run_virtual(main)


def test_F3_all_leave_around_the_tick_of_the_slot_and_it_is_not_wasted() -> None:
    """Whichever turn of the loop they leave in, before, between and after grant and wake-up.

    The slot is used at once, for them (their request is out) or for the next one.
    """

    async def main(clock: FakeClock, offset: int) -> str:
        pacer = await queueing()
        service = Service(clock, pacer=pacer)
        leaver, stayer = service.begin(visitor("aaaa")), service.begin(visitor("bbbb"))
        loop = asyncio.get_running_loop()
        await asyncio.sleep(1 - 20e-6)
        for _ in range(offset):
            await asyncio.sleep(0)
        leaver.cancel()
        due = loop.time()
        while not service.mints:  # noqa: ASYNC110 - turn by turn is the point
            await asyncio.sleep(0)
        assert loop.time() - due < 100e-6
        await stayer
        minted = [request.fingerprint for request in service.issuer.requests]
        assert minted in (["bbbb"], ["aaaa", "bbbb"])
        await pacer.close()
        await service.settled()
        return minted[0]

    def leave_at(offset: int) -> str:
        return run_virtual(lambda clock: main(clock, offset))

    assert "".join(leave_at(offset)[0] for offset in range(40)).strip("b").strip("a") == ""
    assert {leave_at(0), leave_at(39)} == {"aaaa", "bbbb"}


def test_F3_all_leave_after_the_request_is_out_and_its_token_is_cached() -> None:
    """It is paid for: the next one has it without a mint."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        service.issuer.delay = 2.0
        leavers = [service.begin(visitor()) for _ in range(5)]
        await asyncio.sleep(1)
        for leaver in leavers:
            leaver.cancel()
        await asyncio.sleep(1.5)
        answer = await service.hand_out(visitor())
        assert (answer.outcome, service.mints) == (Outcome.REUSED, 1)
        await service.settled()

    run_virtual(main)


def test_F3_a_short_patience_while_queued_gives_the_place_up() -> None:
    """A deadline is a way of leaving: 504 at that moment, and no mint for nobody."""

    async def main(clock: FakeClock) -> None:
        pacer = await queueing(Budget(rate=6, per=60, burst=1, max_wait=30))
        service = Service(clock, pacer=pacer)
        began = asyncio.get_running_loop().time()
        with pytest.raises(errors.UpstreamTimeout):
            await service.issue(visitor(), timeout=3)
        assert asyncio.get_running_loop().time() - began == pytest.approx(3, abs=A_BIT)
        await asyncio.sleep(0)
        assert (pacer.depth, service.mints) == (0, 0)
        await pacer.close()
        await service.settled()

    run_virtual(main)


@pytest.mark.parametrize(
    "error",
    [
        errors.UpstreamUnavailable("down"),
        errors.UpstreamRefused(404, "NOT_FOUND", "no such agent"),
        errors.ServiceUnavailable("breaker", 2 * SECOND),
    ],
    ids=repr,
)
def test_F4_a_failed_mint_is_one_error_for_all(error: errors.BrokerError) -> None:
    """Every waiter gets that error; nobody tries again for themselves, nobody gets None."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        service.issuer.delay = 1.0
        service.issuer.fail = failing(error)
        outcomes = await asyncio.gather(
            *(service.issue(visitor()) for _ in range(100)), return_exceptions=True
        )
        assert all(outcome is error for outcome in outcomes)
        assert (service.mints, len(service.tokens)) == (1, 0)
        await service.settled()

    run_virtual(main)


def test_F4_a_refused_mint_is_one_refusal_for_all() -> None:
    """The limit that the leader met is what its joiners are told, too, and it is asked once."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock, limits=limits(agent=(1, 1)))
        await service.hand_out(visitor("aaaa"))
        outcomes = await asyncio.gather(
            *(service.issue(visitor("bbbb")) for _ in range(50)), return_exceptions=True
        )
        assert {type(outcome) for outcome in outcomes} == {errors.RateLimited}
        assert {outcome.limit for outcome in outcomes} == {LimitName.AGENT}  # type: ignore[union-attr]
        assert service.charged(LimitName.FINGERPRINT_MINTS, visitor("bbbb").visitor) == 1
        assert service.mints == 1
        await service.settled()

    run_virtual(main)


def test_F5_a_deserted_mint_and_its_successor_do_not_meet() -> None:
    """Everybody leaves while it queues, others come in the same tick: one mint, for them."""

    async def main(clock: FakeClock) -> None:
        pacer = await queueing()
        service = Service(clock, pacer=pacer)
        leavers = [service.begin(visitor()) for _ in range(3)]
        await asyncio.sleep(0.5)
        for leaver in leavers:
            leaver.cancel()
        comers = [service.begin(visitor()) for _ in range(3)]
        answers = await asyncio.gather(*comers)
        assert [answer.outcome for answer in answers] == [
            Outcome.MINTED,
            Outcome.COALESCED,
            Outcome.COALESCED,
        ]
        assert service.mints == 1
        await pacer.close()
        await service.settled()

    run_virtual(main)


def test_F6_a_renewal_that_fails_unseen_is_silent() -> None:
    """A background failure is logged and counted; the event loop has nothing to complain about."""

    async def main(clock: FakeClock) -> None:
        complaints: list[object] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, about: complaints.append(about))
        service = Service(clock)
        await service.hand_out(visitor())
        clock.advance(HOUR - 6 * 60)
        service.issuer.fail = failing(errors.UpstreamUnavailable("down"))
        answer = await service.hand_out(visitor())
        await service.settled()
        assert (answer.outcome, service.refreshes("ahead", "failed")) == (Outcome.REUSED, 1)
        assert complaints == []

    run_virtual(main)


TWINS = [
    (visitor("ab", agent="c"), visitor("a", agent="bc")),
    (visitor("ab", client="c"), visitor("a", client="bc")),
    (visitor("a|b", agent="c"), visitor("b", agent="c|a")),
    (visitor("a_b"), visitor("a", agent=f"{AGENT}_b")),
    (visitor("abcd"), visitor("ABCD")),
    (visitor("\u00e9"), visitor("e\u0301")),
    (visitor("\ufb01"), visitor("fi")),
    (visitor(), visitor(model="essence")),
    (visitor(model="essence"), visitor(model="Essence")),
    (visitor(model="essence"), visitor(model="essence ")),
    (visitor("ab", model="c"), visitor("abc")),
    (visitor(agent="A1"), visitor(agent="a1")),
    (visitor(client="web"), visitor(client="app")),
    (visitor("0000-0001"), visitor("00000001")),
]


@pytest.mark.parametrize(("one", "other"), TWINS, ids=repr)
def test_F7_keys_that_nearly_agree_never_share_a_token(
    one: TokenRequest, other: TokenRequest
) -> None:
    """Not at a boundary, not in case, not in Unicode form, not with and without a model."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        service.issuer.delay = 1.0
        mine, theirs = await asyncio.gather(service.hand_out(one), service.hand_out(other))
        assert (mine.outcome, theirs.outcome) == (Outcome.MINTED, Outcome.MINTED)
        for request in (one, other):
            again = await service.hand_out(request)
            assert again.outcome is Outcome.REUSED
            assert belongs_to(again.token, request)
        assert session_of(mine.token) != session_of(theirs.token)

    run_virtual(main)


PARTS = st.text(
    st.characters(categories=["L", "N", "P", "S", "M"], include_characters=" "), max_size=4
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.tuples(PARTS, PARTS, PARTS, PARTS), st.tuples(PARTS, PARTS, PARTS, PARTS))
def test_F7_equal_keys_mean_equal_parts(
    one: tuple[str, str, str, str], other: tuple[str, str, str, str]
) -> None:
    """Joining the parts loses nothing that tells two visitors apart."""
    mine, theirs = TokenRequest(*one), TokenRequest(*other)
    assert (mine.key == theirs.key) == (one == other)
    assert (mine.visitor == theirs.visitor) == (one[::2] == other[::2])


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("request"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("leave"), st.integers(0, 30), st.booleans()),
        st.tuples(st.just("wait"), st.sampled_from([0, 1, 700, 3000]), st.booleans()),
        st.tuples(st.just("break"), st.integers(0, 1), st.booleans()),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(events=EVENTS, budget=st.booleans())
def test_F8_no_interleaving_hands_a_token_to_somebody_else(
    events: list[tuple[str, int, bool]], budget: bool
) -> None:
    """Visitors ask, leave, grow old together, mints fail: who gets a token gets their own."""

    async def main(clock: FakeClock) -> None:
        pacer = await queueing(Budget(60, 60, 3, 8)) if budget else None
        service = Service(clock, pacer=pacer)
        service.issuer.delay = 0.3
        asked: list[tuple[TokenRequest, asyncio.Task[IssuedToken]]] = []
        for what, number, flag in events:
            match what:
                case "request":
                    request = visitor("abab", model=f"{number}", fresh=flag)
                    asked.append((request, service.begin(request)))
                case "leave" if asked:
                    asked[number % len(asked)][1].cancel()
                case "wait":
                    await asyncio.sleep(number)
                case "break":
                    service.issuer.fail = (
                        failing(errors.UpstreamUnavailable("down"), 2) if flag else None
                    )
                case _:
                    await asyncio.sleep(0)
        outcomes = await asyncio.gather(*(task for _, task in asked), return_exceptions=True)
        for (request, _), outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, IssuedToken):
                assert belongs_to(outcome.token, request)
                assert outcome.left >= 60 * SECOND
            else:
                assert isinstance(outcome, errors.BrokerError | asyncio.CancelledError)
        await service.service.flights.drained()
        if pacer is not None:
            await pacer.close()
        await service.settled()

    run_virtual(main)


@pytest.mark.parametrize("seed", range(5))
def test_F9_half_of_a_hundred_leave_at_random_moments(seed: int) -> None:
    """The other half have the token, from one mint."""
    chance = random.Random(seed)

    async def main(clock: FakeClock) -> None:
        pacer = await queueing()
        service = Service(clock, pacer=pacer)
        service.issuer.delay = 1.0
        callers = [service.begin(visitor()) for _ in range(100)]
        leavers = set(chance.sample(range(100), 50))
        loop = asyncio.get_running_loop()
        for number in leavers:
            loop.call_later(chance.uniform(0, 2.1), callers[number].cancel)
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        tokens = {
            outcome.token
            for number, outcome in enumerate(outcomes)
            if number not in leavers and isinstance(outcome, IssuedToken)
        }
        assert all(
            isinstance(outcomes[number], IssuedToken) for number in set(range(100)) - leavers
        )
        assert (len(tokens), service.mints) == (1, 1)
        await pacer.close()
        await service.settled()

    run_virtual(main)


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "every"), [(10_000, 60.0), (1_000, 4.0)], ids=["10k", "hot"])
def test_T1_tokens_of_one_second_are_renewed_evenly(count: int, every: float) -> None:
    """Renewals fill the window from 15 to 7 minutes before expiry evenly.

    Keys that are asked for fifteen times as often are no exception: a mark drawn anew at each
    access would bring theirs forward to the window's far edge.
    """

    async def main(clock: FakeClock) -> list[int]:
        service = Service(clock)
        requests = [visitor(f"{number:08x}") for number in range(count)]
        for request in requests:
            await service.hand_out(request)
            clock.advance(1 / count)
        clock.advance(HOUR - 15 * 60)
        renewals = []
        for _ in range(8):
            for _ in range(round(60 / every)):
                clock.advance(every)
                for request in requests:
                    assert (await service.hand_out(request)).outcome is Outcome.REUSED
                await service.service.flights.drained()
            renewals.append(service.mints - count - sum(renewals))
        return renewals

    renewals = run_virtual(main)
    share = count / 8
    assert sum(renewals) == count
    assert all(abs(minute - share) < 5 * share**0.5 for minute in renewals), renewals


def test_T1_one_key_at_a_thousand_requests_a_second_renews_where_its_mark_lies() -> None:
    """However often it is looked at, a token asks for its successor once, at the moment drawn."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock, draw=fixed(0.5))
        held = await service.hand_out(visitor())
        mark = 11 * 60 * SECOND  # half of the window
        assert held.token.mark == mark
        clock.advance((held.left - mark) / SECOND - 2)
        for millisecond in range(4000):
            left = held.token.left(clock.mono(), clock.wall())
            await service.hand_out(visitor())
            await asyncio.sleep(0)
            assert service.mints == (1 if left > mark else 2), millisecond
            clock.advance(0.001)
        await service.settled()

    run_virtual(main)


def test_T2_a_token_that_is_expired_on_arrival_is_an_error_without_a_tight_loop() -> None:
    """502 for the caller, nothing cached, and the key backs off: each call costs budget."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        service.issuer.lifetime = 0
        ends = clock.mono() + 60 * SECOND
        failures = 0
        while clock.mono() < ends:
            with pytest.raises(errors.UpstreamUnavailable):
                await service.issue(visitor())
            failures += 1
            assert failures < 100, "a tight loop"
        assert (service.mints, len(service.tokens)) == (failures, 0)
        assert 15 <= service.mints <= 45  # full jitter up to 5 s: 2.5 s on average

    run_virtual(main)


def test_T2_a_token_that_arrives_below_the_floor_is_an_error() -> None:
    """A mint that took longer than the token can spare is worth nothing any more."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        service.issuer.lifetime = 8 * SECOND  # its floor is 2 s
        service.issuer.delay = 7.0
        with pytest.raises(errors.UpstreamUnavailable):
            await service.issue(visitor())
        assert (service.mints, len(service.tokens)) == (1, 0)
        assert service.minter.backoff.failures(visitor().key) == 1

    run_virtual(main)


def test_T3_the_same_token_again_is_no_storm() -> None:
    """The vendor has nothing newer: what is held is handed out, and the key backs off."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        held = await service.hand_out(visitor())
        service.issuer.same = True
        clock.advance(HOUR - 7 * 60)  # past every mark, above the floor
        for _ in range(1200):
            answer = await service.hand_out(visitor())
            assert (answer.token.body, answer.outcome) == (held.token.body, Outcome.REUSED)
            await asyncio.sleep(0.1)
        tries = service.mints - 1
        assert service.refreshes("ahead", "same") == tries
        assert 3 <= tries <= 12  # at half of what is left above the floor, again and again
        clock.advance(60)  # below the floor: tried inline now, still no storm
        for _ in range(600):
            answer = await service.hand_out(visitor())
            assert answer.token.body == held.token.body
            await asyncio.sleep(0.1)
        assert service.mints - 1 - tries <= 40
        await service.settled()

    run_virtual(main)


def test_T3_the_same_token_again_is_renewed_no_later_than_before() -> None:
    """Its mark was drawn for its whole life; that it came again puts nothing off."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock, draw=lambda: 0.0)
        first = (await service.hand_out(visitor())).token
        service.issuer.same = True
        for wait in (60, 3600 - 15 * 60 - 60):
            clock.advance(wait)
            again = (await service.hand_out(visitor(fresh=True))).token
            assert again.body == first.body
            assert again.mark <= first.mark
            service.minter.backoff.forget(visitor().key)
        assert service.mints == 3
        await service.settled()

    run_virtual(main)


def test_T3_a_fresh_one_that_the_vendor_does_not_have_is_the_held_one() -> None:
    """Who insists gets what there is, and may not insist faster than the key's back-off."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        held = await service.hand_out(visitor())
        service.issuer.same = True
        for _ in range(20):
            answer = await service.hand_out(visitor(fresh=True))
            assert answer.token.body == held.token.body
        assert service.refreshes("fresh", "same") == 20
        assert clock.mono() - 1_000_000_000 > 15 * SECOND

    run_virtual(main)


def test_T3_the_held_one_is_also_given_below_its_floor() -> None:
    """Who insists is not worse off than who does not: above the last floor it is an answer."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        held = await service.hand_out(visitor())
        service.issuer.same = True
        clock.advance((held.left - 100 * SECOND) / SECOND)
        answer = await service.hand_out(visitor(fresh=True))
        assert answer.token.body == held.token.body
        await service.settled()

    run_virtual(main)


def test_T3_below_the_last_floor_the_held_one_is_no_answer() -> None:
    """A vendor that has nothing newer is one without a token then: what is handed out lives."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        held = await service.hand_out(visitor())
        service.issuer.same = True
        clock.advance((held.left - 65 * SECOND) / SECOND)
        service.issuer.delay = 5.0 + A_BIT
        with pytest.raises(errors.UpstreamUnavailable):
            await service.issue(visitor(fresh=True))
        await service.settled()

    run_virtual(main)


@pytest.mark.parametrize(
    "clocks", ["both", "wall ahead", "wall back", "wall far back", "mono stalls"]
)
def test_T5_no_step_of_a_clock_serves_a_token_past_its_expiry(clocks: str) -> None:
    """Of the two clocks the one that leaves less life decides, so one of them may lie."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        first = await service.hand_out(visitor())
        match clocks:
            case "both":
                clock.advance(HOUR - 30)
            case "wall ahead":
                clock.step_wall(HOUR)
            case "wall back":
                clock.step_wall(-HOUR)
                clock.advance(HOUR - 30)
            case "wall far back":  # the token is below its floor, and the wall clock denies it
                clock.advance(HOUR - 180)
                clock.step_wall(-HOUR)
            case _:  # a machine that slept
                clock.step_wall(HOUR - 30)
        second = await service.hand_out(visitor())
        assert second.token != first.token
        assert second.left > (HOUR - A_BIT) * SECOND
        clock.advance(60)
        assert (await service.hand_out(visitor())).token == second.token

    run_virtual(main)


def test_T5_a_wall_clock_that_steps_locks_nobody_out() -> None:
    """Limits and back-offs run on the clock that does not step."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock, limits=limits(fingerprint=(60, 2)))
        for hours in (1, -2, 1):
            service.issuer.fail = failing(errors.UpstreamUnavailable("down"), 1)
            with pytest.raises(errors.UpstreamUnavailable):
                await service.issue(visitor(fresh=True))
            clock.step_wall(hours * HOUR)
            await service.hand_out(visitor(fresh=True))
            refusal = await service.issue(visitor(fresh=True))
            assert isinstance(refusal, Rejection)
            assert refusal.verdict.retry_after <= SECOND
            clock.step_mono(2)

    run_virtual(main)


def test_T5_a_monotonic_clock_that_stalls_locks_nobody_out() -> None:
    """A back-off is waited out in the loop's time, at most its cap, whatever that clock says."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        service.issuer.fail = failing(errors.UpstreamUnavailable("down"), 30)
        for _ in range(30):
            with pytest.raises(errors.UpstreamUnavailable):
                await service.issue(visitor())
            clock.step_mono(-3)
        began = asyncio.get_running_loop().time()
        await service.hand_out(visitor())
        assert asyncio.get_running_loop().time() - began <= BACKOFF_CAP / SECOND + A_BIT

    run_virtual(main)


@pytest.mark.parametrize("lifetime", [1.0, 2.0, 60.0])
def test_T7_a_short_life_is_no_hot_loop(lifetime: float) -> None:
    """Floors shrink with the life: a one-second token is still reused for half of it."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        service.issuer.lifetime = round(lifetime * SECOND)
        began, asked = clock.mono(), 0
        while clock.mono() < began + 20 * lifetime * SECOND:
            answer = await service.hand_out(visitor())
            assert answer.left >= lifetime / 4 * SECOND
            asked += 1
            await asyncio.sleep(lifetime / 100)
        assert asked > 1900
        assert 20 <= service.mints <= 42

    run_virtual(main)


@pytest.mark.parametrize(
    ("left", "happens"),
    [
        (5 * 60 * SECOND + 1, "reused"),
        (5 * 60 * SECOND, "reused"),
        (5 * 60 * SECOND - 1, "tried"),
        (60 * SECOND + 1, "tried"),
        (60 * SECOND, "gone"),
        (60 * SECOND - 1, "gone"),
    ],
)
async def test_T8_a_mark_is_exact_to_the_microsecond(left: int, happens: str) -> None:
    """At the floor exactly the cached token is answered at once, a tick later a mint comes first.

    Above the floor in outage it still helps out; from there on it is gone.
    """
    clock = FakeClock()  # on a real loop: it stands still while the mint is tried
    service = Service(clock)
    held = await service.hand_out(visitor())
    service.issuer.fail = failing(errors.UpstreamUnavailable("down"))
    clock.advance((held.left - left) / SECOND)
    if happens == "gone":
        with pytest.raises(errors.UpstreamUnavailable):
            await service.issue(visitor())
    else:
        answer = await service.hand_out(visitor())
        assert (answer.token, answer.outcome) == (held.token, Outcome.REUSED)
        assert answer.left == left
    assert service.refreshes("floor", "failed") == (happens == "tried")
    await service.settled()


def test_T8_what_expires_while_a_slow_answer_comes_is_not_sent() -> None:
    """The renewal fails after so long that the held token is below its last floor by then."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        held = await service.hand_out(visitor())
        clock.advance((held.left - 65 * SECOND) / SECOND)
        service.issuer.delay = 5.0 + A_BIT
        service.issuer.fail = failing(errors.UpstreamUnavailable("down"))
        with pytest.raises(errors.UpstreamUnavailable):
            await service.issue(visitor())
        await service.settled()

    run_virtual(main)


@pytest.mark.parametrize(
    ("left", "delay", "lives"), [(3600, 0, 3600), (3600, 5, 3595), (3598, 5, 3595), (1000, 5, 1000)]
)
def test_T6_a_token_lives_as_long_by_both_clocks(left: int, delay: int, lives: int) -> None:
    """A whole life from the start of its mint, or what it had left on arrival if that is less."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)

        async def mint(_: TokenRequest, turn: Turn) -> Minted:
            await turn()
            await asyncio.sleep(delay)
            return Minted("t", "s", 0, lifetime=left * SECOND, whole=3600 * SECOND)

        service.issuer.mint = mint  # type: ignore[method-assign]
        token = (await service.hand_out(visitor())).token
        by_clock = token.dies_mono - clock.mono(), token.dies_wall - clock.wall()
        assert by_clock == pytest.approx((lives * SECOND, lives * SECOND), abs=100)
        assert token.lifetime == 3600 * SECOND
        await service.settled()

    run_virtual(main)


def test_T8_what_expires_while_it_is_written_down_is_not_sent() -> None:
    """A store that takes its time, as a file on a slow disk does, hands out no dead token."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        keep = service.store.keep

        async def late(*given: Any) -> Kept:
            kept = await keep(*given)
            clock.advance(service.issuer.lifetime / SECOND - 60)
            return kept

        service.store.keep = late  # type: ignore[method-assign]
        with pytest.raises(errors.UpstreamUnavailable):
            await service.issue(visitor())
        await service.settled()

    run_virtual(main)


def test_T9_a_failed_renewal_is_tried_again_backed_off_and_callers_do_not_notice() -> None:
    """Under a hundred requests a second: a handful of tries, spread; then all is forgotten."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        held = await service.hand_out(visitor())
        clock.advance(HOUR - 7 * 60)
        tries: list[float] = []
        loop = asyncio.get_running_loop()

        def fail(_request: TokenRequest) -> None:
            tries.append(loop.time())
            if len(tries) < 20:
                raise errors.UpstreamUnavailable("down")

        service.issuer.fail = fail
        began = loop.time()
        while len(tries) < 20:
            answer = await service.hand_out(visitor())
            assert answer.outcome is Outcome.REUSED
            assert answer.token is held.token
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)
        answer = await service.hand_out(visitor())
        assert (answer.outcome, answer.token == held.token) == (Outcome.REUSED, False)
        assert service.refreshes("ahead", "failed") == 19
        assert service.refreshes("ahead", "renewed") == 1
        gaps = [later - sooner for sooner, later in pairwise(tries)]
        assert max(gaps) <= 5 + 2 * A_BIT
        assert len({round(gap, 2) for gap in gaps}) >= 10  # jittered
        assert loop.time() - began > 20
        assert len(service.minter.backoff) == 0
        await service.settled()

    run_virtual(main)


@pytest.mark.parametrize(
    "error",
    [
        errors.UpstreamRefused(422, "UNPROCESSABLE", "no"),
        errors.BudgetExhausted("needed elsewhere", SECOND),
        errors.UpstreamTimeout("slow"),
    ],
    ids=repr,
)
def test_T9_every_kind_of_failed_renewal_backs_off_once(error: errors.BrokerError) -> None:
    """Also a refusal and an error of ours: or each access to the token would try again at once."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock, draw=fixed(0.99))
        await service.hand_out(visitor())
        clock.advance(HOUR - 7 * 60)
        service.issuer.fail = failing(error)
        for _ in range(100):
            await service.hand_out(visitor())
            await asyncio.sleep(0.001)
        assert service.mints == 2
        assert service.minter.backoff.failures(visitor().key) == 1
        await service.settled()

    run_virtual(main)


def test_F4_a_renewal_that_yields_the_budget_is_nobody_elses_failure() -> None:
    """Who waits for it in another replica tries, as a visitor; all else is what they get."""

    async def main(clock: FakeClock) -> None:
        service, told = Service(clock), list[BaseException | None]()
        service.store.abandon = lambda _request, _key, _lease, error: told.append(error)  # type: ignore[method-assign]
        await service.hand_out(visitor())
        yields, late = errors.BudgetExhausted("elsewhere", SECOND), errors.UpstreamTimeout("slow")
        for failure in (yields, late):
            clock.advance(HOUR - 7 * 60 if failure is yields else 60)
            service.issuer.fail = failing(failure)
            await service.hand_out(visitor())
            await asyncio.sleep(1)
        assert told == [None, late]
        service.issuer.fail = failing(yields)
        with pytest.raises(errors.BudgetExhausted):
            await service.hand_out(visitor("0002"))
        assert told == [None, late, yields]
        await service.settled()

    run_virtual(main)


def test_T9_a_renewal_that_hangs_counts_as_one_failure() -> None:
    """The mint's own timeout ends it; the next try is a first retry's time away."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock, draw=fixed(0.99), mint_timeout=3.0)
        await service.hand_out(visitor())
        clock.advance(HOUR - 7 * 60)
        service.issuer.delay = 100
        await service.hand_out(visitor())
        await asyncio.sleep(3 + A_BIT)
        assert service.minter.backoff.failures(visitor().key) == 1
        assert service.refreshes("ahead", "failed") == 1
        await service.settled()

    run_virtual(main)


def test_T9_a_renewal_refused_by_a_limit_backs_off_too() -> None:
    """A hot key on an exhausted agent: callers are served, the limits are left alone."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock, limits=limits(agent=(0.001, 1)), draw=fixed(0.5))
        await service.hand_out(visitor())
        clock.advance(HOUR - 7 * 60)
        for _ in range(1000):
            assert (await service.hand_out(visitor())).outcome is Outcome.REUSED
            await asyncio.sleep(0.001)
        assert service.refreshes("ahead", "failed") <= 5
        assert service.mints == 1
        await service.settled()

    run_virtual(main)


def test_T9_renewals_without_plenty_charge_nothing() -> None:
    """With less than half the burst left a renewal is not even begun: no charge, no failure."""

    async def main(clock: FakeClock) -> None:
        pacer = await queueing(Budget(rate=1, per=600, burst=1, max_wait=1000))
        service = Service(clock, pacer=pacer, mint_timeout=1000)
        await service.hand_out(visitor(), timeout=1000)
        clock.advance(HOUR - 7 * 60)
        for _ in range(10):
            await service.hand_out(visitor())
            await asyncio.sleep(0)
        assert service.charged(LimitName.FINGERPRINT_MINTS, visitor().visitor) <= 1
        assert service.refreshes("ahead", "failed") == 0
        assert len(service.service.flights) == 0
        await pacer.close()
        await service.settled()

    run_virtual(main)


# --- limits, memory -------------------------------------------------------------------------------


def test_L5_joiners_and_reuse_charge_no_mint_limit() -> None:
    """Only the leader of a flight meets the mint limits; whoever reuses meets none of them."""

    async def main(clock: FakeClock) -> None:
        scarce = limits(fingerprint=(0.001, 1000), mints=(0.001, 1), agent=(0.001, 1))
        service = Service(clock, limits=scarce)
        service.issuer.delay = 1.0
        answers = await asyncio.gather(*(service.hand_out(visitor()) for _ in range(100)))
        answers += [await service.hand_out(visitor()) for _ in range(100)]
        assert Counter(answer.outcome for answer in answers) == {
            Outcome.MINTED: 1,
            Outcome.COALESCED: 99,
            Outcome.REUSED: 100,
        }
        assert service.charged(LimitName.FINGERPRINT_MINTS, visitor().visitor) == 1
        assert service.charged(LimitName.AGENT, AGENT) == 1
        assert service.charged(LimitName.FINGERPRINT, visitor().visitor) == 200

    run_virtual(main)


def test_L5_a_limit_that_refuses_charges_neither_itself_nor_a_later_one() -> None:
    """What an earlier limit admitted stays charged; the refusing one and those after it are not."""

    async def main(clock: FakeClock) -> None:
        service = Service(
            clock, limits=limits(client=(0.6, 9), fingerprint=(0.6, 6), mints=(0.6, 3))
        )
        who = visitor(fresh=True)
        for _ in range(3):
            await service.hand_out(who)
        for _ in range(2):
            with pytest.raises(errors.RateLimited) as refused:
                await service.issue(who)
            assert refused.value.limit is LimitName.FINGERPRINT_MINTS
            assert 99 * SECOND < refused.value.verdict.retry_after <= 100 * SECOND
        assert _charges(service, who) == (5, 5, 3, 3)
        await service.hand_out(visitor())  # reuse: the sixth request
        for _ in range(2):
            assert await service.issue(who) == Rejection(
                LimitName.FINGERPRINT,
                service.store._fingerprint.peek(
                    who.visitor, service.limits.fingerprint.rule.limit, clock.mono()
                ),
            )
        assert _charges(service, who) == (8, 6, 3, 3)
        await service.hand_out(visitor("bbbb"))  # the client's ninth
        answer = await service.issue(visitor("cccc"))
        assert isinstance(answer, Rejection)
        assert answer.limit is LimitName.CLIENT
        assert _charges(service, visitor("cccc")) == (9, 0, 0, 4)

    run_virtual(main)


def _charges(service: Service, request: TokenRequest) -> tuple[int, int, int, int]:
    return (
        service.charged(LimitName.CLIENT, request.client),
        service.charged(LimitName.FINGERPRINT, request.visitor),
        service.charged(LimitName.FINGERPRINT_MINTS, request.visitor),
        service.charged(LimitName.AGENT, request.agent),
    )


def test_L6_a_thousand_visitors_at_once_on_an_agent_of_thirty_are_thirty_mints() -> None:
    """Exactly the burst is admitted, however many ask in the same tick."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock, limits=limits(agent=(0.001, 30)))
        service.issuer.delay = 1.0
        outcomes = await asyncio.gather(
            *(service.issue(visitor(f"{number:04x}")) for number in range(1000)),
            return_exceptions=True,
        )
        assert Counter(type(outcome) for outcome in outcomes) == {
            IssuedToken: 30,
            errors.RateLimited: 970,
        }
        assert {error.limit for error in outcomes if isinstance(error, errors.RateLimited)} == {
            LimitName.AGENT
        }
        assert service.mints == 30
        again = await asyncio.gather(
            *(service.issue(visitor(f"{number:04x}")) for number in range(1000)),
            return_exceptions=True,
        )
        assert Counter(type(outcome) for outcome in again) == {
            IssuedToken: 30,
            errors.RateLimited: 970,
        }
        await service.settled()

    run_virtual(main)


def test_L6_a_thousand_requests_of_one_visitor_are_the_burst() -> None:
    """Of one visitor exactly `burst` pass, the others are told when; another visitor passes."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock, limits=limits(fingerprint=(1 / 60, 7)))
        answers = await asyncio.gather(*(service.issue(visitor()) for _ in range(1000)))
        assert Counter(type(answer) for answer in answers) == {IssuedToken: 7, Rejection: 993}
        await service.hand_out(visitor("bbbb"))
        refusal = answers[-1]
        assert isinstance(refusal, Rejection)
        clock.advance((refusal.verdict.retry_after - 100) / SECOND)
        assert isinstance(await service.issue(visitor()), Rejection)
        clock.advance(100 / SECOND)
        await service.hand_out(visitor())

    run_virtual(main)


def test_G9_a_token_whose_visitor_was_ended_takes_no_room() -> None:
    """It is dropped by the first look that finds it."""

    async def main(clock: FakeClock) -> None:
        service, request = Service(clock), visitor()
        await service.hand_out(request)
        await service.store.revoke_visitor(request.client, request.fingerprint)
        assert await service.store.peek(request, request.key) is None
        assert len(service.tokens) == 0
        await service.settled()

    run_virtual(main)


def test_M2_a_key_in_flight_is_not_evicted() -> None:
    """A cache of one token: others come and go during a mint, its waiters all get its token."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock, max_tokens=1)
        service.issuer.delay = 1.0
        waiting = [service.begin(visitor("aaaa")) for _ in range(3)]
        await asyncio.sleep(0.5)
        service.issuer.delay = 0.0
        for number in range(20):
            await service.hand_out(visitor(f"{number:04x}"))
        waiting.append(service.begin(visitor("aaaa")))
        answers = await asyncio.gather(*waiting)
        assert len({answer.token for answer in answers}) == 1
        assert all(belongs_to(answer.token, visitor("aaaa")) for answer in answers)
        assert [request.fingerprint for request in service.issuer.requests].count("aaaa") == 1
        assert (await service.hand_out(visitor("aaaa"))).outcome is Outcome.REUSED
        assert (len(service.tokens), service.tokens.counts.evicted.value) == (1, 20)
        await service.hand_out(visitor("aaaa", fresh=True))
        assert (len(service.tokens), service.tokens.counts.evicted.value) == (
            1,
            20,
        )  # overwriting evicts nobody

    run_virtual(main)


def test_M4_a_cancelled_or_timed_out_mint_is_never_remembered_as_a_refusal() -> None:
    """After callers who left and a mint that hung, the next one has a token as if nothing was."""

    async def main(clock: FakeClock) -> None:
        pacer = await queueing()
        service = Service(clock, pacer=pacer, mint_timeout=5.0, draw=fixed(0.99))
        leaver = service.begin(visitor())
        await asyncio.sleep(0.3)
        leaver.cancel()
        await asyncio.sleep(0)
        with pytest.raises(errors.UpstreamTimeout):
            await service.issue(visitor(), timeout=0.2)
        assert len(service.minter.backoff) == 0
        assert (await service.hand_out(visitor())).outcome is Outcome.MINTED
        service.issuer.delay = 100
        with pytest.raises(errors.UpstreamTimeout):
            await service.issue(visitor("bbbb"))
        service.issuer.delay = 0
        began = asyncio.get_running_loop().time()
        assert (await service.hand_out(visitor("bbbb"))).outcome is Outcome.MINTED
        took = asyncio.get_running_loop().time() - began
        assert took <= 1 + A_BIT  # a first back-off or a slot's wait
        assert len(service.minter.backoff) == 0
        await pacer.close()
        await service.settled()

    run_virtual(main)


def test_M4_a_refusal_of_the_vendor_does_not_hide_a_later_success() -> None:
    """What failed once for this visitor is asked anew: the service holds no refusals."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        service.issuer.fail = failing(errors.UpstreamRefused(404, "NOT_FOUND", "no agent"), 1)
        with pytest.raises(errors.UpstreamRefused):
            await service.issue(visitor())
        assert (await service.hand_out(visitor())).outcome is Outcome.MINTED

    run_virtual(main)


# --- back-off, and who shares a mint with whom ----------------------------------------------------


def test_a_back_off_longer_than_the_caller_s_patience_ends_all_the_same() -> None:
    """Impatient callers get 504 and start no mint; the moment they wait for does not move away."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock, draw=fixed(0.99))
        service.issuer.fail = failing(errors.UpstreamUnavailable("down"), 6)
        for _ in range(6):
            with pytest.raises(errors.UpstreamUnavailable):
                await service.issue(visitor())
        began = asyncio.get_running_loop().time()
        for _ in range(9):
            with pytest.raises(errors.UpstreamTimeout):
                await service.issue(visitor(), timeout=0.5)
            assert service.mints == 6
            assert len(service.service.flights._by_key) == 0
        await service.hand_out(visitor(), timeout=0.5)
        assert asyncio.get_running_loop().time() - began == pytest.approx(4.95, abs=A_BIT)
        await service.settled()

    run_virtual(main)


def test_one_key_s_back_off_is_nobody_else_s() -> None:
    """A key that fails does not slow down another visitor's."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock, draw=fixed(0.99))
        service.issuer.fail = failing(errors.UpstreamUnavailable("down"), 3)
        for _ in range(3):
            with pytest.raises(errors.UpstreamUnavailable):
                await service.issue(visitor("aaaa"))
        began = asyncio.get_running_loop().time()
        await service.hand_out(visitor("bbbb"))
        assert asyncio.get_running_loop().time() - began < A_BIT

    run_virtual(main)


def test_who_insists_on_a_fresh_token_joins_a_renewal_and_queues_for_it() -> None:
    """A renewal that nobody waits for gives way; one that somebody has joined takes its turn."""

    async def main(clock: FakeClock) -> None:
        pacer = await queueing(Budget(rate=60, per=60, burst=1, max_wait=5))
        service = Service(clock, pacer=pacer)
        held = await service.hand_out(visitor())
        await asyncio.sleep(HOUR - 7 * 60)
        assert pacer.has_headroom
        other = service.begin(visitor("bbbb"))  # takes the slot that the renewal has in mind
        renewing = service.begin(visitor())
        insisting = service.begin(visitor(fresh=True))
        answers = await asyncio.gather(other, renewing, insisting)
        assert [answer.outcome for answer in answers] == [
            Outcome.MINTED,
            Outcome.REUSED,
            Outcome.COALESCED,
        ]
        assert answers[1].token == held.token
        assert answers[2].token != held.token
        assert service.mints == 3
        await pacer.close()
        await service.settled()

    run_virtual(main)


def test_a_failed_fresh_mint_leaves_the_cached_token_for_later_requests() -> None:
    """Whoever insisted gets the error; whoever did not still has the token."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        held = await service.hand_out(visitor())
        service.issuer.fail = failing(errors.UpstreamUnavailable("down"))
        with pytest.raises(errors.UpstreamUnavailable):
            await service.issue(visitor(fresh=True))
        answer = await service.hand_out(visitor())
        assert (answer.token, answer.outcome) == (held.token, Outcome.REUSED)
        assert service.refreshes("fresh", "failed") == 1

    run_virtual(main)


def test_closing_while_callers_wait_tells_them_and_leaves_nothing() -> None:
    """Flights first, then the budget: 503 for who queues and for whose request was out."""

    async def main(clock: FakeClock) -> None:
        pacer = await queueing(Budget(rate=60, per=60, burst=2, max_wait=30))
        service = Service(clock, pacer=pacer)
        service.issuer.delay = 10
        waiting = [service.begin(visitor(f"{number:04x}")) for number in range(4)]
        await asyncio.sleep(2.5)
        assert (service.mints, pacer.depth) == (2, 2)
        await service.service.flights.close()
        await pacer.close()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [errors.ServiceUnavailable] * 4
        assert len(service.tokens) == 0
        await service.settled()

    run_virtual(main)
