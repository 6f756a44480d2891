"""What a million held tokens cost: bytes beyond their answers, what stays when they go, and pauses.

    python tests/bench/memory.py [--tokens 1000000] [--batch 2000]

Tokens are stored and found as the broker does it, beside 200,000 recorded sessions, in batches
between two rounds of housekeeping (`GcTuner.tidy`).  With `--batch` 2,000 a round is a busy
half second.  Prints one JSON object.
"""

import argparse
import gc
import json
import os
import random
import secrets
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import uvloop

from broker.app.gc_tuning import GcTuner
from broker.clock import SystemClock
from broker.model import SEPARATOR, EmbedToken, Minted, Session, TokenRequest
from broker.sessions.memory import MemorySessions
from broker.stores.token_cache import TokenCache
from broker.units import SECOND
from broker.wire.responses import success_body

LIFETIME = 3595 * SECOND
SESSIONS = 200_000
TARGET_BYTES = 600
TARGET_PAUSE_MS = 20.0


class Watch:
    """Measures every collection by its generation, in CPU time: other processes pause nothing."""

    def __init__(self) -> None:
        self.pauses: dict[int, list[float]] = {0: [], 1: [], 2: []}
        self._since = 0.0
        gc.callbacks.append(self._note)

    def _note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._since = time.thread_time()
        else:
            self.pauses[info["generation"]].append(time.thread_time() - self._since)

    def close(self) -> dict[str, object]:
        """Stop measuring and say what was seen."""
        gc.callbacks.remove(self._note)
        seen = {f"gen{g}": _summary(times) for g, times in self.pauses.items()}
        longest = max((max(times) for times in self.pauses.values() if times), default=0.0)
        return {**seen, "longest_ms": round(longest * 1000, 2)}


