"""One connection of either listener: aiohttp's, with its defaults put right.

The one place of the rules about when a connection ends and how much it may hold.  What aiohttp does
by default and a public listener must not:

- an answer given before the body has ended keeps the connection, and the next request is read out
  of that body: here such an answer says `Connection: close`, and the connection ends;
- bytes that follow a request with `Upgrade` in one packet are dropped, so that what comes after
  them is read from its middle: here that request is the last, as is each CONNECT, whose body would
  be the next request;
- a target whose host is broken Punycode ends what answers, and its connection stays for ever: here
  it is refused, and a connection ends with whatever answers it;
- a handler survives its client: here it is cancelled (`handler_cancellation`);
- a client that ends its sending half is taken for gone: here it has a second (`HALF_CLOSED`) to be
  answered in;
- an idle connection that is closed stays open, and unread: here it ends;
- an idle connection is kept for an hour, half a head with it: the idle time is a setting, a head
  has `HEAD_TIMEOUT` from its first byte, and one that began within the idle time is answered;
- a client that does not read holds its connection for ever: what is unsent for `UNSENT_TIMEOUT`
  ends it, and no request is taken from it meanwhile (`ReadyAnswer`, which all answers are);
- a line of a head has 8 KB, too little behind proxies, and a head has no bound in all;
- bodies are decompressed, so 8 KiB could become gigabytes: they stay as they come;
- who reads a body whose framing breaks half-way is not told and waits without an end: here it is
  told, and answers 400 at once;
- an unread body is drained for 10 s: one second, then the connection is closed;
- malformed requests are answered in plain text that quotes them, and logged with them: the error
  handler here answers the one envelope and logs nothing of the input.

Private names of aiohttp 3.14 are used here and in `lane_connection`: see `aiohttp_internals`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from http import HTTPStatus
from typing import Any

import structlog
from aiohttp import StreamReader, web
from aiohttp.hdrs import METH_CONNECT
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import _ErrInfo
from aiohttp.web_request import BaseRequest
from typing_extensions import override

from broker.errors import HeadTooLarge
from broker.web.head_bounds import (
    HEAD_TIMEOUT,
    HEAD_TOO_LARGE,
    MAX_FIELD,
    MAX_FIELDS,
    MAX_HEAD,
    host_error,
    is_followed,
    is_too_large,
    size_of,
)
from broker.web.response import JSON_TYPE, Answer, ReadyAnswer, head
from broker.wire.responses import error_body

log = structlog.get_logger()

UNSENT_TIMEOUT = 30.0
"""Seconds that a part of an answer may wait for a client to read: one that reads at all takes
64 KiB in less, and one that does not would hold its connection for ever."""

LINGER = 1.0
"""Seconds in which the rest of a refused body is read, so that the client sees our answer."""

HALF_CLOSED = 1.0
"""Seconds in which a client that has sent its last byte (FIN) is still answered.  One that only
ends its sending half (`nc -N`, RFC 9112 section 9.6) looks like one that has gone until something
is written to it: what is at hand is written, and who waits for a slot of the budget leaves it."""

LAST_LOOK = 0.01
"""Seconds between the end of the idle time and the close: bytes that had come in time, while the
event loop was busy, are read in between."""

READ_BUFFER = 16 * 1024
"""Bytes of a body after which a connection is read no further until somebody takes them (aiohttp
allows twice that): a good body has 8 KiB."""

NOT_HTTP = "request: not valid HTTP/1.1; send a well-formed request"

Handler = Callable[[BaseRequest], Awaitable[web.StreamResponse]]


class DataConnection(web.RequestHandler):
    """One connection; answers what is not HTTP with the envelope.

    `error_head` gives request id and date for that.  `keep_alive` is how many seconds it may be
    idle.
    """

    __slots__ = (
        "_body",
        "_error_head",
        "_half_closed_timer",
        "_head_bytes",
        "_head_timer",
        "_is_full",
        "_maybe_head",
        "_unsent_timer",
    )

    def __init__(
        self, manager: web.Server, error_head: Callable[[], tuple[str, str]], keep_alive: float
    ) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=keep_alive,
            lingering_time=LINGER,
            max_line_size=MAX_FIELD,
            max_field_size=MAX_FIELD,
            max_headers=MAX_FIELDS,
            read_bufsize=READ_BUFFER,
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]  # aiohttp's own documentation: None disables it
        )
        self._error_head = error_head
        self._body: StreamReader = EMPTY_PAYLOAD
        self._head_bytes = 0
        self._maybe_head = 0  # came with the request before: at most this much of it is of a head
        self._head_timer: asyncio.TimerHandle | None = None
        self._unsent_timer: asyncio.TimerHandle | None = None
        self._half_closed_timer: asyncio.TimerHandle | None = None
        self._is_full = False  # what it has taken is answered, and nothing more is

    @property
    def is_busy(self) -> bool:
        """Whether a request has come and is not answered yet, also one that nobody has taken."""
        is_taken = self._waiter is None and self._request_count > 0
        return self._task_handler is not None and (is_taken or bool(self._messages))

    @property
    def may_ask(self) -> bool:
        """Whether a request may be on its way: half a head is here, or the client is new."""
        return self._head_timer is not None or not self._request_count

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.transport is not None:
            self.transport.set_write_buffer_limits(high=0)  # told of every byte that is not taken
        if self._task_handler is not None:
            self._task_handler.add_done_callback(self._note_end)

    def _note_end(self, handling: "asyncio.Task[None]") -> None:
        """End a connection whose requests nobody answers any more: no timer of it would."""
        if handling.cancelled() or (failure := handling.exception()) is None:
            return
        log.error("broker.defect", exc_info=failure)
        if self.transport is not None:
            self.transport.abort()

    @override
    def connection_lost(self, exc: BaseException | None) -> None:
        self._end_head()
        self._end_unsent()
        if self._half_closed_timer is not None:
            self._half_closed_timer.cancel()
        self._body = EMPTY_PAYLOAD
        super().connection_lost(exc)

    @override
    def pause_writing(self) -> None:
        """Give a client that does not read its time; a close would wait for it without an end."""
        super().pause_writing()
        if self.transport is not None:
            self._unsent_timer = self._loop.call_later(UNSENT_TIMEOUT, self.transport.abort)

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_unsent()

    def _hand_over(self) -> None:
        """Give aiohttp a request that it has not been given yet, before it is told of an end."""

    @override
    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer what has come whole, if that is soon; returns whether to keep the connection."""
        self._hand_over()
        is_whole = self._is_full or self._body.is_eof()
        is_handled = self._waiter is None and self._request_count > 0  # taken, and not answered
        if self.transport is None or not (is_whole and (self._messages or is_handled)):
            return False
        self._is_full = True
        self._half_closed_timer = self._loop.call_later(HALF_CLOSED, self.transport.close)
        return True

    @override
    def close(self) -> None:
        """End it with its last answer; at once if it is idle: aiohttp would keep it, and not read.

        A request that came on it then would wait, unread, until all others are answered.
        """
        self._hand_over()
        is_idle = self._waiter is not None and not self._waiter.done()
        super().close()
        if is_idle and self.transport is not None:
            self.transport.close()

    @override
    async def shutdown(self, timeout: float | None = LINGER) -> None:
        """End it; what its client has not read by then is dropped.

        A close would wait for that client, and uvloop's own end for the close, without an end.
        """
        self._hand_over()
        transport = self.transport
        await super().shutdown(timeout)
        if transport is not None:
            transport.abort()

    @override
    def data_received(self, data: bytes) -> None:
        """Parse, and keep count of heads: aiohttp bounds each line, but not all, nor the time."""
        if self._is_full:
            return
        known, before, in_body = self._request_count, self._body, not self._body.is_eof()
        super().data_received(data)
        new = self._request_count - known
        if not new:
            self._goes_on(len(data), in_body=in_body)
            return
        if in_body and not before.is_eof():
            self._end_broken(before)
            return
        self._check_targets(new)
        message, self._body = self._messages[-1]
        maybe_head = self._maybe_head + len(data)
        self._maybe_head = len(data) or self._maybe_head
        if self._head_bytes or not data or maybe_head > MAX_HEAD:
            self._check_sizes(new)
        if self._is_full:
            return
        if isinstance(message, _ErrInfo):
            if is_too_large(message.exc, message.message):
                self._messages.pop()
                self._refuse_head()
        elif message.upgrade and (message.method == METH_CONNECT or is_followed(data, self._body)):
            self._is_full = True

    @override
    def finish_response(
        self, request: BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """Answer; the last answer of a connection says that it is."""
        is_last = self._is_full and not self._messages
        if is_last or self._close or not request.content.is_eof():
            resp.force_close()
            content: Any = request.content  # its types do not know that an exception can go
            if isinstance(content.exception(), web.RequestPayloadError):
                # told; now aiohttp lingers, so that a client that still sends sees the answer
                content.set_exception(None)
        return super().finish_response(request, resp, start_time)

    @override
    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        request_id, date = self._error_head()
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            log.error("broker.defect", request_id=request_id, exc_info=exc)
            code, text = "INTERNAL_ERROR", "internal error: see the log for this X-Request-Id"
        elif isinstance(exc, HeadTooLarge):
            code, text = exc.code, exc.message
        else:
            code, text = "VALIDATION_ERROR", NOT_HTTP
        body = error_body(status, code, text)
        text = head(status, len(body), JSON_TYPE, request_id, date)
        return ReadyAnswer(Answer(status, text.encode("latin-1"), body, closes=True))

    @override
    def log_exception(self, *args: object, **kw: object) -> None:
        error = kw.get("exc_info")
        if isinstance(error, web.RequestPayloadError):  # the rest of a refused body broke, too
            return
        log.error("broker.defect", error=type(error).__name__)

    @override
    def log_debug(self, *args: object, **kw: object) -> None:
        """Say nothing: what clients do to their own connections is not our news."""

    def _end_broken(self, body: StreamReader) -> None:
        """Tell who reads a body that its framing broke, and read nothing more.

        The parser has given it up, and put an error in its place into the queue, which would be the
        answer to a request that nobody sent.
        """
        self._messages.pop()
        self._is_full = True
        body.set_exception(web.RequestPayloadError("broken transfer"))

    def _goes_on(self, size: int, *, in_body: bool) -> None:
        """Count what has begun and not ended, a body or a head; a head has its time, too."""
        if not size or self._close or self._force_close:
            return
        if in_body:
            self._maybe_head += size
            return
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD:
            self._refuse_head()
        elif self._head_timer is None:
            self._head_timer = self._loop.call_later(HEAD_TIMEOUT, self._head_is_late)

    def _head_is_late(self) -> None:
        """End a connection whose head does not come; unless it is we who did not read it."""
        self._head_timer = None
        if self._waiter is None:
            self._head_timer = self._loop.call_later(HEAD_TIMEOUT, self._head_is_late)
        else:
            self.force_close()

    def _end_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_unsent(self) -> None:
        if self._unsent_timer is not None:
            self._unsent_timer.cancel()
            self._unsent_timer = None

    def _check_targets(self, new: int) -> None:
        """Refuse targets whose host cannot be read, such as one of broken Punycode.

        aiohttp asks for the host outside of what it guards, and nobody would answer any more.
        """
        for n in range(len(self._messages) - new, len(self._messages)):
            message, _ = self._messages[n]
            if error := host_error(message):
                self._messages[n] = (_ErrInfo(400, error, ""), EMPTY_PAYLOAD)

    def _check_sizes(self, new: int) -> None:
        """Refuse the first of the `new` heads that is too large, and what follows it."""
        self._end_head()
        for n in range(len(self._messages) - new, len(self._messages)):
            message, _ = self._messages[n]
            if size_of(message) > MAX_HEAD:
                while len(self._messages) > n:
                    self._messages.pop()
                self._refuse_head()
                return

    def _refuse_head(self) -> None:
        """Answer that the head is too large, after what came before it, and read nothing more.

        The body that stands for the rest of it never ends: aiohttp then lingers before it closes,
        as after a refused body, so that a client which is still sending sees the answer.
        """
        self._end_head()
        self._body = StreamReader(self, READ_BUFFER, loop=self._loop)
        error = _ErrInfo(HEAD_TOO_LARGE.status, HEAD_TOO_LARGE, "")
        self._messages.append((error, self._body))
        self._is_full = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @override
    def _process_keepalive(self) -> None:
        """Close what is idle: aiohttp calls this when the idle time may be over."""
        if self._loop.time() < self._next_keepalive_close_time:
            super()._process_keepalive()  # which comes back then
        else:
            self._keepalive_handle = self._loop.call_later(LAST_LOOK, self._close_if_idle)

    def _close_if_idle(self) -> None:
        self._hand_over()
        if self._head_timer is None:
            super()._process_keepalive()
        else:  # the next request began in time; its head has a time of its own
            self._keepalive_handle = None
