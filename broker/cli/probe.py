"""Asks a listener whether there is a broker behind it, and whether it is ready."""

import socket
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException

from typing_extensions import override

from broker.cli.failures import explained
from broker.config.validate import parse_address

TIMEOUT = 2.0
"""Seconds; engines commonly wait for three."""

ALIVE = b'{"status":"ok"}'
"""What /livez of a broker answers."""

ASKED_AT = {
    "0.0.0.0": ("127.0.0.1",),  # noqa: S104 - where one listens, not asks
    "::": ("127.0.0.1", "::1"),
}
"""Where to ask a listener that is on all addresses: one family may be off."""


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("broker", timeout=TIMEOUT)
        self._path = path

    @override
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def check(listen: str) -> str:
    """Return an empty text if the broker at this admin listener is ready, else why it is not."""
    failure = ""
    try:
        connections = _connections(listen)
    except (ValueError, HTTPException) as error:
        return f"admin listener {listen}: {error}"
    for connection in connections:
        try:
            connection.request("GET", "/readyz")
            status = connection.getresponse().status
        except (OSError, HTTPException, UnicodeError) as error:
            failure = explained(listen, error, TIMEOUT, where="[admin] listen")
            continue
        finally:
            connection.close()
        return "" if status == HTTPStatus.OK else f"not ready: /readyz answers {status}"
    return failure


def is_broker(listen: str) -> bool:
    """Whether a broker answers at this listener, of either kind."""
    for connection in _connections(listen):
        try:
            connection.request("GET", "/livez")
            answer = connection.getresponse()
            if answer.read(100) == ALIVE and answer.headers["X-Request-Id"]:
                return True
        except (OSError, HTTPException, UnicodeError):
            continue
        finally:
            connection.close()
    return False


def _connections(listen: str) -> list[HTTPConnection]:
    """Return the ways to the listener, each to be tried until one is answered."""
    address = parse_address(listen)
    if isinstance(address, str):
        return [_UnixConnection(address)]
    host, port = address
    return [HTTPConnection(h, port, timeout=TIMEOUT) for h in ASKED_AT.get(host, (host,))]
