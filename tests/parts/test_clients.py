"""Real clients against a real broker: what the pages promise, as users will do it."""

import json
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from running import Broker, broker, output_of

pytestmark = pytest.mark.parts

AGENT = "A78WKV4515"

SERVER_SIDE = """
const [url, secret, fingerprint, options] = process.argv.slice(-4);
const response = await fetch(`${url}/v1/embed-tokens/request`, {
  method: "POST",
  headers: { "Content-Type": "application/json", "api-secret": secret },
  body: JSON.stringify({ agent_id: "A78WKV4515", fingerprint }),
  ...JSON.parse(options),
});
const answer = await response.json();
console.log(JSON.stringify({ cache: response.headers.get("cache-status"), answer }));
"""
"""The vendor's documented call from a backend, pointed at the broker."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One broker for all clients, as the README starts it but for the ports."""
    with broker(tmp_path_factory.mktemp("broker")) as started:
        yield started


@pytest.fixture
def visitor() -> str:
    """Return the fingerprint of somebody new."""
    return secrets.token_hex(16)


def require_token(answer: dict[str, Any], visitor: str) -> dict[str, Any]:
    """Check the whole answer against its visitor; returns its data."""
    data: dict[str, Any] = answer["data"]
    claims = jwt.decode(data["token"], options={"verify_signature": False})
    assert answer == {
        "success": True,
        "status": "success",
        "status_code": 200,
        "data": {
            "token": data["token"],
            "session_id": claims["sid"],
            "sid": claims["sid"],
            "expires_at": claims["exp"],
        },
    }
    assert (claims["sub"], claims["agent_id"], claims["fingerprint"]) == (AGENT, AGENT, visitor)
    return data


def test_the_printed_curl_line_gets_a_token_and_again_the_same(tmp_path: Path) -> None:
    """The printed line works in a shell as it is; run again it is a hit, `fresh` is a new one."""
    with broker(tmp_path) as started:
        line = started.curl_line
        first = json.loads(output_of(["bash", "-c", line]))
        head, _, again = output_of(["bash", "-c", f"{line} -i"]).partition("\n\n")
        fresh = json.loads(
            output_of(["bash", "-c", line.replace('"}', '", "fresh": true}')]),
        )
    data = require_token(first, "9f86d081884c7d65")
    assert "Cache-Status: embed-token-broker; hit" in head.splitlines()
    assert json.loads(again) == first
    newer = require_token(fresh, "9f86d081884c7d65")
    assert newer["token"] != data["token"]
    assert newer["session_id"] != data["session_id"]


def test_a_fresh_token_is_the_one_reused_from_then_on(running: Broker, visitor: str) -> None:
    """`fresh` replaces what is held: miss, hit, miss, hit on the new one."""
    body: dict[str, object] = {"agent_id": AGENT, "fingerprint": visitor}
    answers = [running.request(body | more) for more in ({}, {}, {"fresh": True}, {})]
    assert [answer.headers["Cache-Status"] for answer in answers] == [
        "embed-token-broker; fwd=miss",
        "embed-token-broker; hit",
        "embed-token-broker; fwd=miss",
        "embed-token-broker; hit",
    ]
    tokens = [require_token(answer.json(), visitor)["token"] for answer in answers]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3]


def test_a_request_s_cache_control_does_not_defeat_reuse(running: Broker, visitor: str) -> None:
    """Clients send `no-cache` on their own; it would drain the budget if it were obeyed."""
    body = {"agent_id": AGENT, "fingerprint": visitor}
    first = running.request(body)
    again = running.request(body, {"Cache-Control": "no-cache", "Pragma": "no-cache"})
    assert again.headers["Cache-Status"] == "embed-token-broker; hit"
    assert again.content == first.content


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/x-www-form-urlencoded", "text/plain", ""],
)
def test_curl_gets_a_token_whatever_content_type_it_sends(
    running: Broker, visitor: str, content_type: str
) -> None:
    """Plain `curl -d` says form data, `-H 'content-type:'` says nothing; the body counts."""
    body = json.dumps({"agent_id": AGENT, "fingerprint": visitor})
    command = ["curl", "-sS", running.token_url, "-H", f"api-secret: {running.secret}"]
    command += ["-H", f"Content-Type:{content_type and ' ' + content_type}", "-d", "@-"]
    require_token(json.loads(output_of(command, body)), visitor)


@pytest.mark.parametrize("options", [{}, {"cache": "no-store"}, {"cache": "no-cache"}])
def test_node_s_fetch_gets_a_token_and_reuses_it(
    running: Broker, visitor: str, options: dict[str, str]
) -> None:
    """The vendor's server-side JavaScript works unchanged and reuses, in any cache mode.

    Node adds `Sec-Fetch-Mode: cors` and `Cache-Control: no-cache` on its own.
    """
    command = ["node", "--input-type=module", "-", running.url, running.secret, visitor]
    seen = [json.loads(output_of([*command, json.dumps(options)], SERVER_SIDE)) for _ in range(2)]
    first, again = (require_token(call["answer"], visitor) for call in seen)
    assert again == first
    assert [call["cache"] for call in seen] == [
        "embed-token-broker; fwd=miss",
        "embed-token-broker; hit",
    ]


async def test_httpx_gets_a_token_over_one_connection(running: Broker, visitor: str) -> None:
    """Python's httpx, asynchronous, keep-alive, with the secret as a bearer token."""
    async with httpx.AsyncClient(base_url=running.url) as client:
        for _ in range(3):
            response = await client.post(
                "/v1/embed-tokens/request",
                json={"agent_id": AGENT, "fingerprint": visitor},
                headers={"Authorization": f"Bearer {running.secret}"},
            )
            require_token(response.json(), visitor)
            assert "connection" not in response.headers


@pytest.mark.parametrize("keep_alive", [False, True])
def test_an_http_1_0_client_gets_a_token(running: Broker, visitor: str, keep_alive: bool) -> None:
    """A client of the old protocol: no Host, no chunks; the connection closes unless asked."""
    body = json.dumps({"agent_id": AGENT, "fingerprint": visitor})
    host, _, port = running.url.removeprefix("http://").rpartition(":")
    lines = ["POST /v1/embed-tokens/request HTTP/1.0", f"api-secret: {running.secret}"]
    lines += [f"Content-Length: {len(body)}", *(["Connection: keep-alive"] * keep_alive), "", body]
    with socket.create_connection((host, int(port)), timeout=10) as peer:
        asked = 2 if keep_alive else 1
        for _ in range(asked):
            peer.sendall("\r\n".join(lines).encode())
            head, content = read_answer(peer)
            assert head[0] == "HTTP/1.1 200 OK"
            assert f"Connection: {'keep-alive' if keep_alive else 'close'}" in head
            assert not any(line.startswith("Transfer-Encoding") for line in head)
            require_token(json.loads(content), visitor)
        if not keep_alive:
            assert peer.recv(1) == b""


def read_answer(peer: socket.socket) -> tuple[list[str], bytes]:
    """Read one answer by its Content-Length."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += peer.recv(65536)
    head, _, content = received.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    length = next(int(line[16:]) for line in lines if line.startswith("Content-Length: "))
    while len(content) < length:
        content += peer.recv(65536)
    return lines, content
