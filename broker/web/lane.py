"""The fast lane: a request that has come whole is answered where it arrives, if nothing waits.

Theory of operation.  aiohttp answers each request in a task of its own, with a request object, a
writer and a response object.  What ends before it waits for anything needs none of them: most
requests are for a token from memory, or refused.  So a connection that is idle takes the first step
of the handler's work by hand, as soon as one whole request has come.  If that was the last one, its
answer is written there and then.  If it waits, it is handed, begun, to aiohttp's own loop, and goes
on inside a task as if it had begun there (`tasks.Begun`).  A handler may also answer with its call,
which spares a coroutine and the exception that ends it: two microseconds of ten; or with what one
call will tell (`tasks.Later`), as a visit of a shared store does: the connection keeps it, and
writes the answer in that call.

The story is written once, and the lane knows nothing of it.  What it asks of a handler is that
nothing before its first wait needs to know the task that it runs in, as `asyncio.timeout` does.
Whether a connection is idle, `connection` knows.
"""

from collections.abc import Mapping
from typing import Protocol

from aiohttp.hdrs import METH_HEAD
from aiohttp.http import HttpVersion11, RawRequestMessage

from broker.web.known_heads import KnownHeads
from broker.web.response import Answer
from broker.web.whole_request import LaneHandler

ANY_METHOD = "*"
"""Stands for whatever method a request has."""


async def failed(error: Exception) -> Answer:
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
        self.known_in, self.forget = heads.known_in, heads.clear
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
