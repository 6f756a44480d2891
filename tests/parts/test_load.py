"""The load test itself, for a moment: it works, and it would notice."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.parts

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "traffic", [["--rate", "200", "--duration", "2", "--visitors", "100"], ["--each", "500"]]
)
def test_the_load_test_finds_every_answer_right(traffic: list[str]) -> None:
    """k6 decodes every token and each is its visitor's; wrk runs flat out; nothing is a 5xx."""
    command = [sys.executable, str(ROOT / "tests" / "load" / "run"), *traffic]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\nok\n")
    held = re.search(r"checks: (\d+) held, 0 broken", done.stdout)
    assert held is not None
    assert int(held[1]) >= 4 * 200
    assert "5xx or none 0, 429 0" in done.stdout
    assert ("wrk:" in done.stdout) == ("--duration" in traffic)


def test_20_000_refusals_write_fewer_than_1_000_lines() -> None:
    """Of three kinds; lines and counts add up to every 429; prints the CPU of one."""
    command = [sys.executable, str(ROOT / "tests" / "load" / "refusals.py")]
    command += ["--refusals", "20000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    refusals = re.search(r"(\d+) refusals", done.stdout)
    assert refusals is not None
    assert int(refusals[1]) >= 20_000
