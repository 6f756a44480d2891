"""What a dead log costs: hits and mints with four kinds of standard error, in one run.

    python tests/bench/logs.py [--rounds 7] [--seconds 1] [--connections 16] [--level info]

Brokers side by side, whose log goes to a file, to a pipe that is full and that nobody reads, to a
full disk (/dev/full), and to a pipe whose reader is gone.  Every round measures each of them once
for each case, in an order that rotates; what counts is the median of the rounds' ratios to the
file.  A mint writes a line, a hit only at `--level debug`.  Needs wrk (closed loop).
"""

import argparse
import os
import re
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cpu import CONFIGURATION, VISITORS, Sample, Server, call, measure, print_medians

CASES = ("hit", "mint")

MILLISECONDS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


def main() -> None:
    """Measure and print."""
    options = parse_options()
    samples: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "visitors.lua").write_text(VISITORS)
        secret = secrets.token_urlsafe(24)
        kinds: dict[str, Callable[[Path], int]] = {
            "file": good_file,
            "stuck pipe": stuck_pipe,
            "full disk": full_disk,
            "dead reader": dead_reader,
        }
        servers = [
            stack.enter_context(run_broker(folder, secret, kind, make(folder), options.level))
            for kind, make in kinds.items()
        ]
        numbers = count(1)
        for number in range(options.rounds + 1):
            for case in CASES:
                turn = number % len(servers)
                for server in servers[turn:] + servers[:turn]:
                    sample = measure(server, case, secret, next(numbers), folder, options)
                    if number:  # the first round warms up
                        samples[server.name, case].append(sample)
            print(".", end="", flush=True, file=sys.stderr)
        print(file=sys.stderr)
        report(samples)
        for server in servers:
            print(f"lines lost, {server.name:12} {lost(server):>10.0f}")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=1, help="of each measurement")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--level", default="info", help="of the log; debug writes hits, too")
    return parser.parse_args()


def good_file(folder: Path) -> int:
    """Open a file with room."""
    return os.open(folder / "good.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def full_disk(_folder: Path) -> int:
    """Open what fails every write with ENOSPC."""
    return os.open("/dev/full", os.O_WRONLY)


def stuck_pipe(_folder: Path) -> int:
    """Make a pipe that is full; its reader stays open until this process ends, and never reads."""
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    return writer


def dead_reader(_folder: Path) -> int:
    """Make a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@contextmanager
def run_broker(folder: Path, secret: str, name: str, log: int, level: str) -> Iterator[Server]:
    """Run a broker whose standard error is `log`; on a port chosen here, as that may tell none."""
    port = free_port()
    own = CONFIGURATION.format(secret=secret, key=secrets.token_urlsafe(48), store="memory://")
    text = own.replace('"127.0.0.1:0"', f'"127.0.0.1:{port}"', 1)
    config = folder / f"{name.replace(' ', '-')}.toml"
    config.write_text(f'{text}\n[log]\nlevel = "{level}"\nformat = "json"\n')
    command = [sys.executable, "-m", "broker", "serve", "--config", str(config)]
    command += ["--admin-listen", f"127.0.0.1:{port + 1}"]
    with subprocess.Popen(command, stderr=log) as process:
        os.close(log)
        try:
            server = Server(name, process.pid, port)
            wait_for(server)
            yield server
        finally:
            process.terminate()


def free_port() -> int:
    """Return a port that nobody listens on, as on the one after it."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            with suppress(OSError):
                other.bind(("127.0.0.1", port + 1))
                return port


def wait_for(server: Server) -> None:
    """Return once it answers."""
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        with suppress(OSError):
            if call(server, "GET", "/readyz", "", {})[0] == 200:
                return
        time.sleep(0.05)
    sys.exit(f"{server.name}: the broker did not start")


def lost(server: Server) -> float:
    """Return how many lines its log has lost."""
    admin = Server(server.name, server.pid, server.port + 1)
    text = call(admin, "GET", "/metrics", "", {})[1].decode()
    found = re.search(r"(?m)^broker_log_lines_dropped_total (\S+)$", text)
    return float(found[1]) if found else -1.0


def milliseconds(text: str) -> float:
    """Read a duration as wrk prints it."""
    found = re.fullmatch(r"([\d.]+)(us|ms|s)", text)
    if found is None:
        sys.exit(f"no duration: {text}")
    return float(found[1]) * MILLISECONDS[found[2]]


def report(samples: dict[tuple[str, str], list[Sample]]) -> None:
    """Print medians, and the medians of the rounds' ratios to the file."""
    print_medians({f"{case:6}{name}": rounds for (name, case), rounds in samples.items()})
    print("\nratio to a good file, median of the rounds: CPU, requests a second, p99")
    for (name, case), rounds in samples.items():
        pairs = list(zip(rounds, samples["file", case], strict=True))
        ratios = [
            statistics.median(ratio(ours) / ratio(file) for ours, file in pairs)
            for ratio in (
                lambda sample: sample.cpu,
                lambda sample: sample.throughput,
                lambda sample: milliseconds(sample.p99),
            )
        ]
        print(f"{case:6}{name:14}" + "".join(f"{each:>8.2f}" for each in ratios))


if __name__ == "__main__":
    main()
