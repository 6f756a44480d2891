"""Brokers without the imports: a process that has done them once, and forks for each start.

Four fifths of the CPU of a start are imports, and the tests start a thousand brokers.  A `Forked`
is a `subprocess.Popen` all the same: a child of this process, with descriptors, environment,
folder, signals and an exit code of its own.  What differs: the kernel shows the command line of the
process that forked.  Tests of a start itself, of its memory or of what the kernel shows of it run
an interpreter of their own.

`python forked.py` is that process: on descriptor 0 it gets, for each start, a request and the
descriptors that the new process shall have.  A supervisor that it forks has such a process of its
own, from which it has its workers.
"""

import asyncio
import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2): children whose parent has ended become this process's."""

LONGEST = 200_000
"""Bytes of a request."""

MOST = 16
"""Descriptors of a request."""


_one_at_a_time = threading.Lock()
"""Because it is this process that takes children over, for a moment."""


class Server:
    """The process that forks, seen from here: started when the first test asks for it."""

    def __init__(
        self, environment: Mapping[str, str], running: socket.socket | None = None
    ) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._ours = running
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl

    def fork(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> int:
        """Have a process started; returns its number.  It is a child of this process."""
        with _one_at_a_time:
            server = self._ours or self._start()
            try:
                assert self._prctl(SUBREAPER, 1) == 0
                socket.send_fds(server, [json.dumps(request).encode()], list(descriptors))
                number = int(server.recv(16))  # from the process between, ...
                assert server.recv(16) == b"ended"  # ... which has ended by now
            finally:
                self._prctl(SUBREAPER, 0)
        return number

    def _start(self) -> socket.socket:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", __file__], stdin=theirs, env=self._environment
            )
        atexit.register(self._end)
        return self._ours

    def _end(self) -> None:
        if self._ours is not None and self._process is not None:
            self._ours.close()
            self._process.wait()


_servers: dict[frozenset[tuple[str, str]], Server] = {}
"""By the environment that Python saw as it started."""


def _here() -> tuple[object, ...]:
    """Which Python, which `broker`, and what Python runs as it starts: a test may choose others."""
    return sys.executable, Path.cwd(), os.environ.get("PYTHONPATH")


HERE = _here()

RUN = {"broker.__main__", "broker.process.worker"}
"""What `-m` runs."""

KNOWN = {"PATH", "PYTHONPATH", "PYTHONHASHSEED"}
"""What may stand in that."""


class Forked(subprocess.Popen[bytes]):
    """A process that starts as `python -W error *arguments` would."""

    def __init__(self, arguments: Sequence[str], **options: Any) -> None:
        super().__init__(arguments, **options)

    def _execute_child(
        self,
        args: Sequence[str],
        executable: object,
        preexec_fn: object,
        close_fds: bool,
        pass_fds: object,
        cwd: str | None,
        env: Mapping[str, str],
        startupinfo: object,
        creationflags: object,
        shell: bool,
        *pipes: int,
    ) -> None:
        """Ask the other process in place of fork and exec: the one step that differs."""
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = pipes[:6]
        given = [p2cread, c2pwrite, errwrite]
        shared = [own if end == -1 else end for own, end in enumerate(given)]
        request = {
            "arguments": list(args),
            "environment": dict(env),
            "folder": cwd or str(Path.cwd()),
            "descriptors": [0, 1, 2],
            "session": False,
        }
        try:
            self.pid = _server_for(env).fork(request, shared)
            self._child_created = True
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def starts_alike(environment: Mapping[str, str]) -> bool:
    """Whether a process with this environment can be forked.

    Not if a variable tells Python or a library something when it is loaded, not if a test has
    chosen another Python, folder or path, and not for a benchmark.
    """
    is_usual = "pytest" in sys.modules and _here() == HERE
    return is_usual and _seen_by_python(environment).keys() <= KNOWN


def _seen_by_python(environment: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if not k.startswith("BROKER_")}


