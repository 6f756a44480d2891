"""Taking connections from a socket that others take from, too.  Real sockets, all in one loop."""

import asyncio
import errno
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from processes import until
from structlog.testing import capture_logs

from broker.web import acceptor as module
from broker.web.acceptor import Acceptor

BACKLOG = 64


class Taken(list[asyncio.BaseTransport]):
    """Connections that one acceptor took."""

    def make(self) -> asyncio.Protocol:
        taken = self

        class Connection(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                taken.append(transport)

        return Connection()


@contextmanager
def shared_socket(count: int) -> Iterator[list[socket.socket]]:
    """One listening socket, as so many processes hold it."""
    with ExitStack() as stack:
        first = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=BACKLOG))
        yield [first, *(stack.enter_context(first.dup()) for _ in range(count - 1))]


@contextmanager
def callers(listener: socket.socket, count: int) -> Iterator[None]:
    """Connect before anybody accepts: they wait in the kernel's queue."""
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        yield


def never_ahead() -> float:
    """As long as nobody has fewer connections."""
    return 0


async def ended(*all_taken: Taken) -> None:
    """Hang up, and let the loop see it."""
    for taken in all_taken:
        for transport in taken:
            transport.close()
    await asyncio.sleep(0)


async def test_two_share_a_burst_evenly() -> None:
    """One connection for each turn of the loop: whoever wakes first does not get them all."""
    left, right = Taken(), Taken()
    with shared_socket(2) as sockets, callers(sockets[0], 10):
        acceptors = [
            Acceptor([held], taken.make, never_ahead)
            for held, taken in zip(sockets, (left, right), strict=True)
        ]
        for acceptor in acceptors:
            acceptor.start(BACKLOG)
        await until(lambda: len(left) + len(right) == 10)
        for acceptor in acceptors:
            acceptor.close()
        await ended(left, right)
    assert (len(left), len(right)) == (5, 5)


async def test_who_is_ahead_leaves_the_door_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It steps back, and the other one takes them all."""
    monkeypatch.setattr(module, "STEP", 3600.0)
    monkeypatch.setattr(module, "LONGEST", 3600.0)
    full, empty = Taken(), Taken()
    with shared_socket(2) as sockets, callers(sockets[0], 10):
        ahead = Acceptor(sockets[:1], full.make, lambda: 2)
        behind = Acceptor(sockets[1:], empty.make, never_ahead)
        ahead.start(BACKLOG)
        behind.start(BACKLOG)
        await until(lambda: len(empty) == 10)
        ahead.close()
        behind.close()
        await ended(full, empty)
    assert full == []


async def test_who_is_ahead_and_alone_takes_them_all_the_same() -> None:
    """The one with fewer may be hung: nobody is left standing at the door."""
    taken = Taken()
    with shared_socket(1) as sockets, callers(sockets[0], 10):
        acceptor = Acceptor(sockets, taken.make, lambda: 2)
        acceptor.start(BACKLOG)
        await until(lambda: len(taken) == 10)
        acceptor.close()
        await ended(taken)


async def test_who_is_far_ahead_comes_back_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait grows with each connection, and has a bound that a caller hardly notices."""
    monkeypatch.setattr(module, "STEP", 3600.0)
    taken = Taken()
    with shared_socket(1) as sockets, callers(sockets[0], 1):
        acceptor = Acceptor(sockets, taken.make, lambda: 1000)
        acceptor.start(BACKLOG)
        await until(lambda: len(taken) == 1)
        acceptor.close()
        await ended(taken)


async def test_who_is_closed_while_it_steps_back_stays_closed() -> None:
    """Its socket is gone when the wait is over: nothing is watched, and nothing fails."""
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    taken = Taken()
    with shared_socket(1) as sockets, callers(sockets[0], 1):
        acceptor = Acceptor(sockets, taken.make, lambda: 2)
        acceptor.start(BACKLOG)
        acceptor._notice(sockets[0])
        acceptor.close()
        await asyncio.sleep(4 * module.STEP + module.LONGEST)
    assert (failures, taken) == ([], [])


