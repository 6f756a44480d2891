"""The budget in virtual time: rows V10 and V11, and the promises made in Retry-After."""

import asyncio
import contextlib
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import BudgetExhausted, ServiceUnavailable
from broker.pacing.pacer import JITTER, LATENESS, MAX_PROMISE, BudgetPacer, Priority
from broker.pacing.slots import UNCOUNTED, Budget, LocalSlots, Slot
from broker.testing import FakeClock, run_virtual

SHIPPED = Budget(rate=106, per=60, burst=8, max_wait=8)
"""The defaults for the vendor's 120 a minute."""

VENDOR_ALLOWS = 120
WINDOW = 60.0

SLOW = Budget(rate=60, per=60, burst=4, max_wait=10.5)
"""A slot a second, so ten may wait: easy to reckon with."""

A_BIT = 0.01
"""Seconds: more than the ticks of a virtual loop add up to, less than any slot."""


def now() -> float:
    """Return the loop's time in seconds."""
    return asyncio.get_running_loop().time()


def worst_window(calls: Sequence[float], width: float = WINDOW) -> int:
    """Count the calls in the fullest window of this width, both ends included."""
    calls = sorted(calls)
    worst, first = 0, 0
    for last, call in enumerate(calls):
        while call - calls[first] > width:
            first += 1
        worst = max(worst, last - first + 1)
    return worst


async def started(budget: Budget = SLOW) -> BudgetPacer:
    """Return a pacer that has just begun to serve."""
    pacer = BudgetPacer(budget, lambda _seconds: None)
    await pacer.start()
    return pacer


async def filled(budget: Budget = SLOW) -> BudgetPacer:
    """A pacer whose burst is there to be taken."""
    pacer = await started(budget)
    await asyncio.sleep(budget.burst * budget.interval + 1)
    return pacer


async def until_granted(pacer: BudgetPacer) -> None:
    """Wait for the tick in which the first who waits has been given the slot, unknown to them."""
    await asyncio.sleep(SLOW.interval - A_BIT)
    place = pacer._line.places()[0]
    while not place.granted.done():  # noqa: ASYNC110 - turn by turn is the point
        await asyncio.sleep(0)


