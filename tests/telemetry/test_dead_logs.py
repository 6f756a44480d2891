"""G12, row N1: who reads the log is gone, stopped, slow or out of room, and nobody else notices.

Real processes, with the descriptors that a shell, a service manager or a log driver would have
given them; they are spoken to over Unix sockets, because a log that is dead tells no port.
"""

import contextlib
import fcntl
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from processes import (
    AGENT,
    TIMEOUT,
    Tree,
    children_of,
    environment,
    far_away,
    good,
    is_alive,
    merged,
    put,
    secret_in,
    started,
    toml,
    wait_for,
    write,
)

from broker.telemetry.streams import ROOM

LOST = "broker_log_lines_dropped_total"
RELOADED = 'broker_config_reloads_total{outcome="success"}'
ROUNDS = "broker_event_loop_lag_seconds_count"
RESTARTS = "broker_worker_restarts_total"

MEMORY_WORKERS = Path(__file__).parents[1] / "memory_workers.py"

DEVELOPMENT = (sys.executable, "-m", "broker", "serve", "--dev")

SMALLEST_PIPE = 4096
"""Bytes: Linux makes none that holds less than a page."""


class Line(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("broker", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Deaf:
    """A broker with the standard streams that a test chose; leaving the context ends it."""

    def __init__(
        self,
        folder: Path,
        tree: Tree,
        *,
        stderr: int | None,
        stdout: int = subprocess.DEVNULL,
        workers: int = 1,
        prefix: Sequence[str] = (),
    ) -> None:
        self.secret = secret_in(tree["clients"]["web"]["secret_file"])
        self._data, self._admin = str(folder / "data"), str(folder / "admin")
        sockets = {"server.listen": f"unix:{self._data}", "admin.listen": f"unix:{self._admin}"}
        path = write(folder / "broker.toml", toml(merged(tree, sockets)))
        program = ["-m", "broker", "serve", "--config", path]
        if workers > 1:
            program = [str(MEMORY_WORKERS), str(workers), path]
        streams: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": stdout,
            "stderr": stderr,
            "env": environment(),
        }
        if prefix or workers > 1:  # what an interpreter finds at its start; whose child is whose
            command = [*prefix, sys.executable, "-W", "error", *program]
            self.process = subprocess.Popen(command, **streams)
        else:
            self.process = started(*program, **streams)
        self._count = 0

    def call(
        self,
        path: str,
        method: str = "GET",
        body: str = "",
        secret: str = "",
        *,
        admin: bool = False,
    ) -> tuple[int, str]:
        """Send one request on a connection of its own."""
        line = Line(self._admin if admin else self._data)
        try:
            line.request(method, path, body or None, {"api-secret": secret} if secret else {})
            answer = line.getresponse()
            return answer.status, answer.read().decode()
        finally:
            line.close()

    def mint(self, count: int = 1) -> None:
        """Let new visitors ask, over one connection; each is given a token."""
        line = Line(self._data)
        for _ in range(count):
            self._count += 1
            body = json.dumps({"agent_id": AGENT, "fingerprint": f"{self._count:016x}"})
            line.request("POST", "/v1/embed-tokens/request", body, {"api-secret": self.secret})
            answer = line.getresponse()
            assert (answer.status, b"token" in answer.read()) == (200, True)
        line.close()

    def metric(self, sample: str) -> float:
        """Return the value of one sample."""
        _, text = self.call("/metrics", admin=True)
        (found,) = [each for each in text.splitlines() if each.startswith(f"{sample} ")]
        return float(found.split()[-1])

    def is_ready(self) -> bool:
        """Whether both listeners say that it takes requests."""
        assert self.process.poll() is None, f"it has ended: {self.process.returncode}"
        try:
            return {self.call("/readyz")[0], self.call("/readyz", admin=True)[0]} == {200}
        except (OSError, http.client.HTTPException):
            return False

    def children(self) -> set[int]:
        """Process ids of the workers."""
        return children_of(self.process.pid)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT)

    def __enter__(self) -> Self:
        try:
            wait_for(self.is_ready)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A configuration that serves, with limits that are far away."""
    return merged(good(tmp_path), far_away())


@contextmanager
def pipe(size: int = 0) -> Iterator[tuple[int, int]]:
    """Make a pipe; closes what is still open of it."""
    ends = os.pipe()
    if size:
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, size)
    try:
        yield ends
    finally:
        for end in ends:
            close(end)


def close(end: int) -> None:
    """Close a descriptor, unless the test was faster."""
    with contextlib.suppress(OSError):
        os.close(end)


def dead_pipe() -> int:
    """Return the end of a pipe to write to, whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def fill(writer: int) -> None:
    """Write until nothing fits any more, and leave the flags as they were."""
    os.set_blocking(writer, False)
    for size in (4096, 1):
        try:
            while True:
                os.write(writer, b"." * size)
        except BlockingIOError:
            pass
    os.set_blocking(writer, True)


