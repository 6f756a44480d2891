"""V10 and G4 for replicas that share one budget: reservations, pauses, corrections, coming back."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import pytest
from budget_twin import Twin
from foreign import FOREIGN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replica import Replica, at_given_time, opened
from servers import StoreServer, store_server, valkey_binary
from shared_store_cases import limits_of
from store_trace import Talk
from test_leases import eventually

from broker.pacing.slots import Budget
from broker.rules.outstanding import PROBES
from broker.valkey import budget_share as budget_module
from broker.valkey import membership as fleet_module
from broker.valkey.budget_script import AHEAD, QUEUE_TOLD, REMEMBERED, SILENT
from broker.valkey.client.scripts import Script, command
from broker.valkey.slots import SharedSlots

pytestmark = pytest.mark.parts

SECOND = 1_000_000
BEGAN = 1_790_000_000_000_000
BURST, INTERVAL = 8, 566_038
"""The budget that ships: 106 a minute, 8 at once."""

DEPTH = BURST * INTERVAL
FIELDS = ["full_at", "paused_until", "withheld", "owed", "owed_at", "reserved_at"]
SHIPPED = Budget(rate=106, per=60, burst=8, max_wait=8)
LONGEST_PAUSE = 300 * SECOND
TOLD = int(QUEUE_TOLD * SECOND)


class Till:
    """The budget on a server, at a time that the test says."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._reserve, self._hold = (
            talk.load(at_given_time(script.source)) for script in (Script.BUDGET, Script.HOLD)
        )
        self.now = BEGAN
        self.clock = BEGAN
        self.era, self.follows = "era", False
        self.ghosts = 0
        self.forget()

    def reserve(
        self, who: str = "a", waiting: int = 1, *, ahead: int = int(AHEAD * SECOND),
        returned: bool = True, modest: bool = False, settled: bool = True,
    ) -> list[int]:  # fmt: skip
        """Ask for the next call: reserved, wait, free, paused, lines of others.

        With `settled` it is over as soon as it is made: what the budget was before it knew of calls
        that are out.
        """
        what = "modest" if modest else "reserve"
        reply = self.send(what, who, waiting, ahead=ahead, returned=returned)
        if reply[0]:
            self.out[who] += 1
            if settled:
                self.settle(who)
        return reply

    def settle(self, who: str = "a", calls: int = 1) -> None:
        """Say that calls are over."""
        self.out[who] -= calls
        self.settled[who] += calls
        self.send("tell", who, 0)

    def abandon(self, who: str = "a", calls: int = 1) -> None:
        """Say that calls are given up, and may arrive yet."""
        self.out[who] -= calls
        self.abandoned[who] += calls
        self.send("tell", who, 0)

    def answer(self, who: str = "a", ago: int = 0) -> None:
        """Say that the vendor has answered."""
        self.send("tell", who, 0, answered=ago)

    @property
    def owed(self) -> int:
        """How many calls are owed."""
        (owed,) = self._talk.send([command(b"HGET", b"budget", b"owed")])
        assert isinstance(owed, bytes | None)
        return int(owed or 0)

    def send(
        self, what: str, who: str, waiting: int, *, ahead: int = int(AHEAD * SECOND),
        returned: bool = True, message: int = 0, vouched: int | None = None, era: str = "",
        answered: int = -1,
    ) -> list[int]:  # fmt: skip
        """Send one message, the next of this replica.

        Returns the reply without the time and the silence, which is kept.
        """
        self.messages[who] += 1
        arguments = [BURST, INTERVAL, who, waiting, ahead, int(not returned), REMEMBERED, TOLD]
        arguments += [what, era or self.era, self.now if vouched is None else vouched]
        arguments += [message or self.messages[who], self.out[who], self.settled[who]]
        arguments += [self.abandoned[who], answered, int(SILENT * SECOND), PROBES, self.clock]
        self.sent = [str(part).encode() for part in arguments]
        reply = self._call(self._reserve, ["budget", "queues", "calls"], arguments)
        assert isinstance(reply, list)
        told = reply[4].decode("latin-1")
        assert told == self.era or self.follows
        self.era = told
        self.told, self.silence = reply[5:7]
        assert reply[7] == self.owed
        return [*reply[:4], *reply[8:]]

    def hold(self, pause: int = 0, left: int = -1) -> int:
        """Take note of a pause, or of how many calls are left."""
        arguments = [BURST, INTERVAL, pause, left, REMEMBERED, self.era, self.now, self.clock]
        told = self._call(self._hold, ["budget"], arguments)
        assert isinstance(told, int)
        return told

    @property
    def ghosts_out(self) -> bool:
        """Whether replicas that died are still taken to live, with calls out."""
        reply = self._talk.send([command(b"HGETALL", b"calls")])[0]
        assert isinstance(reply, list)
        pairs = zip(reply[::2], reply[1::2], strict=True)
        return any(n.startswith(b"ghost") and int(v.split()[1]) for n, v in pairs)

    def dies(self, who: str) -> None:
        """Let a replica die, and another one come with its letter."""
        (known,) = self._talk.send([command(b"HGET", b"calls", who.encode())])
        if known:
            ghost = b"ghost %d" % self.ghosts
            self.ghosts += 1
            self._talk.send([command(b"HDEL", b"calls", who.encode())])
            self._talk.send([command(b"HSET", b"calls", ghost, known)])
        for counted in (self.out, self.settled, self.abandoned, self.messages):
            counted[who] = 0

    def begin_anew(self, now: int) -> None:
        """Let the fleet's time be lost, and begin at this moment."""
        self._talk.send([command(b"HDEL", b"budget", b"era", b"time")])
        self.now = now

    def write_call(self, name: bytes, value: bytes) -> None:
        """Write what no replica writes."""
        self._talk.send([command(b"HSET", b"calls", name, value)])

    def spoil(self, field: str, value: str) -> bool:
        """Write over a field of the budget, if it is there."""
        packed = command(b"HEXISTS", b"budget", field.encode())
        if not self._talk.send([packed])[0]:
            return False
        written = value.encode("latin-1")
        self._talk.send([command(b"HSET", b"budget", field.encode(), written)])
        return True

    def read_call(self, name: bytes) -> bytes | None:
        """Return what is known of the calls of a replica."""
        (known,) = self._talk.send([command(b"HGET", b"calls", name)])
        assert known is None or isinstance(known, bytes)
        return known

    def withhold(self, millionths: int) -> None:
        """Keep a share back, as the heartbeat does."""
        self._talk.send([command(b"HSET", b"budget", b"withheld", b"%d" % millionths)])

    def forget(self) -> None:
        """Lose the budget, and all who use it."""
        self._talk.send([command(b"DEL", b"budget", b"queues", b"calls")])
        self.out, self.settled, self.abandoned = Counter[str](), Counter[str](), Counter[str]()
        self.messages = Counter[str]()

    def fill(self) -> None:
        """Let a first asker make the empty one, have the vendor answer, then let it fill."""
        self.reserve(ahead=-1)
        self.answer()
        self.now += DEPTH

    def _call(
        self, script: bytes, keys: list[str], arguments: list[int | str]
    ) -> "list[int] | int":
        parts = [str(part).encode("latin-1") for part in (*keys, *arguments)]
        (reply,) = self._talk.send([command(b"EVALSHA", script, b"%d" % len(keys), *parts)])
        assert isinstance(reply, list | int), reply
        return reply


