"""A replica's share of the vendor's budget, which it spends while it is cut off from the store.

The bucket of the share is the replica's own and starts empty at `Fleet.alone_from`: then the others
have noticed that the replica is lost, whether or not anybody asks for a call here.  It makes none
before those are settled that were out at the loss, for the others' share does not count them.
"""

import asyncio
import math

import structlog
from typing_extensions import override

from broker.pacing.slots import Budget, LocalSlots
from broker.valkey.membership import ALONE_AFTER, Fleet

log = structlog.get_logger()


class BudgetShare:
    """One part of `whole`; none where the policy is `closed`, or the fleet is too large.

    `slots` are those of the share while it is in force; `carried` counts the calls that were out at
    the loss of the server, and are not over.
    """

    def __init__(self, whole: Budget, fleet: Fleet, *, closed: bool) -> None:
        self._whole = whole
        self._fleet = fleet
        self._closed = closed
        self._started = 0.0
        self.slots: LocalSlots | None = None
        self.carried = 0

    def start(self) -> None:
        """Note the start: nobody knows of this replica before ALONE_AFTER."""
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()

    @property
    def budget(self) -> Budget | None:
        """This replica's part of the budget; None if there is none for it."""
        return self._whole.share(self._fleet.parts) if self._fleet.parts else None

    @property
    def exists(self) -> bool:
        """Whether there is one to spend."""
        return self.budget is not None and not self._closed

    @property
    def begins(self) -> float:
        """The moment from which the share may be spent."""
        return max(self._fleet.alone_from, self._started + ALONE_AFTER)

    @property
    def is_due(self) -> bool:
        """Whether that moment has come."""
        return self.begins <= self._loop.time()

    @property
    def may_spend(self) -> bool:
        """Whether the share is ours now, and nothing is out that it does not count."""
        now = self._loop.time()
        return not self.carried and self.begins <= now < self._fleet.alone_until

    @property
    def remaining(self) -> int:
        """How many calls could be made at this moment."""
        return self.slots.remaining if self.slots is not None and self.may_spend else 0

    @property
    def stuck_for(self) -> float | None:
        """See `SlotSource.stuck_for`."""
        return None if self.slots is None else self.slots.stuck_for

    @property
    def may_give_up(self) -> bool:
        """Also what was out at the loss: the share waits for it, and the others do not count it."""
        return self.carried > 0 or (self.slots is not None and self.slots.may_give_up)

    @property
    def shortage(self) -> str:
        """Why there are no more calls."""
        if self.budget is None:
            return (
                "the shared store is away, and this process has no share of the vendor's budget;"
                " set [store] replicas to the number of processes"
            )
        return "the shared store is away, and this broker's share of the vendor's budget is used up"

    def predict(self, ahead: int, start: float, *, drained: bool) -> float:
        """Return when a newcomer gets a slot behind `ahead` others; see `SlotSource.predict`."""
        share = self.budget
        if share is None or not self.exists:
            return math.inf
        if self.slots is not None:
            moment = self.slots.predict(ahead, start, drained=drained)
        else:
            moment = max(start, self.begins) + (ahead + 1) * share.interval
        return moment if moment < self._fleet.alone_until else math.inf

    async def begin(self, out: int) -> None:
        """Put the share in force, if there is one, while `out` calls are out."""
        share = self.budget
        if share is None:
            return
        slots = LocalSlots(share, out=out)
        await slots.start()
        self.slots, self.carried = slots, out
        log.warning("broker.budget_alone", parts=self._fleet.parts)

    def note_end(self) -> None:
        """A call is over; after what was out at the loss the share begins anew."""
        if self.carried:
            self.carried -= 1
            if self.slots is not None:
                self.slots.drain()  # before whoever waits for a slot of it goes on

    async def take_if_headroom(self) -> bool:
        """See `SlotSource.take_if_headroom`."""
        return self.slots is not None and self.may_spend and await self.slots.take_if_headroom()

    def settle(self) -> None:
        """Settle a slot that was taken while the share is in force, whoever gave it out."""
        if self.slots is not None:
            self.slots.settle()

    def abandon(self) -> None:
        """Abandon one."""
        if self.slots is not None:
            self.slots.abandon()

    def answered(self) -> None:
        """The vendor answered a call, just now."""
        if self.slots is not None:
            self.slots.answered()

    async def resume(self) -> None:
        """A pause is over: begin empty."""
        if self.slots is not None:
            await self.slots.resume()

    @override
    def __repr__(self) -> str:
        return f"BudgetShare(in_force={self.slots is not None}, carried={self.carried})"
