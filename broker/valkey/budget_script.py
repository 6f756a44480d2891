"""The message and the reply of the budget's scripts, `budget.lua` and `hold.lua`."""

from msgspec import Struct

from broker.pacing.slots import Budget
from broker.rules.outstanding import PROBES
from broker.units import SECOND
from broker.valkey.client.errors import Reason, StoreFailed, number
from broker.valkey.client.guarded import Operation, StoreClient
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script, command
from broker.valkey.client.shapes import COUNTED
from broker.valkey.fleet_time import FleetTime, era_of
from broker.valkey.key_names import Names

AHEAD = 5.0
"""Seconds that a call may be reserved ahead: a dozen replicas may wait for their turn."""

REMEMBERED = 3600 * SECOND
"""Microseconds: an hour without a call, and the budget starts empty."""

QUEUE_TOLD = 7.0
"""Seconds after which a replica's line is taken for empty, because it died: longer than it sleeps
for a call that it has reserved, and a nap."""

SILENT = 5.0
"""Seconds without a message after which the calls that a replica has out are owed: it was killed,
or is cut off and begins to spend its own share.  A few messages may be late."""

PAUSED = b"paused"
"""The news that the vendor asked for a pause; for how long, the server tells."""


class BudgetMessage(Struct, frozen=True):
    """What a replica tells, and what it wants: `what` is reserve, modest or tell.

    `number` counts messages; `settled` and `abandoned` are totals since the start; `silence` is the
    microseconds since the vendor last answered, -1 for never.  `lost` says that what all have spent
    is unknown, so that the bucket starts empty.
    """

    what: bytes
    waiting: int
    number: int
    out: int
    settled: int
    abandoned: int
    silence: int
    lost: bool


class BudgetReply(Struct, frozen=True):
    """What the server says of the next call; times in microseconds, `silence` -1 for none."""

    reserved: bool
    wait: int
    free: int
    paused: int
    era: bytes
    time: int
    silence: int
    owed: int
    lines: list[int]


def _read(reply: Reply) -> BudgetReply:
    """Read it; raises StoreFailed for what the script would not say."""
    match reply:
        case [0 | 1 as reserved, wait, free, paused, bytes(era), time, int(silence), owed, *lines]:
            return BudgetReply(
                bool(reserved),
                number(wait, int(AHEAD * SECOND)) if reserved else number(wait),
                number(free),
                number(paused),
                era_of(era),
                number(time),
                silence if silence < 0 else number(silence),
                number(owed),
                [line for line in lines if isinstance(line, int) and line > 0],
            )
        case _:
            raise StoreFailed(Reason.OTHER, "budget: another reply")


class BudgetScript:
    """Asks the server; every coroutine raises StoreFailed."""

    def __init__(
        self, budget: Budget, server: StoreClient, names: Names, time: FleetTime, replica: str
    ) -> None:
        interval = b"%d" % -int(-budget.interval * SECOND // 1)
        self._numbers = (b"%d" % budget.burst, interval)
        self._server = server
        self._names = names
        self._time = time
        self._replica = replica.encode()

    @property
    def is_away(self) -> bool:
        """Whether the server is."""
        return self._server.is_away

    async def send(self, message: BudgetMessage) -> BudgetReply:
        """Send one message, and take over the fleet's time."""
        reply = _read(
            await self._server.run(
                Operation.BUDGET,
                Script.BUDGET,
                (self._names.budget, self._names.queues, self._names.calls),
                *self._numbers,
                self._replica,
                b"%d" % message.waiting,
                b"%d" % int(AHEAD * SECOND),
                b"1" if message.lost else b"0",
                b"%d" % REMEMBERED,
                b"%d" % int(QUEUE_TOLD * SECOND),
                message.what,
                *self._time.vouched(),
                b"%d" % message.number,
                b"%d" % message.out,
                b"%d" % message.settled,
                b"%d" % message.abandoned,
                b"%d" % message.silence,
                b"%d" % int(SILENT * SECOND),
                b"%d" % PROBES,
            )
        )
        self._time.learn(reply.era, reply.time)
        return reply

    async def hold(self, pause: int, remaining: int) -> int:
        """Tell of a pause and of the calls that are left (0 and -1 tell nothing).

        Returns the microseconds that are left of the pause in force.
        """
        return number(
            await self._server.run(
                Operation.BUDGET,
                Script.HOLD,
                (self._names.budget,),
                *self._numbers,
                b"%d" % pause,
                b"%d" % remaining,
                b"%d" % REMEMBERED,
                *self._time.vouched(),
            )
        )

    def publish_pause(self) -> None:
        """Tell the other replicas that there is a pause, in the background."""
        channel = self._names.channel
        self._server.tell(Operation.BUDGET, channel, command(b"PUBLISH", channel, PAUSED), COUNTED)
