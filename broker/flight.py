"""Single-flight: many callers, one mint.

Theory of operation.  The first caller of a key starts a task that belongs to this module, not to
the caller; everybody, the first one included, waits on a future of their own.  So one caller's
cancellation or deadline ends their own wait and nothing else.

- Between the look-up and the insert nothing is awaited, so two callers cannot both start.
- The task runs in an empty context: the first caller's context variables (log fields, traces)
  would otherwise stick to everybody's mint.
- The entry is removed by identity: the end of an old flight cannot remove a newer one.
- A flight that all callers left is cancelled while it only queues (its place goes to the next),
  and finished once its request is out, for then the token is paid for and belongs in the cache.
- A deserted flight is forgotten at the moment it is cancelled, so a new caller starts afresh
  instead of inheriting a cancellation.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Generic, TypeVar

from typing_extensions import override

from broker.errors import ServiceUnavailable

T = TypeVar("T")

Work = Coroutine[Any, Any, T]
"""A mint under way."""

RETRY_AFTER_ABORT = 1_000_000
"""Microseconds a caller is told to wait when the broker stopped under their mint: a restart's
worth of patience; another instance may answer at once."""


class Flight(Generic[T]):
    """One mint under way.  `sent` is set by the mint once it can no longer be taken back."""

    __slots__ = ("_waiters", "background", "sent", "task")

    def __init__(self, *, background: bool) -> None:
        self.task: asyncio.Task[T] | None = None
        self.sent = False
        self.background = background
        self._waiters: set[asyncio.Future[T]] = set()

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
        return bool(self._waiters)

    @property
    def deserted(self) -> bool:
        """Whether nobody needs the outcome any more."""
        return not self.awaited and not self.background

    def land(self, task: asyncio.Task[T]) -> None:
        """Hand the outcome to everybody who waits."""
        error = _failure(task)
        for waiter in self._waiters:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(task.result())
            else:
                waiter.set_exception(error)


class SingleFlight(Generic[T]):
    """All mints under way, by key."""

    def __init__(self) -> None:
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
            self._start(key, flight, mint(flight))
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
        self._start(key, flight, mint(flight))
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

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def _start(self, key: str, flight: Flight[T], work: Work[T]) -> None:
        """Begin a mint in a task of its own."""
        self._by_key[key] = flight
        task = asyncio.get_running_loop().create_task(work, context=Context())
        flight.task = task
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
