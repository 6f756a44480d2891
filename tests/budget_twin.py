"""The shared budget in Python: what budget.lua decides, written from its head, and a fleet on it.

`Twin` is held to the script by a random trace (`stores/test_shared_budget.py`).  `Fleet` stands for
a store and its heartbeats where time is virtual: replicas on it are the ones that ship.
"""

import asyncio
from collections.abc import Sequence

from broker.config.addresses import Access, StoreAddress
from broker.pacing.slots import Budget
from broker.telemetry.cells import MetricLayout
from broker.telemetry.metrics import StoreMetrics
from broker.testing import FakeClock
from broker.valkey import membership
from broker.valkey.client.errors import Reason, StoreFailed
from broker.valkey.client.guarded import Operation, StoreClient
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script
from broker.valkey.client.topology import nodes_at
from broker.valkey.key_names import Names
from broker.valkey.slots import SharedSlots

SECOND = 1_000_000

FAR = 10**30
"""What counts for a moment that nobody of ours wrote: it is cut to the furthest that can be."""

Told = tuple[int, int, int, int, int]
"""What a replica told last: message, calls out, settled, abandoned, when."""


class Twin:
    """One budget; `withheld` in millionths, times in microseconds of the fleet's own clock."""

    def __init__(self) -> None:
        self.full_at: int | None = None
        self.paused_until = 0
        self.withheld = 0
        self.queues: dict[bytes, tuple[int, int]] = {}
        self.calls: dict[bytes, Told | None] = {}
        self.owed: tuple[int, int | None] | None = None
        self.reserved_at: int | None = None

    def spoil(self, field: str) -> None:
        """Let somebody write over a field of the budget what is no number of ours."""
        match field:
            case "full_at":
                self.full_at = FAR
            case "paused_until":
                self.paused_until = 0
            case "withheld":
                self.withheld = SECOND
            case "owed":
                self.owed = FAR, self.owed[1] if self.owed else None
            case "owed_at":
                self.owed = (self.owed[0], None) if self.owed else None
            case "reserved_at":
                self.reserved_at = None
            case _:
                assert field == "time", "which the next who vouches knows"

    def send(self, now: int, arguments: Sequence[bytes]) -> list[int]:  # noqa: C901, PLR0912, PLR0915 - one after the other, as the script has it
        """Decide; `arguments` as the script gets them, the reply without era and time."""
        burst, interval, ahead, remembered = (int(arguments[n]) for n in (0, 1, 4, 6))
        who, waiting, what = arguments[2], int(arguments[3]), arguments[8]
        message, out, settled, abandoned, answered, silent, probes = map(int, arguments[11:18])
        assert remembered
        step = 3600 * SECOND
        if self.withheld < SECOND:
            step = min(-(-interval * SECOND // (SECOND - self.withheld)), step)
        depth = max(burst * interval, step)
        paused = min(max(self.paused_until - now, 0), 300 * SECOND)
        wait_full, fullest = depth, paused + 2 * depth + ahead
        if self.full_at is not None:
            is_ours = self.full_at >= now - 30 * 86_400 * SECOND
            wait_full = min(max(self.full_at - now, 0), fullest) if is_ours else fullest
        if arguments[5] == b"1":
            wait_full = max(wait_full, depth)
        known = self.calls.get(who)
        if known is not None and message <= known[0] and abs(now - known[4]) <= silent:
            owed = burst if self.owed is None else min(self.owed[0], 3 * burst)
            return [0, interval, 0, paused, -1, owed]
        lost = charged = 0
        for other, call in list(self.calls.items()):
            if call is None:
                del self.calls[other]
                lost += burst
            elif other != who and abs(now - call[4]) > silent:
                del self.calls[other]
                lost += call[1]
        if known is not None:
            charged += settled - known[2]
            lost += abandoned - known[3]
        owed, owed_at = self.owed or (burst, now)
        owed = min(owed, 3 * burst)
        if owed_at is None:
            charged, owed_at = charged + owed, now
        assert owed_at <= now, "nobody sets this time back"
        if answered >= 0 and now - answered >= owed_at:
            charged += min(owed, (now - owed_at) // step)
            owed = 0
        if lost:
            charged += min(owed, (now - owed_at) // step) + lost
            owed, owed_at = min(owed + lost, 3 * burst), now
        self.owed = owed, owed_at
        wait_full = min(wait_full + charged * step, fullest)
        if what != b"tell":
            self.queues.pop(who, None)
            if waiting:
                self.queues[who] = now, waiting
        over = int(arguments[7])
        self.queues = {n: q for n, q in self.queues.items() if abs(now - q[0]) <= over}
        others = [line for name, (_, line) in self.queues.items() if name != who]
        all_out = out + sum(call[1] for name, call in self.calls.items() if call and name != who)
        most = min(probes, burst) if owed else burst
        taken = wait_full + min(all_out, 3 * burst) * step
        wait = max(taken + step - depth, paused, 0)
        if all_out >= most:
            wait = max(wait, step)
        has_headroom = not wait and not others and (depth - taken) / step * 2 >= burst
        reserved = what == b"reserve" or (what == b"modest" and has_headroom)
        reserved = reserved and self.withheld < SECOND and wait <= ahead and all_out < most
        reserved = reserved and (all_out + 1) * step <= depth
        if self.reserved_at is None:
            self.reserved_at = now
        if reserved:
            self.reserved_at = now + wait
        all_out += reserved
        is_stuck = all_out >= most or (all_out + 1) * step > depth
        silence = max(now - self.reserved_at, 0) if is_stuck else -1
        self.full_at = now + wait_full
        self.paused_until = now + paused if paused else 0
        self.calls[who] = message, out + reserved, settled, abandoned, now
        free = 0 if paused else max((depth - taken - reserved * step) // step, 0)
        return [int(reserved), wait, free, paused, silence, owed, *others]


class Store:
    """A store in virtual time, as its replicas see it: `away` for all, or `lost` for some."""

    def __init__(self, parts: int = 0) -> None:
        self.twin = Twin()
        self.parts = parts
        self.away = False
        self.messages = 0

    def replica(self, name: str, *, is_first: bool = True, fixed: int | None = None) -> "Member":
        """Add a replica; nothing of it runs yet."""
        return Member(self, name, is_first=is_first, fixed=fixed)

    def now(self) -> int:
        """Return the fleet's time."""
        return round(asyncio.get_running_loop().time() * SECOND)


class Member:
    """One replica's slots on a store in virtual time; `cut_off` parts it from the store."""

    def __init__(self, store: Store, name: str, *, is_first: bool, fixed: int | None) -> None:
        self._store = store
        self.cut_off = False
        address = StoreAddress(hosts=(("nowhere.invalid", 1),))
        self.server = StoreClient(
            nodes_at(address, Access(), 1.0), FakeClock(), StoreMetrics(MetricLayout(), shown=True)
        )
        self.server.run = self._run  # type: ignore[method-assign]  # no sockets in virtual time
        names = Names(bytes(32), "a vendor")
        self.fleet = membership.Fleet(self.server, names, name, fixed, is_first=is_first)
        self._names, self._name = names, name

    def slots(self, budget: Budget) -> SharedSlots:
        """Return this replica's slots."""
        return SharedSlots(budget, self.server, self._names, self.fleet, self._name, closed=False)

    async def _run(
        self, operation: Operation, script: Script, keys: Sequence[bytes], *arguments: bytes
    ) -> Reply:
        assert keys
        if self.cut_off or self._store.away:
            raise StoreFailed(Reason.CONNECTION)
        self._store.messages += operation is Operation.BUDGET
        now = self._store.now()
        if script is Script.HEARTBEAT:
            return [1, self._store.parts, self._store.twin.withheld, b"era", now]
        assert script is Script.BUDGET
        reply = self._store.twin.send(now, arguments)
        return [*reply[:4], b"era", now, *reply[4:]]
