"""A forked broker is a process like one that was started: nothing of the one that forked it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from processes import Broker, Executed, environment, good, is_alive, read_of, run, started

PROGRAM = """
import json, os, resource, signal, sys, threading
descriptors = [int(n) for n in os.listdir("/proc/self/fd")]
json.dump({
    "arguments": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ),
    "descriptors": sorted(n for n in descriptors if os.path.exists(f"/proc/self/fd/{n}")),
    "parent": os.getppid(), "threads": threading.active_count(), "path": sys.path[0],
    "signals": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)],
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "warnings": sys.warnoptions,
    "name": __name__, "in": sys.stdin.read(), "umask": os.umask(0o77),
}, sys.stdout)
print("an error", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize("kind", ["fork", "exec"])
def test_a_process_is_what_was_asked_for(tmp_path: Path, kind: str) -> None:
    """Arguments, folder, environment, descriptors, parent, signals, exit code."""
    import json

    program = tmp_path / "asks.py"
    program.write_text(PROGRAM)
    given = environment(BROKER_A="b") | ({"OTHER": "c"} if kind == "exec" else {})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(str(program), "one", "two", env=given, cwd=str(tmp_path), **pipes) as process:
        assert isinstance(process, forked.Forked) == (kind == "fork")
        out, told = process.communicate(b"some input")
    said = json.loads(out)
    assert said["environment"].pop("LC_CTYPE") == "C.UTF-8"  # what Python makes of no locale
    before = os.umask(0)
    os.umask(before)
    assert (process.returncode, told) == (7, b"an error\n")
    assert said == {
        "arguments": [str(program), "one", "two"],
        "folder": str(tmp_path),
        "environment": given,
        "descriptors": [0, 1, 2],
        "parent": os.getpid(),
        "threads": 1,
        "path": str(tmp_path),
        "signals": [
            str(signal.SIG_DFL), str(signal.getsignal(signal.SIGINT)), str(signal.SIG_DFL),
        ],
        "mask": [],
        "warnings": ["error"],
        "name": "__main__",
        "in": "some input",
        "umask": before,
    }  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_its_end_is_seen(tmp_path: Path, number: signal.Signals) -> None:
    """By the kernel's word to its parent, which is the test."""
    with Broker.configured(tmp_path, good(tmp_path)) as broker:
        assert isinstance(broker.process, forked.Forked)
        assert is_alive(broker.process.pid)
        assert broker.process.poll() is None
        assert broker.end(number) == (0 if number == signal.SIGTERM else -number)
        assert read_of(broker.process.pid, "stat") == ""


@pytest.mark.parametrize("kind", ["fork", "exec"])
def test_an_interrupt_that_nobody_handles_is_its_end(tmp_path: Path, kind: str) -> None:
    """By the signal, and not without a word: a broker that does not handle Ctrl-C is found."""
    program = tmp_path / "interrupted.py"
    program.write_text(
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    given = environment() | ({"OTHER": "c"} if kind == "exec" else {})
    with started(str(program), env=given, stderr=subprocess.PIPE) as process:
        assert isinstance(process, forked.Forked) == (kind == "fork")
        _, told = process.communicate()
    assert process.returncode == -signal.SIGINT
    assert told.endswith(b"KeyboardInterrupt\n")


def test_what_a_process_draws_as_it_starts_differs(tmp_path: Path) -> None:
    """The key that hides fingerprints in the log, names of requests, whatever `random` says."""
    program = tmp_path / "draws.py"
    program.write_text(
        "import random\nfrom broker.telemetry import logs\n"
        "print(logs.share_key().hex(), random.random())\n"
    )
    drawn = set[bytes]()
    for _ in range(2):
        given = environment()
        with started(str(program), env=given, stdout=subprocess.PIPE) as process:
            drawn |= set(process.communicate()[0].split())
    assert len(drawn) == 4


def test_a_test_can_ask_for_an_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own, and one that a variable asks for it."""
    with Executed.configured(tmp_path, good(tmp_path)) as broker:
        assert not isinstance(broker.process, forked.Forked)
    assert not forked.starts_alike(environment(SSL_CERT_FILE="/nowhere"))
    assert not forked.starts_alike(environment() | {"COVERAGE_PROCESS_CONFIG": "x"})
    assert run("version").returncode == 0
    assert forked.starts_alike(environment())
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path)
        assert not forked.starts_alike(environment())
    with monkeypatch.context() as hooked:
        hooked.setenv("PYTHONPATH", str(tmp_path))
        assert not forked.starts_alike(environment())
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    assert not forked.starts_alike(environment())
