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

What came before is not read again: a whole request is looked up by its bytes and leads to what its
handler read of it, or else its head is (`known_heads`).  While each request has a trace of its own,
none comes again as a whole, and only heads are looked up.

The story is written once, and the lane knows nothing of it.  What it asks of a handler is that
nothing before its first wait needs to know the task that it runs in, as `asyncio.timeout` does.
Whether a connection is idle, `connection` knows.
"""

from collections.abc import Mapping
from typing import Protocol

from aiohttp.hdrs import METH_HEAD
from aiohttp.http import HttpVersion11, RawRequestMessage

from broker.tables import Generations
from broker.web.known_heads import KnownHead, KnownHeads
from broker.web.response import Answer
from broker.web.whole_request import KnownRequest, LaneHandler

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
"""Whole requests of a generation: at 0.7 KB each both take 23 MB, with what was read of them.  If
all are as long as can be, and one more generation is being freed, they take 70 MB, and 110 MB with
agents' models in signs of four bytes.  Of more visitors than both hold, some have head and body
looked up one by one."""

LONGEST_REQUEST = 1024
"""Bytes of a whole request that is kept: plain ones have 300 to 600."""


class Lane:
    """Which requests may take it: plain ones for these handlers, by path and method.

    And what it has read before, heads (`known_heads`) and whole requests: `forget` it when what a
    handler makes of it may have changed.
    """

    def __init__(self, handlers: Mapping[str, Mapping[str, LaneHandler]], ids: Identifies) -> None:
        self._handlers = handlers
        self.given_id = ids.given_id
        self.new_id = ids.new_id
        self.heads = KnownHeads()
        self._requests: Generations[bytes, KnownRequest] = Generations(MAX_REQUESTS)
        self.find_request = self._requests.find

    def keep_request(self, data: bytes, head: KnownHead, known: KnownRequest) -> None:
        """Keep what answers these bytes, which begin with this head.

        One with an id of its own does not come again.
        """
        if not head.given_id and len(data) <= LONGEST_REQUEST:
            self._requests[data] = known

    def forget(self) -> None:
        """Forget all that was read; at once, for there are secrets in it: 30 ms if it is full."""
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
