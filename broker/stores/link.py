"""Calls to one node: all those of one turn of the event loop travel together.

The library connects, authenticates, encrypts and parses; what is ours is how calls share a
connection.  A call is put on a list; once the loop has run everybody who was ready, the whole list
is written in one piece on a connection of its own and answered in that order.  A third of the CPU
of the library's pipelines, measured: those check and wrap every command and every reply.

Theory of operation.  A connection belongs to one batch from its first byte to its last reply, so
nothing has to be matched.  While all of them are out, calls gather; so under load batches grow
instead of connections.  A batch that is not answered in time fails as a whole, and its connection
is closed, because the replies that are still to come would be taken for the next batch's.
Connecting is nobody's call: it has a longer time of its own, and who waits for it is told in time
that it took too long.
"""

import asyncio
from collections.abc import Callable

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError
from typing_extensions import override

from broker.stores.failures import Reason, StoreFailed, is_worn, reason_of, translate

CONNECTIONS = 4
"""To one node, at most: while one batch is on its way the next ones gather or leave."""

CONNECT_TIMEOUT = 3.0
"""Seconds to connect, TLS and authentication included."""

Reply = int | bytes | list["Reply"] | None
"""What the server answers."""

_Call = tuple[bytes, "asyncio.Future[Reply]"]


class Link:
    """A node; `connect` makes a connection that is not open yet, `timeout` is seconds a call."""

    def __init__(self, connect: Callable[[], AbstractConnection], timeout: float) -> None:
        self._connect = connect
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._waiting: list[_Call] = []
        self._expiry: asyncio.TimerHandle | None = None
        self._idle: list[AbstractConnection] = []
        self._out = 0
        self._opening = False
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, packed: bytes) -> "asyncio.Future[Reply]":
        """Send a packed command; the reply, or StoreFailed, Forgotten, Elsewhere."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        if not self._waiting:
            self._loop.call_soon(self._leave)
            self._expiry = self._loop.call_later(self._timeout, self._expire)
        self._waiting.append((packed, future))
        return future

    async def close(self) -> None:
        """Close every connection; calls that are out fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._expire()
        for connection in self._idle:
            await connection.disconnect(nowait=True)
        self._idle.clear()

    def _leave(self) -> None:
        """Send what waits, on a connection that is free."""
        if not self._waiting:
            return
        if self._idle:
            calls, self._waiting = self._waiting, []
            if self._expiry is not None:
                self._expiry.cancel()
            self._out += 1
            self._own(self._exchange(self._idle.pop(), calls))
        elif not self._opening and self._out < CONNECTIONS:
            self._opening = True
            self._own(self._open())

    async def _open(self) -> None:
        connection = self._connect()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await connection.connect()  # type: ignore[no-untyped-call]  # has no annotations
        except (RedisError, OSError, TimeoutError) as error:
            await connection.disconnect(nowait=True)
            self._fail_waiting(reason_of(error))
        else:
            self._idle.append(connection)
        finally:
            self._opening = False
        self._leave()

    async def _exchange(self, connection: AbstractConnection, calls: list[_Call]) -> None:
        worn = True
        try:
            async with asyncio.timeout(self._timeout):
                worn = await _converse(connection, calls)
        except (RedisError, OSError, TimeoutError) as error:
            _fail(calls, reason_of(error))
        finally:
            _fail(calls, Reason.CONNECTION)  # whoever has no reply yet: this task was cancelled
            self._out -= 1
            if worn:
                await connection.disconnect(nowait=True)
            else:
                self._idle.append(connection)
            self._leave()

    def _expire(self) -> None:
        """Tell those who wait for a connection that they have waited long enough."""
        self._fail_waiting(Reason.TIMEOUT)

    def _fail_waiting(self, reason: Reason) -> None:
        calls, self._waiting = self._waiting, []
        if self._expiry is not None:
            self._expiry.cancel()
        _fail(calls, reason)

    def _own(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @override
    def __repr__(self) -> str:
        return f"Link(waiting={len(self._waiting)}, out={self._out}, idle={len(self._idle)})"


async def _converse(connection: AbstractConnection, calls: list[_Call]) -> bool:
    """Write all calls, read all replies; returns whether the connection is to be closed."""
    await connection.send_packed_command(b"".join([packed for packed, _ in calls]), False)  # noqa: FBT003 - no health check
    worn = False
    for _, future in calls:
        try:
            reply = await connection.read_response(disable_decoding=True)
        except ResponseError as error:
            ours = translate(error)
            worn = worn or is_worn(ours)
            if not future.done():
                future.set_exception(ours)
        else:
            if not future.done():
                future.set_result(reply)
    return worn


def _fail(calls: list[_Call], reason: Reason) -> None:
    """Tell whoever has no answer yet; each gets an error of their own, which holds no frames."""
    for _, future in calls:
        if not future.done():
            future.set_exception(StoreFailed(reason))
