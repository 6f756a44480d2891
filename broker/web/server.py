"""The data listener's server: aiohttp's low-level one, which makes and counts connections.

`aiohttp.web.Server` is the documented way to serve without an application.  What a connection may
do, and when it ends, is in `connection`.
"""

import asyncio
from collections.abc import Callable

import aiohttp
import structlog
from aiohttp import web
from typing_extensions import override

from broker.tasks import TaskSet
from broker.telemetry.cells import Gauge
from broker.web.aiohttp_internals import fault_of_lane
from broker.web.connection import DataConnection, Handler
from broker.web.lane import Lane
from broker.web.lane_connection import LaneConnection

log = structlog.get_logger()

DRAIN_POLL = 0.02
"""Seconds between looks at what is still busy, while draining."""

ON_ITS_WAY = 1.0
"""Seconds of a drain in which a request is awaited from who has sent half a head, or has connected
and not asked yet: nobody connects for nothing, and a client that is closed then has an error."""

BACKLOG = 1024
"""Connections the kernel may hold for us: a page going viral arrives as a burst of connects, and
the usual 128 would reset some of them."""


class DataServer(web.Server):
    """Makes `DataConnection`s, and tells how many are open; give it to `loop.create_server`."""

    def __init__(
        self,
        handler: Handler,
        error_head: Callable[[], tuple[str, str]],
        open_now: Gauge,
        keep_alive: float,
        lane: Lane | None = None,
        lane_off: Gauge | None = None,
    ) -> None:
        super().__init__(handler, handler_cancellation=True)
        self._lane = lane
        self._lane_off = lane_off or Gauge([0.0], 0)
        self._leaving = TaskSet()
        self._error_head = error_head
        self._keep_alive = keep_alive
        self._open = 0
        self._open_now = open_now

    async def prove_lane(self) -> None:
        """Try the fast lane, and serve without it if this aiohttp does not bear it."""
        if self._lane is not None and (fault := await fault_of_lane()) is not None:
            self._lane = None
            log.error("broker.fast_lane_off", aiohttp=aiohttp.__version__, reason=fault)
        self._lane_off.set(self._lane is None)

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

        What may be on its way is awaited for a moment (`ON_ITS_WAY`).
        aiohttp's `shutdown` reads nothing more from any connection, so a request whose body is
        still on its way would be cut off.  Answers close their connections while draining.
        """
        now = self._loop.time()
        ends, awaits_until = now + seconds, now + ON_ITS_WAY
        while now < ends and self._close_idle(awaits=now < awaits_until):
            await asyncio.sleep(DRAIN_POLL)
            now = self._loop.time()
        self.pre_shutdown()
        await self.shutdown(DRAIN_POLL)
        await self._leaving.finish()

    def _close_idle(self, *, awaits: bool) -> int:
        """Close connections without a request; returns how many have one, or `awaits` one."""
        busy = 0
        for connection in self.connections:
            if isinstance(connection, DataConnection) and (
                connection.is_busy or (awaits and connection.may_ask)
            ):
                busy += 1
            else:
                connection.close()
        return busy

    @override
    def __call__(self) -> web.RequestHandler:
        if self._lane is None:
            return DataConnection(self, self._error_head, self._keep_alive)
        return LaneConnection(self, self._error_head, self._keep_alive, self._lane, self._leaving)
