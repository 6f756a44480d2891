"""What the listeners rely on in aiohttp that aiohttp does not promise, and whether it still holds.

Each private name that `connection` and `lane_connection` use is listed here; a test compares the
list with their code and with the installed release.  A name can stay and mean something else, so
the fast lane is tried at each start as well (`fault_of_lane`): a connection without a network is
asked for what the lane does, and must answer to the byte what it has to.
"""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

from aiohttp import web
from aiohttp.web_request import BaseRequest
from typing_extensions import override

from broker.tasks import Later, TaskSet
from broker.web.lane import Lane
from broker.web.lane_connection import LaneConnection
from broker.web.response import Answer, ReadyAnswer
from broker.web.whole_request import Request, WholeRequest, Work

ATTRIBUTES = (
    "_buffer_paused",
    "_close",
    "_force_close",
    "_keepalive_handle",
    "_keepalive_timeout",
    "_loop",
    "_manager",
    "_messages",
    "_next_keepalive_close_time",
    "_parser",
    "_paused",
    "_request_count",
    "_request_handler",
    "_task_handler",
    "_waiter",
)
"""Of `web.RequestHandler`, once it is made."""

METHODS = ("_process_keepalive",)
"""Of `web.RequestHandler`."""

IMPORTS = ("_ErrInfo",)
"""Of `aiohttp.web_protocol`."""

PARSER_METHODS = ("feed_data", "message_consumed")
"""Of the parser that a connection has."""

TURNS = 50
"""Turns of the event loop after which something that a few of them bring about has not come."""

_PATH = "/lane"
_ERRORS = ("id", "date")


class LaneFault(Exception):
    """What the lane does otherwise than it has to."""


async def fault_of_lane() -> str | None:
    """Try the fast lane; returns what is wrong with it, None if it does what it has to."""
    try:
        await _Trial().run()
    except Exception as error:  # noqa: BLE001 - whatever a release has changed: it is told
        return f"{type(error).__name__}: {error}"
    return None


class _Trial:
    """A connection that leads nowhere, and what is asked on it."""

    def __init__(self) -> None:
        self._goes_on = asyncio.get_running_loop().create_future()
        self._leaving = TaskSet()
        self._word = _Word()
        handlers = {_PATH: {"GET": self._handle, "POST": self._handle}}
        ids = SimpleNamespace(given_id=lambda _headers: "", new_id=lambda: "id")
        server = web.Server(_ordinary(self._answer), handler_cancellation=True)
        lane = Lane(handlers, ids)
        self._transport = _Nowhere()
        self._connection = LaneConnection(server, lambda: _ERRORS, 60.0, lane, self._leaving)

    async def run(self) -> None:
        """Raise LaneFault, or whatever fails."""
        self._connection.connection_made(self._transport)
        task = self._connection.loop_task
        try:
            self._require_names()
            await self._until(lambda: self._connection.is_idle)
            for body in (b"", b"{}", b"{}", b"{}", b""):
                self._require_at_once(body)
            await self._require_to_go_on()
            self._require_at_once(b"{}")
            await self._require_to_be_told()
            self._require_at_once(b"{}")
            self._connection.data_received(_asking(b"1") + _asking(b"2"))
            both = [_answered(b"1"), _answered(b"2")]
            await self._until(lambda: len(self._transport.written) == len(both))
            self._require(both)
        finally:
            self._connection.connection_lost(None)
            if task is not None:
                await asyncio.wait([task])
            await self._leaving.finish()

    def _require_names(self) -> None:
        parser = self._connection.parser
        for owner, names in ((self._connection, ATTRIBUTES + METHODS), (parser, PARSER_METHODS)):
            for name in names:
                if not hasattr(owner, name):
                    raise LaneFault(f"{type(owner).__name__} has no {name}")

    def _require_at_once(self, body: bytes) -> None:
        self._connection.data_received(_asking(body))
        self._require([_answered(body)])

    async def _require_to_go_on(self) -> None:
        """A handler that waits is gone on with in a task, and its answer comes when it may."""
        self._connection.data_received(_asking(b"wait"))
        for _ in range(3):
            await asyncio.sleep(0)
        self._require([])
        self._goes_on.set_result(None)
        await self._until(lambda: bool(self._transport.written))
        self._require([_answered(b"wait")])
        await self._until(lambda: self._connection.is_idle)

    async def _require_to_be_told(self) -> None:
        """What waits for a call is written within it, or by aiohttp once more has come."""
        asking, answered = _asking(_Word.BODY), _answered(_Word.BODY)
        self._connection.data_received(asking)
        self._require([])
        self._word.tell()
        self._require([answered])
        self._word = _Word()
        self._connection.data_received(asking)
        self._connection.data_received(_asking(b"more"))
        for _ in range(3):
            await asyncio.sleep(0)
        self._require([])
        self._word.tell()
        await self._until(lambda: len(self._transport.written) > 1)
        self._require([answered, _answered(b"more")])
        await self._until(lambda: self._connection.is_idle)

    def _require(self, expected: list[bytes]) -> None:
        written, self._transport.written = self._transport.written, []
        if written != expected:
            raise LaneFault(f"{len(written)} answers instead of {len(expected)}, or other bytes")

    async def _until(self, is_so: Callable[[], bool]) -> None:
        for _ in range(TURNS):
            if is_so():
                return
            await asyncio.sleep(0)
        raise LaneFault("what has to come did not come")

    def _handle(self, request: Request, request_id: str) -> Later[Answer] | Work:
        if isinstance(request, WholeRequest) and request.body == _Word.BODY:
            return self._word
        return self._answer(request, request_id)

    async def _answer(self, request: Request, _request_id: str) -> Answer:
        if isinstance(request, WholeRequest):
            body = request.body
            request.facts = True
        else:
            body = await request.read()
        if body == b"wait":
            await self._goes_on
            if asyncio.current_task() is None:
                raise LaneFault("what waits does not go on in a task")
        return Answer(200, b"HTTP/1.1 200 OK\r\n", body)


class _Word(Later[Answer]):
    """An answer that a call tells."""

    BODY = b"told"

    @override
    def outcome(self) -> Answer:
        return Answer(200, b"HTTP/1.1 200 OK\r\n", self.BODY)


def _asking(body: bytes) -> bytes:
    return b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (
        _PATH.encode(),
        len(body),
        body,
    )


def _answered(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\n\r\n" + body


def _ordinary(
    answer: Callable[[Request, str], Awaitable[Answer]],
) -> Callable[[BaseRequest], Awaitable[web.StreamResponse]]:
    def handle(request: BaseRequest) -> Awaitable[web.StreamResponse]:
        return ReadyAnswer.of(answer(request, ""))

    return handle


class _Nowhere(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    @override
    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    @override
    def is_closing(self) -> bool:
        return False

    @override
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Everything is taken."""

    @override
    def close(self) -> None:
        """There is nothing to be closed."""

    @override
    def abort(self) -> None:
        """There is nothing to be ended."""
