"""A real nginx that announces its clients' bodies to the broker and does not send them: row N3."""

import os
import secrets
import socket
from collections.abc import Iterator
from typing import NamedTuple

import plain
import pytest
from gateways import NGINX_MAIN, Broker, Site, brokers
from running import daemon, free_port

pytestmark = pytest.mark.parts

CONFIGURATION = """
upstream broker {{ server 127.0.0.1:{broker}; keepalive 4; }}
server {{
    listen 127.0.0.1:{entrance};
    location / {{ auth_request /check; proxy_pass http://127.0.0.1:{viewer}; }}
    location = /check {{
        internal;
        proxy_pass_request_body off;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header X-Original-URI $request_uri;
        proxy_pass http://broker/v1/embed-tokens/verify;
    }}
}}
"""
"""As many have it: without the line `proxy_set_header Content-Length ""`, and with connections
to the broker that are kept, on which the next check follows the announced body."""


class Guarded(NamedTuple):
    """A viewer behind nginx: where clients come in, and who saw what."""

    port: int
    broker: Broker
    viewer: Site

    def url(self, path: str) -> str:
        """Return an address at the entrance."""
        return f"http://127.0.0.1:{self.port}{path}"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """One of everything, for all tests."""
    folder = tmp_path_factory.mktemp("nginx")
    with brokers(Broker(folder)) as (broker,), Site() as viewer:
        entrance = free_port()
        site, main = folder / "site.conf", folder / "nginx.conf"
        ports = {"broker": broker.port, "viewer": viewer.port, "entrance": entrance}
        _ = site.write_text(CONFIGURATION.format(**ports), encoding="utf-8")
        user = "user root;" if os.geteuid() == 0 else ""
        _ = main.write_text(NGINX_MAIN.format(folder=folder, site=site, user=user), "utf-8")
        command = ["/usr/sbin/nginx", "-c", str(main), "-p", str(folder)]
        url = f"http://127.0.0.1:{entrance}/"
        with daemon(command, folder / "nginx.log", url, any_status=True):
            yield Guarded(entrance, broker, viewer)


def test_N3_every_request_of_a_good_visitor_passes(guarded: Guarded) -> None:
    """With bodies of all sizes, one after the other, and those of strangers between them."""
    token = guarded.broker.token()["token"]
    for n in range(30):
        body = secrets.token_hex(n * 37).encode()
        good = plain.post(guarded.url(f"/x?token={token}"), content=body)
        assert good.status_code == 200, n
        assert plain.post(guarded.url("/secret"), content=body).status_code == 401
        assert plain.get(guarded.url("/secret")).status_code == 401


@pytest.mark.parametrize("reach", range(0, 400, 40))
def test_N3_nobody_passes_by_what_another_one_had_announced(guarded: Guarded, reach: int) -> None:
    """A holder of a token announces a body; the check of the next one begins inside of it.

    Whatever part of the next check it swallows, what is left must not pass as a request.
    """
    token = guarded.broker.token()["token"]
    head_start = (
        "GET /v1/embed-tokens/verify HTTP/1.1\r\nX-Original-URI: /secret\r\nHost: broker\r\nX: "
    )
    for length in (len(head_start) + reach, max(len(head_start) - reach, 1)):
        holder = plain.post(guarded.url(f"/x?token={token}"), content=b"y" * length)
        assert holder.status_code == 200
        seen = len(guarded.viewer.seen)
        with socket.create_connection(("127.0.0.1", guarded.port)) as stranger:
            stranger.sendall(
                b"GET /secret HTTP/1.1\r\nHost: v\r\nConnection: close\r\n"
                b"X: GET /livez HTTP/1.0\r\nY: z\r\n\r\n"
            )
            stranger.settimeout(60)
            answer = b"".join(iter(lambda: stranger.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert len(guarded.viewer.seen) == seen
