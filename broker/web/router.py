"""The routes of the data listener: a dictionary of exact paths, and what they answer.

What answers a request for a token is in `token_route`.
"""

import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from http import HTTPStatus
from itertools import chain, count
from typing import Any, TypeVar

import structlog
from aiohttp.web_request import BaseRequest
from multidict import istr

from broker import errors
from broker.issue import TokenService
from broker.model import Clock
from broker.stores.base import Rejection
from broker.telemetry.logs import RefusalLog
from broker.telemetry.metrics import Metrics
from broker.telemetry.readiness import Readiness
from broker.web.auth import ClientAuthenticator
from broker.web.lane import ANY_METHOD
from broker.web.response import (
    JSON_TYPE,
    Answer,
    Heads,
    ReadyAnswer,
    outcome_of,
    retry_after_seconds,
)
from broker.web.token_route import TokenRoute
from broker.web.whole_request import LaneHandler
from broker.wire.responses import HealthAnswer, ValidAnswer, error_body, error_body_of, plain_body

log = structlog.get_logger()

TOKEN_PATH = "/v1/embed-tokens/request"  # noqa: S105 - a path, not a password

_REQUEST_ID = istr("X-Request-Id")
_ID_ALPHABET = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_ID_MAX = 64

Handler = Callable[[BaseRequest, str], Answer | Awaitable[Answer]]
"""Answers a request; the second argument is its request id."""

_R = TypeVar("_R")

_CLOSING = frozenset({408, 413})
"""After these nothing more is read from a connection, also where the body has come to its end: who
got the size or the time of one wrong may have the next one wrong, too."""

_REJECTED = {
    name: error_body(errors.RateLimited.status, errors.RateLimited.code, message)
    for name, message in errors.REACHED.items()
}
"""The body of a 429, by the limit that refused."""

_LAST_DIGITS = tuple(f"{number:02x}" for number in range(256))


