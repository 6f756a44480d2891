"""How long a table of a million entries can stop the loop, and what a look-up costs in it.

    python tests/bench/stalls.py [--entries 1000000] [--tables tokens,buckets,sessions,ended,spent]

Each table is filled, filled over its bound, left until all of it expires in the same second, and
emptied by housekeeping; after each phase the collector runs.  What is printed is the longest single
step, which is how long every other request waits: milliseconds of this thread's CPU, so that other
processes stop nothing.  Look-ups are compared with those in a table of a thousand entries,
interleaved, the same keys' order for both.  In process, no network.
"""

import argparse
import gc
import hashlib
import random
import secrets
import statistics
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from typing_extensions import override

from broker.app.gc_tuning import GcTuner
from broker.limits.buckets import BucketTable
from broker.model import EmbedToken, LimitName, Minted, Session, TokenRequest
from broker.rules.bucket import limit
from broker.sessions.base import MARK_LIFE
from broker.sessions.memory import MemorySessions
from broker.sqlite.spent_buckets import SpentBuckets
from broker.stores.token_cache import TokenCache
from broker.testing import FakeClock
from broker.units import SECOND
from broker.wire.responses import success_body

TARGET_MS = 5.0
TARGET_RATIO = 2.0

LIFETIME = 3595 * SECOND

ROUNDS = 9
"""Of the comparison of look-ups."""

LOOKUPS = 100_000
"""A round and a size."""


class Table(Protocol):
    """What is filled, asked and emptied."""

    def key(self, number: int) -> str:
        """Make the key of an entry, another object each time."""
        ...

    def make(self, number: int) -> Any:
        """Make an entry; not measured."""
        ...

    def insert(self, key: str, value: Any) -> None:
        """Put it in."""
        ...

    def find(self, key: str) -> object:
        """Look it up."""
        ...

    def purge(self) -> None:
        """Do what one slice of a round of housekeeping does."""
        ...

    def __len__(self) -> int: ...


def name_of(number: int) -> str:
    """Return 32 hex digits, as a fingerprint or a session's id has."""
    return hashlib.blake2b(b"%d" % number, digest_size=16).hexdigest()


def done(work: "Coroutine[Any, Any, object]") -> object:
    """Run what never waits."""
    try:
        work.send(None)
    except StopIteration as ended:
        return ended.value
    raise RuntimeError("a session store in memory waited")


class Tokens(Table):
    """The tokens that are held for reuse."""

    lifetime = LIFETIME

    def __init__(self, most: int) -> None:
        self.clock = FakeClock()
        self._cache = TokenCache(
            most, keep_until=lambda token: token.dies_mono - 60 * SECOND, mono=self.clock.mono
        )

    @override
    def key(self, number: int) -> str:
        return TokenRequest("web", f"A78WKV{number % 50:04}", name_of(number)).key

    @override
    def make(self, number: int) -> EmbedToken:
        minted = Minted(secrets.token_urlsafe(330), secrets.token_hex(16), 1_800_000_000, LIFETIME)
        dies = self.clock.mono() + LIFETIME, self.clock.wall() + LIFETIME
        return EmbedToken(success_body(minted), *dies, LIFETIME, 500 * SECOND + number)

    @override
    def insert(self, key: str, value: EmbedToken) -> None:
        self._cache[key] = value

    @override
    def find(self, key: str) -> object:
        return self._cache.find(key)

    @override
    def purge(self) -> None:
        self._cache.expire(self.clock.mono())

    @override
    def __len__(self) -> int:
        return len(self._cache)


class Buckets(Table):
    """The buckets of one limit."""

    lifetime = 2 * 60 * SECOND

    def __init__(self, most: int) -> None:
        self.clock = FakeClock()
        self._limit = limit(20, 60 * SECOND, 20)
        self._table = BucketTable(most, self._limit.depth, self.clock.mono())

    @override
    def key(self, number: int) -> str:
        return f"web\x1f{name_of(number)}"

    @override
    def make(self, number: int) -> None:
        """It is but a number."""

    @override
    def insert(self, key: str, value: None) -> None:
        self._table.take(key, self._limit, self.clock.mono())

    @override
    def find(self, key: str) -> object:
        return self._table.take(key, self._limit, self.clock.mono())

    @override
    def purge(self) -> None:
        self._table.purge_expired(self.clock.mono())

    @override
    def __len__(self) -> int:
        return len(self._table)


class Sessions(Table):
    """Sessions on record, as a relay records them."""

    lifetime = 3600 * SECOND

    def __init__(self, most: int) -> None:
        self.clock = FakeClock()
        self._session_store = MemorySessions(most, self.clock)

    @override
    def key(self, number: int) -> str:
        return name_of(number)

    @override
    def make(self, number: int) -> Session:
        now = self.clock.wall() // SECOND
        ids = name_of(number), "web", f"A{number % 50:02}XYZ0001", secrets.token_hex(16), ""
        return Session(*ids, now, now + 3600, secrets.token_bytes(32))

    @override
    def insert(self, key: str, value: Session) -> None:
        done(self._session_store.record(value))

    @override
    def find(self, key: str) -> object:
        return done(self._session_store.find(key))

    @override
    def purge(self) -> None:
        self._session_store.purge_expired()

    @override
    def __len__(self) -> int:
        return len(self._session_store)


