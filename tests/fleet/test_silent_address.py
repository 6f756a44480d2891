"""A store's name with several addresses of which some are of no use: row N16, real processes.

Each broker has a private /etc/hosts, which takes root.  uvloop's own way to connect would try one
address after the other, the first for two minutes.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from processes import merged
from replicas import Replica, start, tree_for, until
from servers import StoreServer, redis_binary, store_server

pytestmark = pytest.mark.parts

USELESS, GOOD = "127.0.0.2", "127.0.0.3"
"""In the order in which the name has them."""


@pytest.fixture
def server() -> Iterator[StoreServer]:
    """A store at the second address (and where the test itself asks it)."""
    with store_server(redis_binary(), "--bind", "127.0.0.1", GOOD, tcp=True) as server:
        yield server


def port_of(server: StoreServer) -> int:
    """Return its port."""
    return server.address.hosts[0][1]


@contextmanager
def swallows_packets(server: StoreServer) -> Iterator[None]:
    """The first address answers no packet, as behind a firewall that drops them."""
    with ExitStack() as stack:
        silent = stack.enter_context(socket.socket())
        silent.bind((USELESS, port_of(server)))
        silent.listen(0)
        for _ in range(4):  # fills its queue
            full = stack.enter_context(socket.socket())
            full.setblocking(False)
            with suppress(BlockingIOError):
                full.connect((USELESS, port_of(server)))
        yield


@contextmanager
def accepts_and_is_silent(server: StoreServer) -> Iterator[None]:
    """The first address is that of a process that hangs: the system takes the connection."""
    with socket.socket() as hung:
        hung.bind((USELESS, port_of(server)))
        hung.listen(128)
        yield


@contextmanager
def is_a_replica(server: StoreServer) -> Iterator[StoreServer]:
    """The first address is that of a replica: it takes no writes, but hears what is published."""
    port = str(port_of(server))
    options = ["--bind", USELESS, "--port", port, "--replicaof", "127.0.0.1", port]
    with store_server(redis_binary(), *options) as replica:
        yield replica


@contextmanager
def refuses(server: StoreServer) -> Iterator[None]:
    """Nobody listens at the first address."""
    yield


def with_name(folder: Path) -> list[str]:
    """Return what runs a command with both addresses under one name."""
    assert os.geteuid() == 0, "a private /etc/hosts needs root: run this test as root"
    hosts = folder / "hosts"
    text = f"127.0.0.1 localhost\n{USELESS} store.test\n{GOOD} store.test\n"
    hosts.write_text(text, encoding="utf-8")
    mount = 'mount --make-rprivate / && mount --bind "$0" /etc/hosts && exec "$@"'
    return ["unshare", "-m", "sh", "-c", mount, str(hosts)]


@pytest.mark.parametrize(
    "first",
    [swallows_packets, accepts_and_is_silent, is_a_replica, refuses],
    ids=lambda first: first.__name__,
)
async def test_N16_the_second_address_is_found(
    server: StoreServer, tmp_path: Path, first: object
) -> None:
    """For calls and for the subscription, within seconds, also after a loss of both connections.

    The tokens are on the server, and nobody has to wait for the first address.
    """
    assert callable(first)
    tree = merged(
        tree_for(tmp_path, server), {"store.url": f"valkey://store.test:{port_of(server)}"}
    )
    with first(server) as other:
        servers = [server, other] if other else [server]
        replica = await start(tmp_path, tree, with_name(tmp_path))
        try:
            await connected(replica, servers)
            assert (await replica.request_token()).status == 200
            assert any(b":token:" in key for key in server.all_keys())
            for each in servers:
                each.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                each.command("CLIENT", "KILL", "TYPE", "pubsub")
            await connected(replica, servers)
        finally:
            await replica.close()


async def connected(replica: Replica, servers: list[StoreServer]) -> None:
    """Wait until it works with the store and hears it."""

    async def is_well() -> bool:
        heard = [
            name for each in servers for name in each.command("PUBSUB", "CHANNELS", "etb:wake:*")
        ]
        return len(heard) == 1 and not await replica.is_degraded()

    await until(is_well, "the store's second address")