class Crowd:
    """Callers of a pacer; `served` and `refused` say who, when, and after what promise."""

    def __init__(self, pacer: BudgetPacer) -> None:
        self.pacer = pacer
        self.served: list[tuple[str, float]] = []
        self.refused: dict[str, tuple[float, float]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def comes(self, name: str, urgency: Priority = Priority.FIRST, client: str = "web") -> None:
        """Let somebody ask for a slot, and go on."""
        task = asyncio.get_running_loop().create_task(self._request_token(name, urgency, client))
        self._tasks[name] = task

    def leaves(self, name: str) -> None:
        self._tasks[name].cancel()

    async def _request_token(self, name: str, urgency: Priority, client: str) -> None:
        try:
            slot = await self.pacer.acquire(urgency, client)
        except BudgetExhausted as error:
            self.refused[name] = (now(), error.retry_after / 1_000_000)
        else:
            self.served.append((name, now()))
            slot.settle()

    async def done(self) -> None:
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    @property
    def order(self) -> list[str]:
        return [name for name, _ in self.served]

    @property
    def times(self) -> list[float]:
        return [at for _, at in self.served]


async def greedy(pacer: BudgetPacer, calls: list[float], client: str) -> None:
    """Call again and again, as early as one is let."""
    while True:
        try:
            slot = await pacer.acquire(Priority.FIRST, client)
        except BudgetExhausted as error:
            await asyncio.sleep(min(error.retry_after / 1_000_000, 2.0))
        else:
            calls.append(now())
            slot.settle()


async def besiege(
    pacer: BudgetPacer, calls: list[float], seconds: float, callers: int = 30
) -> None:
    """Want as many slots as there are, for this long."""
    try:
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for number in range(callers):
                group.create_task(greedy(pacer, calls, f"client {number % 3}"))
    except TimeoutError:
        return


def test_V10_at_most_120_in_every_minute_from_a_cold_start() -> None:
    """The first minute is no exception: the burst is not there before it has been earned."""

    async def main(_clock: FakeClock) -> list[float]:
        began = now()
        pacer = await started(SHIPPED)
        calls: list[float] = []
        await besiege(pacer, calls, 300)
        await pacer.close()
        assert calls[0] - began == pytest.approx(SHIPPED.interval, abs=A_BIT)
        return calls

    calls = run_virtual(main)
    assert 525 <= len(calls) <= 531  # 106 a minute, for five minutes: nothing is wasted either
    assert worst_window(calls) <= 108


def test_V10_at_most_120_in_every_minute_after_idling() -> None:
    """An hour without a call saves up one burst, and a slot that found nobody saves nothing."""

    async def main(_clock: FakeClock) -> list[float]:
        pacer = await started(SHIPPED)
        calls: list[float] = []
        for _ in range(3):
            crowd = Crowd(pacer)
            crowd.comes("waits")
            await asyncio.sleep(A_BIT)
            crowd.leaves("waits")  # its slot comes, finds nobody, and lapses
            await asyncio.sleep(3600)
            await besiege(pacer, calls, 150)
        await pacer.close()
        return calls

    calls = run_virtual(main)
    assert len(calls) >= 3 * (8 + 264)
    assert worst_window(calls) <= VENDOR_ALLOWS - 5  # room for what a hanging connection bunches
    assert worst_window(calls, 0.1) <= 8


def test_V10_at_most_120_in_every_minute_over_restarts() -> None:
    """Three restarts within a minute, after an idle hour, under siege: no restart adds a burst."""

    async def main(_clock: FakeClock) -> list[float]:
        calls: list[float] = []
        for lifetime in (30, 5, 15, 10, 0.1, 20, 70):
            pacer = await started(SHIPPED)
            if not calls:
                await asyncio.sleep(3600)
            await besiege(pacer, calls, lifetime)
            await pacer.close()
        return calls

    calls = run_virtual(main)
    assert len(calls) > 240
    assert worst_window(calls) <= VENDOR_ALLOWS - 5


def test_V10_at_most_120_in_every_minute_around_a_pause() -> None:
    """Nothing goes out while the vendor wants peace, and no burst when the pause is over."""

    async def main(_clock: FakeClock) -> None:
        pacer = await filled(SHIPPED)
        calls: list[float] = []
        loop = asyncio.get_running_loop()
        siege = loop.create_task(besiege(pacer, calls, 200))
        await asyncio.sleep(20.123)
        paused = now()
        pacer.pause(40)
        pacer.pause(15)  # a shorter one does not end a longer one
        await siege
        await pacer.close()
        assert [call for call in calls if paused < call < paused + 40 - A_BIT] == []
        after = [call for call in calls if paused < call < paused + 42]
        assert 1 <= len(after) <= 4  # the slot that was due, and one each 0.57 s
        assert worst_window(calls) <= VENDOR_ALLOWS

    run_virtual(main)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    rate=st.floats(3, 600),
    burst=st.integers(1, 20),
    max_wait=st.floats(0.5, 20),
)
def test_V10_every_window_holds_the_rate_and_one_burst(
    seed: int, rate: float, burst: int, max_wait: float
) -> None:
    """Whatever callers do (come, leave, idle), any window W sees at most rate x W + burst + 1."""
    budget = Budget(rate=rate, per=60, burst=burst, max_wait=max_wait)
    chance = random.Random(seed)

    async def main(_clock: FakeClock) -> Crowd:
        pacer = await started(budget)
        crowd = Crowd(pacer)
        for number in range(150):
            urgency = chance.choice([*Priority, Priority.FIRST])
            crowd.comes(f"{number}", urgency, chance.choice("abc"))
            if chance.random() < 0.3:
                crowd.leaves(f"{chance.randrange(number + 1)}")
            if chance.random() < 0.5:
                await asyncio.sleep(chance.expovariate(1 / budget.interval))
            if chance.random() < 0.02:
                await asyncio.sleep(burst * budget.interval)
        await crowd.done()
        await pacer.close()
        assert pacer.depth == 0
        return crowd

    crowd = run_virtual(main)
    assert crowd.served
    for width in (0.0, budget.interval, 3 * budget.interval, burst * budget.interval, WINDOW):
        assert worst_window(crowd.times, width) <= burst + width / budget.interval + A_BIT


