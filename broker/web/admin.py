"""The admin listener: a scrape every few seconds, so comfort goes before speed here."""

import asyncio
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from secrets import token_hex

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from broker.answers import HealthAnswer, error_body, plain_body
from broker.health import Health
from broker.web.answer import JSON_TYPE
from broker.web.server import KEEP_ALIVE, LINGER, DataConnection


def build(registry: CollectorRegistry, health: Health) -> web.Application:
    """Return the application with /metrics, /livez and /readyz."""
    app = web.Application(middlewares=[_envelope])
    app.router.add_get("/metrics", _metrics(registry))
    for path in ("/livez", "/health", "/healthz"):
        app.router.add_get(path, _live)
    app.router.add_get("/readyz", _ready(health))
    return app


def connections(server: web.Server) -> Callable[[], web.RequestHandler]:
    """Make connections that answer what is not HTTP as the data listener's do, unquoted."""
    return lambda: DataConnection(
        server,
        loop=asyncio.get_running_loop(),
        keepalive_timeout=KEEP_ALIVE,
        lingering_time=LINGER,
        access_log=None,  # type: ignore[arg-type]  # aiohttp's own documentation: None disables it
    ).attach(lambda: (f"admin-{token_hex(4)}", formatdate(usegmt=True)))


def render(registry: CollectorRegistry, accept: str) -> tuple[str, bytes]:
    """Return content type and text of a scrape, in the format that `accept` prefers."""
    try:
        encoder, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version in Accept that is none
        encoder, content_type = choose_encoder("")
    return content_type, encoder(registry)


_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _metrics(registry: CollectorRegistry) -> _Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        content_type, text = render(registry, request.headers.get("Accept", ""))
        return web.Response(
            body=text, headers={"Content-Type": content_type, "Cache-Control": "no-store"}
        )

    return answer


async def _live(_request: web.Request) -> web.StreamResponse:
    return _json(200, plain_body(HealthAnswer("ok")))


def _ready(health: Health) -> _Handler:
    async def answer(_request: web.Request) -> web.StreamResponse:
        if health.ready:
            return _json(200, plain_body(HealthAnswer("ok")))
        return _json(503, plain_body(HealthAnswer("draining")))

    return answer


@web.middleware
async def _envelope(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer errors in the one envelope, here too."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return _json(404, error_body(404, "NOT_FOUND", "admin listener: /metrics, /livez, /readyz"))
    except web.HTTPMethodNotAllowed as error:
        answer = _json(405, error_body(405, "METHOD_NOT_ALLOWED", "this route answers GET only"))
        answer.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        return answer
    except web.HTTPException as error:
        text = "request: cannot be answered as it is; send a plain GET"
        return _json(error.status, error_body(error.status, "VALIDATION_ERROR", text))


def _json(status: int, body: bytes) -> web.Response:
    headers = {"Content-Type": JSON_TYPE, "Cache-Control": "no-store"}
    return web.Response(status=status, body=body, headers=headers)
