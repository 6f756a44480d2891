"""Who else is there: a heartbeat a second, and what follows from it for a share.

Theory of operation.  A replica that loses the server goes on with its share of limits and budget,
one part in as many as it was told last.  The others must leave it that share, or a partition would
double the traffic to the vendor: so a member that falls silent is lost, not gone, and its share is
withheld (by the script) until it is back, says farewell, or is forgotten.  A process that is
started again in the same place takes the name of the one that died there, and its share with it.
A server that lost its memory is told by each replica whom it knew.

When the share begins follows from the heartbeats alone, not from whoever asks for a call: so long
after the last one that was answered, or may have been heard, that the others have noticed.  A
replica that is not answered says so in its next heartbeats: they may be heard all the same, and
must not make the others believe that it is well.

Who has never been answered was told no share, and cannot know how many others there are.  It takes
one part in `replicas`, if the configuration has that number.  Else one process of each instance
takes one part in `UNSEEN_PARTS`, and its siblings take none.
"""

import asyncio
import secrets

import structlog
from typing_extensions import override

from broker.units import SECOND
from broker.valkey.client.errors import Reason, StoreFailed, number
from broker.valkey.client.guarded import Operation, StoreClient
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script, command
from broker.valkey.client.shapes import COUNTED
from broker.valkey.fleet_time import FleetTime, era_of
from broker.valkey.key_names import Names

log = structlog.get_logger()

HEARTBEAT = 1.0
"""Seconds between two."""

LOST = 3 * SECOND
"""Microseconds of silence after which a member is lost: two heartbeats may be late."""

FORGOTTEN = 3600 * SECOND
"""Microseconds after which it is forgotten: a machine that was lost for good costs its share of the
budget for an hour."""

NEVER_FORGOTTEN = 30 * 24 * 3600 * SECOND
"""Microseconds: the same where the number of replicas is configured.  A share is theirs for ever,
and no more are taken for lost than are missing."""

ALONE_AFTER = 5.0
"""Seconds without the server until a replica spends its own share: the others have noticed."""

ALONE_FOR = FORGOTTEN / SECOND - 60.0
"""Seconds that it does so at most: then the others forget it, and have its share."""

UNSEEN_PARTS = 32
"""In how many parts the budget is divided by an instance that has never seen the others.

Nobody has told it a share, so this is how many such instances may run at once; beside a fleet of n
processes that went on by itself, which leaves one part in n + 1, it is this divided by n + 1.  With
the shipped budget such an instance makes a call every 23 s; with twice as many parts, every 70."""

MOST_PARTS = 1_000_000
"""Parts that a budget may be said to be in: scripts tell a thousand, or the configured number."""

UNHEARD = 2
"""Heartbeats without an answer after which the next ones say so: one may be late."""

_MILLION = 1_000_000


