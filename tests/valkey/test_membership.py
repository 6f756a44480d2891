"""S5: who is there, whose share is withheld, and what each may spend by itself."""

import asyncio
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replica import Replica, at_given_time, opened
from servers import StoreServer
from shared_store_cases import limits_of
from store_trace import Talk
from structlog.testing import capture_logs

from broker.testing import FakeClock
from broker.valkey.client.errors import Reason, StoreFailed
from broker.valkey.client.scripts import Script, command
from broker.valkey.fleet_time import KEPT, FleetTime
from broker.valkey.membership import ALONE_AFTER, FORGOTTEN, HEARTBEAT, LOST

pytestmark = pytest.mark.parts

SECOND = 1_000_000
THIRD = 333_334
"""A share is withheld in millionths.  Of two members each has a third: one is left over."""


class House:
    """The members' table on a server, at a time that the test says."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._script = talk.load(at_given_time(Script.HEARTBEAT.source))
        self.now = 1_790_000_000_000_000
        self.clock = self.now

    def beat(
        self, name: str, *, drawn: str = "", said: bool = True, fixed: int = 0,
        unheard: bool = False, era: str = "era", vouched: int | None = None, **known: int,
    ) -> tuple[int, int, dict[str, int]] | None:  # fmt: skip
        """Say that a member is there; returns its parts, withheld, and who else: None if taken."""
        parts = [part for other in known.items() for part in map(str, other)]
        arguments = [name, drawn or f"of-{name}", str(int(said)), str(LOST), str(FORGOTTEN)]
        arguments += [str(fixed), era, str(self.now if vouched is None else vouched)]
        arguments += [str(int(unheard)), *parts, str(self.clock)]
        (reply,) = self._talk.send(
            [
                command(
                    b"EVALSHA", self._script, b"2", b"members", b"budget",
                    *(argument.encode("latin-1") for argument in arguments),
                )
            ]
        )  # fmt: skip
        assert isinstance(reply, list), reply
        if reply == [0]:
            return None
        _, parts_, withheld, self.era, self.told, *others = reply
        return (
            parts_,
            withheld,
            {n.decode(): r for n, r in zip(others[::2], others[1::2], strict=True)},
        )

    def withheld(self) -> int:
        """Return what the budget knows of it."""
        (told,) = self._talk.send([command(b"HGET", b"budget", b"withheld")])
        return int(told)

    def leave(self, name: str) -> None:
        """Say farewell."""
        self._talk.send([command(b"HDEL", b"members", name.encode())])

    def forget_time(self) -> None:
        """Lose the fleet's time."""
        self._talk.send([command(b"HDEL", b"budget", b"era", b"time")])

    def entry(self, name: bytes) -> bytes | None:
        """Return what is written of a member."""
        (written,) = self._talk.send([command(b"HGET", b"members", name)])
        assert written is None or isinstance(written, bytes)
        return written

    def write(self, name: bytes, value: bytes) -> None:
        """Write what no replica writes."""
        self._talk.send([command(b"HSET", b"members", name, value)])

    def lose_memory(self) -> None:
        """Forget everything but the scripts."""
        self._talk.send([command(b"FLUSHALL")])


@pytest.fixture
def house(valkey: StoreServer) -> Iterator[House]:
    """An empty table."""
    valkey.flush()
    with Talk(valkey) as talk:
        yield House(talk)


def everybody(house: House, names: str, times: int = 3) -> None:
    """Let members come by until all have equal parts."""
    for round_ in range(times):
        for name in names:
            house.beat(name, said=round_ > 0)


def test_members_are_counted(house: House) -> None:
    """Equal parts, and one is left over for whoever comes next: a newcomer has one at once."""
    assert house.beat("a", said=False) == (2, 0, {})
    assert house.beat("b", said=False) == (3, 0, {"a": 2})
    assert house.beat("a") == (3, 0, {"b": 3})
    assert house.beat("b") == (3, 0, {"a": 3})
    assert house.beat("c", said=False) == (4, 0, {"a": 3, "b": 3})
    everybody(house, "abc", 2)
    assert house.beat("c") == (4, 0, {"a": 4, "b": 4})


def test_S5_who_comes_after_a_fleet_that_died_has_something_to_begin_with(house: House) -> None:
    """Killed, and started anew under other names: half, a quarter, an eighth."""
    for generation, left in enumerate([1, 0.5, 0.25, 0.125]):
        parts, withheld, _ = house.beat(f"new-{generation}", said=False) or (0, 0, {})
        assert 1 - withheld / 1_000_000 == pytest.approx(left, abs=1e-5)
        assert parts == 2 / left
        house.now += LOST


