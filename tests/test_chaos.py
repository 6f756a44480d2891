"""The virtual half of `tests/load/chaos.py`, for half an hour of its time."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_G4_G8_N13_half_an_hour_of_harm_in_virtual_time() -> None:
    """Every token is its visitor's, and no minute at the vendor holds more than it allows."""
    done = subprocess.run(
        [sys.executable, "tests/load/chaos.py", "--minutes", "0", "--hours", "0.5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("held")
