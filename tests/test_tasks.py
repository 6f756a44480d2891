"""Owners of tasks: whatever ends an endless one, it is begun anew, counted, and reported."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import TIMEOUT
from typing_extensions import override
from web.edge import logging_to

from broker.config import load as config
from broker.config.settings import Settings
from broker.rules import restarts
from broker.tasks import Background, Begun, Later, TaskSet, aside
from broker.telemetry.cells import Counter
from broker.telemetry.labels import BackgroundTask
from broker.testing.clock import FakeClock, run_virtual


class Odd(BaseException):
    """Not an Exception, as some libraries have them."""


FAILURES = (
    Exception,
    ValueError,
    OSError,
    BrokenPipeError,
    TimeoutError,
    RecursionError,
    MemoryError,
    StopAsyncIteration,
    AssertionError,
    asyncio.InvalidStateError,
    asyncio.CancelledError,
    Odd,
    None,
)
"""What ends a task; None: it returns."""

ends = st.lists(st.sampled_from(FAILURES), min_size=1, max_size=12)


def settings() -> Settings:
    """Any settings: only the log's matter."""
    return config.from_tree({"issuer": {"kind": "local"}})


class Mortal:
    """Endless work that ends, each time for the next reason, and then goes on for good."""

    def __init__(self, ends: list[type[BaseException] | None]) -> None:
        self._ends = iter(ends)
        self.begun: list[float] = []
        self.cancelled = False

    async def run(self) -> None:
        self.begun.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0)
        for end in self._ends:
            if end is None:
                return
            raise end
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


@given(ends=ends, name=st.sampled_from(BackgroundTask))
def test_N2_a_background_task_outlives_whatever_ends_it(
    ends: list[type[BaseException] | None], name: BackgroundTask
) -> None:
    """Each end is followed by a new beginning and counted; each kind is told once, by its name.

    The pause grows from 0.1 s to 5 s.  Others are left alone, and the owner's end is the end.
    """
    out, count, other = io.StringIO(), Counter(), Counter()
    work, calm = Mortal(ends), Mortal([])

    async def main(_: FakeClock) -> None:
        background = Background({name: count})
        background.start(name, work.run)
        background.start(name, calm.run)
        await asyncio.sleep(5.5 * len(ends))
        assert name in background
        assert repr(background).count(name.value) == 2
        async with asyncio.timeout(1):
            await background.close()
        assert name not in background

    with logging_to(out, settings()):
        run_virtual(main)
    waits = [after - before for before, after in zip(work.begun, work.begun[1:], strict=False)]
    expected = [min(restarts.FIRST * 2**n, restarts.LONGEST) for n in range(len(ends))]
    assert waits == pytest.approx(expected, abs=0.01)
    assert (count.value, other.value, len(calm.begun)) == (len(ends), 0, 1)
    assert work.cancelled
    assert calm.cancelled
    told = [json.loads(line) for line in out.getvalue().splitlines()]
    kinds = list(dict.fromkeys("ended" if end is None else end.__name__ for end in ends))
    assert [(e["event"], e["task"], e["error"]) for e in told] == [
        ("broker.background_restarted", name.value, kind) for kind in kinds
    ]


@pytest.mark.parametrize("failure", [OSError, Odd])
def test_N2_work_whose_cleaning_up_fails_ends_with_its_owner(failure: type[BaseException]) -> None:
    """The failure is told, and takes nothing away from the end that was asked for."""
    out = io.StringIO()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise failure

    async def main(_: FakeClock) -> None:
        background = Background()
        background.start(BackgroundTask.SHARE, work)
        await asyncio.sleep(1)
        async with asyncio.timeout(60):
            await background.close()
        assert BackgroundTask.SHARE not in background

    with logging_to(out, settings()):
        run_virtual(main)
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["broker.defect"]


