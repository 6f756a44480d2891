"""The fast lane: a request that has come whole is answered where it arrives, if nothing waits.

Theory of operation.  aiohttp answers each request in a task of its own, with a request object, a
writer and a response object.  What ends before it waits for anything needs none of them: most
requests are for a token from memory, or refused.  So a connection that is idle takes the first step
of the handler's coroutine by hand, as soon as one whole request has come.  If the coroutine has
ended, its answer is written there and then.  If it waits, it is handed, begun, to aiohttp's own
loop, and goes on inside a task as if it had begun there (`Begun`).

The story is written once, as coroutines, and the lane knows nothing of it.  What it asks of a
handler is that nothing before its first wait needs to know the task that it runs in, as
`asyncio.timeout` does.  Whether a connection is idle, `connection` knows.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from aiohttp.hdrs import METH_HEAD
from aiohttp.http import HttpVersion11, RawRequestMessage
from typing_extensions import override

from broker.web.known_heads import KnownHeads
from broker.web.response import ReadyAnswer
from broker.web.whole_request import LaneHandler, Work

ANY_METHOD = "*"
"""Stands for whatever method a request has."""


class Begun(Work):
    """A coroutine whose first step was taken by hand: whoever goes on sees that step's wait first.

    `pending` is what it waits for, as it told whoever drove it.
    """

    __slots__ = ("_is_told", "_pending", "_work")

    def __init__(self, work: Work, pending: object) -> None:
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
    def throw(
        self,
        typ: Any,
        val: Any = None,
        tb: TracebackType | None = None,
    ) -> object:
        self._is_told, self._pending = True, None
        error: BaseException = typ if val is None else val
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


async def answered(answer: ReadyAnswer) -> ReadyAnswer:
    """Return the answer of work that ended with its first step."""
    return answer


async def failed(error: Exception) -> ReadyAnswer:
    """Raise what work raised in its first step."""
    raise error


class Identifies(Protocol):
    """Where request ids come from."""

    def given_id(self, headers: Mapping[str, str]) -> str:
        """Return the well-formed id that a caller sent, empty if there is none."""
        ...

    def new_id(self) -> str:
        """Make an id."""
        ...


class Lane:
    """Which requests may take it: plain ones for these handlers, by path and method.

    And the heads that it has read before (`known_heads`); `forget` them when what a handler makes
    of a head may have changed.
    """

    def __init__(self, handlers: Mapping[str, Mapping[str, LaneHandler]], ids: Identifies) -> None:
        self._handlers = handlers
        self.given_id = ids.given_id
        self.new_id = ids.new_id
        heads = self._heads = KnownHeads()
        self.find, self.forget = heads.find, heads.clear
        self.came_before, self.keep = heads.came_before, heads.keep

    def handler_of(self, message: RawRequestMessage) -> LaneHandler | None:
        """Return what answers this request, if it is a plain one."""
        if (
            message.should_close
            or message.upgrade
            or message.chunked
            or message.version != HttpVersion11
        ):
            return None
        handlers = self._handlers.get(message.path)
        if handlers is None or message.method == METH_HEAD:
            return None
        return handlers.get(message.method) or handlers.get(ANY_METHOD)
