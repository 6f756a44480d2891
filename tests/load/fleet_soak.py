"""See whether three replicas on one store stay within one budget: three real minutes.

    python tests/load/fleet_soak.py [--seconds 180] [--rate 7]

Three broker processes on a Valkey of their own, with the budget that ships, before the fake vendor;
at each of them new visitors ask several times as often as it has slots.  After half of the time one
is killed with -9 and started again in its place; later the vendor answers one call with 429 and
`Retry-After: 10`.  What counts is the vendor's own journal: the fullest 60 s must hold 120 calls at
most (rows V10 and G4), none may arrive during the pause, and 90 a minute should be used on average.

Exit code 0 if all hold, 1 if not.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path += [str(TESTS), str(TESTS / "fleet")]

from replicas import Crowd, Replica, fixed_place, joined, start, tree_for  # noqa: E402
from servers import store_server, valkey_binary  # noqa: E402

from broker.testing import FakeVendor, Refusal  # noqa: E402
from broker.testing.vendor import faults  # noqa: E402
from broker.testing.vendor.journal import Journal  # noqa: E402

ALLOWED, WANTED = 120, 90
"""Calls in any minute: at most, and on average at least; the restart and the pause cost some."""

PAUSE = 10
"""Seconds that the vendor asks for."""

SHIPPED = {"rate": 106, "per": "60s", "burst": 8, "max_wait": "8s"}


async def soak(seconds: float, rate: float) -> bool:
    """Run it; returns whether everything holds."""
    with tempfile.TemporaryDirectory() as name, store_server(valkey_binary()) as store:
        folder = Path(name)
        async with FakeVendor(seed=1) as vendor, Crowd() as crowd:
            tree = tree_for(folder, store, vendor)
            tree["issuer"]["budget"] = SHIPPED
            trees = [fixed_place(tree) for _ in range(3)]
            fleet = [await start(folder, each) for each in trees]
            try:
                await joined(fleet)
                began = time.monotonic()
                for replica in fleet:
                    crowd.let("caller", replica, rate)
                await asyncio.sleep(seconds / 2)
                await fleet[0].kill()
                fleet.append(await start(folder, trees[0]))
                crowd.let("caller", fleet[-1], rate)
                await asyncio.sleep(seconds / 4)
                vendor.fail(faults.error(Refusal.RATE_LIMITED, retry_after=f"{PAUSE}"), times=1)
                await asyncio.sleep(max(seconds - (time.monotonic() - began), 0))
                took = time.monotonic() - began
                await crowd.stop()
            finally:
                await close(fleet)
            return report(vendor.journal, crowd, took)


async def close(fleet: list[Replica]) -> None:
    """End every broker that still runs."""
    for replica in fleet:
        await replica.close()


def report(journal: Journal, crowd: Crowd, took: float) -> bool:
    """Print what the vendor saw."""
    calls, window = journal.calls, journal.worst_window(60)
    told = next((call.mono for call in calls if call.status == 429), None)
    early = 0 if told is None else sum(0.5 < call.mono - told < PAUSE for call in calls)
    used = len(calls) / took * 60
    answers = Counter(reply.status for _, _, reply in crowd.replies)
    print(f"time                      {took:8.1f} s")
    print(f"calls to the vendor       {len(calls):8d}   by answer {dict(journal.statuses())}")
    print(f"fullest 60 s              {window.count:8d}   from second {_since(journal):.1f} on")
    print(f"calls during the pause    {early:8d}")
    print(f"calls a minute            {used:8.1f}")
    print(f"answers to the crowd      {answers.total():8d}   {dict(answers)}")
    good = window.count <= ALLOWED and used >= WANTED and told is not None and not early
    print("kept" if good else f"NOT kept: at most {ALLOWED} and at least {WANTED} were promised")
    return good


def _since(journal: Journal) -> float:
    return journal.worst_window(60).start - journal.calls[0].mono


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description="Do three replicas keep one budget?")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--rate", type=float, default=7.0, help="callers a second at each replica")
    arguments = parser.parse_args()
    return 0 if asyncio.run(soak(arguments.seconds, arguments.rate)) else 1


if __name__ == "__main__":
    sys.exit(main())
