"""Bodies: counted while they arrive, in time, as they come."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator

import pytest
from edge import AGENT, TOKEN_PATH, Edge, Line, request, visitor

LIMIT = 8 * 1024


def body_of(size: int) -> bytes:
    """Write a good body of exactly this many bytes."""
    fields = {"agent_id": AGENT, "fingerprint": visitor(), "padding": ""}
    fields["padding"] = "x" * (size - len(json.dumps(fields)))
    return json.dumps(fields).encode()


def chunked(edge: Edge, *chunks: bytes, end: bool = True, path: str = TOKEN_PATH) -> bytes:
    """Write a request whose length is not announced, for a token if not for something else."""
    headers = [("api-secret", edge.secret), ("Transfer-Encoding", "chunked")]
    parts = [b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks]
    return request("POST", path, headers) + b"".join(parts) + (b"0\r\n\r\n" if end else b"")


@pytest.fixture
async def line(edge: Edge) -> AsyncIterator[Line]:
    """A connection to the broker."""
    line = await edge.connect()
    yield line
    await line.close()


class TestSize:
    async def test_8_kib_and_not_a_byte_more(self, edge: Edge) -> None:
        """With an announced length and without."""
        assert (await edge.post(body_of(LIMIT))).status == 200
        assert (await edge.post(body_of(LIMIT + 1))).code == "PAYLOAD_TOO_LARGE"
        assert (await edge.raw(chunked(edge, body_of(LIMIT)))).status == 200
        assert (await edge.raw(chunked(edge, body_of(LIMIT + 1)))).code == "PAYLOAD_TOO_LARGE"

    async def test_a_head_that_came_before_brings_no_more(self, edge: Edge) -> None:
        """O3: however often one announces too much, what it announces is refused."""
        for _ in range(5):
            assert (await edge.post(body_of(LIMIT + 1))).code == "PAYLOAD_TOO_LARGE"

    async def test_many_small_chunks_are_counted_together(self, edge: Edge) -> None:
        """A chunk is no new allowance."""
        body = body_of(LIMIT)
        pieces = [body[n : n + 100] for n in range(0, LIMIT, 100)]
        assert (await edge.raw(chunked(edge, *pieces))).status == 200
        assert (await edge.raw(chunked(edge, *pieces, b" "))).code == "PAYLOAD_TOO_LARGE"

    async def test_the_answer_comes_before_the_body_has_ended(self, edge: Edge, line: Line) -> None:
        """A gigabyte is announced: 413 as soon as the first 8 KiB are there, then the end."""
        head = request(
            "POST", TOKEN_PATH, [("api-secret", edge.secret), ("Content-Length", str(2**30))]
        )
        line.send(head + b"x" * (LIMIT + 1))
        reply = await line.answer()
        assert (reply.status, reply.code) == (413, "PAYLOAD_TOO_LARGE")
        assert reply.header("Connection") == "close"
        await line.close()

    async def test_what_follows_a_too_large_body_is_not_a_request(
        self, edge: Edge, line: Line
    ) -> None:
        """Its rest cannot smuggle: nothing after it is answered."""
        line.send(chunked(edge, b"x" * (LIMIT + 1), b"y" * LIMIT) + request("GET", "/livez"))
        assert (await line.answer()).status == 413
        assert await line.rest() == b""
        await line.close()


class TestArrival:
    async def test_a_body_may_come_in_pieces(self, edge: Edge, line: Line) -> None:
        """Byte by byte, cut anywhere, in the middle of a character too."""
        data = edge.asking(model="é")
        for n in range(len(data)):
            line.send(data[n : n + 1])
            await line.writer.drain()
        assert (await line.answer()).status == 200
        await line.close()

    async def test_expect_100_continue_is_answered(self, edge: Edge, line: Line) -> None:
        """Some clients wait for it before they send any body."""
        data = edge.asking(headers=[("Expect", "100-continue")])
        head, _, body = data.partition(b"\r\n\r\n")
        line.send(head + b"\r\n\r\n")
        assert await line.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.send(body)
        assert (await line.answer()).status == 200
        await line.close()

    async def test_expect_is_not_continued_for_http_1_0(self, edge: Edge, line: Line) -> None:
        """Which knows no 100 and would take it for the answer (RFC 9110 section 10.1.1)."""
        data = edge.asking(headers=[("Expect", "100-continue")])
        head, _, body = data.replace(b"HTTP/1.1", b"HTTP/1.0", 1).partition(b"\r\n\r\n")
        line.send(head + b"\r\n\r\n")
        await asyncio.sleep(0.05)  # in which a 100 would be sent
        line.send(body)
        assert (await line.answer()).status == 200
        await line.close()

    async def test_expect_is_not_continued_for_a_stranger(self, edge: Edge, line: Line) -> None:
        """Whose secret is unknown is refused before the body is asked for."""
        data = edge.asking(secret="x" * 20, headers=[("Expect", "100-continue")])
        line.send(data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
        assert (await line.answer()).status == 401
        await line.close()

    async def test_O0_a_half_sent_body_is_408_in_time(
        self, edge: Edge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Held open without an end: answered, closed, counted as the caller's fault."""
        monkeypatch.setattr("broker.web.body.BODY_TIMEOUT", 0.03)
        monkeypatch.setattr("broker.web.connection.LINGER", 0.03)
        line = await edge.connect()
        line.send(edge.asking()[:-10])
        reply = await line.answer()
        assert (reply.status, reply.reason) == (408, "Request Timeout")
        assert reply.code == "REQUEST_TIMEOUT"
        assert reply.message == "body: did not arrive within 0.03 s"
        assert reply.header("Connection") == "close"
        assert await line.rest() == b""
        await line.close()
        assert (await edge.scrape())['broker_requests_total{outcome="invalid"}'] == 1

    async def test_O0_a_client_that_hangs_up_leaves_nothing_behind(
        self, edge: Edge, line: Line
    ) -> None:
        """No answer, no line in the log, no request counted."""
        before = edge.log.getvalue()
        line.send(edge.asking()[:-10])
        await line.writer.drain()
        assert (await edge.get("/livez")).status == 200  # the half request has been read
        line.writer.transport.abort()
        assert (await edge.get("/livez")).status == 200
        assert edge.log.getvalue() == before
        scraped = await edge.scrape()
        assert sum(n for name, n in scraped.items() if "requests_total" in name) == 0