def test_close_waits_until_all_are_gone() -> None:
    """What they clean up is done when it returns: what comes next may close what they use."""
    gone = list[int]()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(3)
            gone.append(1)

    async def main(_: FakeClock) -> None:
        background = Background()
        background.start(BackgroundTask.SHARE, work)
        await asyncio.sleep(1)
        await background.close()
        assert gone == [1]

    run_virtual(main)


def test_N2_a_failure_after_a_good_life_is_told_again() -> None:
    """One a day is a line a day, and the pause is short again."""
    out, begun = io.StringIO(), list[float]()

    async def work() -> None:
        begun.append(asyncio.get_running_loop().time())
        await asyncio.sleep(restarts.WELL + 1)
        raise ValueError

    async def main(_: FakeClock) -> None:
        background = Background()
        background.start(BackgroundTask.LEASES, work)
        await asyncio.sleep(35)
        await background.close()

    with logging_to(out, settings()):
        run_virtual(main)
    assert begun[2] - begun[1] == pytest.approx(restarts.WELL + 1 + restarts.FIRST, abs=0.01)
    assert out.getvalue().count("broker.background_restarted") == 3


def test_N2_a_failure_at_the_end_is_told_like_any_other() -> None:
    """Work that was asked to end and fails has not ended well; it is not begun anew."""
    out, count = io.StringIO(), Counter()

    async def main(_: FakeClock) -> None:
        until = asyncio.Event()

        async def work() -> None:
            await until.wait()
            raise ValueError

        background = Background({BackgroundTask.WORKERS: count})
        background.start(BackgroundTask.WORKERS, work, until=until)
        await asyncio.sleep(1)
        until.set()
        async with asyncio.timeout(1):
            await background.wait(60)
        await background.close()

    with logging_to(out, settings()):
        run_virtual(main)
    (told,) = map(json.loads, out.getvalue().splitlines())
    assert (told["task"], told["error"], count.value) == ("workers", "ValueError", 1)


async def test_N2_whatever_ends_work_aside_is_raised_where_it_was_asked_for() -> None:
    """Also what is no Exception: nobody waits for a thread that has ended."""

    def work() -> None:
        raise Odd

    with pytest.raises(Odd):
        async with asyncio.timeout(TIMEOUT):
            await aside(work)


class Dead(io.StringIO):
    """A log that nobody can write to."""

    def write(self, _: str, /) -> int:
        raise BrokenPipeError


@pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning")
def test_N2_a_log_that_fails_ends_no_background_task() -> None:
    """The report of a failure must not become the second failure, which nobody would catch."""
    work, count = Mortal([ValueError, BrokenPipeError]), Counter()

    async def main(_: FakeClock) -> None:
        background = Background({BackgroundTask.HOUSEKEEPING: count})
        background.start(BackgroundTask.HOUSEKEEPING, work.run)
        short = TaskSet()
        short.start(_fail())
        await asyncio.sleep(1)
        await background.close()

    with logging_to(Dead(), settings()):
        run_virtual(main)
    assert (count.value, len(work.begun)) == (2, 3)


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
def test_N2_what_ends_the_process_is_let_through(end: type[BaseException]) -> None:
    """It is meant for all."""
    background = Background()

    async def main(_: FakeClock) -> None:
        background.start(BackgroundTask.PACING, Mortal([end]).run)
        await asyncio.sleep(1)

    with pytest.raises(end):
        run_virtual(main)
    (task,) = background._tasks
    assert type(task.exception()) is end  # asked for, or its task says so amid a later test


async def _fail() -> None:
    raise ValueError("a token")


