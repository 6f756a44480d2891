"""The fast lane against the ordinary path, on random streams of bytes.

    python tests/load/lane_fuzz.py [--streams 1000000] [--first 0] [--waits]

Exits with 1 at the first stream that is not answered alike, and prints it; the same seeds draw the
same streams, so `--first SEED --streams 1` plays one again (without the state before it).
"""

import argparse
import asyncio
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import structlog
from lane_streams import Worlds


def main() -> None:
    """Compare until something differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first stream")
    parser.add_argument("--waits", action="store_true", help="with a store that is elsewhere")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    sys.exit(asyncio.run(compare(options.first, options.streams, waits=options.waits)))


async def compare(first: int, streams: int, *, waits: bool) -> int:
    """Compare the answers to so many streams; returns the exit code."""
    worlds, began = Worlds(waits=waits), time.monotonic()
    for number in range(streams):
        if wrong := await worlds.compare(first + number):
            print(wrong)
            return 1
        if (number + 1) % 10_000 == 0:
            print(f"{number + 1} streams, {time.monotonic() - began:.0f} s", flush=True)
    fast, ordinary = worlds.fast.server, worlds.ordinary.server
    print(f"{streams} streams, {fast.requests_count} requests; without a lane as many:")
    print(ordinary.requests_count)
    return 0


if __name__ == "__main__":
    main()
