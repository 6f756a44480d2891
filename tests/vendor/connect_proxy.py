"""An egress proxy as sites have them: CONNECT and nothing else, over plain TCP or TLS."""

import asyncio
import ssl
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self


class ConnectProxy:
    """Opens tunnels to the ports that it knows by name; other names get its 502.

    With `user` ("name:password") a caller has to say it, or gets 407.  `asked` are the request
    lines it saw, `through` the bytes that went out to vendors: ciphertext, if all is well.
    """

    def __init__(
        self,
        ports: Mapping[str, int],
        *,
        user: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._ports = ports
        self._expected = None if user is None else b"Basic " + b64encode(user.encode())
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()
        self.asked: list[str] = []
        self.through = bytearray()

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.address}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._tunnel(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _tunnel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        self.asked.append(first.decode())
        headers = dict(line.split(b": ", 1) for line in lines if line)
        method, target, _ = first.decode().split()
        if self._expected is not None and headers.get(b"Proxy-Authorization") != self._expected:
            refusal = b"407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=x"
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % refusal)
            return
        if method != "CONNECT" or target not in self._ports:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        there, back = await asyncio.open_connection("127.0.0.1", self._ports[target])
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._copy(reader, back, self.through))
                both.create_task(self._copy(there, writer, bytearray()))
        except* OSError:
            pass
        finally:
            back.close()

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: bytearray
    ) -> None:
        while data := await reader.read(65_536):
            seen += data
            writer.write(data)
            await writer.drain()
        writer.close()

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
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
