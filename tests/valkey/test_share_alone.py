"""N13, N18, N24, G4: what a replica spends by itself, as a rule: in virtual time, without a server.

The store is the script's twin (`budget_twin`), which is held to the script elsewhere; slots,
heartbeats and pacer are the ones that ship.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence

import pytest
from budget_twin import Member, Store

from broker.errors import BudgetExhausted
from broker.pacing.pacer import BudgetPacer, Priority
from broker.pacing.slots import Budget
from broker.testing.clock import FakeClock, VirtualLoop, run_virtual
from broker.valkey.membership import ALONE_AFTER, ALONE_FOR, HEARTBEAT, UNSEEN_PARTS
from broker.valkey.slots import LATE, SharedSlots

SHIPPED = Budget(rate=106, per=60, burst=8, max_wait=8)
ALLOWED = 120
"""What the vendor allows a minute; the budget itself allows 114."""


def virtual(scene: Callable[[], Awaitable[None]]) -> None:
    """Run a scene in virtual time."""

    async def main(_clock: FakeClock) -> None:
        await scene()

    run_virtual(main)


class Running:
    """A replica whose heart beats and whose slots are open; `calls` are when it called."""

    def __init__(self, member: Member, budget: Budget = SHIPPED) -> None:
        self.member = member
        self.slots = member.slots(budget)
        self.paced = BudgetPacer(budget, lambda _seconds: None, self.slots)
        self.calls: list[float] = []
        self.told: list[float] = []

    async def open(self) -> None:
        """Begin."""
        await self.member.fleet.beat()
        self._beating = asyncio.ensure_future(self.member.fleet.run())
        await self.paced.start()

    async def close(self) -> None:
        """End."""
        self._beating.cancel()
        await self.paced.close()

    async def take_slot(self, took: float = 0.3) -> bool:
        """Be a first visitor, whose call takes a while; returns whether it was made."""
        try:
            slot = await self.paced.acquire(Priority.FIRST, "web")
        except BudgetExhausted as refused:
            self.told.append(refused.retry_after / 1_000_000)
            return False
        self.calls.append(asyncio.get_running_loop().time())
        await asyncio.sleep(took)
        slot.answered()
        return True

    async def request_for_ever(self) -> None:
        """Ask as a crowd does: whoever is refused is followed by another one at once."""
        while True:
            if not await self.take_slot():
                await asyncio.sleep(0.5)


async def opened(*members: Member, budget: Budget = SHIPPED) -> list[Running]:
    """Open replicas, and let them hear of each other."""
    replicas = [Running(member, budget) for member in members]
    for replica in replicas:
        await replica.open()
    await asyncio.sleep(2)
    return replicas


async def closed(replicas: Sequence[Running], *crowd: "asyncio.Future[None]") -> None:
    """End them."""
    for each in crowd:
        each.cancel()
    for replica in replicas:
        await replica.close()


def worst(calls: Sequence[float], per: float = 60.0) -> int:
    """Count the calls in the fullest window."""
    calls = sorted(calls)
    return max((sum(start <= c < start + per for c in calls) for start in calls), default=0)


@pytest.mark.parametrize("quiet", [6.6, 20.0, 600.0])
@pytest.mark.parametrize("parts", [2, 7, 40])
def test_N18_the_share_begins_with_the_loss_whoever_asks(parts: int, quiet: float) -> None:
    """A quiet fleet loses the store; the share fills from then on, as if it had been in demand."""

    async def scene() -> None:
        store = Store(parts)
        (replica,) = await opened(store.replica("a"))
        share = SHIPPED.share(parts)
        assert share is not None
        store.away = True
        lost = asyncio.get_running_loop().time()
        await asyncio.sleep(quiet)
        filled = (quiet - ALONE_AFTER - HEARTBEAT - 0.6) / share.interval
        began = asyncio.get_running_loop().time()
        while await replica.take_slot() and asyncio.get_running_loop().time() - began < 0.5:
            pass
        at_once = sum(call - began < 0.5 for call in replica.calls)
        assert at_once >= min(int(filled), 1)
        assert at_once <= min((quiet - ALONE_AFTER + HEARTBEAT) / share.interval, share.burst) + 1
        assert all(call >= lost + ALONE_AFTER - HEARTBEAT for call in replica.calls)
        await closed([replica])

    virtual(scene)


def test_N18_going_alone_begins_without_a_burst() -> None:
    """In demand from the loss on: the first call is an interval after the share begins."""

    async def scene() -> None:
        store = Store(2)
        (replica,) = await opened(store.replica("a"))
        share = SHIPPED.share(2)
        assert share is not None
        crowd = asyncio.ensure_future(replica.request_for_ever())
        await asyncio.sleep(20)
        store.away = True
        lost = asyncio.get_running_loop().time()
        await asyncio.sleep(60)
        alone = [call - lost for call in replica.calls if call > lost + 1]
        assert alone[0] >= ALONE_AFTER - HEARTBEAT + share.interval
        assert alone[0] <= ALONE_AFTER + HEARTBEAT + 0.6 + share.interval
        gaps = [after - before for before, after in itertools.pairwise(alone)]
        assert min(gaps) >= share.interval - 0.01
        await closed([replica], crowd)

    virtual(scene)


def test_N18_a_share_slower_than_anybody_waits_serves_at_its_rate() -> None:
    """A visitor a second, none of whom would wait 23 s: who comes when a call is there has it."""

    async def scene() -> None:
        store = Store()
        store.away = True
        (replica,) = await opened(store.replica("a"))
        share = SHIPPED.share(UNSEEN_PARTS)
        assert share is not None
        assert share.interval > 2 * SHIPPED.max_wait
        served = 0
        for _ in range(600):
            served += await replica.take_slot(0)
            await asyncio.sleep(1)
        assert served >= int(0.9 * 600 / share.interval)
        assert min(replica.told) >= 1
        assert max(replica.told) > share.interval
        await closed([replica])

    virtual(scene)


def test_N18_who_comes_back_when_told_is_served() -> None:
    """Refused callers are given times a slot of the share apart; each finds a slot then."""

    async def scene() -> None:
        store = Store()
        store.away = True
        (replica,) = await opened(store.replica("a"))
        share = SHIPPED.share(UNSEEN_PARTS)
        assert share is not None
        for _ in range(5):
            assert not await replica.take_slot()
        apart = [after - before for before, after in itertools.pairwise(replica.told)]
        assert min(apart) > share.interval / 2, "the share's interval, less what is drawn"
        began = asyncio.get_running_loop().time()
        for told in list(replica.told):
            await asyncio.sleep(max(began + told - asyncio.get_running_loop().time(), 0))
            assert await replica.take_slot(0)
        await closed([replica])

    virtual(scene)


@pytest.mark.parametrize(("instances", "workers"), [(1, 1), (1, 6), (14, 1), (14, 3)])
def test_N24_instances_that_never_saw_the_store_fit_the_window(
    instances: int, workers: int
) -> None:
    """In full demand for five minutes: together within the budget, and somebody is served."""

    async def scene() -> None:
        store = Store()
        store.away = True
        members = [
            store.replica(f"{instance}-{worker}", is_first=worker == 0)
            for instance in range(instances)
            for worker in range(workers)
        ]
        replicas = await opened(*members)
        crowd = [asyncio.ensure_future(replica.request_for_ever()) for replica in replicas]
        await asyncio.sleep(300)
        calls = [call for replica in replicas for call in replica.calls]
        assert worst(calls) <= SHIPPED.rate + SHIPPED.burst
        assert len(calls) >= 10 * instances
        second = [replica for replica in replicas if not replica.member.fleet.parts]
        assert len(second) == instances * (workers - 1)
        for replica in second:
            assert "set [store] replicas" in replica.slots.shortage
        await closed(replicas, *crowd)

    virtual(scene)


@pytest.mark.parametrize("count", [3, 60, 113])
def test_N24_a_configured_number_fits_the_window_however_large(count: int) -> None:
    """`replicas` of them start without the store; more than the window has calls have no share."""

    async def scene() -> None:
        store = Store()
        store.away = True
        replicas = await opened(*(store.replica(str(n), fixed=count) for n in range(count)))
        crowd = [asyncio.ensure_future(replica.request_for_ever()) for replica in replicas]
        await asyncio.sleep(150)
        calls = [call for replica in replicas for call in replica.calls]
        assert worst(calls) <= SHIPPED.rate + SHIPPED.burst
        assert bool(calls) == (SHIPPED.share(count) is not None and count < 100)
        await closed(replicas, *crowd)

    virtual(scene)


def test_N13_calls_that_are_out_at_the_loss_hold_the_share_back() -> None:
    """The others' share does not count them: none is made alone before they are settled."""

    async def scene() -> None:
        store = Store(2)
        (replica,) = await opened(store.replica("a"))
        assert await replica.take_slot()
        await asyncio.sleep(10)
        stalled = [asyncio.ensure_future(replica.take_slot(100)) for _ in range(3)]
        await asyncio.sleep(3)
        assert len(replica.calls) == 4
        store.away = True
        crowd = asyncio.ensure_future(replica.request_for_ever())
        await asyncio.sleep(90)
        assert len(replica.calls) == 4
        await asyncio.gather(*stalled)
        settled = asyncio.get_running_loop().time()
        await asyncio.sleep(20)
        assert len(replica.calls) > 7
        share = SHIPPED.share(2)
        assert share is not None
        assert replica.calls[4] >= settled + share.interval - 0.01, "no burst of the share first"
        await closed([replica], crowd)

    virtual(scene)


