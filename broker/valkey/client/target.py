"""How a node is reached, and how it lets us in; in what order the addresses of a name are tried."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Any, TypeVar

import aiohappyeyeballs
from msgspec import Struct

from broker.model import Secret
from broker.valkey.client.scripts import command

CONNECT_TIMEOUT = 3.0
"""Seconds to connect, TLS and authentication included."""

NEXT_ADDRESS = 0.25
"""Seconds after which the next address of a name is tried beside those that are silent still: RFC
8305 section 5 recommends them."""

_Spoken = TypeVar("_Spoken", bound=asyncio.BaseProtocol)


class Route:
    """To which address of a name the last connection led, and which one to try last from now on.

    An address may accept and never answer, or be a replica's: a name that has a better one leads
    there with the next connection.
    """

    def __init__(self) -> None:
        self._last: Any = None
        self._avoided: Any = None

    def follow(self, address: Any) -> None:  # noqa: ANN401 - a pair, or four of IPv6
        """Take note of where a connection leads."""
        self._last = address

    def avoid(self) -> None:
        """Try the last address last: it was of no use."""
        self._avoided = self._last

    def order(self, addresses: list[Any]) -> list[Any]:
        """Return what a name resolved to, in the order of trying."""
        return sorted(addresses, key=lambda info: info[4] == self._avoided)


class Target(Struct, frozen=True):
    """A node, and how it lets us in; `path` is a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""
    tls: ssl.SSLContext | None = None
    username: str = ""
    password: Secret | None = None
    db: int = 0

    async def connect(self, make: Callable[[], _Spoken], route: Route) -> _Spoken:
        """Open a connection; raises OSError.

        The addresses of a name are raced (RFC 8305).  uvloop's `create_connection` tries one after
        the other, each for as long as the system does.
        """
        loop = asyncio.get_running_loop()
        if self.path:
            _, protocol = await loop.create_unix_connection(make, self.path)
            return protocol
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        reached = await aiohappyeyeballs.start_connection(
            route.order(found), happy_eyeballs_delay=NEXT_ADDRESS, interleave=1, loop=loop
        )
        try:
            route.follow(reached.getpeername())
            reached.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            name = self.host if self.tls is not None else None
            _, protocol = await loop.create_connection(
                make, sock=reached, ssl=self.tls, server_hostname=name
            )
        except BaseException:
            with contextlib.suppress(OSError):
                reached.close()
            raise
        return protocol

    def greeting(self) -> list[bytes]:
        """Return the commands that come first."""
        commands = []
        if self.password is not None:
            user = [self.username.encode()] if self.username else []
            commands.append(command(b"AUTH", *user, self.password.reveal().encode()))
        if self.db:
            commands.append(command(b"SELECT", b"%d" % self.db))
        return commands
