"""Every task has an owner: endless ones are restarted, short ones are kept until they are done.

A task that nobody awaits ends in silence: its exception waits for the garbage collector, and what
it did is done no more.  For the heart of a process (housekeeping, heartbeats, the supervision of
workers) that is worse than a crash, because nobody is told.  Here each endless task has a name, is
begun anew after whatever ended it, and that is counted and said.

Knows nothing of what the tasks do.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Generator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import structlog
from msgspec import Struct
from typing_extensions import override

from broker.clock import sleep_unless
from broker.rules import restarts
from broker.telemetry.cells import Counter
from broker.telemetry.labels import BackgroundTask

log = structlog.get_logger()

T = TypeVar("T")

Work = Callable[[], Coroutine[Any, Any, None]]
"""Begins an endless piece of work; called again for each restart."""


class Background:
    """Owns endless tasks between `start` and `close`.

    `counts` has a counter for each name; without it restarts are only logged.
    """

    def __init__(self, counts: Mapping[BackgroundTask, Counter] | None = None) -> None:
        self._counts = {} if counts is None else counts
        self._tasks: dict[asyncio.Task[None], BackgroundTask] = {}

    def start(self, name: BackgroundTask, work: Work, until: asyncio.Event | None = None) -> None:
        """Begin, and begin anew whatever ends it, until `close`.

        Work that has an end may end when `until` is set.
        """
        work_kept = self._keep(name, work, until or asyncio.Event())
        self._tasks[asyncio.get_running_loop().create_task(work_kept, name=name.value)] = name

    async def wait(self, seconds: float) -> None:
        """Wait for the end of all that have one, but not longer than this."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(seconds, 0.0))

    async def close(self) -> None:
        """Cancel all, and wait until they are gone."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    def __contains__(self, name: BackgroundTask) -> bool:
        return name in self._tasks.values()

    async def _keep(self, name: BackgroundTask, work: Work, until: asyncio.Event) -> None:
        """Restart after each end: soon at first, later if it keeps ending."""
        loop = asyncio.get_running_loop()
        delay, told = 0.0, set[str]()
        while True:
            began = loop.time()
            failure = await _end_of(work)
            if until.is_set() and failure is None:
                return
            lived = loop.time() - began
            delay = restarts.delay(delay, lived)
            if name in self._counts:
                self._counts[name].inc()
            if lived >= restarts.WELL:
                told.clear()
            kind = type(failure).__name__ if failure is not None else "ended"
            if kind not in told:
                told.add(kind)
                _report(name, kind, failure, delay)
            await sleep_unless(until, delay)
            if until.is_set():
                return

    @override
    def __repr__(self) -> str:
        return f"Background({', '.join(sorted(name.value for name in self._tasks.values()))})"


async def _end_of(work: Work) -> BaseException | None:
    """Return what ended the work, None if it just returned; raises what is meant for this task.

    A CancelledError that nobody asked this task for leaked out of something that the work awaited:
    it is a failure like any other.
    """
    try:
        await work()
    except (GeneratorExit, KeyboardInterrupt, SystemExit):
        raise  # the process or the event loop ends
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return error
    except BaseException as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # its cleaning up failed: no reason to go on
            _defect(error)
            raise asyncio.CancelledError from error
        return error
    return None


def _report(
    name: BackgroundTask, kind: str, failure: BaseException | None, again_in: float
) -> None:
    with contextlib.suppress(Exception):  # a log that fails must not end what it tells of
        log.error(
            "broker.background_restarted",
            task=name.value,
            error=kind,
            again_in_s=again_in,
            exc_info=failure,
        )


def _defect(failure: BaseException) -> None:
    with contextlib.suppress(Exception):  # as in _report
        log.error("broker.defect", exc_info=failure)


class Begun(Coroutine[Any, Any, T]):
    """Work whose first step was taken by hand, `work.send(None)`, and gave `pending`: goes on.

    The task that it is awaited in, or made of, sees that step's wait first, and may be cancelled
    before it does.  What was done in that step must not have asked for its task, as
    `asyncio.timeout` does.
    """

    __slots__ = ("_is_told", "_pending", "_work")

    def __init__(self, work: Coroutine[Any, Any, T], pending: object) -> None:
        self._work = work
        self._pending = pending
        self._is_told = False

    @override
    def send(self, value: object) -> object:
        if self._is_told:
            return self._work.send(value)
        self._is_told = True
        pending, self._pending = self._pending, None
        return pending

    @override
    def throw(self, typ: Any, val: Any = None, tb: TracebackType | None = None) -> object:
        error: BaseException = typ if val is None else val
        pending = self._pending
        if (
            isinstance(error, asyncio.CancelledError)
            and isinstance(pending, asyncio.Future)
            and pending.cancel()
        ):
            return self.send(None)  # as a task: what it waits for is cancelled, and tells it
        self._is_told, self._pending = True, None
        return self._work.throw(error)

    @override
    def close(self) -> None:
        self._work.close()

    @override
    def __await__(self) -> Self:
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> object:
        return self.send(None)


_NOTHING_YET = object()


class Later(Struct, Generic[T], eq=False, kw_only=True):
    """What comes of a question that is out; no task waits for it.

    Whoever asked calls `tell`, once, with what was `said`.  Whoever has it sets `then`, which is
    called at that moment, and may take it back until then (None: nobody wants to know).  `outcome`
    is what came of it, or work that is still to be done for it.  Awaited, it does all of that
    itself.
    """

    then: Callable[[], None] | None = None
    said: Any = _NOTHING_YET

    def tell(self, said: object = None) -> None:
        """The answer is there; never before whoever began to ask has returned."""
        self.said = said
        then, self.then = self.then, None
        if then is not None:
            then()

    def outcome(self) -> T | Coroutine[Any, Any, T]:
        """Return what came of it: asked for once, after `tell`."""
        raise NotImplementedError

    async def wait(self) -> T:
        """Wait in a task."""
        if self.said is _NOTHING_YET:
            told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.then = partial(_settle, told)
            try:
                await told
            finally:
                self.then = None
        outcome = self.outcome()
        return await outcome if isinstance(outcome, Coroutine) else outcome

    def __await__(self) -> Generator[Any, Any, T]:
        return self.wait().__await__()


def _settle(told: "asyncio.Future[None]") -> None:
    if not told.done():  # or who waits was cancelled
        told.set_result(None)


async def aside(work: Callable[[], T]) -> T:
    """Do what may block, such as asking a mounted file system, in a thread of its own.

    The thread may never come back, and nobody waits for it then: neither the loop's executor, which
    has few threads and others who need them, nor the end of the process, which joins those.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(tell: Callable[[], None]) -> None:
        if not done.done():  # or whoever asked was cancelled
            tell()

    def run() -> None:
        tell: Callable[[], None]
        try:
            tell = partial(done.set_result, work())
        except BaseException as error:  # noqa: BLE001 - raised where it was asked for
            tell = partial(done.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, tell)

    threading.Thread(target=run, name="aside", daemon=True).start()
    return await done


class TaskSet:
    """Owns short tasks whose outcome nobody awaits: kept until done, failures logged, not lost."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def start(self, work: Coroutine[Any, Any, object]) -> None:
        """Begin a piece of work."""
        _ = self._task_of(work)

    def cancel(self, work: Coroutine[Any, Any, object]) -> None:
        """End a piece of work that somebody else has begun: CancelledError is raised in it."""
        self._task_of(work).cancel()

    async def finish(self) -> None:
        """Wait for all that are under way, and for those that they begin."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Cancel all, and wait until they are gone."""
        for task in list(self._tasks):
            task.cancel()
        await self.finish()

    def _task_of(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            _defect(failure)

    def __len__(self) -> int:
        return len(self._tasks)

    @override
    def __repr__(self) -> str:
        return f"TaskSet(under_way={len(self)})"
