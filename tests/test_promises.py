"""G1, G2, G3, G5 and G8, each as a whole story: service, store, budget, clocks and bad weather."""

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service import Service, belongs_to, limits, session_of, visitor
from typing_extensions import override

from broker import errors
from broker.issue import IssuedToken
from broker.issuers.base import Turn
from broker.model import Minted, Outcome, TokenRequest
from broker.pacing.pacer import BudgetPacer
from broker.pacing.slots import UNCOUNTED, Budget, Slot
from broker.testing import FakeClock, FakeIssuer, run_virtual
from broker.units import SECOND

A_BIT = 0.01
HOUR = 3600
BUDGET = Budget(rate=106, per=60, burst=8, max_wait=8)
SEEDS = st.integers(0, 2**32)


class WatchedIssuer(FakeIssuer):
    """Takes a random time, fails at random, and knows how many mints of a key ever overlapped."""

    def __init__(self, chance: random.Random, *, failures: float) -> None:
        super().__init__()
        self._chance = chance
        self._failures = failures
        self.most: Counter[str] = Counter()
        self._now: Counter[str] = Counter()

    @override
    async def mint(self, request: TokenRequest, turn: Turn) -> Minted:
        await turn()
        self._now[request.key] += 1
        self.most[request.key] = max(self.most[request.key], self._now[request.key])
        try:
            await asyncio.sleep(self._chance.expovariate(1))
            if self._chance.random() < self._failures:
                raise errors.UpstreamUnavailable("down")

            async def free() -> Slot:
                """The turn was taken above."""
                return UNCOUNTED

            return await super().mint(request, free)
        finally:
            self._now[request.key] -= 1


class Weather:
    """A service under a budget, and a crowd of visitors who ask, insist, wait no longer."""

    def __init__(self, clock: FakeClock, seed: int, pacer: BudgetPacer) -> None:
        self.chance = random.Random(seed)
        self.clock = clock
        self.service = Service(clock, pacer=pacer, draw=self.chance.random)
        self.issuer = WatchedIssuer(self.chance, failures=0.2)
        self.service.issuer = self.service.minter._issuer = self.issuer
        self.outcomes: list[tuple[TokenRequest, object, int]] = []

    async def visit(self, request: TokenRequest, timeout: float) -> None:
        """Ask once; note what came of it, and the moment."""
        outcome: object
        try:
            outcome = await self.service.issue(request, timeout)
        except (errors.BrokerError, asyncio.CancelledError) as error:
            outcome = error
        self.outcomes.append((request, outcome, self.clock.mono()))

    async def blow(self, visits: int) -> None:
        loop = asyncio.get_running_loop()
        tasks = []
        for _ in range(visits):
            request = visitor(f"{self.chance.randrange(4):04x}", fresh=self.chance.random() < 0.2)
            timeout = self.chance.choice([0.0, 0.5, 3.0, 12.0, 12.0])
            task = loop.create_task(self.visit(request, timeout))
            if self.chance.random() < 0.2:
                loop.call_later(self.chance.expovariate(1), task.cancel)
            tasks.append(task)
            if self.chance.random() < 0.4:
                await asyncio.sleep(self.chance.choice([0.0, 0.3, 5.0, 600.0]))
        await asyncio.gather(*tasks, return_exceptions=True)


async def weather(clock: FakeClock, seed: int, visits: int = 60) -> Weather:
    """Let it blow, then see that everything has calmed down."""
    pacer = BudgetPacer(BUDGET, lambda _seconds: None)
    await pacer.start()
    weather = Weather(clock, seed, pacer)
    await weather.blow(visits)
    await weather.service.service.flights.drained()
    await pacer.close()
    await weather.service.settled()
    assert weather.issuer.most
    return weather


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_G1_at_most_one_mint_of_a_key_is_in_flight(seed: int) -> None:
    """Whatever callers and vendor do: mints of one key never overlap."""
    stormy = run_virtual(lambda clock: weather(clock, seed))
    assert set(stormy.issuer.most.values()) == {1}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_G3_G8_what_is_handed_out_is_the_visitor_s_own_and_lives_long_enough(seed: int) -> None:
    """Each token names its visitor and has the life left that its answer says.

    That is above the floor: 5 minutes, or 1 minute while the vendor fails.
    """
    stormy = run_virtual(lambda clock: weather(clock, seed))
    handouts = 0
    for request, outcome, at in stormy.outcomes:
        if not isinstance(outcome, IssuedToken):
            assert isinstance(outcome, errors.BrokerError | asyncio.CancelledError)
            continue
        handouts += 1
        assert belongs_to(outcome.token, request)
        assert outcome.left - 100 <= outcome.token.dies_mono - at  # no more was promised than is
        floor = 1 if outcome.outcome is Outcome.REUSED else 5
        assert outcome.token.dies_mono - at >= floor * 60 * SECOND - 100
    assert handouts


