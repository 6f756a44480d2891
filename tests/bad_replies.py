"""What a server, a proxy, or whoever sits between may say instead of a reply; and who says it."""

import asyncio
import random
from collections.abc import Callable, Mapping
from contextlib import suppress

from msgspec import Struct

from broker.valkey.client.errors import StoreFailed
from broker.valkey.client.resp import LONGEST_REPLY, Reader


class Ill(Struct, frozen=True):
    """What is said to one call; with `before` the true reply follows, in place of `after`."""

    said: bytes
    before: bool = False


def _garbage() -> bytes:
    return random.Random(7).randbytes(300)


BAD: Mapping[str, Ill] = {
    "a status": Ill(b"+OK\r\n"),
    "a number": Ill(b":1\r\n"),
    "nothing": Ill(b"$-1\r\n"),
    "no array": Ill(b"*-1\r\n"),
    "an empty text": Ill(b"$0\r\n\r\n"),
    "an empty array": Ill(b"*0\r\n"),
    "too short": Ill(b"*1\r\n:1\r\n"),
    "too long": Ill(b"*40\r\n" + b":1\r\n" * 40),
    "texts": Ill(b"*6\r\n" + b"$1\r\nx\r\n" * 6),
    "nothings": Ill(b"*6\r\n" + b"$-1\r\n" * 6),
    "arrays": Ill(b"*3\r\n" + b"*1\r\n:1\r\n" * 3),
    "large numbers": Ill(b"*2\r\n:1\r\n:9223372036854775807\r\n"),
    "negative numbers": Ill(b"*2\r\n:0\r\n:-9223372036854775808\r\n"),
    "numbers beyond 64 bits": Ill(b":99999999999999999999999\r\n"),
    "deep arrays": Ill(b"*1\r\n" * 10_000 + b":1\r\n"),
    "arrays without end": Ill(b"*1\r\n" * 10_000),
    "a huge array": Ill(b"*2147483647\r\n"),
    "huge arrays": Ill(b"*2147483647\r\n" * 100),
    "a huge text": Ill(b"$2147483647\r\nx"),
    "a large text without end": Ill(b"$%d\r\n" % LONGEST_REPLY + b"x" * 10_000),
    "a line without end": Ill(b"+" + b"x" * 100_000),
    "half a reply": Ill(b"*2\r\n:1\r\n:"),
    "silence": Ill(b""),
    "a push before the reply": Ill(b">2\r\n+invalidate\r\n*0\r\n", before=True),
    "a reply too many": Ill(b"+OK\r\n", before=True),
    "an attribute before the reply": Ill(b"|1\r\n+a\r\n:1\r\n", before=True),
    "half an array before the reply": Ill(b"*4\r\n:1\r\n", before=True),
    "a map": Ill(b"%1\r\n+a\r\n:1\r\n"),
    "a map whose key is a list": Ill(b"%1\r\n*1\r\n:1\r\n:2\r\n"),
    "a set": Ill(b"~2\r\n:1\r\n:2\r\n"),
    "a double": Ill(b",nan\r\n"),
    "doubles": Ill(b"*2\r\n,1.5\r\n,inf\r\n"),
    "a big number": Ill(b"(3492890328409238509324850943850943825024385\r\n"),
    "a verbatim text": Ill(b"=7\r\ntxt:abc\r\n"),
    "a truth": Ill(b"#t\r\n"),
    "garbage": Ill(_garbage()),
    "HTTP": Ill(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
    "an error": Ill(b"-ERR no\r\n"),
    "an error in an array": Ill(b"*2\r\n:1\r\n-ERR no\r\n"),
    "an error that is no text": Ill(b"-\xff\xfe \x00\r\n"),
    "a script unknown": Ill(b"-NOSCRIPT x\r\n"),
    "moved": Ill(b"-MOVED 1 127.0.0.1:1\r\n"),
    "moved to no port": Ill(b"-MOVED 1 127.0.0.1:99999\r\n"),
    "moved to no host": Ill("-MOVED 1 \0\u2603:1\r\n".encode()),
    "asked for no number": Ill("-ASK \u00b2 host:\u00b2\r\n".encode()),
}
"""By what they are."""


class Between:
    """A relay before a server that says what is true, or to some calls what is not.

    `ill` is said to the calls that `is_meant` says; None: to none.
    """

    def __init__(self, to: str) -> None:
        self._to = to
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.ill: Ill | None = None
        self.is_meant: Callable[[list[object]], bool] = lambda _call: True
        self.port = 0
        self.connections = 0
        self.said = 0

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Cut all connections."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        there, back = await asyncio.open_unix_connection(self._to)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen(there, writer))
                await self._pass_on(reader, writer, back)
                raise ConnectionResetError
        except* (ConnectionError, StoreFailed):
            pass
        finally:
            writer.close()
            back.transport.abort()  # a server that stands still would take what is left, one day
            with suppress(ConnectionError):
                await writer.wait_closed()
            self._tasks.discard(task)

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        back: asyncio.StreamWriter,
    ) -> None:
        calls = Reader()  # a call is an array of texts, as a reply may be
        while data := await reader.read(1 << 16):
            calls.feed(data)
            while isinstance(call := calls.take(), list):
                ill = self.ill if self.ill is not None and self.is_meant([*call]) else None
                if ill is not None:
                    self.said += 1
                    writer.write(ill.said)
                if ill is None or ill.before:
                    back.write(_packed(call))

    async def _listen(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await there.read(1 << 16):
            writer.write(data)
        raise ConnectionResetError


def _packed(call: list[object]) -> bytes:
    parts = [part if isinstance(part, bytes) else b"" for part in call]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts)
