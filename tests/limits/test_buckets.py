"""All buckets of one limit, against one that forgets nothing."""

import random
import sys
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from typing_extensions import override

from broker.limits.buckets import OVERFLOW_BUCKETS, SLICE, SWEEP_BATCH, BucketTable
from broker.rules.bucket import Limit, Verdict, peek, spend

T0 = 1_000_000_000
SECOND = 1_000_000

FAST = Limit(burst=2, interval=SECOND)
SLOW = Limit(burst=3, interval=20 * SECOND)


def entries(buckets: BucketTable, now: int) -> dict[str, int]:
    """Microseconds until full, of every bucket that is not."""
    both = dict(buckets._old.items()) | dict(buckets._young.items())
    return {key: full_at - now for key, full_at in both.items() if full_at > now}


class Placed(str):
    """A key whose overflow bucket is known: str's own hash differs from process to process."""

    __slots__ = ("place",)
    place: int

    def __new__(cls, name: str, place: int) -> Self:
        self = super().__new__(cls, name)
        self.place = place
        return self

    @override
    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other)

    @override
    def __hash__(self) -> int:
        return self.place


def exhaust(buckets: BucketTable, key: str, limit: Limit, now: int) -> None:
    """Spend until it refuses, which takes no more than the burst."""
    for _ in range(limit.burst):
        buckets.take(key, limit, now)
    assert not buckets.take(key, limit, now).allowed


def fill(buckets: BucketTable, count: int, now: int, limit: Limit = FAST) -> None:
    """Let this many strangers come, none of them in a place of interest."""
    for number in range(count):
        buckets.take(Placed(f"stranger{number}", 1000 + number), limit, now)


# --- the heart: every history against a reference that keeps everything


KEYS = [Placed(f"key{number}", number % 3) for number in range(12)]
"""More than fit, and four of them share each overflow bucket."""

