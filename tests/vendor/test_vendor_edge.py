"""N5, the vendor's half: what an edge adds to the answers, and what it would like to do."""

import asyncio

import pytest
from relaying import UNLIMITED, Relay, relaying

from broker.issuers.vendor.client import MAX_FIELD, MAX_FIELDS
from broker.testing import FakeVendor
from broker.testing.vendor.faults import Fault
from broker.testing.vendor.replies import Headers


def adding(headers: Headers) -> Fault:
    """Answer as usual, with these headers on top."""
    return Fault(name="headers", edit=lambda answer: answer.plus(headers))


def long(size: int) -> Headers:
    """One header whose name and value have `size` bytes."""
    name = "Content-Security-Policy"
    return ((name, "x" * (size - len(name))),)


def many(count: int) -> Headers:
    """So many headers."""
    return tuple((f"X-Edge-{number}", "v") for number in range(count))


@pytest.mark.parametrize(
    "headers",
    [long(8191), long(32 * 1024), long(MAX_FIELD), many(129), many(300), many(300) + long(30_000)],
    ids=["8 KB", "32 KB", "64 KB", "129", "300", "both"],
)
async def test_N5_headers_that_nobody_reads_cost_no_token(relay: Relay, headers: Headers) -> None:
    """A policy of 32 KB or 300 headers of an edge: the mint succeeds, at the first call."""
    relay.vendor.fail(adding(headers))
    await relay.request_token()
    assert relay.errors == {}
    assert relay.calls == 1


@pytest.mark.parametrize(
    "headers", [long(MAX_FIELD + 64), many(MAX_FIELDS + 1)], ids=["size", "count"]
)
async def test_N5_beyond_the_bound_the_error_says_so(relay: Relay, headers: Headers) -> None:
    """Not "not_json": whoever reads the log looks at the headers then; and no retry helps."""
    relay.vendor.fail(adding(headers))
    error = await relay.failure()
    assert (error.status, error.code) == (502, "UPSTREAM_UNAVAILABLE")
    assert error.message.endswith(": headers_too_large")
    assert relay.errors == {"headers_too_large": 1}
    assert relay.calls == 1


async def test_N5_an_edge_that_compresses_for_whoever_lets_it(relay: Relay) -> None:
    """The broker does not let it: an answer that it asked to have compressed, it would refuse."""
    await relay.request_token()
    assert relay.errors == {}


async def test_N5_the_fake_vendor_compresses_for_whoever_lets_it() -> None:
    """Or the test above would see nothing."""
    async with FakeVendor(UNLIMITED) as vendor:
        port = int(vendor.url.rpartition(":")[2])
        for accepted, packed in [("gzip", True), ("*", True), ("gzip;q=0", False), ("br", False)]:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"POST /v1/validate HTTP/1.1\r\nHost: v\r\nAccept-Encoding: {accepted}\r\n"
            writer.write(f"{head}Content-Length: 0\r\n\r\n".encode())
            answer = await reader.readuntil(b"\r\n\r\n")
            assert (b"Content-Encoding: gzip" in answer) is packed, accepted
            writer.close()


async def test_N5_no_cookie_of_an_edge_is_sent_back() -> None:
    """It would tie one visitor's mint to another's, and all of them to one of the edge's nodes.

    By a name: of an address no client would keep a cookie.
    """
    async with FakeVendor(UNLIMITED) as vendor:
        base_url = vendor.url.replace("127.0.0.1", "localhost")
        async with relaying(base_url=base_url, keys=[vendor.secret]) as relay:
            for _ in range(3):
                await relay.request_token()
        assert [call.cookie for call in vendor.journal.calls] == [None] * 3
