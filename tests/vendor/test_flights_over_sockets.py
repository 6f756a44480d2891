"""Flights and time over real sockets: rows F1-F6, F8, F9 and T2-T9 as the relay meets them."""

import asyncio
import gc
import random

import msgspec
import pytest
from relaying import (
    AGENT,
    POLICY,
    UNLIMITED,
    House,
    Relay,
    belongs_to,
    broker_before,
    relaying,
    session_of,
    token_of,
    until,
    visitor,
)

from broker.errors import BrokerError, UpstreamTimeout, UpstreamUnavailable
from broker.model import Outcome, TokenRequest
from broker.pacing.slots import Budget
from broker.rules.reuse import MAX_LIFETIME
from broker.testing import FakeVendor, Refusal
from broker.testing.vendor import faults
from broker.testing.vendor.mint import visitor_mark
from broker.units import SECOND

HOUR = 3600


class TestFlights:
    async def test_F1_a_thousand_first_requests_are_one_call(self, house: House) -> None:
        """Over HTTP on both sides: one call, one token, one session, one charge of the agent."""
        fingerprint = visitor()
        with house.vendor.fail(faults.slow(0.2)):
            replies = await asyncio.gather(*(house.request_token(fingerprint) for _ in range(1000)))
        assert len(house.vendor.journal.calls) == 1
        assert {reply.status for reply in replies} == {200}
        assert len({reply.body for reply in replies}) == 1
        metrics = await house.scrape()
        assert metrics['broker_requests_total{outcome="minted"}'] == 1
        assert (
            metrics['broker_requests_total{outcome="coalesced"}']
            + metrics['broker_requests_total{outcome="reused"}']
            == 999
        )
        assert metrics['broker_buckets_tracked{limit="agent"}'] == 1
        assert metrics["broker_mints_in_flight"] == 0
        assert metrics["broker_upstream_queue_wait_seconds_count"] == 1

    async def test_F2_G2_the_first_caller_hangs_up_and_the_others_are_served(
        self, house: House
    ) -> None:
        """The mint belongs to nobody in particular; its token is cached.

        It takes longer than a client that has sent its last byte is kept (`HALF_CLOSED`).
        """
        fingerprint = visitor()
        loop = asyncio.get_running_loop()
        with house.vendor.fail(faults.slow(4.0)):
            first = loop.create_task(house.request_token(fingerprint))
            await house.arrived(1)
            others = [loop.create_task(house.request_token(fingerprint)) for _ in range(10)]
            await until(lambda: _waiting(house) == 11, "everybody to wait")
            first.cancel()
            await until(lambda: _waiting(house) == 10, "the first one to be gone")
            replies = await asyncio.gather(*others)
        assert {reply.status for reply in replies} == {200}
        assert (await house.request_token(fingerprint)).reused
        assert len(house.vendor.journal.calls) == 1

    async def test_F2_G2_the_first_caller_leaves_the_queue_and_the_others_keep_the_place(
        self,
    ) -> None:
        """Before the call is out, too: whoever still waits is reason enough."""
        slow = Budget(rate=600, per=60, burst=1, max_wait=5)
        async with relaying(budget=slow) as relay:
            fingerprint = visitor()
            first = relay.begin(fingerprint)
            others = [relay.begin(fingerprint) for _ in range(5)]
            await until(lambda: relay.pacer.depth == 1, "the mint to queue")
            first.cancel()
            all_issued = await asyncio.gather(*others)
            assert len({token_of(issued) for issued in all_issued}) == 1
            assert relay.calls == 1

    async def test_G2_an_impatient_caller_takes_nothing_from_a_patient_one(
        self, relay: Relay
    ) -> None:
        """Each waits for their own time: one is told 504, the other gets the token."""
        fingerprint = visitor()
        relay.vendor.fail(faults.slow(0.2))
        waiting = relay.begin(fingerprint)
        with pytest.raises(UpstreamTimeout):
            await relay.request_token(fingerprint, timeout=0.01)
        await waiting
        assert relay.calls == 1

    async def test_F3_a_mint_that_everybody_left_is_finished_once_it_is_sent(
        self, relay: Relay
    ) -> None:
        """Its token is paid for, and there for the next one."""
        fingerprint = visitor()
        relay.vendor.fail(faults.slow(0.05))
        callers = [relay.begin(fingerprint) for _ in range(5)]
        await relay.arrived(1)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        await relay.settled()
        assert (await relay.request_token(fingerprint)).outcome is Outcome.REUSED
        assert relay.calls == 1

    async def test_F3_a_mint_that_everybody_left_in_the_queue_never_goes_out(self) -> None:
        """Its place goes to the next, and the vendor never hears of it."""
        slow = Budget(rate=600, per=60, burst=1, max_wait=5)
        async with relaying(budget=slow) as relay:
            leavers = [visitor() for _ in range(5)]
            left = [relay.begin(fingerprint) for fingerprint in leavers]
            stays = relay.begin()
            await asyncio.sleep(0)
            await until(lambda: relay.pacer.depth == 6, "a queue of six")
            for caller in left:
                caller.cancel()
            await stays
            await relay.settled()
            assert [call.fingerprint in leavers for call in relay.vendor.journal.calls] == [False]
            assert relay.pacer.depth == 0

    async def test_F4_a_failure_is_everybody_s_and_happens_once(self, relay: Relay) -> None:
        """Every waiter gets that error; no one tries again by themselves; nobody gets None."""
        fingerprint = visitor()
        refused = faults.combined(faults.error(Refusal.CONCURRENCY_LIMIT_REACHED), faults.slow(0.1))
        relay.vendor.fail(refused)
        callers = [relay.begin(fingerprint) for _ in range(200)]
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        assert {type(outcome).__name__ for outcome in outcomes} == {"UpstreamRefused"}
        assert {str(outcome.code) for outcome in outcomes if isinstance(outcome, BrokerError)} == {
            "CONCURRENCY_LIMIT_REACHED"
        }
        assert relay.calls == 1

    async def test_F5_a_late_end_of_an_old_mint_does_not_end_a_newer_one(self) -> None:
        """Deserted in the queue, begun anew: the newcomers of the second one find each other."""
        slow = Budget(rate=600, per=60, burst=1, max_wait=5)
        async with relaying(budget=slow) as relay:
            fingerprint = visitor()
            first = relay.begin(fingerprint)
            await until(lambda: relay.pacer.depth == 1, "the first to queue")
            first.cancel()
            again = [relay.begin(fingerprint) for _ in range(3)]
            await asyncio.gather(first, return_exceptions=True)
            again += [relay.begin(fingerprint) for _ in range(3)]
            all_issued = await asyncio.gather(*again)
            assert len({token_of(issued) for issued in all_issued}) == 1
            assert relay.calls == 1

    async def test_F6_a_failure_that_nobody_awaits_is_nobody_s_business(self, relay: Relay) -> None:
        """No "exception was never retrieved"; the next caller starts afresh."""
        complaints: list[object] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: complaints.append(context)
        )
        fingerprint = visitor()
        fault = faults.combined(faults.html(), faults.slow(0.02))
        with relay.vendor.fail(fault):
            caller = relay.begin(fingerprint)
            await relay.arrived(1)
            caller.cancel()
            await asyncio.gather(caller, return_exceptions=True)
            await relay.settled()
        gc.collect()
        assert complaints == []
        assert (await relay.request_token(fingerprint)).outcome is Outcome.MINTED

    async def test_F8_G8_no_interleaving_gives_a_visitor_another_s_token(
        self, vendor: FakeVendor
    ) -> None:
        """Over HTTP, with latencies that shuffle the answers and failures in between."""
        chance = random.Random(8)
        vendor.settings = msgspec.structs.replace(
            UNLIMITED, latency=lambda vendor_s: vendor_s.uniform(0, 0.02)
        )
        vendor.fail(faults.error(Refusal.UNPROCESSABLE), where=lambda call: chance.random() < 0.05)
        visitors = [visitor() for _ in range(20)]
        agents, models = [AGENT, AGENT.lower(), "other"], [None, "m", "M"]
        async with broker_before(vendor) as house:

            async def one() -> None:
                fingerprint, agent = chance.choice(visitors), chance.choice(agents)
                model = chance.choice(models)
                fields = {} if model is None else {"model": model}
                fresh = chance.random() < 0.1
                reply = await house.request_token(fingerprint, agent=agent, fresh=fresh, **fields)
                if reply.status != 200:
                    assert reply.code == "VALIDATION_ERROR"
                    return
                mark = visitor_mark(agent, fingerprint, model)
                assert reply.data["session_id"].startswith(mark + "-")
                assert reply.data["sid"] == reply.data["session_id"]
                assert vendor.claims_of(reply.token)["sid"] == reply.data["sid"]
                served.append(mark)

            served: list[str] = []
            for _ in range(10):
                await asyncio.gather(*(one() for _ in range(80)))
        assert len(served) > 600
        assert len(set(served)) > 100

    async def test_F9_half_of_a_hundred_leave_and_the_other_half_is_served(
        self, house: House
    ) -> None:
        """At random moments, over HTTP: one call."""
        chance = random.Random(9)
        fingerprint = visitor()
        with house.vendor.fail(faults.slow(0.2)):
            callers = [
                asyncio.get_running_loop().create_task(house.request_token(fingerprint))
                for _ in range(100)
            ]
            leavers = callers[::2]
            chance.shuffle(leavers)
            await house.arrived(1)
            for leaver in leavers:
                leaver.cancel()
                if chance.random() < 0.5:
                    await asyncio.sleep(0)
            replies = await asyncio.gather(*callers[1::2])
        assert {reply.status for reply in replies} == {200}
        assert len({reply.body for reply in replies}) == 1
        assert len(house.vendor.journal.calls) == 1