def test_V11_first_come_first_served() -> None:
    """Slots go to those of one client in the order in which they came."""

    async def main(_clock: FakeClock) -> Crowd:
        crowd = Crowd(await started())
        for number in range(8):
            crowd.comes(f"{number}")
        await crowd.done()
        return crowd

    crowd = run_virtual(main)
    assert crowd.order == [f"{number}" for number in range(8)]
    assert [later - sooner for sooner, later in pairwise(crowd.times)] == pytest.approx(
        [1.0] * 7, abs=A_BIT
    )


def test_V11_a_newcomer_does_not_overtake_at_the_moment_a_slot_comes_free() -> None:
    """Whichever turn of the loop they come in, they go behind those who waited for the slot."""

    async def main(_clock: FakeClock) -> list[str]:
        crowd = Crowd(await started())
        for number in range(3):
            crowd.comes(f"old {number}")
        for second in range(3):
            await asyncio.sleep(1 - 100e-6)
            for number in range(200):
                crowd.comes(f"new {second} {number}")
                await asyncio.sleep(0)
        await crowd.done()
        return crowd.order

    order = run_virtual(main)
    assert order[:3] == [f"old {number}" for number in range(3)]
    assert len(order) > 5


def test_V11_the_queue_is_bounded_and_decides_at_arrival() -> None:
    """Of 10,000 at once, those who fit into `max_wait` wait; the others know at once."""

    async def main(_clock: FakeClock) -> Crowd:
        crowd = Crowd(await started())
        began = now()
        for number in range(10_000):
            crowd.comes(f"{number}")
        await asyncio.sleep(A_BIT)
        assert crowd.pacer.depth == 10
        assert len(crowd.refused) == 9_990
        assert all(at - began < A_BIT for at, _ in crowd.refused.values())
        await crowd.done()
        return crowd

    crowd = run_virtual(main)
    assert crowd.order == [f"{number}" for number in range(10)]
    assert len(crowd.refused) == 9_990


def test_V11_who_is_let_in_for_just_max_wait_is_served() -> None:
    """A slot that is due at the very end of the wait may come a tick late: it is waited for."""

    async def main(_clock: FakeClock) -> Crowd:
        crowd = Crowd(await started(Budget(rate=60, per=60, burst=4, max_wait=10)))
        for number in range(12):
            crowd.comes(f"{number}")
        await asyncio.sleep(A_BIT)
        let_in = 12 - len(crowd.refused)
        await crowd.done()
        assert len(crowd.served) == let_in
        return crowd

    assert len(run_virtual(main).served) in {9, 10}


def test_V11_the_time_told_is_true_and_bounded() -> None:
    """Retry-After is the moment at which a slot comes, one slot later for each who is told."""

    async def main(_clock: FakeClock) -> list[float]:
        crowd = Crowd(await started())
        for number in range(1_000):
            crowd.comes(f"{number}")
        await asyncio.sleep(A_BIT)
        return [wait for _, wait in crowd.refused.values()]

    waits = run_virtual(main)
    assert len(waits) == 990
    for place, wait in enumerate(waits, start=11):
        due = min(place, MAX_PROMISE / (1 + JITTER))
        assert due - A_BIT <= wait <= min(due * (1 + JITTER) + A_BIT, MAX_PROMISE)


def test_N13_who_waits_for_the_end_of_a_call_is_woken_when_calls_are_abandoned() -> None:
    """Nothing else may come: the calls that made no room are owed from then on."""

    async def main(_clock: FakeClock) -> None:
        slots = LocalSlots(SLOW)
        await slots.start()
        await asyncio.sleep(SLOW.depth + 1)
        for _ in range(SLOW.burst):
            assert await slots.take(lambda: 1)
        waiting = asyncio.create_task(slots.take(lambda: 1))
        await asyncio.sleep(SLOW.depth)
        assert not waiting.done()
        for _ in range(SLOW.burst):
            slots.abandon()
        async with asyncio.timeout(10 * SLOW.depth):
            assert await waiting

    run_virtual(main)


