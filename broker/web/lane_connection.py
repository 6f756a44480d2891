"""A connection whose plain requests take the fast lane (`lane`); all others are aiohttp's.

A connection is idle when aiohttp's loop waits for its next request: then nothing is queued, under
way, refused or closing, and what was answered is sent.  Only then is a request answered here, so
answers keep their order, and a client that does not read is answered no further.

A request whose answer waits for one call to be told (`Later`: a visit of a shared store) is kept
here meanwhile, and for aiohttp the connection is idle.  Whatever happens on it until then, be it
bytes, the client's end, the end of the idle time or of the process, hands the request over first:
then it is aiohttp's, as any other that waits.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web
from aiohttp.http import HttpProcessingError, RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_request import BaseRequest
from typing_extensions import override

from broker.tasks import Begun, Later, TaskSet
from broker.web.connection import READ_BUFFER, DataConnection
from broker.web.head_bounds import MAX_HEAD, is_followed
from broker.web.known_heads import TRACE, KnownHead, split
from broker.web.lane import Lane, failed
from broker.web.response import Answer, ReadyAnswer, outcome_of
from broker.web.whole_request import FirstStep, LaneHandler, WholeRequest, Work

if TYPE_CHECKING:
    from aiohttp.http_parser import HttpParser


class LaneConnection(DataConnection):
    """One connection of the data listener; `leaving` owns what is cancelled with it."""

    __slots__ = (
        "_asked",
        "_begun",
        "_is_between",
        "_lane",
        "_later",
        "_leaving",
        "_serve",
        "_written",
    )

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
        self._later: Later[Answer] | None = None  # the answer to `_asked`; nothing else is there
        self._asked: _Received | None = None
        self._begun: Work | None = None  # of the message that is first in the queue
        self._written: Answer | None = None  # what it was answered with
        self._is_between = True  # the parser has read whole requests, and nothing of the next one
        self._serve = manager.request_handler
        self._request_handler = self._go_on

    @property
    def is_idle(self) -> bool:
        """Whether aiohttp's loop waits for the next request."""
        return self._waiter is not None and not self._waiter.done()

    @property
    def loop_task(self) -> "asyncio.Task[None] | None":
        """The task of that loop."""
        return self._task_handler

    @property
    def parser(self) -> object:
        """What reads heads; None once the connection is lost."""
        return self._parser

    @property
    @override
    def is_busy(self) -> bool:
        return self._later is not None or super().is_busy

    @override
    def connection_lost(self, exc: BaseException | None) -> None:
        if self._later is not None:
            self._later.then = None
            self._later = self._asked = None
        begun, self._begun = self._begun, None
        super().connection_lost(exc)
        if begun is not None:
            self._leaving.cancel(begun)

    @override
    def data_received(self, data: bytes) -> None:
        waiter = self._waiter
        # None: a request is under way, or its answer is not sent; done: one is about to be, or the
        # connection is being closed.  Not between: nor while an answer waits for a call
        if waiter is None or waiter.done() or not self._is_between or not data:
            self._read_on(data)
            return
        lane = self._lane
        same = None if lane.heads.is_traced else lane.find_request(data)
        if same is not None:
            if not self._run(same.handler, same.read, lane.new_id()):
                self._queue(data)
            elif self._later is not None:
                self._asked = data
            return
        known = lane.heads.known_in(data)
        if known is None:
            self._read_first(data, data.find(b"\r\n\r\n") + 4)
            return
        at, end = known.head.at, known.head.end
        trace = data[at : at + TRACE].decode() if at else ""
        request = WholeRequest(known.message, data[end:], self, known.facts, trace)
        if not self._run(known.handler, request, known.given_id or lane.new_id()):
            self._queue((known.message, EMPTY_PAYLOAD))
        elif self._later is not None:
            self._asked = known.message, EMPTY_PAYLOAD
        if request.again is not None:
            lane.keep_request(data, known, request.again)

    def _read_first(self, data: bytes, end: int) -> None:
        """Parse, and answer what came if it is one whole request for the lane, and nothing else.

        `end` is where its head ends.
        """
        parser = self._parser
        assert parser is not None  # the connection is not lost
        try:
            messages, is_upgraded, rest = parser.feed_data(data)
        except HttpProcessingError as error:
            outcome: _Outcome = error
        else:
            outcome = messages, is_upgraded, rest
            if len(messages) == 1 and not is_upgraded and len(data) <= MAX_HEAD:
                message, content = messages[0]
                handler = self._lane.handler_of(message)
                if handler and content.is_eof() and content.total_bytes == len(data) - end:
                    if not self._answer(message, data, end, handler):
                        self._queue((message, content))
                    elif self._later is not None:
                        self._asked = message, content
                    else:
                        parser.message_consumed()
                    return
        # gives the same again: aiohttp's own code takes it from here
        self._parser = cast("HttpParser[Any]", _Parsed(outcome))
        try:
            self._read_on(data)
        finally:
            self._parser = parser

    def _answer(self, message: RawRequestMessage, data: bytes, end: int, run: LaneHandler) -> bool:
        """Take the first step of a handler, and remember the head if it may come again."""
        lane = self._lane
        request = WholeRequest(message, data[end:], self)
        given_id = lane.given_id(message.headers)
        is_over = self._run(run, request, given_id or lane.new_id())
        head = split(data)
        if head.at and message.headers.getall("traceparent") != [head.trace_in(data)]:
            return is_over  # more than one: it is not this one that counts
        if request.facts is not None and lane.heads.came_before(head.compared):
            known = KnownHead(head, len(data), message, run, given_id, request.facts)
            lane.heads.keep(head.compared, known)
        return is_over

    def _run(self, run: Callable[[Any, str], FirstStep], request: object, request_id: str) -> bool:
        """Answer, if the first step is the last; else have it gone on with, and return False.

        True, too, for an answer that a call will tell: then it is in `_later`.
        """
        self._request_count += 1
        self._maybe_head = 0
        try:
            answer = run(request, request_id)
            if type(answer) is not Answer:
                if isinstance(answer, Later):
                    self._later, answer.then = answer, self._go_on_told
                    self._is_between = False  # until it is told: what comes goes another way
                    return True
                work = cast("Work", answer)
                self._begun = Begun(work, work.send(None))
                return False
        except StopIteration as end:
            answer = cast("Answer", end.value)
        except Exception as error:  # noqa: BLE001 - raised where aiohttp looks for it
            self._begun = failed(error)
            return False
        return self._write(answer)

    def _go_on_told(self) -> None:
        """Answer what waited for a call, which has just come; or have it gone on with."""
        later, asked = self._later, self._asked
        self._later = self._asked = None
        assert later is not None  # else it would tell nobody
        assert asked is not None
        self._is_between = True
        try:
            answer = later.outcome()
        except Exception as error:  # noqa: BLE001 - as in `_run`
            answer = failed(error)
        if not isinstance(answer, Answer):
            self._begun = answer
        elif self._write(answer):
            if self._parser is not None:
                self._parser.message_consumed()  # no more than it has read: heads may be known
            return
        self._queue(asked)

    @override
    def _hand_over(self) -> None:
        """Give a request that waits for a call to aiohttp, if there is one."""
        later, asked = self._later, self._asked
        self._later = self._asked = None
        if later is None or asked is None:
            return
        later.then = None
        self._is_between = True
        self._begun = later.wait()
        self._queue(asked)

    def _queue(self, asked: "_Received") -> None:
        """Have aiohttp's loop take this request; what it is answered with is in `_begun`."""
        waiter, begun = self._waiter, self._begun
        if waiter is not None and not waiter.done():
            self._messages.append(self._parsed(asked) if isinstance(asked, bytes) else asked)
            waiter.set_result(None)
        elif begun is not None:  # that loop was ended while the answer waited for a call
            self._begun = begun.close()

    def _parsed(self, data: bytes) -> tuple[RawRequestMessage, StreamReader]:
        """Return what aiohttp makes of a request that came before; its head may be known."""
        known = self._lane.heads.known_in(data)
        if known is not None:
            return known.message, EMPTY_PAYLOAD
        assert self._parser is not None  # the connection is not lost
        (parsed,) = self._parser.feed_data(data)[0]
        return parsed

    def _write(self, answer: Answer) -> bool:
        """Write an answer; False if aiohttp has to do that, or to wait until it is sent."""
        transport, manager = self.transport, self._manager
        if answer.closes or transport is None or manager is None:
            self._begun = outcome_of(answer)
            return False
        transport.write(b"%b\r\n%b" % (answer.head, answer.body))
        if self._paused:  # whoever waits until it is sent takes no other request meanwhile
            self._written = answer
            self._begun = outcome_of(answer)
            return False
        # what aiohttp's loop does after an answer: it is counted, and the idle time begins
        manager.requests_count += 1
        closes = self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(closes, self._process_keepalive)
        return True

    def _read_on(self, data: bytes) -> None:
        """Have it read by aiohttp, and see whether the parser stands between two requests then."""
        self._hand_over()
        was_between, self._is_between = self._is_between, self._is_between and not data
        body, known = self._body, self._request_count
        came, was_in_body = body.total_bytes, not body.is_eof()
        super().data_received(data)
        new = self._request_count - known
        if new == 1 and was_between and self._messages:
            message, body = self._messages[-1]
            is_request = isinstance(message, RawRequestMessage) and not message.upgrade
            self._is_between = is_request and not is_followed(data, body)
        elif not new and was_in_body and data:
            self._is_between = (
                body.is_eof()
                and body.total_bytes - came == len(data)
                and body.total_bytes <= READ_BUFFER  # beyond it, the parser may hold bytes back
                and not self._buffer_paused
            )

    def _go_on(self, request: BaseRequest) -> Awaitable[web.StreamResponse]:
        """Answer in aiohttp's loop: go on with what was begun, or begin."""
        begun = self._begun
        if begun is None:
            return self._serve(request)
        self._begun = None
        return self._finish(begun)

    async def _finish(self, begun: Work) -> ReadyAnswer:
        """Give aiohttp's loop what it writes, or what it waits for to be sent."""
        answer = await begun
        is_written, self._written = answer is self._written, None
        return ReadyAnswer(answer, is_written=is_written)


_Received = tuple[RawRequestMessage, StreamReader] | bytes
"""A request as it was parsed, or one that came before as it came."""

_Outcome = tuple[Sequence[Any], bool, bytes] | HttpProcessingError
"""What a parser returns, or raises."""


class _Parsed:
    """What a parser has made of some bytes, to be asked for again."""

    def __init__(self, outcome: _Outcome) -> None:
        self._outcome = outcome

    def feed_data(self, _data: bytes) -> tuple[Sequence[Any], bool, bytes]:
        """Return, or raise, what the parser did."""
        if isinstance(self._outcome, HttpProcessingError):
            raise self._outcome
        return self._outcome
