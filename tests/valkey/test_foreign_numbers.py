"""N19, N22, N26: numbers in the store that nobody of ours wrote, or another version did.

Whatever it is and wherever it stands: no script fails, the budget is not exceeded, and all is as
before after the time in which a budget refills.
"""

import asyncio
from collections.abc import Iterator

import pytest
from budget_twin import Store
from foreign import FOREIGN
from replica import Replica, opened
from servers import StoreServer
from shared_store_cases import limits_of, request_of
from store_trace import Talk
from test_membership import House, everybody
from test_shared_budget import (
    AHEAD,
    BURST,
    DEPTH,
    FIELDS,
    INTERVAL,
    LONGEST_PAUSE,
    SHIPPED,
    Call,
    Till,
    _check_windows,
)
from test_shared_stalls import virtual

from broker.model import Session
from broker.sessions.base import Place, Query
from broker.valkey.budget_script import SILENT
from broker.valkey.client.scripts import command
from broker.valkey.membership import LOST

pytestmark = pytest.mark.parts

SECOND = 1_000_000
DAY = 86_400 * SECOND
HEALED = 2 * DEPTH + int(AHEAD * SECOND) + 2 * SECOND
"""Microseconds until calls are made again: as far as a budget is overdrawn, and two heartbeats."""

TURN = SECOND // 4


