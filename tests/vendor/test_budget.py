"""The vendor's budget by the vendor's own count: row V10, promise G4, fairness and honest times."""

import asyncio
import contextlib
import math
import random
from collections import Counter

import pytest
from relaying import Relay, relaying, visitor

from broker.errors import BudgetExhausted
from broker.pacing.pacer import BudgetPacer, Priority
from broker.pacing.slots import Budget
from broker.rules.outstanding import Ledger
from broker.testing import FakeClock, FakeVendor, Refusal, VendorSettings, run_virtual
from broker.testing.vendor import faults
from broker.testing.vendor.settings import Allowance

SHIPPED = Budget(rate=106, per=60, burst=8, max_wait=8)
ALLOWED = 120
MINUTE = 60.0

TWENTIETH = Budget(rate=106, per=3, burst=8, max_wait=2)
"""The shipped budget twenty times as fast: its minute takes 3 s.  Answers on a busy machine take
0.1 s, and have to come within the 0.2 s of a burst, or calls that are out use it up."""


def now() -> float:
    """Read the loop's clock, which the budget runs on."""
    return asyncio.get_running_loop().time()


def worst_window(calls: list[float], width: float = MINUTE) -> int:
    """Count the calls in the fullest window of this width, both ends included."""
    worst, first = 0, 0
    for last, call in enumerate(calls):
        while call - calls[first] > width:
            first += 1
        worst = max(worst, last - first + 1)
    return worst


class TestVirtualTime:
    def test_V10_G4_a_day_of_bursts_never_exceeds_the_vendor_s_minute(  # noqa: C901 - a day is long
        self,
    ) -> None:
        """24 hours: quiet nights, floods, restarts, pauses, corrections, people who leave."""
        chance = random.Random(24)

        async def main(_clock: FakeClock) -> list[float]:
            calls: list[float] = []
            crowd: set[asyncio.Task[None]] = set()
            loop = asyncio.get_running_loop()
            ends = now() + 24 * 3600
            pacer = BudgetPacer(SHIPPED, lambda _seconds: None)
            await pacer.start()

            async def request_token(pacer: BudgetPacer) -> None:
                urgency = chance.choice([Priority.FIRST, Priority.FIRST, *Priority])
                try:
                    slot = await pacer.acquire(urgency, f"client {chance.randrange(5)}")
                except Exception as error:  # noqa: BLE001 - who is told to wait is no call
                    refused[type(error).__name__] += 1
                else:
                    calls.append(now())
                    slot.settle()

            refused: Counter[str] = Counter()
            while now() < ends:
                for _ in range(chance.choice([0, 0, 1, 1, 2, 10, 60])):
                    task = loop.create_task(request_token(pacer))
                    crowd.add(task)
                    task.add_done_callback(crowd.discard)
                await asyncio.sleep(chance.expovariate(1 / chance.choice([0.2, 1, 5, 60])))
                dice = chance.random()
                if dice < 0.002:
                    await pacer.close()
                    pacer = BudgetPacer(SHIPPED, lambda _seconds: None)
                    await pacer.start()
                elif dice < 0.004:
                    pacer.pause(chance.uniform(1, 90))
                elif dice < 0.014:
                    await pacer.sync_remaining(chance.randrange(8))
                elif crowd and dice < 0.1:
                    chance.choice(list(crowd)).cancel()
            await asyncio.gather(*crowd, return_exceptions=True)
            await pacer.close()
            assert refused["BudgetExhausted"] > 10_000
            assert not set(refused) - {"BudgetExhausted", "ServiceUnavailable"}
            return calls

        calls = run_virtual(main)
        assert len(calls) > 15_000
        assert worst_window(calls) <= ALLOWED - 5  # room for what a hanging connection bunches
        print(f"calls {len(calls)}, worst minute {worst_window(calls)}")

    @pytest.mark.parametrize("gap", [30.0, 20.0, 12.0])
    def test_V11_one_who_asks_a_hundred_times_as_much_takes_two_slots_from_whoever_waits(
        self, gap: float
    ) -> None:
        """19 clients at 36, 54 and 90 % of the budget, beside one who wants every slot.

        Nobody finds the burst any more that they find alone.  What is promised is a place: while
        somebody waits, the noisy one gets two slots at most, and one more for each slot that the
        waiting client gets itself (`tests/pacing/test_fair_queue.py` has the property).
        """
        grants = _grants_beside_a_noisy_one(gap)
        assert sum(name == "noisy" for name, _, _ in grants) > 100
        for number, (name, joined, _) in enumerate(grants):
            between = Counter(other for other, _, _ in grants[joined:number])
            assert name == "noisy" or between["noisy"] <= between[name] + 2

    @pytest.mark.parametrize("gap", [30.0, 20.0])
    def test_V11_one_who_asks_a_hundred_times_as_much_gets_nobody_refused(self, gap: float) -> None:
        """Up to half of the budget the others are all served, 95 % of them within four seconds."""
        beside, refused = _modest_waits(gap, noisy=True)
        assert refused < 0.001
        assert beside < SHIPPED.max_wait / 2