class Ended(Table):
    """Sessions that were ended: what `verify` asks for each token."""

    lifetime = MARK_LIFE

    def __init__(self, most: int) -> None:
        self.clock = FakeClock()
        self._session_store = MemorySessions(most, self.clock, most)
        self._full = False
        self._most = most

    @override
    def key(self, number: int) -> str:
        return name_of(number)

    @override
    def make(self, number: int) -> Session:
        return Session(name_of(number), "web", "A78WKV4515", secrets.token_hex(16), "", 0, 0)

    @override
    def insert(self, key: str, value: Session) -> None:
        if len(self) < self._most:  # beyond the bound nothing is ended
            done(self._session_store.mark(value, by_client=False))

    @override
    def find(self, key: str) -> object:
        return done(self._session_store.ended(key))

    @override
    def purge(self) -> None:
        self._session_store.purge_expired()

    @override
    def __len__(self) -> int:
        return self._session_store.ended_count


class Spent(Table):
    """Spent buckets that are told to a state file; as many as are told of a limit."""

    lifetime = 2 * 60 * SECOND

    def __init__(self, most: int) -> None:
        self.clock = FakeClock()
        self._limit = limit(20, 60 * SECOND, 20)
        self._table = BucketTable(most, self._limit.depth, self.clock.mono())
        self._table.take_spent()
        self._spent = SpentBuckets(
            {LimitName.FINGERPRINT: self._table}, self.clock.mono, lambda _records: None
        )

    @override
    def key(self, number: int) -> str:
        return f"web\x1f{name_of(number)}"

    @override
    def make(self, number: int) -> None:
        """It is but a number: told once a second, while visitors lean on it."""
        if not number % 6000:
            self.clock.advance(1)

    @override
    def insert(self, key: str, value: None) -> None:
        for _ in range(12):
            self._table.take(key, self._limit, self.clock.mono())

    @override
    def find(self, key: str) -> object:
        return self._table.take(key, self._limit, self.clock.mono())

    @override
    def purge(self) -> None:
        self._table.purge_expired(self.clock.mono())
        self._spent.step(can_tell=True)

    @override
    def __len__(self) -> int:
        return len(self._table)


TABLES: dict[str, Callable[[int], Any]] = {
    "tokens": Tokens,
    "buckets": Buckets,
    "sessions": Sessions,
    "ended": Ended,
    "spent": Spent,
}


class Longest:
    """The longest step, and their sum, in seconds of this thread's CPU."""

    def __init__(self) -> None:
        self.step = self.total = 0.0
        self.count = 0

    def run(self, work: Callable[..., object], *values: object) -> None:
        """Do a step."""
        began = time.thread_time()
        work(*values)
        took = time.thread_time() - began
        self.step = max(self.step, took)
        self.total += took
        self.count += 1


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--tables", default=",".join(TABLES), help="of " + ",".join(TABLES))
    options = parser.parse_args()
    print(f"longest step in ms of CPU at {options.entries:,} entries (target {TARGET_MS:g})")
    for name in options.tables.split(","):
        measure(name, options.entries)


def measure(name: str, entries: int) -> None:
    """Measure one table through its life."""
    tuner = GcTuner()
    tuner.start()
    table, small = TABLES[name](entries), TABLES[name](1000)
    fill(name, "inserting", table, range(entries))
    fill("", "", small, range(1000))
    compare(name, (table, entries), (small, 1000))
    fill(name, "full, evicting", table, range(entries, entries * 3 // 2))
    step = Longest()
    while len(table):
        if not step.count % 10_000:
            table.clock.advance(table.lifetime / SECOND + 2)
        step.run(table.purge)
    table.clock.advance(table.lifetime / SECOND + 2)
    for _ in range(200):  # what was given up, and not freed yet
        step.run(table.purge)
    told(name, "expiring together", step)
    fill(name, "filled again", table, range(entries // 4))
    tuner.stop()


def fill(name: str, phase: str, table: Any, numbers: range) -> None:
    """Fill a table, and collect."""
    step = Longest()
    for number in numbers:
        key, value = table.key(number), table.make(number)
        step.run(table.insert, key, value)
        if not number % 2000:
            step.run(table.purge)
    if name:
        told(name, phase, step)
        collected(name)


def collected(name: str) -> None:
    """Collect with the table alive."""
    step = Longest()
    gc.collect()
    step.run(gc.collect)
    told(name, "  then collecting", step)


def told(name: str, phase: str, step: Longest) -> None:
    """Print one figure."""
    longest, mean = step.step * 1e3, step.total / step.count * 1e6
    verdict = "met" if longest <= TARGET_MS else "NOT met"
    print(f"  {name:9}{phase:20}{longest:9.2f} ms   mean {mean:8.2f} us   {verdict}", flush=True)


def compare(name: str, large: tuple[Any, int], small: tuple[Any, int]) -> None:
    """Compare look-ups, in interleaved rounds."""
    ratios, costs = [], []
    for _ in range(ROUNDS):
        few, many = cost(*small), cost(*large)
        ratios.append(many / few)
        costs.append(many)
    ratio, middle = statistics.median(ratios), statistics.median(costs)
    verdict = "met" if ratio <= TARGET_RATIO else "NOT met"
    print(f"  {name:9}look-up {middle * 1e6:.2f} us, {ratio:.2f} x that at 1,000   {verdict}")


def cost(table: Any, entries: int) -> float:
    """Return seconds of CPU of a look-up; its key is made before, as a request makes it."""
    asked = [table.key(random.randrange(entries)) for _ in range(LOOKUPS)]
    began = time.process_time()
    for key in asked:
        table.find(key)
    return (time.process_time() - began) / LOOKUPS


if __name__ == "__main__":
    main()
