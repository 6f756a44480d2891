"""Break everything around the broker, at random, and see that its promises hold.

    python tests/load/chaos.py [--minutes 30] [--hours 24] [--seed 1]

First hours of virtual time: the story, the budget and the relay in one process before a simulated
vendor that stalls, fails and lets go (0 leaves that out).  Then real minutes: processes on a real
store before a real vendor, stopped, killed and misled, with a crowd that checks what it is told
(0 leaves that out).  Prints figures; exits with 1 and says what was wrong unless all of it held:
each token belongs to its visitor, no status but the documented ones, 120 calls to the vendor in any
minute, counters only grow, memory and live objects stay level.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

import chaos_real
import chaos_virtual


def main() -> int:
    """Read the arguments and run; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of real time")
    parser.add_argument("--hours", type=float, default=24.0, help="of virtual time")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    wrong: list[str] = []
    if arguments.hours:
        wrong += chaos_virtual.run(arguments.hours, arguments.seed)
    if arguments.minutes:
        with tempfile.TemporaryDirectory(prefix="etb") as folder:
            real = chaos_real.run(Path(folder), arguments.minutes * 60, arguments.seed)
            wrong += asyncio.run(real)
    for line in dict.fromkeys(wrong):
        print(f"WRONG: {line}")
    print("held" if not wrong else f"NOT held: {len(wrong)} findings")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
