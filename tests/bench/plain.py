"""What the broker is measured against: an aiohttp handler that only reads and answers.

    python plain.py uvloop|asyncio FOLDER

Serves every file of FOLDER: `hit.200` is the body that /hit answers with status 200.  Prints
its port, then runs until it is ended.
"""

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop
from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def answer(status: int, body: bytes) -> Handler:
    """Return a handler as one writes it: read the request, answer JSON."""

    async def handler(request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.Response(status=status, body=body, content_type="application/json")

    return handler


def main() -> None:
    """Serve until ended."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    app = web.Application()
    for file in folder.iterdir():
        app.router.add_route("*", f"/{file.stem}", answer(int(file.suffix[1:]), file.read_bytes()))
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    loop = uvloop.new_event_loop() if kind == "uvloop" else asyncio.new_event_loop()
    web.run_app(app, sock=listener, loop=loop, print=None)


if __name__ == "__main__":
    main()
