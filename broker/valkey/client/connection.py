"""Calls to one node, over one connection: what gathers while one batch is out is the next batch.

The client library's connections and pipelines are not used, nor its parser (see `resp`).  A call is
put on a list; once the loop has run everybody who was ready, and those of one turn more, and
nothing is due, the whole list is written in one piece, and replies are given out in the order of
the calls.  So batches grow under load, and calls share what each write and each read costs the
kernel.  No task, lock or stream stands between a reply and who waits for it, which is what most of
a round trip would go into.

Theory of operation.  The server answers in order, so the only bookkeeping is a queue of calls.
What is not answered in time takes the connection down with it, because the replies that are still
to come would be taken for those of later calls; everybody who waits on it, or behind it, is told.
So does a reply that is not of the shape that was asked for: whatever put it there, those behind it
may be others', too.
Connecting is nobody's call: it has a longer time of its own, and who waits for it is told after
theirs.  A loop that was busy runs late timers before it reads what has arrived meanwhile, and would
take its own slowness for the server's: so a time that is over is looked at once more, after the
loop has looked at its sockets.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from typing_extensions import override

from broker.valkey.client.errors import Reason, StoreFailed, why
from broker.valkey.client.resp import Reader, Reply
from broker.valkey.client.shapes import ACCEPTED, ANYTHING, Shape
from broker.valkey.client.target import CONNECT_TIMEOUT, Route, Target

ONE_MORE_LOOK = 0.001
"""Seconds from the end of a call's time to the verdict: a turn of the loop lies between."""


class Waiter(Protocol):
    """Who waits for a reply: a future, or whoever can be told like one."""

    def done(self) -> bool:
        """Whether nobody waits any more."""
        ...

    def set_result(self, result: Reply, /) -> None:
        """Take the reply."""
        ...

    def set_exception(self, exception: Exception, /) -> None:
        """Take what went wrong."""
        ...


_Call = tuple[bytes, Shape, Waiter]


class RespProtocol(asyncio.Protocol):
    """One connection: what is written is answered in order.

    `answered` is called whenever nothing is due any more, `ended` once, at its end.
    """

    def __init__(
        self, answered: Callable[[], None], ended: "Callable[[RespProtocol], None]"
    ) -> None:
        self._when_answered = answered
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._reader = Reader()
        self._due: deque[_Call] = deque()
        self._ends = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.reason = Reason.CONNECTION
        self._transport: asyncio.Transport | None = None
        self.is_gone = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no asyncio.Transport

    def send(self, calls: list[_Call], timeout: float) -> None:
        """Write these while nothing is due; each is answered within `timeout` seconds, or fails."""
        self._due.extend(calls)
        if self._reader.is_amid:  # nobody had asked for that
            self.close(Reason.OTHER)
        if self.is_gone or self._transport is None or self._transport.is_closing():
            self._fail_due()
            return
        self._transport.write(b"".join([packed for packed, _, _ in calls]))
        self._ends = self._loop.time() + timeout
        if self._timer is None or self._timer.when() > self._ends:
            self._look_in(timeout)

    def close(self, reason: Reason = Reason.CONNECTION) -> None:
        """End it; what is due fails for this reason."""
        self.reason = reason
        if self._transport is not None:
            self._transport.abort()

    @override
    def data_received(self, data: bytes) -> None:
        numbers = self._reader.numbers(data)
        if numbers is None:
            self._read(data)
        else:
            self._give_out(numbers)
        if not self._due:
            self._when_answered()

    def _give_out(self, numbers: list[int]) -> None:
        """Answer with numbers, in fewer steps than `_read`: nearly all replies are such.

        If one of them is nobody's, none is given to anybody: any may be another's.
        """
        due = self._due
        if len(numbers) > len(due):
            self.close(Reason.OTHER)
            return
        for number in numbers:
            _, shape, waiter = due.popleft()
            if not shape.takes_numbers:
                self._fail(waiter, shape.failure())
                self.close(Reason.OTHER)
                break
            if not waiter.done():
                waiter.set_result(number)

    def _read(self, data: bytes) -> None:
        """Answer with replies of any kind, of which there may be a part."""
        reader, due = self._reader, self._due
        reader.feed(data)
        try:
            while (reply := reader.take()) is not False:
                if not due:  # more replies than calls, or said before it hangs up
                    self.close(reply.reason if isinstance(reply, StoreFailed) else Reason.OTHER)
                    break
                _, shape, waiter = due.popleft()
                if isinstance(reply, Exception):
                    self._fail(waiter, shape.error(reply))
                elif not shape.fits(reply):
                    self._fail(waiter, shape.failure())
                    self.close(Reason.OTHER)
                    break
                elif not waiter.done():
                    waiter.set_result(reply)
        except StoreFailed as failed:  # not the protocol
            self.close(failed.reason)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is due."""
        return not self._due

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.is_gone = True
        if self._timer is not None:
            self._timer.cancel()
        self._ended(self)
        self._fail_due()

    def _fail_due(self) -> None:
        """Tell everybody who waits; each gets an error of their own, which holds no frames."""
        while self._due:
            _, _, waiter = self._due.popleft()
            if not waiter.done():
                waiter.set_exception(StoreFailed(self.reason))

    def _fail(self, waiter: Waiter, error: Exception) -> None:
        if not waiter.done():
            waiter.set_exception(error)
        if isinstance(error, StoreFailed) and error.is_wrong_server and not self._due:
            self.close(error.reason)

    def _look_in(self, seconds: float, ended: float = 0.0) -> None:
        """Look at the time in so many seconds: one timer for all batches, which are many."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._look, ended)

    def _look(self, ended: float) -> None:
        """See whether the time of what is due is over; `ended` is that of the look before."""
        self._timer = None
        if not self._due:  # those that come next begin anew
            return
        left = self._ends - self._loop.time()
        if left > 0:
            self._look_in(max(left, ONE_MORE_LOOK))
        elif ended != self._ends:
            self._look_in(ONE_MORE_LOOK, self._ends)
        else:
            self.close(Reason.TIMEOUT)