class TestGoingOn:
    async def test_what_was_begun_by_hand_goes_on_as_in_a_task(self) -> None:
        """Results, errors, bare turns and cancellation reach it; its result comes back."""
        seen: list[object] = []
        timed_out = asyncio.Event()

        async def work(gate: "asyncio.Future[str]") -> str:
            seen.append(await gate)
            await asyncio.sleep(0)
            try:
                await asyncio.wait_for(asyncio.Event().wait(), 0.01)
            except TimeoutError:
                seen.append("time")
                timed_out.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append("cancelled")
            return "result"

        gate: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        begun = work(gate)
        task = asyncio.create_task(Begun(begun, begun.send(None)))
        gate.set_result("through")
        await timed_out.wait()
        task.cancel()
        assert await task == "result"
        assert seen == ["through", "time", "cancelled"]

    async def test_what_was_begun_by_hand_is_cancelled_as_a_task_is(self) -> None:
        """Before its task has had a turn, too: what it waits for is cancelled, and then it."""
        seen: list[object] = []
        inner = asyncio.create_task(asyncio.Event().wait())

        async def work(wait: Callable[[], Awaitable[object]]) -> None:
            try:
                await wait()
            except asyncio.CancelledError:
                seen.append("cancelled")
                await asyncio.sleep(0)
                seen.append("cleaned up")
                raise

        for wait in (lambda: inner, lambda: asyncio.sleep(0), lambda: asyncio.sleep(3600)):
            begun = work(wait)
            task = asyncio.create_task(Begun(begun, begun.send(None)))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert seen == ["cancelled", "cleaned up"] * 3
        assert inner.cancelled()

    async def test_an_error_comes_out_as_it_went_in(self) -> None:
        """And what is closed before its end is closed within."""
        gate: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        closed: list[bool] = []

        async def work() -> str:
            try:
                return await gate
            finally:
                closed.append(True)

        begun = work()
        rest = Begun(begun, begun.send(None))
        gate.set_exception(ValueError("odd"))
        with pytest.raises(ValueError, match="odd"):
            await rest
        assert closed == [True]
        gate = asyncio.get_running_loop().create_future()
        begun = work()
        rest = Begun(begun, begun.send(None))
        rest.send(None)
        rest.close()
        assert closed == [True, True]


class Word(Later[int]):
    """Seven."""

    @override
    def outcome(self) -> int:
        return 7


@pytest.mark.parametrize("is_early", [True, False])
async def test_what_is_told_before_anybody_waits_is_there(*, is_early: bool) -> None:
    """Whoever comes to it late does not wait for what has been."""
    word = Word()
    if is_early:
        word.tell()
    else:
        asyncio.get_running_loop().call_soon(word.tell)
    async with asyncio.timeout(TIMEOUT):
        assert await word == 7


class TestTaskSet:
    async def test_N2_a_failure_of_a_short_task_is_told(self) -> None:
        """As a defect, without its words; nobody awaits the task, so nobody else would say so."""
        out = io.StringIO()
        tasks = TaskSet()
        with logging_to(out, settings()):
            tasks.start(_fail())
            await tasks.finish()
        (line,) = out.getvalue().splitlines()
        assert json.loads(line)["event"] == "broker.defect"
        assert "a token" not in line
        assert len(tasks) == 0

    async def test_finishes_what_is_under_way_and_what_that_begins(self) -> None:
        """Nothing that is to be said is lost at the end."""
        tasks, done = TaskSet(), list[int]()

        def later(count: int) -> Coroutine[Any, Any, None]:
            async def work() -> None:
                await asyncio.sleep(0)
                done.append(count)
                if count:
                    tasks.start(later(count - 1))

            return work()

        tasks.start(later(3))
        assert repr(tasks) == "TaskSet(under_way=1)"
        await tasks.finish()
        assert done == [3, 2, 1, 0]

    async def test_ends_what_somebody_else_has_begun(self) -> None:
        """CancelledError is raised where it waits, also if it had not begun."""
        tasks, ended = TaskSet(), list[bool]()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        begun = work()
        begun.send(None)
        tasks.cancel(begun)
        tasks.cancel(work())
        await tasks.finish()
        assert ended == [True]

    async def test_cancels_at_close(self) -> None:
        """For work that nobody needs any more."""
        tasks = TaskSet()
        tasks.start(asyncio.Event().wait())
        await tasks.close()
        assert len(tasks) == 0
