"""A request that has come whole, in as few objects as can be.

Handlers of the fast lane (`lane`) take it or aiohttp's own request: what they ask of either has the
same name.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web
from aiohttp.http import RawRequestMessage
from aiohttp.web_request import BaseRequest
from msgspec import Struct
from multidict import CIMultiDictProxy
from typing_extensions import override

from broker.tasks import Later
from broker.web.response import Answer


class WholeRequest(Struct, gc=False):
    """Head and body, of which nothing is still on its way.

    `facts` is what a handler found out from the head alone, if the same bytes will always mean the
    same: it is given back with the next head of the same bytes.  `trace` is the one of this request
    where that is told apart from the head.  `again` is set by a handler that needs to read nothing
    to answer the same bytes, head and body, once more.
    """

    message: RawRequestMessage
    body: bytes
    connection: web.RequestHandler
    facts: object = None
    trace: str = ""
    again: "KnownRequest | None" = None

    @property
    def headers(self) -> "CIMultiDictProxy[str]":
        """The head's fields."""
        return self.message.headers

    @property
    def raw_path(self) -> str:
        """The target as it came."""
        return self.message.path

    @property
    def remote(self) -> str | None:
        """The peer's address; of one on a Unix socket, which has none, an empty string."""
        peer = self.connection.peername
        if peer is None:
            return None
        return str(peer[0]) if isinstance(peer, list | tuple) else str(peer)

    @override
    def __repr__(self) -> str:
        return f"WholeRequest({self.message.method}, {len(self.body)} bytes)"


Request = BaseRequest | WholeRequest
"""What handlers of the fast lane take."""

Work = Coroutine[Any, Any, Answer]

FirstStep = Answer | Later[Answer] | Work
"""An answer, one that a call will tell, or work that is to be done for it."""

LaneHandler = Callable[[Request, str], FirstStep]
"""Answers a request; the second argument is its id."""


class KnownRequest(Struct, frozen=True, gc=False):
    """What answers a request that comes again, to the byte: `handler`, with what it read of it.

    Nothing that the collector visits, for there are many; and no head, which is large.
    """

    handler: Callable[[Any, str], FirstStep]
    read: object
