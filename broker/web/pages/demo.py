"""The demonstration of development mode: a site, its backend, and a viewer on other origins.

Three parties, as in production, told apart by the name under which this one listener is asked:

- the site: the page `/demo` with embed.js in it, and its backend's route `/demo/token`, which has
  the client secret and is an ordinary client of the broker;
- the embed host, `/embed/CODE?token=...` under the other name of this machine: redirects, as the
  vendor's does;
- the viewer on `viewer.localhost`: takes the token out of its address, has it verified, and shows
  what the microphone hears.

The token route hands tokens to whoever asks: that is why this exists in development mode and on
loopback only, answers to names of this machine only (a foreign name that resolves to it is an
attack, "DNS rebinding"), and takes JSON only (a foreign page cannot send that unasked).
"""

from collections.abc import Awaitable
from string import Template

import aiohttp
import msgspec
from aiohttp import hdrs
from aiohttp.web_request import BaseRequest
from yarl import URL

from broker.errors import Invalid, NotFound, Unauthorized
from broker.web import body
from broker.web.pages.embed_script import FOLDER, Script
from broker.web.response import JSON_TYPE, Answer
from broker.web.router import TOKEN_PATH, Handler, Routes
from broker.web.token_status import VERIFY_PATH
from broker.wire import request as wire

MODES = ("button", "dialog", "inline")

TIMEOUT = aiohttp.ClientTimeout(total=15)
"""Seconds; longer than the broker's own deadline, whose answer should be seen."""

_OTHER_NAME = {"127.0.0.1": "localhost", "localhost": "127.0.0.1"}
"""The two names of this machine, which browsers take for two sites."""

_VIEWER = "viewer.localhost"
"""A third; Chromium and Firefox resolve it by themselves (RFC 6761 section 6.3)."""

_HTML = "text/html; charset=utf-8"

_POLICY = (
    "Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'; {more}\r\n"
    "Referrer-Policy: no-referrer\r\n"
)
"""The strictest that a page can have: what works here works under any policy."""

_PASSED_ON = (
    "Cache-Status",
    "Retry-After",
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
)


class Verified(msgspec.Struct, frozen=True):
    """What the viewer learns of a token."""

    agent: str
    session: str
    expires: int


def add(routes: Routes, script: Script, url: str, secret: str) -> None:
    """Serve the demonstration where both names of this machine lead here, and nobody else does.

    `url` is the broker's for both backends; `secret` is what the site's is configured with.
    """
    if not (secret and url.startswith("http") and URL(url).host in _OTHER_NAME):
        return
    routes.add("/demo", "GET", local(_site(routes, script)))
    routes.add("/demo/token", "POST", local(_backend(routes, url, secret)))
    routes.add("/embed/*", "GET", local(_embed_host(routes)))
    routes.add("/demo/viewer", "GET", local(_viewer(routes)))
    routes.add("/demo/verify", "POST", local(_viewer_backend(routes, url)))
    for name in ("demo", "viewer"):
        for ending, kind in (("css", "text/css"), ("js", "text/javascript")):
            content = (FOLDER / f"{name}.{ending}").read_bytes()
            page = routes.page(f"{kind}; charset=utf-8", content)
            routes.add(f"/demo/{name}.{ending}", "GET", page)


def is_local(request: BaseRequest) -> bool:
    """Whether it was asked for under a name of this machine, at a port that can be."""
    try:
        return URL(f"http://{request.host}").host in (*_OTHER_NAME, _VIEWER)
    except ValueError:
        return False


def local(handler: Handler) -> Handler:
    """Answer only under a name of this machine."""

    def answer(request: BaseRequest, request_id: str) -> Answer | Awaitable[Answer]:
        if not is_local(request):
            raise NotFound("development mode answers to localhost and 127.0.0.1 only")
        return handler(request, request_id)

    return answer


def _site(routes: Routes, script: Script) -> Handler:
    template = Template((FOLDER / "demo.html").read_text(encoding="utf-8"))

    async def answer(request: BaseRequest, request_id: str) -> Answer:
        mode = request.query.get("mode", MODES[0])
        if mode not in MODES:
            raise Invalid(f"mode: must be one of {', '.join(MODES)}")
        embed, viewer = _origins(request)
        page = template.substitute(
            {f"is_{name}": ' aria-current="page"' if name == mode else "" for name in MODES},
            src=script.src,
            integrity=script.integrity,
            mode=mode,
            embed=embed,
            viewer=viewer,
        )
        policy = _POLICY.format(more=f"frame-src {embed} {viewer}; frame-ancestors 'none'")
        return routes.answer(200, page.encode(), request_id, policy, _HTML)

    return answer


def _backend(routes: Routes, url: str, secret: str) -> Handler:
    """Make the site's route: what BACKENDS.md shows for a dozen frameworks."""

    async def answer(request: BaseRequest, request_id: str) -> Answer:
        if request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0] != JSON_TYPE:
            raise Invalid(f"content-type: must be {JSON_TYPE}")
        content = await body.read(request, wire.MAX_BODY)
        async with (
            aiohttp.ClientSession(timeout=TIMEOUT) as http,
            http.post(f"{url}{TOKEN_PATH}", data=content, headers={"api-secret": secret}) as got,
        ):
            told = "".join(
                f"{name}: {got.headers[name]}\r\n" for name in _PASSED_ON if name in got.headers
            )
            return routes.answer(got.status, await got.read(), request_id, told)

    return answer


def _embed_host(routes: Routes) -> Handler:
    async def answer(request: BaseRequest, request_id: str) -> Answer:
        _, viewer = _origins(request)
        target = URL(f"{viewer}/demo/viewer").with_query(token=request.query.get("token", ""))
        headers = f"Location: {target}\r\nReferrer-Policy: no-referrer\r\n"
        return routes.answer(302, b"", request_id, headers, "text/plain")

    return answer


def _viewer(routes: Routes) -> Handler:
    policy = _POLICY.format(more="frame-ancestors http://localhost:* http://127.0.0.1:*")
    return routes.page(_HTML, (FOLDER / "viewer.html").read_bytes(), policy)


def _viewer_backend(routes: Routes, url: str) -> Handler:
    async def answer(request: BaseRequest, request_id: str) -> Answer:
        bearer = {hdrs.AUTHORIZATION: request.headers.get(hdrs.AUTHORIZATION, "")}
        async with (
            aiohttp.ClientSession(timeout=TIMEOUT) as http,
            http.get(f"{url}{VERIFY_PATH}", headers=bearer) as got,
        ):
            if not got.ok:
                raise Unauthorized("token: the broker refuses it")
            said = got.headers
        verified = Verified(
            said["X-Embed-Agent"], said["X-Embed-Session"], int(said["X-Embed-Expires"])
        )
        return routes.answer(200, msgspec.json.encode(verified), request_id)

    return answer


def _origins(request: BaseRequest) -> tuple[str, str]:
    """Return the origins of embed host and viewer for somebody who came under this name."""
    asked = URL(f"http://{request.host}")
    other = _OTHER_NAME.get(asked.host or "", "localhost")
    return f"http://{other}:{asked.port}", f"http://{_VIEWER}:{asked.port}"
