"""A viewer behind real proxies that ask the broker: the shipped files, rows O2 and O5."""

import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
import httpx
import jwt
import plain
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from gateways import AGENT, KINDS, Broker, Site, brokers, gateway, logged, nginx
from running import free_port

pytestmark = pytest.mark.parts

NAMES = ("session", "agent", "fingerprint", "expires")


class Guarded(NamedTuple):
    """A viewer, its broker, and the proxy between them."""

    kind: str
    url: str
    broker: Broker
    viewer: Site
    folder: Path


@pytest.fixture(params=KINDS, scope="module")
def guarded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    """One of each kind, for all tests."""
    folder = tmp_path_factory.mktemp(request.param)
    with (
        brokers(Broker(folder)) as (broker,),
        Site() as viewer,
        gateway(request.param, "viewer", folder, {8080: broker.port, 3000: viewer.port}) as url,
    ):
        yield Guarded(request.param, url, broker, viewer, folder)


def test_a_good_token_passes_and_the_viewer_is_told_whose_it_is(guarded: Guarded) -> None:
    """In the URL as in an iframe, and in either header; path, query and body get through whole."""
    data = guarded.broker.token("9f86d081884c7d65")
    token = data["token"]
    path = f"/embed/{AGENT}?lang=en&token={token}&x=%20y"
    by_header = {"headers": {"X-Embed-Token": token}}
    answers = [
        plain.get(guarded.url + path),
        plain.get(f"{guarded.url}/a", **by_header),
        plain.get(f"{guarded.url}/a", headers={"Authorization": f"Bearer {token}"}),
        plain.post(f"{guarded.url}/a", content=b"hello", **by_header),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        told = {n: v for n, v in answer.json()["headers"] if n.startswith("x-embed-")}
        assert told == {
            "x-embed-session": data["session_id"],
            "x-embed-agent": AGENT,
            "x-embed-fingerprint": "9f86d081884c7d65",
            "x-embed-expires": str(data["expires_at"]),
        }
    assert answers[0].json()["path"] == path
    assert (answers[3].json()["method"], answers[3].json()["body"]) == ("POST", "hello")
    assert plain.head(f"{guarded.url}/a", **by_header).status_code == 200


NEEDED = {
    *("host", "authorization", "x-embed-token", "x-request-id", "x-original-uri"),
    *("x-forwarded-uri", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"),
    *("x-forwarded-method", "via", "x-envoy-internal", "x-envoy-expected-rq-timeout-ms"),
    *("x-b3-traceid", "accept-encoding", "user-agent", "content-length"),
}
"""What a proxy may tell the broker: the token, whose request it is, and what proxies add."""

BROWSING = {
    "Cookie": "; ".join(f"c{n}={'x' * 1000}" for n in range(16)),
    "Referer": f"https://site.example/?{'r' * 7000}",
    "User-Agent": "Mozilla/5.0 " + "u" * 500,
    "Accept": "text/html,*/*;q=0.8",
    "Accept-Language": "de",
    "Sec-Fetch-Mode": "navigate",
    "Sec-CH-UA": "v" * 500,
    "If-None-Match": '"etag"',
    "X-Own": "own",
}
"""What a browser sends with each request: 16 KB of cookies, a Referer as long as URLs are."""


@pytest.mark.parametrize("kind", KINDS)
def test_N5_the_broker_is_sent_only_what_it_needs(kind: str, tmp_path: Path) -> None:
    """No cookies, no Referer, no body, and no length of one; the viewer gets all of it."""
    with (
        Site(200, {"X-Embed-Session": "s"}) as asked,
        Site() as viewer,
        gateway(kind, "viewer", tmp_path, {8080: asked.port, 3000: viewer.port}) as url,
    ):
        asked.seen.clear()
        for method, content in (("GET", b""), ("POST", b"y" * 100_000), ("HEAD", b"")):
            answer = plain.request(method, f"{url}/?token=t", headers=BROWSING, content=content)
            assert answer.status_code == 200, answer.text
            (told,) = asked.seen
            names = [name for name, _ in told["headers"]]
            assert set(names) <= NEEDED, set(names) - NEEDED
            assert sum(len(name) + len(value) + 4 for name, value in told["headers"]) < 1500
            assert dict(told["headers"]).get("content-length", "0") == "0"
            assert "transfer-encoding" not in names
            assert told["body"] == ""
            got = viewer.seen[-1]
            assert dict(got["headers"])["cookie"] == BROWSING["Cookie"]
            assert dict(got["headers"])["referer"] == BROWSING["Referer"]
            assert got["body"] == content.decode()
            asked.seen.clear()


def test_N5_visitors_with_many_cookies_get_through(guarded: Guarded) -> None:
    """With the real broker, in any method, one after the other over kept connections."""
    token = guarded.broker.token()["token"]
    with httpx.Client(headers=BROWSING) as client:
        for method in ("GET", "POST", "GET", "POST"):
            content = b"y" * 77 if method == "POST" else b""
            good = client.request(method, f"{guarded.url}/?token={token}", content=content)
            assert good.status_code == 200, good.text
            bad = client.request(method, f"{guarded.url}/?token=bad", content=content)
            assert bad.status_code == 401, bad.text


INGRESS = """
server {{
    listen 127.0.0.1:{entrance};
    large_client_header_buffers 4 32k;
    location / {{
        auth_request /_auth;
        auth_request_set $session $upstream_http_x_embed_session;
        proxy_set_header X-Embed-Session $session;
        proxy_pass http://127.0.0.1:{viewer};
    }}
    location = /_auth {{
        internal;
        proxy_pass_request_body off;
        proxy_set_header Content-Length "";
        proxy_set_header Cookie "";
        proxy_set_header X-Original-URL $scheme://$http_host$request_uri;
        proxy_set_header X-Original-Method $request_method;
        proxy_set_header X-Forwarded-For $remote_addr;
        proxy_pass http://127.0.0.1:{broker}/v1/embed-tokens/verify;
    }}
}}
"""
"""How ingress-nginx asks: all of the client's headers, and the URL whole, by its `Host`."""

FRAGMENT = "/v?token={}#&token=bad"


def asked_with(url: str, host: str, target: str) -> int:
    """Ask with a Host and a target as they stand, which a client of HTTP would mend."""
    address = urlsplit(url)
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port or 80), timeout=20) as line:
        line.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return int(line.makefile("rb").readline().split()[1])