def _server_for(environment: Mapping[str, str]) -> Server:
    seen = _seen_by_python(environment)
    return _servers.setdefault(frozenset(seen.items()), Server(seen))


def _serve(theirs: socket.socket) -> None:
    """Fork for each request, until there are no more; what is forked has the end of its work."""
    number = -1
    with theirs, contextlib.suppress(KeyboardInterrupt):
        while True:
            request, descriptors, _, _ = socket.recv_fds(theirs, LONGEST, MOST)
            if not request:
                return
            between = os.fork()
            if between == 0:
                between, number = os.getpid(), os.fork()
                if number == 0:
                    break
                theirs.send(str(number).encode())
                os._exit(0)
            os.waitpid(between, 0)
            theirs.send(b"ended")
            for descriptor in descriptors:
                os.close(descriptor)
    if number:
        return  # somebody has pressed Ctrl-C
    while os.getppid() == between:
        time.sleep(0.0005)
    _become(json.loads(request), descriptors)


def _load_everything() -> None:
    sys.path[0] = str(Path.cwd())  # as `-m` does
    import broker

    for module in pkgutil.walk_packages(broker.__path__, "broker."):
        if module.name not in RUN:
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # or each process would copy and collect all of it as it ends: 0.1 s of CPU


def _become(request: Mapping[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """Be what was asked for, to its end."""
    from broker.telemetry import logs

    above = max(request["descriptors"]) + MOST
    for number, descriptor in zip(request["descriptors"], _moved(descriptors, above), strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if request["session"]:
        os.setsid()
    os.chdir(request["folder"])
    coerced = {k: v for k, v in os.environ.items() if k == "LC_CTYPE"}  # by Python, as it starts
    os.environ.clear()
    os.environ.update(coerced | request["environment"])
    logs.share_key(os.urandom(32))  # what a process draws as it starts
    option, *rest = request["arguments"]
    if "--workers" in rest or Path(option).name == "memory_workers.py":
        _fork_workers()
    if option == "-m":
        sys.argv, sys.path[0] = rest, request["folder"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [option, *rest]
        sys.path[0] = str(Path(option).parent)
        runpy.run_path(option, run_name="__main__")
    raise SystemExit(0)


def _moved(descriptors: Sequence[int], above: int) -> list[int]:
    """Move descriptors out of the way of those that they shall become."""
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    return moved


def _fork_workers() -> None:
    """Let this process, a supervisor, have its workers from a fork of what it is now."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        _serve(theirs)
        os._exit(0)
    theirs.close()
    atexit.register(ours.close)
    server = Server({}, running=ours)

    async def create(*command: str, pass_fds: Sequence[int], **_: object) -> Worker:
        """Stand for asyncio.create_subprocess_exec, as the supervisor calls it."""
        request = {
            "arguments": command[command.index("-m") :],
            "environment": dict(os.environ),
            "folder": str(Path.cwd()),
            "descriptors": [0, 1, 2, *pass_fds],
            "session": True,
        }
        null = os.open(os.devnull, os.O_RDWR)
        try:
            return Worker(server.fork(request, [null, null, 2, *pass_fds]))
        finally:
            os.close(null)

    asyncio.create_subprocess_exec = create


class Worker:
    """Stands for asyncio's Process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = asyncio.ensure_future(self._end())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    async def wait(self) -> int | None:
        await asyncio.shield(self._ended)
        return self.returncode

    async def _end(self) -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        handle = os.pidfd_open(self.pid)
        loop.add_reader(handle, ended.set)
        await ended.wait()
        loop.remove_reader(handle)
        os.close(handle)
        self.returncode = _code_of(self.pid)


def _code_of(pid: int) -> int:
    """Return the exit code of a child that has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, os.WNOHANG)[1])


if __name__ == "__main__":
    try:
        _load_everything()
    except KeyboardInterrupt:
        raise SystemExit from None
    assert threading.active_count() == 1
    _serve(socket.socket(fileno=os.dup(0)))
