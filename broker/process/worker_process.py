"""A worker as its supervisor sees it: a process, what it was told and has said, what it takes."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import structlog
from msgspec import Struct
from typing_extensions import override

from broker.app.reload import READING
from broker.process.ipc import (
    REPORTS,
    Channel,
    Ready,
    Reload,
    Reloaded,
    ReloadFailed,
    Report,
    Start,
    Stop,
)
from broker.rules.hangs import Pulse

log = structlog.get_logger()

ANSWER_TIME = READING + 5.0
"""Seconds in which a worker that is ready must have taken over new settings: it takes milliseconds,
and one that cannot read its files says so, after the time for that."""

_ROOT = Path(__file__).resolve().parents[2]

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Usage(Struct, frozen=True):
    """CPU time so far, user and system, and memory at this moment."""

    cpu_seconds: float
    resident_bytes: int


class WorkerProcess:
    """One worker process, from its start to its end."""

    def __init__(
        self, index: int, process: asyncio.subprocess.Process, channel: Channel[Report]
    ) -> None:
        self.index = index
        self._process = process
        self._channel = channel
        self._born = time.monotonic()
        self._answers: asyncio.Queue[Reloaded | ReloadFailed | None] = asyncio.Queue()
        self._met = asyncio.Event()
        self.is_ready = False
        self.is_hung = False
        self.pulse = Pulse()
        self.counted_cpu = 0.0
        self._listening = asyncio.ensure_future(self._listen())

    @classmethod
    async def start(cls, begin: Start) -> Self:
        """Start a worker and tell it how to begin; raises OSError if the system has no room."""
        ours, theirs = socket.socketpair()
        with theirs:
            channel = await Channel.over(ours, REPORTS)
            try:
                process = await asyncio.create_subprocess_exec(
                    *_command(theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), begin.shared_cells, *begin.listeners),
                    start_new_session=True,  # a terminal's Ctrl-C is for the supervisor alone
                )
            except BaseException:
                channel.close()
                raise
        channel.send(begin)
        return cls(begin.worker, process, channel)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def serves(self) -> bool:
        """Whether it takes requests, as far as is known."""
        return self.is_ready and not self.is_hung and not self.pulse.is_quiet

    @property
    def is_silent(self) -> bool:
        """Whether it should take requests, and gives no sign of life."""
        return self.is_hung or self.pulse.is_stuck

    @property
    def lived(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._born

    async def met(self) -> bool:
        """Wait until it is ready, or gone; returns whether it is ready."""
        await self._met.wait()
        return self.is_ready

    async def follow(self, settings: dict[str, Any]) -> str | None:
        """Let it take over new settings; returns why it could not, None if it did or has died.

        Raises TimeoutError if it does not answer: it hangs.
        """
        self._channel.send(Reload(settings))
        async with asyncio.timeout(ANSWER_TIME):
            answer = await self._answers.get()
        return answer.error if isinstance(answer, ReloadFailed) else None

    def stop(self) -> None:
        """Let it drain and end."""
        self._channel.send(Stop())

    def kill(self) -> None:
        """End it at once."""
        if self._process.returncode is None:
            self._process.kill()

    async def gone(self) -> int:
        """Wait for its end; returns its exit code, or minus the signal that ended it."""
        code = await self._process.wait()
        await self._listening
        return code

    def usage(self) -> Usage | None:
        """What it takes of the machine."""
        return usage(self.pid)

    async def _listen(self) -> None:
        """Hear it to its end; one that cannot be understood is ended, because it cannot be led."""
        try:
            while (report := await self._channel.receive()) is not None:
                self._take_report(report)
        except Exception:
            with contextlib.suppress(Exception):  # the log must not keep it alive
                log.exception("broker.defect")
            self.kill()
        finally:
            self.is_ready = False
            self._met.set()
            self._answers.put_nowait(None)  # whoever waits for an answer waits in vain
            self._channel.close()

    def _take_report(self, report: Report) -> None:
        match report:
            case Ready():
                self.is_ready = True
                self._met.set()
            case Reloaded() | ReloadFailed():
                self._answers.put_nowait(report)

    @override
    def __repr__(self) -> str:
        return f"WorkerProcess(worker={self.index}, pid={self.pid}, is_ready={self.is_ready})"


def usage(pid: int) -> Usage | None:
    """Return what this process takes by proc(5), None if it is gone or there is no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    user, system, pages = int(fields[11]), int(fields[12]), int(fields[21])
    return Usage((user + system) / _TICKS, pages * _PAGE)


def reason_of(code: int) -> str:
    """Say how a process ended."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # a real-time signal
        return f"signal {-code}"


def _command(end: int) -> list[str]:
    """Return what starts a worker: this Python, warnings as here, and the same `broker` as here.

    `-m` would look for it in the present folder first, where another one may lie.
    """
    flags = [f"-W{option}" for option in sys.warnoptions]
    if Path.cwd() != _ROOT:
        flags.append("-P")
    return [sys.executable, *flags, "-m", "broker.process.worker", str(end)]
