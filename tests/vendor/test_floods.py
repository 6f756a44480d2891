"""V4: an answer that never ends, of the vendor or of an edge before it, costs one call.

Not the event loop, not the memory, not the slot of the budget, and no key.
"""

import asyncio
from pathlib import Path

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler
from aiohttp.streams import DataQueue
from flooding import BODIES, CHUNKED, EARLY, HEAD, HEADS, Flood, FloodServer
from processes import Broker, Caller, good, merged, secret_in, until
from relaying import relaying, visitor

from broker.issuers.vendor import calls
from broker.issuers.vendor.api import MAX_BODY
from broker.issuers.vendor.client import VendorClient
from broker.issuers.vendor.connection import (
    MAX_HEADS,
    MAX_INTERIM,
    VendorConnection,
    VendorConnector,
)
from broker.model import Secret
from broker.telemetry.labels import Reason

BUFFERS = 20_000_000
"""Bytes that the kernel takes from a sender whose receiver reads nothing more, and then some."""

TIMEOUT = 60.0
"""Seconds after which something that should happen is taken not to: machines are busy."""

PROMPT = 5.0
"""Seconds in which a broker that is not held up has answered a probe, on a busy machine."""

KEY = Secret("a-key-of-this-test")


@pytest.mark.parametrize("flood", HEADS + BODIES, ids=lambda flood: flood.name)
async def test_V4_an_answer_without_end_is_a_failure_with_a_name(flood: Flood) -> None:
    """The caller is told at once; the connection ends; the slot is free; no key is blamed."""
    async with (
        FloodServer(flood) as vendor,
        relaying(base_url=vendor.url, timeout=TIMEOUT) as relay,
    ):
        error = await relay.failure(timeout=TIMEOUT)
        assert (error.status, error.code) == (502, "UPSTREAM_UNAVAILABLE")
        assert set(relay.errors) == {flood.reason.value}
        assert relay.errors[flood.reason.value] == vendor.calls
        assert vendor.calls == (2 if flood.reason is Reason.RESET else 1)
        assert not relay.issuer.credentials.is_open
        assert relay.paused_for == 0
        assert relay.pacer._slots.outstanding == 0
        assert len(relay.issuer._calls) == 0
        await until(lambda: vendor.over == vendor.calls)
        assert vendor.most < BUFFERS


@pytest.mark.parametrize("flood", HEADS + BODIES, ids=lambda flood: flood.name)
async def test_N13_a_call_has_arrived_when_there_is_the_head_of_an_answer(flood: Flood) -> None:
    """An interim one is none: it says nothing of the call, and would free the slot too soon."""
    heads: list[int] = []
    async with FloodServer(flood) as vendor:
        client = VendorClient(vendor.url, TIMEOUT)
        try:
            with pytest.raises(Exception, match=flood.reason.value):
                await client.mint(KEY, b"{}", {}, lambda: heads.append(1))
        finally:
            await client.close()
    assert len(heads) == flood.has_head


@pytest.mark.parametrize("flood", HEADS[:1] + BODIES[:1], ids=lambda flood: flood.name)
async def test_V4_what_comes_before_there_is_a_request(flood: Flood) -> None:
    """A server that talks first, and does not stop."""
    async with (
        FloodServer(flood, at_once=True) as vendor,
        relaying(base_url=vendor.url, timeout=TIMEOUT) as relay,
    ):
        assert (await relay.failure(timeout=TIMEOUT)).status == 502
        assert set(relay.errors) <= {flood.reason.value, "reset"}
        await until(lambda: vendor.over == vendor.calls)
        assert vendor.most < BUFFERS