class PipelinedConnection:
    """A node; `timeout` is seconds a call.  Another `target` counts from the next connection on."""

    def __init__(self, target: Target, timeout: float) -> None:
        self.target = target
        self._route = Route()
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._waiting: list[_Call] = []
        self._expiry: asyncio.TimerHandle | None = None
        self._talk: RespProtocol | None = None
        self._opening: asyncio.Task[None] | None = None
        self._is_closed = False

    def send(self, packed: bytes, shape: Shape = ANYTHING) -> "asyncio.Future[Reply]":
        """Send a packed command; a reply of this shape, or StoreFailed, NoScript, Redirect."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        self.send_for(packed, shape, future)
        return future

    def send_for(self, packed: bytes, shape: Shape, waiter: Waiter) -> None:
        """Send it as `send`, and tell `waiter`, where the reply arrives, what comes of it."""
        if not self._waiting:
            self._loop.call_soon(self._gather)
        self._waiting.append((packed, shape, waiter))

    @property
    def rests(self) -> bool:
        """Whether nothing is under way here."""
        idle = self._talk is None or self._talk.is_idle
        return idle and self._opening is None and not self._waiting

    async def close(self) -> None:
        """Close the connection for good; calls that are out fail, and so do those that come yet."""
        self._is_closed = True
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._talk is not None:
            self._talk.close()
        self._fail(StoreFailed(Reason.CONNECTION))

    def _leave(self) -> None:
        """Send what waits, or see to it that it can be sent."""
        if self._is_closed:
            self._fail(StoreFailed(Reason.CONNECTION))
        if not self._waiting:
            return
        if self._talk is not None:
            if self._talk.is_idle:
                calls, self._waiting = self._waiting, []
                self._talk.send(calls, self._timeout)
            return
        if self._expiry is None:
            self._expiry = self._loop.call_later(self._timeout, self._look_once_more)
        if self._opening is None:
            self._opening = self._loop.create_task(self._open())

    async def _open(self) -> None:
        talk: RespProtocol | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                talk = await self.target.connect(self._new_conversation, self._route)
                await self._greet(talk)
        except (OSError, ValueError, OverflowError, StoreFailed) as error:
            # a name or a port may be a cluster's word: nobody can be reached there
            self._route.avoid()
            self._fail(error)
        else:
            self._talk = talk
            self._stop_expiry()
        finally:
            self._opening = None
            if talk is not None and self._talk is None:  # cancelled amid its greeting, for one
                talk.close()
        if self._waiting:
            self._leave()

    def _new_conversation(self) -> RespProtocol:
        return RespProtocol(self._leave_later, self._ended)

    def _leave_later(self) -> None:
        """Send what has gathered, once those who were just answered have run."""
        if self._waiting:
            self._loop.call_soon(self._gather)

    def _gather(self) -> None:
        """Let one more turn of the loop pass, for those who ask in it.

        It costs a look at the sockets, and a batch that is written and read costs ten times that:
        with sixteen callers that ask again when answered there are a third fewer of them.
        """
        self._loop.call_soon(self._leave)

    async def _greet(self, talk: RespProtocol) -> None:
        """Authenticate and choose the database; raises StoreFailed."""
        for packed in self.target.greeting():
            future: asyncio.Future[Reply] = self._loop.create_future()
            talk.send([(packed, ACCEPTED, future)], CONNECT_TIMEOUT)
            await future
        if talk.is_gone:  # its end was told before anybody listened
            raise StoreFailed(talk.reason, "hung up")

    def _ended(self, talk: RespProtocol) -> None:
        if self._talk is talk:
            self._talk = None
            if talk.reason is not Reason.CONNECTION:  # silent, or the wrong server
                self._route.avoid()
            if talk.reason is Reason.TIMEOUT:
                self._expire()  # they have waited behind it
            elif self._waiting:
                self._leave()

    def _look_once_more(self) -> None:
        self._expiry = self._loop.call_later(ONE_MORE_LOOK, self._expire)

    def _expire(self) -> None:
        """Tell those who wait for a connection that they have waited long enough."""
        self._fail(StoreFailed(Reason.TIMEOUT))

    def _fail(self, error: Exception) -> None:
        """Tell all who wait; each gets an error of their own, which holds no frames."""
        calls, self._waiting = self._waiting, []
        self._stop_expiry()
        reason, detail = Reason.CONNECTION, ""
        if isinstance(error, StoreFailed):
            reason, detail = error.reason, error.detail
        elif isinstance(error, TimeoutError):
            reason = Reason.TIMEOUT
        else:
            detail = why(error)
        for _, _, waiter in calls:
            if not waiter.done():
                waiter.set_exception(StoreFailed(reason, detail))

    def _stop_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    @override
    def __repr__(self) -> str:
        return (
            f"PipelinedConnection(waiting={len(self._waiting)}, connected={self._talk is not None})"
        )
