"""The demonstration's servers: for this machine only, and for pages of its own only."""

from collections.abc import AsyncIterator
from urllib.parse import parse_qs, urlsplit

import pytest
from edge import AGENT, Edge, Reply, request, serving, visitor

JSON = ("Content-Type", "application/json")


@pytest.fixture
async def demo() -> AsyncIterator[Edge]:
    """Run a development broker, as `--dev` does."""
    tree = {"server": {"docs": True}, "clients": {"dev": {"secret": "x" * 20, "agents": ["*"]}}}
    async with serving(tree, dev=True) as edge:
        yield edge


def port(edge: Edge) -> int:
    """Return where it listens."""
    found = urlsplit(edge.app.url).port
    assert found is not None
    return found


async def asked(
    edge: Edge,
    path: str,
    host: str = "127.0.0.1",
    body: bytes | None = None,
    *headers: tuple[str, str],
) -> Reply:
    """Ask under this name of the machine; with a body it is a POST."""
    method = "GET" if body is None else "POST"
    named = request(method, path, list(headers), body)
    first, _, rest = named.partition(b"\r\n")
    lines = [line for line in rest.split(b"\r\n") if not line.lower().startswith(b"host:")]
    return await edge.raw(b"\r\n".join([first, f"Host: {host}:{port(edge)}".encode(), *lines]))


async def token_of(edge: Edge, fingerprint: str) -> str:
    """Ask the site's backend."""
    body = f'{{"agent_id": "{AGENT}", "fingerprint": "{fingerprint}"}}'.encode()
    reply = await asked(edge, "/demo/token", "127.0.0.1", body, JSON)
    token: str = reply.json["data"]["token"]
    return token


async def test_the_site_s_route_needs_no_secret_and_shows_the_limit(demo: Edge) -> None:
    """It has the secret itself; the page sees the visitor's limit move."""
    fingerprint = visitor()
    body = f'{{"agent_id": "{AGENT}", "fingerprint": "{fingerprint}"}}'.encode()
    replies = [await asked(demo, "/demo/token", "localhost", body, JSON) for _ in range(21)]
    assert [reply.status for reply in replies] == [200] * 20 + [429]
    assert [reply.header("X-RateLimit-Remaining") for reply in replies[:3]] == ["19", "18", "17"]
    assert replies[1].header("Cache-Status") == "embed-token-broker; hit"
    assert replies[-1].header("Retry-After") == "1"
    assert "x" * 20 not in demo.log.getvalue()


