"""The data listener's plumbing: aiohttp's low-level server with its defaults put right.

`aiohttp.web.Server` is the documented way to serve without an application.  What it does by
default and a public listener must not:

- a handler survives its client: here it is cancelled (`handler_cancellation`);
- an idle or half-sent head keeps its connection for an hour: 75 s, nginx's figure, is enough;
- bodies are decompressed, so 8 KiB could become gigabytes: they stay as they come;
- an unread body is drained for 10 s: one second, then the connection is closed;
- malformed requests are answered in plain text that quotes them, and logged with them: the error
  handler here answers the one envelope and logs nothing of the input.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web
from aiohttp.web_request import BaseRequest
from typing_extensions import override

from broker.answers import error_body
from broker.board import Gauge
from broker.web.answer import JSON_TYPE, ReadyAnswer, head

log = structlog.get_logger()

KEEP_ALIVE = 75.0
"""Seconds; longer than the 60 s after which common balancers give up an idle connection, so it
is them who close it, never we under a request that is on its way."""

LINGER = 1.0
"""Seconds in which the rest of a refused body is read, so that the client sees our answer."""

DRAIN_POLL = 0.02
"""Seconds between looks at what is still busy, while draining."""

BACKLOG = 1024
"""Connections the kernel may hold for us: a page going viral arrives as a burst of connects, and
the usual 128 would reset some of them."""

Handler = Callable[[BaseRequest], Awaitable[web.StreamResponse]]


class DataConnection(web.RequestHandler):
    """One connection; answers what is not HTTP with the envelope."""

    __slots__ = ("_error_head",)

    def attach(self, error_head: Callable[[], tuple[str, str]]) -> "DataConnection":
        """Set where request ids and dates come from; returns the connection itself."""
        self._error_head = error_head
        return self

    @property
    def is_busy(self) -> bool:
        """Whether a request has begun and is not answered yet."""
        return bool(self._request_in_progress)

    @override
    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        request_id, date = self._error_head()
        if status >= 500:  # noqa: PLR2004 - the class of server errors
            log.error("broker.defect", request_id=request_id, exc_info=exc)
            code, text = "INTERNAL_ERROR", "internal error: see the log for this X-Request-Id"
        else:
            code, text = (
                "VALIDATION_ERROR",
                "request: not valid HTTP/1.1; send a well-formed request",
            )
        body = error_body(status, code, text)
        answer = head(status, len(body), JSON_TYPE, request_id, date)
        return ReadyAnswer(status, answer, body, close=True)

    @override
    def log_exception(self, *args: object, **kw: object) -> None:
        error = kw.get("exc_info")
        log.error("broker.defect", error=type(error).__name__)

    @override
    def log_debug(self, *args: object, **kw: object) -> None:
        """Say nothing: what clients do to their own connections is not our news."""


class DataServer(web.Server):
    """Makes `DataConnection`s, and tells how many are open; give it to `loop.create_server`."""

    def __init__(
        self, handler: Handler, error_head: Callable[[], tuple[str, str]], open_now: Gauge
    ) -> None:
        super().__init__(handler, handler_cancellation=True)
        self._error_head = error_head
        self._open = 0
        self._open_now = open_now

    @override
    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._open += 1
        self._open_now.set(self._open)

    @override
    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        super().connection_lost(handler, exc)
        self._open -= 1
        self._open_now.set(self._open)

    async def drain(self, seconds: float) -> None:
        """Close what is idle, let each request that has begun be answered, then close the rest.

        aiohttp's `shutdown` reads nothing more from any connection, so a request whose body is
        still on its way would be cut off.  Answers close their connections while draining.
        """
        ends = self._loop.time() + seconds
        while self._close_idle() and self._loop.time() < ends:  # noqa: ASYNC110 - aiohttp tells nobody
            await asyncio.sleep(DRAIN_POLL)
        self.pre_shutdown()
        await self.shutdown(DRAIN_POLL)

    def _close_idle(self) -> int:
        """Close connections without a request; returns how many have one."""
        busy = 0
        for connection in self.connections:
            if isinstance(connection, DataConnection) and connection.is_busy:
                busy += 1
            else:
                connection.close()
        return busy

    @override
    def __call__(self) -> web.RequestHandler:
        return DataConnection(
            self,
            loop=self._loop,
            keepalive_timeout=KEEP_ALIVE,
            lingering_time=LINGER,
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]  # aiohttp's own documentation: None disables it
        ).attach(self._error_head)
