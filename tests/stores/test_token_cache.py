"""Tokens held for reuse: bounded, gone when dead, and counted truthfully."""

import gc
import random
import secrets
import sys
import tracemalloc

import pytest
from cachetools import LRUCache
from hypothesis import given
from hypothesis import strategies as st

from broker.model import EmbedToken, Minted, TokenRequest
from broker.stores.token_cache import FREED_AT_ONCE, SECOND_CHANCES, SLICE, TokenCache
from broker.tables import PART, SPARSE
from broker.testing import FakeClock
from broker.wire import responses as answers_module
from broker.wire.responses import success_body

SECOND = 1_000_000
OUTAGE = 60 * SECOND
HOUR = 3600 * SECOND


def held(clock: FakeClock, lifetime: int = HOUR, body: bytes = b"{}") -> EmbedToken:
    """Make a token whose mint begins now."""
    return EmbedToken(
        body=body,
        dies_mono=clock.mono() + lifetime,
        dies_wall=clock.wall() + lifetime,
        lifetime=lifetime,
        mark=lifetime // 8,
    )


@pytest.fixture
def clock() -> FakeClock:
    """Give the cache its time."""
    return FakeClock()


def cache_of(clock: FakeClock, maxsize: int = 100) -> TokenCache:
    """Make a cache that keeps tokens as the broker does: down to the floor in an outage."""
    return TokenCache(maxsize, keep_until=lambda token: token.dies_mono - OUTAGE, mono=clock.mono)


def test_what_is_held_is_found_unchanged(clock: FakeClock) -> None:
    """The very object, as often as it is asked for; of another key nothing."""
    cache, token = cache_of(clock), held(clock)
    cache["Key"] = token
    assert cache.find("Key") is token
    assert cache.find("Key") is token
    assert cache.find("key") is None
    assert cache.find("") is None


def test_T8_a_token_is_found_to_the_last_microsecond_it_may_be_kept(clock: FakeClock) -> None:
    """One tick before the floor in an outage it is there, at it it is not."""
    cache = cache_of(clock)
    cache["key"] = held(clock)
    clock.advance(3540 - 0.000_001)
    assert cache.find("key") is not None
    clock.advance(0.000_001)
    assert cache.find("key") is None
    assert len(cache) == 0
    assert (cache.counts.evicted.value, cache.counts.expired.value) == (0, 1)


def test_G11_what_is_restored_is_held_as_if_it_had_come_one_by_one(clock: FakeClock) -> None:
    """The same part by part, the oldest in front; what is dead is not; all of it goes in time."""
    lives = [HOUR, 2 * OUTAGE, OUTAGE, 3 * OUTAGE + 1, HOUR, 1]
    tokens = {f"{number}": held(clock, lives[number % len(lives)]) for number in range(60)}
    there, here = cache_of(clock), cache_of(clock)
    for key, token in tokens.items():
        there[key] = token
    here.restore(tokens.items())
    for moment in (0, 60, 120, 3540):
        clock.advance(moment)
        while there.expire(clock.mono()) | here.expire(clock.mono()):
            pass
        assert [list(part) for part in here._tokens.parts] == [
            list(part) for part in there._tokens.parts
        ]
        assert len(here) == len(there)
        assert len(here._due) == len(there._due)
        assert here._near == there._near
    assert len(here) == 0


def test_T8_a_short_token_does_not_keep_a_long_one_beyond_its_floor(clock: FakeClock) -> None:
    """Floors differ: one that came later, with a smaller floor, says nothing of those before."""
    cache = TokenCache(
        100, keep_until=lambda token: token.dies_mono - token.lifetime // 60, mono=clock.mono
    )
    cache["long"] = held(clock)
    cache["short"] = held(clock, 60 * SECOND)
    clock.advance(3540 - 0.000_001)
    assert cache.find("long") is not None
    clock.advance(0.000_001)
    assert cache.find("long") is None


