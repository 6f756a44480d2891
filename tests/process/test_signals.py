"""Signals at any moment of a life: the process ends, with an exit code that is documented."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import (
    TIMEOUT,
    Broker,
    Tree,
    children_of,
    environment,
    good,
    is_alive,
    merged,
    put,
    read_of,
    toml,
    wait_for,
    write,
)
from test_workers import Workers

MOMENTS = 24
SPREAD = 1.6
"""Seconds over which the moments are spread: a start takes less, where nothing else runs."""

ENDED = {0, -signal.SIGTERM, 128 + signal.SIGTERM}
"""Stopped as asked; by the signal itself before it served; the same of process 1."""

IN_A_NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")


def source(folder: Path) -> str:
    """Write a configuration that serves; returns its path."""
    return write(folder / "broker.toml", toml(put(good(folder), "server.drain_lead", "0s")))


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start something and see to it that it ends."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment()) as process:
        try:
            yield process
        finally:
            process.kill()


def first_child(pid: int) -> int:
    """Return the process that this one has started, once it has."""
    (child,) = wait_for(lambda: children_of(pid))
    return child


def read_until_started(process: subprocess.Popen[bytes]) -> None:
    """Read the log until the broker serves."""
    assert process.stderr is not None
    told: list[bytes] = []
    while not any(b'"broker.started"' in line for line in told):
        told.append(process.stderr.readline())
        assert told[-1], told


def has_begun(pid: int) -> bool:
    """Whether a process has replaced `unshare` and runs Python."""
    return "python" in read_of(pid, "cmdline").split("\0")[0]


def code_of_first_lines(pid: int) -> bool:
    """Whether a process catches SIGTERM: bit 14 of the mask that the kernel shows."""
    status = read_of(pid, "status")
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_N9_sigterm_ends_it_at_any_moment_of_the_start(tmp_path: Path) -> None:
    """From exec on, spread over the start: always an end, always one of the documented codes."""
    path, codes = source(tmp_path), []
    for number in range(MOMENTS):
        with started(sys.executable, "-m", "broker", "serve", "--config", path) as process:
            time.sleep(SPREAD * number / MOMENTS)  # the moment is what is tested
            process.send_signal(signal.SIGTERM)
            codes.append(process.wait(TIMEOUT))
            assert b"Traceback" not in process.stderr.read() if process.stderr else False
    assert set(codes) <= ENDED, codes


@pytest.mark.parametrize("before", ["SIG_DFL", "SIG_IGN"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_N9_a_signal_during_the_imports_leaves_no_traceback(
    number: signal.Signals, before: str
) -> None:
    """Ctrl-C in the first half second is an end, not a defect; also where a parent ignored it."""
    code = (
        "import os, signal, sys\n"
        f"signal.signal({number}, signal.{before})\n"
        "class Meet:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'broker.cli': os.kill(os.getpid(), {number})\n"
        "sys.meta_path.insert(0, Meet())\n"
        "from broker.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=TIMEOUT, check=False
    )
    assert (done.returncode, done.stderr) == (-number, b"")


@pytest.mark.parts
def test_N9_sigterm_ends_process_1_at_any_moment_of_the_start(tmp_path: Path) -> None:
    """As the only process of a container, whose unhandled signals the kernel throws away.

    From the first line on; before it (the start of Python itself) nobody can hear anything.
    """
    path, codes = source(tmp_path), []
    command = (*IN_A_NAMESPACE, sys.executable, "-m", "broker", "serve", "--config", path)
    for number in range(MOMENTS):
        with started(*command) as process:
            pid = first_child(process.pid)
            wait_for(lambda pid=pid: has_begun(pid) and code_of_first_lines(pid))
            time.sleep(SPREAD * number / MOMENTS)
            os.kill(pid, signal.SIGTERM)
            codes.append(process.wait(TIMEOUT))
    assert set(codes) <= {0, 128 + signal.SIGTERM}, codes
    with started(*command) as process:
        read_until_started(process)
        os.kill(first_child(process.pid), signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0


@pytest.mark.parts
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_N9_process_1_obeys_from_its_first_line_on(number: signal.Signals) -> None:
    """Its imports have not even begun."""
    code = (
        "import os\n"
        "import broker.__main__ as main\n"
        "import sys\n"
        "class Meet:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'broker.cli': os.kill(os.getpid(), {number})\n"
        "sys.meta_path.insert(0, Meet())\n"
        "assert os.getpid() == 1\n"
        "sys.argv[1:] = ['serve', '--dev']\n"
        "main.main()\n"
    )
    with started(*IN_A_NAMESPACE, sys.executable, "-c", code) as process:
        assert process.wait(TIMEOUT) == 128 + number


@pytest.mark.parts
def test_N9_workers_end_with_process_1(tmp_path: Path) -> None:
    """SIGTERM to the supervisor of a container: all of them drain, exit code 0."""
    path = source(tmp_path)
    command = (*IN_A_NAMESPACE, sys.executable, *Workers.program, path)
    with started(*command) as process:
        read_until_started(process)
        assert process.stderr is not None
        os.kill(first_child(process.pid), signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0
        assert b"broker.stopped" in process.stderr.read()


def test_N9_sigterm_ends_workers_at_any_moment_of_the_start(tmp_path: Path) -> None:
    """Also those that are just being started: none is left behind."""
    path, codes = source(tmp_path), []
    for number in range(MOMENTS // 4):
        with started(sys.executable, *Workers.program, path) as process:
            time.sleep(2 * SPREAD * number / (MOMENTS // 4))
            pids = children_of(process.pid)
            process.send_signal(signal.SIGTERM)
            codes.append(process.wait(TIMEOUT))
            wait_for(lambda pids=pids: not any(map(is_alive, pids)))
    assert set(codes) <= ENDED, codes


def slow(folder: Path) -> Tree:
    """A drain that nobody waits for."""
    return merged(good(folder), {"server.drain_lead": "10m", "server.drain": "10m"})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_N9_a_second_signal_within_a_second_is_the_same_one(
    tmp_path: Path, number: signal.Signals
) -> None:
    """`timeout` signals the process and its group, a terminal everybody: the drain goes on."""
    quick = merged(good(tmp_path), {"server.drain_lead": "1500ms", "server.drain": "10s"})
    with Broker.configured(tmp_path, quick) as broker:
        for _ in range(3):
            broker.send(number)
        broker.wait_for(lambda: broker.events("broker.draining"))
        broker.send(number)
        assert broker.wait() == 0
        assert broker.events("broker.aborted") == []
        assert len(broker.events("broker.stopped")) == 1


def test_N9_a_signal_after_the_end_changes_no_exit_code() -> None:
    """While the interpreter winds up, another thread would take what the first one blocks."""
    program = (
        "import os, signal, threading, time\n"
        "from broker.process import serve\n"
        "async def over(*_, **__): return 0\n"
        "serve._serve = over\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "code = serve.serve(None, None, dev=False)\n"
        "for number in serve.ENDING: os.kill(os.getpid(), number)\n"
        "raise SystemExit(code)\n"
    )
    with started(sys.executable, "-c", program) as process:
        assert process.wait(TIMEOUT) == 0


def test_N9_timeout_of_a_shell_drains(tmp_path: Path) -> None:
    """The command that sends everything twice."""
    path = source(tmp_path)
    command = ("timeout", "4", sys.executable, "-m", "broker", "serve", "--config", path)
    with started(*command) as process:
        assert process.wait(TIMEOUT) == 124
        told = process.stderr.read() if process.stderr else b""
    assert b"broker.aborted" not in told
    assert b"broker.stopped" in told or b"broker.started" not in told


STAND = {
    "python": "while True: pass",
    "sleep": "import time; time.sleep(3600)",
    "pipe": "import os; os.read(os.pipe()[0], 1)",
}
"""Ways in which an event loop stands."""


@pytest.mark.parametrize("how", STAND)
@pytest.mark.parametrize("asked", [1, 2])
def test_N9_a_loop_that_stands_is_ended(tmp_path: Path, how: str, asked: int) -> None:
    """Asked twice: at once.  Asked once: when everything should have been over."""
    path = source(tmp_path)
    code = (
        "import asyncio, sys\n"
        "from broker.process import serve as module\n"
        "from broker.app.app import App\n"
        "module.CLOSING = 2.0\n"
        "start = App.start\n"
        "async def stand(self):\n"
        "    await start(self)\n"
        "    print('stands', flush=True)\n"
        f"    asyncio.get_running_loop().call_soon(exec, {STAND[how]!r})\n"
        "App.start = stand\n"
        "from broker.__main__ import main\n"
        f"sys.argv[1:] = ['serve', '--config', {path!r}]\n"
        "sys.exit(main())\n"
    )
    drains = "10m" if asked == 2 else "1s"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env=environment(BROKER_SERVER__DRAIN=drains),
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"stands\n"
            process.send_signal(signal.SIGTERM)
            if asked == 2:
                time.sleep(3)  # what comes within a second of the first is the same wish
                process.send_signal(signal.SIGINT)
            expected = 128 + (signal.SIGINT if asked == 2 else signal.SIGTERM)
            assert process.wait(TIMEOUT) == expected
        finally:
            process.kill()


def test_N9_a_hang_up_during_the_start_is_a_reload_after_it(tmp_path: Path) -> None:
    """By default it would end the process; a configuration tool may signal as soon as it runs."""
    path = source(tmp_path)
    code = (
        "import os, signal, sys\n"
        "from broker.process import serve\n"
        "loop_factory = serve.loop_factory\n"
        "def meet():\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    return loop_factory()\n"
        "serve.loop_factory = meet\n"
        "from broker.__main__ import main\n"
        f"sys.argv[1:] = ['serve', '--config', {path!r}]\n"
        "sys.exit(main())\n"
    )
    with started(sys.executable, "-c", code) as process:
        assert process.stderr is not None
        told = [process.stderr.readline() for _ in range(2)]
        assert [b"broker.started" in told[0], b"broker.reloaded" in told[1]] == [True, True], told
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0
