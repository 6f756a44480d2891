"""Calls to one node through real sockets: batches, time that is over, connections that end."""

import asyncio
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import aiohappyeyeballs
import pytest
from bad_replies import BAD

from broker.model import Secret
from broker.valkey.client.connection import PipelinedConnection, RespProtocol
from broker.valkey.client.errors import NoScript, Reason, Redirect, StoreFailed, why
from broker.valkey.client.resp import LONGEST_REPLY, Reply
from broker.valkey.client.scripts import command
from broker.valkey.client.shapes import COUNTED, SPEND
from broker.valkey.client.target import CONNECT_TIMEOUT, Route, Target

TIMEOUT = 0.1
PING = command(b"PING")

Answer = Callable[[bytes], bytes | None]
"""Gets what arrived in one piece; returns what is said to it, None to hang up."""


class Node:
    """A server that says what the test wants; it keeps what it was sent, piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.connections = 0
        self.answer: Answer = lambda piece: b"+OK\r\n" * piece.count(b"*")
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self.port = 0

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Hang up on everybody, and listen no more."""
        if self._server is not None:
            self._server.close()
        self.hang_up()
        await asyncio.sleep(0)

    def hang_up(self) -> None:
        """End every connection."""
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        with suppress(ConnectionError):
            while piece := await reader.read(1 << 20):
                self.pieces.append(piece)
                said = self.answer(piece)
                if said is None:
                    break
                writer.write(said)
        writer.close()


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    """A node that says OK to everything."""
    node = Node()
    await node.open()
    yield node
    await node.close()


@pytest.fixture
async def link(node: Node) -> AsyncIterator[PipelinedConnection]:
    """A link to it."""
    link = PipelinedConnection(Target("127.0.0.1", node.port), TIMEOUT)
    yield link
    await link.close()
    assert link._waiting == []


async def told(*futures: "asyncio.Future[Reply]") -> list[object]:
    """Wait for all; returns replies and errors."""
    return list(await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 5))


def reasons(results: list[object]) -> set[Reason]:
    """Return how all of them failed."""
    assert all(isinstance(each, StoreFailed) for each in results), results
    return {each.reason for each in results if isinstance(each, StoreFailed)}


async def test_calls_of_one_turn_leave_in_one_piece_and_are_answered_in_order(
    node: Node, link: PipelinedConnection
) -> None:
    """A hundred callers, one write; each gets its own reply."""
    await told(link.send(PING))
    node.pieces.clear()
    node.answer = lambda piece: b"".join(b":%d\r\n" % n for n in range(piece.count(b"*")))
    assert await told(*(link.send(PING) for _ in range(100))) == list(range(100))
    assert node.pieces == [PING * 100]
    assert node.connections == 1


async def test_who_comes_in_the_next_turn_goes_along(node: Node, link: PipelinedConnection) -> None:
    """Callers are read one after the other: a batch is worth a turn of the loop."""
    await told(link.send(PING))
    node.pieces.clear()
    first = link.send(PING)
    await asyncio.sleep(0)
    assert await told(first, link.send(PING)) == [b"OK"] * 2
    assert node.pieces == [PING * 2]


async def test_who_comes_while_a_batch_is_out_is_the_next_batch(
    node: Node, link: PipelinedConnection
) -> None:
    """They gather, and leave together when it has been answered."""
    await told(link.send(PING))
    node.pieces.clear()
    first = link.send(PING)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    later = []
    for _ in range(3):
        later.append(link.send(PING))
        await asyncio.sleep(0)
    assert await told(first, *later) == [b"OK"] * 4
    assert node.pieces[0] == PING
    assert b"".join(node.pieces) == PING * 4


async def test_a_reply_may_come_in_any_pieces(node: Node, link: PipelinedConnection) -> None:
    """Byte by byte, and two replies in one piece."""
    whole = b"*2\r\n$3\r\nabc\r\n:7\r\n$-1\r\n"
    parts = [whole[place : place + 1] for place in range(len(whole))]

    def slowly(_piece: bytes) -> bytes:
        writer = node._writers[0]
        loop = asyncio.get_running_loop()
        for place, part in enumerate(parts):
            loop.call_later(place * 0.001, writer.write, part)
        return b""

    node.answer = slowly
    assert await told(link.send(PING), link.send(PING)) == [[b"abc", 7], None]


