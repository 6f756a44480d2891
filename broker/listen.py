"""Opening listeners: TCP or a Unix socket, with an error that an operator can act on."""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from broker.checks import parse_address

SOCKET_MODE = 0o660
"""Who may connect to a Unix socket: owner and group.  The secret is still required."""


class CannotListen(Exception):
    """An address that cannot be listened on; exit code 69 (EX_UNAVAILABLE)."""


async def listen(
    factory: Callable[[], asyncio.Protocol],
    address: str,
    setting: str,
    backlog: int,
    *,
    serve: bool = True,
) -> tuple[asyncio.Server, str]:
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
            return server, f"unix:{where}"
        host, port = where
        server = await loop.create_server(factory, host, port, backlog=backlog, start_serving=serve)
    except OSError as error:
        raise CannotListen(_reason(setting, address, error)) from None
    port = server.sockets[0].getsockname()[1]
    return server, f"http://{f'[{host}]' if ':' in host else host}:{port}"


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
    errno.EADDRINUSE: "in use; stop the other process or choose another",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EACCES: "permission denied; choose a port above 1023 or a folder of the broker's own",
    errno.ENOENT: "no such folder",
}


def _reason(setting: str, address: str, error: OSError) -> str:
    number = error.errno
    if number is None and "could not bind" in str(error):
        number = errno.EADDRNOTAVAIL  # how Python 3.13 reports it
    text = _REMEDIES.get(number or 0) or error.strerror or str(error)
    return f"{setting}: cannot listen on {address}: {text}"
