"""What a supervisor and its workers tell each other, over the socket that a worker is born with.

One JSON object a line.  Settings travel here with their secrets, because this socket has no name
and is seen by nobody else, unlike arguments and environment; and because all workers must follow
the very same settings, also those whose secrets were made at the start or whose file has changed
since.  When the supervisor is gone the socket ends: that is how a worker notices.
"""

import asyncio
import socket
from typing import Any, Generic, Self, TypeVar

import msgspec
from msgspec import Struct

from broker.config import schema
from broker.config.settings import Settings
from broker.model import Secret

LONGEST = 2**24
"""Bytes of a message: settings with thousands of clients are far below."""


class Start(Struct, frozen=True, tag=True):
    """Serve: with these settings, these open files, in this row of the shared cells.

    `listeners` and `shared_cells` are file descriptors; `layout` names that of the cells, `log_key`
    is what names visitors in the log.
    """

    worker: int
    settings: dict[str, Any]
    dev: bool
    url: str
    admin_url: str
    listeners: tuple[int, ...]
    shared_cells: int
    layout: str
    log_key: bytes


class Reload(Struct, frozen=True, tag=True):
    """Take over what a reload can change."""

    settings: dict[str, Any]


class Stop(Struct, frozen=True, tag=True):
    """Drain, then end."""


class Ready(Struct, frozen=True, tag=True):
    """I take requests."""


class Reloaded(Struct, frozen=True, tag=True):
    """The new settings are in force."""


class ReloadFailed(Struct, frozen=True, tag=True):
    """The old settings are still in force, because of this."""

    error: str


Order = Start | Reload | Stop
Report = Ready | Reloaded | ReloadFailed

_In = TypeVar("_In")


class Channel(Generic[_In]):
    """One end of the socket, receiving messages of one kind."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: "msgspec.json.Decoder[_In]",
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = decoder

    @classmethod
    async def over(cls, end: socket.socket, decoder: "msgspec.json.Decoder[_In]") -> Self:
        """Talk over a connected socket, and own it."""
        reader, writer = await asyncio.open_unix_connection(sock=end, limit=LONGEST)
        return cls(reader, writer, decoder)

    def send(self, message: Order | Report) -> None:
        """Send a message; one to somebody who is gone is lost, which `receive` tells."""
        self._writer.write(msgspec.json.encode(message) + b"\n")

    async def receive(self) -> _In | None:
        """Return the next message, None when the other one is gone."""
        try:
            line = await self._reader.readline()
        except ConnectionError:
            return None
        return self._decoder.decode(line) if line.endswith(b"\n") else None

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


ORDERS: "msgspec.json.Decoder[Order]" = msgspec.json.Decoder(Order)
REPORTS: "msgspec.json.Decoder[Report]" = msgspec.json.Decoder(Report)


def packed(settings: Settings) -> dict[str, Any]:
    """Return the settings as a tree with their secrets, for a message; `schema.build` reads it."""
    tree: dict[str, Any] = msgspec.to_builtins(settings, enc_hook=_reveal)
    return tree


def _reveal(value: object) -> object:
    return value.reveal() if isinstance(value, Secret) else schema.encode(value)
