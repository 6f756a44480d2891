"""The vendor's front door: one address where somebody answers, nobody answers, or nobody is.

Knows sockets.  Does not know HTTP.  The listening socket is ours; asyncio serves a duplicate of
it.  So it can stop accepting while the port goes on listening, which is what a hung process
looks like, and the port stays ours from `open` to `close` whatever the state.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable

from typing_extensions import override

BACKLOG = 1024
"""Connections that the kernel completes for us before they are accepted."""

FULL_BACKLOG = 1
"""Backlog of a door at which nobody answers.  Linux completes one connection more than this; 0
would make it answer with SYN cookies and warn of a flood in the kernel's log."""


class Listener:
    """An address; `host` numeric or a name of this machine, `port` 0 for any free one."""

    def __init__(
        self,
        host: str,
        port: int,
        protocol: Callable[[], asyncio.BaseProtocol],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self._protocol = protocol
        self._tls = tls
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._fillers: list[socket.socket] = []

    async def accept(self) -> None:
        """Serve; connections that were left waiting are served too.

        Raises OSError if the address cannot be had.
        """
        if self._server is not None:
            return
        self._dismiss_fillers()
        listening = self._bound()
        self._server = await asyncio.get_running_loop().create_server(
            self._protocol, sock=listening.dup(), backlog=BACKLOG, ssl=self._tls
        )

    async def ignore(self) -> None:
        """Go on listening, accept nothing: whoever connects from now on waits for an answer.

        On Linux the backlog is full, so not even the TCP handshake completes; elsewhere it may,
        and the request is never read.
        """
        await self._stop()
        listening = self._bound()
        listening.listen(FULL_BACKLOG)
        for _ in range(FULL_BACKLOG + 2):
            self._fillers.append(self._filler(listening))

    async def refuse(self) -> None:
        """Do not listen: whoever connects is refused.  The port stays bound, hence ours."""
        await self._stop()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._bound()

    async def close(self) -> None:
        """Give the port back.  Connections that were accepted are not ours to end."""
        await self._stop()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _stop(self) -> None:
        self._dismiss_fillers()
        if self._server is not None:
            self._server.close()
            self._server = None
            # uvloop closes the duplicate one turn of the loop later than it says.
            await asyncio.sleep(0)

    def _bound(self) -> socket.socket:
        """Return our socket, bound; the port is chosen once and kept."""
        if self._socket is None:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            bound = socket.socket(family, socket.SOCK_STREAM)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                bound.bind((self.host, self.port))
            except OSError:
                bound.close()
                raise
            bound.settimeout(0)
            self.port = bound.getsockname()[1]
            self._socket = bound
        return self._socket

    def _filler(self, listening: socket.socket) -> socket.socket:
        """Return a connection of our own that takes a place in the backlog."""
        filler = socket.socket(listening.family, socket.SOCK_STREAM)
        filler.settimeout(0)
        filler.connect_ex(listening.getsockname())
        return filler

    def _dismiss_fillers(self) -> None:
        for filler in self._fillers:
            filler.close()
        self._fillers.clear()

    @override
    def __repr__(self) -> str:
        return f"Listener({self.host!r}, {self.port}, serving={self._server is not None})"
