"""A server that never ends its answer: as a vendor, an edge before it, or a proxy on the way."""

import asyncio
import ssl
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

from broker.telemetry.labels import Reason

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
TURNS = 50
"""Of the event loop, in which a client in the same loop has read what was sent."""

EARLY = b"HTTP/1.1 103 Early Hints\r\n\r\n"


class Flood(NamedTuple):
    """What comes once, what comes for ever after it, and how a call that meets it ends.

    `has_head` says whether the head of an answer arrives; `pause` is seconds between two parts.
    """

    name: str
    first: bytes
    then: bytes
    reason: Reason
    has_head: bool = False
    pause: float | None = None


def _long(line: bytes, size: int = 65_536) -> bytes:
    return line * (size // len(line))


HEADS = [
    Flood("103", b"", _long(EARLY), Reason.HEADERS_TOO_LARGE),
    Flood("100", b"", _long(b"HTTP/1.1 100 Continue\r\n\r\n"), Reason.HEADERS_TOO_LARGE),
    Flood("102", b"", _long(b"HTTP/1.1 102 P\r\nA: b\r\n\r\n"), Reason.HEADERS_TOO_LARGE),
    Flood("199", b"", _long(b"HTTP/1.1 199 ?\r\n\r\n"), Reason.HEADERS_TOO_LARGE),
    Flood("trickled", b"", EARLY, Reason.HEADERS_TOO_LARGE, pause=0.01),
    Flood("with an answer", EARLY * 20 + CHUNKED, b"1\r\n \r\n", Reason.HEADERS_TOO_LARGE,
          has_head=True, pause=0.01),
    Flood("fat", b"", EARLY[:-2] + b"Link: </x>\r\n" * 400 + b"\r\n", Reason.HEADERS_TOO_LARGE),
    Flood("long lines", HEAD, b"X-A: " + b"y" * 60_000 + b"\r\n", Reason.HEADERS_TOO_LARGE),
    Flood("many lines", HEAD, _long(b"Set-Cookie: a=b; Path=/; Secure\r\n"),
          Reason.HEADERS_TOO_LARGE),
    Flood("a line", HEAD + b"X-A: ", b"y" * 65_536, Reason.HEADERS_TOO_LARGE),
    Flood("empty lines", b"", _long(b"\r\n"), Reason.HEADERS_TOO_LARGE),
]  # fmt: skip
"""Floods before the head of an answer, or instead of one."""

BODIES = [
    Flood("chunks", CHUNKED, _long(b"1\r\n \r\n"), Reason.TOO_LARGE, has_head=True),
    Flood("zeros", CHUNKED, b"0" * 65_536, Reason.TOO_LARGE, has_head=True),
    Flood("an extension", CHUNKED + b"2;", b"e" * 65_536, Reason.TOO_LARGE, has_head=True),
    Flood("extensions", CHUNKED, (b"1;" + b"e" * 2000 + b"\r\n \r\n") * 30, Reason.TOO_LARGE,
          has_head=True),
    Flood("trailers", CHUNKED + b"2\r\n{}\r\n0\r\n", b"X-A: " + b"y" * 60_000 + b"\r\n",
          Reason.TOO_LARGE, has_head=True),
    Flood("a trailer", CHUNKED + b"2\r\n{}\r\n0\r\nX-A: ", b"y" * 65_536, Reason.RESET,
          has_head=True),
    Flood("blank chunks", CHUNKED, _long(b"\r\n"), Reason.RESET, has_head=True),
]  # fmt: skip
"""Floods behind the head of an answer, in what frames its body."""


class FloodServer:
    """Answers every request with `flood`; with `at_once`, before there is one.

    `calls` are the connections that came, `over` those that the other end has hung up on.
    """

    def __init__(
        self, flood: Flood, *, tls: ssl.SSLContext | None = None, at_once: bool = False
    ) -> None:
        self._flood = flood
        self._tls = tls
        self._at_once = at_once
        self._serving: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}
        self.calls = 0
        self.over = 0
        self.most = 0

    @property
    def port(self) -> int:
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving[writer] = asyncio.current_task()
        self.calls += 1
        try:
            if not self._at_once:
                await reader.readuntil(b"\r\n\r\n")
            await self._pour(writer)
        except (OSError, asyncio.IncompleteReadError):
            self.over += 1
        finally:
            writer.transport.abort()

    async def _pour(self, writer: asyncio.StreamWriter) -> None:
        sent = 0
        for part in self._parts():
            writer.write(part)
            await writer.drain()
            for _ in range(TURNS if sent == 0 else 1):
                await asyncio.sleep(0)
            if writer.is_closing():  # over TLS, a write to it is dropped in silence
                raise ConnectionResetError
            sent += len(part)
            self.most = max(self.most, sent)
            if self._flood.pause is not None:
                await asyncio.sleep(self._flood.pause)

    def _parts(self) -> Iterator[bytes]:
        yield self._flood.first
        while True:
            yield self._flood.then

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.close()
        for writer in self._serving:
            writer.transport.abort()
        await asyncio.gather(*filter(None, self._serving.values()))
        await self.server.wait_closed()
