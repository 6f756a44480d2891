"""Who mints a key, as this replica knows it: leases that it holds, and those it waits for.

A leader's lease is short, so that a leader that was killed is succeeded soon, and renewed as long
as the mint takes.  Who is told to wait is woken by the one who keeps or abandons, and looks again
by itself after a moment, in case that message was lost.
"""

import asyncio
import random

from typing_extensions import override

from broker.units import SECOND
from broker.valkey.client.errors import Reason, StoreFailed, number
from broker.valkey.client.guarded import Operation, StoreClient
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script, command
from broker.valkey.client.shapes import COUNTED
from broker.valkey.key_names import Names

LEASE = 3 * SECOND
"""Microseconds: so long others wait for a leader that was killed."""

RENEWAL = 1.0
"""Seconds between renewals of a lease: two may fail before it ends."""

LEASE_MEMORY = 120 * SECOND
"""Microseconds that a lease's fence is remembered: longer than any mint takes."""

ERROR_MEMORY = 2 * SECOND
"""Microseconds that those who wait can learn how a mint failed."""

RECHECK, RECHECK_JITTER = 0.25, 0.1
"""Seconds after which somebody who waits looks again by themselves."""

MOST_WOKEN = 1000
"""Replicas that are woken by one message each: far more than wait for one visitor."""


class Leases:
    """Leases by the names of their keys."""

    def __init__(self, server: StoreClient, names: Names) -> None:
        self._server = server
        self._names = names
        self._held: dict[bytes, int] = {}
        self._sleepers: dict[bytes, set[asyncio.Future[None]]] = {}

    def hold(self, name: bytes, fence: int) -> None:
        """Begin to renew a lease."""
        self._held[name] = fence

    def drop(self, name: bytes) -> None:
        """Renew it no longer."""
        self._held.pop(name, None)

    async def renew(self) -> None:
        """Renew every lease that is held: call it every `RENEWAL` seconds."""
        held = list(self._held.items())
        await asyncio.gather(
            *(self._renew(name, fence) for name, fence in held), return_exceptions=True
        )

    async def sleep(self, name: bytes, left: Reply) -> None:
        """Wait to be woken, for a moment, or until the lease has ended."""
        loop = asyncio.get_running_loop()
        sleeper: asyncio.Future[None] = loop.create_future()
        self._sleepers.setdefault(name, set()).add(sleeper)
        moment = RECHECK + random.random() * RECHECK_JITTER  # noqa: S311 - spreads, guards nothing
        moment = min(moment, number(left, LEASE) / SECOND + 0.001)
        timer = loop.call_later(moment, self.on_message, name)
        try:
            await sleeper
        finally:
            timer.cancel()
            sleepers = self._sleepers[name]
            sleepers.discard(sleeper)
            if not sleepers:
                del self._sleepers[name]

    def on_message(self, name: bytes) -> None:
        """Wake those who wait for this lease: its holder is done."""
        for sleeper in self._sleepers.get(name, ()):
            if not sleeper.done():
                sleeper.set_result(None)

    async def release(self, name: bytes, fence: int, error: bytes) -> None:
        """End a lease without a token; those who wait are told `error`, if it is not empty."""
        try:
            reply = await self._server.run(
                Operation.RELEASE,
                Script.ABANDON,
                (name,),
                b"%d" % fence,
                error,
                b"%d" % ERROR_MEMORY,
            )
            waiting = texts(reply)
        except StoreFailed:
            return  # counted; the lease ends by itself
        self.wake(waiting, name)

    def wake(self, waiting: list[bytes], name: bytes) -> None:
        """Tell these replicas that the holder is done; the others look by themselves."""
        for replica in waiting[:MOST_WOKEN]:
            channel = self._names.wake(replica)
            self._server.tell(
                Operation.RELEASE, channel, command(b"PUBLISH", channel, name), COUNTED
            )

    async def _renew(self, name: bytes, fence: int) -> None:
        length, memory = b"%d" % LEASE, b"%d" % LEASE_MEMORY
        await self._server.run(
            Operation.RENEW, Script.RENEW, (name,), b"%d" % fence, length, memory
        )

    def __len__(self) -> int:
        return len(self._held)

    @override
    def __repr__(self) -> str:
        return f"Leases(held={len(self._held)}, waiting={len(self._sleepers)})"


def texts(reply: Reply) -> list[bytes]:
    """Read a list of texts; raises StoreFailed for anything else."""
    if not isinstance(reply, list):
        raise StoreFailed(Reason.OTHER)
    return [text for text in reply if isinstance(text, bytes)]