def test_N13_calls_that_are_out_alone_count_when_the_store_is_back() -> None:
    """They are told with the first message, so the others wait for them, too."""

    async def scene() -> None:
        store = Store(2)
        one, other = await opened(store.replica("a"), store.replica("b"))
        assert await other.take_slot()
        one.member.cut_off = True
        await asyncio.sleep(30)
        stalled = [asyncio.ensure_future(one.take_slot(100)) for _ in range(3)]
        await asyncio.sleep(10)
        assert len(one.calls) == 3
        one.member.cut_off = False
        back = asyncio.ensure_future(one.take_slot(0.1))
        await asyncio.sleep(1)
        assert store.twin.calls[b"a"][1] >= 3
        await asyncio.sleep(20)
        hung = [asyncio.ensure_future(other.take_slot(100)) for _ in range(8)]
        await asyncio.sleep(7)
        assert len(other.calls) == 6, "three of eight are out elsewhere"
        for each in [*stalled, *hung, back]:
            each.cancel()
        await closed([one, other])

    virtual(scene)


@pytest.mark.parametrize("stall", [1.0, 5.0, 30.0, 90.0])
def test_N13_a_stalled_vendor_gets_no_more_than_a_window_when_it_lets_go(stall: float) -> None:
    """Three replicas in full demand; what was sent during the stall arrives at its end."""

    async def scene() -> None:
        store = Store(4)
        replicas = await opened(*(store.replica(name) for name in "abc"))
        arrivals: list[float] = []
        loop = asyncio.get_running_loop()
        begins = loop.time() + 90

        async def visitor(replica: Running) -> None:
            while True:
                try:
                    slot = await replica.paced.acquire(Priority.FIRST, "web")
                except BudgetExhausted:
                    await asyncio.sleep(0.5)
                    continue
                sent = loop.time()
                until = begins + stall if begins <= sent < begins + stall else sent
                await asyncio.sleep(until - sent)
                arrivals.append(loop.time())
                await asyncio.sleep(0.3)
                slot.answered()

        crowd = [asyncio.ensure_future(visitor(r)) for r in replicas for _ in range(20)]
        await asyncio.sleep(90)
        before = store.messages
        assert len(arrivals) >= 85 / 60 * SHIPPED.rate, "without a stall nothing is lost"
        assert before <= 3 * len(arrivals) + 100
        await asyncio.sleep(stall + 120)
        assert worst(arrivals) <= SHIPPED.rate + SHIPPED.burst + 1
        assert sum(call > begins + stall + 30 for call in arrivals) >= 80 / 60 * SHIPPED.rate
        await closed(replicas, *crowd)

    virtual(scene)