@pytest.mark.parametrize("lifetime", [0, 1, SECOND, OUTAGE])
def test_T7_a_token_that_is_dead_on_arrival_is_not_held(clock: FakeClock, lifetime: int) -> None:
    """It is no error, takes no room and pushes nobody out."""
    cache = cache_of(clock, maxsize=1)
    cache["key"] = living = held(clock)
    cache["other"] = held(clock, lifetime)
    assert cache.find("other") is None
    assert cache.find("key") is living
    assert (len(cache), cache.counts.evicted.value, cache.counts.expired.value) == (1, 0, 0)


def test_T7_what_is_dead_on_arrival_replaces_what_was_held(clock: FakeClock) -> None:
    """The older token of the same key is not handed out again."""
    cache = cache_of(clock)
    cache["key"] = held(clock)
    cache["key"] = held(clock, 0)
    assert cache.find("key") is None
    assert len(cache) == 0


def test_M2_at_capacity_overwriting_evicts_nobody(clock: FakeClock) -> None:
    """A renewal takes the place of its own predecessor, ten times over."""
    cache = cache_of(clock, maxsize=3)
    for key in "abc":
        cache[key] = held(clock)
    for number in range(10):
        cache["b"] = held(clock, body=str(number).encode())
    assert [cache.find(key) is not None for key in "abc"] == [True] * 3
    found = cache.find("b")
    assert found is not None
    assert found.body == b"9"
    assert (len(cache), cache.counts.evicted.value, cache.counts.expired.value) == (3, 0, 0)


def test_at_capacity_the_least_recently_used_one_goes(clock: FakeClock) -> None:
    """Asking for a token keeps it; who has not been asked for longest makes room, counted."""
    cache = cache_of(clock, maxsize=3)
    for key in "abc":
        cache[key] = held(clock)
    cache.find("a")
    cache["d"] = held(clock)
    cache["e"] = held(clock)
    assert [cache.find(key) is not None for key in "abcde"] == [True, False, False, True, True]
    assert (len(cache), cache.counts.evicted.value, cache.counts.expired.value) == (3, 2, 0)


def test_M2_the_dead_make_room_before_the_living(clock: FakeClock) -> None:
    """A full cache of expired tokens evicts nobody; they are counted by their age."""
    cache = cache_of(clock, maxsize=3)
    for key in "abc":
        cache[key] = held(clock, OUTAGE + SECOND)
    clock.advance(1)
    for key in "def":
        cache[key] = held(clock)
    assert [cache.find(key) is not None for key in "abcdef"] == [False] * 3 + [True] * 3
    assert (len(cache), cache.counts.evicted.value, cache.counts.expired.value) == (3, 0, 3)


