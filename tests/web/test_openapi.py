"""The API document describes what is really answered; its pages fetch nothing from elsewhere."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
from edge import TOKEN_PATH, Edge, Reply, request, serving, visitor

from broker.version import VERSION
from broker.web.pages.openapi import document

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

API = document("http://127.0.0.1:1")


def draft() -> "type[Draft202012Validator]":
    """Return who validates; loaded by who needs it, because that takes seconds."""
    from jsonschema import Draft202012Validator

    return Draft202012Validator


def schema_of(reply: Reply, path: str, method: str = "post") -> "Draft202012Validator":
    """Return what the document says about this answer."""
    described = API["paths"][path][method]["responses"][str(reply.status)]
    schema = described["content"]["application/json"]["schema"]
    return draft()({**schema, "components": API["components"]})


def require_documented(reply: Reply, path: str, method: str = "post") -> None:
    """The status is documented, the body fits its schema, and the documented headers are there."""
    schema_of(reply, path, method).validate(reply.json)
    described = API["paths"][path][method]["responses"][str(reply.status)]
    for name, header in described["headers"].items():
        value: Any = reply.header(name)
        assert value is not None, name
        if header["schema"].get("type") == "integer":
            value = int(value)
        draft()(header["schema"]).validate(value)


def schemas(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every schema in a part of the document."""
    if isinstance(tree, dict):
        if "schema" in tree:
            yield tree["schema"]
        for inner in tree.values():
            yield from schemas(inner)


class TestDocument:
    def test_it_is_openapi_3_1_and_names_this_version(self) -> None:
        """The document of the version that answers."""
        assert API["openapi"] == "3.1.0"
        assert API["info"]["version"] == VERSION
        assert API["servers"] == [{"url": "http://127.0.0.1:1"}]

    def test_every_schema_is_a_schema_and_every_reference_leads_somewhere(self) -> None:
        """JSON Schema 2020-12, which OpenAPI 3.1 uses."""
        for schema in (*schemas(API["paths"]), *API["components"]["schemas"].values()):
            draft().check_schema(schema, format_checker=None)  # its regexes are ECMA 262
        known = {f"#/components/schemas/{name}" for name in API["components"]["schemas"]}
        assert set(re.findall(r"'\$ref': '([^']+)'", str(API))) <= known

    async def test_every_public_route_is_in_it_and_nothing_else(self, edge: Edge) -> None:
        """Aliases of the liveness probe, the script's files, pages, what is below a path aside."""
        aliases = {"/health", "/healthz", "/v1/embed-tokens/verify/*"}
        files = {path for path in edge.app.parts.routes.table if path.startswith("/embed.")}
        assert len(files) == 4
        assert set(API["paths"]) == set(edge.app.parts.routes.table) - aliases - files
        for path, operations in API["paths"].items():
            methods = {method.lower() for method in edge.app.parts.routes.table[path]} - {
                "head",
                "*",
            }
            assert set(operations) == methods

    def test_operations_have_names_of_their_own(self) -> None:
        """Generators of clients make functions of them."""
        names = [o["operationId"] for path in API["paths"].values() for o in path.values()]
        assert len(set(names)) == len(names) == 7