def _summary(times: list[float]) -> dict[str, float]:
    if not times:
        return {"count": 0}
    ordered = sorted(times)
    return {
        "count": len(times),
        "median_ms": round(ordered[len(times) // 2] * 1000, 3),
        "max_ms": round(ordered[-1] * 1000, 3),
    }


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def some_request(number: int) -> TokenRequest:
    """Make a visitor with a fingerprint as long as a UUID's."""
    return TokenRequest(
        client="web", agent=f"A78WKV{number % 50:04}", fingerprint=secrets.token_hex(16)
    )


def some_token(clock: SystemClock, request: TokenRequest) -> EmbedToken:
    """Make a token with an answer of the usual size."""
    session = secrets.token_hex(16)
    body = success_body(Minted(secrets.token_urlsafe(330), session, 1_800_000_000, LIFETIME))
    return EmbedToken(
        body=body,
        dies_mono=clock.mono() + LIFETIME,
        dies_wall=clock.wall() + LIFETIME,
        lifetime=LIFETIME,
        mark=random.randrange(420 * SECOND, 900 * SECOND),
    )


def cache_of(clock: SystemClock, maxsize: int) -> TokenCache:
    """Make a cache as `app` does."""
    return TokenCache(
        maxsize, keep_until=lambda token: token.dies_mono - 60 * SECOND, mono=clock.mono
    )


def bytes_per_token(count: int) -> dict[str, float]:
    """Count what is allocated for each token, its answer aside (tracemalloc, RSS beside it)."""
    clock = SystemClock()
    cache = cache_of(clock, count)
    tracemalloc.start()
    answers = 0
    for number in range(count):
        request = some_request(number)
        token = some_token(clock, request)
        answers += token.body.__sizeof__()
        cache[request.key] = token
    allocated, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "answer_bytes": round(answers / count),
        "allocated_beyond_answer": round((allocated - answers) / count, 1),
    }


def resident_per_token(count: int) -> dict[str, float]:
    """Measure RSS per token without tracemalloc, whose own memory would be in it."""
    clock = SystemClock()
    gc.collect()
    before = resident()
    cache = cache_of(clock, count)
    answers = 0
    for number in range(count):
        request = some_request(number)
        token = some_token(clock, request)
        answers += token.body.__sizeof__()
        cache[request.key] = token
    grown = resident() - before
    return {"rss_beyond_answer": round((grown - answers) / count, 1)}


def resident_after_churn(held: int = 1000, count: int = 100_000) -> dict[str, float]:
    """Measure what stays of tokens of an hour that few others pushed out, or that were renewed."""
    grown = {}
    for name, keys in (("pushed_out", count), ("renewed", held)):
        clock = SystemClock()
        cache = cache_of(clock, held)
        for number in range(held):
            cache[f"{name}{number}"] = some_token(clock, some_request(0))
        gc.collect()
        before = resident()
        for number in range(count):
            cache[f"{name}{number % keys}"] = some_token(clock, some_request(0))
        grown[name] = round((resident() - before) / count, 1)
    return {f"rss_{name}": each for name, each in grown.items()}


def pauses(count: int, batch: int) -> dict[str, object]:
    """Fill a cache, hit it, renew in it, and fill it over its bound, all under a GcTuner."""
    clock = SystemClock()
    cache = cache_of(clock, count)
    keys: list[str] = []
    told: dict[str, object] = {}

    def insert(number: int) -> None:
        request = some_request(number)
        cache[request.key] = some_token(clock, request)
        keys.append(request.key)

    def hit(_: int) -> None:
        cache.find(random.choice(keys))
        _ = [
            TokenRequest("web", "A78WKV4515", "f1"),
            {"a": []},
        ]  # a request leaves a few containers behind

    def renew(_: int) -> None:
        key = random.choice(keys)[:-1]
        cache[f"{key}{SEPARATOR}"] = some_token(
            clock, some_request(0)
        )  # a request makes its key anew

    def insert_over(number: int) -> None:
        request = some_request(number)
        cache[request.key] = some_token(clock, request)

    keeper = GcTuner()
    keeper.start()
    try:
        told["insert"] = _phase(insert, count, batch, keeper)
        told["hit"] = _phase(hit, count, batch * 20, keeper)
        told["renew"] = _phase(renew, count // 2, batch, keeper)
        told["insert_over_capacity"] = _phase(insert_over, count * 3 // 2, batch, keeper)
    finally:
        keeper.stop()
    return told


def _phase(
    step: Callable[[int], None], count: int, batch: int, keeper: GcTuner
) -> dict[str, object]:
    """Run steps with housekeeping after each batch; the slowest step shows other stalls."""
    watch = Watch()
    slowest = 0.0
    started = time.thread_time()
    for number in range(count):
        before = time.thread_time()
        step(number)
        slowest = max(slowest, time.thread_time() - before)
        if number % batch == batch - 1:
            keeper.tidy()
    took = time.thread_time() - started
    return {
        "steps": count,
        "cpu_us_per_step": round(took / count * 1e6, 2),
        "slowest_step_ms": round(slowest * 1000, 2),
        "collections": watch.close(),
    }


def cost_of_a_hit(count: int, rounds: int = 7) -> dict[str, float]:
    """Compare finding a token among `count` with finding one among a thousand; CPU, interleaved."""
    clock = SystemClock()
    caches = {}
    for size in (1000, count):
        cache, keys = cache_of(clock, size), []
        for number in range(size):
            request = some_request(number)
            cache[request.key] = some_token(clock, request)
            keys.append(request.key)
        caches[size] = (cache, keys)
    gc.collect()
    gc.freeze()
    ratios, large = [], []
    for _ in range(rounds):
        small_cpu, large_cpu = (_cpu_of_hits(*caches[size]) for size in (1000, count))
        ratios.append(large_cpu / small_cpu)
        large.append(large_cpu)
    gc.unfreeze()
    middle = rounds // 2
    return {
        "find_us": round(sorted(large)[middle] * 1e6, 3),
        "ratio_to_1000_tokens": round(sorted(ratios)[middle], 2),
    }


def _cpu_of_hits(cache: TokenCache, keys: list[str], count: int = 100_000) -> float:
    asked = random.choices(keys, k=count)
    started = time.process_time()
    for key in asked:
        cache.find(key)
    return (time.process_time() - started) / count


async def _on_loop(tokens: int, batch: int) -> dict[str, object]:
    """Measure inside the loop that the broker runs on."""
    clock = SystemClock()
    session_store = MemorySessions(SESSIONS, clock)
    now = clock.wall() // SECOND
    for _ in range(SESSIONS):
        ids = secrets.token_hex(16), secrets.token_hex(16)
        digest = secrets.token_bytes(32)
        await session_store.record(
            Session(ids[0], "web", "A1", ids[1], "", now, now + 3600, digest)
        )
    told = pauses(tokens, batch)
    return {**told, "sessions": len(session_store)}


def main() -> None:
    """Measure, print, and say whether the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=2_000, help="inserts between housekeeping")
    options = parser.parse_args()
    told: dict[str, object] = {"tokens": options.tokens}
    told["memory"] = {**resident_per_token(options.tokens), **bytes_per_token(options.tokens)}
    told["churn"] = resident_after_churn()
    told["find"] = cost_of_a_hit(options.tokens)
    told["phases"] = uvloop.run(_on_loop(options.tokens, options.batch))
    told["targets"] = {"bytes": TARGET_BYTES, "pause_ms": TARGET_PAUSE_MS}
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
