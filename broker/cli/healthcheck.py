"""`broker healthcheck`: asks the broker beside it whether it is ready, for a container's engine.

It needs no good configuration, only to know where to ask: a file on the disk may already be the
next one, and a broker that is configured by flags has none.
"""

import socket
import tomllib
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from typing_extensions import override

from broker.config import files
from broker.config.settings import AdminSettings
from broker.config.validate import parse_address

TIMEOUT = 2.0
"""Seconds; engines commonly wait for three."""

_EVERYWHERE = {
    "0.0.0.0": ("127.0.0.1",),  # noqa: S104 - where one listens, not asks
    "::": ("127.0.0.1", "::1"),
}
"""Where to ask a listener that is on all addresses: one family may be off."""

VARIABLE = "BROKER_ADMIN__LISTEN"
"""What overrides the file's `[admin] listen`."""


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("broker", timeout=TIMEOUT)
        self._path = path

    @override
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def where(flag: str | None, environ: Mapping[str, str], file: Path | None) -> str:
    """Choose the admin listener: flag, environment, file, default, whatever else is wrong."""
    given = {name.upper(): value for name, value in environ.items()}
    return flag or given.get(VARIABLE) or _of_file(file) or AdminSettings().listen


def _of_file(file: Path | None) -> str | None:
    try:
        listen = tomllib.loads(files.read_text(file))["admin"]["listen"] if file else None
    except (files.CannotRead, ValueError, RecursionError, LookupError, TypeError):
        return None
    return listen if isinstance(listen, str) else None


def ask(listen: str) -> str:
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
            failure = type(error).__name__
            continue
        finally:
            connection.close()
        return "" if status == 200 else f"not ready: /readyz answers {status}"  # noqa: PLR2004 - HTTP's OK
    return f"no answer at {listen}: {failure}"


def _connections(listen: str) -> list[HTTPConnection]:
    """Return the ways to the listener, each to be tried until one is answered."""
    address = parse_address(listen)
    if isinstance(address, str):
        return [_UnixConnection(address)]
    host, port = address
    return [HTTPConnection(h, port, timeout=TIMEOUT) for h in _EVERYWHERE.get(host, (host,))]