class Scene:
    """Two replicas who want every call that they can get; a call takes a second."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.till, self.house = Till(talk), House(talk)
        self.till.follows = True
        self.calls: list[Call] = []
        self._out: list[tuple[str, Call]] = []
        self.till.fill()
        self._turns = 0

    def run(self, us: int) -> int:
        """Let so much time pass; returns how many calls were reserved."""
        before, ends = len(self.calls), self.till.now + us
        while self.till.now < ends:
            self._turn()
        return len(self.calls) - before

    def first(self) -> int:
        """Let time pass until a call is made; returns how much."""
        began = self.till.now
        while not self.run(TURN):
            assert self.till.now - began < LONGEST_PAUSE
        return self.till.now - began

    def _turn(self) -> None:
        till = self.till
        for who, call in [each for each in self._out if each[1].made + SECOND <= till.now]:
            self._out.remove((who, call))
            call.over = till.now
            till.settle(who)
            till.answer(who)
        if self._turns % 4 == 0:
            self.house.now = self.house.clock = till.now
            for name in "ab":
                assert self.house.beat(name, era=till.era) is not None
                till.era = self.house.era.decode("latin-1")
        who = "ab"[self._turns % 2]
        reserved, wait, *_ = till.reserve(who, settled=False)
        assert 0 <= wait <= LONGEST_PAUSE + 4 * DEPTH + AHEAD * SECOND or not reserved
        if reserved:
            call = Call(till.now + wait, probe=False)
            self.calls.append(call)
            self._out.append((who, call))
        self._turns += 1
        till.now += TURN


@pytest.fixture
def talk(valkey: StoreServer) -> Iterator[Talk]:
    """A connection to an empty server."""
    valkey.flush()
    with Talk(valkey) as talk:
        yield talk


PLACES = [f"budget {field}" for field in ("era", "time", *FIELDS)]
PLACES += [f"{key} {name}" for key in ("calls", "queues", "members") for name in ("a", "nobody")]


def put(scene: Scene, place: str, value: str) -> None:
    """Write it there."""
    written = value.encode("latin-1")
    key, field = place.split()
    scene.talk.send([command(b"HSET", key.encode(), field.encode(), written)])


@pytest.mark.parametrize("place", PLACES)
def test_N26_a_foreign_number_neither_stops_a_budget_nor_unbounds_it(
    talk: Talk, place: str
) -> None:
    """Once: calls go on within the time that a budget refills, at the full rate, and no more."""
    for value in FOREIGN:
        scene = Scene(talk)
        scene.run(2 * SECOND)
        put(scene, place, value)
        assert scene.first() <= HEALED, value
        scene.run(5 * SECOND)
        assert scene.run(10 * SECOND) >= 10 * SECOND // INTERVAL * 3 // 4 - 1, value
        _check_windows(scene.calls, scene.till.now)
        talk.send([command(b"FLUSHALL")])


@pytest.mark.parametrize("place", PLACES)
def test_N26_foreign_numbers_again_and_again_unbound_no_budget(talk: Talk, place: str) -> None:
    """Every other second, for a minute: it may stand still meanwhile; it heals afterwards."""
    scene = Scene(talk)
    for value in FOREIGN * 2:
        put(scene, place, value)
        scene.run(2 * SECOND)
    _check_windows(scene.calls, scene.till.now)
    assert scene.first() <= HEALED


ENTRIES = {
    "calls": ("1 2 3 0 {now}", [0, 1, 2, 3, 4]),
    "queues": ("{now} 3", [0, 1]),
    "members": ("{now} who 4 {now}", [0, 2, 3]),
}
"""What a replica tells of itself, and which words of it are numbers."""


@pytest.mark.parametrize("name", ["a", "nobody"])
@pytest.mark.parametrize("key", ENTRIES)
def test_N26_one_foreign_number_among_others(talk: Talk, key: str, name: str) -> None:
    """Also one with digits only, in what is true otherwise: how many calls are out, or when."""
    form, places = ENTRIES[key]
    for place in places:
        for value in ["7" * 15, "9" * 16, "9" * 400, "1e18", "nan", ""]:
            scene = Scene(talk)
            scene.run(2 * SECOND)
            written = form.format(now=scene.till.now)
            if name == "a":
                (known,) = talk.send([command(b"HGET", key.encode(), b"a")])
                written = known.decode()
            words = written.split()
            words[place] = value
            put(scene, f"{key} {name}", " ".join(words))
            assert scene.first() <= HEALED + SILENT * SECOND, words
            scene.run(5 * SECOND)
            assert scene.run(10 * SECOND) >= 5, words
            _check_windows(scene.calls, scene.till.now)
            talk.send([command(b"FLUSHALL")])


def test_N26_a_replica_by_itself_goes_on_beyond_a_foreign_number_of_a_message(talk: Talk) -> None:
    """Nobody else is there to take it out: it holds for as long as a message may be overtaken."""
    till = Till(talk)
    till.fill()
    assert till.reserve("a")[0] == 1
    till.write_call(b"a", b"777777777777777 0 0 0 %d" % till.now)
    assert till.reserve("a")[0] == 0
    till.now += int(SILENT * SECOND) + 1
    assert till.reserve("a")[0] == 1


def test_N26_an_era_of_any_length_is_not_taken_over(talk: Talk) -> None:
    """It would be sent with every message of every replica, for ever."""
    till = Till(talk)
    till.fill()
    till.spoil("era", "x" * 65)
    till.send("tell", "a", 0)
    assert (till.era, till.told) == ("era", till.now)


@pytest.mark.parametrize("days", [2, 365, 80 * 365])
def test_N19_a_time_that_nobody_vouches_for_is_given_up(talk: Talk, days: int) -> None:
    """Over a day beyond what passed, and beyond the server's clock: another era begins.

    A newcomer may have believed it: what it vouches for is of the era that is over.
    """
    till = Till(talk)
    till.follows = True
    till.fill()
    till.settle(calls=0)
    far = till.now + days * DAY
    till.spoil("time", str(far))
    assert till.send("tell", "newcomer", 0, vouched=0)[0] == 0
    assert till.told == far
    till.send("tell", "a", 0)
    assert till.told == till.now
    assert till.era != "era"
    till.send("tell", "newcomer", 0, vouched=far + SECOND, era="era")
    assert till.told == till.now
    assert till.reserve("a", ahead=2**40)[1] <= HEALED


@pytest.mark.parametrize("step", [2 * DAY, -2 * DAY])
def test_N19_a_server_whose_clock_is_days_off_ends_no_era(talk: Talk, step: int) -> None:
    """Nor does a newcomer there: what replicas vouch for goes on."""
    till = Till(talk)
    till.fill()
    till.clock += step
    for who in ("a", "newcomer", "a"):
        till.send("tell", who, 0, vouched=0 if who == "newcomer" else None)
        assert till.told == till.now


@pytest.mark.parametrize("value", FOREIGN)
def test_N26_a_newcomer_at_a_lost_time_finds_no_burst(talk: Talk, value: str) -> None:
    """The server's clock is an hour ahead of the time that was lost: nothing has refilled."""
    till = Till(talk)
    till.follows = True
    till.fill()
    for _ in range(BURST):
        till.reserve("a")
    till.spoil("time", value)
    till.clock = till.now + 3600 * SECOND
    assert till.send("reserve", "newcomer", 1, vouched=0)[0] == 0