def read_all(reader: int) -> list[dict[str, Any]]:
    """Read until everybody who writes is gone."""
    told = bytearray()
    while piece := os.read(reader, 65536):
        told += piece
    return [json.loads(line) for line in told.decode().splitlines() if line]


def lives_on(broker: Deaf) -> None:
    """Everything that a log could harm: requests, probes, housekeeping, signals."""
    broker.mint(15)
    assert broker.call("/v1/validate", "POST", secret="w" * 20) == (200, '{"valid":false}')
    form = "token=" + "x" * 20
    assert broker.call("/v1/revoke", "POST", form, broker.secret)[0] in {200, 415}
    wrong = json.dumps({"agent_id": AGENT, "fingerprint": "a" * 16})
    assert broker.call("/v1/embed-tokens/request", "POST", wrong, "w" * 20)[0] == 401
    assert broker.call("/livez") == (200, '{"status":"ok"}')
    assert broker.is_ready()
    rounds = broker.metric(ROUNDS)
    wait_for(lambda: broker.metric(ROUNDS) > rounds)
    reloads = broker.metric(RELOADED)
    broker.process.send_signal(signal.SIGHUP)
    wait_for(lambda: broker.metric(RELOADED) > reloads)
    broker.mint(15)


def replaces_a_worker(broker: Deaf) -> None:
    """`kill -9`, as ever."""
    before, restarts = broker.children(), broker.metric(RESTARTS)
    os.kill(min(before), signal.SIGKILL)
    wait_for(lambda: broker.metric(RESTARTS) > restarts)
    wait_for(lambda: len(broker.children() - before) == 1 and broker.metric("broker_workers") == 2)


@pytest.mark.parametrize("workers", [1, 2])
class TestEveryProcess:
    """One process, or a supervisor and its workers, who inherit its standard error."""

    def test_N1_G12_a_reader_that_ends_costs_lines_and_nothing_else(
        self, tmp_path: Path, tree: Tree, workers: int
    ) -> None:
        """A log shipper dies: every line from then on is counted, everything else goes on."""
        reader, writer = os.pipe()
        with Deaf(tmp_path, tree, stderr=writer, workers=workers) as broker:
            os.close(writer)
            os.close(reader)
            lives_on(broker)
            wait_for(lambda: broker.metric(LOST) >= 30)
            if workers > 1:
                replaces_a_worker(broker)
                lives_on(broker)
            assert broker.end() == 0

    def test_N1_G12_a_pipe_that_nobody_reads_stops_nothing(
        self, tmp_path: Path, tree: Tree, workers: int
    ) -> None:
        """Full from the start: no request, probe, reload, replacement or drain waits for it."""
        with pipe(SMALLEST_PIPE) as (_, writer):
            fill(writer)
            with Deaf(tmp_path, tree, stderr=writer, workers=workers) as broker:
                lives_on(broker)
                if workers > 1:
                    replaces_a_worker(broker)
                    lives_on(broker)
                assert broker.end() == 0

    def test_N1_G12_a_full_disk_costs_lines_and_nothing_else(
        self, tmp_path: Path, tree: Tree, workers: int
    ) -> None:
        """Every write fails with ENOSPC."""
        full = os.open("/dev/full", os.O_WRONLY)
        with Deaf(tmp_path, tree, stderr=full, workers=workers) as broker:
            os.close(full)
            lives_on(broker)
            wait_for(lambda: broker.metric(LOST) >= 30)
            if workers > 1:
                replaces_a_worker(broker)
            assert broker.end() == 0

    @pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"])
    def test_N1_G12_closed_streams_are_nobodys_socket(
        self, tmp_path: Path, tree: Tree, workers: int, closed: str
    ) -> None:
        """Started without them, it takes their numbers itself, or a client would read the log."""
        shell = ("sh", "-c", f'exec "$@" {closed}', "sh")
        with Deaf(tmp_path, tree, stderr=None, workers=workers, prefix=shell) as broker:
            lives_on(broker)
            wait_for(lambda: broker.metric(LOST) >= 30)
            for pid in {broker.process.pid, *broker.children()}:
                assert Path(f"/proc/{pid}/fd/2").readlink() == Path(os.devnull)
            if workers > 1:
                replaces_a_worker(broker)
            assert broker.end() == 0

    def test_N1_G12_a_start_with_a_dead_pipe_starts(
        self, tmp_path: Path, tree: Tree, workers: int
    ) -> None:
        """Standard output and error both."""
        dead = dead_pipe()
        streams = {"stderr": dead, "stdout": dead}
        with Deaf(tmp_path, tree, **streams, workers=workers, prefix=("env",)) as broker:
            os.close(dead)
            lives_on(broker)
            assert broker.end() == 0

    def test_N1_G12_a_second_signal_ends_it_at_once(
        self, tmp_path: Path, tree: Tree, workers: int
    ) -> None:
        """With nobody who reads: the code is the signal's, and no process is left."""
        slow = merged(tree, {"server.drain_lead": "10m", "server.drain": "10m"})
        with pipe(SMALLEST_PIPE) as (_, writer):
            fill(writer)
            with Deaf(tmp_path, slow, stderr=writer, workers=workers) as broker:
                children = broker.children()
                broker.process.send_signal(signal.SIGTERM)
                wait_for(lambda: broker.call("/readyz", admin=True)[0] == 503)
                time.sleep(1.1)  # a second signal within a second may be the first one, repeated
                assert broker.end() == 128 + signal.SIGTERM
                wait_for(lambda: not any(map(is_alive, children)))


