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

from broker.tasks import TaskSet

log = structlog.get_logger()

STEP, LONGEST = 0.001, 0.02
"""Seconds for which a worker leaves the door to the others, for each connection that it is ahead,
and at most: enough for one that sleeps to wake on a busy machine, and a wait that a caller hardly
notices when none of them comes."""

PAUSE = 0.5
"""Seconds without accepting after the system had no descriptor left, or it fails over and over."""

_OURS = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP})
"""What is wrong with the socket.  All else that accept(2) says under Linux is an error of the
connection that it would have taken: its network is down, a firewall forbids it, it was reset."""

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """Serves listening sockets until it is closed; owns them."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        factory: Callable[[], asyncio.Protocol],
        ahead: Callable[[], float],
    ) -> None:
        self._sockets = list(sockets)
        self._factory = factory
        self._ahead = ahead
        self._loop = asyncio.get_running_loop()
        self._opening = TaskSet()

    def start(self, backlog: int) -> None:
        """Open the door.  That others have opened it before does no harm."""
        for listener in self._sockets:
            listener.settimeout(0)
            listener.listen(backlog)
            self._watch(listener)

    def close(self) -> None:
        """Take no more connections; those that were taken live on."""
        for listener in self._sockets:
            self._loop.remove_reader(listener)
            listener.close()
        self._sockets.clear()

    def _watch(self, listener: socket.socket) -> None:
        self._loop.add_reader(listener, self._notice, listener)

    def _notice(self, listener: socket.socket) -> None:
        """Somebody is at the door."""
        ahead = self._ahead()
        if ahead > 1:
            self._step_back(listener, min(ahead * STEP, LONGEST))
        else:
            self._accept(listener)

    def _step_back(self, listener: socket.socket, seconds: float) -> None:
        """Leave the door to the others, then take whoever still waits."""
        self._loop.remove_reader(listener)
        self._loop.call_later(seconds, self._return, listener)

    def _return(self, listener: socket.socket) -> None:
        if listener in self._sockets:
            self._watch(listener)
            self._accept(listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno in _OURS:
                raise
            if error.errno not in _EXHAUSTED:
                return  # another worker was faster, or the caller has left, for whatever reason
            log.error("broker.accept_failed", reason=error.strerror, again_in_s=PAUSE)
            self._step_back(listener, PAUSE)
            return
        self._opening.start(self._loop.connect_accepted_socket(self._factory, connection))
