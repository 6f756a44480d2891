"""Pages for people: the API document, its interactive form, and the index of development mode.

Swagger UI comes from the installed package drf-spectacular-sidecar (extra `docs`), whose files are
current and plain; nothing is fetched from elsewhere and the package's Python is never imported.
"""

from importlib.util import find_spec
from pathlib import Path

import msgspec
from aiohttp.web_request import BaseRequest
from prometheus_client import CollectorRegistry

from broker.errors import NotFound
from broker.web import admin
from broker.web.pages.demo import local
from broker.web.pages.openapi import document
from broker.web.response import Answer
from broker.web.router import Routes

_ASSETS = {
    "swagger-ui.css": "text/css; charset=utf-8",
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
}

_HTML = "text/html; charset=utf-8"

_POLICY = (
    "Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'"
    " 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'\r\n"
    "Referrer-Policy: no-referrer\r\n"
)

_DOCS_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>embed-token-broker API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""

_START_SCRIPT = """SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#ui", tryItOutEnabled: true, validatorUrl: null,
  deepLinking: false
});
"""

_NO_FILES = (
    "the files of /docs are not installed: pip install drf-spectacular-sidecar, then restart"
)

_NO_FILES_PAGE = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>embed-token-broker API</title></head>
<body><p>{_NO_FILES.capitalize()}. The document itself is at
<a href="/openapi.json">/openapi.json</a>.</p></body>
</html>
"""

_INDEX_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>embed-token-broker (development)</title>
<link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark; background: Canvas; color: CanvasText; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto;
  padding: 0 1rem; }}
code {{ overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>embed-token-broker</h1>
<p>Development mode: keys and the client secret were made at the start and end with the process.</p>
<ul>
<li><a href="/demo">/demo</a>: a page with an avatar's stand-in, on localhost or 127.0.0.1</li>
<li><a href="/docs">/docs</a>: the API, interactive</li>
<li><a href="/openapi.json">/openapi.json</a>: the API document</li>
<li><a href="/metrics">/metrics</a>: what Prometheus would scrape</li>
<li><a href="/readyz">/readyz</a>, <a href="/livez">/livez</a>: probes</li>
</ul>
<p>The line for a first token was printed when the broker started:
<code>curl {url}/v1/embed-tokens/request ...</code></p>
</body>
</html>
"""


def add(routes: Routes, url: str) -> None:
    """Serve /openapi.json and /docs."""
    base = url if url.startswith("http") else "/"
    api = msgspec.json.encode(document(base, any_fingerprint=routes.tokens.any_fingerprint))
    routes.add("/openapi.json", "GET", routes.page("application/json", api))
    page = _DOCS_PAGE if _swagger_folder() is not None else _NO_FILES_PAGE
    routes.add("/docs", "GET", routes.page(_HTML, page.encode(), _POLICY))
    routes.add(
        "/docs/start.js",
        "GET",
        routes.page(_ASSETS["swagger-ui-bundle.js"], _START_SCRIPT.encode()),
    )
    for name, content_type in _ASSETS.items():
        _add_asset(routes, name, content_type)


def add_development(routes: Routes, registry: CollectorRegistry, url: str) -> None:
    """Serve the index, and the metrics on the data listener as well."""

    def metrics(request: BaseRequest, request_id: str) -> Answer:
        content_type, text = admin.render(registry, request.headers.getall("Accept", ()))
        return routes.page(content_type, text)(request, request_id)

    routes.add("/", "GET", routes.page(_HTML, _INDEX_PAGE.format(url=url).encode(), _POLICY))
    routes.add("/metrics", "GET", local(metrics))


def own_origins(url: str) -> frozenset[str]:
    """Origins under which a browser on this machine may have opened the pages."""
    port = url.rpartition(":")[2]
    return frozenset({url, f"http://localhost:{port}", f"http://127.0.0.1:{port}"})


def _add_asset(routes: Routes, name: str, content_type: str) -> None:
    """Serve one file of Swagger UI, read when it is first asked for."""

    def asset(request: BaseRequest, request_id: str) -> Answer:
        folder = _swagger_folder()
        if folder is None:
            raise NotFound(_NO_FILES)
        content = (folder / name).read_bytes()
        return routes.page(content_type, content)(request, request_id)

    routes.add(f"/docs/{name}", "GET", asset)


def _swagger_folder() -> Path | None:
    spec = find_spec("drf_spectacular_sidecar")
    if spec is None or not spec.submodule_search_locations:
        return None
    package = Path(spec.submodule_search_locations[0])
    return package / "static" / "drf_spectacular_sidecar" / "swagger-ui-dist"