def test_V11_an_abandoned_place_is_not_wasted() -> None:
    """Those behind move up, and the pace stays what it was."""

    async def main(_clock: FakeClock) -> Crowd:
        crowd = Crowd(await started())
        for number in range(8):
            crowd.comes(f"{number}")
        await asyncio.sleep(0.5)
        for number in range(0, 8, 2):
            crowd.leaves(f"{number}")
        began = now()
        await crowd.done()
        assert [at - began for at in crowd.times] == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=A_BIT)
        return crowd

    crowd = run_virtual(main)
    assert crowd.order == ["1", "3", "5", "7"]


def test_V11_a_slot_granted_in_the_tick_of_its_taker_s_leaving_goes_to_the_next() -> None:
    """Between grant and wake-up the taker may go: the slot is passed on at once, not lost."""

    async def main(_clock: FakeClock) -> None:
        crowd = Crowd(await started())
        for name in ("leaver", "next", "last"):
            crowd.comes(name)
        began = now()
        await until_granted(crowd.pacer)
        crowd.leaves("leaver")
        await crowd.done()
        assert crowd.order == ["next", "last"]
        assert [at - began for at in crowd.times] == pytest.approx([1.0, 2.0], abs=A_BIT)

    run_virtual(main)


def test_V11_a_slot_that_found_nobody_lapses() -> None:
    """It is worth nothing then, and to keep it would put one more call into the worst window."""

    async def main(_clock: FakeClock) -> None:
        crowd = Crowd(await started())
        crowd.comes("leaver")
        await until_granted(crowd.pacer)
        granted = now()
        crowd.leaves("leaver")
        await asyncio.sleep(A_BIT)
        crowd.comes("late")
        await crowd.done()
        assert [(name, at - granted) for name, at in crowd.served] == [
            ("late", pytest.approx(1, abs=2 * A_BIT))
        ]

    run_virtual(main)


def test_V11_places_that_were_given_up_cost_nobody_anything() -> None:
    """A client with impatient visitors is served as predicted, not behind its own departed."""

    async def main(_clock: FakeClock) -> Crowd:
        crowd = Crowd(await started())
        for number in range(4):
            crowd.comes(f"other {number}", client="other")
        for number in range(100):
            crowd.comes(f"impatient {number}", client="impatient")
            crowd.leaves(f"impatient {number}")
            await asyncio.sleep(0)
        crowd.comes("stays", client="impatient")
        await crowd.done()
        return crowd

    assert run_virtual(main).order.index("stays") <= 1


def test_V11_a_flood_of_first_visitors_does_not_starve_another_client_s_renewals() -> None:
    """Urgency counts within a client only."""

    async def main(_clock: FakeClock) -> Crowd:
        crowd = Crowd(await started())
        for number in range(100):
            crowd.comes(f"flood {number}", client="noisy")
        for number in range(3):
            crowd.comes(f"renewal {number}", Priority.MANDATORY, client="quiet")
        await crowd.done()
        return crowd

    crowd = run_virtual(main)
    assert [name for name in crowd.order if name.startswith("renewal")] == [
        f"renewal {number}" for number in range(3)
    ]


def test_V11_one_client_s_refusals_do_not_put_off_another_s() -> None:
    """The times that a noisy client was told are its own."""

    async def main(_clock: FakeClock) -> Crowd:
        crowd = Crowd(await started())
        for number in range(500):
            crowd.comes(f"noisy {number}", client="noisy")
        for number in range(30):
            crowd.comes(f"quiet {number}", client="quiet")
        await crowd.done()
        return crowd

    told = [after for name, (_, after) in run_virtual(main).refused.items() if "quiet" in name]
    assert told
    assert max(told) < 60