@pytest.fixture(params=["valkey", "redis7"])
def engine(request: pytest.FixtureRequest) -> StoreServer:
    """Each engine: they write the numbers of scripts in ways of their own."""
    server: StoreServer = request.getfixturevalue(request.param)
    server.flush()
    return server


@pytest.fixture
def till(engine: StoreServer) -> Iterator[Till]:
    """An absent budget."""
    with Talk(engine) as talk:
        yield Till(talk)


def test_V10_an_absent_budget_starts_empty(till: Till) -> None:
    """Nobody knows what was spent: the first call is an interval away, no burst comes first."""
    assert till.reserve() == [1, INTERVAL, 0, 0]
    assert till.reserve() == [1, 2 * INTERVAL, 0, 0]


def test_V10_a_full_budget_gives_its_burst_and_then_one_an_interval(till: Till) -> None:
    """What is free is told with each; the line reaches five seconds ahead, then it is `not yet`."""
    till.fill()
    assert [till.reserve() for _ in range(8)] == [[1, 0, free, 0] for free in range(7, -1, -1)]
    ahead = int(AHEAD * SECOND) // INTERVAL
    assert [till.reserve() for _ in range(ahead)] == [
        [1, INTERVAL * (place + 1), 0, 0] for place in range(ahead)
    ]
    refused = till.reserve()
    assert refused == [0, INTERVAL * (ahead + 1), 0, 0]
    assert till.reserve() == refused
    till.now += INTERVAL
    assert till.reserve()[0] == 1