class Fleet:
    """The members as they were last seen; `name` is this one's, the same after a restart.

    `fixed` is how many there are by configuration, None to count them; `workers` how many
    processes are kept beside this one, itself included; `is_first` whether it is the one of them
    that has a share before any was told.
    """

    def __init__(
        self,
        server: StoreClient,
        names: Names,
        name: str,
        fixed: int | None,
        workers: int = 1,
        *,
        is_first: bool = True,
    ) -> None:
        self._server = server
        self._names = names
        self._name = name.encode()
        self._fixed = fixed
        self._drawn = secrets.token_hex(8).encode()
        self.time = FleetTime(self._drawn)
        self._said = False
        self._told: int | None = None
        self._workers = workers
        self._is_first = is_first
        self._others: dict[bytes, int] = {}
        self._heard_at: float | None = None
        self._hopeful_at: float | None = None
        self._unheard = 0
        self.withheld = 0.0

    @property
    def parts(self) -> int:
        """In how many parts the budget is divided; one is this replica's share.  0: it has none."""
        if self._told is not None:
            return self._told
        if self._fixed is not None:
            return self._fixed
        return UNSEEN_PARTS if self._is_first else 0

    @property
    def replicas(self) -> int:
        """By how many limits are divided; they need no part for newcomers."""
        if self._fixed is not None:
            return self._fixed
        if self._told is None:
            return self._workers
        return max(self._told - 1, 1) if self._told else len(self._others) + 1

    @property
    def is_heard(self) -> bool:
        """Whether the server has answered a heartbeat lately."""
        heard = self._heard_at
        return heard is not None and _now() - heard < LOST / SECOND

    @property
    def is_lost(self) -> bool:
        """Whether it did once, and does not now."""
        return self._heard_at is not None and not self.is_heard

    @property
    def alone_from(self) -> float:
        """From when on (the loop's time) this replica may spend its share, if nothing is heard.

        By then the others have noticed, whichever heartbeat reached them last.
        """
        moments = [moment for moment in (self._heard_at, self._hopeful_at) if moment is not None]
        if not moments:
            return float("-inf")
        heard = moments[0] + ALONE_AFTER
        hopeful = (self._hopeful_at or moments[0]) + ALONE_AFTER - HEARTBEAT
        return max(heard, hopeful)

    @property
    def alone_until(self) -> float:
        """Until when: then the others forget it, and have its share."""
        if self._fixed is not None or self._heard_at is None:
            return float("inf")
        return self._heard_at + ALONE_FOR

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
        is_alone = self._unheard >= UNHEARD
        if not is_alone:
            self._hopeful_at = _now()
        try:
            reply = await self._server.run(
                Operation.HEARTBEAT,
                Script.HEARTBEAT,
                (self._names.members, self._names.budget),
                self._name,
                self._drawn,
                b"1" if self._said else b"0",
                b"%d" % LOST,
                b"%d" % (FORGOTTEN if self._fixed is None else NEVER_FORGOTTEN),
                b"%d" % (self._fixed or 0),
                *self.time.vouched(),
                b"1" if is_alone else b"0",
                *known,
            )
            self._learn(reply)
        except StoreFailed:
            self._unheard += 1  # counted; the breaker decides what follows

    def _learn(self, reply: Reply) -> None:
        """Take note of what a heartbeat was told; raises StoreFailed for what it would not be."""
        match reply:
            case [1, parts, withheld, bytes(era), told, *members]:
                parts, withheld = number(parts, MOST_PARTS), number(withheld, _MILLION)
                self.time.learn(era_of(era), number(told))
                self._said = True
                self._unheard = 0
                self._heard_at = _now()
                self._note_told(parts)
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
                raise StoreFailed(Reason.OTHER, "heartbeat: another reply")

    async def leave(self) -> None:
        """Say farewell: the others have the whole budget."""
        try:
            members = self._names.members
            packed = command(b"HDEL", members, self._name)
            await self._server.command(Operation.HEARTBEAT, members, packed, COUNTED)
        except StoreFailed:
            pass  # then they find out

    def _take_another_name(self) -> None:
        """Two processes with one name would count as one."""
        log.warning("broker.name_taken", name=self._name.decode())
        own = b"#" + self._drawn
        self._name = self._name.removesuffix(own) + own  # nobody else has this, whatever is said
        self._said = False

    def _note_told(self, parts: int) -> None:
        """Say once that there is no share for this replica: it could not go on by itself."""
        if not parts and self._told != 0:
            log.warning("broker.no_share", replicas=self._fixed or len(self._others) + 1)
        self._told = parts

    def _note_withheld(self, withheld: float) -> None:
        """Say how much of the budget is left to members that are lost, whenever that changes."""
        if withheld != self.withheld:
            self.withheld = withheld
            log.warning("broker.share_withheld", share=round(withheld, 3))

    @override
    def __repr__(self) -> str:
        return f"Fleet(others={len(self._others)}, parts={self.parts}, withheld={self.withheld})"


def _now() -> float:
    return asyncio.get_running_loop().time()
