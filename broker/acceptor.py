"""Takes connections from a listening socket that several processes share.

The event loops' own servers accept everything that waits as soon as they wake, so whichever worker
wakes first gets a whole burst of connects, and with keep-alive keeps it.  Here a worker takes one
connection each time its loop turns; by then the others have woken, too.
"""

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence

import structlog

log = structlog.get_logger()

PAUSE = 0.5
"""Seconds without accepting after the system had no descriptor left, or it fails over and over."""

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """Serves listening sockets until it is closed; owns them."""

    def __init__(
        self, sockets: Sequence[socket.socket], factory: Callable[[], asyncio.Protocol]
    ) -> None:
        self._sockets = list(sockets)
        self._factory = factory
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[object]] = set()

    def start(self, backlog: int) -> None:
        """Open the door.  That others have opened it before does no harm."""
        for listener in self._sockets:
            listener.settimeout(0)
            listener.listen(backlog)
            self._loop.add_reader(listener, self._accept, listener)

    def close(self) -> None:
        """Take no more connections; those that were taken live on."""
        for listener in self._sockets:
            self._loop.remove_reader(listener)
            listener.close()
        self._sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another worker was faster, or the caller has left
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            self._pause(listener, error)
            return
        opening = self._loop.create_task(
            self._loop.connect_accepted_socket(self._factory, connection)
        )
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    def _pause(self, listener: socket.socket, error: OSError) -> None:
        log.error("broker.accept_failed", reason=error.strerror, again_in_s=PAUSE)
        self._loop.remove_reader(listener)
        self._loop.call_later(PAUSE, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if listener in self._sockets:
            self._loop.add_reader(listener, self._accept, listener)