def test_two_replicas_stand_in_one_line(till: Till) -> None:
    """Whoever reserves next gets the next slot, and hears how long the other's line is."""
    till.fill()
    for _ in range(8):
        till.reserve("a", 5)
    assert till.reserve("b", 2) == [1, INTERVAL, 0, 0, 5]
    assert till.reserve("a", 4) == [1, 2 * INTERVAL, 0, 0, 2]
    assert till.reserve("b", 0) == [1, 3 * INTERVAL, 0, 0, 4]
    assert till.reserve("a", 3) == [1, 4 * INTERVAL, 0, 0]


def test_what_nobody_needs_is_there_at_once_or_not_at_all(till: Till) -> None:
    """Only while half the burst is left and no line stands anywhere: renewals ahead of time."""
    till.fill()
    till.now += DEPTH  # whoever filled it is not in line any more
    assert [till.reserve("b", 0, modest=True)[:2] for _ in range(7)] == [[1, 0]] * 5 + [[0, 0]] * 2
    till.now += DEPTH
    till.reserve("a", 1)
    assert till.reserve("b", 0, modest=True)[0] == 0
    till.reserve("a", 0)
    assert till.reserve("b", 0, modest=True)[0] == 1
    till.hold(pause=SECOND)
    till.now += SECOND - 1
    assert till.reserve("b", 0, modest=True)[0] == 0


def test_however_little_is_left_one_call_at_a_time_is_made(till: Till) -> None:
    """Nearly everything is withheld: one call, and the next when its time has come."""
    till.fill()
    till.withhold(999_000)
    step = 1000 * INTERVAL
    assert till.reserve()[:2] == [1, 0]
    assert till.reserve()[0] == 0
    till.now += step + 2_000_000
    assert till.reserve()[0] == 1


def test_a_line_that_is_not_told_of_is_over(till: Till) -> None:
    """Its replica died: after seven seconds it is nobody's, also if time began anew."""
    till.reserve("a", 5)
    till.now += TOLD
    assert till.reserve("b", 1)[4:] == [5]
    till.now += 1
    assert till.reserve("b", 1)[4:] == []
    till.reserve("a", 5)
    till.begin_anew(till.now - 86_400 * SECOND)
    assert till.reserve("b", 1)[4:] == []


def test_V1_a_pause_holds_everybody_and_leaves_no_burst(till: Till) -> None:
    """Asked before its end: not yet; the first call is an interval after it."""
    till.fill()
    assert till.hold(pause=60 * SECOND) == 60 * SECOND
    reserved, wait, free, paused = till.reserve()
    assert (reserved, free, paused) == (0, 0, 60 * SECOND)
    assert wait == 60 * SECOND + INTERVAL
    till.now += 20 * SECOND
    assert till.reserve()[3] == 40 * SECOND, "who asks does not end it"
    till.now += 40 * SECOND
    assert till.reserve() == [1, INTERVAL, 0, 0]


def test_V1_a_pause_only_grows(till: Till) -> None:
    """Of two answers the stricter one stands, in either order; five minutes is the longest."""
    assert till.hold(pause=60 * SECOND) == 60 * SECOND
    assert till.hold(pause=10 * SECOND) == 60 * SECOND
    assert till.hold(pause=90 * SECOND) == 90 * SECOND
    assert till.hold(left=3) == 90 * SECOND


def test_T5_a_pause_of_another_time_is_cut(till: Till) -> None:
    """The fleet's time began anew, a day back: five minutes at most, then the budget works."""
    till.fill()
    till.hold(pause=300 * SECOND)
    till.begin_anew(till.now - 86_400 * SECOND)
    paused = till.reserve()[3]
    assert paused <= LONGEST_PAUSE
    till.now += LONGEST_PAUSE + DEPTH + int(AHEAD * SECOND)
    assert till.reserve()[0] == 1


def test_a_correction_is_believed_if_it_is_stricter(till: Till) -> None:
    """The vendor says two are left: two are given; that seven are left changes nothing then."""
    till.fill()
    till.hold(left=2)
    till.hold(left=7)
    assert [till.reserve(ahead=0)[0] for _ in range(3)] == [1, 1, 0]
    till.hold(left=0)
    assert till.reserve(ahead=0)[0] == 0


def test_a_correction_does_not_bring_back_what_is_reserved_ahead(till: Till) -> None:
    """The line has been overdrawn by five: `0 left` must not make it shorter."""
    till.fill()
    for _ in range(13):
        till.reserve()
    till.hold(left=0)
    assert till.reserve()[1] == 6 * INTERVAL


