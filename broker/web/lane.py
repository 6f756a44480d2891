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
from msgspec import Struct

from broker.tables import Generations
from broker.web.known_heads import LONGEST, KnownHead, KnownHeads
from broker.web.response import Answer
from broker.web.whole_request import Again, LaneHandler

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


MAX_REQUESTS = 16384
"""Whole requests of a generation: at 0.5 KB each both take 16 MB, four times that if all are as
long as can be.  Of more visitors than one holds, some have head and body looked up one by one."""


class KnownRequest(Struct, frozen=True):
    """A whole request that came before: as it was parsed, and what answers it."""

    message: RawRequestMessage
    again: Again


class Lane:
    """Which requests may take it: plain ones for these handlers, by path and method.

    And what it has read before, heads (`known_heads`) and whole requests: `forget` it when what a
    handler makes of it may have changed.
    """

    def __init__(self, handlers: Mapping[str, Mapping[str, LaneHandler]], ids: Identifies) -> None:
        self._handlers = handlers
        self.given_id = ids.given_id
        self.new_id = ids.new_id
        heads = self.heads = KnownHeads()
        self.known_in = heads.known_in
        self.came_before, self.keep = heads.came_before, heads.keep
        self._requests: Generations[bytes, KnownRequest] = Generations(MAX_REQUESTS)
        self.find_request = self._requests.find

    def keep_request(self, data: bytes, known: KnownHead, again: Again) -> None:
        """Keep what answers these bytes; `known` is their head."""
        if not known.given_id and len(data) <= LONGEST:
            self._requests[data] = KnownRequest(known.message, again)

    def forget(self) -> None:
        """Forget all that was read."""
        self.heads.clear()
        self._requests.clear()

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