def test_V1_those_who_wait_are_told_at_once_when_a_pause_outlasts_them() -> None:
    """Not at the end of their patience; those whom the pause leaves time are served after it."""

    async def main(_clock: FakeClock) -> None:
        crowd = Crowd(await started())
        for number in range(5):
            crowd.comes(f"{number}")
        await asyncio.sleep(A_BIT)
        began = now()
        crowd.pacer.pause(60)
        await crowd.done()
        assert len(crowd.refused) == 5
        assert all(at - began < A_BIT for at, _ in crowd.refused.values())
        assert all(after >= 60 for _, after in crowd.refused.values())

    run_virtual(main)


def test_V1_those_who_can_wait_out_a_short_pause_stay_in_line() -> None:
    """None is refused; the slot that was due comes at its end, then one by one, in their order."""

    async def main(_clock: FakeClock) -> None:
        crowd = Crowd(await started())
        began = now()
        for number in range(5):
            crowd.comes(f"{number}")
        await asyncio.sleep(1.5)
        crowd.pacer.pause(2)
        await crowd.done()
        assert crowd.refused == {}
        assert crowd.order == [f"{number}" for number in range(5)]
        times = [at - began for at in crowd.times]
        assert times == pytest.approx([1, 3.5, 4.5, 5.5, 6.5], abs=2 * A_BIT)

    run_virtual(main)


@pytest.mark.parametrize("leaver_leaves", [True, False])
def test_V1_no_slot_is_handed_out_inside_a_pause(*, leaver_leaves: bool) -> None:
    """Not the one that was due, nor one whose taker went away as the pause began."""

    async def main(_clock: FakeClock) -> None:
        crowd = Crowd(await started())
        began = now()
        for name in ("first", "next"):
            crowd.comes(name)
        if leaver_leaves:
            await until_granted(crowd.pacer)
        else:
            await asyncio.sleep(SLOW.interval - A_BIT)
        crowd.pacer.pause(3)
        if leaver_leaves:
            crowd.leaves("first")
        crowd.comes("newcomer")
        crowd.comes("ahead", Priority.AHEAD)
        await crowd.done()
        assert all(at - began > 4 - 2 * A_BIT for at in crowd.times), crowd.served
        assert crowd.order == (["next", "newcomer"] if leaver_leaves else crowd.order)
        assert set(crowd.refused) == {"ahead"}
        assert crowd.pacer.outstanding == 0

    run_virtual(main)


def test_V1_a_slot_that_comes_due_in_a_pause_is_given_after_it() -> None:
    """The pacer was waiting for it when the pause began, with a line of two."""

    async def main(_clock: FakeClock) -> None:
        crowd = Crowd(await started())
        for name in ("first", "second"):
            crowd.comes(name)
        await asyncio.sleep(0.5)
        paused = now()
        crowd.pacer.pause(5)
        await crowd.done()
        assert [at - paused for at in crowd.times] == pytest.approx([5, 6], abs=2 * A_BIT)

    run_virtual(main)


def test_V1_a_slot_that_is_held_back_by_a_pause_is_not_lost_with_its_task() -> None:
    """The pacer ends while a slot that came due waits for the end of the pause."""

    async def main(_clock: FakeClock) -> None:
        pacer = await started()
        crowd = Crowd(pacer)
        crowd.comes("first")
        await asyncio.sleep(0.5)
        pacer.pause(3)
        await asyncio.sleep(1)
        assert pacer.outstanding == 1
        await pacer.close()
        assert pacer.outstanding == 0
        await crowd.done()

    run_virtual(main)


def test_the_slot_without_a_budget_is_everybodys() -> None:
    """Whoever keeps it changes nothing for the others."""
    UNCOUNTED.keep()
    assert not UNCOUNTED.kept


class Held(Crowd):
    """Callers whose calls stay out, each until it is said that it is over."""

    def __init__(self, pacer: BudgetPacer) -> None:
        super().__init__(pacer)
        self.slots: list[Slot] = []

    async def calls(self, count: int) -> None:
        for _ in range(count):
            self.slots.append(await self.pacer.acquire(Priority.FIRST, "web"))