LIMITS = [
    FAST,
    SLOW,
    Limit(burst=1, interval=5 * SECOND),
    Limit(burst=8, interval=SECOND // 2),
    Limit(burst=1, interval=1),
    Limit(burst=5, interval=60 * SECOND),
]


class Histories(RuleBasedStateMachine):
    """Takes, time, floods, reloads, restarts; a reference with an unbounded dict beside it.

    The reference is charged with what was really admitted.  Whoever it would refuse must be
    refused, always.  Whom it would admit is admitted too as long as nobody has overflowed; later
    a stranger may be refused for another's sake, but a tracked key never: from the moment on at
    which its bucket is exact, it stays exact until it is full.
    """

    @initialize(max_tracked=st.integers(1, 8), ordinary=st.sampled_from(LIMITS))
    def start(self, max_tracked: int, ordinary: Limit) -> None:
        self.now = T0
        self.max_tracked = max_tracked
        self.most_tracked = max_tracked
        self.overrides: dict[str, Limit] = {}
        self.ordinary = ordinary
        self.full_at: dict[str, int] = {}
        self.exact: set[str] = set()
        self.strangers_met = False
        self.dry_run_denied = 0
        self.near = 0
        self.buckets = BucketTable(max_tracked, self.horizon, self.now)

    @property
    def horizon(self) -> int:
        return max(limit.depth for limit in (self.ordinary, *self.overrides.values()))

    def limit_of(self, key: str) -> Limit:
        return self.overrides.get(key, self.ordinary)

    @rule(key=st.sampled_from(KEYS), times=st.integers(1, 4), dry_run=st.booleans())
    def take(self, key: str, times: int, dry_run: bool) -> None:
        for _ in range(times):
            self.take_once(key, dry_run)

    def take_once(self, key: str, dry_run: bool) -> None:
        limit = self.limit_of(key)
        known = self.full_at.get(key, 0)
        overflowed = self.buckets.counts.overflowed.value
        foreseen = self.buckets.peek(key, limit, self.now)
        verdict = self.buckets.take(key, limit, self.now, dry_run=dry_run)
        assert foreseen.allowed == verdict.allowed
        assert foreseen.remaining == verdict.remaining + verdict.allowed
        expected = spend(known, limit, self.now)
        if verdict.allowed:
            assert expected[1].allowed, "forgetting has reset a limit that is exhausted"
        if not self.strangers_met and self.buckets.counts.overflowed.value == overflowed:
            assert verdict == expected[1]
        if key in self.exact and known > self.now:
            assert verdict == expected[1], "a tracked bucket was dropped before it was full"
        self.note(key, verdict, expected[0], dry_run)
        self.strangers_met |= self.buckets.counts.overflowed.value > overflowed

    def note(self, key: str, verdict: Verdict, full_at: int, dry_run: bool) -> None:
        if verdict.allowed:
            self.near += verdict.remaining * 5 < verdict.limit.burst
            self.full_at[key] = full_at
        else:
            self.dry_run_denied += dry_run
            known = self.full_at.get(key, 0)
            self.full_at[key] = min(known, self.now + verdict.limit.depth)
        tracked = entries(self.buckets, self.now).get(key, 0)
        if tracked == self.full_at[key] - self.now > 0:
            self.exact.add(key)
        else:
            self.exact.discard(key)

    @rule(us=st.one_of(st.integers(0, 3), st.integers(0, 400 * SECOND)))
    def wait(self, us: int) -> None:
        self.now += us

    @rule(tenths=st.integers(1, 25), nudge=st.integers(-1, 1))
    def wait_about_a_horizon(self, tenths: int, nudge: int) -> None:
        self.now += max(self.horizon * tenths // 10 + nudge, 0)

    @rule()
    def purge_expired(self) -> None:
        self.buckets.purge_expired(self.now)

    @rule(
        ordinary=st.sampled_from(LIMITS),
        overrides=st.dictionaries(st.sampled_from(KEYS), st.sampled_from(LIMITS), max_size=3),
        max_tracked=st.integers(1, 8),
    )
    def reload(self, ordinary: Limit, overrides: dict[str, Limit], max_tracked: int) -> None:
        self.ordinary, self.overrides = ordinary, overrides
        self.max_tracked = max_tracked
        self.most_tracked = max(self.most_tracked, max_tracked)
        self.buckets.adjust(self.horizon, max_tracked)
        for key in self.full_at.keys() - self.exact:  # what strangers share is cut, as at a restart
            self.full_at[key] = min(self.full_at[key], self.now + self.horizon)

    @rule(down=st.integers(0, 60 * SECOND))
    def restart(self, down: int) -> None:
        """Restart: another clock, the same buckets, cut to the limits in force."""
        aged = {key: wait - down for key, wait in entries(self.buckets, self.now).items()}
        was, self.now = self.now, T0 + down
        self.buckets = BucketTable(self.max_tracked, self.horizon, self.now)
        self.buckets.restore(aged, self.now)
        self.full_at = {
            key: self.now + min(full_at - was - down, self.horizon)
            for key, full_at in self.full_at.items()
            if key in aged or key in self.exact  # what strangers share is not kept
        }
        kept = entries(self.buckets, self.now)
        self.exact = {
            key for key in self.exact if self.now + kept.get(key, 0) == self.full_at.get(key)
        }
        self.strangers_met |= len(aged) > self.max_tracked
        self.most_tracked = self.max_tracked
        self.near = self.dry_run_denied = 0

    @invariant()
    def M1_gauges_equal_the_truth(self) -> None:
        buckets = self.buckets
        young, old = dict(buckets._young.items()), dict(buckets._old.items())
        assert not young.keys() & old.keys()
        assert len(buckets) == len(young) + len(old)
        assert (buckets.counts.near.value, buckets.counts.dry_run_denied.value) == (
            self.near,
            self.dry_run_denied,
        )

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(self.buckets) <= self.most_tracked
        assert len(self.buckets._swept) <= self.most_tracked
        assert len(self.buckets._overflow) == OVERFLOW_BUCKETS


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(4))
def test_G6_long_histories_never_reset_an_exhausted_limit(seed: int) -> None:
    """Sixty thousand takes of a few hundred keys around a bound of fifty, over hours."""
    chance = random.Random(seed)
    keys = [Placed(f"visitor{number}", number % 40) for number in range(300)]
    limit_of = {key: chance.choice(LIMITS) for key in keys}
    horizon = max(limit.depth for limit in LIMITS)
    buckets, reference, now = BucketTable(50, horizon, T0), dict[str, int](), T0
    refused = 0
    for _ in range(60_000):
        if chance.random() < 0.1:
            now += chance.choice([1, SECOND // 10, SECOND, 10 * SECOND, horizon // 3])
        key = keys[min(int(chance.expovariate(0.01)), 299)]
        verdict = buckets.take(key, limit_of[key], now)
        full_at, true = spend(reference.get(key, 0), limit_of[key], now)
        refused += not verdict.allowed
        if verdict.allowed:
            assert true.allowed
            reference[key] = full_at
    assert refused > 1000
    assert buckets.counts.overflowed.value > 1000
    assert len(buckets) <= 50


def test_M1_the_gauge_equals_the_truth_after_a_million_operations() -> None:
    """Takes, time, sweeps: what is reported as tracked is what an unbounded model would track."""
    chance = random.Random(11)
    limit, bound, now = FAST, 5_000, T0
    buckets = BucketTable(bound, limit.depth, now)
    young, old = set[str](), set[str]()
    rotate_at, overflowed = now + limit.depth, 0
    keys = [f"visitor{number}" for number in range(20_000)]
    for number in range(1_000_000):
        if number % 40 == 0:
            now += chance.randrange(20_000)
        if number % 1000 == 0:
            buckets.purge_expired(now)
        if now >= rotate_at:
            old, young = (set() if now - rotate_at >= limit.depth else young), set()
            rotate_at = now + limit.depth
        key = keys[int(chance.random() * chance.random() * 20_000)]
        buckets.take(key, limit, now)
        if key in young:
            continue
        if key in old:
            old.remove(key)
        elif len(young) + len(old) >= bound:
            overflowed += 1
            continue
        young.add(key)
    assert overflowed > 0
    assert (len(buckets), buckets.counts.overflowed.value) == (len(young) + len(old), overflowed)


# --- G6, L7: forgetting, overflow, floods


def test_G6_a_tracked_key_stays_exhausted_under_a_flood() -> None:
    """L7: two hundred thousand strangers come; who was exhausted is refused until its time."""
    limit = Limit(burst=3, interval=3600 * SECOND)
    buckets = BucketTable(1000, limit.depth, T0)
    exhaust(buckets, "victim", limit, T0)
    for number in range(200_000):
        buckets.take(f"stranger{number}", limit, T0 + number)
        if number % 1000 == 0:
            assert not buckets.take("victim", limit, T0 + number).allowed
    assert len(buckets) == 1000
    assert buckets.counts.overflowed.value == 200_000 - 999
    assert buckets.take("victim", limit, T0 + 3600 * SECOND - 1) == Verdict(
        False, 0, limit.depth - limit.interval + 1, 1, limit
    )
    assert buckets.take("victim", limit, T0 + 3600 * SECOND).allowed


def test_L7_memory_of_a_flood_is_bounded_through_rotations() -> None:
    """What is held, what waits to be freed, and the shared buckets: each has its own bound."""
    buckets = BucketTable(1000, FAST.depth, T0)
    sizes = []
    for number in range(100_000):
        buckets.take(f"stranger{number}", FAST, T0 + number * 100)
        if number % 500 == 0:
            dicts = (*buckets._young.parts, *buckets._old.parts, *buckets._swept.dicts)
            assert len(buckets) <= 1000
            assert len(buckets._swept) <= 1000
            sizes.append(sum(map(sys.getsizeof, (*dicts, buckets._overflow))))
    assert max(sizes) < 3 * sys.getsizeof(dict.fromkeys(map(str, range(1000)))) + 40_000


def test_G6_an_exhausted_overflow_bucket_is_not_left_by_being_tracked() -> None:
    """The flood is over and there is room again: the key keeps what it spent among strangers."""
    buckets = BucketTable(2, SLOW.depth, T0)
    fill(buckets, 2, T0, SLOW)
    late = T0 + SLOW.depth - SECOND
    exhaust(buckets, Placed("victim", 7), SLOW, late)
    assert buckets.counts.overflowed.value == SLOW.burst + 1
    now = T0 + 2 * SLOW.depth - 2 * SECOND
    buckets.purge_expired(T0 + SLOW.depth)
    buckets.purge_expired(now + 2 * SECOND)
    assert len(buckets) == 0
    verdict = buckets.take(Placed("victim", 7), SLOW, late + SLOW.interval - 1)
    assert verdict == Verdict(False, 0, SLOW.depth - SLOW.interval + 1, 1, SLOW)
    assert len(buckets) == 1


def test_G6_a_shallow_limit_does_not_empty_an_overflow_bucket_that_a_deep_one_filled() -> None:
    """Two agents' limits meet in one shared bucket: the deep one's refusals outlast the other."""
    buckets = BucketTable(1, SLOW.depth, T0)
    fill(buckets, 1, T0)
    exhaust(buckets, Placed("deep", 7), SLOW, T0)
    assert not buckets.take(Placed("shallow", 7), FAST, T0).allowed
    assert buckets.take(Placed("deep", 7), SLOW, T0).retry_after == SLOW.interval
    assert not buckets.take(Placed("deep", 7), SLOW, T0 + SLOW.interval - 1).allowed


def test_T5_a_shared_bucket_locks_nobody_out_for_longer_than_the_deepest_limit() -> None:
    """An hour's limit was exhausted among strangers; a reload to seconds ends it in seconds."""
    hour = Limit(burst=1, interval=3600 * SECOND)
    buckets = BucketTable(1, hour.depth, T0)
    fill(buckets, 1, T0, hour)
    exhaust(buckets, Placed("victim", 7), hour, T0)
    buckets.adjust(FAST.depth, 1)
    assert buckets.take(Placed("victim", 7), FAST, T0).retry_after == SECOND
    assert buckets.take(Placed("victim", 7), FAST, T0 + SECOND).allowed


def test_at_the_bound_tracked_keys_go_on_and_strangers_share() -> None:
    """Each tracked key has its own tokens; strangers of one place have one bucket between them."""
    buckets = BucketTable(3, FAST.depth, T0)
    fill(buckets, 3, T0)
    one, other, elsewhere = Placed("one", 7), Placed("other", 7), Placed("elsewhere", 8)
    told = [buckets.take(key, FAST, T0).remaining for key in (one, other, elsewhere)]
    assert told == [1, 0, 1]
    assert not buckets.take(one, FAST, T0).allowed
    assert buckets.take(Placed("stranger0", 1000), FAST, T0).remaining == 0
    assert (len(buckets), buckets.counts.overflowed.value) == (3, 4)
    assert repr(buckets) == "BucketTable(tracked=3, overflowed=4)"


@given(st.integers(0, 2 * SLOW.depth), st.integers(0, SLOW.depth))
def test_L3_a_bucket_is_never_forgotten_before_it_is_full(start: int, idle: int) -> None:
    """Whenever it is exhausted within a generation's life, idling gives back what idling gives."""
    buckets = BucketTable(10, SLOW.depth, T0)
    now = T0 + start
    buckets.take("other", SLOW, T0)
    exhaust(buckets, "victim", SLOW, now)
    for step in (idle // 3, idle // 2, idle):
        buckets.purge_expired(now + step)
    verdict = buckets.peek("victim", SLOW, now + idle)
    assert verdict == peek(now + SLOW.depth, SLOW, now + idle)
    assert buckets.take("victim", SLOW, now + idle).allowed == verdict.allowed


def test_what_is_given_up_is_freed_in_small_pieces() -> None:
    """A million buckets at once would stop the loop: each new key and each tidying frees a few."""
    buckets = BucketTable(10_000, FAST.depth, T0)
    for number in range(10_000):
        buckets.take(f"visitor{number}", FAST, T0)
    assert not buckets.purge_expired(T0 + FAST.depth)
    assert (len(buckets), len(buckets._swept)) == (10_000, 0)
    assert buckets.purge_expired(T0 + 2 * FAST.depth)
    left = 10_000 - SLICE
    assert (len(buckets), len(buckets._swept)) == (0, left)
    buckets.take("new", FAST, T0 + 2 * FAST.depth)
    assert len(buckets._swept) == left - SWEEP_BATCH
    buckets.take("new", FAST, T0 + 2 * FAST.depth)
    assert len(buckets._swept) == left - SWEEP_BATCH
    while buckets.purge_expired(T0 + 2 * FAST.depth):
        pass
    assert len(buckets._swept) == 0


# --- L11: reloads


def test_L11_a_lowered_limit_holds_at_once_and_keeps_what_was_spent() -> None:
    """Twenty tokens, four spent; the limit becomes five: none of a second five is given."""
    old, new = Limit(burst=20, interval=SECOND), Limit(burst=5, interval=SECOND)
    buckets = BucketTable(10, old.depth, T0)
    for _ in range(4):
        buckets.take("visitor", old, T0)
    buckets.adjust(new.depth, 10)
    told = [buckets.take("visitor", new, T0).allowed for _ in range(3)]
    assert told == [True, False, False]


def test_L11_a_raised_limit_holds_at_once() -> None:
    """Two tokens, both spent; the limit becomes twenty: eighteen are there."""
    new = Limit(burst=20, interval=SECOND)
    buckets = BucketTable(10, FAST.depth, T0)
    exhaust(buckets, "visitor", FAST, T0)
    buckets.adjust(new.depth, 10)
    told = [buckets.take("visitor", new, T0).allowed for _ in range(19)]
    assert told == [True] * 18 + [False]


def test_L11_a_deeper_limit_is_not_forgotten_at_the_old_rotation() -> None:
    """The horizon grows with the limit, for buckets of the running generation too."""
    deep = Limit(burst=1, interval=1000 * SECOND)
    buckets = BucketTable(10, FAST.depth, T0)
    buckets.adjust(deep.depth, 10)
    exhaust(buckets, "victim", deep, T0 + 1)
    for at in (1, 2, 3, 4, 10, 100, 999):
        buckets.purge_expired(T0 + at * SECOND)
        assert not buckets.take("victim", deep, T0 + at * SECOND).allowed
    assert buckets.take("victim", deep, T0 + 1000 * SECOND + 1).allowed


def test_L11_a_shallower_limit_does_not_forget_what_the_old_one_exhausted() -> None:
    """The limit is lowered and raised again within its time: the key is still exhausted."""
    deep = Limit(burst=1, interval=1000 * SECOND)
    buckets = BucketTable(10, deep.depth, T0)
    exhaust(buckets, "victim", deep, T0 + 999 * SECOND)
    buckets.adjust(FAST.depth, 10)
    for at in range(1000, 1900, 3):
        buckets.purge_expired(T0 + at * SECOND)
    buckets.adjust(deep.depth, 10)
    assert not buckets.take("victim", deep, T0 + 1999 * SECOND - 1).allowed
    assert buckets.take("victim", deep, T0 + 1999 * SECOND).allowed


def test_L7_reloads_do_not_put_off_forgetting() -> None:
    """Secrets that change every second reload every second: buckets are given up all the same."""
    buckets = BucketTable(100, FAST.depth, T0)
    fill(buckets, 100, T0)
    for second in range(10):
        buckets.adjust(FAST.depth, 100)
        buckets.purge_expired(T0 + second * SECOND)
    assert len(buckets) == 0
    buckets.take("new", FAST, T0 + 10 * SECOND)
    assert (len(buckets), buckets.counts.overflowed.value) == (1, 0)


def test_a_lowered_bound_drops_nobody_who_is_tracked() -> None:
    """Who is tracked stays tracked; newcomers share until the others have been forgotten."""
    buckets = BucketTable(10, SLOW.depth, T0)
    for number in range(10):
        exhaust(buckets, f"visitor{number}", SLOW, T0)
    buckets.adjust(SLOW.depth, 4)
    assert not any(buckets.take(f"visitor{n}", SLOW, T0).allowed for n in range(10))
    buckets.take("new", SLOW, T0)
    assert (len(buckets), buckets.counts.overflowed.value) == (10, 1)
    buckets.purge_expired(T0 + 2 * SLOW.depth)
    buckets.take("new", SLOW, T0 + 2 * SLOW.depth)
    assert len(buckets) == 1


# --- restarts, dry run, counters


def test_entries_are_what_is_not_full_and_how_long_it_takes() -> None:
    """Of both generations, in microseconds; who is full needs no remembering."""
    buckets = BucketTable(10, SLOW.depth, T0)
    buckets.take("full again", FAST, T0)
    exhaust(buckets, "old", SLOW, T0 + 30 * SECOND)
    exhaust(buckets, "moved", SLOW, T0 + 30 * SECOND)
    buckets.purge_expired(T0 + SLOW.depth)
    now = T0 + SLOW.depth + SECOND
    exhaust(buckets, "young", SLOW, now)
    buckets.take("moved", SLOW, now)
    assert entries(buckets, now) == {
        "young": 60 * SECOND,
        "old": 29 * SECOND,
        "moved": 49 * SECOND,
    }


def test_restored_buckets_go_on_where_they_were() -> None:
    """Another clock, the same wait; what claims to take longer than any limit is cut."""
    buckets = BucketTable(10, SLOW.depth, T0)
    buckets.restore({"spent": 60 * SECOND, "absurd": 10**15, "full": 0, "past": -5}, T0)
    assert entries(buckets, T0) == {"spent": 60 * SECOND, "absurd": 60 * SECOND}
    assert buckets.take("spent", SLOW, T0 + 20 * SECOND - 1).retry_after == 1
    assert buckets.take("spent", SLOW, T0 + 20 * SECOND).allowed


def test_G6_what_a_restart_brings_beyond_the_bound_stays_exhausted() -> None:
    """A smaller bound after the restart: who finds no room is found in the overflow buckets."""
    buckets = BucketTable(2, SLOW.depth, T0)
    names = [Placed(f"visitor{number}", number) for number in range(5)]
    buckets.restore(dict.fromkeys(names, SLOW.depth), T0)
    assert len(buckets) == 2
    assert [buckets.take(name, SLOW, T0).allowed for name in names] == [False] * 5
    assert buckets.take(Placed("free", 99), SLOW, T0).allowed


def test_L12_a_dry_run_decides_and_counts_and_charges_like_the_real_one() -> None:
    """The verdict says what would have been; only the counter tells that it was a dry run."""
    real, dry = (BucketTable(10, FAST.depth, T0) for _ in range(2))
    schedule = [0, 0, 0, SECOND // 2, SECOND // 2, 0, 3 * SECOND, 0, 0]
    now = T0
    for gap in schedule:
        now += gap
        assert dry.take("visitor", FAST, now, dry_run=True) == real.take("visitor", FAST, now)
    assert (real.counts.dry_run_denied.value, dry.counts.dry_run_denied.value) == (0, 4)
    assert real.counts.near.value == dry.counts.near.value == 3
    assert entries(real, now) == entries(dry, now)


def test_near_counts_admissions_with_less_than_a_fifth_left() -> None:
    """Of a burst of ten: the ninth and the tenth, and no refusal."""
    limit = Limit(burst=10, interval=SECOND)
    buckets = BucketTable(10, limit.depth, T0)
    told = []
    for _ in range(12):
        buckets.take("visitor", limit, T0)
        told.append(buckets.counts.near.value)
    assert told == [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("idle", [0, 1, FAST.depth, 100 * FAST.depth])
def test_M1_nobody_asks_and_tidying_gives_everything_back(idle: int) -> None:
    """After two horizons of silence nothing is tracked, after a sweep nothing is held."""
    buckets = BucketTable(1000, FAST.depth, T0)
    fill(buckets, 1000, T0)
    buckets.purge_expired(T0 + FAST.depth)
    fill(buckets, 10, T0 + FAST.depth)
    buckets.purge_expired(T0 + 3 * FAST.depth + idle)
    assert (len(buckets), len(buckets._swept)) == (0, 0)


@given(
    takes=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), max_size=60),
    burst=st.integers(1, 9),
)
def test_what_is_more_than_half_spent_is_told_once(
    takes: list[tuple[str, int]], burst: int
) -> None:
    """Those that decided since the last time and were left with less than half; none twice."""
    limit = Limit(burst, 10 * SECOND)
    buckets, now, spent = BucketTable(10, limit.depth, T0), T0, set[str]()
    assert not buckets.take_spent(), "from now on they are noted"
    for key, pause in takes:
        now += pause * SECOND
        if buckets.take(key, limit, now).remaining * 2 < burst:
            spent.add(key)
    assert set(buckets.take_spent()) == spent
    assert not buckets.take_spent()


def test_G6_what_is_noted_is_bounded_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a flood, too, that nobody drains; strangers without a bucket of their own are left out."""
    monkeypatch.setattr("broker.limits.buckets.MOST_NOTED", 50)
    limit = Limit(2, 10 * SECOND)
    for tracked, noted in ((10, 10), (1000, 50)):
        buckets = BucketTable(tracked, limit.depth, T0)
        buckets.take_spent()
        for number in range(500):
            buckets.take(f"{number}", limit, T0)
            buckets.take(f"{number}", limit, T0)
        assert len(buckets.take_spent()) == noted
