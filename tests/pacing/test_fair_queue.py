"""V11: what start-time fair queueing guarantees, in slots, whatever anybody does.

The bounds are those of Goyal, Vin and Cheng, "Start-time Fair Queuing" (SIGCOMM 1996), theorems 1
and 4, with one slot as the length of every packet and equal shares.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from broker.pacing.fair_queue import FairQueue, Waiter
from broker.testing import FakeClock, run_virtual

CLIENTS = "abcde"
RANKS = 2


@dataclass
class Waiting:
    """One caller: what was served since they joined, by client."""

    place: Waiter
    served: Counter[str] = field(default_factory=Counter)


class Hall:
    """A line, and a count of what each who waits has seen.

    Clients in `greedy` ask again in the same moment in which they are served.
    """

    def __init__(self, greedy: str) -> None:
        self.line = FairQueue(RANKS)
        self.greedy = greedy
        self.waiting: list[Waiting] = []
        self.history: list[tuple[str, frozenset[str]]] = []
        self.overtaken: list[tuple[str, Waiting]] = []

    def join(self, client: str, rank: int = 0, callers: int = 1) -> None:
        for _ in range(callers):
            place = Waiter(client, rank, 0.0, asyncio.get_running_loop().create_future())
            self.line.join(place)
            self.waiting.append(Waiting(place))

    def leave(self, number: int) -> None:
        if self.waiting:
            gone = self.waiting.pop(number % len(self.waiting))
            self.line.leave(gone.place)

    def serve(self) -> None:
        backlogged = frozenset(one.place.client for one in self.waiting)
        place = self.line.next()
        if place is None:
            assert not self.waiting
            return
        self.history.append((place.client, backlogged))
        (gone,) = [one for one in self.waiting if one.place is place]
        self.waiting.remove(gone)
        self.overtaken.append((place.client, gone))
        for one in self.waiting:
            one.served[place.client] += 1
        if place.client in self.greedy:
            self.join(place.client, place.rank)


acts = st.lists(
    st.one_of(
        st.tuples(
            st.just("join"), st.sampled_from(CLIENTS), st.integers(0, RANKS - 1), st.integers(1, 5)
        ),
        st.tuples(st.just("leave"), st.integers(0, 100)),
        st.just(("serve",)),
        st.just(("serve",)),
    ),
    max_size=60,
)


def played(story: Sequence[tuple[object, ...]], greedy: str) -> Hall:
    """Act a story; at the end everybody who is left is served."""

    async def main(_clock: FakeClock) -> Hall:
        hall = Hall(greedy)
        parts: dict[object, Callable[..., None]] = {
            "join": hall.join,
            "leave": hall.leave,
            "serve": hall.serve,
        }
        for name, *arguments in story:
            parts[name](*arguments)
        hall.greedy = ""
        while hall.waiting:
            hall.serve()
        assert len(hall.line) == 0
        return hall

    return run_virtual(main)


@settings(deadline=None, max_examples=300)
@given(story=acts, greedy=st.sampled_from(["", "a", "ab", "abcd"]))
def test_V11_each_other_client_gets_two_slots_at_most_before_whoever_asks_once(
    story: Sequence[tuple[object, ...]], greedy: str
) -> None:
    """And one more for each slot that their own client got meanwhile, however much others ask.

    Also if the others ask again at once, or leave and come back.
    """
    for client, one in played(story, greedy).overtaken:
        own = one.served[client]
        for other, slots in one.served.items():
            assert other == client or slots <= own + 2, (client, other, one.served)


@settings(deadline=None, max_examples=300)
@given(story=acts, greedy=st.sampled_from(["", "a", "ab", "abcd"]))
def test_V11_two_clients_who_both_wait_get_the_same_to_within_two_slots(
    story: Sequence[tuple[object, ...]], greedy: str
) -> None:
    """In every stretch of time in which both always have somebody in line."""
    history = played(story, greedy).history
    for one in CLIENTS:
        for other in CLIENTS:
            if one < other:
                assert _widest(history, one, other) <= 2


def _widest(history: Sequence[tuple[str, frozenset[str]]], one: str, other: str) -> int:
    """Return the largest difference of what two clients got while both had somebody waiting."""
    widest, balance = 0, [0]
    for served, backlogged in history:
        if not {one, other} <= backlogged:
            balance = [0]
            continue
        balance.append(balance[-1] + (served == one) - (served == other))
        widest = max(widest, max(balance) - min(balance))
    return widest


@settings(deadline=None, max_examples=100)
@given(story=acts, newcomer=st.sampled_from(CLIENTS), rank=st.integers(0, RANKS - 1))
def test_V11_nobody_is_served_later_than_was_predicted(
    story: Sequence[tuple[object, ...]], newcomer: str, rank: int
) -> None:
    """`ahead_of` is what a Retry-After is made of, if nobody else comes.

    Exact where one's client has nobody in line; otherwise its older ones may win a tie for it.
    """

    async def main(_clock: FakeClock) -> None:
        hall = Hall("")
        for name, *arguments in story:
            getattr(hall, str(name))(*arguments)
        ahead = hall.line.ahead_of(newcomer, rank)
        hall.join(newcomer, rank)
        mine = hall.waiting[-1]
        alone = sum(one.place.client == newcomer for one in hall.waiting) == 1
        for _ in range(ahead):
            hall.serve()
            assert mine in hall.waiting or not alone
        hall.serve()
        assert mine not in hall.waiting

    run_virtual(main)


def test_V11_one_who_asks_again_at_once_takes_turns_with_those_who_wait() -> None:
    """To leave the line for a moment earns nobody a better place in it."""

    async def main(_clock: FakeClock) -> list[str]:
        hall = Hall("a")
        hall.join("a")
        for client in "bcbcbc":
            hall.join(client)
        for _ in range(9):
            hall.serve()
        return [client for client, _ in hall.history]

    order = run_virtual(main)
    assert [sorted(order[start : start + 3]) for start in (0, 3, 6)] == [list("abc")] * 3


def test_V11_a_newcomer_does_not_make_up_for_the_time_before_it_came() -> None:
    """Whoever comes late with many gets their part from now on, not what others had before."""

    async def main(_clock: FakeClock) -> Counter[str]:
        hall = Hall("ab")
        hall.join("a", callers=3)
        hall.join("b", callers=3)
        for _ in range(20):
            hall.serve()
        hall.join("c", callers=20)
        before = len(hall.history)
        for _ in range(12):
            hall.serve()
        return Counter(client for client, _ in hall.history[before:])

    got = run_virtual(main)
    assert max(got.values()) - min(got.values()) <= 2, got
