"""What a hit cannot cost less than: the broker's connections with one ready answer.

    python floor.py FOLDER

Everything before and behind the route is the broker's own: event loop, listener, connection, heads
that were read before, the bytes' way out.  The route returns what `hit.200` of FOLDER holds, under
a head of a hit's length, and decides nothing.  Prints its port, then runs until it is ended.
"""

import asyncio
import socket
import sys
from pathlib import Path

import uvloop
from cpu import PATH
from profile_lane import Bench

from broker.web.response import JSON_TYPE, Answer, head
from broker.web.whole_request import Request

LIMIT_LINES = (
    "Cache-Status: embed-token-broker; hit\r\nX-RateLimit-Limit: 1000000\r\n"
    'RateLimit-Policy: "fingerprint";q=1000000;w=1\r\nX-RateLimit-Remaining: 999998\r\n'
    'X-RateLimit-Reset: 1700000000\r\nRateLimit: "fingerprint";r=999998;t=1\r\n'
)
"""As long as those of a hit: more bytes cost the kernel more."""


async def serve(body: bytes) -> None:
    """Serve until ended."""
    bench = Bench()
    date = "Thu, 01 Jan 1970 00:00:00 GMT"
    start = (head(200, len(body), JSON_TYPE, "0" * 32, date) + LIMIT_LINES).encode()

    def fixed(request: Request, _request_id: str) -> Answer:
        request.facts = True  # type: ignore[union-attr]  # the head may be known
        return Answer(200, start, body)

    bench.parts.routes.add_to_lane(PATH, "POST", fixed)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    server = await asyncio.get_running_loop().create_server(bench.parts.server, sock=listener)
    await server.serve_forever()


def main() -> None:
    """Serve what a hit was answered."""
    body = (Path(sys.argv[1]) / "hit.200").read_bytes()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(body))


if __name__ == "__main__":
    main()
