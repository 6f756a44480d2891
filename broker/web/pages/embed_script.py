"""The script for pages, `embed/embed.js`: the only public files of the data listener.

Every other answer is for one caller, is never stored, and has no CORS header.  These files hold
nothing of anybody, come from pages of any origin, and the address with the digest in it never
changes its content.  So they may be cached, and they say that any origin may use them: without
that, a browser cannot check the `integrity` of a script from another origin (W3C Subresource
Integrity, section 3.4).
"""

import base64
import gzip
import hashlib
import re
from pathlib import Path

import msgspec
from aiohttp.hdrs import ACCEPT_ENCODING
from aiohttp.web_request import BaseRequest

from broker.version import VERSION
from broker.web.response import JSON_TYPE, Answer
from broker.web.router import Handler, Routes

FOLDER = Path(__file__).parents[1] / "embed"

FOR_EVER = "public, max-age=31536000, immutable"
"""A year, in seconds: what RFC 8246 calls immutable is not even revalidated."""

FOR_A_WHILE = "public, max-age=300"
"""Five minutes, in seconds: how long a mended script may take to reach everybody."""

_SHARED = (
    "Access-Control-Allow-Origin: *\r\nCross-Origin-Resource-Policy: cross-origin\r\n"
    "Vary: Accept-Encoding\r\n"
)

_TAKES_GZIP = re.compile(r"\bgzip\b(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))")


class Script(msgspec.Struct, frozen=True):
    """Where this version of embed.js is, and what a page needs to pin it: GET /embed.json."""

    version: str
    src: str
    integrity: str


def add(routes: Routes) -> Script:
    """Serve the script, its pinned twin and its types; returns what to pin."""
    content = (FOLDER / "embed.js").read_bytes()
    script = describe(content)
    kind = "text/javascript; charset=utf-8"
    routes.add("/embed.js", "GET", _shared(routes, kind, content, FOR_A_WHILE))
    routes.add(script.src, "GET", _shared(routes, kind, content, FOR_EVER))
    types = (FOLDER / "embed.d.ts").read_bytes()
    routes.add(
        "/embed.d.ts", "GET", _shared(routes, "text/plain; charset=utf-8", types, FOR_A_WHILE)
    )
    routes.add("/embed.json", "GET", routes.page(JSON_TYPE, msgspec.json.encode(script)))
    return script


def describe(content: bytes) -> Script:
    """Return address and integrity of these bytes."""
    digest = base64.b64encode(hashlib.sha384(content).digest()).decode()
    name = hashlib.sha256(content).hexdigest()[:16]
    return Script(VERSION, f"/embed.{name}.js", f"sha384-{digest}")


def _shared(routes: Routes, content_type: str, content: bytes, cache: str) -> Handler:
    """Make a handler for a public file, compressed for those who take it."""
    packed = gzip.compress(content, 9, mtime=0)
    plain = routes.page(content_type, content, _SHARED, cache)
    small = routes.page(content_type, packed, f"{_SHARED}Content-Encoding: gzip\r\n", cache)

    def answer(request: BaseRequest, request_id: str) -> Answer:
        takes = _TAKES_GZIP.search(request.headers.get(ACCEPT_ENCODING, ""))
        return (small if takes else plain)(request, request_id)

    return answer