async def test_a_foreign_page_cannot_use_it(demo: Edge) -> None:
    """What a page may send unasked is refused; for JSON it has to ask, and nobody answers."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = [("Content-Type", kind)] if kind else []
        reply = await asked(demo, "/demo/token", "127.0.0.1", b"{}", *headers)
        assert (reply.status, reply.code) == (400, "VALIDATION_ERROR")
        assert not [name for name, _ in reply.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "10.0.0.5", "127.0.0.1.nip.io", "[::1]"]
)
@pytest.mark.parametrize("path", ["/demo", "/demo/viewer", "/embed/A1?token=x", "/metrics"])
async def test_a_name_that_is_not_this_machine_s_gets_nothing(
    demo: Edge, host: str, path: str
) -> None:
    """Or a page anywhere could have its own name resolve to this machine."""
    assert (await asked(demo, path, host)).code == "NOT_FOUND"


@pytest.mark.parametrize("path", ["/demo/token", "/demo/verify"])
async def test_a_name_that_is_not_this_machine_s_gets_no_token(demo: Edge, path: str) -> None:
    """A page whose own name resolves here may send JSON to it: for the browser it is its site."""
    body = f'{{"agent_id": "{AGENT}", "fingerprint": "{visitor()}"}}'.encode()
    reply = await asked(demo, path, "evil.example", body, JSON)
    assert (reply.status, reply.code) == (404, "NOT_FOUND")


@pytest.mark.parametrize("host", ["localhost:99999", "localhost:abc", "[", "a b", ""])
@pytest.mark.parametrize("path", ["/demo", "/embed/A1?token=x", "/metrics"])
async def test_a_host_that_is_none_gets_nothing(demo: Edge, host: str, path: str) -> None:
    """A port that cannot be, brackets, blanks: 404, no defect."""
    reply = await demo.raw(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert (reply.status, reply.code) == (404, "NOT_FOUND")


async def test_the_frame_begins_on_one_origin_and_ends_on_another(demo: Edge) -> None:
    """A redirect with the token, to the third name; no referrer goes with it."""
    for host in ("127.0.0.1", "localhost"):
        reply = await asked(demo, "/embed/A1?token=a.b-c&x=y", host)
        assert reply.status == 302
        target = urlsplit(reply.header("Location") or "")
        assert (target.hostname, target.port) == ("viewer.localhost", port(demo))
        assert parse_qs(target.query) == {"token": ["a.b-c"]}
        assert reply.header("Referrer-Policy") == "no-referrer"
    hostile = await asked(demo, "/embed/A1?token=%0d%0aSet-Cookie:x=1", "localhost")
    assert hostile.header("Set-Cookie") is None


async def test_the_page_is_for_the_name_under_which_it_was_asked_for(demo: Edge) -> None:
    """Its frame is always another origin than itself."""
    for host, other in (("127.0.0.1", "localhost"), ("localhost", "127.0.0.1")):
        page = (await asked(demo, "/demo?mode=inline", host)).body.decode()
        assert f'data-embed-origin="http://{other}:{port(demo)}"' in page
        assert 'data-mode="inline"' in page
        assert "$" not in page
    wrong = await asked(demo, "/demo?mode=%22%3E%3Cscript%3E")
    assert (wrong.status, wrong.code) == (400, "VALIDATION_ERROR")


async def test_the_viewer_has_its_token_verified(demo: Edge) -> None:
    """Agent, session and end of a good one; 401 for any other."""
    token = await token_of(demo, visitor())
    bearer = ("Authorization", f"Bearer {token}")
    reply = await asked(demo, "/demo/verify", "viewer.localhost", b"", bearer)
    assert reply.status == 200
    assert set(reply.json) == {"agent", "session", "expires"}
    assert reply.json["agent"] == AGENT
    for wrong in (f"{token}x", "", "a.b.c", token.rpartition(".")[0] + "."):
        bearer = ("Authorization", f"Bearer {wrong}")
        reply = await asked(demo, "/demo/verify", "viewer.localhost", b"", bearer)
        assert reply.status == 401


async def test_a_revoked_token_opens_no_viewer(demo: Edge) -> None:
    """The viewer asks the broker, which knows what was ended; a good signature is not enough."""
    token = await token_of(demo, visitor())
    bearer = ("Authorization", f"Bearer {token}")
    secret = ("api-secret", "x" * 20)
    form = ("Content-Type", "application/x-www-form-urlencoded")
    revoked = await asked(demo, "/v1/revoke", "127.0.0.1", f"token={token}".encode(), secret, form)
    assert revoked.status == 200
    reply = await asked(demo, "/demo/verify", "viewer.localhost", b"", bearer)
    assert reply.status == 401


async def test_only_development_on_loopback_has_it(edge: Edge) -> None:
    """In production there is neither the route that gives tokens away nor a page that asks."""
    for path in ("/demo", "/demo/token", "/demo/viewer", "/demo/demo.js", "/embed/A1"):
        assert (await edge.get(path)).code == "NOT_FOUND"
    for listen, there in (("127.0.0.1:0", True), ("0.0.0.0:0", False)):
        tree = {"server": {"listen": listen}, "clients": {"dev": {"secret": "x" * 20}}}
        async with serving(tree, dev=True) as development:
            assert ("/demo/token" in development.app.parts.routes.table) is there
