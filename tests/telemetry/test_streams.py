"""The line writer against real descriptors: nothing is lost in silence, torn or out of order."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import TIMEOUT, environment

from broker.telemetry.streams import LONGEST, ROOM, LineWriter


def writer_to(descriptor: int) -> LineWriter:
    """Make one that tells of gaps as a log does."""
    writer = LineWriter(descriptor)
    writer.notice = lambda count: f"lost {count}\n"
    return writer


def add_up(text: str) -> tuple[list[str], int]:
    """Return the lines that came, and how many are told to be missing."""
    lines = text.split("\n")
    assert lines.pop() == ""
    told = [line for line in lines if line.startswith("lost ")]
    rest = [line for line in lines if line and not line.startswith("lost ")]
    return rest, sum(int(line.split()[1]) for line in told)


class _Disk(LineWriter):
    """Has room for so many bytes at each write; 0 fails, as a full disk does."""

    def __init__(self, descriptor: int, room: list[int]) -> None:
        super().__init__(descriptor)
        self.room = room

    def _put(self, data: bytes) -> int:
        most = self.room.pop(0) if self.room else len(data)
        return super()._put(data[:most])


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    room=st.lists(st.just(0) | st.integers(0, 5000), max_size=20),
)
def test_N1_G12_whatever_fails_lines_come_whole_or_are_counted(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], room: list[int]
) -> None:
    """Partial and failed writes in any order: what came, in its order, and what was told add up."""
    path = tmp_path_factory.mktemp("log") / "log"
    handed = [f"{number:04}" + "." * size for number, size in enumerate(sizes)]
    with path.open("wb") as file:
        writer = _Disk(file.fileno(), room)
        writer.notice = lambda count: f"lost {count}\n"
        for at in range(0, len(handed), 4):
            writer._write_lines([f"{line}\n".encode() for line in handed[at : at + 4]])
        writer.room.clear()
        writer._write_lines([b"last\n"])
    came = path.read_text().split("\n")
    whole = [line for line in came if line in {*handed, "last"}]
    assert whole == [line for line in [*handed, "last"] if line in whole]
    assert len(whole) + writer.lost == len(handed) + 1
    told = [int(line.removeprefix("lost ")) for line in came if line.startswith("lost ")]
    assert sum(told) >= writer.lost  # a notice that was cut off is written again


def test_G12_what_is_cut_off_at_its_very_end_is_a_line_of_its_own(tmp_path: Path) -> None:
    """A line or a notice without its line end: what follows it begins a new one."""
    path = tmp_path / "log"
    with path.open("wb") as file:
        writer = _Disk(file.fileno(), [3, 0, 7])
        writer.notice = lambda count: f"lost {count}\n"
        for line in (b"one\n", b"two\n", b"six\n", b"ten\n"):
            writer._write_lines([line])
    assert path.read_text() == "one\nlost 1\nlost 2\nten\n"
    assert writer.lost == 2


def test_G12_what_a_notice_takes_of_a_write_is_no_part_of_the_lines(tmp_path: Path) -> None:
    """A write that is cut off behind the notice: the line behind it is lost, and counted."""
    path = tmp_path / "log"
    with path.open("wb") as file:
        writer = _Disk(file.fileno(), [0, len("lost 1\n") + 2])
        writer.notice = lambda count: f"lost {count}\n"
        for line in (b"one\n", b"two\n", b"six\n"):
            writer._write_lines([line])
    assert (path.read_text(), writer.lost) == ("lost 1\ntw\nlost 1\nsix\n", 2)


def test_G12_a_queue_that_is_full_loses_the_oldest_and_says_so() -> None:
    """Bounded, whatever comes; what is new is what one wants to know."""
    reader, end = os.pipe()
    writer = writer_to(end)
    for number in range(ROOM * 3):
        writer.write(f"{number:08} {'.' * 60}\n")
        assert writer._queue.qsize() <= ROOM
    before = writer.lost
    assert before > 0
    text = drain(reader, writer, end)
    lines, missing = add_up(text)
    assert len(lines) + missing == ROOM * 3
    assert writer.lost == missing == before
    numbers = [int(line.split()[0]) for line in lines]
    assert numbers == sorted(numbers)
    assert numbers[-1] == ROOM * 3 - 1
    assert writer.take_lost() == before
    assert writer.take_lost() == 0


def drain(reader: int, writer: LineWriter, end: int) -> str:
    """Read all that is written until the writer is done."""
    pieces: list[bytes] = []

    def read() -> None:
        while piece := os.read(reader, 65536):
            pieces.append(piece)

    reading = threading.Thread(target=read)
    reading.start()
    assert writer.flush(TIMEOUT)
    os.close(end)
    reading.join(TIMEOUT)
    os.close(reader)
    return b"".join(pieces).decode()


def test_G12_a_line_that_is_too_long_is_lost() -> None:
    """So that the bound on lines is one on bytes."""
    reader, end = os.pipe()
    writer = writer_to(end)
    writer.write("." * LONGEST + "\n")
    writer.write("short\n")
    assert add_up(drain(reader, writer, end)) == (["short"], 1)


def test_N1_a_flag_that_another_process_has_set_loses_nothing() -> None:
    """O_NONBLOCK belongs to the open file: EAGAIN is a full pipe, and no failure."""
    reader, end = os.pipe()
    os.set_blocking(end, False)
    writer = writer_to(end)
    for number in range(1500):
        writer.write(f"{number:08} {'.' * 60}\n")
    lines, missing = add_up(drain(reader, writer, end))
    assert (len(lines), missing, writer.lost) == (1500, 0, 0)


def test_G12_lines_of_threads_keep_their_order_and_stay_whole() -> None:
    """Many write at once."""
    reader, end = os.pipe()
    writer = writer_to(end)
    handed = [[f"{thread} {number}" for number in range(200)] for thread in range(8)]

    def write(lines: list[str]) -> None:
        for line in lines:
            writer.write(f"{line}\n")

    threads = [threading.Thread(target=write, args=(lines,)) for lines in handed]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines, missing = add_up(drain(reader, writer, end))
    assert missing == 0
    for number, own in enumerate(handed):
        assert [line for line in lines if line.startswith(f"{number} ")] == own


def test_G12_an_end_waits_for_what_can_be_written_and_not_longer(tmp_path: Path) -> None:
    """A good file gets the last line; a pipe that nobody reads holds up nobody."""
    with (tmp_path / "log").open("wb") as file:
        writer = writer_to(file.fileno())
        writer.write("last\n")
        assert writer.flush(TIMEOUT)
    assert (tmp_path / "log").read_text() == "last\n"
    reader, end = os.pipe()
    stuck = writer_to(end)
    for _ in range(1000):
        stuck.write("." * 100 + "\n")
    started = time.monotonic()
    assert not stuck.flush(0.1)
    assert time.monotonic() - started < TIMEOUT
    drain(reader, stuck, end)


def test_N1_a_socket_is_a_log_like_any_other() -> None:
    """As a service manager's journal gives one: read, then read no more, then gone."""
    ours, theirs = socket.socketpair()
    writer = writer_to(theirs.fileno())
    with theirs:
        writer.write("first\n")
        assert ours.recv(100) == b"first\n"
        for number in range(ROOM):
            writer.write(f"{number} {'.' * 1000}\n")
        assert not writer.flush(0.05)
        ours.close()
        assert writer.flush(TIMEOUT)
        assert writer.lost > ROOM / 2
        before = writer.lost
        writer.write("last\n")
        assert writer.flush(TIMEOUT)
        assert writer.lost == before + 1