def test_N6_a_viewer_behind_ingress_nginx(tmp_path: Path) -> None:
    """The token is found in the absolute URL; a client that lends it another one gets nowhere."""
    entrance = free_port()
    with brokers(Broker(tmp_path)) as (broker,), Site() as viewer:
        text = INGRESS.format(entrance=entrance, viewer=viewer.port, broker=broker.port)
        with nginx(text, tmp_path, entrance) as url:
            good = broker.token()
            token = good["token"]
            for method in ("GET", "POST"):
                cookies = {"Cookie": BROWSING["Cookie"]}
                answer = plain.request(method, f"{url}/v?token={token}", headers=cookies)
                assert answer.status_code == 200, answer.text
                told = dict(answer.json()["headers"])
                assert told["x-embed-session"] == good["session_id"]
            assert asked_with(url, "h", f"/v?token={token}") == 200
            viewer.seen.clear()
            for name in ("X-Original-URI", "X-Forwarded-Uri"):
                lent = plain.get(f"{url}/v", headers={name: f"/v?token={token}"})
                assert lent.status_code == 401
            for host in ("h", f"h?token={token}&", f"h?token={token}#", f"h/?token={token}", "u@h"):
                assert 400 <= asked_with(url, host, "/v") < 500, host
            for target in (
                "/v?token=bad&token={}",
                "/v?token={}#",
                FRAGMENT,
                "/v?token={};token=bad",
            ):
                assert asked_with(url, "h", target.format(token)) == 401, target
            assert viewer.seen == []


@pytest.mark.parametrize("target", ["/v?token={}#", FRAGMENT, "/v#?token={}"])
def test_O5_a_fragment_in_a_request_opens_nothing(guarded: Guarded, target: str) -> None:
    """Some viewers would end the query there, others would read on: none is asked with it."""
    host = urlsplit(guarded.url).netloc
    good = guarded.broker.token()["token"]
    assert asked_with(guarded.url, host, f"/v?token={good}") == 200
    before = len(guarded.viewer.seen)
    status = asked_with(guarded.url, host, target.format(good))
    seen = [asked["path"] for asked in guarded.viewer.seen[before:]]
    if seen:  # a proxy may take the sign for a letter of the path, and then writes it as one
        assert seen == [f"/v%23?token={good}"]
    else:
        assert 400 <= status < 500


def expired(broker: Broker) -> str:
    """Sign a token that was good an hour ago."""
    now = int(time.time())
    claims = {"iss": "embed-token-broker", "aud": "embed", "sub": AGENT, "agent_id": AGENT}
    claims |= {"fingerprint": "beef", "sid": "s", "client_id": "web"}
    dates = {"iat": now - 7200, "nbf": now - 7200, "exp": now - 3600}
    return jwt.encode({**claims, **dates}, broker.key, "HS256")


