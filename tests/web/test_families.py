"""Row N7: IPv4 and IPv6, both or one of them, on real sockets in network namespaces."""

import asyncio
import errno
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from processes import TIMEOUT, Broker, Tree, environment, good, merged, run, toml, write

from broker.config.validate import parse_address
from broker.web.listener import CannotListen, Listener, listen

SWITCH = {
    "both": "true",
    "no IPv6": "sysctl -q -w net.ipv6.conf.all.disable_ipv6=1",
    "no IPv4": "ip addr del 127.0.0.1/8 dev lo",
}
"""How a family is switched off in a namespace."""

V4, V6 = "127.0.0.1", "::1"
CONFIG = Path(__file__).parents[2] / "config"
THERE = {"both": [V4, V6], "no IPv6": [V4], "no IPv4": [V6]}

HOSTS = "127.0.0.1 localhost\n::1 localhost\n::1 v6.test\n"
"""What a distribution ships, and a name of IPv6 alone."""

PROGRAM = """
import http.client, json, sys
answers = {}
for host in ("127.0.0.1", "::1"):
    for port, path in ((8080, "/livez"), (9464, "/readyz")):
        line = http.client.HTTPConnection(host, port, timeout=20)
        try:
            line.request("GET", path)
            answers.setdefault(host, []).append(line.getresponse().status)
        except OSError:
            answers.setdefault(host, []).append(0)
        finally:
            line.close()
print(json.dumps(answers))
"""
"""Asks both listeners over both families, inside the namespace."""


class Namespace(NamedTuple):
    """A network of its own, with loopback only; `families` says what is on."""

    families: str
    folder: Path

    @property
    def prefix(self) -> Sequence[str]:
        """The command that runs another one in it."""
        assert os.geteuid() == 0, "network namespaces need root: run this test as root"
        hosts = self.folder / "hosts"
        hosts.write_text(HOSTS, encoding="utf-8")
        steps = (
            'PATH="$PATH:/usr/sbin:/sbin"',
            f'mount --bind "{hosts}" /etc/hosts',
            "ip link set lo up",
            SWITCH[self.families],
            'exec "$@"',
        )
        return ("unshare", "--net", "--mount", "sh", "-ec", "\n".join(steps), "sh")


