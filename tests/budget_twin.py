"""The shared budget in Python: what budget.lua decides, written from its head, and a fleet on it.

`Twin` is held to the script by a random trace (`stores/test_shared_budget.py`).  `Fleet` stands for
a store and its heartbeats where time is virtual: replicas on it are the ones that ship.
"""

import asyncio
from collections.abc import Sequence

from broker.board import Sheet
from broker.metrics import StoreMetrics
from broker.slots import Budget
from broker.stores import fleet
from broker.stores.address import Access, StoreAddress
from broker.stores.budget import SharedSlots
from broker.stores.failures import Reason, StoreFailed
from broker.stores.names import Names
from broker.stores.nodes import nodes_at
from broker.stores.resp import Reply
from broker.stores.scripts import Script
from broker.stores.server import Operation, Server
from broker.testing import FakeClock

SECOND = 1_000_000


class Twin:
    """One budget; `withheld` in millionths, times in microseconds of the fleet's own clock."""

    def __init__(self) -> None:
        self.full_at: int | None = None
        self.paused_until = 0
        self.withheld = 0
        self.queues: dict[bytes, tuple[int, int]] = {}
        self.calls: dict[bytes, tuple[int, int, int, int, int]] = {}
        self.owed: tuple[int, int] | None = None
        self.reserved_at: int | None = None

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
        wait_full = depth
        if self.full_at is not None:
            wait_full = min(max(self.full_at - now, 0), paused + 2 * depth + ahead)
        if arguments[5] == b"1":
            wait_full = max(wait_full, depth)
        known = self.calls.get(who)
        if known is not None and message <= known[0]:
            return [0, interval, 0, paused, -1]
        lost = charged = 0
        for other, (_, left, _, _, told) in list(self.calls.items()):
            if other != who and abs(now - told) > silent:
                del self.calls[other]
                lost += left
        if known is not None:
            charged += max(settled - known[2], 0)
            lost += max(abandoned - known[3], 0)
        owed, owed_at = self.owed or (burst, now)
        owed_at = min(owed_at, now)
        if answered >= 0 and now - answered >= owed_at:
            charged += min(owed, (now - owed_at) // step)
            owed = 0
        if lost:
            charged += min(owed, (now - owed_at) // step) + lost
            owed, owed_at = min(owed + lost, 3 * burst), now
        self.owed = owed, owed_at
        wait_full += charged * step
        if what != b"tell":
            self.queues.pop(who, None)
            if waiting:
                self.queues[who] = now, waiting
        over = int(arguments[7])
        self.queues = {n: q for n, q in self.queues.items() if abs(now - q[0]) <= over}
        others = [line for name, (_, line) in self.queues.items() if name != who]
        all_out = out + sum(left for name, (_, left, *_) in self.calls.items() if name != who)
        most = min(probes, burst) if owed else burst
        taken = wait_full + all_out * step
        wait = max(taken + step - depth, paused, 0)
        if all_out >= most:
            wait = max(wait, step)
        plenty = not wait and not others and (depth - taken) / step * 2 >= burst
        reserved = what == b"reserve" or (what == b"modest" and plenty)
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
        return [int(reserved), wait, free, paused, silence, *others]


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
        self.server = Server(nodes_at(address, Access(), 1.0), FakeClock(), StoreMetrics(Sheet()))
        self.server.run = self._run  # type: ignore[method-assign]  # no sockets in virtual time
        names = Names(bytes(32), "a vendor")
        self.fleet = fleet.Fleet(self.server, names, name, fixed, is_first=is_first)
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