async def test_V4_a_body_that_trickles_on_when_nobody_waits_ends_with_its_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer begins after the caller was told 504, and never ends: it has `LONGEST` in all."""
    monkeypatch.setattr(calls, "LONGEST", 1.0)
    told, over = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await told.wait()
        writer.write(CHUNKED)
        while not writer.is_closing():
            writer.write(b"1\r\n \r\n")
            await asyncio.sleep(0.01)
        over.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with relaying(base_url=base_url, timeout=0.1) as relay:
            assert (await relay.failure()).status == 504
            assert len(relay.issuer._calls) == 1
            told.set()
            async with asyncio.timeout(TIMEOUT):
                await over.wait()
            await until(lambda: len(relay.issuer._calls) == 0)
            assert relay.pacer._slots.outstanding == 0


@pytest.mark.parametrize(
    "more",
    ["Connection: Upgrade\r\nUpgrade: websocket\r\n", "", "Content-Length: 100\r\n"],
    ids=["upgrade", "bare", "length"],
)
async def test_V4_another_protocol_is_no_answer(more: str) -> None:
    """101 to a call that asked for nothing of the kind: a failure, and the connection ends."""
    head = f"HTTP/1.1 101 Switching Protocols\r\n{more}\r\n".encode()
    flood = Flood("101", head, b"x" * 65_536, Reason.UNEXPECTED_STATUS)
    async with (
        FloodServer(flood) as vendor,
        relaying(base_url=vendor.url, timeout=TIMEOUT) as relay,
    ):
        assert (await relay.failure(timeout=TIMEOUT)).status == 502
        assert relay.errors == {"unexpected_status": 1}
        await until(lambda: vendor.over == 1)


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"],
    ids=["200", "204"],
)
async def test_V4_answers_that_nobody_asked_for(head: bytes) -> None:
    """The first one is the answer; of the others, however many, nothing is kept."""
    async with FloodServer(Flood("", b"", head * 1000, Reason.RESET)) as vendor:
        client = VendorClient(vendor.url, TIMEOUT)
        try:
            answer = await client.mint(KEY, b"{}", {})
            assert answer.body == b""
            await until(lambda: vendor.over == 1)
        finally:
            await client.close()
    assert vendor.most < BUFFERS


@pytest.mark.parametrize(
    ("before", "body"),
    [
        (EARLY * MAX_INTERIM, b"{}"),
        (EARLY[:-2] + b"X-A: " + b"y" * 60_000 + b"\r\n\r\n", b"{}"),
        (b"", b" " * MAX_BODY),
    ],
    ids=["interim", "a large one", "body"],
)
async def test_V4_what_an_answer_may_have_is_read(before: bytes, body: bytes) -> None:
    """The bounds are not lower than they say: in one packet or a byte at a time."""
    lines = b"".join(b"X-%d: " % n + b"y" * 60_000 + b"\r\n" for n in range(3))
    framing = b"Content-Length: %d\r\n\r\n" % len(body)
    sent = before + HEAD + lines + framing + body
    assert len(before) + len(lines) < MAX_HEADS

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for start in range(0, len(sent), 1000):
            writer.write(sent[start : start + 1000])
            await writer.drain()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        client = VendorClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", TIMEOUT)
        try:
            answer = await client.mint(KEY, b"{}", {})
        finally:
            await client.close()
    assert (answer.status, answer.body) == (200, body)


@pytest.mark.parametrize("flood", [HEADS[0], BODIES[0]], ids=lambda flood: flood.name)
async def test_V4_a_flood_touches_nobody_else(tmp_path: Path, flood: Flood) -> None:
    """A whole broker: /livez answers in time while calls meet floods, and the memory stays."""
    async with FloodServer(flood) as vendor:
        upstream = {"base_url": vendor.url, "api_secret": KEY.reveal()}
        tree = merged(good(tmp_path), {"issuer": {"kind": "upstream", "upstream": upstream}})
        with await asyncio.to_thread(Broker.configured, tmp_path, tree) as broker:
            async with Caller(broker, secret_in(str(tmp_path / "web"))) as caller:
                await caller.ready()
                before = _most_memory(broker)
                asked = [
                    asyncio.create_task(caller.request_token(visitor(), agent=f"A{n}"))
                    for n in (1, 2)
                ]
                while not all(task.done() for task in asked):
                    async with asyncio.timeout(PROMPT):
                        async with caller.http.get(f"{broker.url}/livez") as answer:
                            assert answer.status == 200
                for task in asked:
                    status, body, _ = await task
                    assert status == 502
                    assert body["error"]["message"].endswith(f": {flood.reason.value}")
                assert _most_memory(broker) - before < 50_000


def _most_memory(broker: Broker) -> int:
    """Return the largest size that a broker ever had, in KiB."""
    status = Path(f"/proc/{broker.process.pid}/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0])


async def test_the_names_that_aiohttp_does_not_promise_are_what_they_were() -> None:
    """If this fails, a release has changed them: `vendor_connection` says which it needs."""
    plain = aiohttp.TCPConnector()
    ours = VendorConnector(60, lambda _: pytest.fail("nothing is connected here"))
    loop = asyncio.get_running_loop()
    try:
        assert plain._factory.func is ResponseHandler, "a connector's protocol is made elsewhere"
        assert type(ours._factory()) is VendorConnection
        assert type(plain._factory()) is ResponseHandler
        assert ResponseHandler.feed_data is DataQueue.feed_data, "heads go another way"
        assert "_payload" in vars(ResponseHandler(loop)), "the body has moved"
    finally:
        await plain.close()
        await ours.close()


async def test_heads_come_by_feed_data_and_bodies_by_payload() -> None:
    """What `VendorConnection` builds on, without a socket."""
    loop = asyncio.get_running_loop()
    connection = VendorConnection(loop)
    connection.set_response_params(read_bufsize=1024)
    connection.data_received(EARLY + CHUNKED + b"2\r\n{}\r\n")
    assert (connection._heads, len(connection)) == (2, 1)
    message, body = await connection.read()
    assert (message.code, connection._payload) == (200, body)
