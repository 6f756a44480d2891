"""G4 for arrivals: whatever the network does with calls, no window holds more than it may."""

import random
from collections.abc import Sequence

from budget_twin import Twin
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.rules import outstanding
from broker.rules.bucket import Limit
from broker.rules.outstanding import PROBES, Ledger
from broker.units import SECOND

limits = st.builds(Limit, burst=st.integers(1, 12), interval=st.integers(1, 2 * SECOND))

SHIPPED = Limit(burst=8, interval=566_038)
"""106 a minute."""

MINUTE = 60 * SECOND
ALLOWED = 120


def most_beyond(arrivals: Sequence[int], limit: Limit) -> float:
    """By how many calls the worst of all windows exceeds what refilled in it."""
    times = sorted(arrivals)
    return max(
        (
            last - first + 1 - (times[last] - times[first]) / limit.interval
            for first in range(len(times))
            for last in range(first, len(times))
        ),
        default=0.0,
    )


def worst_window(arrivals: Sequence[int], width: int = MINUTE) -> int:
    """Count the calls in the fullest window of this width, both ends included."""
    times = sorted(arrivals)
    return max(sum(1 for time in times if start <= time <= start + width) for start in times)


class Network:
    """A process that sends whenever it may, before a vendor that reads whenever it likes.

    `arrived` are the moments at which calls arrived; `ended` those of calls of processes that were
    killed, which arrive at the next `flush`.
    """

    def __init__(self, limit: Limit, chance: random.Random) -> None:
        self.limit = limit
        self.chance = chance
        self.now = 10**9
        self.arrived: list[int] = []
        self.adrift = 0
        self.out: list[tuple[int, int | None]] = []  # sent, arrived
        self.ledger = outstanding.started(limit, self.now)

    def send(self) -> None:
        if outstanding.wait(self.ledger, self.limit, self.now) == 0:
            self.ledger = outstanding.take(self.ledger)
            self.out.append((self.now, None))

    def arrive(self) -> None:
        """One of the calls that are out arrives, and its answer takes its time."""
        waiting = [number for number, (_, arrived) in enumerate(self.out) if arrived is None]
        if waiting:
            number = self.chance.choice(waiting)
            self.out[number] = (self.out[number][0], self.now)
            self.arrived.append(self.now)

    def settle(self) -> None:
        """One call is answered, or its connection ends; it may never have arrived."""
        if self.out:
            _, arrived = self.out.pop(self.chance.randrange(len(self.out)))
            self.ledger = outstanding.settle(self.ledger, self.limit, self.now)
            if arrived is not None:
                self.ledger = outstanding.answered(self.ledger, self.limit, self.now, self.now)

    def pass_time(self) -> None:
        scale = self.chance.choice([self.limit.interval // 7 + 1, self.limit.interval, MINUTE])
        self.now += self.chance.randrange(scale + 1)

    def drain(self) -> None:
        self.ledger = outstanding.drained(self.ledger, self.limit, self.now)

    def live(self, steps: int) -> None:
        acts = [self.send] * 4 + [self.arrive, self.settle] * 2 + [self.pass_time] * 3
        if self.chance.random() < 0.5:
            acts = [self.send] * 6 + [self.pass_time] * 3 + [self.arrive]  # it stands still
        for _ in range(steps):
            self.chance.choice(acts)()


@settings(deadline=None, max_examples=300)
@given(limit=limits, seed=st.integers(0, 2**32))
def test_N13_every_window_of_arrivals_holds_a_burst_and_what_refilled(
    limit: Limit, seed: int
) -> None:
    """Any history of sending, arriving and answering, with stalls in it."""
    network = Network(limit, random.Random(seed))
    for _ in range(6):
        network.live(40)
        if network.chance.random() < 0.2:
            network.drain()
    network.arrived += [network.now for sent, arrived in network.out if arrived is None]
    assert most_beyond(network.arrived, limit) <= limit.burst + 1e-6


@settings(deadline=None, max_examples=200)
@given(limit=limits, seed=st.integers(0, 2**32))
def test_N13_a_saturated_budget_is_not_slower_for_answers_that_take_time(
    limit: Limit, seed: int
) -> None:
    """A slot each interval, to the microsecond, while answers take less than the burst but one."""
    chance = random.Random(seed)
    start = 10**9
    ledger = outstanding.answered(outstanding.started(limit, start), limit, start, start)
    now, sent = start, []
    answers: list[int] = []
    most = (limit.burst - 1) * limit.interval
    while len(sent) < 50:
        wait = outstanding.wait(ledger, limit, now)
        if wait == 0:
            ledger = outstanding.take(ledger)
            sent.append(now)
            answers.append(now + chance.randint(0, most))
            continue
        soonest = min(answers, default=2**62)
        now = min(soonest, now + wait if wait is not None else soonest)
        if now == soonest:
            answers.remove(now)
            ledger = outstanding.settle(ledger, limit, now)
    assert sent[-1] - sent[0] == 49 * limit.interval


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32), restarts=st.integers(1, 12))
def test_N13_each_restart_within_a_stall_but_the_first_adds_two_to_the_window(
    seed: int, restarts: int
) -> None:
    """Each process leaves what it has out; all of it arrives when the vendor goes on.

    Four fit the vendor's window.
    """
    chance = random.Random(seed)
    limit, now = SHIPPED, 10**9
    ledger = Ledger()  # long idle: the whole burst is there
    adrift = 0
    for _ in range(restarts):
        for _ in range(chance.randrange(40)):
            if outstanding.wait(ledger, limit, now) == 0:
                ledger = outstanding.take(ledger)
            now += chance.randrange(limit.interval)
        adrift += ledger.outstanding
        now += chance.randrange(3 * SECOND)
        ledger = outstanding.started(limit, now)
    began = now
    stall = chance.randrange(MINUTE)
    arrivals: list[int] = []
    while now < began + stall + 70 * SECOND:
        if outstanding.wait(ledger, limit, now) == 0:
            ledger = outstanding.take(ledger)
        if now >= began + stall:  # the vendor reads: at once what is there, and answers it
            arrivals += [now] * (adrift + ledger.outstanding)
            adrift = 0
            if ledger.outstanding:
                ledger = outstanding.answered(ledger, limit, now, now)
                ledger = outstanding.settle(ledger, limit, now, ledger.outstanding)
        now += 50_000
    assert worst_window(arrivals) <= ALLOWED + PROBES * (restarts - 4)