async def test_an_error_is_one_callers_affair(node: Node, link: PipelinedConnection) -> None:
    """The others of its batch are answered, and the connection stays."""
    node.answer = lambda _piece: (
        b"+OK\r\n-ERR no\r\n-NOSCRIPT x\r\n-MOVED 7 host:1\r\n-ASK 8 :2\r\n-WRONGTYPE x\r\n:1\r\n"
    )
    results = await told(*(link.send(PING) for _ in range(7)))
    assert (results[0], results[6]) == (b"OK", 1)
    assert reasons([results[1], results[5]]) == {Reason.SCRIPT}
    assert isinstance(results[2], NoScript)
    moved, redirect = results[3], results[4]
    assert isinstance(moved, Redirect)
    assert isinstance(redirect, Redirect)
    assert (moved.slot, moved.host, moved.port, moved.asking) == (7, "host", 1, False)
    assert (redirect.slot, redirect.host, redirect.port, redirect.asking) == (8, "", 2, True)
    node.answer = lambda _piece: b"+OK\r\n"
    assert await told(link.send(PING)) == [b"OK"]
    assert node.connections == 1


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"-READONLY You can't write\r\n", Reason.READONLY),
        (b"-LOADING\r\n", Reason.LOADING),
        (b"-CLUSTERDOWN The cluster is down\r\n", Reason.CLUSTER_DOWN),
    ],
)
async def test_a_node_that_is_the_wrong_one_is_left(
    node: Node, link: PipelinedConnection, said: bytes, reason: Reason
) -> None:
    """The next call gets a new connection: behind the same name there may be another one by now."""
    node.answer = lambda _piece: said
    assert reasons(await told(link.send(PING))) == {reason}
    node.answer = lambda _piece: b"+OK\r\n"
    assert await told(link.send(PING)) == [b"OK"]
    assert node.connections == 2


async def test_S1_what_is_not_answered_in_time_fails_with_its_connection(
    node: Node, link: PipelinedConnection
) -> None:
    """The whole batch; the late reply is not taken for the next one's, who has a new connection."""
    await told(link.send(PING))
    late = list(node._writers)
    node.answer = lambda _piece: b"+first\r\n"
    began = time.monotonic()
    results = await told(*(link.send(PING) for _ in range(3)))
    assert results[0] == b"first"
    assert reasons(results[1:]) == {Reason.TIMEOUT}
    assert TIMEOUT <= time.monotonic() - began < TIMEOUT + 1
    late[0].write(b"+late\r\n")
    node.answer = lambda piece: b"+own\r\n" * piece.count(b"*")
    assert await told(link.send(PING)) == [b"own"]
    assert node.connections == 2


async def test_S1_who_waits_behind_a_batch_that_hangs_is_told_too(
    node: Node, link: PipelinedConnection
) -> None:
    """Not after two times the timeout, but with those before them."""
    await told(link.send(PING))
    node.answer = lambda _piece: b""
    first = link.send(PING)
    await asyncio.sleep(TIMEOUT / 2)
    second = link.send(PING)
    began = time.monotonic()
    assert reasons(await told(first, second)) == {Reason.TIMEOUT}
    assert time.monotonic() - began < TIMEOUT + 1


