"""What each signal does, by the time since the first one: the rule alone, without a process."""

import asyncio
import signal
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config.settings import Duration
from broker.process import serve
from broker.process.serve import AT_ONCE, CLOSING, ONE_WISH, TYPED_TWICE, Ending
from broker.process.supervisor import Supervisor

DRAIN = Duration(30_000_000)


class Ended(BaseException):
    """The process would be gone."""


class Told(Supervisor):
    """What is told to whoever runs: nothing is started."""

    def __init__(self) -> None:
        self.orders: list[str] = []

    def stop(self) -> None:
        self.orders.append("stop")

    def abort(self) -> None:
        self.orders.append("abort")


class One:
    """A process without workers: it has nobody to abort."""

    def __init__(self) -> None:
        self.orders: list[str] = []

    def stop(self) -> None:
        self.orders.append("stop")


class Process:
    """A process that can be sent signals at any second, and what it did."""

    def __init__(self, patch: pytest.MonkeyPatch, *, watched: bool, app: Any) -> None:
        self.now = 1000.0
        self.alarms: list[float] = []
        self.written: list[str] = []
        self.code: int | None = None
        self.app = app
        patch.setattr(serve.time, "monotonic", lambda: self.now)
        patch.setattr(serve.signal, "setitimer", lambda _which, after: self.alarms.append(after))
        patch.setattr(serve.os, "isatty", lambda number: watched and number == 2)
        patch.setattr(serve.os, "_exit", self._exit)
        patch.setattr(serve.stderr, "write", self.written.append)
        patch.setattr(serve.stderr, "flush", lambda seconds: self.written.append(f"{seconds}"))
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)  # Ended, which would be told as a defect

        async def made() -> Ending:
            return Ending(app, DRAIN)

        self.ending = self._loop.run_until_complete(made())

    def close(self) -> None:
        self._loop.close()

    def _exit(self, code: int) -> None:
        self.code = code
        raise Ended

    def send(self, number: int, at: float) -> None:
        """Send a signal so many seconds after the beginning, and let the loop run."""
        self.now = 1000.0 + at
        self.ending._end(number, None)
        self._loop.run_until_complete(asyncio.sleep(0))


SIGNALS = st.sampled_from([signal.SIGTERM, signal.SIGINT])


@given(
    watched=st.booleans(),
    first=SIGNALS,
    second=SIGNALS,
    after=st.sampled_from([0.0, 0.2, TYPED_TWICE, 0.5, 0.99, ONE_WISH, 60.0]),
    workers=st.booleans(),
)
def test_N9_a_second_signal_ends_at_once_unless_it_is_the_same_wish(
    watched: bool, first: int, second: int, after: float, workers: bool
) -> None:
    """The first drains under an alarm; the exit code is that of the signal that ended it."""
    app = Told() if workers else One()
    with pytest.MonkeyPatch.context() as patch:
        process = Process(patch, watched=watched, app=app)
        try:
            process.send(first, 0.0)
            assert process.alarms == [DRAIN.seconds + CLOSING]
            typed = watched and first == signal.SIGINT
            assert process.written == (
                [f"stopping, within {DRAIN}; Ctrl-C again stops at once\n"] if typed else []
            )
            assert (app.orders, process.code) == (["stop"], None)
            process.send(second, after)
        finally:
            process.close()
    apart = TYPED_TWICE if watched and second == signal.SIGINT else ONE_WISH
    if after < apart:
        assert (app.orders, process.code, len(process.alarms)) == (["stop"], None, 1)
        return
    assert process.alarms[1:] == [AT_ONCE]
    assert process.code == 128 + second
    assert app.orders == (["stop", "abort", "abort"] if workers else ["stop"])
    assert process.written[-1] == f"{serve.LAST_WORDS}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_N9_an_alarm_ends_what_hangs(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Workers first, and with the code of the signal that asked for the end."""
    app = Told()
    process = Process(monkeypatch, watched=False, app=app)
    process.send(number, 0.0)
    with pytest.raises(Ended):
        process.ending._give_up(signal.SIGALRM, None)
    process.close()
    assert (app.orders, process.code) == (["stop", "abort"], 128 + number)


def test_N9_a_signal_after_the_loops_end_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs between any two lines: what it raised would come out of one of them."""
    app = Told()
    process = Process(monkeypatch, watched=False, app=app)
    process.close()
    process.ending._end(signal.SIGTERM, None)
    assert (app.orders, process.code) == ([], None)


def test_each_connection_may_have_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft limit becomes the hard one, and a system that refuses stops no start."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(serve.resource, "getrlimit", lambda _which: (1024, 4096))
    monkeypatch.setattr(serve.resource, "setrlimit", lambda _which, both: asked.append(both))
    serve._allow_connections()
    assert asked == [(4096, 4096)]

    def refuse(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(serve.resource, "setrlimit", refuse)
    serve._allow_connections()


def test_the_loop_is_uvloop_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And asyncio's own elsewhere."""
    uvloop = pytest.importorskip("uvloop")
    assert serve.loop_factory() is uvloop.new_event_loop
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert serve.loop_factory() is None


def test_the_numbers_of_an_end_fit_each_other() -> None:
    """What is typed twice is a wish sooner than what a service manager sends twice."""
    assert 0 < TYPED_TWICE < ONE_WISH <= AT_ONCE < CLOSING
