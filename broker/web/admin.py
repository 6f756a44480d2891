"""The admin listener: a scrape every few seconds, so comfort goes before speed here.

Routes are aiohttp's; connections and answers are those of the data listener, with the same bounds.
What `web.sessions` adds to it has a secret; the rest is open to whoever reaches the address.
"""

from collections.abc import Awaitable, Callable, Iterable
from email.utils import formatdate
from http import HTTPStatus
from secrets import token_hex
from typing import Self

from aiohttp import web
from aiohttp.web_request import BaseRequest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from broker.errors import BrokerError
from broker.rules.accept import ranges as accept_ranges
from broker.telemetry.readiness import Readiness
from broker.web.connection import DataConnection, Handler
from broker.web.listener import CannotListen, Listener, listen
from broker.web.response import JSON_TYPE, Answer, ReadyAnswer, head, retry_after_seconds
from broker.web.server import BACKLOG
from broker.wire.responses import HealthAnswer, error_body, error_body_of, plain_body

CLOSING_TIME = 1.0
"""Seconds that an answer may take once the listener closes; as many again until it is cut off.  A
scrape takes milliseconds, and a client that does not read must not delay the end of the process."""


def build(registry: CollectorRegistry, health: Readiness) -> web.Application:
    """Return the application with /metrics, /livez and /readyz."""
    app = web.Application()
    app.router.add_get("/metrics", _metrics(registry))
    for path in ("/livez", "/health", "/healthz"):
        app.router.add_get(path, _live)
    app.router.add_get("/readyz", _ready(health))
    return app


class AdminListener:
    """The admin application on its address, at `url`."""

    def __init__(self, runner: web.AppRunner, listener: Listener, url: str) -> None:
        self._runner = runner
        self._listener = listener
        self.url = url

    @classmethod
    async def open(cls, application: web.Application, address: str, *, keep_alive: float) -> Self:
        """Listen; raises CannotListen with nothing left open.  `keep_alive` is in seconds."""
        runner = web.AppRunner(
            application,
            handle_signals=False,
            handler_cancellation=True,
            shutdown_timeout=CLOSING_TIME,
        )
        await runner.setup()
        server = runner.server
        assert server is not None  # set by setup()
        server.request_handler = _in_envelopes(server.request_handler)

        def connect() -> DataConnection:
            return DataConnection(server, _error_head, keep_alive)

        try:
            listener, url = await listen(connect, address, "admin.listen", BACKLOG)
        except CannotListen:
            await runner.cleanup()
            raise
        return cls(runner, listener, url)

    async def close(self) -> None:
        """Answer what is under way, and close; takes `CLOSING_TIME` twice at most."""
        await self._runner.cleanup()
        self._listener.close()


def render(registry: CollectorRegistry, accept: Iterable[str]) -> tuple[str, bytes]:
    """Return content type and text of a scrape, in the format that these `Accept` lines prefer."""
    encoder, content_type = choose_encoder(_format(",".join(accept)))
    return content_type, encoder(registry)


def answer(
    status: int, body: bytes, headers: str = "", content_type: str = JSON_TYPE
) -> web.StreamResponse:
    """Return an answer as the data listener's are; `headers` are ready lines with their CRLF."""
    text = head(status, len(body), content_type, *_error_head()) + headers
    return ReadyAnswer(Answer(status, text.encode("latin-1"), body))


_TEXT, _OPEN = "text/plain", "application/openmetrics-text"

_FORMATS = {
    (_TEXT, None): _TEXT,
    (_TEXT, "0.0.4"): _TEXT,
    (_TEXT, "1.0.0"): f"{_TEXT};version=1.0.0",
    (_OPEN, None): _OPEN,
    (_OPEN, "1.0.0"): f"{_OPEN};version=1.0.0",
}
"""What there is, by type and version, as the library is asked for it: it reads types and versions
in the order of the header, and no quality."""

_ESCAPING = frozenset({"allow-utf-8", "underscores", "dots", "values"})
_WILDCARDS = {"*/*": (_TEXT, _OPEN), "text/*": (_TEXT,), "application/*": (_OPEN,)}


def _format(accept: str) -> str:
    """Choose the format that a scraper likes best; text if there is none of those that it names."""
    ranges = accept_ranges(accept)
    named = {wanted.media for wanted in ranges}
    for wanted in ranges:
        if wanted.quality == 0:
            break
        for media in _WILDCARDS.get(wanted.media, ()):
            if media not in named:  # else its own quality counts, which may be 0
                return media
        found = _FORMATS.get((wanted.media, wanted.parameters.get("version")))
        if found is not None:
            escaping = wanted.parameters.get("escaping", "")
            return f"{found};escaping={escaping}" if escaping in _ESCAPING else found
    return _TEXT


_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _error_head() -> tuple[str, str]:
    return f"admin-{token_hex(4)}", formatdate(usegmt=True)


def _metrics(registry: CollectorRegistry) -> _Handler:
    async def metrics(request: web.Request) -> web.StreamResponse:
        content_type, text = render(registry, request.headers.getall("Accept", ()))
        return answer(200, text, content_type=content_type)

    return metrics


async def _live(_request: web.Request) -> web.StreamResponse:
    return answer(200, plain_body(HealthAnswer("ok")))


def _ready(health: Readiness) -> _Handler:
    async def ready(_request: web.Request) -> web.StreamResponse:
        return answer(200 if health.ready else 503, plain_body(HealthAnswer(health.state)))

    return ready


def _in_envelopes(handle: Handler) -> Handler:
    """Answer errors in the one envelope, here too.

    Around the application and not inside of it: it refuses an unknown `Expect` before any
    middleware, in an answer that repeats it.
    """

    async def handled(request: BaseRequest) -> web.StreamResponse:
        try:
            return await handle(request)
        except BrokerError as error:
            return _failed(error)
        except web.HTTPNotFound:
            text = "admin listener: /metrics, /livez, /readyz; /v1/sessions with admin.secret_file"
            return answer(404, error_body(404, "NOT_FOUND", text))
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            body = error_body(405, "METHOD_NOT_ALLOWED", f"this route answers {allowed} only")
            return answer(405, body, f"Allow: {allowed}\r\n")
        except web.HTTPException as error:
            text = "request: cannot be answered as it is; send a plain GET"
            return answer(error.status, error_body(error.status, "VALIDATION_ERROR", text))

    return handled


def _failed(error: BrokerError) -> web.StreamResponse:
    headers = ""
    if error.retry_after is not None:
        headers += f"Retry-After: {retry_after_seconds(error.retry_after)}\r\n"
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers += "WWW-Authenticate: Bearer\r\n"
    return answer(error.status, error_body_of(error), headers)