def revoked(broker: Broker) -> str:
    """Have a token made and end its session."""
    token: str = broker.token()["token"]
    answer = plain.post(
        f"{broker.url}/v1/revoke", data={"token": token}, headers={"api-secret": broker.secret}
    )
    assert answer.status_code == 200
    return token


def test_O2_bad_expired_revoked_and_absent_tokens_are_stopped(guarded: Guarded) -> None:
    """401 with the challenge; the viewer is not asked."""
    good = guarded.broker.token()["token"]
    bad = [good[:-5] + "AAAAA", "x", "a" * 5000, expired(guarded.broker)]
    bad.append(revoked(guarded.broker))
    before = len(guarded.viewer.seen)
    for token in bad:
        for answer in (
            plain.get(f"{guarded.url}/?token={token}"),
            plain.get(guarded.url, headers={"Authorization": f"Bearer {token}"}),
            plain.post(guarded.url, headers={"X-Embed-Token": token}, content=b"x" * 100_000),
        ):
            assert answer.status_code == 401, (token, answer.text)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert plain.get(guarded.url).status_code == 401
    assert len(guarded.viewer.seen) == before


@pytest.mark.parametrize("how", ["lower", "title", "twice", "underscores", "one underscore"])
def test_O5_what_a_client_says_of_itself_does_not_get_through(guarded: Guarded, how: str) -> None:
    """Inbound `X-Embed-*` are stripped, whatever their case and number, and however they are spelt.

    A viewer behind WSGI, CGI or FastCGI reads `X_Embed_Session` as `X-Embed-Session`.
    """
    data = guarded.broker.token()
    forged = [(f"x-embed-{name}", "forged") for name in NAMES] * (2 if how == "twice" else 1)
    if how == "title":
        forged = [(name.title(), value) for name, value in forged]
    if how in {"underscores", "one underscore"}:
        number = -1 if how == "underscores" else 1
        forged = [(name.replace("-", "_", number), value) for name, value in forged]
    answer = plain.get(f"{guarded.url}/?token={data['token']}", headers=forged)
    assert answer.status_code == 200
    told = [n for n, _ in answer.json()["headers"] if re.match("x.embed", n)]
    assert sorted(told) == sorted(f"x-embed-{name}" for name in NAMES)
    assert "forged" not in answer.text
    before = len(guarded.viewer.seen)
    assert plain.get(guarded.url, headers=forged).status_code == 401
    assert len(guarded.viewer.seen) == before


@pytest.mark.parametrize(
    "name", ["X-Original-URI", "X-Original-URL", "X-Forwarded-Uri", "X-Embed-Token"]
)
def test_O5_a_good_token_elsewhere_does_not_open_the_door_for_a_bad_one(
    guarded: Guarded, name: str
) -> None:
    """A client that makes up the proxy's headers gains nothing; nor does one with two tokens."""
    good = guarded.broker.token()["token"]
    forged = good if name == "X-Embed-Token" else f"/?token={good}"
    before = len(guarded.viewer.seen)
    bad = plain.get(f"{guarded.url}/?token=bad", headers={name: forged})
    assert bad.status_code == 401
    if name != "X-Embed-Token":
        assert plain.get(guarded.url, headers={name: forged}).status_code == 401
    assert plain.get(f"{guarded.url}/?token={good}&token=bad").status_code == 401
    assert len(guarded.viewer.seen) == before


def test_O5_what_a_client_says_of_its_connection_takes_nothing_away(guarded: Guarded) -> None:
    """Headers that `Connection` names are of one hop (RFC 9110 section 7.6.1): not ours."""
    data = guarded.broker.token()
    names = [f"x-embed-{name}" for name in NAMES]
    for named in (", ".join(names), ", ".join(name.title() for name in names), *names):
        answer = plain.get(f"{guarded.url}/?token={data['token']}", headers={"Connection": named})
        assert answer.status_code == 200
        told = {n for n, _ in answer.json()["headers"] if n.startswith("x-embed-")}
        assert told == set(names), named


@pytest.mark.parametrize("kind", KINDS)
def test_G7_a_viewer_that_is_down_writes_no_token_to_a_log(kind: str, tmp_path: Path) -> None:
    """Proxies quote the request that failed; nor does a broker that is down."""
    with brokers(Broker(tmp_path)) as (broker,):
        good = broker.token()["token"]
        for ports in ({8080: broker.port, 3000: 1}, {8080: 1, 3000: 1}):
            with gateway(kind, "viewer", tmp_path, ports) as url:
                referer = {"Referer": f"{url}/?token={good}", "X-Original-URI": f"/?token={good}"}
                referer["X-Original-URL"] = f"https://viewer.example/?token={good}"
                for headers in ({}, referer, {"X-Embed-Token": good}):
                    answer = plain.get(f"{url}/page?token={good}", headers=headers)
                    assert answer.status_code >= 500
            assert good not in logged(kind, tmp_path)
            assert "/page" in logged(kind, tmp_path), "that it failed is in the log"