class TestAnswersAreAsDocumented:
    async def test_tokens(self, edge: Edge) -> None:
        """Minted, reused, with a model."""
        fingerprint = visitor()
        for fields in ({}, {}, {"model": "essence"}, {"fresh": True}):
            reply = await edge.request_token(fingerprint, **fields)
            assert reply.status == 200
            require_documented(reply, TOKEN_PATH)

    async def test_errors_of_a_token_request(self, edge: Edge) -> None:
        """One of each status that a caller can cause."""
        fingerprint = visitor()
        sent = [
            edge.posting(b""),
            edge.posting(b"{}}"),
            edge.asking(secret="x"),
            request("POST", TOKEN_PATH, [], b""),
            edge.asking(headers=[("Origin", "null")]),
            edge.posting(b"x" * 9000),
            edge.asking(headers=[("Content-Encoding", "br")]),
            *[edge.asking(fingerprint)] * 21,
        ]
        replies = [await edge.raw(data) for data in sent]
        assert {reply.status for reply in replies} == {200, 400, 401, 403, 413, 415, 429}
        for reply in replies:
            require_documented(reply, TOKEN_PATH)

    async def test_validate_and_probes(self, edge: Edge) -> None:
        """Both results, each error, and readiness on both sides."""
        path = "/v1/validate"
        origin = [("Origin", "null")]
        twice = [("api-secret", "x")]
        replies = [
            await edge.post(b"", path=path),
            await edge.post(b"", path=path, headers=origin),
            await edge.post(b"", path=path, headers=twice),
            await edge.raw(request("POST", path, [], b"")),
            *[await edge.post(b"", path=path, secret="x") for _ in range(31)],
        ]
        assert {reply.status for reply in replies} == {200, 400, 401, 403, 429}
        for reply in replies:
            require_documented(reply, path)
        require_documented(await edge.get("/livez"), "/livez", "get")
        require_documented(await edge.get("/readyz"), "/readyz", "get")
        edge.app.parts.readiness.draining = True
        require_documented(await edge.get("/readyz"), "/readyz", "get")


class TestPages:
    async def test_documents_are_served_where_they_are_configured(self) -> None:
        """The document at its URL, and the pages with a policy that allows no other host."""
        async with serving({"server": {"docs": True}}) as edge:
            reply = await edge.get("/openapi.json")
            assert reply.json == document(edge.app.url)
            assert reply.header("Content-Type") == "application/json"
            page = await edge.get("/docs")
            installed = find_spec("drf_spectacular_sidecar") is not None
            assert ("pip install" in page.body.decode()) is not installed
            assert page.header("Content-Type") == "text/html; charset=utf-8"
            policy = page.header("Content-Security-Policy") or ""
            assert "default-src 'none'" in policy
            assert "http" not in policy
            sources = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode())
            assert sources
            assert all(s.startswith(("/docs/", "data:", "/openapi.json")) for s in sources)
            assert (await edge.get("/")).code == "NOT_FOUND"
            assert (await edge.get("/metrics")).code == "NOT_FOUND"

    async def test_assets_come_from_the_installed_package_or_the_404_says_what_to_install(
        self,
    ) -> None:
        """Nothing is fetched from elsewhere, and their absence is no defect."""
        async with serving({"server": {"docs": True}}) as edge:
            assert (await edge.get("/docs/start.js")).status == 200
            for name in ("swagger-ui.css", "swagger-ui-bundle.js"):
                reply = await edge.get(f"/docs/{name}")
                if find_spec("drf_spectacular_sidecar") is None:
                    assert "pip install drf-spectacular-sidecar, then restart" in reply.message
                else:
                    assert (reply.status, len(reply.body) > 10_000) == (200, True)

    async def test_assets_that_are_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The 404 names the extra."""
        monkeypatch.setattr("broker.web.pages.docs.find_spec", lambda _name: None)
        async with serving({"server": {"docs": True}}) as edge:
            reply = await edge.get("/docs/swagger-ui.css")
            assert reply.code == "NOT_FOUND"
            assert "pip install drf-spectacular-sidecar" in reply.message

    async def test_development_has_an_index_and_metrics_on_the_data_listener(self) -> None:
        """One port is enough to look around."""
        async with serving({"server": {"docs": True}}, dev=True) as edge:
            index = await edge.get("/")
            assert f"{edge.app.url}{TOKEN_PATH}" in index.body.decode()
            assert edge.secret not in index.body.decode()
            local = {"Host": "localhost"}
            metrics = await edge.get("/metrics", **local)
            assert metrics.body.startswith(b"# HELP ")
            assert (await edge.get("/metrics", "HEAD", **local)).status == 200
