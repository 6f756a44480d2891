"""What replicas tell each other: subscribe once, be called for each message, for ever.

Messages are hints.  Whoever waits for one looks again by itself after a while, so a message that
was lost while the server was away costs a moment, not an outcome.
"""

import asyncio
import math
from collections.abc import Callable, Sequence

from redis.exceptions import RedisError

from broker.stores.link import CONNECT_TIMEOUT
from broker.stores.nodes import Nodes
from broker.stores.scripts import command

RETRY = 1.0
"""Seconds between attempts to subscribe."""

Listener = Callable[[bytes, bytes], None]
"""Gets channel and message."""


async def listen(nodes: Nodes, channels: Sequence[bytes], heard: Listener) -> None:
    """Call `heard` for each message on the channels, until cancelled."""
    while True:
        connection = nodes.dedicated()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await connection.connect()  # type: ignore[no-untyped-call]  # has no annotations
                await connection.send_packed_command(command(b"SUBSCRIBE", *channels), False)  # noqa: FBT003 - no health check
            while True:
                reply = await connection.read_response(disable_decoding=True, timeout=math.inf)
                if isinstance(reply, list) and reply[0] == b"message":
                    heard(reply[1], reply[2])
                    await asyncio.sleep(0)  # a flood of messages must not keep requests waiting
        except (RedisError, OSError, TimeoutError):
            pass  # looked at again, with everything else, by whoever needs the store
        finally:
            await connection.disconnect(nowait=True)
        await asyncio.sleep(RETRY)
