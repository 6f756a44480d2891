"""Who else is there: a heartbeat a second, and what follows from it for a share.

Theory of operation.  A replica that loses the server goes on with its share of limits and budget,
one part in as many as it was told last.  The others must leave it that share, or a partition would
double the traffic to the vendor: so a member that falls silent is lost, not gone, and its share is
withheld (by the script) until it is back, says farewell, or is forgotten.  A process that is
started again in the same place takes the name of the one that died there, and its share with it.
A server that lost its memory is told by each replica whom it knew.
"""

import asyncio
import secrets
import time

import structlog
from typing_extensions import override

from broker.rules.reuse import SECOND
from broker.stores.failures import StoreFailed
from broker.stores.names import Names
from broker.stores.scripts import Script, command
from broker.stores.server import Operation, Server

log = structlog.get_logger()

HEARTBEAT = 1.0
"""Seconds between two."""

LOST = 3 * SECOND
"""Microseconds of silence after which a member is lost: two heartbeats may be late."""

FORGOTTEN = 3600 * SECOND
"""Microseconds after which it is forgotten: a machine that was lost for good costs its share of the
budget for an hour."""

ALONE_AFTER = 5.0
"""Seconds without the server until a replica spends its own share: the others have noticed."""

ALONE_FOR = FORGOTTEN / SECOND - 60.0
"""Seconds that it does so at most: then the others forget it, and have its share."""

UNSEEN_PARTS = 10
"""In how many parts the budget is divided by a process that has never seen the others: nobody has
told it a share, and of what a fleet leaves over several newcomers have to live."""

_MILLION = 1_000_000


class Fleet:
    """The members as they were last seen; `name` is this one's, the same after a restart.

    `fixed` is how many there are by configuration, None to count them; `workers` how many
    processes are kept beside this one, itself included.  `beats` is how often the others were told
    that this one is there.
    """

    def __init__(
        self, server: Server, names: Names, name: str, fixed: int | None, workers: int = 1
    ) -> None:
        self._server = server
        self._names = names
        self._name = name.encode()
        self._fixed = fixed
        self._drawn = secrets.token_hex(8).encode()
        self._said = False
        self._told: int | None = None
        self._workers = workers
        self._others: dict[bytes, int] = {}
        self._heard_at = -LOST
        self.withheld = 0.0
        self.beats = 0

    @property
    def parts(self) -> int:
        """In how many parts the budget is divided; one of them is this replica's share."""
        return self._fixed or self._told or UNSEEN_PARTS * self._workers

    @property
    def replicas(self) -> int:
        """By how many limits are divided; they need no part for newcomers."""
        if self._fixed is not None:
            return self._fixed
        return self._workers if self._told is None else max(self._told - 1, 1)

    @property
    def is_fixed(self) -> bool:
        """Whether the configuration says how many there are, so that a share holds for ever."""
        return self._fixed is not None

    @property
    def is_heard(self) -> bool:
        """Whether the server has answered a heartbeat lately."""
        return time.monotonic_ns() // 1000 - self._heard_at < LOST

    @property
    def is_member(self) -> bool:
        """Whether the others know of this replica."""
        return self._said

    async def run(self) -> None:
        """Say so every second, for ever."""
        while True:
            await self.beat()
            await asyncio.sleep(HEARTBEAT)

    async def beat(self) -> None:
        """Say that this replica is there, and learn who is."""
        known = [part for name, parts in self._others.items() for part in (name, b"%d" % parts)]
        try:
            reply = await self._server.run(
                Operation.HEARTBEAT,
                Script.HEARTBEAT,
                (self._names.members, self._names.budget),
                self._name,
                self._drawn,
                b"1" if self._said else b"0",
                b"%d" % LOST,
                b"%d" % FORGOTTEN,
                b"%d" % (self._fixed or 0),
                *known,
            )
        except StoreFailed:
            return  # counted; the breaker decides what follows
        match reply:
            case [1, int(parts), int(withheld), *members]:
                self._said = True
                self.beats += 1
                self._heard_at = time.monotonic_ns() // 1000
                self._told = max(parts, 1)
                self._note_withheld(withheld / _MILLION)
                pairs = zip(members[::2], members[1::2], strict=False)
                self._others = {
                    name: part
                    for name, part in pairs
                    if isinstance(name, bytes) and isinstance(part, int)
                }
            case [0]:
                self._take_another_name()
            case _:
                pass  # nothing of ours; the next heartbeat asks again

    async def leave(self) -> None:
        """Say farewell: the others have the whole budget."""
        try:
            members = self._names.members
            packed = command(b"HDEL", members, self._name)
            await self._server.command(Operation.HEARTBEAT, members, packed)
        except StoreFailed:
            pass  # then they find out

    def _take_another_name(self) -> None:
        """Two processes with one name would count as one."""
        log.warning("broker.name_taken", name=self._name.decode())
        self._name = self._name + b"#" + self._drawn
        self._said = False

    def _note_withheld(self, withheld: float) -> None:
        """Say how much of the budget is left to members that are lost, whenever that changes."""
        if withheld != self.withheld:
            self.withheld = withheld
            log.warning("broker.share_withheld", share=round(withheld, 3))

    @override
    def __repr__(self) -> str:
        return f"Fleet(others={len(self._others)}, parts={self.parts}, withheld={self.withheld})"
