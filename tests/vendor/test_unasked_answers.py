"""G8: what a vendor says without being asked is nobody's answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from broker.issuers.vendor_client import VendorClient
from broker.model import Secret

KEY = Secret("a-key-of-this-test")

TURNS = 50
"""Of the event loop, in which what was sent has arrived at the client in the same loop."""


@asynccontextmanager
async def vendor_that_adds(unasked: bytes) -> AsyncIterator[str]:
    """Answer each call with its own body, then send this on the idle connection."""

    serving: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + body)
                await turns()  # the client has it before the next bytes come
                writer.write(unasked)
                sent.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            sent.set()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*filter(None, serving))  # their client has gone


sent = asyncio.Event()


async def turns() -> None:
    """Let everybody in this loop read what has been sent."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


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
    sent.clear()
    async with vendor_that_adds(unasked) as url:
        client = VendorClient(url, 5.0)
        try:
            for body in (b"first", b"second", b"third"):
                answer = await client.mint(KEY, body, {})
                assert (answer.status, answer.body) == (200, body)
                await sent.wait()
                sent.clear()
                await turns()
        finally:
            await client.close()
