"""G8: what a vendor says without being asked is nobody's answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from relaying import AGENT, relaying, visitor

from broker.errors import SessionEnded
from broker.issuers.vendor.client import VendorClient
from broker.model import Outcome, Secret
from broker.sessions.admin import SessionAdmin
from broker.sessions.base import Place, Query
from broker.telemetry.cells import MetricLayout
from broker.telemetry.metrics import SessionMetrics
from broker.testing.vendor.faults import Fault
from broker.testing.vendor.replies import Answer, json_answer

KEY = Secret("a-key-of-this-test")

TURNS = 50
"""Of the event loop, in which what was sent has arrived at the client in the same loop."""


async def turns() -> None:
    """Let everybody in this loop read what has been sent."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


class Vendor:
    """Answers each call with its own body, then sends more on the connection; then sets `sent`."""

    def __init__(self, unasked: bytes) -> None:
        self._unasked = unasked
        self._serving: list[asyncio.Task[None] | None] = []
        self.sent = asyncio.Event()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Yield the base URL; the client must have hung up at the end."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            await asyncio.gather(*filter(None, self._serving))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.append(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + body)
                await turns()  # the client has it before the next bytes come
                writer.write(self._unasked)
                self.sent.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.sent.set()
        finally:
            writer.close()


@pytest.mark.parametrize(
    "unasked",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
        b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nev",
    ],
    ids=["an answer", "a time-out of the edge", "half an answer"],
)
async def test_G8_the_next_call_gets_its_own_answer(unasked: bytes) -> None:
    """An answer too many would be the next visitor's, with somebody else's token in it."""
    vendor = Vendor(unasked)
    async with vendor.listening() as url:
        client = VendorClient(url, 5.0)
        try:
            for body in (b"first", b"second", b"third"):
                answer = await client.mint(KEY, body, {})
                assert (answer.status, answer.body) == (200, body)
                await vendor.sent.wait()
                vendor.sent.clear()
                await turns()
        finally:
            await client.close()


@pytest.mark.parametrize("kept", ["token", "sid"])
async def test_G8_G9_an_answer_that_is_another_visitor_s_is_cached_for_nobody_else(
    kept: str,
) -> None:
    """A cache before the vendor, or a vendor that repeats itself.

    The second visitor is served, and asked for again each time: when the session is revoked, it is
    over for both.  (A token under a new session id each time has no name to be revoked by.)
    """
    first: dict[str, object] = {}

    def repeat(answer: Answer) -> Answer:
        said = msgspec.json.decode(answer.body)
        first.setdefault(kept, said["data"][kept])
        said["data"] |= first
        return json_answer(said)

    async with relaying() as relay:
        relay.vendor.fail(Fault(name="repeats", edit=repeat))
        mine, theirs = visitor(), visitor()
        held = await relay.request_token(mine)
        for calls in (2, 3):
            assert (await relay.request_token(theirs)).outcome is Outcome.MINTED
            assert relay.calls == calls
        assert (await relay.request_token(mine)).token == held.token
        if kept == "sid":
            (session,) = await relay.session_store.page(Query(agent=AGENT), Place(), 10)
            admin = SessionAdmin(relay.session_store, relay.store, SessionMetrics(MetricLayout()))
            assert await admin.end(session.session_id, visitor=False) == 1
            for each in (mine, theirs):
                assert isinstance(await relay.failure(each), SessionEnded)


async def test_G9_who_is_revoked_while_a_repeated_session_is_minted_gets_none() -> None:
    """Not cached, and not handed out either: the revocation came first."""
    first: dict[str, object] = {}
    revoked: list[asyncio.Task[None]] = []

    async with relaying() as relay:
        mine, theirs = visitor(), visitor()

        def repeat(answer: Answer) -> Answer:
            said = msgspec.json.decode(answer.body)
            if first:
                revoking = relay.store.revoke_visitor("web", theirs)
                revoked.append(asyncio.ensure_future(revoking))
            first.setdefault("sid", said["data"]["sid"])
            said["data"] |= first
            return json_answer(said)

        relay.vendor.fail(Fault(name="repeats", edit=repeat))
        await relay.request_token(mine)
        assert isinstance(await relay.failure(theirs), SessionEnded)
        await asyncio.gather(*revoked)