class TestEncodings:
    @pytest.mark.parametrize(
        "encoding",
        ["gzip", "GZIP", "deflate", "br", "zstd", "identity, gzip", "x", "gzip,identity"],
    )
    async def test_O3_an_encoded_body_is_415(self, edge: Edge, encoding: str) -> None:
        """It is not unpacked, so a kilobyte stays one."""
        bomb = gzip.compress(b" " * 5_000_000)[:LIMIT]
        reply = await edge.post(bomb, headers=[("Content-Encoding", encoding)])
        assert (reply.status, reply.code) == (415, "UNSUPPORTED_TYPE")

    @pytest.mark.parametrize("path", ["/v1/introspect", "/v1/revoke"])
    async def test_O3_an_encoded_form_is_415(self, edge: Edge, path: str) -> None:
        """A token that is asked about is read as it stands, or not at all."""
        token = (await edge.request_token()).token
        form = f"token={token}".encode()
        reply = await edge.post(form, path=path, headers=[("Content-Encoding", "gzip")])
        assert (reply.status, reply.code) == (415, "UNSUPPORTED_TYPE")
        assert (await edge.post(form, path="/v1/introspect")).json["active"] is True

    async def test_identity_is_no_encoding(self, edge: Edge) -> None:
        """RFC 9110 section 8.4.1 reserves the word for "none"."""
        assert (await edge.request_token(headers=[("Content-Encoding", "Identity")])).status == 200

    async def test_O3_bytes_of_gzip_without_the_header_are_malformed_json(self, edge: Edge) -> None:
        """Nothing is guessed from the content."""
        reply = await edge.post(gzip.compress(b'{"agent_id":"a","fingerprint":"abcd"}'))
        assert (reply.status, reply.code) == (400, "VALIDATION_ERROR")


class TestBrokenTransfers:
    @pytest.mark.parametrize(
        "tail",
        [
            b"zz\r\nabc\r\n0\r\n\r\n",
            b"-1\r\nabc\r\n0\r\n\r\n",
            b"3\r\nabcdef\r\n0\r\n\r\n",
            b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n",
            b"3\nabc\r\n0\r\n\r\n",
            b"3 \r\nabc\r\n0\r\n\r\n",
            b"0x3\r\nabc\r\n0\r\n\r\n",
        ],
    )
    async def test_O3_broken_chunks_are_400(self, edge: Edge, line: Line, tail: bytes) -> None:
        """Whether they break at once or while the body is being read."""
        line.send(chunked(edge, end=False) + tail)
        reply = await line.answer()
        assert (reply.status, reply.code) == (400, "VALIDATION_ERROR")
        assert await line.rest() == b""
        await line.close()

    @pytest.mark.parametrize("path", [TOKEN_PATH, "/v1/introspect", "/v1/revoke"])
    async def test_O3_a_body_that_breaks_later_is_400_at_once(
        self, edge: Edge, line: Line, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first chunk is good and read; what follows is not HTTP, so the rest never comes."""
        monkeypatch.setattr("broker.web.body.BODY_TIMEOUT", 3600)
        line.send(chunked(edge, b"{", end=False, path=path))
        await line.writer.drain()
        assert (await edge.get("/livez")).status == 200
        line.send(b"nonsense\r\n")
        async with asyncio.timeout(30):
            reply = await line.answer()
        assert (reply.status, reply.code) == (400, "VALIDATION_ERROR")
        assert "broken transfer" in reply.body.decode()
        assert reply.header("Connection") == "close"
        assert await line.rest() == b""

    async def test_O3_a_client_that_sends_on_after_its_body_broke_sees_the_answer(
        self, edge: Edge, line: Line
    ) -> None:
        """A close at once would reset the connection, and the answer could be lost with it."""
        line.send(chunked(edge, b"{", end=False))
        await line.writer.drain()
        assert (await edge.get("/livez")).status == 200
        for _ in range(20):
            line.send(b"nonsense\r\n" * 1000)
            assert (await edge.get("/livez")).status == 200
        reply = await line.answer()
        assert (reply.status, reply.code) == (400, "VALIDATION_ERROR")
        assert await line.rest() == b""

    async def test_O3_a_refused_body_that_breaks_is_no_defect(
        self, edge: Edge, line: Line, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It is answered already, and only drained."""
        line.send(chunked(edge, b"x" * (LIMIT + 1), end=False))
        assert (await line.answer()).code == "PAYLOAD_TOO_LARGE"
        line.send(b"nonsense\r\n")
        assert await line.rest() == b""
        assert "broker.defect" not in "".join(capsys.readouterr())