def _modest_waits(gap: float, *, noisy: bool) -> tuple[float, float]:
    """Return p95 of the wait and the share refused, of 19 clients in an hour."""

    async def main(_clock: FakeClock) -> list[float]:
        chance = random.Random(20)
        pacer = BudgetPacer(SHIPPED, lambda _seconds: None)
        await pacer.start()
        await asyncio.sleep(60)
        waits: list[float] = []

        async def request_token(name: str, note: list[float]) -> None:
            began = now()
            try:
                slot = await pacer.acquire(Priority.FIRST, name)
            except BudgetExhausted:
                note.append(math.inf)
            else:
                note.append(now() - began)
                slot.settle()

        async def client(name: str, gap: float, note: list[float]) -> None:
            ends = now() + 3600
            async with asyncio.TaskGroup() as group:
                while now() < ends:
                    group.create_task(request_token(name, note))
                    await asyncio.sleep(chance.expovariate(1 / gap))

        async with asyncio.TaskGroup() as group:
            for number in range(19):
                group.create_task(client(f"modest {number}", gap, waits))
            if noisy:
                group.create_task(client("noisy", gap / 100, []))
        await pacer.close()
        return waits

    waits = sorted(run_virtual(main))
    return waits[int(len(waits) * 0.95)], sum(map(math.isinf, waits)) / len(waits)


def _grants_beside_a_noisy_one(gap: float) -> list[tuple[str, int, float]]:
    """Return for each slot of an hour: whose it was, how many had gone when they came, the wait."""

    async def main(_clock: FakeClock) -> list[tuple[str, int, float]]:
        chance = random.Random(21)
        pacer = BudgetPacer(SHIPPED, lambda _seconds: None)
        await pacer.start()
        grants: list[tuple[str, int, float]] = []

        async def request_token(name: str) -> None:
            began, joined = now(), len(grants)
            with contextlib.suppress(BudgetExhausted):
                slot = await pacer.acquire(Priority.FIRST, name)
                grants.append((name, joined, now() - began))
                slot.settle()

        async def client(name: str, gap: float) -> None:
            ends = now() + 3600
            async with asyncio.TaskGroup() as group:
                while now() < ends:
                    group.create_task(request_token(name))
                    await asyncio.sleep(chance.expovariate(1 / gap))

        async with asyncio.TaskGroup() as group:
            for number in range(19):
                group.create_task(client(f"modest {number}", gap))
            group.create_task(client("noisy", gap / 100))
        await pacer.close()
        return grants

    return run_virtual(main)


