"""N13 for replicas that share a budget, before a vendor that stands still or swallows calls.

In virtual time, on the script's twin; pacer, slots, calls and heartbeats are the ones that ship.
Beside them a process with a budget of its own, which is named "-".
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from budget_twin import Member, Store

from broker.errors import BudgetExhausted
from broker.issuers.vendor.calls import SEEN, Calls
from broker.issuers.vendor.client import Answer, CallFailed
from broker.pacing.pacer import MAX_PROMISE, BudgetPacer, Priority
from broker.pacing.slots import Budget
from broker.rules.outstanding import PROBES
from broker.testing.clock import FakeClock, run_virtual
from broker.valkey.budget_script import SILENT

SHIPPED = Budget(rate=106, per=60, burst=8, max_wait=8)
ALLOWED = 120
"""What the vendor allows a minute."""

TIMEOUT = 10.0
"""Seconds that the caller of a call waits for it."""


def virtual(scene: Callable[[], Awaitable[None]]) -> None:
    """Run a scene in virtual time."""

    async def main(_clock: FakeClock) -> None:
        await scene()

    run_virtual(main)


def now() -> float:
    """Return the loop's time."""
    return asyncio.get_running_loop().time()


class Vendor:
    """Reads what has been sent to it at once, or when it goes on; `arrivals` are the moments.

    With an `edge` all but mints is answered whatever the vendor does.  `swallows` calls are read
    and never answered; then it is `sated`.
    """

    def __init__(self, *, edge: bool = False, swallows: int = 0) -> None:
        self.arrivals: list[float] = []
        self.unread = 0
        self.edge = edge
        self.swallows = swallows
        self.sated = asyncio.Event()
        self.questions: list[float] = []
        self._reads = asyncio.Event()
        self._reads.set()

    async def call(self, arrived: Callable[[], None]) -> Answer:
        """Send a call.  What was sent is read, whatever becomes of its caller."""
        if not self._reads.is_set():
            self.unread += 1
            await self._reads.wait()
        else:
            self.arrivals.append(now())
            if self.swallows:
                self.swallows -= 1
                if not self.swallows:
                    self.sated.set()
                await asyncio.Event().wait()
        await asyncio.sleep(0.05)
        arrived()
        return Answer(200, {}, b"")

    async def reads(self) -> bool:
        """Answer a question that is no mint."""
        self.questions.append(now())
        if self.edge or self._reads.is_set():
            await asyncio.sleep(0.05)
            return True
        await asyncio.sleep(TIMEOUT)
        return False

    def stand_still(self) -> None:
        self._reads.clear()

    def go_on(self) -> None:
        self.arrivals += [now()] * self.unread
        self.unread = 0
        self._reads.set()

    def worst(self) -> int:
        """Count the calls in the fullest minute."""
        times = sorted(self.arrivals)
        return max(sum(start <= at < start + 60 for at in times) for start in times)

    def first_after(self, moment: float) -> float:
        """Return after how many seconds something new arrived."""
        return min(at for at in self.arrivals if at > moment) - moment


async def _heed(_answer: Answer) -> None:
    """Nobody waits for it."""


class Process:
    """One replica with its crowd of visitors, as `App` opens and closes it."""

    def __init__(self, store: Store, name: str, vendor: Vendor, visitors: int = 12) -> None:
        self.member: Member = store.replica(name)
        self._vendor = vendor
        self.slots = self.member.slots(SHIPPED)
        self.paced = BudgetPacer(
            SHIPPED, lambda _seconds: None, None if name == "-" else self.slots
        )
        self.calls = Calls(TIMEOUT, _heed, vendor.reads)
        self._visitors = visitors

    async def open(self) -> "Process":
        """Begin; returns itself."""
        await self.member.fleet.beat()
        self._beating = asyncio.ensure_future(self.member.fleet.run())
        await self.paced.start()
        self._crowd = [asyncio.ensure_future(self._visit()) for _ in range(self._visitors)]
        return self

    async def _visit(self) -> None:
        while True:
            try:
                slot = await self.paced.acquire(Priority.FIRST, "web")
                await self.calls.make(self._vendor.call, slot)
            except (BudgetExhausted, CallFailed):
                await asyncio.sleep(1.0)  # a dozen of them want six times the budget even so

    async def stop(self) -> None:
        """End as at SIGTERM: the visitors, the calls that are out, the budget."""
        for visitor in self._crowd:
            visitor.cancel()
        await asyncio.wait(self._crowd) if self._crowd else None
        await self.calls.close()
        await self.paced.close()
        self._beating.cancel()

    async def kill(self) -> None:
        """End as at SIGKILL: nobody is told anything."""
        self.member.cut_off = True
        await self.stop()