def test_S3_coming_back_empties_the_budget(till: Till) -> None:
    """After a time without the server nobody knows what all have spent."""
    till.fill()
    assert till.reserve(returned=False) == [1, INTERVAL, 0, 0]
    assert till.reserve() == [1, 2 * INTERVAL, 0, 0]


def test_S3_coming_back_shortens_no_line(till: Till) -> None:
    """What is overdrawn stays so."""
    till.fill()
    for _ in range(12):
        till.reserve()
    assert till.reserve(returned=False)[1] == 5 * INTERVAL


@pytest.mark.parametrize(
    ("withheld", "burst", "step"),
    [(500_000, 4, 2 * INTERVAL), (333_334, 5, 849_058), (1_000_000, 0, 3600 * SECOND)],
)
def test_S5_a_withheld_share_is_not_given(till: Till, withheld: int, burst: int, step: int) -> None:
    """Neither in the burst nor in the rate."""
    till.fill()
    till.withhold(withheld)
    given = 0
    while till.reserve(ahead=0)[0]:
        given += 1
    assert given == burst
    reserved, wait, *_ = till.reserve(ahead=2**40)
    assert reserved == (1 if burst else 0)
    if burst:
        assert (given + 1) * step - DEPTH - 2 <= wait <= (given + 1) * step - DEPTH + 2


def test_T5_a_time_that_began_anew_holds_nobody_back_for_as_long_as_it_lost(till: Till) -> None:
    """A day back: a line of two bursts at most."""
    till.fill()
    for _ in range(8):
        till.reserve()
    till.begin_anew(till.now - 86_400 * SECOND)
    _, wait, *_ = till.reserve()
    assert wait <= DEPTH + AHEAD * SECOND + INTERVAL
    till.now += int(AHEAD * SECOND) + 2 * DEPTH
    assert till.reserve(ahead=0)[0] == 1


@pytest.mark.parametrize("step", [30 * SECOND, -30 * SECOND, 86_400 * SECOND, -86_400 * SECOND])
def test_N19_steps_of_the_servers_clock_refill_nothing(till: Till, step: int) -> None:
    """Before every call, in either direction: one call an interval, as if it had not stepped."""
    calls = []
    while till.now < BEGAN + 60 * SECOND:
        till.clock += step
        reserved, wait, *_ = till.reserve("ab"[len(calls) % 2])
        if reserved:
            calls.append(till.now + wait)
        till.now += 100_000
    assert calls
    assert sum(call <= BEGAN + 60 * SECOND for call in calls) == 60 * SECOND // INTERVAL


def test_N19_nobody_moves_time_by_what_has_not_passed(till: Till) -> None:
    """A newcomer vouches for nothing, one of another era for nothing here, a late one for less."""
    till.fill()
    till.settle(calls=0)
    before = till.told
    till.send("tell", "newcomer", 0, vouched=0)
    assert till.told == before
    till.send("tell", "late", 0, vouched=before - SECOND)
    assert till.told == before
    till.send("tell", "other era", 0, vouched=before + SECOND, era="other")
    assert till.told == before
    till.send("tell", "a", 0, vouched=before + SECOND)
    assert till.told == before + SECOND


def test_N19_a_server_that_forgot_the_time_is_told_it(till: Till) -> None:
    """By whoever knows it; by its own clock where nobody does."""
    till.settle(calls=0)
    till.forget()
    till.send("tell", "a", 0, vouched=till.now)
    assert till.told == till.now
    till.forget()
    till.send("tell", "a", 0, vouched=0)
    assert till.told == till.clock


# --- calls that are out


def test_N13_no_more_are_out_than_the_burst(till: Till) -> None:
    """Nobody settles: eight are out, however long it takes and whoever asks."""
    till.fill()
    assert [till.reserve("abc"[n % 3], settled=False)[0] for n in range(8)] == [1] * 8
    sent = till.now
    assert till.silence == 0
    for who in "abcd":
        for _ in range(15):
            till.now += int(SILENT * SECOND)
            for other in "abc":
                till.send("tell", other, 0)
        reserved, wait, free, *_ = till.reserve(who, settled=False)
        assert (reserved, free) == (0, 0)
        assert 0 < wait <= INTERVAL
        assert till.silence == till.now - sent
    till.settle("a", 3)
    assert till.silence == -1
    ahead = [till.reserve("b", settled=False)[:2] for _ in range(4)]
    assert ahead == [*([1, n * INTERVAL] for n in (1, 2, 3)), [0, 4 * INTERVAL]]