async def test_S1_each_batch_has_a_time_of_its_own(
    node: Node, link: PipelinedConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One timer looks after all: batches that follow each other do not use up each other's time."""
    await told(link.send(PING))
    loop = asyncio.get_running_loop()
    timers, call_later = [], loop.call_later
    monkeypatch.setattr(
        loop, "call_later", lambda *call: timers.append(call[1]) or call_later(*call)
    )
    began = time.monotonic()
    calls = 0
    while time.monotonic() - began < 3 * TIMEOUT:
        assert await told(link.send(PING)) == [b"OK"]
        calls += 1
    ours = [each for each in timers if getattr(each, "__self__", None) is link._talk]
    assert 1 < len(ours) < calls
    node.answer = lambda _piece: b""
    began = time.monotonic()
    assert reasons(await told(link.send(PING))) == {Reason.TIMEOUT}
    assert TIMEOUT <= time.monotonic() - began < TIMEOUT + 1


async def test_S1_a_call_after_the_greeting_has_its_own_time(node: Node) -> None:
    """Not the longer one in which the server had to let us in."""
    link = PipelinedConnection(Target("127.0.0.1", node.port, password=Secret("p")), TIMEOUT)
    node.answer = lambda piece: b"+OK\r\n" * piece.count(b"AUTH")
    began = time.monotonic()
    assert reasons(await told(link.send(PING))) == {Reason.TIMEOUT}
    assert time.monotonic() - began < CONNECT_TIMEOUT - 1
    await link.close()


async def test_S1_nobody_listens() -> None:
    """Each call fails at once, as a connection; nothing is left behind."""
    free = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
    port = free.sockets[0].getsockname()[1]
    free.close()
    await free.wait_closed()
    link = PipelinedConnection(Target("127.0.0.1", port), 5.0)
    for _ in range(3):
        began = time.monotonic()
        assert reasons(await told(*(link.send(PING) for _ in range(5)))) == {Reason.CONNECTION}
        assert time.monotonic() - began < 2
    await link.close()


async def test_S1_a_connection_that_ends_fails_what_is_out(
    node: Node, link: PipelinedConnection
) -> None:
    """At once, and the next call opens another one."""
    await told(link.send(PING))
    node.answer = lambda _piece: None
    assert reasons(await told(link.send(PING), link.send(PING))) == {Reason.CONNECTION}
    node.answer = lambda piece: b"+OK\r\n" * piece.count(b"*")
    assert await told(link.send(PING)) == [b"OK"]


async def test_a_connection_that_ended_while_idle_is_not_used(
    node: Node, link: PipelinedConnection
) -> None:
    """A server that was restarted between two calls costs no failure."""
    await told(link.send(PING))
    node.hang_up()
    await asyncio.sleep(0.05)
    assert await told(link.send(PING)) == [b"OK"]
    assert node.connections == 2


async def test_what_is_no_reply_ends_the_connection(node: Node, link: PipelinedConnection) -> None:
    """HTTP at this port: `other`, in time."""
    node.answer = lambda _piece: b"HTTP/1.1 400 Bad Request\r\n\r\n"
    assert reasons(await told(link.send(PING))) <= {Reason.OTHER, Reason.CONNECTION}


async def test_more_replies_than_calls_end_the_connection(
    node: Node, link: PipelinedConnection
) -> None:
    """Whoever gets the last one has it; nobody gets a stranger's."""
    node.answer = lambda _piece: b"+a\r\n+b\r\n"
    assert await told(link.send(PING)) == [b"a"]
    await asyncio.sleep(0.05)
    node.answer = lambda _piece: b"+c\r\n"
    assert await told(link.send(PING)) == [b"c"]
    assert node.connections == 2


async def test_S1_a_number_too_many_is_not_told_from_the_others(
    node: Node, link: PipelinedConnection
) -> None:
    """Every number of the batch may be a neighbour's: nobody gets one."""
    node.answer = lambda piece: b"".join(b":%d\r\n" % n for n in range(piece.count(b"*") + 1))
    assert reasons(await told(*(link.send(PING) for _ in range(5)))) == {Reason.OTHER}
    node.answer = lambda _piece: b":5\r\n"
    assert await told(link.send(PING)) == [5]
    assert node.connections == 2


async def test_who_leaves_disturbs_nobody(node: Node, link: PipelinedConnection) -> None:
    """Cancelled before it was sent, or while it is out: the others get their own replies."""
    node.answer = lambda piece: b"".join(b":%d\r\n" % n for n in range(piece.count(b"*")))
    futures = [link.send(PING) for _ in range(5)]
    futures[1].cancel()
    await asyncio.sleep(0)
    futures[3].cancel()
    assert [each for each in await told(*futures) if not isinstance(each, BaseException)] == [
        0,
        2,
        4,
    ]
    assert await told(link.send(PING)) == [0]
    assert link.rests


async def test_it_introduces_itself_first(node: Node) -> None:
    """User and password, then the database; the calls come after both were accepted."""
    password = secrets.token_urlsafe(16)
    link = PipelinedConnection(
        Target("127.0.0.1", node.port, username="broker", password=Secret(password), db=3), TIMEOUT
    )
    assert await told(link.send(PING)) == [b"OK"]
    assert node.pieces == [
        command(b"AUTH", b"broker", password.encode()),
        command(b"SELECT", b"3"),
        PING,
    ]
    await link.close()


async def test_who_is_not_let_in_is_told_why(node: Node) -> None:
    """Every caller that waits; the password is not in the error."""
    password = secrets.token_urlsafe(16)
    node.answer = lambda _piece: b"-WRONGPASS invalid username-password pair\r\n"
    link = PipelinedConnection(Target("127.0.0.1", node.port, password=Secret(password)), TIMEOUT)
    results = await told(link.send(PING), link.send(PING))
    assert reasons(results) == {Reason.OTHER}
    assert [getattr(each, "detail", "") for each in results] == ["WRONGPASS"] * 2
    assert password not in repr(results) + repr(link)
    await link.close()


async def test_closing_fails_what_is_out(node: Node) -> None:
    """At once; and a link that was never used closes as well."""
    unused, link = (PipelinedConnection(Target("127.0.0.1", node.port), 5.0) for _ in range(2))
    await unused.close()
    node.answer = lambda _piece: b""
    out = link.send(PING)
    await asyncio.sleep(0.05)
    waits = link.send(PING)
    await link.close()
    assert reasons(await told(out, waits)) == {Reason.CONNECTION}


async def test_a_busy_loop_does_not_take_its_slowness_for_the_servers(
    node: Node, link: PipelinedConnection
) -> None:
    """The reply had arrived while the loop was busy for longer than a call may take."""
    await told(link.send(PING))
    reply = link.send(PING)
    await asyncio.sleep(0.02)  # it is answered by now, or will be while nobody reads
    reply = link.send(PING)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    time.sleep(TIMEOUT * 1.5)  # noqa: ASYNC251 - that is what is tested
    assert await told(reply) == [b"OK"]


async def test_a_slot_that_is_on_its_way_costs_no_connection(
    node: Node, link: PipelinedConnection
) -> None:
    """TRYAGAIN is about one slot: everybody else's calls go on over the same connection."""
    node.answer = lambda _piece: b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n"
    (failed,) = await told(link.send(PING))
    assert isinstance(failed, StoreFailed)
    assert (failed.reason, failed.of_key) == (Reason.CLUSTER_DOWN, True)
    node.answer = lambda _piece: b"+OK\r\n"
    assert await told(link.send(PING)) == [b"OK"]
    assert node.connections == 1


async def test_a_connection_that_ends_with_the_greeting_is_not_used(node: Node) -> None:
    """Hung up in the same breath as it let us in: told, and the next call opens another one."""
    link = PipelinedConnection(Target("127.0.0.1", node.port, password=Secret("p")), TIMEOUT)

    def accept_and_leave(_piece: bytes) -> bytes:
        asyncio.get_running_loop().call_soon(node.hang_up)
        return b"+OK\r\n"

    node.answer = accept_and_leave
    for _ in range(20):  # whichever is noticed first
        assert reasons(await told(link.send(PING))) == {Reason.CONNECTION}
    node.answer = lambda piece: b"+OK\r\n" * piece.count(b"*")
    assert await told(link.send(PING)) == [b"OK"]
    await link.close()


async def test_one_that_closes_amid_its_greeting_leaves_no_connection(node: Node) -> None:
    """The server does not say whether it lets us in: it is hung up on at once all the same."""
    opened: list[RespProtocol] = []

    class Kept(Target, frozen=True):
        async def connect(self, make: "Callable[[], RespProtocol]", route: Route) -> RespProtocol:
            opened.append(await super().connect(make, route))
            return opened[-1]

    link = PipelinedConnection(Kept("127.0.0.1", node.port, password=Secret("p")), 5.0)
    node.answer = lambda _piece: b""
    call = link.send(PING)
    while not node.pieces:  # noqa: ASYNC110 - the node runs in this loop
        await asyncio.sleep(0)
    await link.close()
    assert reasons(await told(call)) == {Reason.CONNECTION}
    (talk,) = opened
    assert talk._transport is not None
    assert talk._transport.is_closing()


@pytest.mark.parametrize("turns", range(12))
async def test_a_close_at_any_moment_of_the_greeting_is_the_last(node: Node, turns: int) -> None:
    """With calls that wait: all are told, nothing is opened after it, nothing stays open."""
    opened: list[RespProtocol] = []

    class Kept(Target, frozen=True):
        async def connect(self, make: "Callable[[], RespProtocol]", route: Route) -> RespProtocol:
            opened.append(await super().connect(make, route))
            return opened[-1]

    link = PipelinedConnection(Kept("127.0.0.1", node.port, password=Secret("p"), db=3), 5.0)
    calls = [link.send(PING)]
    while not node.pieces:  # noqa: ASYNC110 - the node runs in this loop
        await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
        calls.append(link.send(PING))
    await link.close()
    await told(*calls)
    for _ in range(20):
        await asyncio.sleep(0)
    assert all(talk._transport is not None and talk._transport.is_closing() for talk in opened)
    assert (node.connections, link._opening) == (1, None)


@pytest.mark.parametrize("before", [True, False])
async def test_a_call_at_the_end_opens_no_connection(node: Node, before: bool) -> None:
    """In the same turn as the close, or after it: it fails, and nobody is called any more."""
    link = PipelinedConnection(Target("127.0.0.1", node.port), 5.0)
    if before:
        call = link.send(PING)
        await link.close()
    else:
        await link.close()
        call = link.send(PING)
    assert reasons(await told(call)) == {Reason.CONNECTION}
    for _ in range(3):
        await asyncio.sleep(0)
    assert link._opening is None
    assert node.connections == 0


async def test_a_conversation_that_was_over_is_told_to_who_opens_it(node: Node) -> None:
    """Its end came before the link knew of it: it must not wait for ever behind a dead one."""

    class Gone(Target, frozen=True):
        async def connect(self, make: "Callable[[], RespProtocol]", route: Route) -> RespProtocol:
            talk = await super().connect(make, route)
            talk.close()
            await asyncio.sleep(0.01)
            return talk

    link = PipelinedConnection(Gone("127.0.0.1", node.port), TIMEOUT)
    for _ in range(2):
        assert reasons(await told(link.send(PING))) == {Reason.CONNECTION}
    link.target = Target("127.0.0.1", node.port)
    assert await told(link.send(PING)) == [b"OK"]
    await link.close()


async def test_a_reply_without_end_ends_the_connection(
    node: Node, link: PipelinedConnection
) -> None:
    """Memory is bounded whatever a server says: a mebibyte of one reply is none of ours."""
    node.answer = lambda _piece: b"$999999999\r\n" + b"x" * (LONGEST_REPLY + 1)
    assert reasons(await told(link.send(PING))) == {Reason.OTHER}
    node.answer = lambda _piece: b"$%d\r\n%b\r\n" % (2**19, b"x" * 2**19)
    for _ in range(4):  # each is whole, so none adds to the next
        assert await told(link.send(PING)) == [b"x" * 2**19]


@pytest.mark.parametrize("name", BAD)
async def test_S1_a_reply_that_is_none_of_this_command_fails_and_is_not_waited_for(
    node: Node, link: PipelinedConnection, name: str
) -> None:
    """In the shape of the command or as the store's failure, in time; the next good one is good."""
    good = b"*2\r\n:1\r\n:7\r\n"
    node.answer = lambda piece: good * piece.count(b"PING")
    assert await told(link.send(PING, SPEND)) == [[1, 7]]
    ill = BAD[name]
    node.answer = lambda piece: (ill.said + (good if ill.before else b"")) * piece.count(b"PING")
    results = await told(*(link.send(PING, SPEND) for _ in range(3)))
    for each in results:
        assert isinstance(each, StoreFailed | NoScript | Redirect) or SPEND.fits(each), each
    node.answer = lambda piece: good * piece.count(b"PING")
    for _ in range(2):
        with suppress(StoreFailed):  # what was sent before it was well may end one connection
            await link.send(PING, SPEND)
    assert await told(link.send(PING, SPEND)) == [[1, 7]]


async def test_S1_those_behind_a_reply_of_another_shape_get_no_strangers(
    node: Node, link: PipelinedConnection
) -> None:
    """One word too many: every later reply of the batch would be its neighbour's."""
    node.answer = lambda _piece: b"+OK\r\n" + b"".join(b":%d\r\n" % n for n in range(9))
    results = await told(*(link.send(PING, COUNTED) for _ in range(10)))
    assert reasons(results) == {Reason.OTHER}
    assert isinstance(results[0], StoreFailed)
    assert results[0].detail == "another reply than DEL, HDEL, PUBLISH: number"
    node.answer = lambda _piece: b":5\r\n"
    assert await told(link.send(PING, COUNTED)) == [5]
    assert node.connections == 2


async def test_S1_what_nobody_asked_for_ends_the_connection(
    node: Node, link: PipelinedConnection
) -> None:
    """Also the beginning of it: the next reply would be taken for its rest."""
    assert await told(link.send(PING)) == [b"OK"]
    for connections, unasked in ((2, b"*2\r\n"), (3, b"$5\r\nab"), (4, b":1"), (5, b":1\r\n")):
        node._writers[-1].write(unasked)
        await asyncio.sleep(0.05)
        with suppress(StoreFailed):
            await link.send(PING)
        assert await told(link.send(PING)) == [b"OK"]
        assert node.connections == connections


@pytest.mark.parametrize("said", [b":1", b"$-1", b"-NOSCRIPT x", b"-MOVED 1 host:1", b">1\r\n:1"])
async def test_S1_who_is_let_in_otherwise_than_with_OK_is_not(node: Node, said: bytes) -> None:
    """Whoever says that is no server of ours; callers are told in time."""
    link = PipelinedConnection(Target("127.0.0.1", node.port, password=Secret("p")), TIMEOUT)
    node.answer = lambda _piece: said + b"\r\n"
    assert reasons(await told(link.send(PING))) == {Reason.OTHER}
    node.answer = lambda _piece: b"+OK\r\n"
    assert await told(link.send(PING)) == [b"OK"]
    await link.close()


@pytest.mark.parametrize(
    "target",
    [
        Target("127.0.0.1", 99_999),
        Target("127.0.0.1", -1),
        Target("a\0b", 1),
        Target("." * 300, 1),
        Target("x" * 80, 1),
        Target(path="/\0"),
    ],
)
async def test_S1_nobody_is_reached_by_what_is_no_address(target: Target) -> None:
    """A cluster's word is not always one: told at once, and nothing is left behind."""
    link = PipelinedConnection(target, 5.0)
    began = time.monotonic()
    assert reasons(await told(link.send(PING))) == {Reason.CONNECTION}
    assert time.monotonic() - began < 4
    await link.close()


async def test_why_there_is_no_connection_is_told(node: Node) -> None:
    """In the system's words, or the certificate's, and nothing of what would have been sent."""
    free = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
    port = free.sockets[0].getsockname()[1]
    free.close()
    await free.wait_closed()
    targets = {
        "Connection refused": Target("127.0.0.1", port),
        "No such file or directory": Target(path="/nowhere/socket"),
        "WRONG_VERSION_NUMBER": Target("127.0.0.1", node.port, tls=ssl.create_default_context()),
    }
    node.answer = lambda _piece: b"HTTP/1.1 400 Bad Request\r\n\r\n"
    for detail, target in targets.items():
        link = PipelinedConnection(target, 2.0)
        (failed,) = await told(link.send(PING))
        assert isinstance(failed, StoreFailed)
        assert (failed.reason, failed.detail) == (Reason.CONNECTION, detail)
        await link.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("Multiple exceptions: [Errno 111] ..., ..."), "OSError"),
        (OSError(113, "No route to host"), "No route to host"),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (ssl.SSLError(), "TLS"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_failed_connection_has_words(error: Exception, words: str) -> None:
    """Also where the system gives none."""
    assert why(error) == words


@pytest.mark.parametrize("where", ["follow", "talk"])
async def test_a_connection_that_cannot_be_used_is_closed(
    node: Node, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Its peer may be gone before anybody has asked for its name: nothing is left open."""
    route, sockets = Route(), list[socket.socket]()
    start = aiohappyeyeballs.start_connection

    async def noted(*given: Any, **named: Any) -> socket.socket:
        sockets.append(await start(*given, **named))
        return sockets[-1]

    def fail(*_: object) -> None:
        raise ConnectionResetError

    def make() -> RespProtocol:
        raise ConnectionResetError

    monkeypatch.setattr(aiohappyeyeballs, "start_connection", noted)
    if where == "follow":
        monkeypatch.setattr(route, "follow", fail)
    with pytest.raises(ConnectionResetError):
        await Target("127.0.0.1", node.port).connect(make, route)
    assert [each.fileno() for each in sockets] == [-1]


def test_an_address_that_was_of_no_use_is_tried_last() -> None:
    """The others keep their order; the next one that is avoided takes its place."""
    found = [(0, 0, 0, "", (f"10.0.0.{n}", 6379)) for n in range(3)]
    route = Route()
    assert route.order(found) == found
    for n, order in ((0, [1, 2, 0]), (1, [0, 2, 1])):
        route.follow(found[n][4])
        assert route.order(found) != [found[each] for each in order]
        route.avoid()
        assert route.order(found) == [found[each] for each in order]


@pytest.mark.parametrize(
    ("said", "avoided"), [(b"", True), (b"-READONLY x\r\n", True), (None, False)]
)
async def test_N16_a_server_that_is_silent_or_the_wrong_one_is_tried_last(
    node: Node, link: PipelinedConnection, said: bytes | None, *, avoided: bool
) -> None:
    """Of a name with several addresses; one whose connection broke may be the right one."""
    assert await told(link.send(PING)) == [b"OK"]
    assert link._route._avoided is None
    node.answer = lambda _piece: said
    await told(link.send(PING))
    while link._talk is not None:  # noqa: ASYNC110 - the end has to arrive
        await asyncio.sleep(0.001)
    assert link._route._avoided == (("127.0.0.1", node.port) if avoided else None)
