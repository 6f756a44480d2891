"""The vendor's other routes through a broker: what gets there, what comes back, what does not."""

import asyncio
import json
import re
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import pytest
from relaying import AGENT, House, broker_before, until

from broker.config import load as config
from broker.config.schema import ConfigError
from broker.issuers.vendor.client import Answer as VendorAnswer
from broker.issuers.vendor.connection import MAX_BYTES
from broker.issuers.vendor.passing import PassedAnswer
from broker.testing import FakeVendor, Refusal
from broker.testing.vendor import faults
from broker.testing.vendor.journal import Call
from broker.web import pass_through, passage

ALL = ["/v1/*", "/v2/*"]
MEBIBYTE = 1024 * 1024

SERIES = 'broker_pass_through_requests_total{outcome="%s"}'


def passing(routes: list[str], **client: object) -> dict[str, Any]:
    """Settings of a broker that passes these routes on; `client` adds to the client's table."""
    tree: dict[str, Any] = {"issuer": {"upstream": {"pass_through": routes}}}
    if client:
        tree["clients"] = {"web": client}
    return tree


class Passing(House):
    """A broker that passes requests on, and a client that may ask for that."""

    @property
    def key(self) -> str:
        """The caller's own key of the vendor: another one than the broker's."""
        return self.keys[0]

    keys: list[str]

    @property
    def credentials(self) -> dict[str, str]:
        return {"api-secret": self.key, "Authorization": f"Bearer {self.secret}"}

    def call(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, **how: Any
    ) -> "aiohttp.client._RequestContextManager":
        """Begin a request with both secrets."""
        mine = self.credentials if headers is None else headers
        return self.http.request(
            method, self.app.url + target, headers=mine, allow_redirects=False, **how
        )

    async def answered(self, method: str, target: str, **how: Any) -> tuple[int, bytes]:
        async with self.call(method, target, **how) as response:
            return response.status, await response.read()

    async def code(self, method: str, target: str, **how: Any) -> str:
        """Return the code of a failure in the broker's envelope."""
        status, content = await self.answered(method, target, **how)
        answer = json.loads(content)
        assert answer["success"] is False
        assert answer["status_code"] == answer["error"]["httpStatus"] == status
        code: str = answer["error"]["code"]
        return code

    async def counted(self, outcome: str) -> int:
        return int((await self.scrape())[SERIES % outcome])

    @property
    def passed(self) -> list[Call]:
        """What reached the vendor beside mints."""
        return [call for call in self.vendor.journal.records if not call.is_mint]

    @property
    def paused_for(self) -> float:
        pacer = self.app.parts.pacer
        assert pacer is not None
        return pacer._paused_until - asyncio.get_running_loop().time() if pacer._paused else 0.0


@asynccontextmanager
async def passing_before(
    vendor: FakeVendor, tree: Mapping[str, Any] | None = None
) -> AsyncIterator[Passing]:
    """Run a broker that passes everything on, for its one client, unless `tree` says otherwise."""
    settings = passing(ALL, pass_through=True) if tree is None else tree
    async with broker_before(vendor, settings) as house:
        ours = Passing.__new__(Passing)
        ours.__dict__.update(house.__dict__)
        ours.keys = [vendor.add_secret().reveal()]
        yield ours


@pytest.fixture
async def house(vendor: FakeVendor) -> AsyncIterator[Passing]:
    """Run a broker whose one client may have everything passed on."""
    async with passing_before(vendor) as ours:
        yield ours


class Wire:
    """A vendor that shows what came to it byte by byte, and answers what it is told to."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.says = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        self.lost = 0
        self.holds = False
        self.is_early = False
        """Whether it answers as soon as the head is there."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with closing(writer):
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
                awaited = int(length[1]) if length and not self.is_early else 0
                body = await reader.readexactly(awaited)
                if b"chunked" in head:
                    body = await reader.readuntil(b"0\r\n\r\n")
                self.got.append(head + body)
                writer.write(self.says)
                await writer.drain()
                if self.holds:
                    await reader.read()
        finally:
            self.lost += 1

    @property
    def head(self) -> dict[str, list[str]]:
        """The headers of the last request, by their names in lower case."""
        lines = self.got[-1].split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
        found: dict[str, list[str]] = {}
        for name, _, value in (line.partition(": ") for line in lines):
            found.setdefault(name.lower(), []).append(value)
        return found


@pytest.fixture
def wire() -> Wire:
    """A vendor of bytes."""
    return Wire()


@asynccontextmanager
async def passing_to(wire: Wire, vendor: FakeVendor) -> AsyncIterator[Passing]:
    """Run a broker whose vendor is this one."""
    server = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    tree = passing(ALL, pass_through=True)
    tree["issuer"]["upstream"]["base_url"] = f"http://127.0.0.1:{port}/prefix"
    try:
        async with passing_before(vendor, tree) as house:
            yield house
    finally:
        server.close()


