"""Single-flight: many askers, one mint.

Theory of operation.  The first asker of a key starts a task that belongs to this module, not to
the asker; everybody, the first one included, waits on a future of their own.  So one asker's
cancellation or deadline ends their own wait and nothing else.

- Between the look-up and the insert nothing is awaited, so two askers cannot both start.
- The task runs in an empty context: the first asker's context variables (log fields, traces)
  would otherwise stick to everybody's mint.
- The entry is removed by identity: the end of an old flight cannot remove a newer one.
- A flight that all askers left is cancelled while it only queues (its place goes to the next),
  and finished once its request is out, for then the token is paid for and belongs in the cache.
- A deserted flight is forgotten at the moment it is cancelled, so a new asker starts afresh
  instead of inheriting a cancellation.
- Where mints wait for nothing (`at_once`), the first asker takes the mint's first step by hand.
  One that ends there needs no task, no future and no timer; one that waits goes on in its task.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Generic, TypeVar

from typing_extensions import override

from broker.errors import ServiceUnavailable
from broker.tasks import Begun

T = TypeVar("T")

Work = Coroutine[Any, Any, T]
"""A mint under way."""

RETRY_AFTER_ABORT = 1_000_000
"""Microseconds a caller is told to wait when the broker stopped under their mint: a restart's
worth of patience; another instance may answer at once."""


class Flight(Generic[T]):
    """One mint under way.  `sent` is set by the mint once it can no longer be taken back.

    `led` tells that its first asker is still taking its first step.
    """

    __slots__ = ("_expired", "_limit", "_timer", "_waiters", "background", "led", "sent", "task")

    def __init__(self, *, background: bool) -> None:
        self.task: asyncio.Task[T] | None = None
        self.sent = False
        self.background = background
        self.led = False
        self._waiters: set[asyncio.Future[T]] = set()
        self._limit = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False

    def end_within(self, seconds: float) -> None:
        """Cancel the mint unless it ends within this time: said by the mint when it begins.

        A timer is set only if the mint waits.  `asyncio.timeout` would ask for a task at once.
        """
        self._limit = seconds
        if self.task is not None:
            self._set_timer(self.task)

    def has_expired(self) -> bool:
        """Whether the cancellation that the mint has just met is its own time's, and no other's."""
        return self._expired and self.task is not None and self.task.uncancel() == 0

    def fly(self, task: asyncio.Task[T]) -> None:
        """Take note of the task that the mint is in."""
        self.task = task
        self.led = False
        if self._limit:
            self._set_timer(task)

    def _set_timer(self, task: asyncio.Task[T]) -> None:
        self._timer = task.get_loop().call_later(self._limit, self._expire)

    def _expire(self) -> None:
        if self.task is not None and not self.task.done():
            self._expired = True
            self.task.cancel()

    async def wait(self, timeout: float | None = None) -> T:
        """Wait for the outcome; raises what the mint raised, or TimeoutError after `timeout` s.

        A timer on the waiter's own future costs a quarter of `asyncio.timeout`, and a mint may
        well be quicker than that.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[T] = loop.create_future()
        self._waiters.add(waiter)
        timer = None if timeout is None else loop.call_later(timeout, _give_up, waiter)
        try:
            return await waiter
        finally:
            self._waiters.discard(waiter)
            if timer is not None:
                timer.cancel()
            del waiter  # holds the error, whose traceback holds this frame: a ring that would stay

    @property
    def awaited(self) -> bool:
        """Whether somebody waits at this moment."""
        return self.led or bool(self._waiters)

    @property
    def deserted(self) -> bool:
        """Whether nobody needs the outcome any more."""
        return not self.awaited and not self.background

    def land(self, task: asyncio.Task[T]) -> None:
        """Hand the outcome to everybody who waits."""
        if self._timer is not None:
            self._timer.cancel()
        error = _failure(task)
        for waiter in self._waiters:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(task.result())
            else:
                waiter.set_exception(error)


class SingleFlight(Generic[T]):
    """All mints under way, by key.

    `at_once` tells that mints wait for nothing, or at least not before they have a reason; what
    they do until then must not ask for its task.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self._at_once = at_once
        self._by_key: dict[str, Flight[T]] = {}
        self._tasks: set[asyncio.Task[T]] = set()

    async def join(
        self,
        key: str,
        mint: Callable[[Flight[T]], Work[T]],
        timeout: float | None = None,
    ) -> tuple[T, bool]:
        """Return the outcome of this key's mint and whether this call started it.

        Raises what the mint raised, or TimeoutError if it takes longer than `timeout` seconds.
        """
        flight = self._by_key.get(key)
        leader = flight is None
        if flight is None:
            flight = Flight(background=False)
            context = Context()
            work = mint(flight)
            if self._at_once:
                flight.led = True
                self._by_key[key] = flight
                try:
                    work = Begun(work, context.run(work.send, None))
                except StopIteration as over:
                    self._forget(key, flight)
                    result: T = over.value
                    return result, True
                except BaseException:
                    self._forget(key, flight)
                    raise
            self._start(key, flight, work, context)
        try:
            return await flight.wait(timeout), leader
        finally:
            if flight.deserted:
                self._abandon(key, flight)

    def start_background(self, key: str, mint: Callable[[Flight[T]], Work[T]]) -> bool:
        """Start a mint that nobody waits for; False if one is under way already."""
        if key in self._by_key:
            return False
        flight: Flight[T] = Flight(background=True)
        self._start(key, flight, mint(flight), Context())
        return True

    async def close(self) -> None:
        """Cancel what is under way and wait until it has ended."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drained(self) -> None:
        """Wait until nothing is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, key: str, flight: Flight[T], work: Work[T], context: Context) -> None:
        """Let a mint go on, or begin, in a task of its own."""
        self._by_key[key] = flight
        task = asyncio.get_running_loop().create_task(work, context=context)
        flight.fly(task)
        self._tasks.add(task)

        def landed(task: asyncio.Task[T]) -> None:
            self._tasks.discard(task)
            self._forget(key, flight)
            flight.land(task)
            flight.task = None  # the same ring: error, traceback, frame of the mint, flight

        task.add_done_callback(landed)

    def _abandon(self, key: str, flight: Flight[T]) -> None:
        if flight.sent or flight.task is None or flight.task.done():
            return
        self._forget(key, flight)
        flight.task.cancel()

    def _forget(self, key: str, flight: Flight[T]) -> None:
        if self._by_key.get(key) is flight:
            del self._by_key[key]

    def __len__(self) -> int:
        return len(self._tasks)

    @override
    def __repr__(self) -> str:
        return f"SingleFlight(under_way={len(self._tasks)})"


def _give_up(waiter: "asyncio.Future[T]") -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


def _failure(task: "asyncio.Task[T]") -> BaseException | None:
    """Return what went wrong; reading it also marks it as retrieved when nobody waits."""
    if task.cancelled():
        return ServiceUnavailable("the broker is stopping", RETRY_AFTER_ABORT)
    return task.exception()
