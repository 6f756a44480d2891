"""`broker healthcheck`: asks the broker beside it whether it is ready, for a container's engine.

Standard library only: it runs every few seconds, so its start is most of its cost.
"""

import socket
from http.client import HTTPConnection, HTTPException

from typing_extensions import override

from broker.checks import parse_address

TIMEOUT = 2.0
"""Seconds; engines commonly wait for three."""

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where one listens, not asks
"""Where to ask a listener that is on all addresses."""


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("broker", timeout=TIMEOUT)
        self._path = path

    @override
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(listen: str) -> str:
    """Return an empty text if the broker at this admin listener is ready, else why it is not."""
    where = parse_address(listen)
    if isinstance(where, str):
        connection: HTTPConnection = _UnixConnection(where)
    else:
        host, port = where
        connection = HTTPConnection(_EVERYWHERE.get(host, host), port, timeout=TIMEOUT)
    try:
        connection.request("GET", "/readyz")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        return f"no answer at {listen}: {type(error).__name__}"
    finally:
        connection.close()
    return "" if status == 200 else f"not ready: /readyz answers {status}"  # noqa: PLR2004 - HTTP's OK