def test_G7_tokens_are_in_no_log(guarded: Guarded) -> None:
    """Not in the proxy's, though the URL bears them, nor in the broker's."""
    good, bad = guarded.broker.token()["token"], "bad-token-of-somebody"
    for token in (good, bad):
        plain.get(f"{guarded.url}/page?token={token}")
        plain.get(guarded.url, headers={"X-Embed-Token": token})
    for text in (logged(guarded.kind, guarded.folder), guarded.broker.log):
        assert good not in text
        assert bad not in text


@pytest.mark.parametrize("kind", KINDS)
def test_one_agent_s_viewer_refuses_the_tokens_of_others(kind: str, tmp_path: Path) -> None:
    """403 arrives as such, with the line that ships as a comment."""
    with (
        brokers(Broker(tmp_path)) as (broker,),
        Site() as viewer,
        gateway(
            kind,
            "viewer",
            tmp_path,
            {8080: broker.port, 3000: viewer.port},
            required_agent=True,
        ) as url,
    ):
        mine, other = broker.token()["token"], broker.token(agent="B1")["token"]
        assert plain.get(f"{url}/?token={mine}").status_code == 200
        assert plain.get(f"{url}/?token={other}").status_code == 403
        spoofed = {"X-Embed-Require-Agent": "B1"}
        assert plain.get(f"{url}/?token={other}", headers=spoofed).status_code == 403
        assert len(viewer.seen) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_429_arrives_as_such_and_no_verdict_is_no_entry(kind: str, tmp_path: Path) -> None:
    """With its Retry-After, whoever stands in the broker's place; without a broker it is a 5xx."""
    with Site() as viewer:
        with (
            Site(429, {"Retry-After": "7"}) as busy,
            gateway(kind, "viewer", tmp_path, {8080: busy.port, 3000: viewer.port}) as url,
        ):
            answer = plain.get(f"{url}/?token=x")
            assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")
            assert busy.seen
        with (
            Site(500) as broken,
            gateway(kind, "viewer", tmp_path, {8080: broken.port, 3000: viewer.port}) as url,
        ):
            assert plain.get(f"{url}/?token=x").status_code >= 500
        with gateway(kind, "viewer", tmp_path, {8080: 1, 3000: viewer.port}) as url:
            assert plain.get(f"{url}/?token=x").status_code >= 500
        assert viewer.seen == []


@asynccontextmanager
async def talking_viewer() -> AsyncIterator[int]:
    """Run a viewer that says over a WebSocket whose it is, and then what it hears; its port."""

    async def talk(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(request.headers.get("X-Embed-Session", ""))
        async for message in socket:
            await socket.send_str(message.data)
        return socket

    app = web.Application()
    app.router.add_get("/talk", talk)
    async with TestServer(app) as server:
        assert server.port is not None
        yield server.port


@pytest.mark.parametrize("kind", KINDS)
async def test_a_websocket_with_a_good_token_gets_through(kind: str, tmp_path: Path) -> None:
    """Both ways, to a viewer that is told whose it is; with a bad token it is 401."""
    with brokers(Broker(tmp_path)) as (broker,):
        data = broker.token()
        async with talking_viewer() as port, aiohttp.ClientSession() as session:
            with gateway(kind, "viewer", tmp_path, {8080: broker.port, 3000: port}) as url:
                async with session.ws_connect(f"{url}/talk?token={data['token']}") as socket:
                    assert await socket.receive_str(timeout=9) == data["session_id"]
                    for said in ("hello", "x" * 100_000):
                        await socket.send_str(said)
                        assert await socket.receive_str(timeout=9) == said
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await session.ws_connect(f"{url}/talk?token=bad")
                assert refused.value.status == 401


def test_O5_no_other_protocol_is_switched_to(guarded: Guarded) -> None:
    """A tunnel of HTTP/2 in clear text would take requests past the proxy's rules."""
    token = guarded.broker.token()["token"]
    asking = {
        "Connection": "Upgrade, HTTP2-Settings",
        "Upgrade": "h2c",
        "HTTP2-Settings": "AAMAAABk",
    }
    plain.get(f"{guarded.url}/h2c?token={token}", headers=asking)
    seen = [
        name
        for asked in guarded.viewer.seen
        if "/h2c" in asked["path"]
        for name, _ in asked["headers"]
    ]
    assert "upgrade" not in seen
