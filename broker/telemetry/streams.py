"""Standard error and output of a process that waits for nobody who reads them.

Lines go into a bounded queue, and a thread of their own writes them.  A thread, because a write
may block whatever the descriptor is: a pipe that nobody empties, a terminal that was stopped, a
disk that hangs.  O_NONBLOCK is no way out: the flag belongs to the open file, which other
processes share (workers, a shell, a supervisor), and regular files ignore it.  The thread is a
daemon and holds no lock while it writes, so one that is stuck holds up neither a reload, nor the
start of a worker, nor the end of the process, which waits for `FLUSH` at most.

A line that finds no room pushes out the oldest; a write that fails loses what it carried, and the
next one is tried all the same.  Lines that were lost are counted, and the first line that gets
through afterwards says how many.  Order is kept.  Lines go out whole, as many as the system writes
at once (PIPE_BUF), so that lines of several processes do not mix.

`write` may be called from any thread, from a signal handler and from `__del__`: it takes no lock
that the interrupted code may hold (queue.SimpleQueue is reentrant, unlike queue.Queue, threading's
Event and structlog's own loggers).
"""

import atexit
import contextlib
import errno
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from typing_extensions import override

from broker.exit_codes import EX_IOERR

ROOM = 2_000
"""Lines that wait at most, of some 400 bytes: a reader may pause for a second under full load."""

LONGEST = 16_384
"""Characters of a line; a longer one is lost.  The longest of ours, a defect's, is a quarter."""

LINGER = 0.02
"""Seconds after a write in which lines gather: to wake the thread costs as much as to write, and so
does each change between it and the event loop, so that one turn for all takes three quarters off
the price of a line under load.  A line that comes alone is written at once."""

FULL = 0.005
"""Seconds in which a reader makes room, where it has little: else each line would be a write."""

FLUSH = 0.5
"""Seconds that the end of a process waits for what can still be written."""

RECHECK = 1_000
"""Milliseconds between looks at a descriptor that somebody else made non-blocking."""