def inside(broker: Broker, *command: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command where a broker runs."""
    entered = ("nsenter", "--net", "--mount", "--target", str(broker.process.pid), *command)
    return subprocess.run(
        entered, capture_output=True, timeout=TIMEOUT, check=False, env=environment()
    )


def reached(broker: Broker) -> list[str]:
    """Return the addresses at which both listeners answer; neither may answer alone."""
    told = inside(broker, sys.executable, "-c", PROGRAM)
    answers = json.loads(told.stdout)
    assert all(statuses in ([200, 200], [0, 0]) for statuses in answers.values()), answers
    return [host for host, statuses in answers.items() if statuses == [200, 200]]


def on(folder: Path, host: str) -> Tree:
    """Return a configuration whose listeners are both on this host."""
    return merged(good(folder), {"server.listen": f"{host}:8080", "admin.listen": f"{host}:9464"})


@pytest.mark.parts
@pytest.mark.parametrize("families", SWITCH)
@pytest.mark.parametrize("host", ["[::]", "localhost"])
def test_N7_one_value_serves_the_families_that_there_are(
    tmp_path: Path, host: str, families: str
) -> None:
    """Both listeners, at the same ports; health is asked for there, and found."""
    prefix = Namespace(families, tmp_path).prefix
    with Broker.configured(tmp_path, on(tmp_path, host), prefix=prefix) as broker:
        assert reached(broker) == THERE[families]
        printed = "0.0.0.0" if (host, families) == ("[::]", "no IPv6") else host
        assert (broker.url, broker.admin_url) == (
            f"http://{printed}:8080",
            f"http://{printed}:9464",
        )
        asked = inside(
            broker, sys.executable, "-m", "broker", "healthcheck", "--admin-listen", f"{host}:9464"
        )
        assert (asked.returncode, asked.stderr) == (0, b"")
        assert broker.end(signal.SIGTERM) == 0


class Workers(Broker):
    """A running broker with two workers."""

    program = (str(Path(__file__).parents[1] / "memory_workers.py"), "2")


@pytest.mark.parts
@pytest.mark.parametrize("families", SWITCH)
@pytest.mark.parametrize("host", ["[::]", "localhost"])
def test_N7_workers_serve_whatever_their_supervisor_bound(
    tmp_path: Path, host: str, families: str
) -> None:
    """One socket or two, and either family."""
    path = write(tmp_path / "broker.toml", toml(on(tmp_path, host)))
    prefix = Namespace(families, tmp_path).prefix
    with Workers(path, logs=tmp_path, prefix=prefix) as broker:
        for _ in range(4):
            assert reached(broker) == THERE[families]
        assert broker.end(signal.SIGTERM) == 0


@pytest.mark.parts
@pytest.mark.parametrize(
    ("host", "families"),
    [("127.0.0.1", "no IPv4"), ("[::1]", "no IPv6"), ("192.0.2.1", "both"), ("v6.test", "no IPv6")],
)
def test_N7_an_address_that_is_not_there_is_said(tmp_path: Path, host: str, families: str) -> None:
    """Whoever names one address means it: nothing else is listened on instead."""
    path = write(tmp_path / "broker.toml", toml(on(tmp_path, host)))
    command = (sys.executable, "-m", "broker", "serve", "--config", path)
    done = subprocess.run(
        [*Namespace(families, tmp_path).prefix, *command],
        capture_output=True,
        env=environment(),
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 69
    told = f"admin.listen: cannot listen on {host}:9464: this machine has no such address"
    assert told in done.stderr.decode()


async def opened(address: str) -> tuple[Listener, str]:
    """Listen with a protocol that says nothing."""
    return await listen(asyncio.Protocol, address, "server.listen", 16)


def resolving(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Let a name have these addresses, whatever this machine's own files say."""
    loop = asyncio.get_running_loop()

    async def resolve(_host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        found = [socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) for host in hosts]
        return [entry for entries in found for entry in entries]

    monkeypatch.setattr(loop, "getaddrinfo", resolve)


async def connects(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def test_N7_a_chosen_port_is_the_same_for_every_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The URL has one port, and names both."""
    resolving(monkeypatch, "127.0.0.1", "127.0.0.2", "127.0.0.1", "192.0.2.1")
    server, url = await opened("both.test:0")
    async with server:
        port = int(url.removeprefix("http://both.test:"))
        assert [sock.getsockname() for sock in server.sockets] == [
            ("127.0.0.1", port),
            ("127.0.0.2", port),
        ]
        assert await connects("127.0.0.2", port)
    assert not await connects("127.0.0.1", port)
    assert not await connects("127.0.0.2", port)


async def test_N7_an_address_in_use_leaves_none_of_the_others_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of a name would be two brokers that answer to it in turn."""
    resolving(monkeypatch, "127.0.0.1", "127.0.0.2")
    with socket.create_server(("127.0.0.2", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(CannotListen, match="in use"):
            await opened(f"both.test:{port}")
        assert not await connects("127.0.0.1", port)


async def test_N7_every_address_without_any_ipv6_is_that_of_ipv4(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that was built or started without IPv6 knows no such sockets."""
    real = socket.socket

    class Without(real):  # type: ignore[misc, valid-type]  # the class of this machine's sockets
        def __init__(self, family: int = -1, *rest: Any, **more: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
            super().__init__(family, *rest, **more)

    monkeypatch.setattr(socket, "socket", Without)
    server, url = await opened("[::]:0")
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert url == f"http://0.0.0.0:{port}"
        assert await connects("127.0.0.1", port)


async def test_N7_every_address_in_use_is_said() -> None:
    """Also where only IPv4 is taken: there is no falling back to half of them."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"[::]:{other.getsockname()[1]}"
        with pytest.raises(CannotListen, match="in use; stop the other process"):
            await opened(address)


async def test_N7_an_ipv4_peer_of_a_socket_for_both_is_an_ipv4_peer(tmp_path: Path) -> None:
    """Its address counts as trusted, and is throttled, as over a socket of IPv4 alone."""
    tree = merged(
        good(tmp_path),
        {"server.listen": "[::]:0", "server.trusted_proxies": ["127.0.0.1"]},
    )
    with Broker.configured(tmp_path, tree) as broker:
        port = int(broker.url.rpartition(":")[2])

        def status(forwarded: str) -> int:
            line = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
            headers = {"api-secret": secrets.token_urlsafe(24), "X-Forwarded-For": forwarded}
            line.request("POST", "/v1/embed-tokens/request", b"{}", headers)
            answer = line.getresponse().status
            line.close()
            return answer

        told = [status("203.0.113.5") for _ in range(40)]
        assert set(told) == {401, 429}
        assert status("203.0.113.6") == 401


@pytest.mark.parametrize("host", ["[::]", "0.0.0.0"])
def test_N7_every_address_is_not_loopback(tmp_path: Path, host: str) -> None:
    """A relay without clients is for this machine only."""
    key = secrets.token_urlsafe(24)
    done = run(
        "check",
        BROKER_SERVER__LISTEN=f"{host}:8080",
        BROKER_ISSUER__KIND="upstream",
        BITHUMAN_API_SECRET=key,
    )
    assert done.returncode != 0
    assert b"clients: required when server.listen is not on loopback" in done.stderr


def test_N7_an_asterisk_is_answered_with_what_to_write() -> None:
    """Other servers write it for every address."""
    with pytest.raises(ValueError, match=r'write "\[::\]:8080"'):
        parse_address("*:8080")


def test_N7_the_shipped_files_serve_both_families() -> None:
    """Containers and pods may have either: none of the files is for IPv4 alone."""
    texts = {
        file.relative_to(CONFIG).as_posix(): file.read_text(encoding="utf-8")
        for file in CONFIG.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    assert [name for name, text in texts.items() if "0.0.0.0:" in text] == []
    reached = [*CONFIG.glob("container/*.toml"), *CONFIG.glob("kubernetes/*.yaml")]
    assert len(reached) == 5
    for name in (file.relative_to(CONFIG).as_posix() for file in reached):
        assert '"[::]:' in texts[name]