async def opened(store: Store, vendor: Vendor, names: Sequence[str]) -> list[Process]:
    """Open replicas."""
    return [await Process(store, name, vendor).open() for name in names]


async def stopped(processes: Sequence[Process]) -> None:
    """End them."""
    for process in processes:
        await process.stop()


STALLS = [(length, False) for length in (1, 5, 30, 90, 320, 930)]
STALLS += [(length, True) for length in (90, 930)]


@pytest.mark.parametrize("names", ["-", "a", "abc"])
@pytest.mark.parametrize(("stall", "edge"), STALLS)
def test_N13_a_stall_of_any_length_fits_the_vendors_minute(
    stall: int, names: str, *, edge: bool
) -> None:
    """In full demand.  What is given up after five minutes is owed: two calls more, no burst.

    So before an edge that goes on answering all but mints, where calls are given up sooner: until
    two bursts are owed.
    """

    async def scene() -> None:
        store, vendor = Store(parts=len(names) + 1), Vendor(edge=edge)
        processes = await opened(store, vendor, names)
        await asyncio.sleep(120)
        before = len(vendor.arrivals)
        vendor.stand_still()
        await asyncio.sleep(stall)
        released = vendor.unread
        vendor.go_on()
        went_on = now()
        await asyncio.sleep(120)
        worst = vendor.worst()
        print(f"stall of {stall} s: {released} calls released, worst minute {worst}")
        sooner = min(stall // SEEN * PROBES, SHIPPED.burst + PROBES) if edge else 0
        assert released <= SHIPPED.burst + sooner + PROBES * (stall // MAX_PROMISE)
        assert len(vendor.questions) <= len(names) * (stall // SEEN)
        assert worst <= SHIPPED.rate + SHIPPED.burst
        assert before >= 118 / 60 * SHIPPED.rate
        assert sum(at > went_on + 30 for at in vendor.arrivals) >= 88 / 60 * SHIPPED.rate
        await stopped(processes)

    virtual(scene)


@pytest.mark.parametrize("names", ["-", "a", "abc"])
@pytest.mark.parametrize(("after", "swallows"), [(0, 2), (0, 5), (60, 8), (60, 11)])
def test_N13_calls_that_are_swallowed_stop_the_others_for_half_a_minute(
    after: int, swallows: int, names: str
) -> None:
    """Read and never answered: right after a start, or later as many as may be out, or more.

    Then a question that is no mint shows that the vendor reads, and two at once may try.
    """

    async def scene() -> None:
        store, vendor = Store(parts=len(names) + 1), Vendor()
        vendor.swallows = 0 if after else swallows
        processes = await opened(store, vendor, names)
        await asyncio.sleep(after)
        vendor.swallows, began = swallows, now()
        vendor.sated.clear()
        await vendor.sated.wait()
        last, asked = max(vendor.arrivals), len(vendor.questions)
        before = SHIPPED.burst if after else PROBES
        rounds = -(-max(swallows - before, 0) // PROBES)
        print(f"{swallows} swallowed in {last - began:.0f} s, {asked} questions")
        assert last - began <= rounds * (SEEN + 5) + 10
        assert asked <= rounds * len(names)
        await asyncio.sleep(SEEN + 30)
        first = vendor.first_after(last)
        print(f"the next after {first:.1f} s, worst minute {vendor.worst()}")
        assert first <= SEEN + 10
        assert sum(at > last + SEEN + 10 for at in vendor.arrivals) >= 0.9 * SHIPPED.rate / 3
        assert vendor.worst() <= SHIPPED.rate + SHIPPED.burst
        await stopped(processes)

    virtual(scene)


@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.parametrize(("stall", "every"), [(85, 15), (30, 5), (50, 8)])
@pytest.mark.parametrize("names", ["a", "abc"])
def test_N13_restarts_within_a_stall_fit_the_vendors_minute(
    how: str, stall: int, every: int, names: str
) -> None:
    """Five or more in a row: what each left unread arrives together with what came after it."""

    async def scene() -> None:
        store, vendor = Store(parts=len(names) + 1), Vendor()
        processes = await opened(store, vendor, names)
        await asyncio.sleep(120)
        vendor.stand_still()
        began, turn = now(), 0
        while now() + every < began + stall:
            await asyncio.sleep(every)
            old = processes.pop(0)
            await (old.stop() if how == "stop" else old.kill())
            processes.append(await Process(store, f"next {turn}", vendor).open())
            turn += 1
        await asyncio.sleep(began + stall - now())
        released = vendor.unread
        vendor.go_on()
        went_on = now()
        await asyncio.sleep(120)
        worst, first = vendor.worst(), vendor.first_after(went_on)
        print(f"{turn} x {how}: {released} released, worst {worst}, next after {first:.1f} s")
        assert worst <= ALLOWED
        assert first <= 2 * SILENT + 8 * SHIPPED.interval
        await stopped(processes)

    virtual(scene)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_N13_the_end_of_a_process_in_a_short_stall_delays_the_others_by_seconds(how: str) -> None:
    """Eight are out, then one process ends: the first new call goes when its silence is noticed."""

    async def scene() -> None:
        store, vendor = Store(parts=2), Vendor()
        (old,) = await opened(store, vendor, "a")
        await asyncio.sleep(60)
        vendor.stand_still()
        await asyncio.sleep(10)
        assert vendor.unread == SHIPPED.burst
        await (old.stop() if how == "stop" else old.kill())
        (new,) = await opened(store, vendor, "b")
        vendor.go_on()
        went_on = now()
        await asyncio.sleep(60)
        first = vendor.first_after(went_on)
        print(f"{how}: the first call after {first:.1f} s")
        assert first <= (SILENT if how == "kill" else 0) + 2 + 2 * SHIPPED.interval
        assert sum(went_on < at for at in vendor.arrivals) >= 0.7 * SHIPPED.rate
        assert vendor.worst() <= SHIPPED.rate + SHIPPED.burst
        await stopped([new])

    virtual(scene)


def test_N13_what_a_quiet_fleet_left_unread_counts_when_demand_comes() -> None:
    """It is read while nobody asks: the first answer takes back what has refilled meanwhile."""

    async def scene() -> None:
        store, vendor = Store(parts=2), Vendor()
        (old,) = await opened(store, vendor, "a")
        await asyncio.sleep(60)
        vendor.stand_still()
        await asyncio.sleep(20)
        await old.kill()
        quiet = await Process(store, "b", vendor, visitors=0).open()
        await quiet.slots._tell()
        await asyncio.sleep(SILENT + 1)
        await quiet.slots._tell()
        await asyncio.sleep(20)
        vendor.go_on()
        await asyncio.sleep(1)
        (new,) = await opened(store, vendor, "c")
        await asyncio.sleep(70)
        assert vendor.worst() <= SHIPPED.rate + SHIPPED.burst + PROBES
        await stopped([quiet, new])

    virtual(scene)


def test_N13_an_answer_from_before_a_process_died_says_nothing_of_its_calls() -> None:
    """It is told late, because the store was away: until there is another, two go at once."""

    async def scene() -> None:
        store, vendor = Store(parts=3), Vendor()
        one, other = await opened(store, vendor, "ab")
        await asyncio.sleep(60)
        for visitor in other._crowd:
            visitor.cancel()
        await asyncio.sleep(1)
        other.member.cut_off = True
        other.slots._untold += 1  # an answer that could not be told yet
        vendor.stand_still()
        await asyncio.sleep(10)
        await one.kill()
        (third,) = await opened(store, vendor, "c")
        await asyncio.sleep(SILENT + 4)
        assert vendor.unread == SHIPPED.burst + PROBES
        other.member.cut_off = False
        await asyncio.sleep(10)
        assert vendor.unread == SHIPPED.burst + PROBES
        vendor.go_on()
        await asyncio.sleep(70)
        assert vendor.worst() <= SHIPPED.rate + SHIPPED.burst + PROBES
        await stopped([other, third])

    virtual(scene)


def test_G4_a_cancelled_wait_gives_its_reservation_back() -> None:
    """The pacer's task is restarted while it waits for its moment: nothing stays out."""

    async def scene() -> None:
        store = Store(parts=2)
        process = await Process(store, "a", Vendor(), visitors=0).open()
        for _ in range(3):
            taking = asyncio.ensure_future(process.slots.take(lambda: 1))
            await asyncio.sleep(0.01)
            assert process.slots.outstanding == 1
            taking.cancel()
            await asyncio.sleep(0.01)
            assert process.slots.outstanding == 0
        await process.stop()
        assert store.twin.calls[b"a"][1] == 0

    virtual(scene)


def test_N13_in_a_stall_a_newcomer_is_refused_at_once_and_told_a_true_time() -> None:
    """Here and on the replica next to it: the silence so far is what may come again."""

    async def scene() -> None:
        store, vendor = Store(parts=3), Vendor()
        one, other = await opened(store, vendor, "ab")
        await asyncio.sleep(60)
        vendor.stand_still()
        await asyncio.sleep(40)
        for process in (one, other):
            began = now()
            with pytest.raises(BudgetExhausted) as refused:
                await process.paced.acquire(Priority.FIRST, "newcomer")
            assert now() - began < 0.01
            assert 30 <= refused.value.retry_after / 1_000_000 <= 60
            assert str(refused.value).startswith("the vendor does not answer: ")
        vendor.go_on()
        await asyncio.sleep(8)
        assert one.slots.predict(0, now(), drained=False) - now() < 8
        await stopped([one, other])

    virtual(scene)


def test_N13_a_replica_without_calls_of_its_own_learns_when_a_stall_is_over() -> None:
    """Nobody asks it any more; who comes after the stall is let in."""

    async def scene() -> None:
        store, vendor = Store(parts=3), Vendor()
        one = (await opened(store, vendor, "a"))[0]
        quiet = await Process(store, "b", vendor, visitors=0).open()
        await asyncio.sleep(60)
        vendor.stand_still()
        await asyncio.sleep(30)
        with pytest.raises(BudgetExhausted):
            await quiet.paced.acquire(Priority.FIRST, "newcomer")
        assert quiet.slots._stuck_since is not None
        vendor.go_on()
        await asyncio.sleep(5)
        assert quiet.slots._stuck_since is None
        slot = await quiet.paced.acquire(Priority.FIRST, "newcomer")
        slot.settle()
        await stopped([one, quiet])

    virtual(scene)


@pytest.mark.parametrize("swallows", [1, 8])
def test_N13_alone_too_calls_that_are_swallowed_are_given_up(swallows: int) -> None:
    """The store is lost while they are out: the share does not wait for them for five minutes."""

    async def scene() -> None:
        store, vendor = Store(parts=2), Vendor()
        (process,) = await opened(store, vendor, "a")
        await asyncio.sleep(60)
        vendor.swallows = swallows
        await vendor.sated.wait()
        store.away, last = True, now()
        await asyncio.sleep(SEEN + 30)
        assert process.slots.shortage.startswith("the shared store is away")
        assert sum(at > last + SEEN + 10 for at in vendor.arrivals) >= 0.4 * SHIPPED.rate / 3
        assert len(vendor.questions) == 1
        assert vendor.worst() <= SHIPPED.rate + SHIPPED.burst
        await process.stop()

    virtual(scene)


def test_N13_alone_too_what_was_given_up_is_owed() -> None:
    """The store is away for all of a long stall: the share makes no burst after five minutes."""

    async def scene() -> None:
        store, vendor = Store(parts=2), Vendor()
        (process,) = await opened(store, vendor, "a")
        await asyncio.sleep(60)
        vendor.stand_still()
        await asyncio.sleep(10)
        store.away = True
        await asyncio.sleep(310)
        assert vendor.unread == SHIPPED.burst + PROBES
        store.away = False
        await asyncio.sleep(10)
        assert vendor.unread == SHIPPED.burst + PROBES
        vendor.go_on()
        await asyncio.sleep(70)
        assert vendor.worst() <= SHIPPED.rate + SHIPPED.burst
        await process.stop()

    virtual(scene)
