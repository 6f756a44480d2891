"""A connection whose plain requests take the fast lane (`lane`); all others are aiohttp's.

A connection is idle when aiohttp's loop waits for its next request: then nothing is queued, under
way, refused or closing, and what was answered is sent.  Only then is a request answered here, so
answers keep their order, and a client that does not read is answered no further.
"""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.http import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_request import BaseRequest
from typing_extensions import override

from broker.tasks import TaskSet
from broker.web.connection import READ_BUFFER, DataConnection
from broker.web.head_bounds import is_followed
from broker.web.known_heads import KnownHead
from broker.web.lane import Begun, Lane, answered, failed
from broker.web.whole_request import WholeRequest, Work


class LaneConnection(DataConnection):
    """One connection of the data listener; `leaving` owns what is cancelled with it."""

    __slots__ = ("_begun", "_is_between", "_lane", "_leaving", "_serve")

    def __init__(
        self,
        manager: web.Server,
        error_head: Callable[[], tuple[str, str]],
        keep_alive: float,
        lane: Lane,
        leaving: TaskSet,
    ) -> None:
        super().__init__(manager, error_head, keep_alive)
        self._lane = lane
        self._leaving = leaving
        self._begun: Work | None = None  # of the message that is first in the queue
        self._is_between = True  # the parser has read whole requests, and nothing of the next one
        self._serve = manager.request_handler
        self._request_handler = self._go_on

    @override
    def connection_lost(self, exc: BaseException | None) -> None:
        begun, self._begun = self._begun, None
        super().connection_lost(exc)
        if begun is not None:
            self._leaving.cancel(begun)

    @override
    def data_received(self, data: bytes) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done() or self._paused or self._is_full or self._head_bytes:
            self._read_on(data)
            return
        if self._is_between and self._take_known(data, waiter):
            return
        self._waiter = None  # nobody is to be woken for what is answered here
        try:
            is_one = self._read_on(data)
        finally:
            self._waiter = waiter
        if (not is_one or not self._answer(data)) and self._messages:
            waiter.set_result(None)

    def _take_known(self, data: bytes, waiter: "asyncio.Future[None]") -> bool:
        """Answer one whole request whose head was read before; returns whether it is one."""
        end = data.find(b"\r\n\r\n") + 4
        known = self._lane.heads.find(data[:end])
        if known is None or known.length != len(data) - end or self._is_gone:
            return False
        message = known.message
        request = WholeRequest(
            message.method,
            message.path,
            message.version,
            message.headers,
            data[end:],
            self,
            known.facts,
        )
        self._request_count += 1
        self._maybe_head = 0
        if not self._step(known.handler(request, known.given_id or self._lane.new_id())):
            self._messages.append((message, EMPTY_PAYLOAD))
            waiter.set_result(None)
        return True

    def _read_on(self, data: bytes) -> bool:
        """Parse; returns whether that was exactly one whole request, and nothing else."""
        was_between, self._is_between = self._is_between, self._is_between and not data
        body, known = self._body, self._request_count
        came, was_in_body = body.total_bytes, not body.is_eof()
        super().data_received(data)
        new = self._request_count - known
        if new == 1 and was_between and self._messages:
            message, body = self._messages[-1]
            if isinstance(message, RawRequestMessage) and not message.upgrade:
                self._is_between = not is_followed(data, body)
                return self._is_between
        elif not new and was_in_body and data:
            self._is_between = (
                body.is_eof()
                and body.total_bytes - came == len(data)
                and body.total_bytes <= READ_BUFFER  # beyond it, the parser may hold bytes back
                and not self._buffer_paused
            )
        return False

    def _answer(self, data: bytes) -> bool:
        """Take the first step of the only message's handler, if it may take the lane."""
        message, content = self._messages[0]
        if not isinstance(message, RawRequestMessage) or self._is_gone:
            return False
        lane, headers = self._lane, message.headers
        handler = lane.handler_of(message)
        if handler is None:
            return False
        end = len(data) - content.total_bytes
        request = WholeRequest(
            message.method, message.path, message.version, headers, data[end:], self
        )
        given_id = lane.given_id(headers)
        is_over = self._step(handler(request, given_id or lane.new_id()))
        if request.facts is not None and lane.heads.is_wanted(head := data[:end]):
            known = KnownHead(message, handler, content.total_bytes, given_id, request.facts)
            lane.heads.add(head, known)
        if is_over:
            self._messages.popleft()
            if self._parser is not None:
                self._parser.message_consumed()
        return is_over

    def _step(self, work: Work) -> bool:
        """Answer, if this step is the last; else have it gone on with, and return False."""
        try:
            pending = work.send(None)
        except StopIteration as end:
            answer = end.value
        except BaseException as error:
            if not isinstance(error, Exception):
                raise
            self._begun = failed(error)
            return False
        else:
            self._begun = Begun(work, pending)
            return False
        if not answer.keep_alive or self.transport is None:
            self._begun = answered(answer)
            return False
        self.transport.write(answer.whole())
        if self._paused:  # whoever waits until it is sent takes no other request meanwhile
            answer.is_written = True
            self._begun = answered(answer)
            return False
        self._note_answer()
        return True

    def _note_answer(self) -> None:
        """Do what aiohttp's loop does after an answer: it is counted, and the idle time begins."""
        if self._manager is not None:
            self._manager.requests_count += 1
        close_time = self._loop.time() + self._keepalive_timeout
        self._next_keepalive_close_time = close_time
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(close_time, self._process_keepalive)

    @property
    def _is_gone(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    def _go_on(self, request: BaseRequest) -> Awaitable[web.StreamResponse]:
        """Answer in aiohttp's loop: go on with what was begun, or begin."""
        begun = self._begun
        if begun is None:
            return self._serve(request)
        self._begun = None
        return begun
