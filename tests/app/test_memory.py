"""N11: what was alive once and is over takes no memory, and what is held costs no pause."""

import asyncio
import gc
import os
import secrets
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.app.gc_tuning import GcTuner
from broker.limits.buckets import BucketTable
from broker.model import EmbedToken, Session, TokenRequest
from broker.rules.bucket import limit
from broker.sessions.memory import MemorySessions
from broker.stores.token_cache import TokenCache
from broker.testing import FakeClock

COUNT = 20_000
FAILING = (Path(__file__).parents[1] / "load") / "failing.py"


@pytest.mark.parametrize(
    "kinds", ["not_http,half_a_head,reset", "unread,wrong_secret,limited", "paused,cancelled"]
)
def test_N11_requests_that_fail_leave_nothing_behind(kinds: str) -> None:
    """Thousands of each kind against a real process: its memory and its objects stay the same."""
    ended = subprocess.run(
        [sys.executable, str(FAILING), "--requests", "3000", "--kinds", kinds],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("ok  ") == kinds.count(",") + 1


class Watch:
    """A clock in seconds: it stands still but for what a collection is said to take."""

    def __init__(self) -> None:
        self.time = 0.0
        self.takes = 0.0
        gc.callbacks.append(self._collected)

    def __call__(self) -> float:
        return self.time

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == 2:
            self.time += self.takes

    def close(self) -> None:
        gc.callbacks.remove(self._collected)


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Give the keeper its time."""
    watch = Watch()
    yield watch
    watch.close()


@pytest.fixture
def keeper(watch: Watch) -> Iterator[GcTuner]:
    """Let the broker's keeper own this process' collector for a while."""
    keeper = GcTuner(watch)
    keeper.start()
    yield keeper
    keeper.stop()


class Ring:
    """Something that holds itself, as an error does whose traceback holds the frame it is in."""

    def __init__(self) -> None:
        self.itself = self


def test_N11_what_lived_through_collections_is_freed_with_its_ring(
    keeper: GcTuner, watch: Watch
) -> None:
    """A flight that waits for seconds is seen by many rounds of housekeeping; then it is over."""
    ring = Ring()
    seen = weakref.ref(ring)
    frozen = gc.get_freeze_count()
    for _ in range(5):
        watch.time += 1
        keeper.tidy()
    assert gc.get_freeze_count() == frozen
    del ring
    watch.time += 1
    keeper.tidy()
    assert seen() is None


def test_N11_what_was_frozen_is_given_back_at_the_end() -> None:
    """Who has a broker in their process, as a test has, gets their collector as it was."""
    before = gc.get_threshold(), gc.get_freeze_count()
    keeper = GcTuner()
    keeper.start()
    assert gc.get_freeze_count() > before[1]
    keeper.stop()
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


def test_N11_what_was_given_back_is_left_alone(keeper: GcTuner, watch: Watch) -> None:
    """A round that comes after the end collects nothing: the collector is somebody else's."""
    keeper.stop()
    watch.time += 60
    before = gc.get_stats()[2]["collections"]
    keeper.tidy()
    assert gc.get_stats()[2]["collections"] == before


def test_N11_housekeeping_spends_a_small_share_on_full_collections(
    keeper: GcTuner, watch: Watch
) -> None:
    """One that took 30 ms is followed by the next after six seconds, one of 1 ms at once."""

    def collects() -> bool:
        before = gc.get_stats()[2]["collections"]
        keeper.tidy()
        return bool(gc.get_stats()[2]["collections"] > before)

    watch.takes = 0.03
    assert collects()
    watch.time += 5.9
    assert not collects()
    watch.time += 0.2
    watch.takes = 0.001
    assert collects()
    watch.time += 0.5
    assert collects()


def looked_into() -> int:
    """How much a full collection goes through: every tracked container, and what is in it."""
    gc.collect()
    return sum(len(gc.get_referents(each)) for each in gc.get_objects())


def tokens(clock: FakeClock) -> TokenCache:
    """Hold so many tokens, each found and renewed once."""
    cache = TokenCache(COUNT, keep_until=lambda token: token.dies_mono, mono=clock.mono)
    for number in range(COUNT):
        ends = clock.mono() + (number + 1) * 1000
        token = EmbedToken(secrets.token_bytes(9), ends, ends, 3600, 900)
        key = TokenRequest("web", "A1", f"{number:08x}").key
        cache[key] = token
        assert cache.find(key) is token
        cache[key] = token
    return cache


def buckets(clock: FakeClock) -> BucketTable:
    """Keep so many buckets."""
    held, rule = BucketTable(COUNT, 3600_000_000, clock.mono()), limit(6, 60_000_000, 6)
    for number in range(COUNT):
        held.take(f"web\x1f{number:08x}", rule, clock.mono())
    return held


def alone(measure: Callable[[], None]) -> None:
    """Measure in a fresh interpreter: this one has the objects of all tests before, and their C."""
    ended = subprocess.run(
        [sys.executable, __file__, measure.__name__],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_N11_tokens_and_buckets_are_nothing_that_the_collector_visits() -> None:
    """However many there are: a full collection costs what it cost without them."""
    alone(tokens_and_buckets)


def tokens_and_buckets() -> None:
    """Fill both, and look."""
    clock = FakeClock()
    before = looked_into()
    cache, table = tokens(clock), buckets(clock)
    assert len(cache) == len(table) == COUNT
    assert looked_into() < before + COUNT // 2  # seconds and overflow buckets are bounded


def test_N11_sessions_are_nothing_that_the_collector_visits() -> None:
    """No record is a container, and none of the tables is looked into, nor their order."""
    alone(sessions)


def sessions() -> None:
    """Record many, and look."""
    clock = FakeClock()
    session_store = MemorySessions(COUNT, clock)
    before, objects = looked_into(), len(gc.get_objects())

    async def record() -> None:
        expires = clock.wall() // 1_000_000 + 3600
        for number in range(COUNT):
            digest = secrets.token_bytes(32)
            await session_store.record(
                Session(f"{number:032x}", "web", "A1", "f1", "", 0, expires, digest)
            )

    asyncio.run(record())
    assert len(session_store) == COUNT
    assert len(gc.get_objects()) < objects + 1000
    assert looked_into() < before + COUNT // 10


if __name__ == "__main__":
    globals()[sys.argv[1]]()