def new_ids(prefix: str) -> Iterator[str]:
    """Return request ids: unique, and each in a tenth of a microsecond, for no code is run."""
    return chain.from_iterable(
        map(f"{prefix}-{number:x}".__add__, _LAST_DIGITS) for number in count()
    )


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
        authenticator: ClientAuthenticator,
        token_service: TokenService,
        metrics: Metrics,
        clock: Clock,
        health: Readiness,
        *,
        deadline: float,
        any_fingerprint: bool,
    ) -> None:
        self._authenticator = authenticator
        self._metrics = metrics
        self._clock = clock
        self._health = health
        self.admin_url = ""
        self.refusals = RefusalLog()
        self.heads = Heads()
        self.new_id = new_ids(secrets.token_hex(4)).__next__
        self._elsewhere: Handler | None = None
        self.tokens = TokenRoute(
            self,
            authenticator,
            token_service,
            metrics,
            clock,
            health,
            deadline,
            any_fingerprint=any_fingerprint,
        )
        self.table: dict[str, dict[str, Handler]] = {TOKEN_PATH: {"POST": self.tokens}}
        self.lane: dict[str, dict[str, LaneHandler]] = {TOKEN_PATH: {"POST": self.tokens}}
        self.add("/v1/validate", "POST", self._validate)
        for path in ("/livez", "/health", "/healthz"):
            self.add(path, "GET", self._live)
        self.add("/readyz", "GET", self._ready)

    def __call__(self, request: BaseRequest) -> Awaitable[ReadyAnswer]:
        """Answer one request; what goes wrong is answered and logged, never raised."""
        methods = self.table.get(request.raw_path)
        handler = None if methods is None else methods.get(request.method)
        request_id = self.given_id(request.headers) or self.new_id()
        return ReadyAnswer.of((handler or self._off_route)(request, request_id))

    @property
    def draining(self) -> bool:
        """Whether answers end their connections."""
        return self._health.draining

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
        self, handler: Callable[[_R, str], Answer | Awaitable[Answer]]
    ) -> Callable[[_R, str], Answer | Coroutine[Any, Any, Answer]]:
        def guarded(request: _R, request_id: str) -> Answer | Coroutine[Any, Any, Answer]:
            try:
                answer = handler(request, request_id)
            except Exception as error:  # noqa: BLE001 - answered and told
                return self._failed(error, request_id)
            return answer if isinstance(answer, Answer) else finish(answer, request_id)

        async def finish(work: Awaitable[Answer], request_id: str) -> Answer:
            try:
                return await work
            except Exception as error:  # noqa: BLE001 - as above
                return self._failed(error, request_id)

        return guarded

    def _failed(self, error: Exception, request_id: str) -> Answer:
        """Answer and tell what went wrong."""
        if not isinstance(error, errors.BrokerError):
            log.error("broker.defect", request_id=request_id, exc_info=error)
            return self.error(errors.Internal(), request_id)
        if isinstance(error, errors.RateLimited):
            self._metrics.rejections[error.limit.value].inc()
        elif isinstance(error, errors.SecretInBrowser):
            _ = self.tell_of_leak(error, request_id)
        return self.error(error, request_id)

    def page(
        self, content_type: str, content: bytes, headers: str = "", cache: str = "no-store"
    ) -> Callable[[BaseRequest, str], Answer]:
        """Make a handler that answers fixed bytes; `headers` are ready lines with their CRLF."""

        def answer(_request: BaseRequest, request_id: str) -> Answer:
            return self.answer(200, content, request_id, headers, content_type, cache)

        return answer

    def error_head(self) -> tuple[str, str]:
        """Return a request id and the date, for requests that could not be parsed."""
        return self.new_id(), self.heads.date(self._clock.wall())

    def tell_of_leak(
        self, error: errors.SecretInBrowser, request_id: str, *, anyway: bool = False
    ) -> bool:
        """Write it, once a minute for each client; returns whether it was written now."""
        now = self._clock.mono()
        return self.refusals.tell_of_leak(error.client, now, request_id, anyway=anyway)

    async def _validate(self, request: BaseRequest, request_id: str) -> Answer:
        valid = self._authenticator.is_valid(request, self._clock.mono())
        return self.answer(200, plain_body(ValidAnswer(valid)), request_id)

    async def _live(self, _request: BaseRequest, request_id: str) -> Answer:
        return self.answer(200, _OK, request_id)

    async def _ready(self, _request: BaseRequest, request_id: str) -> Answer:
        status = 200 if self._health.ready else 503
        return self.answer(status, plain_body(HealthAnswer(self._health.state)), request_id)

    async def _off_route(self, request: BaseRequest, request_id: str) -> Answer:
        """What is not in the table to the letter: a query, another method, nothing at all.

        Also the absolute form of a target, which proxies may send (RFC 9112 section 3.2.2).
        """
        absolute = request.raw_path.startswith(("http://", "https://"))
        path = request.path if absolute else request.raw_path.partition("?")[0]
        methods = self.table.get(path) or self._tree(path)
        if methods is None and self._elsewhere is not None:
            return await outcome_of(self._elsewhere(request, request_id))
        if methods is None:
            return self.error(self.not_found(path), request_id)
        handler = methods.get(request.method) or methods.get(ANY_METHOD)
        if handler is None:
            return self.error(errors.MethodNotAllowed(", ".join(sorted(methods))), request_id)
        return await outcome_of(handler(request, request_id))

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

    def error(self, error: errors.BrokerError, request_id: str) -> Answer:
        """Return the answer of a failure, with what its status has to say in headers."""
        headers = ""
        if isinstance(error, errors.RateLimited):
            return self.rejected(Rejection(error.limit, error.verdict), request_id)
        if isinstance(error, errors.MethodNotAllowed):
            headers = f"Allow: {error.allow}\r\n"
        elif error.status == HTTPStatus.UNAUTHORIZED:  # RFC 9110 section 15.5.2: with the challenge
            headers = "WWW-Authenticate: Bearer\r\n"
        if error.retry_after is not None:
            headers += f"Retry-After: {retry_after_seconds(error.retry_after)}\r\n"
        return self.answer(error.status, error_body_of(error), request_id, headers)

    def rejected(self, rejection: Rejection, request_id: str) -> Answer:
        """Return the 429 of a limit that refused."""
        name, wall = rejection.limit, self._clock.wall()
        content = _REJECTED[name]
        start = self.heads.refusal(name, len(content), request_id, rejection.verdict, wall)
        return Answer(429, start, content, self._health.draining)

    def answer(
        self,
        status: int,
        content: bytes,
        request_id: str,
        headers: str = "",
        content_type: str = JSON_TYPE,
        cache: str = "no-store",
    ) -> Answer:
        """Return an answer; `headers` are ready lines with their CRLF."""
        wall = self._clock.wall()
        start = self.heads.plain(status, len(content), content_type, request_id, wall, cache)
        close = self._health.draining or status in _CLOSING
        return Answer(status, start + headers.encode("latin-1"), content, close)

    def given_id(self, headers: Mapping[str, str]) -> str:
        """Return a well-formed id that the caller sent, which is kept; empty if there is none."""
        given = headers.get(_REQUEST_ID)
        if given and len(given) <= _ID_MAX and _ID_ALPHABET.issuperset(given):
            return given
        return ""
