"""The vendor's HTTP: requests become calls, answers become responses.

Knows aiohttp.  What is said is decided in `mint`, `plan` and `faults`.  Neither a secret nor a
token nor a fingerprint is ever logged.

Theory of operation.  A call goes into the journal when its headers are here, meets at most one
fault, is charged to the rate limits, waits out the latency, and is delivered.  A handler waits on
nothing that outlives its connection, so to end a call it is enough to abort the connection.
"""

import asyncio
import gzip
import logging
from collections.abc import Callable
from email.utils import formatdate
from random import Random

from aiohttp import web
from typing_extensions import override

from broker.model import Secret
from broker.testing.vendor.control import Control
from broker.testing.vendor.delivery import Whole, answers, deliver
from broker.testing.vendor.faults import Fault
from broker.testing.vendor.journal import MINT_PATH, Call, Journal
from broker.testing.vendor.mint import Mint, read_token_request
from broker.testing.vendor.other_routes import answer_to
from broker.testing.vendor.plan import Plan
from broker.testing.vendor.replies import Answer, Refusal, refusal
from broker.testing.vendor.settings import Clocks

VALIDATE_PATH = "/v1/validate"
"""The route that says whether a secret is accepted."""

SETTLING_TURNS = 8
"""Turns of the event loop in which a connection that was just accepted shows up as one."""

CLOSING_SECONDS = 5
"""How long handlers may take to end.  They end at once; a fault of the user's own might not."""

LINGERING_SECONDS = 0.2
"""How long the rest of a body is read that nobody wants."""

_log = logging.getLogger(__name__)

_silence = logging.Logger("aiohttp")  # noqa: LOG001 - outside the tree, so nobody turns it on
# aiohttp logs requests that it cannot parse, with the offending line: a secret may be in it.
_silence.disabled = True


class Server:
    """Serves the mint on the connections that `protocol` is called for.

    Must be made inside the event loop.  `random` draws latencies.
    """

    def __init__(
        self, mint: Mint, plan: Plan, journal: Journal, random: Random, clocks: Clocks
    ) -> None:
        self._mint = mint
        self._plan = plan
        self._journal = journal
        self._random = random
        self._clocks = clocks
        self._asked = 0
        self._told: Callable[[Call, float], object] | None = None
        self._control: Control | None = None
        self._http = web.Server(
            self._handle,
            handler_cancellation=True,
            access_log=None,
            logger=_silence,
            lingering_time=LINGERING_SECONDS,
        )

    def protocol(self) -> asyncio.BaseProtocol:
        """Return what serves one new connection."""
        return self._http()

    def tell(self, told: Callable[[Call, float], object] | None) -> None:
        """Call this at the end of each request, with the seconds that it took."""
        self._told = told

    def open_control(self, control: Control) -> None:
        """Let faults be set by requests, which no journal has."""
        self._control = control

    async def hang_up(self) -> None:
        """Abort all connections and wait until their handlers have ended.

        Raises TimeoutError if one does not end.
        """
        turns = 0
        async with asyncio.timeout(CLOSING_SECONDS):
            while turns < SETTLING_TURNS or self._http.connections:
                for connection in self._http.connections:
                    if connection.transport is not None:
                        connection.transport.abort()
                await asyncio.sleep(0)
                turns += 1

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except (ConnectionError, web.RequestPayloadError):
            raise
        except Exception:
            _log.exception("the fake vendor failed by accident")
            raise

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._control is not None and self._control.is_asked(request):
            return await self._control.answer(request)
        call = self._arrival(request)
        self._journal.arrive(call)
        began = self._clocks.monotonic()
        try:
            return await self._meet(request, call)
        finally:
            if self._told is not None:
                self._told(call, self._clocks.monotonic() - began)

    async def _meet(self, request: web.BaseRequest, call: Call) -> web.StreamResponse:
        await self._read(request, call)
        fault = self._plan.meet(call)
        call.fault = fault.name or None
        self._journal.read(call)
        answer = self._decide(call, fault)
        if fault.edit is not None:
            answer = fault.edit(answer)
        await self._wait(fault.delay)
        if answers(fault.delivery):
            call.status = answer.status
        stamped = self._stamped(answer)
        if fault.delivery == Whole() and _takes_gzip(request):
            stamped = _compressed(stamped)
        return await deliver(request, stamped, fault.delivery)

    async def _read(self, request: web.BaseRequest, call: Call) -> None:
        """Read a body: what is asked of a mint, how long any other is."""
        if not call.is_mint:
            async for chunk in request.content.iter_any():
                call.received += len(chunk)
            return
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            body = b""
        call.received = len(body)
        read_token_request(body, call)

    def _arrival(self, request: web.BaseRequest) -> Call:
        headers = request.headers
        secret = headers.get("api-secret")
        return Call(
            mono=self._clocks.monotonic(),
            wall=self._clocks.wall(),
            method=request.method,
            path=request.path,
            remote=request.remote or "",
            target=request.raw_path,
            secret=Secret(secret).digest().hex() if secret else None,
            user_agent=headers.get("User-Agent"),
            traceparent=headers.get("traceparent"),
            request_id=headers.get("X-Request-Id"),
            cookie=headers.get("Cookie"),
        )

    def _decide(self, call: Call, fault: Fault) -> Answer:
        if call.is_mint and call.method == "POST":
            return self._mint.mint(call, fault)
        if fault.answer is not None:
            return fault.answer
        if call.path not in (MINT_PATH, VALIDATE_PATH):
            other = answer_to(call)
            if other is None:
                return refusal(Refusal.NOT_FOUND)
            return self._mint.authenticate(call) or other
        if call.method != "POST":
            return refusal(Refusal.METHOD_NOT_ALLOWED).plus((("Allow", "POST"),))
        return self._mint.validate(call)

    async def _wait(self, delay: float) -> None:
        """Wait out the latency and this delay on top of it."""
        latency = self._mint.settings.latency
        seconds = delay + (latency(self._random) if callable(latency) else latency)
        if seconds > 0:
            await asyncio.sleep(seconds)

    def _stamped(self, answer: Answer) -> Answer:
        self._asked += 1
        return answer.plus(
            (
                ("Date", formatdate(self._mint.now(), usegmt=True)),
                ("X-Request-Id", f"fake-{self._mint.run}-{self._asked:06d}"),
                ("Set-Cookie", f"__edge={self._mint.run}-{self._asked:06d}; Path=/; HttpOnly"),
            )
        )

    @override
    def __repr__(self) -> str:
        return f"Server(connections={len(self._http.connections)}, asked={self._asked})"


def _takes_gzip(request: web.BaseRequest) -> bool:
    """Whether the caller permits gzip (RFC 9110 section 12.5.3); edges compress for whoever does.

    One that says nothing gets the body as it is, as from the edges that were seen.
    """
    for part in request.headers.get("Accept-Encoding", "").lower().split(","):
        coding, _, quality = part.replace(" ", "").partition(";q=")
        if coding in {"gzip", "*"}:
            return quality not in {"0", "0.0", "0.00", "0.000"}
    return False


def _compressed(answer: Answer) -> Answer:
    """Compress as an edge does, unless it is done already."""
    if not answer.body or any(name.lower() == "content-encoding" for name, _ in answer.headers):
        return answer
    encoded = (("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding"))
    return Answer(answer.status, gzip.compress(answer.body, 1), (*answer.headers, *encoded))