def test_N13_calls_that_are_out_count_in_everything_that_is_told() -> None:
    """What is left, whether there is plenty, who may come, and after what time."""

    async def main(_clock: FakeClock) -> None:
        pacer = await filled()
        pacer._slots.answered()
        await asyncio.sleep(SLOW.depth)  # what was owed has refilled
        held = Held(pacer)
        await held.calls(2)
        assert (pacer.remaining, pacer.outstanding, pacer.has_headroom) == (2, 2, True)
        await held.calls(1)
        assert (pacer.remaining, pacer.outstanding, pacer.has_headroom) == (1, 3, False)
        await held.calls(1)
        assert (pacer.remaining, pacer.outstanding) == (0, 4)
        await asyncio.sleep(60)
        assert pacer.remaining == 0  # however much time passes
        crowd = Crowd(pacer)
        crowd.comes("too late")
        await crowd.done()
        _, after = crowd.refused["too late"]
        assert after >= 60  # as long again as the silence lasts
        held.slots[0].settle()
        held.slots[0].settle()  # once is enough
        assert (pacer.remaining, pacer.outstanding) == (0, 3)
        await asyncio.sleep(1)
        assert pacer.remaining == 1

    run_virtual(main)


def test_N13_whoever_waits_for_an_answer_is_served_as_it_comes() -> None:
    """Nothing but the end of a call makes room: then it goes to the first in line, in its pace."""

    async def main(_clock: FakeClock) -> None:
        pacer = await filled()
        pacer._slots.answered()
        await asyncio.sleep(SLOW.depth)  # what was owed has refilled
        held = Held(pacer)
        await held.calls(4)
        crowd = Crowd(pacer)
        began = now()
        crowd.comes("first")
        crowd.comes("second")
        await asyncio.sleep(3)
        assert crowd.served == []
        for slot in held.slots:
            slot.settle()
        await crowd.done()
        assert crowd.order == ["first", "second"]
        assert [at - began for at in crowd.times] == pytest.approx([4, 5], abs=2 * A_BIT)
        await pacer.close()

    run_virtual(main)


@pytest.mark.parametrize("latency", [0.0, 0.1, 1.0, 3.0])
def test_N13_without_a_stall_the_budget_is_used_up_as_before(latency: float) -> None:
    """106 a minute for as long as there are askers, whatever answers take below the burst.

    The shipped budget, from a cold start, with answers that take up to twice `latency`.
    """
    chance = random.Random(13)

    async def main(_clock: FakeClock) -> list[float]:
        pacer = await started(SHIPPED)
        calls: list[float] = []

        async def caller(client: str) -> None:
            while True:
                try:
                    slot = await pacer.acquire(Priority.FIRST, client)
                except BudgetExhausted as error:
                    await asyncio.sleep(min(error.retry_after / 1_000_000, 2.0))
                    continue
                calls.append(now())
                took = min(latency * 2 * chance.random(), 3.9)
                await asyncio.sleep(took)
                slot.answered()

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(600), asyncio.TaskGroup() as group:
                for number in range(30):
                    group.create_task(caller(f"client {number % 3}"))
        await pacer.close()
        return calls

    calls = run_virtual(main)
    print(f"answers after {latency} s: {len(calls) / 10:.1f} calls a minute")
    taken_back = min(1 + 2 * latency / SHIPPED.interval, SHIPPED.burst)  # by the first answer
    assert len(calls) >= 1060 - 1 - taken_back
    assert worst_window(calls) <= 114


def test_V11_one_noisy_client_cannot_starve_another() -> None:
    """Clients take turns: whoever asks for little is served within a slot or two."""

    async def main(_clock: FakeClock) -> Crowd:
        crowd = Crowd(await started())
        for number in range(1_000):
            crowd.comes(f"noisy {number}", client="noisy")
        for second in range(60):
            crowd.comes(f"quiet {second}", client="quiet")
            crowd.comes(f"more noise {second}", client="noisy")
            await asyncio.sleep(4)
        await crowd.done()
        return crowd

    crowd = run_virtual(main)
    quiet = [name for name in crowd.order if name.startswith("quiet")]
    assert quiet == [f"quiet {second}" for second in range(60)]
    assert all(not name.startswith("quiet") for name in crowd.refused)