async def raw(house: House, data: bytes, *, timeout: float = 10.0) -> bytes:
    """Send bytes over a connection of their own; returns all that comes until it ends."""
    where = urlsplit(house.app.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    with closing(writer):
        writer.write(data)
        async with asyncio.timeout(timeout):
            try:
                return await reader.read()
            except ConnectionError:
                return b"reset"


# the tools of bithuman-mcp 0.3.5 that call the vendor, but for the token and the validation
MCP_TOOLS: list[tuple[str, str, object]] = [
    ("GET", "/v2/credit-summaries?app=imaginex", None),
    ("GET", "/v1/voices", None),
    ("POST", "/v1/tts", {"text": "hello", "voice": "M1", "format": "wav"}),
    ("POST", "/v1/agent/generate", {"prompt": "a guide", "aspect_ratio": "16:9"}),
    ("GET", f"/v1/agent/status/{AGENT}", None),
    ("GET", f"/v1/agent/{AGENT}", None),
    ("POST", f"/v1/agent/{AGENT}", {"system_prompt": "be kind"}),
    ("POST", f"/v1/agent/{AGENT}/speak", {"message": "hello"}),
    ("POST", f"/v1/agent/{AGENT}/add-context", {"context": "x", "type": "add_context"}),
    ("GET", f"/v1/dynamics/{AGENT}", None),
    ("POST", "/v1/dynamics/generate", {"agent_id": AGENT, "duration": 5, "model": "auto"}),
    ("POST", "/v1/files/upload", {"file_data": "aGk=", "file_name": "a", "file_type": "auto"}),
    ("GET", "/v1/agents?limit=20&offset=0", None),
    ("DELETE", f"/v1/agent/{AGENT}", None),
    ("GET", "/v1/usage?limit=50&offset=0&agent_code=" + AGENT, None),
    ("POST", "/v1/webhooks", {"url": "https://shop.example/hook", "events": []}),
    ("GET", "/v1/webhooks", None),
    ("DELETE", "/v1/webhooks/w1", None),
    ("POST", "/v1/webhooks/w1/test", None),
]


class TestPassedOn:
    async def test_every_tool_of_the_mcp_client(self, house: Passing) -> None:
        """Each route arrives as it was sent, with the caller's key, and its answer comes back."""
        mints = house.app.metrics.upstream.requests["200"].value
        for method, target, content in MCP_TOOLS:
            body = None if content is None else json.dumps(content).encode()
            status, answer = await house.answered(method, target, data=body)
            direct = await house.http.request(
                method, house.vendor.url + target, data=body, headers={"api-secret": house.key}
            )
            assert (status, answer) == (direct.status, await direct.read()) != (404, answer)
            through, straight = house.passed[-2:]
            assert (through.method, through.target) == (method, target)
            assert through.secret == straight.secret
            assert (through.status, through.received) == (200, len(body or b""))
        assert house.app.metrics.upstream.requests["200"].value == mints
        assert await house.counted("2xx") == len(MCP_TOOLS)
        assert [event["route"] for event in house.events("broker.pass_through")][:2] == [
            "/v2/*",
            "/v1/*",
        ]

    async def test_neither_log_nor_metrics_tell_a_secret_or_a_path(self, house: Passing) -> None:
        """G7: a line has the configured route, never the target."""
        marker = secrets.token_hex(8)
        assert (await house.answered("GET", f"/v1/agent/{marker}?token={marker}"))[0] == 200
        assert await house.code("GET", f"/v1/x%2f{marker}") == "VALIDATION_ERROR"
        told = house.log.getvalue() + await house.scrape_text()
        for secret in (marker, house.key, house.secret):
            assert secret not in told
        event, refused = house.events("broker.pass_through")
        assert event.items() >= {"outcome": "2xx", "client": "web", "status": 200}.items()
        assert refused.items() >= {"outcome": "refused", "code": "VALIDATION_ERROR"}.items()

    async def test_an_answer_before_the_body_ends_the_connection(
        self, wire: Wire, vendor: FakeVendor
    ) -> None:
        """And says so: what is left of the body must not be read as the next request."""
        wire.is_early = True
        async with passing_to(wire, vendor) as house:
            lines = [f"{name}: {value}" for name, value in house.credentials.items()]
            head = "\r\n".join(["POST /v1/tts HTTP/1.1", "Host: a", *lines, "Content-Length: 9"])
            answer = await raw(house, f"{head}\r\n\r\nabc".encode())
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nConnection: close\r\n" in answer

    async def test_heads_in_both_directions(self, wire: Wire, vendor: FakeVendor) -> None:
        """Hop-by-hop headers stay, those that Connection names too; everything else goes on."""
        wire.says = (
            b"HTTP/1.1 207 Many Things\r\nContent-Length: 2\r\nConnection: keep-alive, X-Hop\r\n"
            b"X-Hop: 1\r\nKeep-Alive: timeout=5\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
            b"Upgrade: h2\r\nProxy-Authenticate: Basic\r\nContent-Encoding: gzip\r\nX-Odd: \xff\r\n"
            b"\r\nok"
        )
        async with passing_to(wire, vendor) as house:
            credentials = "".join(f"{n}: {v}\r\n" for n, v in house.credentials.items())
            answer = await raw(
                house,
                b"PATCH /v1/a%20b/c?x=%zz&y=a+b;'\"\\&& HTTP/1.1\r\nHost: shop.example\r\n"
                + credentials.encode()
                + b"Connection: close, X-Mine\r\nX-Mine: 1\r\nX-Other: 2\r\nX-Other: 3\r\n"
                b"X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: https\r\nTE: gzip\r\n"
                b"X-Original-URL: /v1/embed-tokens/request\r\nForwarded: for=10.0.0.1\r\n"
                b"X-Request-Id: mine-1\r\nCookie: c=1\r\n"
                b"Proxy-Authorization: Basic eDp5\r\nKeep-Alive: 5\r\nUser-Agent: sdk/1\r\n"
                b"Content-Type: text/x\r\nContent-Length: 3\r\n\r\nabc",
            )
        assert wire.got[-1].startswith(b"PATCH /prefix/v1/a%20b/c?x=%zz&y=a+b;'\"\\&& HTTP/1.1\r\n")
        assert wire.got[-1].endswith(b"\r\n\r\nabc")
        host = wire.head.pop("host")
        assert host[0].startswith("127.0.0.1:")
        assert wire.head.pop("connection") == ["close"] if "connection" in wire.head else True
        assert {n: v for n, v in wire.head.items() if n not in ("host", "connection")} == {
            "api-secret": [house.key],
            "x-other": ["2", "3"],
            "x-request-id": ["mine-1"],
            "cookie": ["c=1"],
            "user-agent": ["sdk/1"],
            "content-type": ["text/x"],
            "content-length": ["3"],
            "via": ["1.1 embed-token-broker"],
        }
        head, _, body = answer.partition(b"\r\n\r\n")
        assert (body, head.split(b"\r\n")[0]) == (b"ok", b"HTTP/1.1 207 Many Things")
        assert sorted(head.split(b"\r\n")[1:]) == sorted(
            [
                b"Content-Length: 2",
                b"Set-Cookie: a=1",
                b"Set-Cookie: b=2",
                b"Content-Encoding: gzip",
                b"X-Odd: \xff",
                b"X-Request-Id: mine-1",
                b"Cache-Control: no-store",
                b"Connection: close",
            ]
        )

    async def test_nothing_is_added_that_the_caller_left_out(
        self, wire: Wire, vendor: FakeVendor
    ) -> None:
        """No Accept, no Accept-Encoding, no Content-Type; but a name, which edges ask for."""
        async with passing_to(wire, vendor) as house:
            credentials = "".join(f"{n}: {v}\r\n" for n, v in house.credentials.items())
            head = f"POST /v1/x HTTP/1.1\r\nHost: a\r\n{credentials}Connection: close\r\n\r\n"
            await raw(house, head.encode())
        assert set(wire.head) - {"connection"} == {
            *("host", "api-secret", "x-request-id", "via", "user-agent", "content-length")
        }
        assert wire.head["user-agent"][0].startswith("embed-token-broker/")

    async def test_a_body_of_unknown_length_and_one_that_waits_to_be_asked_for(
        self, wire: Wire, vendor: FakeVendor
    ) -> None:
        """Chunks come in chunks; `Expect` is answered here and goes no further."""
        async with passing_to(wire, vendor) as house:
            credentials = "".join(f"{n}: {v}\r\n" for n, v in house.credentials.items())
            where = urlsplit(house.app.url)
            reader, writer = await asyncio.open_connection(where.hostname, where.port)
            with closing(writer):
                head = f"PUT /v1/x HTTP/1.1\r\nHost: a\r\n{credentials}Expect: 100-continue\r\n"
                writer.write(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
                interim = await reader.readuntil(b"\r\n\r\n")
                assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
                writer.write(b"3\r\nabc\r\n0\r\n\r\n")
                assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200 OK\r\n")
                # and the connection is good for another one
                writer.write(f"GET /v1/y HTTP/1.1\r\nHost: a\r\n{credentials}\r\n".encode())
                assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"GET /prefix/v1/y" in wire.got[1]
        assert b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n" in wire.got[0]
        assert b"expect" not in wire.got[0].lower()

    async def test_an_answer_without_a_length_comes_in_chunks(self, house: Passing) -> None:
        """And the connection can be used again."""
        house.vendor.fail(faults.large(3 * MEBIBYTE, framed=False), path="/v1/agents")
        for _ in range(2):
            async with house.call("GET", "/v1/agents") as response:
                assert response.headers["Transfer-Encoding"] == "chunked"
                assert "Content-Length" not in response.headers
                assert await response.read() == bytes(3 * MEBIBYTE)

    async def test_an_http_1_0_caller_gets_no_chunks(self, house: Passing) -> None:
        """What has no length ends with its connection."""
        house.vendor.fail(faults.large(MEBIBYTE, framed=False), path="/v1/agents")
        credentials = "".join(f"{n}: {v}\r\n" for n, v in house.credentials.items())
        got = await raw(house, f"GET /v1/agents HTTP/1.0\r\n{credentials}\r\n".encode())
        head, _, body = got.partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert b"Connection: close" in head
        assert body == bytes(MEBIBYTE)

    async def test_errors_redirects_and_empty_answers_are_the_vendor_s(
        self, house: Passing
    ) -> None:
        """Its envelope, its Location, its 204: as they are."""
        assert (await house.answered("GET", "/v1/nothing"))[0] == 404
        for fault, status in (
            (faults.redirect("https://elsewhere.example/"), 302),
            (faults.error(Refusal.PLAN_REQUIRED), 403),
            (faults.error(Refusal.INTERNAL_ERROR), 500),
            (faults.body(b"", 204), 204),
        ):
            with house.vendor.fail(fault, path=None):
                async with house.call("GET", "/v1/agents") as response:
                    assert response.status == status
                    if status == 302:
                        assert response.headers["Location"] == "https://elsewhere.example/"
        assert [await house.counted(name) for name in ("2xx", "3xx", "4xx", "5xx")] == [1, 1, 2, 1]


class TestWhoMay:
    async def test_nobody_where_nothing_is_configured(self, vendor: FakeVendor) -> None:
        """Off by default: 404, and nothing reaches the vendor."""
        async with passing_before(vendor, {}) as house:
            assert await house.code("GET", "/v1/agents") == "NOT_FOUND"
            assert house.passed == []
            assert "broker_pass_through" not in await house.scrape_text()

    async def test_a_client_without_the_switch_may_not(self, vendor: FakeVendor) -> None:
        """403, whatever keys it has."""
        async with passing_before(vendor, passing(ALL)) as house:
            assert await house.code("GET", "/v1/agents") == "ROUTE_NOT_ALLOWED"
            assert await house.code("GET", "/v1/a%2fb") == "VALIDATION_ERROR"
            assert await house.code("GET", "/favicon.ico") == "NOT_FOUND"
            assert await house.counted("refused") == 2
            assert house.passed == []

    async def test_only_routes_that_are_named(self, vendor: FakeVendor) -> None:
        """Below `/*`, or to the letter."""
        tree = passing(["/v1/agent/*", "/v1/agents"], pass_through=True)
        async with passing_before(vendor, tree) as house:
            for target, status in {
                f"/v1/agent/{AGENT}": 200,
                "/v1/agents?limit=1": 200,
                "/v1/agents/": 404,
                "/v1/agent": 404,
                "/v1/usage": 404,
                "/V1/agents": 404,
            }.items():
                assert (await house.answered("GET", target))[0] == status, target
            assert len(house.passed) == 2

    @pytest.mark.parametrize(
        ("left_out", "code"),
        [("api-secret", "MISSING_AUTH"), ("Authorization", "MISSING_AUTH")],
    )
    async def test_both_secrets_are_needed(self, house: Passing, left_out: str, code: str) -> None:
        """The client's own and the vendor's: one says who asks, the other goes along."""
        mine = {name: value for name, value in house.credentials.items() if name != left_out}
        assert await house.code("GET", "/v1/agents", headers=mine) == code
        assert house.passed == []

    async def test_a_client_secret_is_never_shown_to_the_vendor(self, house: Passing) -> None:
        """Neither as `api-secret`, where an SDK would put it, nor beside the key."""
        wrong = {"api-secret": house.secret, "Authorization": f"Bearer {house.secret}"}
        for headers in (wrong, {"api-secret": house.secret}):
            assert await house.code("GET", "/v1/agents", headers=headers) == "VALIDATION_ERROR"
        assert house.passed == []

    @pytest.mark.parametrize("name", ["X-Custom", "Cookie", "api-secret"])
    async def test_nor_anywhere_else_in_a_head(self, house: Passing, name: str) -> None:
        """Whatever it is called there: who sends it has taken one secret for the other."""
        headers = {**house.credentials, name: f"Bearer {house.secret}"}
        assert await house.code("GET", "/v1/agents", headers=headers) == "VALIDATION_ERROR"
        assert await house.code("GET", f"/v1/agents?key={house.secret}") == "VALIDATION_ERROR"
        assert house.passed == []

    async def test_no_page_may(self, house: Passing) -> None:
        """A secret with an Origin has leaked, here as everywhere."""
        leaked = {**house.credentials, "Origin": "https://shop.example"}
        assert await house.code("GET", "/v1/agents", headers=leaked) == "SECRET_IN_BROWSER"
        assert house.passed == []

    async def test_the_broker_s_own_routes_win(self, house: Passing) -> None:
        """Also where the method, a query or a slash differs; a mint is never passed on."""
        for method, target, status in [
            ("GET", "/v1/embed-tokens/request", 405),
            ("POST", "/v1/embed-tokens/request?x=1", 401),
            ("POST", "/v1/embed-tokens/request/", 404),
            ("POST", "/v1/embed-tokens", 404),
            ("POST", "/v1/Embed-Tokens/request", 404),
            ("POST", "/v1/embed-tokens/other", 404),
            ("GET", "/v1/validate", 405),
            ("GET", "/v1/introspect?x", 405),
            ("GET", "/livez", 200),
        ]:
            own = {"api-secret": house.key}
            assert (await house.answered(method, target, headers=own))[0] == status, target
        assert list(house.vendor.journal.records) == []

    @pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PROPFIND"])
    async def test_other_methods_are_refused(self, house: Passing, method: str) -> None:
        async with house.call(method, "/v1/agents") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "DELETE, GET, PATCH, POST, PUT"
        assert house.passed == []

    async def test_without_clients_the_key_has_to_be_the_broker_s(self, vendor: FakeVendor) -> None:
        """A stranger's would be a failed login from the broker's address."""
        tree = passing(ALL)
        tree["clients"] = {}

        async with private_relay(vendor) as house:
            known = {"api-secret": vendor.secret.reveal()}
            assert (await house.answered("GET", "/v1/agents", headers=known))[0] == 200
            assert house.passed[-1].secret == vendor.secret.digest().hex()
            other = {"api-secret": vendor.add_secret().reveal()}
            assert await house.code("GET", "/v1/agents", headers=other) == "UNAUTHORIZED"
            assert len(house.passed) == 1

    async def test_nor_goes_a_second_key_along_that_nobody_looked_at(
        self, wire: Wire, vendor: FakeVendor
    ) -> None:
        """The vendor might try that one, and count a failed login."""
        server = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with closing(server):
            await self.asked_with_two_keys(wire, vendor, url)

    async def asked_with_two_keys(self, wire: Wire, vendor: FakeVendor, url: str) -> None:
        async with private_relay(vendor, url) as house:
            known = {"api-secret": vendor.secret.reveal()}
            both = known | {"Authorization": "Bearer a-stranger-s-key"}
            assert (await house.answered("GET", "/v1/agents", headers=both))[0] == 200
            assert wire.head["api-secret"] == [known["api-secret"]]
            assert "authorization" not in wire.head
            alone = {"Authorization": f"Bearer {vendor.secret.reveal()}"}
            assert (await house.answered("GET", "/v1/agents", headers=alone))[0] == 200
            assert wire.head["authorization"] == [alone["Authorization"]]

    @pytest.mark.parametrize(
        ("tree", "told"),
        [
            ({"issuer": {"upstream": {"pass_through": ["/v1/*"]}}}, "a local issuer has no vendor"),
            (passing(["v1/agents"]), "is not a route"),
            (passing(["/*"]), "is not a route"),
            (passing(["/v1/../x"]), "is not a route"),
            (passing(["/v1/*/x"]), "is not a route"),
            (passing(["/v1/Embed-tokens/*"]), "mints are the broker's own"),
            (passing([], pass_through=True), "no route is passed on"),
        ],
    )
    def test_what_cannot_be_configured(self, tree: dict[str, Any], told: str) -> None:
        """One line that names the setting and the remedy."""
        if "a local" not in told:
            tree["issuer"]["kind"] = "upstream"
        with pytest.raises(ConfigError, match=told):
            config.from_tree(tree)


@asynccontextmanager
async def private_relay(vendor: FakeVendor, url: str | None = None) -> AsyncIterator[Passing]:
    """Run a relay without clients, as one without a configuration is; it asks `url`."""
    from relaying import App, io, logging_to, relay_tree

    def load() -> Any:
        tree = passing(ALL)
        tree["issuer"]["upstream"]["base_url"] = url or vendor.url
        return config.load(None, {}, tree, relay_tree(vendor))

    log = io.StringIO()
    with logging_to(log, load()):
        app = App(load(), load, {})
        await app.start()
        house = Passing(app, vendor, log, "")
        house.keys = []
        try:
            yield house
        finally:
            await house.http.close()
            app.stop()
            await app.run()
        assert "broker.defect" not in log.getvalue()


SMUGGLED_TARGETS = [
    b"GET http://127.0.0.1:1/v1/agents",
    b"GET https://api.example/v1/agents",
    b"GET //v1/agents",
    b"GET /v1/../v1/agents",
    b"GET /v1/agent/..",
    b"GET /v1/./agents",
    b"GET /v1//agents",
    b"POST /v1/x/../embed-tokens/request",
    b"GET /v1/%2e%2e/admin",
    b"GET /v1/.%2E/admin",
    b"GET /v1/agent%2fstatus",
    b"GET /v1/agent%5Cstatus",
    b"GET /v1/agent\\status",
    b"GET /v1/agent%252fstatus",
    b"GET /v1/agent%c0%afstatus",
    b"GET /v1/agent%00",
    b"GET /v1/agent%0d%0aX:1",
    b"GET /v1/agent%zz",
    b"POST /v1/%65mbed-tokens/request",
    b"POST /v1/embed%2Dtokens/request",
    b"POST /v1/embed-tokens;a=b/request",
    b"POST /v1/agent;/../embed-tokens/request",
    b"GET /v1/agents#fragment",
    b"GET /v1/agents?a#b",
    b"GET /v1/agents\tx",
    b"GET /v1/agents\x01",
    b"GET /v1/agents?a=\xff",
    b"GET /v1/agents HTTP/1.1",
    b"CONNECT /v1/agents",
    b"CONNECT api.example:443",
]

SMUGGLED_HEADERS = [
    (b"GET /v1/agents", b"Upgrade: websocket|Connection: upgrade", b""),
    (b"GET /v1/agents", b"Upgrade: h2c", b""),
    (b"GET /v1/agents", b"Connection: api-secret", b""),
    (b"POST /v1/tts", b"Content-Length: 2|Connection: content-length", b"{}"),
    (b"POST /v1/tts", b"Transfer-Encoding: gzip, chunked", b"0\r\n\r\n"),
    (
        b"POST /v1/tts",
        b"Content-Length: 4|Transfer-Encoding: chunked",
        b"0\r\n\r\nGET /v1/agents HTTP/1.1\r\nHost: a\r\n\r\n",
    ),
    (b"POST /v1/tts", b"Content-Length: 2|Content-Length: 3", b"{} "),
    (b"GET /v1/agents", b"X-A: b\rX-B: c", b""),
    (b"GET /v1/agents", b"X-A: b\n c", b""),
    (b"GET /v1/agents", b"X-A: \xff", b""),
    (b"GET /v1/agents", b"X-A : b", b""),
]
"""Request line, headers with `|` between them, body."""


class TestSmuggling:
    @pytest.mark.parametrize("line", SMUGGLED_TARGETS)
    async def test_by_a_target_reaches_nothing(self, house: Passing, line: bytes) -> None:
        """What somebody could read as another path, or as another host."""
        await self.require_nothing(house, line, b"", b"")

    @pytest.mark.parametrize(("line", "headers", "body"), SMUGGLED_HEADERS)
    async def test_by_headers_reaches_nothing(
        self, house: Passing, line: bytes, headers: bytes, body: bytes
    ) -> None:
        """Another protocol, a body of two lengths, a header that takes another one away."""
        await self.require_nothing(house, line, headers.replace(b"|", b"\r\n") + b"\r\n", body)

    async def test_by_the_preface_of_http_2_reaches_nothing(self, house: Passing) -> None:
        """RFC 9113 section 3.4."""
        got = await raw(house, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 400 ")
        assert list(house.vendor.journal.records) == []

    @staticmethod
    async def require_nothing(house: Passing, line: bytes, headers: bytes, body: bytes) -> None:
        """Refused with an envelope or a cut connection; the vendor's journal stays empty."""
        credentials = "".join(f"{n}: {v}\r\n" for n, v in house.credentials.items()).encode()
        head = line + b" HTTP/1.1\r\nHost: a\r\n" + headers + credentials
        got = await raw(house, head + b"Connection: close\r\n\r\n" + body)
        assert not got.startswith(b"HTTP/1.1 2"), got
        assert list(house.vendor.journal.records) == []
        assert (await house.answered("GET", "/v1/agents"))[0] == 200  # it is well, and this is how
        assert await house.counted("2xx") == 1


class TestLimits:
    async def test_a_hundred_megabytes_in_constant_memory(self, house: Passing) -> None:
        """Down, and up: what is held at a time does not grow with the body."""
        size = 100 * MEBIBYTE
        house.vendor.fail(faults.large(size), path="/v1/agents")
        before = resident()
        most, got = before, 0
        async with house.call("GET", "/v1/agents") as response:
            async for chunk in response.content.iter_any():
                got += len(chunk)
                most = max(most, resident())
        assert got == size
        (event,) = house.events("broker.pass_through")
        assert event["received"] == size  # in however many pieces it came

        async def upload() -> AsyncIterator[bytes]:
            nonlocal most
            for _ in range(size // MEBIBYTE):
                yield bytes(MEBIBYTE)
                most = max(most, resident())

        assert (await house.answered("POST", "/v1/tts", data=upload()))[0] == 200
        assert house.passed[-1].received == size
        grown = most - before  # of vendor, broker and caller, in one process
        print(f"resident memory grew by {grown / MEBIBYTE:.1f} MiB for 2 x 100 MiB")
        assert grown < 32 * MEBIBYTE

    async def test_a_caller_that_does_not_read_stops_the_vendor(self, house: Passing) -> None:
        """Some buffers are filled, and then nothing more is taken from the vendor."""
        house.vendor.fail(faults.large(100 * MEBIBYTE), path="/v1/agents")
        credentials = "".join(f"{n}: {v}\r\n" for n, v in house.credentials.items())
        where = urlsplit(house.app.url)
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
            slow.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(slow, (where.hostname, where.port))
            await loop.sock_sendall(
                slow, f"GET /v1/agents HTTP/1.1\r\nHost: a\r\n{credentials}\r\n".encode()
            )
            await until(lambda: house.app.metrics.pass_through.in_flight.value == 1, "it to begin")
            grown = await settled(resident)
            assert grown < 32 * MEBIBYTE
        await until(lambda: house.app.metrics.pass_through.in_flight.value == 0, "its end")
        assert await house.counted("left") == 1

    async def test_one_that_leaves_ends_the_vendor_s_connection(
        self, wire: Wire, vendor: FakeVendor
    ) -> None:
        """In the middle of an answer; the vendor sees it, and it is counted."""
        wire.says, wire.holds = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf", True
        async with passing_to(wire, vendor) as house:
            async with house.call("GET", "/v1/agents") as response:
                assert await response.content.readexactly(4) == b"half"
                response.close()
            await until(lambda: wire.lost == 1, "the vendor to lose its caller")
            assert await house.counted("left") == 1

    async def test_an_upload_whose_framing_breaks_is_told_at_once(self, house: Passing) -> None:
        """And ends the vendor's connection, which has not got a whole body."""
        house.vendor.fail(faults.hang(), path="/v1/x")
        credentials = "".join(f"{n}: {v}\r\n" for n, v in house.credentials.items())
        where = urlsplit(house.app.url)
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        with closing(writer):
            head = f"POST /v1/x HTTP/1.1\r\nHost: a\r\n{credentials}"
            writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n".encode())
            await until(lambda: house.passed, "it to arrive")
            writer.write(b"zz\r\n")
            async with asyncio.timeout(30):
                answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"broken transfer" in answer
        assert b"Connection: close" in answer

    @pytest.mark.parametrize("framed", [True, False])
    async def test_a_vendor_that_breaks_off_leaves_a_broken_transfer(
        self, wire: Wire, vendor: FakeVendor, framed: bool
    ) -> None:
        """Neither with a length nor with chunks is half an answer taken for a whole one."""
        how = b"Content-Length: 1000" if framed else b"Transfer-Encoding: chunked"
        wire.says = b"HTTP/1.1 200 OK\r\n" + how + b"\r\n\r\n4\r\nhalf\r\n"
        async with passing_to(wire, vendor) as house:
            with pytest.raises(aiohttp.ClientError):
                await house.answered("GET", "/v1/agents")
            assert await house.counted("broken") == 1
            (event,) = house.events("broker.pass_through")
            assert (event["outcome"], event["reason"]) == ("broken", "reset")

    async def test_a_defect_in_the_middle_is_not_answered_with_the_rest(
        self, wire: Wire, vendor: FakeVendor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What nobody has foreseen ends a transfer, too: an error would be taken for its rest."""
        wire.says = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf"
        wire.holds = True
        moved = passage.Passage.moved

        def breaks(self: passage.Passage) -> None:
            if self.received:
                raise LookupError("defect")
            moved(self)

        monkeypatch.setattr(passage.Passage, "moved", breaks)
        async with passing_to(wire, vendor) as house:
            with pytest.raises(aiohttp.ClientError):
                await house.answered("GET", "/v1/agents")
            assert await house.counted("broken") == 1
            (event,) = house.events("broker.pass_through")
            assert (event["outcome"], event["reason"]) == ("broken", "defect")
            assert len(house.events("broker.defect")) == 1
            house.log.truncate(house.log.seek(0))  # the one that was meant

    async def test_nor_where_only_the_end_would_tell(self, wire: Wire, vendor: FakeVendor) -> None:
        """A caller of HTTP/1.0 takes what came before the end for all, unless that is a reset."""
        wire.says = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"
        async with passing_to(wire, vendor) as house:
            credentials = "".join(f"{n}: {v}\r\n" for n, v in house.credentials.items())
            got = await raw(house, f"GET /v1/agents HTTP/1.0\r\n{credentials}\r\n".encode())
            assert got == b"reset"
            assert await house.counted("broken") == 1

    @pytest.mark.parametrize(
        "garbage",
        [
            b"SSH-2.0-x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
            b"",
        ],
    )
    async def test_a_vendor_that_makes_no_sense(
        self, wire: Wire, vendor: FakeVendor, garbage: bytes
    ) -> None:
        """502 in the broker's envelope, with the reason in the log."""
        wire.says = garbage
        async with passing_to(wire, vendor) as house:
            assert await house.code("GET", "/v1/agents") == "UPSTREAM_UNAVAILABLE"
            assert await house.counted("failed") == 1

    async def test_an_answer_may_be_larger_than_any_mint_s(self, house: Passing) -> None:
        """The bound of a mint's connection is not one here."""
        house.vendor.fail(faults.large(4 * MAX_BYTES), path="/v1/agents")
        assert len((await house.answered("GET", "/v1/agents"))[1]) == 4 * MAX_BYTES

    async def test_a_vendor_that_is_away(self, house: Passing) -> None:
        """502 at once; mints and their breaker know nothing of it."""
        await house.vendor.refuse_connections()
        for _ in range(20):
            assert await house.code("GET", "/v1/agents") == "UPSTREAM_UNAVAILABLE"
        await house.vendor.accept_connections()
        assert (await house.request_token()).status == 200

    async def test_nothing_moves_for_too_long(
        self, house: Passing, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """504 where the vendor is silent, 408 where the caller's body does not come."""
        monkeypatch.setattr(passage, "STALLED", 2.0)
        monkeypatch.setattr(pass_through, "STALLED", 2.0)
        with house.vendor.fail(faults.hang(), path="/v1/agents"):
            assert await house.code("GET", "/v1/agents") == "UPSTREAM_TIMEOUT"
        credentials = "".join(f"{n}: {v}\r\n" for n, v in house.credentials.items())
        stalled = f"POST /v1/tts HTTP/1.1\r\nHost: a\r\n{credentials}Content-Length: 9\r\n\r\nabc"
        got = await raw(house, stalled.encode())
        assert got.startswith(b"HTTP/1.1 408 ")
        assert b"REQUEST_TIMEOUT" in got

    async def test_what_moves_slowly_may_take_longer(
        self, house: Passing, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The time is that without a byte, not that of the whole."""
        monkeypatch.setattr(passage, "STALLED", 3.0)
        monkeypatch.setattr(pass_through, "STALLED", 3.0)
        body = faults.combined(faults.body(b"01234567"), faults.drip(0.5))
        with house.vendor.fail(body, path="/v1/agents"):
            assert await house.answered("GET", "/v1/agents") == (200, b"01234567")

    async def test_one_client_cannot_take_all_places(
        self, vendor: FakeVendor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """503 at once for one more than it leaves free; another client has a place, and mints."""
        monkeypatch.setattr(pass_through, "MAX_PASSED", 6)
        other = secrets.token_urlsafe(24)
        tree = passing(ALL, pass_through=True)
        tree["clients"]["other"] = {"secret": other, "agents": ["*"], "pass_through": True}
        async with passing_before(vendor, tree) as house:
            theirs = {"api-secret": house.key, "Authorization": f"Bearer {other}"}
            with vendor.fail(faults.hang(), path="/v1/agents"):
                held = [asyncio.ensure_future(house.answered("GET", "/v1/agents")) for _ in "abc"]
                await until(lambda: len(house.passed) == 3, "them to hang")
                assert house.app.metrics.pass_through.in_flight.value == 3
                async with house.call("GET", "/v1/agents") as refused:
                    assert refused.status == 503
                    assert int(refused.headers["Retry-After"]) >= 1
                    error = (await refused.json())["error"]
                assert error["code"] == "SERVICE_UNAVAILABLE"
                assert "3 of them for this client" in error["message"]
                assert (await house.answered("GET", "/v1/voices", headers=theirs))[0] == 200
                assert (await house.request_token()).status == 200
                for task in held:
                    task.cancel()
                await asyncio.gather(*held, return_exceptions=True)
            in_flight = house.app.metrics.pass_through.in_flight
            await until(lambda: in_flight.value == 0, "free places")
            assert (await house.answered("GET", "/v1/agents"))[0] == 200

    async def test_a_drain_lets_an_answer_end(self, vendor: FakeVendor) -> None:
        """What is under way when the broker is asked to stop comes to its end, and closes."""
        tree = passing(ALL, pass_through=True)
        tree["server"] = {"drain": "10s"}
        body = faults.combined(faults.body(b"0123456789"), faults.drip(0.1))
        async with passing_before(vendor, tree) as house:
            vendor.fail(body, path="/v1/agents")
            under_way = asyncio.ensure_future(house.answered("GET", "/v1/agents"))
            await until(lambda: house.passed, "it to arrive")
            house.app.stop()
            stopping = asyncio.ensure_future(house.app.run())
            assert await under_way == (200, b"0123456789")
            await stopping


class TestThrottled:
    @pytest.mark.parametrize(
        ("fault", "least", "most"),
        [
            (faults.error(Refusal.RATE_LIMITED, retry_after="7"), 6, 7),
            (faults.error(Refusal.RATE_LIMITED, retry_after="3600"), 58, 60),
            (faults.error(Refusal.RATE_LIMITED), 4, 5),
            (faults.html(429), 4, 5),
            (faults.error(Refusal.SESSION_LIMIT, retry_after="7"), 0, 0),
        ],
    )
    async def test_V1_a_429_pauses_mints(
        self, house: Passing, fault: faults.Fault, least: float, most: float
    ) -> None:
        """It is about the address, which is the mints', too; one about capacity is not."""
        with house.vendor.fail(fault, path="/v1/agents"):
            status, content = await house.answered("GET", "/v1/agents")
        assert status == 429
        assert fault.answer is not None
        assert content == fault.answer.body
        assert least <= house.paused_for <= most

    async def test_one_for_failed_logins_does_not(self, house: Passing) -> None:
        """A caller's bad key is no reason to stop everybody's mints."""
        house.vendor.revoke_secret(house.key, None)
        statuses = [(await house.answered("GET", "/v1/agents"))[0] for _ in range(32)]
        assert statuses[:30] == [401] * 30
        assert statuses[30:] == [429] * 2
        assert house.paused_for == 0

    async def test_nor_does_one_for_keys_that_are_guessed(self, house: Passing) -> None:
        """The vendor counts failed logins by the address: one caller could stop all mints."""
        statuses = [
            await house.answered("GET", "/v1/agents", headers=house.credentials | {"api-secret": k})
            for k in (secrets.token_hex(8) for _ in range(32))
        ]
        assert [status for status, _ in statuses] == [401] * 30 + [429] * 2
        assert house.paused_for == 0
        assert (await house.answered("GET", "/v1/agents"))[0] == 200
        with house.vendor.fail(faults.error(Refusal.RATE_LIMITED), path="/v1/agents"):
            assert (await house.answered("GET", "/v1/agents"))[0] == 429
        assert house.paused_for > 0  # a key that is good was throttled for something else

    async def test_no_more_of_a_429_is_kept_than_tells_its_code(
        self, house: Passing, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However large it is, it goes on to the caller as it comes."""
        size, kept = 8 * 2**20, list[int]()
        read = pass_through.unpacked

        def seen(answer: PassedAnswer, content: bytes, most: int) -> VendorAnswer:
            kept.append(len(content))
            return read(answer, content, most)

        monkeypatch.setattr(pass_through, "unpacked", seen)
        flood = faults.large(size)
        assert flood.answer is not None
        limited = msgspec.structs.replace(flood.answer, status=429)
        house.vendor.fail(msgspec.structs.replace(flood, answer=limited), path="/v1/agents")
        status, content = await house.answered("GET", "/v1/agents")
        assert (status, len(content)) == (429, size)
        assert 0 < kept[0] < size / 2

    async def test_a_key_that_is_good_again_is_heeded_again(self, house: Passing) -> None:
        """What the vendor said of it is over with the first answer that is no refusal."""
        unauthorized = faults.error(Refusal.UNAUTHORIZED)
        limited = faults.error(Refusal.RATE_LIMITED, retry_after="7")
        for fault, status in ((unauthorized, 401), (limited, 429), (None, 200)):
            if fault is not None:
                house.vendor.fail(fault, path="/v1/agents", times=1)
            assert (await house.answered("GET", "/v1/agents"))[0] == status
            assert house.paused_for == 0
        house.vendor.fail(limited, path="/v1/agents", times=1)
        assert (await house.answered("GET", "/v1/agents"))[0] == 429
        assert house.paused_for > 0

    async def test_a_key_that_is_good_no_more_is_heeded_no_more(self, house: Passing) -> None:
        """What it was accepted for is over with its first refusal: a 429 may be for that one."""
        unauthorized = faults.error(Refusal.UNAUTHORIZED)
        limited = faults.error(Refusal.RATE_LIMITED, retry_after="7")
        for fault, status in ((None, 200), (unauthorized, 401), (limited, 429)):
            if fault is not None:
                house.vendor.fail(fault, path="/v1/agents", times=1)
            assert (await house.answered("GET", "/v1/agents"))[0] == status
        assert house.paused_for == 0


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


async def settled(measure: Callable[[], int]) -> int:
    """Return by how much a measure grows until it stands still for half a second."""
    first = last = measure()
    still = 0
    while still < 10:
        await asyncio.sleep(0.05)
        now = measure()
        still, last = (still + 1, last) if now <= last else (0, now)
    return last - first