async def test_without_descriptors_it_waits_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """EMFILE: callers stay in the queue, and are taken as soon as there is room."""
    monkeypatch.setattr(module, "PAUSE", 0.02)
    taken = Taken()
    with shared_socket(1) as sockets, callers(sockets[0], 3), capture_logs() as logged:
        acceptor = Acceptor(sockets, taken.make, never_ahead)
        acceptor.start(BACKLOG)
        with no_more_files():
            await asyncio.sleep(0.1)
            assert taken == []
        await until(lambda: len(taken) == 3)
        acceptor.close()
        await ended(taken)
    assert 2 <= len(logged) <= 6  # not once for each turn of the loop
    assert logged[0] == {
        "event": "broker.accept_failed",
        "reason": "Too many open files",
        "again_in_s": 0.02,
        "log_level": "error",
    }


async def test_N2_a_connection_that_cannot_be_opened_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody awaits it, and it is a defect: the door stays open for the others."""

    async def fail(_factory: object, connection: socket.socket) -> None:
        connection.close()
        raise RuntimeError

    taken = Taken()
    with shared_socket(1) as sockets, callers(sockets[0], 1), capture_logs() as logged:
        acceptor = Acceptor(sockets, taken.make, never_ahead)
        with monkeypatch.context() as patched:
            patched.setattr(acceptor._loop, "connect_accepted_socket", fail)
            acceptor.start(BACKLOG)
            await until(lambda: logged)
        with callers(sockets[0], 1):
            await until(lambda: len(taken) == 1)
            acceptor.close()
            await ended(taken)
    assert [event["event"] for event in logged] == ["broker.defect"]


class Refusing:
    """A listening socket whose next connections have failed before they were taken."""

    def __init__(self, listener: socket.socket, *numbers: int) -> None:
        self._listener, self._numbers = listener, list(numbers)

    def __getattr__(self, name: str) -> object:
        return getattr(self._listener, name)

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> object:
        if self._numbers:
            number = self._numbers.pop(0)
            raise OSError(number, os.strerror(number))
        return self._listener.accept()


NETWORK_ERRORS = [
    *(errno.ENETDOWN, errno.EPROTO, errno.ENOPROTOOPT, errno.EHOSTDOWN, errno.ENONET),
    *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNABORTED, errno.EPERM, errno.EAGAIN),
    *(errno.EINTR, errno.ETIMEDOUT, errno.ECONNRESET),
]
"""What accept(2) passes on from the connection it would have taken, and a firewall's no."""


async def test_O6_a_connection_that_failed_before_it_was_taken_is_passed_over() -> None:
    """Neither logged nor waited for, and the next one is taken."""
    taken, loop = Taken(), asyncio.get_running_loop()
    defects: list[object] = []
    loop.set_exception_handler(lambda _loop, context: defects.append(context))
    with shared_socket(1) as (listener,), callers(listener, 1), capture_logs() as logged:
        refusing = Refusing(listener, *NETWORK_ERRORS)
        acceptor = Acceptor([refusing], taken.make, never_ahead)  # type: ignore[list-item]
        acceptor.start(BACKLOG)
        await until(lambda: len(taken) == 1)
        acceptor.close()
        await ended(taken)
    assert (logged, defects) == ([], [])


async def test_a_socket_that_is_none_is_a_defect() -> None:
    """It would fail for ever, and must not do so in silence."""
    taken, loop = Taken(), asyncio.get_running_loop()
    defects: list[object] = []
    loop.set_exception_handler(lambda _loop, context: defects.append(context["exception"]))
    with shared_socket(1) as (listener,), callers(listener, 1):
        acceptor = Acceptor([Refusing(listener, errno.EINVAL)], taken.make, never_ahead)  # type: ignore[list-item]
        acceptor.start(BACKLOG)
        await until(lambda: len(taken) == 1)
        acceptor.close()
        await ended(taken)
    assert [getattr(each, "errno", 0) for each in defects] == [errno.EINVAL]


@contextmanager
def no_more_files() -> Iterator[None]:
    """Allow this process no file beyond those that it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_closed_it_takes_nobody() -> None:
    """Also when it had stepped back at that moment; what it had taken lives on."""
    taken = Taken()
    with shared_socket(1) as sockets, callers(sockets[0], 1):
        address = sockets[0].getsockname()
        acceptor = Acceptor(sockets, taken.make, lambda: 2)
        acceptor.start(BACKLOG)
        await until(lambda: len(taken) == 1)
        with callers(sockets[0], 1):
            await asyncio.sleep(0)
            acceptor.close()
            await asyncio.sleep(0.01)
            assert len(taken) == 1
            assert not taken[0].is_closing()
        with socket.socket() as late:
            assert late.connect_ex(address) != 0
        await ended(taken)