def test_N13_without_a_stall_the_line_is_as_quick(till: Till) -> None:
    """Calls that take a second cost nothing: one an interval, from three replicas in turn."""
    till.fill()
    began, calls, under_way = till.now, 0, list[tuple[int, str]]()
    while till.now < began + 60 * SECOND:
        for ends, who in [call for call in under_way if call[0] <= till.now]:
            under_way.remove((ends, who))
            till.settle(who)
        who = "abc"[calls % 3]
        reserved, wait, *_ = till.reserve(who, settled=False)
        if reserved:
            calls += 1
            under_way.append((till.now + wait + SECOND, who))
        till.now += 50_000
    assert calls >= 60 * SECOND // INTERVAL + BURST


def test_N13_what_a_silent_replica_had_out_is_owed(till: Till) -> None:
    """After five seconds: it is charged, and two calls go at once until the vendor answers."""
    till.fill()
    for _ in range(8):
        till.reserve("dead", settled=False)
    till.now += int(SILENT * SECOND)
    assert till.reserve("b", settled=False)[0] == 0
    till.now += 1
    assert till.reserve("b", settled=False)[:2] == [1, INTERVAL]
    assert (till.owed, till.silence) == (8, -1)
    assert till.reserve("c", settled=False)[:2] == [1, 2 * INTERVAL]
    assert till.silence == 0
    assert till.reserve("b", settled=False)[0] == 0


def test_N13_what_is_owed_is_charged_again_as_far_as_it_has_refilled(till: Till) -> None:
    """The vendor answers after a minute: all of it may have arrived just then."""
    till.fill()
    for _ in range(8):
        till.reserve("a", settled=False)
    till.abandon("a", 8)
    assert till.owed == 8
    assert till.reserve(settled=False)[:2] == [1, INTERVAL]
    till.now += 3 * INTERVAL
    till.settle()
    till.answer()
    assert till.owed == 0
    assert till.reserve()[1] == (8 + 3 + 1 - 3 + 1 - 8) * INTERVAL


def test_N13_an_answer_from_before_calls_were_owed_says_nothing_of_them(till: Till) -> None:
    """It is told late; one from after it counts, whoever tells it."""
    till.fill()
    till.reserve("a", settled=False)
    till.abandon()
    owed_at = till.now
    till.now += 10 * SECOND
    till.answer("b", ago=till.now - owed_at + 1)
    assert till.owed == 1
    till.answer("b", ago=till.now - owed_at)
    assert till.owed == 0


def test_N13_three_bursts_are_the_most_that_is_owed(till: Till) -> None:
    """A vendor that never answers is asked two calls at a time, and wakes to no endless debt."""
    till.fill()
    for _ in range(40):
        reserved, wait, *_ = till.reserve(settled=False)
        if reserved:
            till.abandon()
        till.now += wait
    assert till.owed == 3 * BURST


def test_T5_calls_owed_in_a_time_that_was_lost_are_answered_for(till: Till) -> None:
    """The fleet's time began anew, a day back: the next answer clears them all the same."""
    till.fill()
    till.reserve(settled=False)
    till.abandon()
    till.begin_anew(till.now - 86_400 * SECOND)
    till.answer()
    assert till.owed == 0


def test_N13_a_budget_that_was_lost_owes_a_burst(till: Till) -> None:
    """Nobody knows what those who are gone have left out: two at once until the first answer."""
    till.reserve(ahead=-1)
    till.now += DEPTH
    assert till.owed == BURST
    assert [till.reserve(settled=False)[0] for _ in range(3)] == [1, 1, 0]
    till.answer()
    assert till.owed == 0
    assert till.reserve()[:2] == [1, 3 * INTERVAL]  # what had refilled was not earned


def test_N13_a_message_that_was_overtaken_changes_nothing(till: Till) -> None:
    """It was given up on when the next one was sent: what it would reserve is nobody's."""
    till.fill()
    till.reserve("a", settled=False)
    till.reserve("a", settled=False)
    late = till.send("reserve", "a", 1, message=1)
    assert late[0] == 0
    till.settle("a", 0)
    assert till.reserve("b", settled=False)[2] == 5


def test_N13_a_reservation_whose_answer_was_lost_is_given_back(till: Till) -> None:
    """The next message tells that it is not out; nothing is charged for it."""
    till.fill()
    till.send("reserve", "a", 1)  # the reply never came: it is not counted as out here
    assert till.reserve("a", settled=False)[2] == 7


