"""The admin listener: metrics and probes, nothing else, on a port of its own."""

import asyncio
import secrets

import pytest
from edge import TOKEN_PATH, Edge, request, serving
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain_text

OPEN = "application/openmetrics-text; version=1.0.0; charset=utf-8"
OM, TEXT = "application/openmetrics-text", "text/plain"
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;q=0.4,*/*;q=0.2"
)


class TestMetrics:
    @pytest.mark.parametrize("accept", ["", "*/*", "text/plain", "text/html", "nonsense;;;"])
    async def test_plain_text_is_the_default(self, edge: Edge, accept: str) -> None:
        """People read it, with curl or a browser."""
        reply = await edge.admin("/metrics", Accept=accept)
        assert (reply.status, reply.reason) == (200, "OK")
        assert (reply.header("Content-Type") or "").startswith("text/plain; version=")
        assert reply.header("Cache-Control") == "no-store"
        names = {family.name for family in plain_text(reply.body.decode())}
        assert "broker_requests" in names

    @pytest.mark.parametrize("accept", [OPEN, PROMETHEUS])
    async def test_open_metrics_where_it_is_asked_for(self, edge: Edge, accept: str) -> None:
        """As a Prometheus asks; strict parsing finds nothing wrong."""
        await edge.request_token()
        reply = await edge.admin("/metrics", Accept=accept)
        assert (reply.header("Content-Type") or "").startswith("application/openmetrics-text")
        assert reply.body.endswith(b"# EOF\n")
        names = {family.name for family in open_metrics(reply.body.decode())}
        assert "broker_requests" in names

    @pytest.mark.parametrize(
        ("accept", "media", "version"),
        [
            (f"{OM};q=0.5, text/plain", TEXT, "0.0.4"),
            (f"text/plain;q=0.5, {OM}", OM, "1.0.0"),
            (f"text/plain, {OM}", TEXT, "0.0.4"),
            (f"{OM}, text/plain", OM, "1.0.0"),
            (f"{OM};version=1.0.0;q=0.2, text/plain;version=0.0.4;q=0.3", TEXT, "0.0.4"),
            (f"text/plain;version=1.0.0;q=0.3, {OM};q=0.2", TEXT, "1.0.0"),
            (f"{OM};q=0, text/plain;q=0.1", TEXT, "0.0.4"),
            (f"{OM};q=0", TEXT, "0.0.4"),
            ("text/plain;q=0, */*;q=0.1", OM, "1.0.0"),
            ("text/plain;q=0.1, */*", OM, "1.0.0"),
            (f"text/plain;q=0.2, {OM};q=0.1, */*", TEXT, "0.0.4"),
            (f"*/*, {OM};q=0.9", TEXT, "0.0.4"),
            (f"*/*;q=0.1, {OM};q=0.9", OM, "1.0.0"),
            ("application/*", OM, "1.0.0"),
            ("text/*;q=0.5, application/*;q=0.4", TEXT, "0.0.4"),
            (f"{OM};version=0.0.1, text/plain;q=0.1", TEXT, "0.0.4"),
            (f"{OM};version=99.0.0, {OM};version=1.0.0;q=0.1", OM, "1.0.0"),
            (f"{OM};version=x.y.z", TEXT, "0.0.4"),
            (f"{OM};q=nan, {OM};q=2;version=1.0.0", TEXT, "0.0.4"),
            ("APPLICATION/OpenMetrics-Text ; VERSION=1.0.0 ; Q=1.0", OM, "1.0.0"),
            (f'{OM};version="1.0.0"', OM, "1.0.0"),
            ("application/json", TEXT, "0.0.4"),
            ("*/*;q=0", TEXT, "0.0.4"),
            (f"application/vnd.google.protobuf;q=0.7,{PROMETHEUS}", OM, "1.0.0"),
            (PROMETHEUS.replace("q=0.6", "q=0.1"), TEXT, "1.0.0"),
        ],
    )
    async def test_N8_the_format_that_is_liked_best(
        self, edge: Edge, accept: str, media: str, version: str
    ) -> None:
        """By quality, then by order; 0 is no; a wildcard stands for what is not named."""
        reply = await edge.admin("/metrics", Accept=accept)
        told = reply.header("Content-Type") or ""
        assert told.startswith(f"{media}; version={version}"), told
        assert reply.body.endswith(b"# EOF\n") == (media == OM)

    async def test_no_secret_is_needed_and_none_is_taken(self, edge: Edge) -> None:
        """The listener is loopback by default; a query or a method changes nothing."""
        assert (await edge.admin("/metrics?name[]=x")).status == 200
        head = await edge.admin("/metrics", "HEAD")
        assert (head.status, head.body) == (200, b"")


class TestProbes:
    @pytest.mark.parametrize("path", ["/livez", "/health", "/healthz", "/readyz"])
    async def test_they_answer_here_too(self, edge: Edge, path: str) -> None:
        """A probe may not be able to reach the data listener."""
        reply = await edge.admin(path)
        assert (reply.status, reply.json) == (200, {"status": "ok"})
        assert reply.header("Cache-Control") == "no-store"
        assert reply.header("Content-Type") == "application/json"

    async def test_readiness_ends_with_the_drain_liveness_does_not(self, edge: Edge) -> None:
        """A balancer looks away; nobody kills the process for it."""
        edge.app.parts.readiness.draining = True
        ready = await edge.admin("/readyz")
        assert (ready.status, ready.json) == (503, {"status": "draining"})
        assert (await edge.admin("/livez")).status == 200
        assert (await edge.admin("/metrics")).status == 200


class TestEverythingElse:
    @pytest.mark.parametrize("path", ["/", TOKEN_PATH, "/v1/sessions", "/docs", "/metrics/"])
    async def test_404_in_the_envelope(self, edge: Edge, path: str) -> None:
        """No token is to be had here, and no sessions without a secret of their own."""
        reply = await edge.admin(path)
        assert (reply.status, reply.code) == (404, "NOT_FOUND")
        assert reply.message == (
            "admin listener: /metrics, /livez, /readyz; /v1/sessions with admin.secret_file"
        )

    async def test_405_in_the_envelope(self, edge: Edge) -> None:
        """With `Allow`."""
        reply = await edge.admin("/metrics", "DELETE")
        assert (reply.status, reply.code) == (405, "METHOD_NOT_ALLOWED")
        assert reply.header("Allow") == "GET, HEAD"

    async def test_O3_what_is_not_http_is_neither_quoted_nor_logged(self, edge: Edge) -> None:
        """As on the data listener: the envelope, the end, and nothing of the input."""
        canary = secrets.token_hex(16)
        before = edge.log.getvalue()
        line = await edge.connect(port=edge.admin_port)
        line.send(request("GET", "/metrics", [("X-\x1b", canary)]))
        reply = await line.answer()
        assert await line.rest() == b""
        await line.close()
        assert (reply.status, reply.code) == (400, "VALIDATION_ERROR")
        assert reply.message == "request: not valid HTTP/1.1; send a well-formed request"
        assert reply.header("Connection") == "close"
        assert (reply.header("X-Request-Id") or "").startswith("admin-")
        assert canary not in reply.text
        assert edge.log.getvalue() == before

    async def test_O4_silent_sockets_are_closed_here_too(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An admin port that was opened to a network is no parking place."""
        monkeypatch.setattr("broker.web.connection.HEAD_TIMEOUT", 0.05)
        async with serving() as edge, asyncio.timeout(30):
            line = await edge.connect(port=edge.admin_port)
            line.send(b"GET /met")
            assert await line.rest() == b""
            await line.close()