def test_M1_the_dead_go_by_themselves_whenever_in_a_second_they_die(clock: FakeClock) -> None:
    """Nobody asks for them again: at the next whole second housekeeping has dropped them all."""
    cache = cache_of(clock)
    for number in range(10):
        cache[str(number)] = held(clock, OUTAGE + number * SECOND // 10 + 1)
    clock.advance(0.95)
    cache.expire(clock.mono())
    clock.advance(0.05)
    cache.expire(clock.mono())
    assert (len(cache), cache.counts.expired.value) == (0, 10)


steps = st.tuples(
    st.sampled_from(["put", "put", "put", "find", "discard", "pass", "expire", "clear"]),
    st.integers(0, 8),
    st.sampled_from([0, 1, SECOND, 2 * SECOND, 3 * SECOND + 1, HOUR]),
)


@given(st.lists(steps, max_size=80))
def test_M1_a_key_is_noted_as_long_as_its_token_is_held(
    taken: list[tuple[str, int, int]],
) -> None:
    """However tokens leave, early, late, renewed or pushed out: one note for each, and no other."""
    clock = FakeClock()
    cache = cache_of(clock, maxsize=5)
    for step, number, life in taken:
        key = str(number)
        match step:
            case "put":
                cache[key] = held(clock, OUTAGE + life)
            case "find":
                cache.find(key)
            case "discard":
                cache.discard(key)
            case "pass":
                clock.advance(life / SECOND)
            case "expire":
                cache.expire(clock.mono())
            case _:
                cache.clear()
        noted = [key for part in cache._due.parts for key in part]
        assert len(cache._due) == len(noted) == len(cache) <= 5
        assert set(noted) == {key for key, _ in cache._tokens.items()}


@pytest.mark.parametrize("names", [1, 1_000_000])
def test_M1_tokens_that_come_and_go_leave_nothing_behind(clock: FakeClock, names: int) -> None:
    """A broker that runs for months: a token that was renewed or pushed out goes at once.

    Nothing of it stays for the rest of its hour.
    """
    cache = cache_of(clock, maxsize=100)
    for number in range(50_000):
        cache[str(number % names)] = held(clock)
        clock.advance(0.001)
        if number % 7 == 0:
            cache.discard(str(number % names))
    assert len(cache._due) == len(cache) <= 100
    assert sum(map(sys.getsizeof, cache._due.parts)) <= 2 * SPARSE * 100


def test_a_cache_that_is_emptied_frees_what_it_held_by_and_by(clock: FakeClock) -> None:
    """With a key that was taken out all of its tokens go: at once for who asks, without a pause."""
    cache = cache_of(clock, maxsize=10_000)
    for number in range(5000):
        cache[str(number)] = held(clock)
    cache.clear()
    assert (len(cache), cache.find("1"), len(cache._due)) == (0, None, 0)
    cache["new"] = held(clock)
    rounds = 1
    while cache.expire(clock.mono()):
        rounds += 1
    assert rounds == 2 * 5000 // SLICE
    assert not cache._leftovers
    assert cache.find("new") is not None
    assert (cache.counts.evicted.value, cache.counts.expired.value) == (0, 0)


def test_a_step_of_housekeeping_is_bounded(clock: FakeClock) -> None:
    """Many tokens that die in one second go a slice at a time; newcomers free some, too."""
    cache = cache_of(clock, maxsize=20_000)
    for number in range(10 * SLICE):
        cache[str(number)] = held(clock, OUTAGE + SECOND)
    clock.advance(1)
    for step in range(1, 10):
        assert cache.expire(clock.mono())
        assert len(cache) == (10 - step) * SLICE
    cache["new"] = held(clock)
    assert len(cache) == SLICE - FREED_AT_ONCE + 1
    assert not cache.expire(clock.mono())
    assert len(cache) == 1


def test_a_newcomer_passes_over_a_bounded_number_that_are_in_use(clock: FakeClock) -> None:
    """Everything is in use, and something has to go: the search has an end, and finds one."""
    cache = cache_of(clock, maxsize=1000)
    for number in range(1000):
        cache[str(number)] = held(clock)
        cache.find(str(number))
    cache["new"] = held(clock)
    still_marked = sum(cache._used)  # but for the few that share a byte
    assert 900 < 1000 - SECOND_CHANCES - 20 < still_marked <= 1000 - SECOND_CHANCES
    assert (len(cache), cache.counts.evicted.value) == (1000, 1)
    assert cache.find("new") is not None


def test_who_is_in_use_is_kept_nearly_as_by_an_exact_order_of_use(clock: FakeClock) -> None:
    """Few visitors ask often: at most a hundredth of the hits of cachetools' LRU are missing."""
    chance = random.Random(7)
    ours, theirs = cache_of(clock, maxsize=2000), LRUCache[str, bool](2000)
    token, hits, exact, asked = held(clock), 0, 0, 100_000
    for _ in range(asked):
        key = str(int(20_000 * chance.random() ** 4))
        if ours.find(key) is not None:
            hits += 1
        else:
            ours[key] = token
        if theirs.get(key):
            exact += 1
        else:
            theirs[key] = True
    assert 0.4 * asked < exact < 0.9 * asked
    assert hits > exact - asked // 100


def test_T5_neither_clock_makes_a_token_outlive_its_hour(clock: FakeClock) -> None:
    """What the cache still holds when the monotonic clock stalled says itself that it is over.

    A wall clock that goes back an hour changes nothing: the cache lets go in time.
    """
    cache = cache_of(clock)
    cache["key"] = held(clock)
    clock.step_wall(-3600)
    clock.advance(3540)
    assert cache.find("key") is None
    cache["key"] = held(clock)
    clock.step_wall(3600)
    stalled = cache.find("key")
    assert stalled is not None
    assert stalled.left(clock.mono(), clock.wall()) == 0


def test_M1_the_gauges_equal_the_truth_after_random_operations(clock: FakeClock) -> None:
    """Two hundred thousand finds, renewals, floods and pauses against a model without a bound.

    What is found is what was put there last, never a dead one; what is missing was evicted.
    """
    chance = random.Random(5)
    bound = 400
    cache = cache_of(clock, maxsize=bound)
    model: dict[str, EmbedToken] = {}
    came = missing = expired = 0
    for number in range(200_000):
        if number % 97 == 0:
            clock.advance(chance.choice([0, 0, 1, 5, 40]))
            over = {key for key, token in model.items() if clock.mono() >= token.dies_mono - OUTAGE}
            expired += sum(key in cache._tokens for key in over)
            while cache.expire(clock.mono()):
                pass
            model = {key: token for key, token in model.items() if key not in over}
        key = f"key{int(1500 * chance.random() * chance.random())}"
        if chance.random() < 0.6:
            found = cache.find(key)
            assert found is None or found is model[key]
            missing += found is None and model.pop(key, None) is not None
        else:
            came += key not in cache._tokens
            cache[key] = model[key] = held(clock, OUTAGE + chance.randrange(1, 900) * SECOND)
        if number % 1009 == 0:
            assert len(cache) == len(cache._due) == len(cache._tokens) <= bound
    assert dict(cache._tokens.items()).items() <= model.items()
    counts = cache.counts
    assert counts.expired.value == expired
    assert len(cache) == came - counts.evicted.value - expired
    assert missing > 1000
    assert expired > 1000


def test_M1_an_answer_takes_no_more_memory_than_its_bytes() -> None:
    """Whatever its length: no buffer of an encoder stays behind it.

    Only what the encoding module allocated is counted: other threads allocate at any moment.  Nor
    is what fills the interpreter's free lists, which a collection empties.
    """
    minted = [
        Minted(secrets.token_urlsafe(length), secrets.token_hex(16), 1_800_000_000, HOUR)
        for length in range(100, 1100)
    ]
    gc.disable()
    try:
        for one in minted:
            success_body(one)
        tracemalloc.start()
        answers = [success_body(one) for one in minted]
        snapshot = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
        gc.enable()
    made_there = tracemalloc.Filter(inclusive=True, filename_pattern=answers_module.__file__)
    allocated = sum(trace.size for trace in snapshot.filter_traces([made_there]).traces)
    assert allocated >= sum(len(answer) for answer in answers)
    assert allocated < sum(answer.__sizeof__() for answer in answers) + 1000


def test_M1_a_held_token_costs_at_most_600_bytes_beyond_its_answer(clock: FakeClock) -> None:
    """Key, numbers, its places in the cache's tables: all that is allocated."""
    count, answers = 20_000, 0
    cache = cache_of(clock, count)
    tracemalloc.start()
    try:
        for _ in range(count):
            clock.advance(0.000_001)
            token = held(clock, body=secrets.token_bytes(660))
            answers += token.body.__sizeof__()
            cache[TokenRequest("web", "A78WKV4515", secrets.token_hex(16)).key] = token
        allocated, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(cache) == count
    assert 300 < (allocated - answers) / count < 600


def test_M2_room_is_made_in_each_part_in_turn(clock: FakeClock) -> None:
    """No part of a large cache is emptied for the others; one that is empty is passed over."""
    cache = cache_of(clock, 4 * PART)
    parts = cache._tokens.parts
    assert len(parts) == 4
    token = held(clock)
    for number in range(4 * PART):
        cache[f"{number}"] = token
    before, turns = cache._turn, list[int]()
    for number in range(8):
        cache[f"new {number}"] = token
        turns.append(cache._turn)
    assert turns == [(before + 1 + number) % 4 for number in range(8)]
    assert (len(cache), cache.counts.evicted.value) == (4 * PART, 8)