def test_N13_a_withheld_share_bounds_what_is_out(till: Till) -> None:
    """Half is withheld: four are out at once, not eight."""
    till.fill()
    till.withhold(500_000)
    assert sum(till.reserve(settled=False)[0] for _ in range(8)) == 4


def test_what_nobody_of_ours_wrote_among_calls_is_taken_out(till: Till) -> None:
    """Noise is not a call."""
    till.fill()
    till.write_call(b"noise", b"x")
    assert till.reserve("a", settled=False)[0] == 1
    assert till.read_call(b"noise") is None


class Call:
    """Made at a moment, over at another (None: not yet); a probe was made while others are owed."""

    def __init__(self, made: int, *, probe: bool) -> None:
        self.made = made
        self.over: int | None = None
        self.probe = probe


def _check_windows(calls: list[Call], now: int) -> None:
    """Hold every window to burst, refill and probes: a call arrives between its two moments."""
    spans = [(c.made, now if c.over is None else c.over, c.probe) for c in calls]
    for start in {over for _, over, _ in spans}:
        for end in {made for made, _, _ in spans if made >= start} | {start}:
            held = sum(made <= end and over >= start for made, over, probe in spans if not probe)
            assert held <= BURST + (end - start) // INTERVAL + 1, (start, end, spans)


