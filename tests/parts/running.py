"""Processes as an operator starts them: the broker, and whatever else listens."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import plain

sys.path.append(str(Path(__file__).parents[1]))  # for programs, which pytest does not tell

START = 30.0
"""Seconds that a process may take until it answers, on a machine that is busy with other tests."""


class Broker:
    """A `broker serve --dev` that answers; `curl_line` is what it printed for people."""

    def __init__(self, process: "subprocess.Popen[Any]", log: Path) -> None:
        self._process = process
        self._log = log
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, f"the broker did not start:\n{self.log}"
        introduction = json.loads(first)
        self.url: str = introduction["url"]
        self.admin_url: str = introduction["admin_url"]
        self.secret: str = introduction["api_secret"]
        self.curl_line = process.stdout.readline().rstrip("\n")

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def log(self) -> str:
        """What it wrote to standard error so far."""
        return self._log.read_text(encoding="utf-8")

    @property
    def token_url(self) -> str:
        """Where tokens are requested."""
        return f"{self.url}/v1/embed-tokens/request"

    def request(
        self, body: Mapping[str, object], headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """Ask for a token over a connection of its own."""
        return plain.post(
            self.token_url, json=body, headers={"api-secret": self.secret, **(headers or {})}
        )

    def stop(self) -> None:
        """End it as a supervisor does; it must end well, and nothing it wrote may be a defect."""
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(timeout=START)
        log = self.log
        assert code == 0, log
        assert "broker.defect" not in log
        assert "broker.background_restarted" not in log
        assert "Traceback" not in log
        assert self.secret not in log


@contextmanager
def broker(folder: Path, settings: Mapping[str, object] | None = None) -> Iterator[Broker]:
    """Run a development broker on free ports; `settings` are `section.key` as in its file."""
    import processes

    overrides = {
        "BROKER_" + key.upper().replace(".", "__"): str(value)
        for key, value in (settings or {}).items()
    }
    log = folder / "broker.log"
    command = ["-m", "broker", "serve", "--dev"]
    command += ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]
    with (
        log.open("w", encoding="utf-8") as stderr,
        processes.started(
            *command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=processes.environment(**overrides),
            cwd=str(folder),
        ) as process,
    ):
        try:
            running = Broker(process, log)
            yield running
            running.stop()
        finally:
            process.kill()


@contextmanager
def daemon(
    command: Sequence[str], log: Path, ready: str, *, any_status: bool = False
) -> Iterator[None]:
    """Run any other server until the URL `ready` answers 200, and end it afterwards.

    `any_status` is for proxies, whose own answer may well be a refusal.
    """
    with (
        log.open("w", encoding="utf-8") as output,
        subprocess.Popen(command, stdout=output, stderr=output) as process,
    ):
        try:
            until(
                lambda: _answers(ready, any_status=any_status),
                f"{command[0]} to answer; it wrote {log}",
            )
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=START)
            except subprocess.TimeoutExpired:
                process.kill()


def tool(name: str) -> str:
    """Return the path of a program that came with a Python package of this environment."""
    return str(Path(sys.executable).with_name(name))


def free_port() -> int:
    """Return a port that nobody listens on, for servers that cannot say which one they got."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Any, what: str, timeout: float = START) -> None:
    """Ask every 50 ms until `condition()` is true; fails after `timeout` seconds."""
    ends = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < ends, f"waited {timeout:g} s for {what}"
        time.sleep(0.05)


def output_of(command: Sequence[str], given: str | None = None) -> str:
    """Run a client to its end and return what it printed; it must succeed."""
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"
    return done.stdout


def _answers(url: str, *, any_status: bool = False) -> bool:
    try:
        return plain.get(url).status_code == httpx.codes.OK or any_status
    except httpx.TransportError:
        return False
