"""Opening listeners: TCP or a Unix socket, with an error that an operator can act on.

`[::]` is every address of this machine, of IPv6 and of IPv4, over one socket that takes both; where
there is no IPv6 it is 0.0.0.0.  Of a name with several addresses, as `localhost` has, those are
taken that the machine has: one family may be off.
"""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from broker.config.validate import parse_address

SOCKET_MODE = 0o660
"""Who may connect to a Unix socket: owner and group.  The secret is still required."""

_EVERYWHERE, _EVERYWHERE_V4 = "::", "0.0.0.0"  # noqa: S104 - only if an operator says so

_ABSENT = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
"""What the system says of an address that it has not, or of a family that is off."""

_EVERY_PORT_TRIES = 8
"""A port that was chosen for one family may be taken in the other one."""


class CannotListen(Exception):
    """An address that cannot be listened on; exit code 69 (EX_UNAVAILABLE).

    `is_in_use`: because somebody else listens there.
    """

    def __init__(self, setting: str, address: str, error: OSError) -> None:
        super().__init__(_reason(setting, address, error))
        self.is_in_use = error.errno == errno.EADDRINUSE


class Listener:
    """The servers of one setting: a name may have two addresses."""

    def __init__(self, servers: Sequence[asyncio.Server]) -> None:
        self._servers = servers
        self.sockets = [socket for server in servers for socket in server.sockets]

    def close(self) -> None:
        """Take no more connections."""
        for server in self._servers:
            server.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


async def listen(
    factory: Callable[[], asyncio.Protocol],
    address: str,
    setting: str,
    backlog: int,
    *,
    serve: bool = True,
) -> tuple[Listener, str]:
    """Listen on `address`; returns the server and the URL under which it answers.

    `setting` names the key that holds the address, for the error.  Without `serve` the address is
    taken and nobody is let in: for workers that are given the sockets.  Raises CannotListen.
    """
    loop = asyncio.get_running_loop()
    where = parse_address(address)
    try:
        if isinstance(where, str):
            _require_free(Path(where))
            server = await loop.create_unix_server(
                factory, where, backlog=backlog, start_serving=serve
            )
            Path(where).chmod(SOCKET_MODE)  # noqa: ASYNC240 - once, at the start
            return Listener([server]), f"unix:{where}"
        host, sockets = await _bind(*where)
        servers = []
        try:
            for sock in sockets:
                server = await loop.create_server(
                    factory, sock=sock, backlog=backlog, start_serving=serve
                )
                servers.append(server)
        except OSError:
            Listener(servers).close()
            for sock in sockets:
                sock.close()
            raise
    except OSError as error:
        raise CannotListen(setting, address, error) from None
    port = sockets[0].getsockname()[1]
    return Listener(servers), f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def require_free(address: str, setting: str) -> None:
    """Raise CannotListen where `listen` would; takes the address for no longer than a look."""
    where = parse_address(address)
    try:
        if isinstance(where, str):
            path = Path(where)
            _require_free(path)
            _ = path.parent.stat()
            if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        _, sockets = await _bind(*where)
    except OSError as error:
        raise CannotListen(setting, address, error) from None
    for sock in sockets:
        sock.close()


async def _bind(host: str, port: int) -> tuple[str, list[socket.socket]]:
    """Bind every address of a host that this machine has; returns the host to print, too."""
    if host == _EVERYWHERE:
        try:
            return _printed(), [_bound(socket.AF_INET6, (host, port), every_family=True)]
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
        host = _EVERYWHERE_V4
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    places = list(dict.fromkeys((family, place) for family, _, _, _, place in found))
    for tries_left in reversed(range(_EVERY_PORT_TRIES if port == 0 else 1)):
        try:
            return host, _bind_those_here(places)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not tries_left:
                raise
    raise AssertionError("the last try returns or raises")


def _bind_those_here(places: Sequence[tuple[int, tuple[object, ...]]]) -> list[socket.socket]:
    """Bind these addresses at one port; one that the machine has not is left out, all are not."""
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, (host, port, *scope) in places:
            same = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(_bound(family, (host, same, *scope)))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                absent = error
        if absent is not None and not sockets:
            raise absent
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _bound(family: int, place: tuple[object, ...], *, every_family: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not every_family)
        sock.bind(place)
    except OSError:
        sock.close()
        raise
    return sock


def _printed() -> str:
    """Return what to print for every address; where IPv6 is switched off, [::] can be bound."""
    try:
        _bound(socket.AF_INET6, ("::1", 0)).close()
    except OSError:
        return _EVERYWHERE_V4
    return _EVERYWHERE


def _require_free(path: Path) -> None:
    """Raise OSError unless the path is free, or a socket that a killed process left.

    The loop itself removes a socket file before it binds, without asking whether it is in use.
    """
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise OSError(errno.EEXIST, "there is a file that is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0)  # one whose queue is full is somebody's, too
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


_REMEDIES = {
    errno.EADDRINUSE: "in use; stop the other process, or choose another with {setting}",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EACCES: "permission denied; choose a port above 1023 or a folder of the broker's own",
    errno.ENOENT: "no such folder",
}

_SETTINGS = {
    "server.listen": "--listen or [server] listen",
    "admin.listen": "--admin-listen or [admin] listen",
}
"""How an address is chosen, by the key that holds it."""


def _reason(setting: str, address: str, error: OSError) -> str:
    number = error.errno
    if number is None and "could not bind" in str(error):
        number = errno.EADDRNOTAVAIL  # how Python 3.13 reports it
    remedy = _REMEDIES.get(number or 0, "").format(setting=_SETTINGS[setting])
    text = remedy or error.strerror or str(error)
    return f"{setting}: cannot listen on {address}: {text}"