def _suspend(seconds: float) -> None:
    """Let time pass of which this process sees nothing."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop._skip(seconds)


async def _take(slots: SharedSlots) -> float:
    _ = await slots.take(lambda: 1)
    return asyncio.get_running_loop().time()


def test_G4_a_suspended_process_does_not_make_the_call_that_it_had_reserved() -> None:
    """It wakes later than `LATE`: others were given that time; it reserves anew."""

    async def scene() -> None:
        store = Store(2)
        (replica,) = await opened(store.replica("a"))
        slots = replica.slots
        await asyncio.sleep(10)
        for _ in range(8):
            await _take(slots)
            slots.settle()
        taking = asyncio.ensure_future(_take(slots))
        await asyncio.sleep(SHIPPED.interval / 2)
        messages = store.messages
        _suspend(LATE + SHIPPED.interval)
        await taking
        assert store.messages > messages, "the old one lapses, a new one is reserved"
        assert slots._out == 1
        await closed([replica])

    virtual(scene)


def test_G4_a_process_suspended_alone_calls_no_more_when_the_others_have_its_share() -> None:
    """It waits for a call of its own share, and wakes an hour later."""

    async def scene() -> None:
        store = Store(12)
        (replica,) = await opened(store.replica("a"))
        store.away = True
        await asyncio.sleep(ALONE_AFTER + 2)
        taking = asyncio.ensure_future(_take(replica.slots))
        share = SHIPPED.share(12)
        assert share is not None
        await asyncio.sleep(share.interval - 2)
        _suspend(ALONE_FOR)
        await asyncio.sleep(60)
        assert not taking.done()
        assert replica.slots.predict(0, 0, drained=False) == float("inf")
        taking.cancel()
        await closed([replica])

    virtual(scene)


def test_S5_a_share_grows_again_when_there_are_fewer() -> None:
    """Told six parts, later two: at the next loss it is a half."""

    async def scene() -> None:
        store = Store(6)
        (replica,) = await opened(store.replica("a"))
        intervals = []
        for parts in (6, 2, 6):
            store.parts, store.away = parts, False
            await asyncio.sleep(3)
            store.away = True
            await asyncio.sleep(10)
            intervals.append(replica.slots.interval)
        whole = SHIPPED.interval
        assert intervals == pytest.approx([6 * whole, 2 * whole, 6 * whole])
        await closed([replica])

    virtual(scene)


def test_S3_no_share_is_spent_while_heartbeats_are_answered() -> None:
    """The others give this replica no share then: it waits for the budget, whatever else fails."""

    async def scene() -> None:
        store = Store(2)
        (replica,) = await opened(store.replica("a"))
        replica.slots._failed = True
        await asyncio.sleep(10)
        assert replica.slots._share.slots is None
        store.away = True
        await asyncio.sleep(10)
        assert replica.slots._share.slots is not None
        store.away = False
        await asyncio.sleep(2)
        assert replica.slots._share.slots is None
        assert await replica.take_slot()
        assert store.twin.full_at is not None
        await closed([replica])

    virtual(scene)