@pytest.mark.parametrize("how", ["cancelled", "out of patience"])
@pytest.mark.parametrize("when", ["queued", "sent", "landing"])
def test_G2_one_caller_s_end_is_no_other_caller_s(how: str, when: str) -> None:
    """The first caller, who started the mint, ends in each of its phases.

    The others get the token at the moment at which they would have got it anyway.
    """
    moment = {"queued": 0.3, "sent": 1.0, "landing": BUDGET.interval + 2.0}[when]

    async def main(clock: FakeClock) -> None:
        pacer = BudgetPacer(BUDGET, lambda _seconds: None)
        await pacer.start()
        service = Service(clock, pacer=pacer)
        service.issuer.delay = 2.0
        loop = asyncio.get_running_loop()
        began = loop.time()
        first = service.begin(visitor(), timeout=moment if how == "out of patience" else 12.0)
        others = [service.begin(visitor()) for _ in range(20)]
        if how == "cancelled":
            loop.call_later(moment, first.cancel)
        answers = await asyncio.gather(*others)
        assert loop.time() - began == pytest.approx(BUDGET.interval + 2, abs=A_BIT)
        assert {answer.outcome for answer in answers} == {Outcome.COALESCED}
        assert len({session_of(answer.token) for answer in answers}) == 1
        assert service.mints == 1
        (end,) = await asyncio.gather(first, return_exceptions=True)
        if when != "landing":
            ends = {"cancelled": asyncio.CancelledError, "out of patience": errors.UpstreamTimeout}
            assert isinstance(end, ends[how])
        await pacer.close()
        await service.settled()

    run_virtual(main)


def test_G3_the_life_of_a_token_is_measured_when_it_is_handed_out() -> None:
    """A mint that took its time has used up life: what is told is what is left, not what was."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        service.issuer.delay = 9.0
        minted = await service.hand_out(visitor())
        assert minted.left == pytest.approx((HOUR - 9) * SECOND, abs=A_BIT * SECOND)
        await asyncio.sleep(100)
        again = await service.hand_out(visitor())
        assert again.left == pytest.approx((HOUR - 109) * SECOND, abs=A_BIT * SECOND)

    run_virtual(main)


def test_G3_over_a_whole_outage_no_token_is_handed_out_below_a_minute() -> None:
    """A visitor a second for an hour, the vendor gone: served until a minute is left, then told."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        held = await service.hand_out(visitor())

        def down(_request: TokenRequest) -> None:
            raise errors.UpstreamUnavailable("down")

        service.issuer.fail = down
        served = 0
        for _ in range(HOUR + 60):
            await asyncio.sleep(1)
            try:
                answer = await service.hand_out(visitor(), timeout=A_BIT)
            except errors.BrokerError:
                assert held.token.left(clock.mono(), clock.wall()) <= 61 * SECOND
            else:
                served += 1
                assert answer.token == held.token
                assert held.token.left(clock.mono(), clock.wall()) >= 60 * SECOND
        assert served >= HOUR - 100  # a try that outlasts its caller's patience takes its second

    run_virtual(main)


@pytest.mark.parametrize("minutes_left", [50, 14, 7, 6, 5.1])
@pytest.mark.parametrize("trouble", ["hangs", "fails", "refuses", "no budget", "agent limit"])
def test_G5_who_has_a_valid_token_in_the_cache_waits_for_nobody(
    minutes_left: float, trouble: str
) -> None:
    """Above the floor the answer is there in the same turn of the loop, whatever a renewal does."""

    async def main(clock: FakeClock) -> None:
        pacer = BudgetPacer(BUDGET, lambda _seconds: None)
        await pacer.start()
        scarce = limits(agent=(0.001, 1)) if trouble == "agent limit" else limits()
        service = Service(clock, pacer=pacer, limits=scarce)
        held = await service.hand_out(visitor())
        await asyncio.sleep(HOUR - 60 * minutes_left)
        match trouble:
            case "hangs":
                service.issuer.delay = 1000
            case "fails":
                service.issuer.fail = _raise(errors.UpstreamUnavailable("down"))
            case "refuses":
                service.issuer.fail = _raise(errors.UpstreamRefused(402, "INSUFFICIENT", "no"))
            case "no budget":
                pacer.pause(300)
            case _:
                pass
        for _ in range(200):
            asking = service.service.issue(visitor(), 12.0)
            with pytest.raises(StopIteration) as answered:  # it never gives up control
                asking.send(None)
            assert answered.value.value.outcome is Outcome.REUSED
            assert session_of(answered.value.value.token) == session_of(held.token)
            await asyncio.sleep(A_BIT)
        await service.service.flights.close()
        await pacer.close()
        await service.settled()

    run_virtual(main)


def _raise(error: Exception):  # noqa: ANN202 - what FakeIssuer.fail wants
    def fail(_request: TokenRequest) -> None:
        raise error

    return fail


def test_G5_not_even_while_others_wait_for_a_fresh_one() -> None:
    """Somebody insists on a new token and the vendor hangs: everybody else reuses the old one."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        held = await service.hand_out(visitor())
        service.issuer.delay = 5.0
        insisting = service.begin(visitor(fresh=True))
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        answer = await service.hand_out(visitor())
        assert (answer.token, answer.outcome) == (held.token, Outcome.REUSED)
        assert asyncio.get_running_loop().time() - began < A_BIT
        assert (await insisting).token != held.token
        await service.settled()

    run_virtual(main)


def test_G8_visitors_who_differ_in_one_part_never_meet() -> None:
    """Client, agent, fingerprint, model: all ask at once, again and again, over renewals."""

    async def main(clock: FakeClock) -> None:
        service = Service(clock)
        service.issuer.delay = 0.2
        requests = [
            visitor(fingerprint, agent=agent, model=model, client=client)
            for fingerprint in ("aaaa", "AAAA")
            for agent in ("A1", "a1")
            for model in (None, "essence", "expression")
            for client in ("web", "app")
        ]
        for _ in range(12):
            crowd = requests * 5
            random.Random(7).shuffle(crowd)
            answers = await asyncio.gather(*(service.hand_out(request) for request in crowd))
            for request, answer in zip(crowd, answers, strict=True):
                assert belongs_to(answer.token, request)
            assert len({answer.token for answer in answers}) == len(requests)
            await asyncio.sleep(500)
        assert service.mints > len(requests)
        await service.settled()

    run_virtual(main)