@pytest.mark.parametrize("count", [100, 300])
def test_V11_retry_after_is_kept(count: int) -> None:
    """Of many at once, those who come back when they were told are served, within `max_wait`."""

    async def main(_clock: FakeClock) -> list[float]:
        pacer = await started(SHIPPED)
        calls: list[float] = []

        async def caller() -> None:
            try:
                slot = await pacer.acquire(Priority.FIRST, "web")
            except BudgetExhausted as error:
                await asyncio.sleep(error.retry_after / 1_000_000)
                slot = await pacer.acquire(Priority.FIRST, "web")
            calls.append(now())
            slot.settle()

        await asyncio.gather(*(caller() for _ in range(count)))
        await pacer.close()
        return calls

    calls = run_virtual(main)
    assert len(calls) == count
    assert worst_window(calls) <= VENDOR_ALLOWS


def test_V11_the_urgent_go_first_and_who_is_displaced_too_long_is_told() -> None:
    """First visitors go before renewals; a renewal that waits too long for them is told when."""

    async def main(_clock: FakeClock) -> Crowd:
        crowd = Crowd(await started())
        began = now()
        for number in range(5):
            crowd.comes(f"renewal {number}", Priority.MANDATORY)
        await asyncio.sleep(0.5)
        for number in range(9):
            crowd.comes(f"visitor {number}")
        await crowd.done()
        for at, wait in crowd.refused.values():
            assert at - began == pytest.approx(SLOW.max_wait + LATENESS, abs=A_BIT)
            assert wait > 0
        return crowd

    crowd = run_virtual(main)
    assert crowd.order == [*(f"visitor {number}" for number in range(9)), "renewal 0"]
    assert sorted(crowd.refused) == [f"renewal {number}" for number in range(1, 5)]


def test_a_renewal_ahead_of_time_takes_only_what_is_left_over() -> None:
    """It never queues: half the burst must be there, and nobody may wait."""

    async def main(_clock: FakeClock) -> None:
        pacer = await filled()
        crowd = Crowd(pacer)
        for number in range(5):
            crowd.comes(f"ahead {number}", Priority.AHEAD)
        await crowd.done()
        assert crowd.order == ["ahead 0", "ahead 1", "ahead 2"]  # of four, until two are not left
        assert (pacer.remaining, pacer.has_headroom) == (1, False)
        assert crowd.refused == {
            "ahead 3": (pytest.approx(now(), abs=A_BIT), 1.0),
            "ahead 4": (pytest.approx(now(), abs=A_BIT), 1.0),
        }

    run_virtual(main)


def test_the_wait_of_each_who_was_served_is_reported() -> None:
    """Seconds in the queue, 0 for those who did not queue; the refused are not among them."""

    async def main(_clock: FakeClock) -> list[float]:
        waits: list[float] = []
        pacer = BudgetPacer(SLOW, waits.append)
        await pacer.start()
        await asyncio.sleep(2 + A_BIT)
        crowd = Crowd(pacer)
        for number in range(100):
            crowd.comes(f"{number}")
        await crowd.done()
        await pacer.close()
        return waits

    waits = run_virtual(main)
    assert waits == pytest.approx([0, 0, *range(1, 11)], abs=2 * A_BIT)


def test_closing_tells_everybody_who_waits() -> None:
    """Nobody waits for a budget that will not come; nothing is left running."""

    async def main(_clock: FakeClock) -> None:
        pacer = await started()
        waiting = [
            asyncio.get_running_loop().create_task(pacer.acquire(urgency, "web"))
            for urgency in (Priority.FIRST, Priority.MANDATORY, Priority.FIRST)
        ]
        await asyncio.sleep(0.3)
        waiting[2].cancel()  # leaves in the tick of the closing
        began = now()
        await pacer.close()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [
            ServiceUnavailable,
            ServiceUnavailable,
            asyncio.CancelledError,
        ]
        assert now() - began < A_BIT
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert pacer.depth == 0

    run_virtual(main)


def test_nobody_queues_at_a_pacer_that_has_closed() -> None:
    """Whoever comes after the end is told so at once, not after `max_wait`."""

    async def main(_clock: FakeClock) -> None:
        pacer = await started()
        await pacer.close()
        began = now()
        with pytest.raises(ServiceUnavailable):
            await pacer.acquire(Priority.FIRST, "web")
        assert now() - began < A_BIT

    run_virtual(main)


