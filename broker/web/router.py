"""The routes of the data listener: a dictionary of exact paths, and what they answer."""

import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from email.utils import formatdate
from itertools import count
from typing import Any, TypeVar

import structlog
from aiohttp.web_request import BaseRequest
from multidict import istr

from broker import errors
from broker.issue import IssuedToken, TokenService
from broker.model import Clock, Outcome, TokenRequest, name_of
from broker.stores.base import Rejection
from broker.telemetry.logs import RefusalLog, visitor_hash
from broker.telemetry.metrics import BUDGET, Metrics
from broker.telemetry.readiness import Readiness
from broker.units import SECOND
from broker.web import body
from broker.web.auth import Client, ClientAuthenticator
from broker.web.caller import Caller, caller_of
from broker.web.lane import ANY_METHOD
from broker.web.request_log import log_failure
from broker.web.response import (
    JSON_TYPE,
    GrantHeads,
    ReadyAnswer,
    head,
    limit_headers,
    retry_after_seconds,
)
from broker.web.whole_request import LaneHandler, Request, WholeRequest
from broker.wire import request as wire
from broker.wire.known_bodies import KnownBodies
from broker.wire.responses import HealthAnswer, ValidAnswer, data_in, error_body_of, plain_body

log = structlog.get_logger()

TOKEN_PATH = "/v1/embed-tokens/request"  # noqa: S105 - a path, not a password

_REQUEST_ID = istr("X-Request-Id")
_ID_ALPHABET = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_ID_MAX = 64

_CACHE_STATUS = {
    Outcome.REUSED: "Cache-Status: embed-token-broker; hit\r\n",
    Outcome.MINTED: "Cache-Status: embed-token-broker; fwd=miss\r\n",
    Outcome.COALESCED: "Cache-Status: embed-token-broker; fwd=miss; collapsed\r\n",
}

Handler = Callable[[BaseRequest, str], Awaitable[ReadyAnswer]]
"""Answers a request; the second argument is its request id."""

_R = TypeVar("_R")

_COUNTED = frozenset(
    {Outcome.LIMITED, Outcome.SHED, Outcome.INVALID, Outcome.UNAUTHORIZED, Outcome.FORBIDDEN}
)
"""Outcomes that anybody can cause in any number: one a minute is written, the rest counted."""

_CLOSING = frozenset({408, 413})
"""After these nothing more is read from a connection, also where the body has come to its end: who
got the size or the time of one wrong may have the next one wrong, too."""

_OK = plain_body(HealthAnswer("ok"))


