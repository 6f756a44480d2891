"""Ten million distinct fingerprints through the buckets of one limit, in process.

    python tests/load/flood.py [--keys 10000000] [--max-tracked 1000000]

Prints one JSON object: resident memory before, after and at its peak beside the cap that follows
from `max_tracked`, and whether a visitor who was exhausted before the flood stayed so.  Exits with
1 if the cap was exceeded, the bound was, or the exhausted visitor was let in.

Two floods: one whose keys outlast it, so that the bound is reached and strangers overflow, and one
with so short a limit that generations turn all the time.
"""

import argparse
import json
import os
import random
import resource
import sys
import time
from pathlib import Path

from broker.limits.buckets import OVERFLOW_BUCKETS, BucketTable
from broker.model import SEPARATOR
from broker.rules.bucket import Limit

SECOND = 1_000_000
MIB = 2**20

SLACK = 32 * MIB
"""What the allocator may keep beside it: arenas that are free in parts, freed tables."""


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Bytes that it ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fingerprint(number: int) -> str:
    """Spread numbers over 128 bits, so that keys look like a visitor's (splitmix's constant)."""
    return f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"


def key_of(number: int) -> str:
    """Join client and fingerprint as a request does."""
    return f"web{SEPARATOR}{fingerprint(number)}"


def cap(max_tracked: int) -> int:
    """Bytes that the buckets of one limit may take.

    Tracked keys and as many that wait to be swept have a string and an integer each.  Three tables
    (young, old, swept) are allowed: a dict never shrinks, and while it grows the old one is there
    beside the new one, half its size.
    """
    entry = sys.getsizeof(key_of(1)) + 15 & ~15  # the allocator hands out multiples of 16
    entry += 32  # the integer
    table = sys.getsizeof(dict.fromkeys(range(max_tracked)))
    overflow = OVERFLOW_BUCKETS * (8 + 32)
    return 2 * max_tracked * entry + 3 * table + table // 2 + overflow + SLACK


def flood(
    keys: int, max_tracked: int, limit: Limit, pace: int, *, watch: bool
) -> dict[str, object]:
    """Send the keys, `pace` microseconds apart; with `watch` a visitor is exhausted first."""
    now = SECOND
    before = resident()
    buckets = BucketTable(max_tracked, limit.depth, now)
    victim = key_of(keys + 1)
    while watch and buckets.take(victim, limit, now).allowed:
        pass
    tracked = leaked = slowest = 0
    started = time.perf_counter()
    for number in range(keys):
        now += pace
        key = key_of(number)
        since = time.thread_time_ns()
        buckets.take(key, limit, now)
        slowest = max(slowest, time.thread_time_ns() - since)
        if number % 10_000 == 0:
            buckets.purge_expired(now)
            tracked = max(tracked, len(buckets))
            leaked += watch and buckets.take(victim, limit, now).allowed
    took = time.perf_counter() - started
    return {
        "keys": keys,
        "tracked": len(buckets),
        "most_tracked": tracked,
        "overflowed": buckets.counts.overflowed.value,
        "us_per_key": round(took / keys * 1e6, 2),
        "slowest_take_cpu_ms": round(slowest / 1e6, 2),
        "rss_before_mib": round(before / MIB, 1),
        "rss_after_mib": round(resident() / MIB, 1),
        "rss_peak_mib": round(peak() / MIB, 1),
        "grown_to_mib": round((peak() - before) / MIB, 1),
        "cap_mib": round(cap(max_tracked) / MIB, 1),
        "exhausted_stayed_exhausted": not leaked if watch else None,
        "ok": tracked <= max_tracked and not leaked and peak() - before <= cap(max_tracked),
    }


def main() -> int:
    """Flood twice and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=10_000_000)
    parser.add_argument("--max-tracked", type=int, default=1_000_000)
    options = parser.parse_args()
    random.seed(1)
    lasting = Limit(burst=3, interval=1200 * SECOND)
    turning = Limit(burst=1, interval=options.max_tracked * 2)
    told = {
        "lasting": flood(options.keys, options.max_tracked, lasting, 10, watch=True),
        "turning": flood(options.keys, options.max_tracked, turning, 4, watch=False),
    }
    print(json.dumps(told, indent=2))
    return 0 if all(result["ok"] for result in told.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
