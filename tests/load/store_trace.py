"""See whether a server's scripts decide as the rules do: a million random steps.

    python tests/load/store_trace.py [--steps 1000000] [--seed N] [--redis]

Starts a Valkey of its own (or Redis), sends the trace of `tests/store_trace.py`, and prints how
often each script gave each kind of reply.  Exit code 0 if every reply was the rule's, 1 at the
first that was not; the seed that is printed repeats it.
"""

import argparse
import secrets
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from servers import redis_binary, store_server, valkey_binary
from store_trace import compare, compare_by_server_clock


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description="Do scripts and rules decide alike?")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--redis", action="store_true", help="Redis instead of Valkey")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    began = time.monotonic()
    with store_server(redis_binary() if arguments.redis else valkey_binary()) as server:
        try:
            kinds = compare(server, arguments.steps, arguments.seed)
            real = compare_by_server_clock(server, arguments.steps // 10, arguments.seed)
        except AssertionError as difference:
            print(f"NOT alike: {difference}")
            return 1
    for kind, count in sorted(kinds.items()):
        print(f"{kind:20} {count:9}")
    print(f"by the server's clock {real.total()}: {dict(real)}")
    print(f"{kinds.total()} steps decided alike, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