def test_N13_what_is_owed_leaves_room_for_two() -> None:
    """After a start, until the vendor has answered: what had refilled by then is taken back."""
    ledger = outstanding.started(SHIPPED, 0)
    now = MINUTE
    for _ in range(PROBES):
        assert outstanding.wait(ledger, SHIPPED, now) == 0
        ledger = outstanding.take(ledger)
    assert outstanding.wait(ledger, SHIPPED, now) is None
    ledger = outstanding.answered(ledger, SHIPPED, now, now)
    assert outstanding.wait(ledger, SHIPPED, now) == (PROBES + 1) * SHIPPED.interval
    assert outstanding.remaining(ledger, SHIPPED, now) == 0


def test_N13_a_first_answer_at_once_takes_back_nothing() -> None:
    """What was owed was charged when it began, and nothing has refilled since."""
    now = SHIPPED.interval - 1
    soon = outstanding.answered(outstanding.started(SHIPPED, 0), SHIPPED, now, now)
    assert soon.full_at == SHIPPED.depth


def test_N13_an_answer_from_before_calls_were_owed_says_nothing_of_them() -> None:
    """It is told late; one from that moment on counts."""
    ledger = outstanding.abandon(outstanding.take(Ledger()), SHIPPED, MINUTE)
    now = 2 * MINUTE
    assert outstanding.answered(ledger, SHIPPED, now, MINUTE - 1) is ledger
    assert outstanding.answered(ledger, SHIPPED, now, MINUTE).owed == 0