class TestWhatIsLost:
    """Written and lost lines add up, and the log says where the gap is."""

    def test_N1_G12_a_reader_that_comes_back_is_told_how_many_lines_are_missing(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """Stopped until lines are lost, then reading again: no line is torn, none uncounted."""
        mints = ROOM + 200
        with (
            pipe(SMALLEST_PIPE) as (reader, writer),
            Deaf(tmp_path, tree, stderr=writer) as broker,
        ):
            os.close(writer)
            broker.mint(mints)
            wait_for(lambda: broker.metric(LOST) > 0)
            lost = broker.metric(LOST)
            told: list[dict[str, Any]] = []
            reading = threading.Thread(target=lambda: told.extend(read_all(reader)))
            reading.start()
            assert broker.end() == 0
            reading.join(TIMEOUT)
        names = [event["event"] for event in told]
        assert names[-2:] == ["broker.draining", "broker.stopped"]
        notices = [event for event in told if event["event"] == "broker.log_lines_dropped"]
        assert {notice["level"] for notice in notices} == {"warning"}
        assert notices[0]["count"] >= lost  # the last lines may have pushed out another two
        missing = sum(notice["count"] for notice in notices)
        assert names.count("broker.embed_token") + missing == mints
        gap = names.index("broker.log_lines_dropped")
        assert 0 < gap < 100  # what the pipe and one batch hold came before

    def test_N1_G12_a_disk_that_is_full_for_a_while(self, tmp_path: Path, tree: Tree) -> None:
        """A file that may not grow, then is truncated: half a line stays a line of its own."""
        log = tmp_path / "broker.log"
        shell = ("sh", "-c", 'ulimit -f 8 && exec "$@"', "sh")
        with log.open("ab") as file:
            broker = Deaf(tmp_path, tree, stderr=file.fileno(), prefix=shell)
        with broker:
            broker.mint(100)
            wait_for(lambda: minted_in(log) + broker.metric(LOST) == 100)
            *whole, rest = log.read_text().split("\n")
            assert json.loads(whole[0])["event"] == "broker.started"
            assert len(whole) == 1 + minted_in(log) < 100
            os.truncate(log, 0)
            assert broker.end() == 0
        lines = log.read_text().split("\n")
        if rest:  # what was cut off got its line end
            assert lines.pop(0) == ""
        first, *others = [json.loads(line) for line in lines if line]
        assert first["event"] == "broker.log_lines_dropped"
        assert [event["event"] for event in others] == ["broker.draining", "broker.stopped"]
        assert first["count"] == 100 - (len(whole) - 1)

    def test_N1_G12_a_slow_reader_gets_every_line_whole_and_in_order(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """A few bytes at a time."""
        with (
            pipe(SMALLEST_PIPE) as (reader, writer),
            Deaf(tmp_path, tree, stderr=writer) as broker,
        ):
            os.close(writer)
            told = bytearray()

            def read() -> None:
                while piece := os.read(reader, 97):
                    told.extend(piece)
                    time.sleep(0.0005)

            reading = threading.Thread(target=read)
            reading.start()
            broker.mint(300)
            assert broker.metric(LOST) == 0
            wait_for(lambda: told.count(b"broker.embed_token") == 300)  # an end does not wait long
            assert broker.end() == 0
            reading.join(TIMEOUT)
        events = [json.loads(line) for line in told.decode().splitlines()]
        names = [event["event"] for event in events]
        minted = ["broker.embed_token"] * 300
        assert names[:1] == ["broker.started"]
        assert [name for name in names if name == "broker.embed_token"] == minted
        ids = [int(e["request_id"].split("-")[1], 16) for e in events if "request_id" in e]
        assert ids == sorted(ids)

    def test_G12_a_reload_leaves_lines_that_wait_as_they_are(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """Another format holds for what comes after it; nothing is lost, the order is kept."""
        json_tree = merged(tree, {"log.format": "json", "log.level": "info"})
        with (
            pipe(SMALLEST_PIPE) as (reader, writer),
            Deaf(tmp_path, json_tree, stderr=writer) as broker,
        ):
            os.close(writer)
            broker.mint(60)
            config = tmp_path / "broker.toml"
            write(config, config.read_text().replace('"json"', '"console"'))
            broker.process.send_signal(signal.SIGHUP)
            wait_for(lambda: broker.metric(RELOADED) == 1)
            broker.mint(60)
            told = bytearray()

            def read() -> None:
                while piece := os.read(reader, 65536):
                    told.extend(piece)

            reading = threading.Thread(target=read)
            reading.start()
            assert broker.end() == 0
            reading.join(TIMEOUT)
        lines = told.decode().splitlines()
        assert [line.startswith("{") for line in lines] == [True] * 61 + [False] * (len(lines) - 61)
        assert sum(" minted " in line for line in lines[61:]) == 60


def minted_in(log: Path) -> int:
    """How many mints a log has whole lines of."""
    whole, _, _ = log.read_text().rpartition("\n")
    return whole.count('"event": "broker.embed_token"')


class TestDevelopment:
    """`--dev` introduces itself on standard output."""

    @pytest.mark.parametrize("kind", ["dead", "full", "no room"])
    def test_N1_G12_an_introduction_that_nobody_reads_stops_no_start(
        self, tmp_path: Path, kind: str
    ) -> None:
        """Nor does it end with 0, as if it had done what it was asked."""
        data, admin = f"unix:{tmp_path / 'data'}", f"unix:{tmp_path / 'admin'}"
        with pipe(SMALLEST_PIPE) as (reader, writer):
            if kind == "dead":
                os.close(reader)
            elif kind == "full":
                fill(writer)
            out = os.open("/dev/full", os.O_WRONLY) if kind == "no room" else writer
            process = subprocess.Popen(
                [*DEVELOPMENT, "--listen", data, "--admin-listen", admin],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment(BROKER_DEV_SECRET=secrets.token_urlsafe(24)),
            )
            try:
                wait_for(lambda: process.poll() is not None or answers(str(tmp_path / "data")))
                assert process.poll() is None
                process.send_signal(signal.SIGTERM)
                assert process.wait(TIMEOUT) == 0
            finally:
                process.kill()
                process.wait()


def answers(path: str) -> bool:
    """Whether somebody answers there."""
    line = Line(path)
    try:
        line.request("GET", "/livez")
        return line.getresponse().status == 200
    except OSError:
        return False
    finally:
        line.close()


def ends(command: Sequence[str], *, stdout: int, stderr: int, **variables: str) -> int:
    """Run a command to its end; returns its exit code."""
    done = subprocess.run(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=environment(**variables),
        timeout=TIMEOUT,
        check=False,
    )
    return done.returncode


class TestCommands:
    """The exit code is the verdict, whether or not somebody reads why."""

    @pytest.mark.parametrize("kind", ["dead", "full", "no room"])
    def test_N1_no_verdict_is_hidden_by_a_reader_who_is_gone(
        self, tmp_path: Path, tree: Tree, kind: str
    ) -> None:
        """A health check that cannot say why it failed has failed; so has a configuration."""
        bad = write(tmp_path / "bad.toml", toml(put(tree, "server.workers", "many")))
        nobody = f"unix:{tmp_path / 'nobody'}"
        cases = (
            (1, ("healthcheck", "--admin-listen", nobody)),
            (78, ("check", "--config", bad)),
            (78, ("serve", "--config", bad)),
            (1, ("doctor", "--config", relay_without_vendor(tmp_path))),
        )
        with pipe(SMALLEST_PIPE) as (reader, writer):
            if kind == "dead":
                os.close(reader)
            elif kind == "full":
                fill(writer)
            error = os.open("/dev/full", os.O_WRONLY) if kind == "no room" else writer
            for code, arguments in cases:
                command = ("-m", "broker", *arguments)
                assert ends(command, stdout=subprocess.DEVNULL, stderr=error) == code, arguments

    def test_N1_findings_that_nobody_reads_are_findings(self, tmp_path: Path) -> None:
        """`doctor | true`: its problems are its exit code."""
        dead = dead_pipe()
        command = ("-m", "broker", "doctor", "--config", relay_without_vendor(tmp_path))
        assert ends(command, stdout=dead, stderr=subprocess.DEVNULL) == 1
        os.close(dead)

    @pytest.mark.parametrize("redirect", ["> /dev/full", ">&-"])
    def test_N1_a_result_that_could_not_be_written_is_no_success(self, redirect: str) -> None:
        """A key that nobody has is none: 74, and one line that says why."""
        shell = ("sh", "-c", f'exec "$@" {redirect}', "sh")
        done = subprocess.run(
            [*shell, sys.executable, "-m", "broker", "keys", "generate"],
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode == 74
        assert done.stderr.startswith(b"broker: cannot write to standard output: ")
        assert done.stderr.count(b"\n") == 1


def relay_without_vendor(folder: Path) -> str:
    """Configure a relay whose vendor is not there."""
    upstream = {"base_url": "http://127.0.0.1:9", "api_secret": secrets.token_urlsafe(24)}
    tree = {"issuer": {"kind": "upstream", "upstream": upstream}}
    return write(folder / "relay.toml", toml(tree))


ENDS_BADLY = """
import asyncio, gc, logging, sys, threading, warnings
from broker.telemetry import logs
from broker.config.settings import LogSettings

logs.configure(LogSettings(format="json"))
logs.take_over()
canary = sys.argv[1]

class Odd:
    def __init__(self):
        self.me = self
    def __del__(self):
        raise ValueError(canary)
    def __str__(self):
        raise ValueError(canary)

async def main():
    loop = asyncio.get_running_loop()
    loop.call_soon(int, canary)
    await asyncio.sleep(0)

for _ in range(int(sys.argv[2])):
    warnings.warn(canary, stacklevel=1)
    Odd()
    gc.collect()
    threading.Thread(target=int, args=(canary,)).start()
    logging.getLogger("aiohttp").error(Odd())
    logging.getLogger("aiohttp").error("%s %s", canary)
    asyncio.run(main())
raise RuntimeError(canary)
"""


def test_G12_N25_what_python_itself_would_print_is_logged_without_values() -> None:
    """Uncaught errors, destructors, threads, warnings, callbacks, broken log calls."""
    canary = secrets.token_hex(8)
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", ENDS_BADLY, canary, "1"],
        capture_output=True,
        env=environment(),
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == b""
    assert canary.encode() not in done.stderr
    events = [json.loads(line) for line in done.stderr.decode().splitlines()]
    told = [(event["event"], event.get("error")) for event in events]
    assert told[0] == ("broker.library", "UserWarning")
    assert told[-1] == ("broker.defect", "RuntimeError")
    assert told.count(("broker.defect", "ValueError")) >= 2  # the destructor's, the thread's
    assert ("broker.library", "ValueError") in told  # the callback's


@pytest.mark.parametrize("kind", ["dead", "full"])
def test_G12_what_python_itself_would_print_waits_for_nobody(kind: str) -> None:
    """The same with nobody who reads: it ends, and not with 0."""
    with pipe(SMALLEST_PIPE) as (reader, writer):
        if kind == "dead":
            os.close(reader)
        else:
            fill(writer)
        command = ("-W", "always", "-c", ENDS_BADLY, secrets.token_hex(8), "20")
        assert ends(command, stdout=subprocess.DEVNULL, stderr=writer) == 1