class TestOverSockets:
    async def test_V10_G4_by_the_journal_from_a_cold_start_under_siege(self) -> None:
        """Twenty times as fast: no "minute" holds more than a burst and what refilled."""
        async with relaying(VendorSettings(ip=None), budget=TWENTIETH) as relay:
            arrived = await _besiege(relay, 7)
        assert worst_window(arrived, 3) <= ALLOWED - 6
        assert len(arrived) >= 106

    async def test_V10_after_a_429_with_retry_after_nothing_arrives_until_it_is_over(
        self, relay: Relay
    ) -> None:
        """And then slots come one by one: no burst."""
        arrived: list[float] = []
        relay.vendor.fail(faults.HEALTHY, where=lambda _call: arrived.append(now()) or False)
        relay.vendor.fail(faults.error(Refusal.RATE_LIMITED, retry_after="1"), times=1)
        await relay.failure(timeout=0.5)
        crowd = [relay.begin() for _ in range(50)]
        await asyncio.gather(*crowd, return_exceptions=True)
        first, *rest = arrived
        assert rest
        assert min(rest) - first >= 1

    async def test_V10_retries_and_second_keys_take_a_slot_each(self) -> None:
        """A vendor that fails is not sent more than one that works: every call counts."""
        once = Budget(rate=1, per=3600, burst=3, max_wait=0.1)
        async with relaying(budget=once) as relay:
            relay.pacer._slots._limiter._level = 0.0  # as after three idle hours
            relay.pacer._slots._ledger = Ledger()
            relay.vendor.fail(faults.html())
            for _ in range(3):
                await relay.failure()
            assert relay.calls == 3

    async def test_V11_of_a_hundred_first_visitors_all_are_served_in_time_or_when_told(
        self,
    ) -> None:
        """Those within `max_wait` now, the others get 503 at once and are served when they return.

        Most of a second stands for eight: rate and wait are those that ship, 10 times as fast.
        """
        budget = Budget(rate=106, per=6, burst=8, max_wait=0.8)
        async with relaying(VendorSettings(ip=None), budget=budget) as relay:
            told: list[float] = []
            again: list[int] = []

            async def one() -> None:
                fingerprint = visitor()
                began = now()
                for tries in range(4):
                    try:
                        await relay.request_token(fingerprint)
                    except BudgetExhausted as error:
                        if not tries:
                            told.append(now() - began)
                        await asyncio.sleep(error.retry_after / 1_000_000)
                    else:
                        again.append(tries)
                        return
                raise AssertionError("told to come back, and refused again and again")

            await asyncio.gather(*(one() for _ in range(100)))
            assert len(again) == 100
            assert 10 <= again.count(0) <= 25
            assert again.count(1) >= 70  # the first return is enough, but for a busy machine's lag
            assert relay.calls == 100

    async def test_G4_the_shipped_budget_is_never_throttled_by_the_shipped_vendor(self) -> None:
        """Two real seconds from a cold start: not one 429 from a vendor with a small bucket.

        The vendor's bucket refills at its documented rate and holds two calls, one of them for a
        machine that is late by half a second: a burst of the broker's at its start would show.
        """
        settings = VendorSettings(ip=Allowance(2, 0.5))
        budget = Budget(rate=106, per=60, burst=8, max_wait=2.5)
        async with FakeVendor(settings) as vendor:
            relay = Relay(vendor, FakeClock(), budget=budget)
            await relay.open()
            crowd = [relay.begin() for _ in range(4)]
            await asyncio.gather(*crowd)
            await relay.close()
            assert vendor.journal.statuses() == {200: 4}


async def _besiege(relay: Relay, seconds: float) -> list[float]:
    """Want as many tokens as there are; returns when calls arrived, by the real clock."""
    arrived: list[float] = []
    relay.vendor.fail(faults.HEALTHY, where=lambda _call: arrived.append(now()) or False)

    async def greedy() -> None:
        while True:
            try:
                await relay.request_token()
            except BudgetExhausted as error:
                await asyncio.sleep(min(error.retry_after / 1_000_000, 0.05))

    crowd = [asyncio.get_running_loop().create_task(greedy()) for _ in range(30)]
    await asyncio.sleep(seconds)
    for one in crowd:
        one.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    return arrived


@pytest.mark.parametrize("replicas", [1, 3])
async def test_the_journal_counts_what_the_budget_let_through(replicas: int) -> None:
    """What each relay's metrics say adds up to what the vendor saw."""
    async with FakeVendor(VendorSettings(ip=None)) as vendor:
        relays = [Relay(vendor, FakeClock(), budget=TWENTIETH) for _ in range(replicas)]
        for relay in relays:
            await relay.open()
            await asyncio.gather(*(relay.request_token() for _ in range(5)))
        assert len(vendor.journal.calls) == 5 * replicas
        for relay in relays:
            assert relay.statuses == {"200": 5}
            assert len(relay.waits) == 5
            await relay.close()