def test_N13_what_was_given_up_is_owed_and_bounded() -> None:
    """A call out for ever no longer holds its slot: charged then, and when the vendor wakes."""
    ledger, now = Ledger(), MINUTE
    for number in range(1, 101):
        ledger = outstanding.abandon(outstanding.take(ledger), SHIPPED, now)
        assert ledger.full_at - now == number * SHIPPED.interval
        assert outstanding.may_give_up(ledger.owed, SHIPPED) == (number < 2 * SHIPPED.burst)
    assert (ledger.outstanding, ledger.owed) == (0, 3 * SHIPPED.burst)
    now *= 9
    woken = outstanding.answered(ledger, SHIPPED, now, now)
    assert woken.full_at - now == 3 * SHIPPED.depth


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32), rounds=st.integers(0, 8), after_start=st.booleans())
def test_N13_what_is_owed_may_arrive_while_nobody_asks(
    seed: int, rounds: int, *, after_start: bool
) -> None:
    """Given up again and again, or left by a process before: then demand meets a full bucket."""
    chance, now, limit = random.Random(seed), 10**9, SHIPPED
    ledger = outstanding.started(limit, now) if after_start else Ledger()
    adrift = limit.burst if after_start else 0
    for _ in range(rounds):
        while outstanding.wait(ledger, limit, now) == 0:
            ledger = outstanding.take(ledger)
        now += chance.randrange(33 * SECOND, 300 * SECOND)
        while ledger.outstanding:
            ledger = outstanding.abandon(ledger, limit, now)
            adrift += 1
    assert adrift == ledger.owed
    now += chance.randrange(MINUTE)
    arrivals = [now] * adrift
    now += chance.randrange(5 * SECOND)
    ends = now + 70 * SECOND
    while now < ends:
        while outstanding.wait(ledger, limit, now) == 0:
            ledger = outstanding.take(ledger)
            arrivals.append(now)
        now += 100_000
        while ledger.outstanding:
            ledger = outstanding.answered(ledger, limit, now, now)
            ledger = outstanding.settle(ledger, limit, now)
    assert worst_window(arrivals) <= 106 + limit.burst + PROBES


@settings(deadline=None, max_examples=200)
@given(limit=limits, seed=st.integers(0, 2**32))
def test_N13_one_process_and_a_fleet_of_one_decide_the_same(limit: Limit, seed: int) -> None:
    """The rule here and the script's twin: who may go and when, what is charged, what is owed."""
    chance = random.Random(seed)
    now = 10**9
    ledger, twin = outstanding.started(limit, now), Twin()
    settled = abandoned = 0

    def tell(number: int, ago: int = -1) -> int:
        """Tell the twin what is out and over; returns what it says for how long to wait."""
        counts = b"%d" % settled, b"%d" % abandoned, b"%d" % ago
        return twin.send(
            now,
            [
                *(b"%d" % limit.burst, b"%d" % limit.interval, b"a", b"0", b"%d" % 10**15),
                *(b"0", b"1", b"1", b"tell", b"era", b"0", b"%d" % number),
                *(b"%d" % ledger.outstanding, *counts, b"%d" % MINUTE, b"%d" % PROBES),
            ],
        )[1]

    tell(1)
    for number in range(2, 300):
        ago = -1
        match chance.randrange(5):
            case 0 if ledger.outstanding:
                ledger = outstanding.settle(ledger, limit, now)
                settled += 1
            case 1 if ledger.outstanding and ledger.full_at - now < limit.depth:
                ledger = outstanding.abandon(ledger, limit, now)
                abandoned += 1
            case 2:
                ago = chance.choice([0, 0, limit.interval])
                ledger = outstanding.answered(ledger, limit, now, now - ago)
            case _:
                now += chance.choice([1, limit.interval // 3, limit.interval, 2 * limit.depth])
        told = tell(number, ago)
        assert twin.full_at == max(ledger.full_at, now)
        assert twin.owed is not None
        assert twin.owed[0] == ledger.owed
        assert twin.owed[1] == ledger.owed_at or not ledger.owed
        wait = outstanding.wait(ledger, limit, now)
        assert told == wait if wait is not None else told >= limit.interval
        if wait == 0:
            ledger = outstanding.take(ledger)


def test_G4_a_burst_of_one_has_one_probe() -> None:
    """While calls are owed, and one is out: no time brings the next one, only its end does."""
    limit = Limit(burst=1, interval=SECOND)
    ledger = outstanding.take(outstanding.started(limit, 0))
    assert ledger.owed
    assert outstanding.wait(ledger, limit, 100 * SECOND) is None
