"""What a slot of the budget is spent on, and what is told of it: over real sockets."""

import asyncio
import time

import pytest
from relaying import AGENT, Relay, relaying, until, visitor

from broker.errors import ServiceUnavailable, UpstreamUnavailable
from broker.issuers.negative_cache import LocalNegativeCache
from broker.issuers.vendor.replies import Refused, Scope
from broker.model import TokenRequest
from broker.pacing.slots import Budget
from broker.rules.breaker import Outcome, Permit
from broker.testing import FakeClock, Refusal
from broker.testing.vendor import faults

A_SLOT_A_SECOND = Budget(rate=60, per=60, burst=1, max_wait=5)


async def test_V3_a_list_of_which_only_the_refused_key_is_left_still_mints() -> None:
    """Keys A and B, A refused, then the list is A alone, because the vendor took it back.

    What was passed over belongs to the list that was: the key is tried, once.
    """
    async with relaying() as relay:
        first = relay.vendor.secret
        second = relay.vendor.add_secret()
        relay.issuer.use_keys([first, second])
        relay.vendor.revoke_secret(first)
        await relay.request_token()
        relay.issuer.use_keys([first])
        error = await relay.failure()
        assert isinstance(error, UpstreamUnavailable)
        assert relay.calls == 3
        relay.vendor.add_secret(first.reveal())
        relay.clock.advance(30)
        await relay.request_token()


async def test_V3_a_key_that_is_twice_in_the_list_is_one_key(relay: Relay) -> None:
    """When it is refused no other is left: told so, not a defect."""
    relay.issuer.use_keys([relay.vendor.secret, relay.vendor.secret])
    relay.vendor.revoke_secret(relay.vendor.secret)
    for _ in range(2):
        assert isinstance(await relay.failure(), UpstreamUnavailable)
    assert relay.calls == 1
    assert relay.issuer.credentials.is_open


async def test_V8_a_probe_that_another_breaker_stops_gives_its_leave_back() -> None:
    """The key's breaker lets it through, the vendor's does not: the next one may probe the key."""
    async with relaying(budget=Budget(rate=240, per=60, burst=1, max_wait=5)) as relay:
        relay.vendor.revoke_secret(relay.vendor.secret)
        await relay.failure()
        relay.vendor.add_secret(relay.vendor.secret.reveal())
        relay.clock.advance(30)
        asking = relay.begin()
        await until(lambda: relay.pacer.depth == 1, "the probe to queue")
        well, now = relay.issuer.health, relay.clock.mono()
        unwell = well
        while not unwell.is_open:
            unwell = unwell.settle(Permit(unwell.epoch), Outcome.FAILED, now, lambda: 0.0)
        relay.issuer.health = unwell
        with pytest.raises(ServiceUnavailable, match="the vendor keeps failing"):
            await asking
        assert (relay.calls, relay.pacer.outstanding) == (1, 0)
        relay.issuer.health = well
        await relay.request_token()
        assert not relay.issuer.credentials.is_open


async def test_N13_a_slot_that_a_breaker_leaves_unused_goes_to_the_next() -> None:
    """Whoever is behind in line gets it in the same moment, and is told the same at once."""
    async with relaying(budget=A_SLOT_A_SECOND) as relay:
        crowd = [relay.begin() for _ in range(4)]
        await until(lambda: relay.pacer.depth == 4, "a line")
        now, unwell = relay.clock.mono(), relay.issuer.health
        while not unwell.is_open:
            unwell = unwell.settle(Permit(unwell.epoch), Outcome.FAILED, now, lambda: 0.0)
        relay.issuer.health = unwell
        outcomes = await asyncio.gather(*crowd, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {ServiceUnavailable}
        assert max(relay.waits) - min(relay.waits) < A_SLOT_A_SECOND.interval
        assert (relay.calls, relay.pacer.outstanding) == (0, 0)


async def test_V7_a_retry_that_nobody_waits_for_is_not_paid_for(relay: Relay) -> None:
    """The first call fails after its callers have left: there is no second one."""
    relay.vendor.fail(faults.combined(faults.html(), faults.slow(0.2)))
    asking = relay.begin()
    await relay.arrived(1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await relay.settled()
    assert relay.calls == 1
    assert relay.pacer.outstanding == 0


async def test_V7_a_retry_that_is_left_while_it_queues_is_not_made() -> None:
    """Its callers go before its turn comes: its place is given up, and the slot is another's."""
    slow = Budget(rate=20, per=60, burst=1, max_wait=10)
    async with relaying(budget=slow) as relay:
        relay.vendor.fail(faults.html(), times=1)
        asking = relay.begin()
        await until(lambda: relay.calls == 1 and relay.pacer.depth == 1, "the retry to queue")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await relay.settled()
        assert (relay.calls, relay.pacer.depth, relay.pacer.outstanding) == (1, 0, 0)


async def test_the_time_of_a_mint_is_told_without_its_wait_in_the_queue() -> None:
    """`broker_mint_duration_seconds` is the vendor's; the queue has a histogram of its own."""
    async with relaying(budget=A_SLOT_A_SECOND) as relay:
        began = time.perf_counter()
        await relay.request_token()
        took = time.perf_counter() - began
        histogram = relay.metrics.duration["minted"]
        duration = histogram._cells[histogram._sum]
        (waited,) = relay.waits
        assert waited > 0.5
        assert 0 < duration <= took - waited + 0.1


@pytest.mark.parametrize("what", [Refusal.INSUFFICIENT_BALANCE, Refusal.ACCOUNT_SUSPENDED])
async def test_M4_a_success_ends_an_account_wide_refusal(relay: Relay, what: Refusal) -> None:
    """A mint that was under way succeeds: the account is good again, for every agent."""
    slow = visitor()
    relay.vendor.fail(faults.slow(0.3), fingerprint=slow)
    relay.vendor.fail(faults.error(what), times=1)
    late = relay.begin(slow)
    await relay.arrived(1)
    error = await relay.failure()
    assert (error.status, error.code) == what.value
    assert (await relay.failure(agent="B")).code == error.code
    assert relay.calls == 2
    await late
    await relay.request_token()
    await relay.request_token(agent="B")


async def test_M4_a_success_forgets_what_was_said_of_the_account_and_of_its_own_agent() -> None:
    """And nothing else: another agent's refusal stays until it is over."""
    clock = FakeClock()
    refusals = LocalNegativeCache(clock)
    account = Refused(402, "INSUFFICIENT_BALANCE", "no", Scope.ACCOUNT)
    missing = Refused(404, "NOT_FOUND", "no", Scope.AGENT_MODEL)
    ours, other = TokenRequest("web", AGENT, "ab" * 16), TokenRequest("web", "B", "ab" * 16)
    refusals.remember(ours, missing)
    refusals.remember(other, missing)
    refusals.remember(ours, account)
    assert await refusals.find(other) == account
    refusals.forget(ours)
    assert await refusals.find(ours) is None
    assert await refusals.find(other) == missing
    clock.advance(30)
    assert await refusals.find(other) is None


async def test_M4_a_success_forgets_the_refusal_of_its_own_model_only() -> None:
    """A model that was refused may be ready by now; another one is still what it was."""
    refusals = LocalNegativeCache(FakeClock())
    missing = Refused(404, "NOT_FOUND", "no", Scope.AGENT_MODEL)
    ready, plain = (TokenRequest("web", AGENT, "ab" * 16, model) for model in ("essence", None))
    refusals.remember(ready, missing)
    refusals.remember(plain, missing)
    refusals.forget(ready)
    assert await refusals.find(ready) is None
    assert await refusals.find(plain) == missing