class TestLifetimes:
    @pytest.mark.parametrize("skew", [300, -300, 86_000, -86_000])
    async def test_T6_the_vendor_s_clock_does_not_matter(self, skew: int) -> None:
        """A token lives for `exp - iat` from the start of its mint, whatever time it says."""
        async with relaying(msgspec.structs.replace(UNLIMITED, skew=float(skew))) as relay:
            fingerprint = visitor()
            first = await relay.request_token(fingerprint)
            assert first.left == HOUR * SECOND
            relay.clock.advance(HOUR - 15 * 60 - 1)
            assert (await relay.request_token(fingerprint)).outcome is Outcome.REUSED
            await relay.settled()
            assert relay.calls == 1
            relay.clock.advance(10 * 60 + 2)
            again = await relay.request_token(fingerprint)
            assert (again.outcome, relay.calls) == (Outcome.MINTED, 2)

    async def test_T8_the_time_that_the_mint_took_is_not_added_to_the_life(
        self, relay: Relay
    ) -> None:
        """Life counts from the start of the call, not from its answer, and is counted once."""
        relay.vendor.fail(faults.slow(0.05), times=1)
        fingerprint = visitor()
        slow = relay.begin(fingerprint)
        await relay.arrived(1)
        relay.clock.advance(7)
        assert (HOUR - 8) * SECOND <= (await slow).left <= (HOUR - 7) * SECOND

    @pytest.mark.parametrize(
        ("claims", "left"),
        [
            ({"exp": 253402300799}, MAX_LIFETIME),
            ({"exp": 10**300}, MAX_LIFETIME),
            ({"exp": float("inf")}, MAX_LIFETIME),
            ({"exp": "tomorrow"}, MAX_LIFETIME),
            ({"exp": True}, MAX_LIFETIME),
            ({"exp": None}, MAX_LIFETIME),
            ({"exp": [1]}, MAX_LIFETIME),
            ({"exp": 1_800_000_600.5, "iat": 1_800_000_000.0}, 600_500_000),
        ],
        ids=str,
    )
    async def test_T4_odd_claims_are_clamped_or_taken_for_an_hour(
        self, relay: Relay, claims: dict[str, object], left: int
    ) -> None:
        """Never cached for ever; after that time the vendor is asked again."""
        relay.vendor.fail(faults.claims(**claims))
        fingerprint = visitor()
        issued = await relay.request_token(fingerprint)
        assert issued.left == left
        relay.clock.advance(left / SECOND)
        relay.vendor.heal()
        assert (await relay.request_token(fingerprint)).outcome is Outcome.MINTED
        assert relay.calls == 2

    async def test_T4_a_token_without_expiry_lives_for_an_hour(self, relay: Relay) -> None:
        """`exp` missing; then both missing."""
        for without in (["exp"], ["exp", "iat"]):
            with relay.vendor.fail(faults.claims(without=without)):
                assert (await relay.request_token()).left == MAX_LIFETIME

    @pytest.mark.parametrize("seconds", [0, -1, -3600])
    async def test_T2_a_token_that_had_expired_on_arrival_is_an_error(self, seconds: int) -> None:
        """Counted, not kept, and the next try of this visitor waits."""
        async with relaying(draw=lambda: 0.2) as relay:
            relay.vendor.fail(faults.lifetime(seconds))
            fingerprint = visitor()
            error = await relay.failure(fingerprint)
            assert isinstance(error, UpstreamUnavailable)
            assert relay.errors == {"expired": 1}
            assert len(relay.tokens) == 0
            assert relay.calls == 1
            assert relay.minter.backoff.left(key_of(fingerprint)) > 0

    @pytest.mark.parametrize("left", [299, 100, 59, 30])
    async def test_T2_G3_an_old_token_that_is_handed_out_again_below_the_floor_is_an_error(
        self, relay: Relay, left: int
    ) -> None:
        """Its life was an hour, so the floors are an hour's, however little is left of it."""
        fingerprint = visitor()
        relay.vendor.fail(faults.same_token())
        await relay.request_token(fingerprint)
        relay.clock.advance(HOUR - left)
        relay.tokens.clear()  # as after a restart
        assert isinstance(await relay.failure(fingerprint), UpstreamUnavailable)

    async def test_T2_an_old_token_that_is_handed_out_again_above_the_floor_is_good(
        self, relay: Relay
    ) -> None:
        """With the life that it has left, and asked for a successor at an hour's marks."""
        fingerprint = visitor()
        relay.vendor.fail(faults.same_token())
        first = await relay.request_token(fingerprint)
        relay.clock.advance(1800)
        relay.tokens.clear()
        again = await relay.request_token(fingerprint)
        assert (token_of(again), again.left) == (token_of(first), 1800 * SECOND)
        assert again.token.mark >= POLICY.floor

    async def test_T3_the_same_token_again_is_noticed_and_backed_off(self) -> None:
        """In the renewal window and below the floor: served, and the vendor hardly asked."""
        async with relaying(draw=lambda: 0.9) as relay:
            fingerprint = visitor()
            first = await relay.request_token(fingerprint)
            relay.vendor.fail(faults.same_token())
            for left in (14 * 60, 4 * 60):
                before = relay.calls
                relay.clock.advance(
                    first.token.left(relay.clock.mono(), relay.clock.wall()) / SECOND - left
                )
                for _ in range(200):
                    assert token_of(await relay.request_token(fingerprint)) == token_of(first)
                    await relay.settled()
                assert relay.calls == before + 1
            assert relay.refreshes("ahead", "same") == 1
            assert relay.refreshes("floor", "same") == 1
            relay.clock.advance(60)
            relay.vendor.heal()
            again = await relay.request_token(fingerprint)
            assert token_of(again) != token_of(first)
            assert again.left == HOUR * SECOND

    @pytest.mark.parametrize("seconds", [1, 2, 60])
    async def test_T7_short_lives_are_reused_too(self, seconds: int) -> None:
        """A vendor of one-second tokens must not cause a mint a request."""
        settings = msgspec.structs.replace(UNLIMITED, lifetime=seconds)
        async with relaying(settings) as relay:
            fingerprint = visitor()
            for _ in range(100):
                issued = await relay.request_token(fingerprint)
                await relay.settled()
                assert issued.left > 0
                relay.clock.advance(seconds / 100)
            assert relay.calls <= 3

    async def test_T7_tokens_without_any_life_are_no_hot_loop(self) -> None:
        """Life 0: each request is told the failure, and the visitor's next mint waits."""
        async with relaying(draw=lambda: 0.04) as relay:
            relay.vendor.fail(faults.lifetime(0))
            fingerprint = visitor()
            for _ in range(3):
                await relay.failure(fingerprint)
            assert relay.calls == 3
            assert relay.minter.backoff.failures(key_of(fingerprint)) == 3

    @pytest.mark.parametrize("step", [3600, -3600])
    async def test_T5_a_wall_clock_that_steps_gives_no_dead_token(self, step: int) -> None:
        """Set forward, a token is renewed early; set back, it dies on the other clock."""
        async with relaying() as relay:
            fingerprint = visitor()
            await relay.request_token(fingerprint)
            relay.clock.step_wall(step)
            relay.clock.advance(HOUR - 299)
            assert (await relay.request_token(fingerprint)).outcome is Outcome.MINTED

    @pytest.mark.parametrize(("left", "renewed"), [(300.0, 0), (299.999999, 1)])
    async def test_T8_at_the_floor_exactly_it_is_still_handed_out(
        self, left: float, renewed: int
    ) -> None:
        """One microsecond less, and a new one is minted first."""
        async with relaying(draw=lambda: 0.0) as relay:
            fingerprint = visitor()
            await relay.request_token(fingerprint)
            relay.clock.advance(HOUR - left)
            issued = await relay.request_token(fingerprint)
            assert (issued.outcome is Outcome.MINTED) == bool(renewed)
            await relay.settled()

    async def test_T9_G5_a_renewal_that_fails_disturbs_nobody_and_is_tried_again_later(
        self,
    ) -> None:
        """Backed off, not latched: callers are served, and the vendor's recovery is used."""
        async with relaying(draw=lambda: 0.9) as relay:
            fingerprint = visitor()
            first = await relay.request_token(fingerprint)
            relay.clock.advance(HOUR - 14 * 60)
            with relay.vendor.fail(faults.error(Refusal.CONCURRENCY_LIMIT_REACHED)):
                for tries in range(1, 5):
                    for _ in range(50):
                        issued = await relay.request_token(fingerprint)
                        assert issued.token is first.token
                        await relay.settled()
                    assert relay.calls == 1 + tries
                    relay.clock.advance(5)
            await relay.request_token(fingerprint)
            await relay.settled()
            renewed = await relay.request_token(fingerprint)
            assert token_of(renewed) != token_of(first)
            assert relay.refreshes("ahead", "failed") == 4
            assert relay.refreshes("ahead", "renewed") == 1

    async def test_G5_nobody_with_a_good_token_waits_for_a_renewal(self, relay: Relay) -> None:
        """The renewal hangs; a hundred requests are answered while it does, with the old token."""
        fingerprint = visitor()
        first = await relay.request_token(fingerprint)
        await until(
            lambda: relay.pacer.has_headroom, "half a burst"
        )  # the first answer takes some back
        relay.clock.advance(HOUR - 6 * 60)
        with relay.vendor.fail(faults.hang()):
            for _ in range(100):
                assert (await relay.request_token(fingerprint)).token is first.token
            await relay.arrived(2)
            assert (await relay.request_token(fingerprint)).token is first.token
            assert len(relay.service.flights) == 1
            assert relay.calls == 2
            await relay.vendor.refuse_connections()
            await relay.settled()

    async def test_fresh_asks_for_a_new_token_and_keeps_the_old_one_when_that_fails(
        self, relay: Relay
    ) -> None:
        """The caller is told the failure; later requests still reuse."""
        fingerprint = visitor()
        first = await relay.request_token(fingerprint)
        with relay.vendor.fail(faults.html()):
            assert (await relay.failure(fingerprint, fresh=True)).status == 502
        assert (await relay.request_token(fingerprint)).token is first.token
        second = await relay.request_token(fingerprint, fresh=True)
        assert session_of(second) != session_of(first)
        assert (await relay.request_token(fingerprint)).token is second.token

    async def test_F8_two_keys_two_tokens(self, relay: Relay) -> None:
        """Agent, visitor, model and client: whoever differs in one has a token of their own."""
        fingerprint = "ab" * 8
        requests = [
            {},
            {"agent": AGENT.lower()},
            {"model": "m"},
            {"model": "M"},
            {"client": "other"},
        ]
        all_issued = [await relay.request_token(fingerprint, **request) for request in requests]
        assert len({token_of(issued) for issued in all_issued}) == len(requests)
        for request, issued in zip(requests, all_issued, strict=True):
            assert belongs_to(
                issued, fingerprint, request.get("agent", AGENT), request.get("model")
            )


class TestStale:
    async def test_G3_below_the_floor_the_old_token_is_good_while_the_vendor_is_away(
        self, relay: Relay
    ) -> None:
        """Down to the floor in outage; then an honest failure."""
        fingerprint = visitor()
        first = await relay.request_token(fingerprint)
        relay.vendor.fail(faults.html())
        relay.clock.advance(HOUR - 299)
        for _ in range(39):
            issued = await relay.request_token(fingerprint)
            assert issued.token is first.token
            assert issued.left >= POLICY.outage
            relay.clock.advance(6)
        relay.clock.advance(6)
        error = await relay.failure(fingerprint)
        assert error.status in (502, 503)


def key_of(fingerprint: str) -> str:
    """Name the visitor's place in the cache."""
    return TokenRequest("web", AGENT, fingerprint).key


def _waiting(house: House) -> int:
    """How many wait for the mint that is under way."""
    flights = house.app.parts.token_service.flights._by_key.values()
    return sum(len(flight._waiters) for flight in flights)