def test_S5_a_silent_members_share_is_withheld(house: House) -> None:
    """From three seconds of silence on, not before: it may go on by itself, as one of three."""
    everybody(house, "ab")
    house.now += LOST - 1
    assert house.beat("a") == (3, 0, {"b": 3})
    house.now += 1
    assert house.beat("a") == (3, THIRD, {"b": 3})
    assert house.withheld() == THIRD
    house.now += 600 * SECOND
    assert house.beat("a") == (3, THIRD, {"b": 3})
    assert house.beat("b") == (3, 0, {"a": 3})
    assert house.withheld() == 0


def test_S5_a_farewell_gives_the_share_back_at_once(house: House) -> None:
    """A deploy must not cost budget."""
    everybody(house, "ab")
    house.leave("b")
    assert house.beat("a") == (2, 0, {})


def test_S5_a_lost_member_is_forgotten_after_an_hour(house: House) -> None:
    """A machine that never comes back costs its share for that long."""
    everybody(house, "ab")
    for _ in range(FORGOTTEN // SECOND // 100):
        house.now += 100 * SECOND
        assert house.beat("a") == (3, THIRD, {"b": 3})
    house.now += 1
    assert house.beat("a") == (2, 0, {})


def test_S5_who_is_left_counts_with_the_share_that_is_withheld(house: House) -> None:
    """Two of three are lost one after the other: all that go on alone have one whole together."""
    everybody(house, "abc")
    house.now += LOST
    house.beat("a")  # lost for a moment, as b is
    house.beat("b")
    assert house.beat("a") == (4, 250_000, {"b": 4, "c": 4})
    house.now += LOST
    assert house.beat("b") == (4, 500_000, {"a": 4, "c": 4})


def test_S5_all_shares_never_exceed_the_whole(house: House) -> None:
    """However members come, fall silent, leave and return, at every moment.

    Whoever is cut off takes what it was told last; those are the shares that count.
    """
    names = "abcdef"
    moves = st.tuples(st.sampled_from(names), st.booleans(), st.sampled_from([0, SECOND, LOST]))

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(history=st.lists(moves, max_size=60))
    def check(history: list[tuple[str, bool, int]]) -> None:
        house.lose_memory()
        told: dict[str, int] = {}
        for name, leaves, gap in history:
            house.now += gap
            if leaves and name in told:
                house.leave(name)
                del told[name]
                continue
            answer = house.beat(name, said=name in told)
            assert answer is not None
            told[name] = answer[0]
            assert sum(1 / parts for parts in told.values() if parts) <= 1 + 1e-5

    check()


def test_O8_a_process_started_again_in_the_same_place_takes_the_share(house: House) -> None:
    """-9 and a restart: what was withheld is not, and the dead one is not counted."""
    everybody(house, "ab")
    house.now += LOST
    assert house.beat("a") == (3, THIRD, {"b": 3})
    assert house.beat("b", drawn="new", said=False) == (3, 0, {"a": 3})
    assert house.beat("a") == (3, 0, {"b": 3})
    assert house.beat("b", drawn="new") == (3, 0, {"a": 3})


def test_two_processes_with_one_name_do_not_count_as_one(house: House) -> None:
    """The one that was there first is told, when the second has taken its name."""
    house.beat("a", said=False)
    assert house.beat("a", drawn="second", said=False) is not None
    assert house.beat("a") is None
    assert house.beat("a", drawn="second") == (2, 0, {})
    assert house.beat("another name", said=False) is not None


def test_S5_a_server_that_lost_its_memory_is_told(house: House) -> None:
    """Of everybody that was known, also of a lost one; nobody's name counts as taken for it."""
    everybody(house, "abc")
    house.now += LOST
    everybody_again = [house.beat(name) for name in "abab"]
    assert everybody_again[-1] == (4, 250_000, {"a": 4, "c": 4})
    house.lose_memory()
    assert house.beat("a", b=4, c=4) == (4, 500_000, {"b": 4, "c": 4})
    assert house.beat("b", a=4, c=4) == (4, 250_000, {"a": 4, "c": 4})
    assert house.beat("a", b=4, c=4) == (4, 250_000, {"b": 4, "c": 4})


def test_S5_who_left_is_not_brought_back_by_one_who_did_not_hear_of_it(house: House) -> None:
    """A heartbeat that tells of members does so only to a server that does not know its sender."""
    everybody(house, "ab")
    house.leave("b")
    assert house.beat("a", b=3) == (2, 0, {})


@pytest.mark.parametrize("step", [86_400 * SECOND, -86_400 * SECOND])
def test_N19_steps_of_the_servers_clock_lose_and_forget_nobody(house: House, step: int) -> None:
    """Silence is measured by the fleet's own time: lost after three seconds, then withheld."""
    everybody(house, "ab")
    for _ in range(5):
        house.clock += step
        assert house.beat("a") == (3, 0, {"b": 3})
    house.now += LOST
    for _ in range(5):
        house.clock += step
        assert house.beat("a") == (3, THIRD, {"b": 3})


def test_T5_who_was_seen_in_another_time_is_lost_three_seconds_later(house: House) -> None:
    """The fleet's time began anew, a day back: what is in the future counts from now."""
    everybody(house, "ab")
    house.forget_time()
    house.now -= 86_400 * SECOND
    assert house.beat("a") == (3, 0, {"b": 3})
    house.now += LOST
    assert house.beat("a") == (3, THIRD, {"b": 3})


def test_N18_who_is_not_answered_keeps_no_share_from_being_withheld(house: House) -> None:
    """Its heartbeats are heard, their answers are not: it may spend its share all the same."""
    everybody(house, "ab")
    house.beat("b", unheard=True)
    assert house.beat("a") == (3, THIRD, {"b": 3})
    house.beat("b")
    assert house.beat("a") == (3, 0, {"b": 3})


def test_N18_a_heartbeat_that_was_kept_for_a_while_is_as_old_as_it_is(house: House) -> None:
    """A server that stood still answers what came before: its sender has been alone since."""
    everybody(house, "ab")
    sent = house.now
    house.now += 60 * SECOND
    house.beat("a")
    house.beat("b", vouched=sent)
    assert house.beat("a") == (3, THIRD, {"b": 3})


def test_N24_who_comes_when_nothing_is_left_has_no_share(house: House) -> None:
    """Not a thousandth for each: a thousand of them would be another budget."""
    for generation in range(40):
        assert house.beat(f"new-{generation}", said=False) is not None
        house.now += LOST
    assert [house.beat(f"late-{number}", said=False) for number in range(3)] != []
    told = [house.beat(f"late-{number}") for number in range(3)]
    assert [answer and answer[0] for answer in told] == [0, 0, 0]


def test_N24_one_more_than_configured_has_no_share(house: House) -> None:
    """`replicas = 2`, and a third comes: two keep theirs, it has none till one leaves."""
    for name in "abab":
        assert (house.beat(name, said=name == "x", fixed=2) or (0,))[0] == 2
    assert house.beat("c", said=False, fixed=2) == (0, 0, {"a": 2, "b": 2})
    assert (house.beat("a", fixed=2) or (0,))[0] == 2
    house.leave("b")
    assert house.beat("c", fixed=2) == (2, 0, {"a": 2})


def test_N24_of_a_configured_number_no_more_are_lost_than_are_missing(house: House) -> None:
    """Killed, and started under other names: both live, so the dead spend nothing."""
    for name in ("a", "b", "c", "d"):
        house.beat(name, said=False, fixed=2)
        if name == "b":
            house.now += LOST
    assert house.beat("c", fixed=2) == (2, 0, {"a": 2, "b": 2, "d": 2})
    house.now += LOST
    assert (house.beat("c", fixed=2) or (0, 0))[1] == 500_000


def test_what_nobody_of_ours_wrote_is_taken_out(house: House) -> None:
    """Names and values of any form, from the far future too: nobody's heartbeat fails for them."""
    house.beat("a", said=False)
    for name, value in ((b"\xff", b"x"), (b"n", b""), (b"neg", b"1 x -1")):
        house.write(name, value)
    assert house.beat("a") == (2, 0, {})
    house.write(b"future", b"9999999999999999 x 4")
    assert house.beat("a") == (3, 0, {"future": 4})
    house.now += LOST
    assert house.beat("a") == (3, 250_000, {"future": 4})


def test_a_configured_number_is_the_share(house: House) -> None:
    """`replicas = 5`: a lost one costs a fifth, however many were seen."""
    for name in "ab":
        house.beat(name, said=False, fixed=5)
    house.now += LOST
    assert house.beat("a", fixed=5) == (5, 200_000, {"b": 5})


async def test_a_replica_tells_and_learns(valkey: StoreServer) -> None:
    """Through the real thing: count, share of those who are lost, farewell."""
    valkey.flush()
    clock = FakeClock()
    one, other = (
        Replica(valkey.address, limits_of(), clock=clock, now=clock.wall) for _ in range(2)
    )
    async with opened(one), opened(other):
        for _ in range(3):
            await one.fleet.beat()
            await other.fleet.beat()
        assert (one.fleet.replicas, other.fleet.replicas) == (2, 2)
        assert one.fleet.is_member
        clock.advance(LOST / SECOND)
        await one.fleet.beat()
        assert one.fleet.withheld == THIRD / 1_000_000
        assert (one.fleet.parts, one.fleet.replicas) == (3, 2)  # a third is another's
        await other.fleet.leave()
        await one.fleet.beat()
        assert (one.fleet.replicas, one.fleet.withheld) == (1, 0.0)


async def test_a_name_that_is_taken_is_given_up(valkey: StoreServer) -> None:
    """The second process of one name counts; both are members a heartbeat later."""
    valkey.flush()
    async with opened(Replica(valkey.address, limits_of(), place="same")) as one:
        await one.fleet.beat()
        async with opened(Replica(valkey.address, limits_of(), place="same")) as other:
            await other.fleet.beat()
            with capture_logs() as told:
                for _ in range(4):
                    await one.fleet.beat()
                    await other.fleet.beat()
            assert (one.fleet.replicas, other.fleet.replicas) == (2, 2)
            assert [event["event"] for event in told] == ["broker.name_taken"]


async def test_a_flushed_server_learns_of_everybody_again(valkey: StoreServer) -> None:
    """No heartbeat failed, and nobody's name is taken from it."""
    valkey.flush()
    async with (
        opened(Replica(valkey.address, limits_of())) as one,
        opened(Replica(valkey.address, limits_of())) as other,
    ):
        for _ in range(3):
            await one.fleet.beat()
            await other.fleet.beat()
        names = one.fleet._name, other.fleet._name
        valkey.flush()
        await one.fleet.beat()
        await other.fleet.beat()
        await one.fleet.beat()
        assert (one.fleet._name, other.fleet._name) == names
        assert (one.fleet.replicas, other.fleet.replicas) == (2, 2)
        assert one.fleet.withheld == 0


async def test_N18_who_is_answered_again_is_no_longer_taken_for_lost(
    valkey: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three heartbeats without an answer, then one with: the next one says that all is well."""
    valkey.flush()
    one, other = (Replica(valkey.address, limits_of()) for _ in range(2))

    async def silence(*_call: object) -> None:
        raise StoreFailed(Reason.TIMEOUT)

    async with opened(one), opened(other):
        for _ in range(3):
            await one.fleet.beat()
            await other.fleet.beat()
        with monkeypatch.context() as patch:
            patch.setattr(one.server, "run", silence)
            for _ in range(3):
                await one.fleet.beat()
        await one.fleet.beat()
        await other.fleet.beat()
        assert other.fleet.withheld > 0, "it may be spending its share"
        await one.fleet.beat()
        await other.fleet.beat()
        assert (other.fleet.withheld, other.fleet.replicas) == (0.0, 2)


def test_N19_what_another_era_told_vouches_for_nothing_in_this_one() -> None:
    """A store that lost its memory begins at another number: a larger one must not come back."""
    clock = FakeClock()
    fleet_time = FleetTime(b"newborn", clock.mono)
    assert fleet_time.vouched() == (b"newborn", b"0")
    fleet_time.learn(b"before", 1000 * SECOND)
    fleet_time.learn(b"after", 5 * SECOND)
    clock.advance(1)
    assert fleet_time.vouched() == (b"after", b"%d" % (6 * SECOND))


def test_N19_of_what_was_told_lately_the_furthest_is_vouched_for() -> None:
    """A reply that was long on its way leads less far: what was told before it counts on."""
    clock = FakeClock()
    fleet_time = FleetTime(b"newborn", clock.mono)
    fleet_time.learn(b"era", 100 * SECOND)
    clock.advance((KEPT + 1) / SECOND)
    fleet_time.learn(b"era", 101 * SECOND)
    assert fleet_time.vouched() == (b"era", b"%d" % (100 * SECOND + KEPT + 1))


def test_the_numbers_fit_each_other() -> None:
    """Others notice before a lost member spends, and two late heartbeats lose nobody."""
    assert 2 * HEARTBEAT * SECOND < LOST
    assert LOST / SECOND + HEARTBEAT < ALONE_AFTER


async def test_S3_who_is_not_heard_is_degraded_whatever_the_breaker_says(
    valkey: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other calls may go well: without heartbeats the others take it for lost, and withhold."""
    valkey.flush()
    async with opened(Replica(valkey.address, limits_of())) as replica:
        assert replica.shared_backend.is_degraded
        await replica.fleet.beat()
        assert not replica.shared_backend.is_degraded
        later = time.monotonic() + LOST / SECOND
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: later)
        assert replica.shared_backend.is_degraded
        assert not replica.server.is_away