def test_G4_N13_no_window_holds_more_than_burst_and_refill(till: Till) -> None:  # noqa: C901, PLR0915 - a branch a move
    """However replicas reserve, pause, correct, come back, die or have shares withheld.

    A call arrives at any moment between that for which it was reserved and that at which it is
    settled, or the vendor answers after it was abandoned: the worst one is drawn, all that can
    arrive together do.  The server's clock steps.
    """
    moves = st.lists(
        st.tuples(
            st.sampled_from(
                ["reserve"] * 12
                + ["settle"] * 4
                + ["answer"] * 4
                + ["pause", "correct", "return", "withhold", "lose", "step", "die", "abandon"]
            ),
            st.sampled_from([0, 0, 0, 1, INTERVAL // 2, INTERVAL, DEPTH, 60 * SECOND]),
            st.integers(0, 10),
        ),
        max_size=120,
    )

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(moves=moves)
    def check(moves: list[tuple[str, int, int]]) -> None:  # noqa: C901, PLR0912 - a branch a move
        till.forget()
        till.now += 86_400 * SECOND
        calls: list[Call] = []
        out: dict[str, list[Call]] = {who: [] for who in "abc"}
        gone: list[Call] = []
        for move, gap, number in moves:
            till.now += gap
            who = "abc"[number % 3]
            for each in "abc":
                till.send("tell", each, 0)  # as each second while calls are out
            match move:
                case "pause":
                    till.hold(pause=(number + 1) * SECOND)
                case "correct":
                    till.hold(left=number)
                case "withhold":
                    till.withhold(number * 100_000)
                case "lose":
                    till.forget()
                    calls = []  # reserved calls of before are within the first window's burst
                    out = {who: [] for who in "abc"}
                    gone = []
                case "step":
                    till.clock += (number - 5) * 3600 * SECOND
                case "settle" | "answer" | "abandon":
                    if out[who] and out[who][0].made <= till.now:
                        over = out[who].pop(0)
                        if move == "abandon":
                            gone.append(over)
                            till.abandon(who)
                            continue
                        over.over = till.now
                        till.settle(who)
                        if move == "answer":
                            till.answer(who)
                            if not till.owed and not till.ghosts_out:
                                while gone:
                                    gone.pop().over = till.now
                case "die":
                    gone += out[who]
                    out[who] = []
                    till.dies(who)
                case _:
                    probe = bool(till.owed)
                    reserved, wait, *_ = till.reserve(
                        who, number, returned=move != "return", settled=False
                    )
                    if reserved:
                        call = Call(till.now + wait, probe=probe)
                        out[who].append(call)
                        calls.append(call)
        _check_windows(calls, till.now)

    check()


def test_G4_from_nothing_a_minute_holds_no_burst(till: Till) -> None:
    """The first sixty seconds of an absent budget: the refill, not the burst."""
    calls = []
    while till.now < BEGAN + 60 * SECOND:
        reserved, wait, *_ = till.reserve()
        if reserved:
            calls.append(till.now + wait)
        till.now += 100_000
    started = BEGAN
    assert sum(call <= started + 60 * SECOND for call in calls) == 60 * SECOND // INTERVAL


def test_S6_the_script_and_its_twin_in_python_decide_the_same(till: Till) -> None:
    """Number for number, over a random trace of messages, steps, losses and withheld shares.

    N26: and of what others write over any field.
    """
    draw, twin = random.Random(11), Twin()
    kinds, owes = Counter[int](), Counter[bool]()
    for _ in range(6000):
        till.now += draw.choice([0, 0, 1, INTERVAL // 2, INTERVAL, 2 * SECOND, 10 * SECOND])
        if draw.random() < 0.01:
            till.now += int(SILENT * SECOND)
        if draw.random() < 0.02:
            twin.withheld = draw.choice([0, 0, 250_000, 999_000, 1_000_000])
            till.withhold(twin.withheld)
        who = draw.choice("abcd")
        if till.out[who] and draw.random() < 0.4:
            done = draw.randint(1, till.out[who])
            till.out[who] -= done
            ended = till.abandoned if draw.random() < 0.2 else till.settled
            ended[who] += done
        what = draw.choice(["reserve", "reserve", "modest", "tell"])
        message = 1 if draw.random() < 0.05 else 0
        back = draw.random() < 0.03
        answered = draw.choice([-1, -1, 0, SECOND])
        if draw.random() < 0.02:
            field = draw.choice(["time", *FIELDS])
            if till.spoil(field, draw.choice(FOREIGN)):
                twin.spoil(field)
        if draw.random() < 0.01:
            name = draw.choice(["a", "b", "c", "d", "nobody"]).encode()
            till.write_call(name, draw.choice(FOREIGN).encode("latin-1"))
            twin.calls[name] = None
        reply = till.send(
            what, who, draw.randint(0, 3), returned=not back, message=message, answered=answered
        )
        expected = twin.send(till.now, till.sent)
        assert [*reply[:4], till.silence, till.owed] == expected[:6]
        assert sorted(reply[4:]) == sorted(expected[6:])
        owes[bool(till.owed)] += 1
        if not message:
            till.out[who] += reply[0]
        kinds[reply[0]] += 1
    assert min(kinds[0], kinds[1]) > 300, kinds
    assert min(owes.values()) > 300, owes


# --- the slots of a replica


@pytest.fixture
async def pair(engine: StoreServer) -> AsyncIterator[tuple[SharedSlots, SharedSlots]]:
    """Two replicas on a budget that is quick, so that real time is short."""
    quick = Budget(rate=100, per=1, burst=4, max_wait=5)
    one, other = (Replica(engine.address, limits_of()) for _ in range(2))
    async with opened(one, beside=True), opened(other, beside=True):
        slots = one.slots(quick), other.slots(quick)
        for each in slots:
            await each.start()
        await eventually(lambda: len(engine.command("PUBSUB", "CHANNELS", "etb:*news")) == 1)
        await eventually(lambda: engine.command("PUBSUB", "NUMSUB", one.names.channel)[1] == 2)
        yield slots
        for each in slots:
            await each.close()
        assert one.errors == other.errors == {}


async def test_G4_two_replicas_take_turns(pair: tuple[SharedSlots, SharedSlots]) -> None:
    """Both at full demand for a second: as many calls as one budget allows, shared about evenly."""
    loop = asyncio.get_running_loop()
    began, taken = loop.time(), ([], [])

    async def demand(slots: SharedSlots, calls: list[float]) -> None:
        while loop.time() - began < 1:
            assert await slots.take(lambda: 3)
            calls.append(loop.time() - began)
            slots.settle()

    await asyncio.gather(*(demand(s, c) for s, c in zip(pair, taken, strict=True)))
    both = sorted([*taken[0], *taken[1]])
    for first, start in enumerate(both):  # 20 ms: late timers of a busy machine bunch calls
        for last in range(first, len(both)):
            assert last - first + 1 <= 4 + (both[last] - start + 0.02) * 100 + 1
    assert sum(map(len, taken)) > 50
    assert min(map(len, taken)) > 0.3 * sum(map(len, taken))


async def test_V1_a_pause_is_told_to_the_others_at_once(
    pair: tuple[SharedSlots, SharedSlots],
) -> None:
    """By message, before they ask: what they have reserved ahead is held back, too."""
    held: list[float] = []
    pair[1].on_pause(held.append)
    pair[0].pause(2.5)
    await eventually(lambda: held != [])
    assert 2 < held[0] <= 2.5  # what is left of it by the server
    reserved, wait = await pair[1]._reserve(1)
    assert not reserved or wait > 2
    assert held[-1] > 2


async def test_predictions_count_the_lines_of_others(
    pair: tuple[SharedSlots, SharedSlots],
) -> None:
    """A newcomer here stands behind as many of theirs as of ours."""
    loop = asyncio.get_running_loop()
    for _ in range(4):
        await pair[0]._reserve(10)
    await pair[1]._reserve(1)
    now = loop.time()
    alone = pair[0].predict(5, now, drained=False)
    shared = pair[1].predict(5, now, drained=False)
    assert shared - now > 0.1  # five of ours, six of theirs, one of us: at a hundred a second
    assert shared > alone
    assert pair[1].predict(0, now + 100, drained=False) >= now + 100


async def test_noise_is_no_news(pair: tuple[SharedSlots, SharedSlots]) -> None:
    """What cannot be read is passed over; a pause that the server knows nothing of is none."""
    held: list[float] = []
    pair[0].on_pause(held.append)
    for noise in (b"", b"paused ", b"paused 999", b"paused " + b"9" * 400, b"resumed 1", b"\xff"):
        pair[0].on_message(noise)
        assert not len(pair[0]._tasks)
    pair[0].on_message(b"paused")
    await eventually(lambda: not len(pair[0]._tasks))
    assert held == []


async def test_S5_without_the_server_a_replica_spends_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One part of three, from an empty bucket, once the others have noticed; then it comes back."""
    for module in (budget_module, fleet_module):
        monkeypatch.setattr(module, "ALONE_AFTER", 0.2)
    whole = Budget(rate=90, per=1, burst=9, max_wait=5)
    loop = asyncio.get_running_loop()
    with store_server(valkey_binary()) as server:
        replica = Replica(server.address, limits_of(), timeout=0.2, replicas=3)
        async with opened(replica, beside=True):
            slots = replica.slots(whole)
            await slots.start()
            assert await slots.take(lambda: 1)
            slots.settle()
            assert slots.shortage == "the vendor's budget is used up"
            server.kill()
            began, times = loop.time(), []
            while loop.time() - began < 1.0:
                assert await slots.take(lambda: 1)
                times.append(loop.time() - began)
                slots.settle()
            assert times[0] >= 0.2
            assert len(times) <= 3 + 30 * (1.0 - 0.2) + 2
            assert len(times) >= 8
            assert slots.shortage.startswith("the shared store is away, and this broker's share")
            for first, start in enumerate(times):
                for last in range(first, len(times)):
                    assert last - first + 1 <= 3 + (times[last] - start + 0.02) * 30 + 1
            server.start()
            replica.clock.advance(10)
            assert await slots.take(lambda: 1)
            assert slots._share.slots is None
            assert not replica.server.is_away


async def test_S1_closed_makes_no_call_without_the_server() -> None:
    """Nothing is taken alone; the first slot comes from the server that is back."""
    with store_server(valkey_binary()) as server:
        replica = Replica(server.address, limits_of(), timeout=0.2, on_error="closed")
        async with opened(replica):
            slots = replica.slots(Budget(rate=1000, per=1, burst=9, max_wait=5))
            await slots.start()
            server.kill()
            taking = asyncio.create_task(slots.take(lambda: 1))
            await asyncio.sleep(0.5)
            assert not taking.done()
            server.start()
            replica.clock.advance(10)
            await asyncio.wait_for(taking, 10)


budgets = st.builds(
    Budget,
    rate=st.floats(0.1, 10_000),
    per=st.sampled_from([1.0, 60.0, 3600.0]),
    burst=st.integers(1, 1000),
    max_wait=st.just(8.0),
)


@given(budget=budgets, replicas=st.integers(1, 200))
def test_S5_all_shares_of_a_budget_fit_its_window(budget: Budget, replicas: int) -> None:
    """In one `per` and in the vendor's minute all bursts and refills are no more than the whole's.

    Where that is less than one call for each there are no shares.
    """
    share = budget.share(replicas)
    assert budget.share(1) == budget
    if share is None:
        refill = budget.rate * min(60 / budget.per, 1)
        assert replicas > budget.burst + refill * 0.98
        return
    for window in (budget.per, 60.0):
        whole = budget.burst + budget.rate * window / budget.per
        together = replicas * (share.burst + share.rate * window / budget.per)
        assert together <= whole * (1 + 1e-9)
    assert share.rate > 0
    assert share.burst >= 1


def test_the_shipped_budget_in_shares() -> None:
    """Whatever the number of instances: never over 114 in a minute."""
    for replicas in range(1, 65):
        share = SHIPPED.share(replicas)
        assert share is not None
        assert replicas * (share.burst + share.rate) <= 114 + 1e-9
