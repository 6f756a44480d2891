"""Brokers behind real gateways: the shipped files of nginx, Envoy and Caddy."""

import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import plain
import pytest
from gateways import AGENT, KINDS, Broker, brokers, gateway

pytestmark = pytest.mark.parts

ROLLING = Path(__file__).parents[1] / "load" / "rolling"


class Behind(NamedTuple):
    """A gateway and the one broker behind it, which stands at both of its places."""

    url: str
    broker: Broker

    def request_token(self, fingerprint: str, **headers: str) -> httpx.Response:
        """Ask for a token over a connection of its own."""
        return plain.post(
            f"{self.url}/v1/embed-tokens/request",
            json={"agent_id": AGENT, "fingerprint": fingerprint},
            headers={"api-secret": self.broker.secret, **headers},
        )


@pytest.fixture(params=KINDS, scope="module")
def behind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Behind]:
    """One of each kind, for all tests."""
    folder = tmp_path_factory.mktemp(request.param)
    tight = {"limits.fingerprint.rate": 1, "limits.fingerprint.burst": 3, "log.level": "debug"}
    with (
        brokers(Broker(folder, tight)) as (broker,),
        gateway(request.param, "gateway", folder, {8080: broker.port, 8090: broker.port}) as url,
    ):
        yield Behind(url, broker)


def test_answers_arrive_as_they_are(behind: Behind) -> None:
    """Tokens, refusals of the broker's own with all their headers, a body that is too large."""
    visitor = secrets.token_hex(16)
    first, second = behind.request_token(visitor), behind.request_token(visitor)
    assert first.json() == second.json()
    assert second.headers["Cache-Status"] == "embed-token-broker; hit"
    behind.request_token(visitor)
    refused = behind.request_token(visitor)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "RATE_LIMITED")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.headers["X-RateLimit-Remaining"] == "0"
    wrong = behind.request_token(visitor, **{"api-secret": "wrong"})
    assert (wrong.status_code, wrong.headers["WWW-Authenticate"]) == (401, "Bearer")
    large = behind.request_token("a" * 20_000)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")
    named = behind.request_token(secrets.token_hex(16), **{"X-Request-Id": "my-request-1"})
    assert named.headers["X-Request-Id"] == "my-request-1"


def test_nothing_but_the_api_is_reached(behind: Behind) -> None:
    """No metrics, no probes but readiness, nothing by a detour."""
    assert plain.get(f"{behind.url}/readyz").status_code == 200
    for path in ("/metrics", "/", "/v1/../metrics", "/v1/sessions", "/livez"):
        assert plain.get(f"{behind.url}{path}").status_code == 404, path


def test_O5_failures_are_throttled_by_the_real_address(behind: Behind) -> None:
    """Whatever a client claims in X-Forwarded-For, it is one address that fails."""
    statuses = set()
    for number in range(40):
        forged = {"X-Forwarded-For": f"203.0.113.{number}", "api-secret": "wrong"}
        statuses.add(behind.request_token("beefbeef", **forged).status_code)
    assert statuses == {401, 429}
    assert behind.request_token(secrets.token_hex(16)).status_code == 200
    elsewhere = {"X-Forwarded-For": "203.0.113.99", "api-secret": "wrong"}
    direct = plain.post(f"{behind.broker.url}/v1/validate", headers=elsewhere)
    assert direct.status_code == 200, "another address, told by the trusted peer, is not throttled"


def test_connections_to_the_broker_are_kept(behind: Behind) -> None:
    """100 requests over 100 connections of clients take a handful of the gateway's."""
    before = connections_made(behind.broker.port)
    for _ in range(100):
        assert behind.request_token(secrets.token_hex(16)).status_code == 200
    assert connections_made(behind.broker.port) - before <= 8


def connections_made(port: int) -> int:
    """Count the connections to a port that exist or have just been closed."""
    table = Path("/proc/net/tcp").read_text(encoding="ascii")
    return len(re.findall(rf" 0100007F:[0-9A-F]{{4}} 0100007F:{port:04X} ", table))


def test_O6_a_rolling_restart_under_load_fails_no_request() -> None:
    """Two brokers, ended and started in turn behind each gateway; k6 sees answers only."""
    command = [sys.executable, str(ROLLING), "--rate", "60", "--duration", "20", "--gateway"]
    running = {
        kind: subprocess.Popen([*command, kind], stdout=subprocess.PIPE, text=True)
        for kind in KINDS
    }
    for kind, process in running.items():
        told, _ = process.communicate(timeout=120)
        assert process.returncode == 0, told
        restarts = re.search(rf"{kind}: (\d+) restarts, k6: (\d+) requests", told)
        assert restarts is not None
        assert int(restarts[1]) >= 2
        assert int(restarts[2]) >= 300  # of 840, where the machine is busy
        assert "5xx or none 0, 429 0" in told