def test_a_pause_holds_those_who_wait_and_tells_the_others_its_end() -> None:
    """Who cannot outwait it is refused at arrival with its end; who can, is served after it."""

    async def main(_clock: FakeClock) -> None:
        pacer = await filled()
        pacer.pause(5)
        assert (pacer.remaining, pacer.has_headroom) == (0, False)
        crowd = Crowd(pacer)
        began = now()
        for number in range(6):
            crowd.comes(f"{number}")
        crowd.comes("ahead", Priority.AHEAD)
        await asyncio.sleep(A_BIT)
        assert set(crowd.refused) == {"5", "ahead"}
        _, wait = crowd.refused["5"]
        assert 11 - A_BIT <= wait <= 11 * (1 + JITTER) + A_BIT
        await crowd.done()
        assert [at - began for at in crowd.times] == pytest.approx([6, 7, 8, 9, 10], abs=2 * A_BIT)
        assert crowd.order == ["0", "1", "2", "3", "4"]

    run_virtual(main)


def test_repr_shows_what_helps() -> None:
    """Who waits and what is left, at a glance."""

    async def main(_clock: FakeClock) -> str:
        return repr(await filled())

    assert run_virtual(main) == "BudgetPacer(waiting=0, remaining=4, outstanding=0)"


class Distant(LocalSlots):
    """Slots that are asked for elsewhere: the answer takes a second."""

    async def take_if_headroom(self) -> bool:
        taken = await super().take_if_headroom()
        await asyncio.sleep(1)
        return taken


def test_V10_a_slot_that_comes_in_a_pause_is_given_back_by_a_renewal() -> None:
    """The pause began while it was asked for: no call is made, and none is out."""

    async def scenario(_clock: FakeClock) -> None:
        pacer = BudgetPacer(SLOW, lambda _seconds: None, Distant(SLOW))
        await pacer.start()
        await asyncio.sleep(SLOW.depth + 1)
        renewal = asyncio.create_task(pacer.acquire(Priority.AHEAD, "web"))
        await asyncio.sleep(0.5)
        assert pacer.outstanding == 1
        pacer.pause(5)
        with pytest.raises(BudgetExhausted):
            await renewal
        assert pacer.outstanding == 0
        await pacer.close()

    run_virtual(scenario)


def test_V1_a_pause_that_nobody_waits_out_is_over_at_its_end() -> None:
    """From then on slots come as after a start: whoever comes later finds a burst."""

    async def main(_: FakeClock) -> None:
        pacer = await filled()
        pacer.pause(5)
        await asyncio.sleep(5 - A_BIT)
        assert pacer.remaining == 0
        await asyncio.sleep(SLOW.burst * SLOW.interval + 1)
        assert pacer.remaining == SLOW.burst
        crowd, came = Crowd(pacer), now()
        for number in range(SLOW.burst):
            crowd.comes(f"{number}")
        await crowd.done()
        assert crowd.times == pytest.approx([came] * SLOW.burst, abs=A_BIT)
        await pacer.close()

    run_virtual(main)


class Told(LocalSlots):
    """Slots that keep what they were told of pauses."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(budget)
        self.pauses: list[float] = []

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)


def test_V1_a_pause_is_passed_on_as_it_is_and_bounded() -> None:
    """What other replicas are told is what the vendor said, up to the longest promise."""

    async def main(_: FakeClock) -> None:
        slots = Told(SLOW)
        pacer = BudgetPacer(SLOW, lambda _seconds: None, slots)
        await pacer.start()
        for seconds in (0.5, 5.0, MAX_PROMISE, 2 * MAX_PROMISE):
            pacer.pause(seconds)
        assert slots.pauses == [0.5, 5.0, MAX_PROMISE, MAX_PROMISE]
        assert pacer._paused_until == now() + MAX_PROMISE
        pacer.pause_for(1.0)  # a shorter one ends none that is longer
        assert pacer._paused_until == now() + MAX_PROMISE
        await pacer.close()

    run_virtual(main)