class LineWriter:
    """Writes lines to a descriptor from a thread of its own: never blocks, raises, or grows.

    `notice` makes the line that says how many were lost.
    """

    def __init__(self, descriptor: int) -> None:
        self.notice: Callable[[int], str] | None = None
        self._descriptor = descriptor
        self._queue: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._started = False
        self._lock = threading.RLock()
        self._lost = 0
        self._told = 0
        self._taken = 0
        self._torn = False

    def write(self, line: str) -> None:
        """Have a line written; it brings its own line end."""
        if len(line) > LONGEST:
            self._lose(1)
            return
        if self._queue.qsize() >= ROOM:
            self._push_out()
        self._queue.put(line)
        if not self._started:
            self._start()

    @property
    def lost(self) -> int:
        """Lines that were lost since the start."""
        return self._lost

    def take_lost(self) -> int:
        """Return how many lines were lost since the last call."""
        with self._lock:
            fresh, self._taken = self._lost - self._taken, self._lost
        return fresh

    def flush(self, seconds: float = FLUSH) -> bool:
        """Wait until what was handed over is written or lost; False if that took too long."""
        if not self._started:
            return True
        passed = threading.Event()
        self._queue.put(passed)
        return passed.wait(seconds)

    def _start(self) -> None:
        self._started = True
        try:
            threading.Thread(target=self._work, name="lines", daemon=True).start()
        except RuntimeError:  # no thread is to be had: the next line tries again
            self._started = False
        else:
            atexit.register(self.flush)

    def _push_out(self) -> None:
        """Lose the oldest: what is new tells more about what goes on."""
        with contextlib.suppress(Empty):
            oldest = self._queue.get_nowait()
            if isinstance(oldest, str):
                self._lose(1)
            else:
                oldest.set()

    def _lose(self, count: int) -> None:
        with self._lock:
            self._lost += count

    def _work(self) -> None:
        while True:
            self._write_from(self._queue.get())
            _linger()

    def _write_from(self, item: str | threading.Event | None) -> None:
        """Write this item and all that waits behind it."""
        lines: list[bytes] = []
        size = 0
        while item is not None:
            if isinstance(item, str):
                line = item.encode("utf-8", "backslashreplace")
                if size + len(line) > select.PIPE_BUF:
                    self._write_lines(lines)
                    lines, size = [], 0
                lines.append(line)
                size += len(line)
            else:
                self._write_lines(lines)
                lines, size = [], 0
                item.set()
            try:
                item = self._queue.get_nowait()
            except Empty:
                item = None
        self._write_lines(lines)

    def _write_lines(self, lines: list[bytes]) -> None:
        if not lines:
            return
        lost = self._lost
        head = b"\n" if self._torn else b""  # what was cut off stays a line of its own
        if lost > self._told and self.notice is not None:
            head += self.notice(lost - self._told).encode("utf-8", "backslashreplace")
        data = head + b"".join(lines)
        done = self._put(data)
        if done:
            self._torn = data[done - 1 : done] != b"\n"
        if done >= len(head):
            self._told = lost
        self._count_rest(lines, done - len(head))

    def _count_rest(self, lines: list[bytes], done: int) -> None:
        """Count the lines that did not get through whole; `done` bytes of them were written.

        One that lacks nothing but its end is whole: the next write begins with that.
        """
        for number, line in enumerate(lines):
            done -= len(line)
            if done < 0:
                self._lose(len(lines) - number - (done == -1))
                return

    def _put(self, data: bytes) -> int:
        """Write; returns how many bytes got through before it failed."""
        done = 0
        while done < len(data):
            try:
                done += os.write(self._descriptor, data[done:])
            except BlockingIOError:
                self._await_room()
            except OSError:
                break
        return done

    def _await_room(self) -> None:
        """Wait as a blocking write would, where another process made the file non-blocking."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        poll.poll(RECHECK)
        time.sleep(FULL)

    @override
    def __repr__(self) -> str:
        waiting = self._queue.qsize()
        return f"LineWriter(descriptor={self._descriptor}, waiting={waiting}, lost={self._lost})"


def _linger() -> None:
    """Let lines gather; where the clock refuses a pause, which must not end the thread, go on."""
    with contextlib.suppress(OSError):  # libfaketime, by which dates are tried, knows such moments
        time.sleep(LINGER)


stdout, stderr = LineWriter(1), LineWriter(2)
"""Those of this process; nothing that serves requests writes to the descriptors itself."""


def one_line(text: object) -> str:
    """Escape what would end the line or move the cursor: names in a file may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def complain(text: object) -> None:
    """Say one line to the person who started this, on standard error; never raises or waits."""
    line = one_line(text)
    if sys.stderr is sys.__stderr__:
        stderr.write(f"{line}\n")
    elif sys.stderr is not None:  # this process is a guest's: a test, somebody's script
        print(line, file=sys.stderr)


def tell(text: str) -> None:
    """Print what a command was asked for, and wait for its reader: a pager may take its time.

    A reader who has seen enough is no error, and hides no verdict: the command goes on.  Anything
    else that keeps the text from arriving ends the command with `EX_IOERR`.
    """
    problem = None if sys.stdout else os.strerror(errno.EBADF)
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is in its buffer would fail at the exit
        if not isinstance(error, BrokenPipeError):
            problem = error.strerror
    if problem:
        complain(f"broker: cannot write to standard output: {problem}")
        raise SystemExit(EX_IOERR)


def open_missing() -> None:
    """Fill the places of standard streams that are not open, before anything else is opened.

    The next socket would get the number 2, and a client would read our log.  They are opened the
    wrong way round, as the C library does it for privileged programs: what is written fails, and
    is counted.
    """
    for descriptor, way in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            made = os.open(os.devnull, way)
            if made != descriptor:
                os.dup2(made, descriptor)
                os.close(made)
            os.set_inheritable(descriptor, True)  # noqa: FBT003 - the only way to pass it