def test_N26_a_hold_over_what_is_foreign_lets_nothing_out(talk: Talk) -> None:
    """A correction of the vendor's is written beside it: the budget stays as strict."""
    for value in FOREIGN:
        till = Till(talk)
        till.fill()
        till.spoil("full_at", value)
        till.spoil("paused_until", value)
        assert till.hold(left=BURST) == 0
        assert till.hold(pause=SECOND) == SECOND
        assert till.reserve()[0] == 0


def test_N26_members_that_are_foreign_are_taken_out(talk: Talk) -> None:
    """Two have their third each, as if nothing had been there; a lost one keeps its own."""
    house = House(talk)
    for value in FOREIGN:
        house.lose_memory()
        everybody(house, "abc")
        house.write(b"nobody", value.encode("latin-1"))
        house.write(b"b", value.encode("latin-1"))
        everybody(house, "abcabc", 1)
        assert house.beat("a") == (4, 0, {"b": 4, "c": 4})
        assert house.entry(b"nobody") is None
        house.now += LOST
        assert house.beat("a") == (4, 500_000, {"b": 4, "c": 4})


def test_N26_a_prediction_that_refuses_everybody_is_asked_for_again() -> None:
    """One reading said that all is withheld, for hours; nobody is in line to learn better."""

    async def scene() -> None:
        store = Store(parts=2)
        slots = store.replica("a").slots(SHIPPED)
        await slots.start()
        await slots._fleet.beat()
        loop = asyncio.get_running_loop()
        store.twin.withheld = SECOND
        await slots._tell()
        assert slots.predict(0, loop.time(), drained=False) - loop.time() > 3600
        store.twin.withheld = 0
        for _ in range(HEALED // SECOND):
            await asyncio.sleep(1)
            await slots._fleet.beat()
        assert slots.predict(0, loop.time(), drained=False) - loop.time() <= SHIPPED.max_wait
        await slots.close()

    virtual(scene)


async def test_N26_a_list_with_places_that_nobody_has(valkey: StoreServer) -> None:
    """Sessions that expire never or before all time: what is ours is listed around them."""
    valkey.flush()
    async with opened(Replica(valkey.address, limits_of())) as replica:
        session_store, names = replica.shared_backend.sessions, replica.names
        now = replica.clock.wall() // SECOND
        made = [
            Session(f"s-{n}", "web", "A1", "beef", "", now, now + 600 + n, bytes([n]) * 32)
            for n in range(3)
        ]
        for session in made[:2]:
            await session_store.record(session)
        for score in ("inf", "-inf", "1e300", "-1", "1e18", "0.5"):
            valkey.command("ZADD", names.of_agent("A1"), score, f"x{score}")
        assert await session_store.page(Query(agent="A1"), Place(), 10) == made[:2]
        await session_store.record(made[2])
        assert await session_store.page(Query(agent="A1"), Place(), 10) == made
        assert valkey.command("ZCOUNT", names.of_agent("A1"), "1e17", "+inf") == 0
        assert replica.errors == {}


async def test_G9_an_end_over_a_foreign_epoch_ends(valkey: StoreServer) -> None:
    """Also over the largest number that is one of ours; whoever mints for that visitor goes on."""
    for value in [*FOREIGN, str(2**53 - 1), str(2**53), str(2**63 - 1)]:
        valkey.flush()
        request = request_of()
        async with opened(Replica(valkey.address, limits_of())) as replica:
            name = replica.names.visitor(request.visitor).epoch
            valkey.command("SET", name, value.encode("latin-1"))
            for _ in range(3):
                before = valkey.command("GET", name)
                await replica.store.revoke_visitor(request.client, request.fingerprint)
                assert valkey.command("GET", name) != before
                lease = await asyncio.wait_for(
                    replica.store.lead(request, request.key, lambda _token: False), 30
                )
                await replica.store.release(request, request.key, lease)
            assert replica.errors == {}
