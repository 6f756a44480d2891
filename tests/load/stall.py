"""See whether the vendor's window holds when the vendor stands still and goes on (row N13).

    python tests/load/stall.py [--stalls 1 5 30 90] [--setups one workers replicas]

For each setup (one broker, two workers, three replicas, the latter on a Valkey of their own) and
each stall in seconds, all side by side: the budget that ships before a vendor process of its own;
new visitors ask for more than there is; after 40 s the vendor is suspended (SIGSTOP), resumed, and
watched for 75 s.  What counts is the vendor's own journal: the fullest 60 s must hold 120 calls at
most.  Beside it the price: calls a minute before the stall and after it, of the 106 that the budget
has, and after how many seconds the first one after the stall arrived that was sent after it.

Exit code 0 if every window holds, 1 if not.
"""

import argparse
import asyncio
import secrets
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path += [str(TESTS), str(TESTS / "vendor")]

from msgspec import Struct  # noqa: E402
from processes import Broker, merged  # noqa: E402
from servers import store_server, valkey_binary  # noqa: E402
from standing import Visitors, relay_settings, standing_vendor, worst_window  # noqa: E402

ALLOWED = 120
"""Calls in any minute."""

BEFORE, AFTER = 40.0, 75.0
"""Seconds that are watched before and after the stall; a slot's burst of them is the start."""

SETUPS = {"one": (1, 1), "workers": (1, 2), "replicas": (3, 1)}
"""How many brokers, and how many workers each."""


class Found(Struct):
    """What one run showed; rates are calls a minute, `gap` is seconds."""

    setup: str
    stall: float
    calls: int
    worst: int
    before: float
    after: float
    gap: float
    answers: Counter[int | str]


async def run(folder: Path, setup: str, stall: float) -> Found:
    """Run one setup through one stall."""
    count, workers = SETUPS[setup]
    secret = secrets.token_urlsafe(24)
    with ExitStack() as parts:
        vendor = parts.enter_context(standing_vendor())
        tree = merged(relay_settings(vendor, secret), {"server.workers": workers})
        if workers * count > 1:
            store = parts.enter_context(store_server(valkey_binary()))
            key = {"store.url": store.url, "store.encryption_key": secrets.token_urlsafe(48)}
            tree = merged(tree, key)
        brokers = []
        for number in range(count):
            own = folder / f"{setup}-{stall:g}-{number}"
            own.mkdir()
            brokers.append(await asyncio.to_thread(Broker.configured, own, tree))
            parts.enter_context(brokers[-1])
        urls = [broker.url for broker in brokers]
        visitors = Visitors(lambda: urls, secret, 4 / count)
        async with visitors.asking():
            await asyncio.sleep(BEFORE)
            began = time.monotonic()
            if stall:
                with vendor.standing_still():
                    await asyncio.sleep(stall)
            ended = time.monotonic()
            await asyncio.sleep(AFTER)
        for broker in brokers:
            await asyncio.to_thread(broker.end)
        arrived = vendor.arrivals()
    after = [at for at in arrived if ended + 0.3 <= at]
    return Found(
        setup,
        stall,
        len(arrived),
        worst_window(arrived, 60.0),
        _rate([at for at in arrived if began - 30 <= at < began], 30),
        _rate([at for at in after if at < ended + 60], 60),
        min(after, default=float("inf")) - ended,
        visitors.answers,
    )


def _rate(calls: list[float], seconds: float) -> float:
    return len(calls) / seconds * 60


async def runs(setups: list[str], stalls: list[float]) -> bool:
    """Run all of them side by side; returns whether every window held."""
    with tempfile.TemporaryDirectory() as name:
        found = await asyncio.gather(
            *(run(Path(name), setup, stall) for setup in setups for stall in stalls)
        )
    print("setup     stall  calls  worst 60 s  a minute before  after  first after  answers")
    for one in found:
        print(
            f"{one.setup:9} {one.stall:4g} s {one.calls:6d} {one.worst:11d} {one.before:16.1f}"
            f" {one.after:6.1f} {one.gap:10.2f} s  {dict(one.answers)}"
        )
    good = all(one.worst <= ALLOWED for one in found)
    print("kept" if good else f"NOT kept: at most {ALLOWED} were promised")
    return good


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description="Does the window hold when the vendor stalls?")
    parser.add_argument("--stalls", type=float, nargs="+", default=[0, 1, 5, 30, 90])
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    arguments = parser.parse_args()
    return 0 if asyncio.run(runs(arguments.setups, arguments.stalls)) else 1


if __name__ == "__main__":
    sys.exit(main())
