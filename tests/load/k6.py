"""Runs k6 with gateway.js, and reads what it saw."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VENV = ROOT / ".cache" / "venv" / "bin"


class Summary(NamedTuple):
    """What k6 saw: in words, how many requests there were, and how many failed."""

    text: str
    requests: int
    failures: int


def run_k6(url: str, secret: str, rate: int, duration: int, **settings: object) -> Summary:
    """Open loop: `rate` requests a second for `duration` seconds; `settings` as in gateway.js."""
    given = {"URL": url, "SECRET": secret, "RATE": rate, "DURATION": f"{duration}s", **settings}
    search = os.pathsep.join((str(VENV), str(Path(sys.executable).parent), os.environ["PATH"]))
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "k6",
            "run",
            "--quiet",
            "--no-usage-report",
            "--no-color",
            "--summary-mode=legacy",
        ]
        command += [f"--summary-export={folder}/summary.json", str(HERE / "gateway.js")]
        environment = {**os.environ, **{k: str(v) for k, v in given.items()}, "PATH": search}
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        summary = Path(folder) / "summary.json"
        if not summary.exists():
            sys.exit(done.stdout + done.stderr)
        metrics = json.loads(summary.read_text())["metrics"]
    if done.returncode:
        print(done.stdout, done.stderr)
    read = _read(metrics)
    return read._replace(failures=read.failures or done.returncode)


def _read(metrics: dict[str, dict[str, float]]) -> Summary:
    requests, duration = metrics["http_reqs"], metrics["http_req_duration"]
    checks = metrics["checks"]
    failed, refused = int(metrics["failed"]["count"]), metrics["refused"]["count"]
    dropped = metrics.get("dropped_iterations", {}).get("count", 0)
    quantiles = ("med", "p(95)", "p(99)", "p(99.9)", "max")
    lines = (
        f"k6: {requests['count']:.0f} requests, {requests['rate']:.0f} a second",
        f"  5xx or none {failed}, 429 {refused:.0f}, dropped by k6 {dropped:.0f}",
        f"  checks: {checks['passes']:.0f} held, {checks['fails']:.0f} broken",
        f"  reuse ratio {metrics['reused']['value']:.4f}",
        "  latency: " + ", ".join(f"{name} {duration[name]:.2f} ms" for name in quantiles),
    )
    return Summary("\n".join(lines), int(requests["count"]), failed + int(checks["fails"]))