class Routes:
    """Answers the data listener; give it to `DataServer`.

    `table` maps exact paths to handlers by method, and `/folder/*` where the last segment is free;
    pages are added to it.
    `deadline` is how many seconds a request may take; `admin_url` is told to those who look for
    metrics here, once there is one.
    """

    def __init__(
        self,
        door: ClientAuthenticator,
        desk: TokenService,
        metrics: Metrics,
        clock: Clock,
        health: Readiness,
        *,
        deadline: float,
        any_fingerprint: bool,
    ) -> None:
        self._door = door
        self._desk = desk
        self._metrics = metrics
        self._clock = clock
        self._health = health
        self.admin_url = ""
        self._deadline = deadline
        self.any_fingerprint = any_fingerprint
        self.use_log(debug=False)
        self.refusals = RefusalLog()
        self._id_prefix = secrets.token_hex(4)
        self._id_count = count(1)
        self._date = ""
        self._date_until = 0
        self._heads = GrantHeads()
        self._bodies = KnownBodies()
        self._elsewhere: Handler | None = None
        self.table: dict[str, dict[str, Handler]] = {TOKEN_PATH: {"POST": self._token}}
        self.lane: dict[str, dict[str, LaneHandler]] = {TOKEN_PATH: {"POST": self._token}}
        self.add("/v1/validate", "POST", self._validate)
        for path in ("/livez", "/health", "/healthz"):
            self.add(path, "GET", self._live)
        self.add("/readyz", "GET", self._ready)

    def __call__(self, request: BaseRequest) -> Awaitable[ReadyAnswer]:
        """Answer one request; what goes wrong is answered and logged, never raised."""
        methods = self.table.get(request.raw_path)
        handler = None if methods is None else methods.get(request.method)
        request_id = self.given_id(request.headers) or self.new_id()
        return (handler or self._off_route)(request, request_id)

    @property
    def draining(self) -> bool:
        """Whether answers end their connections."""
        return self._health.draining

    def use_log(self, *, debug: bool) -> None:
        """Follow a change of the log's level; `debug` writes every hand-out.

        The bound logger is kept: to make one takes as long as to write a line.
        """
        self._log = structlog.get_logger().bind()
        self.debug = debug

    def add(self, path: str, method: str, handler: Handler) -> None:
        """Add a route whose failures are answered like everything else's.

        A path that ends in `/*` is answered with all that is below it.
        """
        guarded = self._guarded(handler)
        methods = self.table.setdefault(path, {})
        methods[method] = guarded
        if method == "GET":
            methods["HEAD"] = guarded
        elif method == ANY_METHOD:
            methods["GET"] = guarded  # which is found at once

    def use_elsewhere(self, handler: Handler) -> None:
        """Let this answer what no route here does."""
        self._elsewhere = self._guarded(handler)

    def add_to_lane(self, path: str, method: str, handler: LaneHandler) -> None:
        """Add a route whose requests are answered where they arrive, if they can be."""
        self.add(path, method, handler)
        self.lane.setdefault(path, {})[method] = self._guarded(handler)

    def _guarded(
        self, handler: Callable[[_R, str], Awaitable[ReadyAnswer]]
    ) -> Callable[[_R, str], Coroutine[Any, Any, ReadyAnswer]]:
        async def guarded(request: _R, request_id: str) -> ReadyAnswer:
            try:
                return await handler(request, request_id)
            except errors.BrokerError as error:
                if isinstance(error, errors.RateLimited):
                    self._metrics.rejections[error.limit.value].inc()
                elif isinstance(error, errors.SecretInBrowser):
                    _ = self._tell_of_leak(error, request_id)
                return self._error(error, request_id)
            except Exception:
                log.exception("broker.defect", request_id=request_id)
                return self._error(errors.Internal(), request_id)

        return guarded

    def page(
        self, content_type: str, content: bytes, headers: str = "", cache: str = "no-store"
    ) -> Handler:
        """Make a handler that answers fixed bytes; `headers` are ready lines with their CRLF."""

        async def answer(_request: BaseRequest, request_id: str) -> ReadyAnswer:
            return self.answer(200, content, request_id, headers, content_type, cache)

        return answer

    def error_head(self) -> tuple[str, str]:
        """Return a request id and the date, for requests that could not be parsed."""
        return self.new_id(), self._http_date(self._clock.wall())

    async def _token(self, request: Request, request_id: str) -> ReadyAnswer:
        started = time.perf_counter()
        timeout = self._deadline
        client: Client | None = None
        ask: TokenRequest | None = None
        try:
            caller = request.facts if type(request) is WholeRequest else None
            if type(caller) is not Caller:
                client = self._door.identify(request, self._clock.mono())
                caller = caller_of(request, client)
            client, trace = caller.client, caller.traceparent
            if type(request) is WholeRequest and request.trace:
                trace = wire.well_formed(request.trace)
            content = body.arrived(request, wire.MAX_BODY)
            if content is None:
                content = await body.read(request, wire.MAX_BODY)
                timeout -= time.perf_counter() - started
            ask = self._bodies.read(
                content,
                client.name,
                request_id,
                trace,
                any_fingerprint=self.any_fingerprint,
            )
            if client.agents is not None:
                client.require_agent(ask.agent)
            result = await self._desk.issue(ask, timeout)
        except errors.BrokerError as error:
            return self._refuse(error, request_id, started, client, ask)
        except Exception:
            log.exception("broker.defect", request_id=request_id)
            return self._refuse(errors.Internal(), request_id, started, client, ask)
        if isinstance(result, Rejection):
            return self._refuse(result.error(), request_id, started, client, ask)
        return self._hand_out(result, request_id, started, ask)

    def _hand_out(
        self, handout: IssuedToken, request_id: str, started: float, ask: TokenRequest
    ) -> ReadyAnswer:
        outcome, verdict = handout.outcome, handout.verdict
        wall = self._clock.wall()
        date = self._http_date(wall)
        content, line = handout.token.body, _CACHE_STATUS[outcome]
        if verdict is None:
            text = head(200, len(content), JSON_TYPE, request_id, date) + line
        else:
            text = self._heads.write(line, len(content), request_id, date, verdict, wall)
        answer = ReadyAnswer(200, text, content, close=self._health.draining)
        self._metrics.remaining.observe(handout.left / 1_000_000)
        seconds = time.perf_counter() - started
        self._metrics.requests[outcome].observe(seconds)
        if outcome is Outcome.MINTED or self.debug:
            self._log_handout(handout, request_id, seconds, ask)
        return answer

    def _refuse(
        self,
        error: errors.BrokerError,
        request_id: str,
        started: float,
        client: Client | None,
        ask: TokenRequest | None,
    ) -> ReadyAnswer:
        """Answer and count a token request that failed."""
        seconds = time.perf_counter() - started
        self._metrics.requests[error.outcome].observe(seconds)
        kind = error.code
        if isinstance(error, errors.RateLimited):
            kind = error.limit.value
            self._metrics.rejections[kind].inc()
        elif isinstance(error, errors.BudgetExhausted):
            kind = BUDGET
            self._metrics.rejections[BUDGET].inc()
        elif isinstance(error, errors.UpstreamRefused):
            kind = "refused"  # the vendor's codes are an open set
        counted = error.outcome in _COUNTED or error.remembered
        if isinstance(error, errors.SecretInBrowser):  # an event of its own: somebody has to act
            told = self._tell_of_leak(error, request_id, anyway=self.debug)
            worth_a_line = self.debug and not told
        elif counted:
            first = self.refusals.first(kind, self._clock.mono(), anyway=self.debug)
            worth_a_line = first or self.debug
        else:
            worth_a_line = True
        if worth_a_line:
            log_failure(error, kind, request_id, seconds, client, ask)
        return self._error(error, request_id)

    def _tell_of_leak(
        self, error: errors.SecretInBrowser, request_id: str, *, anyway: bool = False
    ) -> bool:
        """Write it, once a minute for each client; returns whether it was written now."""
        now = self._clock.mono()
        return self.refusals.tell_of_leak(error.client, now, request_id, anyway=anyway)

    async def _validate(self, request: BaseRequest, request_id: str) -> ReadyAnswer:
        valid = self._door.is_valid(request, self._clock.mono())
        return self.answer(200, plain_body(ValidAnswer(valid)), request_id)

    async def _live(self, _request: BaseRequest, request_id: str) -> ReadyAnswer:
        return self.answer(200, _OK, request_id)

    async def _ready(self, _request: BaseRequest, request_id: str) -> ReadyAnswer:
        status = 200 if self._health.ready else 503
        return self.answer(status, plain_body(HealthAnswer(self._health.state)), request_id)

    async def _off_route(self, request: BaseRequest, request_id: str) -> ReadyAnswer:
        """What is not in the table to the letter: a query, another method, nothing at all.

        Also the absolute form of a target, which proxies may send (RFC 9112 section 3.2.2).
        """
        absolute = request.raw_path.startswith(("http://", "https://"))
        path = request.path if absolute else request.raw_path.partition("?")[0]
        methods = self.table.get(path) or self._tree(path)
        if methods is None and self._elsewhere is not None:
            return await self._elsewhere(request, request_id)
        if methods is None:
            return self._error(self.not_found(path), request_id)
        handler = methods.get(request.method) or methods.get(ANY_METHOD)
        if handler is None:
            return self._error(errors.MethodNotAllowed(", ".join(sorted(methods))), request_id)
        return await handler(request, request_id)

    def not_found(self, path: str) -> errors.NotFound:
        """Return what is told to those who ask for what is not here."""
        where = f"metrics are on the admin listener: {self.admin_url}/metrics"
        other = f"no such route: tokens are at POST {TOKEN_PATH}"
        return errors.NotFound(where if path == "/metrics" else other)

    def _tree(self, path: str) -> dict[str, Handler] | None:
        """Return what answers everything below some path, if this is below it."""
        for root, methods in self.table.items():
            if root.endswith("/*") and path.startswith(root[:-1]):
                return methods
        return None

    def _error(self, error: errors.BrokerError, request_id: str) -> ReadyAnswer:
        headers = ""
        if isinstance(error, errors.RateLimited):
            headers = limit_headers(error.limit, error.verdict, self._clock.wall())
        elif isinstance(error, errors.MethodNotAllowed):
            headers = f"Allow: {error.allow}\r\n"
        elif error.status == 401:  # noqa: PLR2004 - RFC 9110 section 15.5.2 requires the challenge
            headers = "WWW-Authenticate: Bearer\r\n"
        if error.retry_after is not None:
            headers += f"Retry-After: {retry_after_seconds(error.retry_after)}\r\n"
        return self.answer(error.status, error_body_of(error), request_id, headers)

    def answer(
        self,
        status: int,
        content: bytes,
        request_id: str,
        headers: str = "",
        content_type: str = JSON_TYPE,
        cache: str = "no-store",
    ) -> ReadyAnswer:
        """Return an answer; `headers` are ready lines with their CRLF."""
        date = self._http_date(self._clock.wall())
        text = head(status, len(content), content_type, request_id, date, cache)
        close = self._health.draining or status in _CLOSING
        return ReadyAnswer(status, text + headers, content, close=close)

    def given_id(self, headers: Mapping[str, str]) -> str:
        """Return a well-formed id that the caller sent, which is kept; empty if there is none."""
        given = headers.get(_REQUEST_ID)
        if given and len(given) <= _ID_MAX and _ID_ALPHABET.issuperset(given):
            return given
        return ""

    def new_id(self) -> str:
        """Make a request id: unique, and cheap."""
        return f"{self._id_prefix}-{next(self._id_count):x}"

    def _http_date(self, wall: int) -> str:
        """The date, formatted once a second."""
        if not 0 < self._date_until - wall <= SECOND:
            second = wall // 1_000_000
            self._date = formatdate(second, usegmt=True)
            self._date_until = (second + 1) * SECOND
        return self._date

    def _log_handout(
        self, handout: IssuedToken, request_id: str, seconds: float, ask: TokenRequest
    ) -> None:
        write = self._log.info if handout.outcome is Outcome.MINTED else log.debug
        data = data_in(handout.token.body)
        write(
            "broker.embed_token",
            outcome=handout.outcome.value,
            request_id=request_id,
            client=ask.client,
            agent=ask.agent,
            visitor=visitor_hash(ask.fingerprint),
            session=data.session_id,
            token=name_of(data.token),
            left_s=handout.left // 1_000_000,
            duration_ms=round(seconds * 1000, 3),
        )