def test_G12_a_text_is_written_as_it_is_and_one_that_is_none_escaped() -> None:
    """Names of files may be in any language, and may be no text at all."""
    reader, end = os.pipe()
    writer = writer_to(end)
    writer.write("caf\u00e9 \udcff\n")
    assert drain(reader, writer, end) == "caf\u00e9 \\udcff\n"


INTERRUPTED = """
import signal, sys
from broker.telemetry.streams import stderr

def handle(*_):
    stderr.write("from a handler\\n")

class Cycle:
    def __init__(self):
        self.me = self
    def __del__(self):
        stderr.write("from a destructor\\n")

signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for number in range(20_000):
    Cycle()
    stderr.write("%d\\n" % number)
signal.setitimer(signal.ITIMER_REAL, 0)
assert stderr.flush(30)
print(stderr.lost)
"""


def test_G12_a_line_may_be_written_in_the_middle_of_another() -> None:
    """By a signal handler, or by a destructor that the collector calls: no lock is waited for."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        capture_output=True,
        env=environment(),
        timeout=TIMEOUT * 2,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert b"from a handler\n" in done.stderr
    assert b"from a destructor\n" in done.stderr
    numbers = [int(line) for line in done.stderr.split() if line.isdigit()]
    assert numbers == sorted(numbers)


def test_N1_a_process_that_gets_no_thread_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next line tries again; what waited is written then."""
    reader, end = os.pipe()
    writer = writer_to(end)

    def refuse(_thread: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        writer.write("first\n")
    writer.write("second\n")
    assert add_up(drain(reader, writer, end)) == (["first", "second"], 0)


def test_G12_a_clock_that_refuses_a_pause_ends_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As libfaketime's does when another thread waits: the next line is written all the same."""

    def refuse(_seconds: float) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(time, "sleep", refuse)
    path = tmp_path / "log"
    with path.open("wb") as file:
        writer = LineWriter(file.fileno())
        for line in ("first", "second", "third"):
            writer.write(f"{line}\n")
            assert writer.flush(TIMEOUT)
    assert path.read_text() == "first\nsecond\nthird\n"
