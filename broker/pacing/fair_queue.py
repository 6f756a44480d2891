"""Who is next?  A queue that is fair between clients: start-time fair queueing.

Goyal, Vin and Cheng, "Start-time Fair Queuing" (SIGCOMM 1996), with one slot as the length of
every packet.  Each client has a start tag: the queue's virtual time when it began to wait, and one
more for each slot it got since.  The smallest tag goes first, then arrival.  So a client that asks
once goes before the backlog of one that asks a hundred times, even if that one has just been
served; tags are charged by service, so places that were given up cost nobody anything.

Within one client the more urgent go first, then the first come.  Urgency does not count between
clients: a flood of one client's first visitors must not starve the renewals of another.
"""

import asyncio
from collections import deque
from itertools import count


class Waiter:
    """One caller: `granted` is resolved when it is their turn, `rank` 0 is the most urgent.

    `until` is the moment (seconds of the loop's clock) at which they give up.
    """

    __slots__ = ("arrival", "client", "granted", "rank", "until")

    def __init__(
        self, client: str, rank: int, until: float, granted: "asyncio.Future[None]"
    ) -> None:
        self.client = client
        self.rank = rank
        self.until = until
        self.granted = granted
        self.arrival = 0


class FairQueue:
    """Those who wait."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._waiting: dict[str, tuple[deque[Waiter], ...]] = {}
        self._tags: dict[str, int] = {}
        self._now = 0
        self._arrivals = count()
        self._length = 0

    def join(self, place: Waiter) -> None:
        """Take a place behind the client's own of the same rank."""
        place.arrival = next(self._arrivals)
        client = place.client
        if client not in self._waiting:
            self._waiting[client] = tuple(deque() for _ in range(self._ranks))
            self._tags[client] = self._tag(client)
        self._waiting[client][place.rank].append(place)
        self._length += 1

    def leave(self, place: Waiter) -> None:
        """Give a place up; does nothing if it was served already."""
        ranks = self._waiting.get(place.client)
        if ranks is not None and place in ranks[place.rank]:
            ranks[place.rank].remove(place)
            self._taken_out(place.client)

    def next(self) -> Waiter | None:
        """Take out whoever is next; None if nobody waits."""
        if not self._waiting:
            return None
        client = min(self._waiting, key=self._order)
        place = next(rank for rank in self._waiting[client] if rank).popleft()
        self._now = self._tags[client]
        self._tags[client] += 1
        self._taken_out(client)
        return place

    def ahead_of(self, client: str, rank: int) -> int:
        """How many go before a newcomer of this client and rank, if nobody else comes."""
        own = sum(map(len, self._waiting.get(client, ())[: rank + 1]))
        tag = self._tag(client) + own
        others = (
            min(sum(map(len, ranks)), max(tag - self._tags[name] + 1, 0))
            for name, ranks in self._waiting.items()
            if name != client
        )
        return own + sum(others)

    def places(self) -> list[Waiter]:
        """Return everybody who waits, in no particular order."""
        return [place for ranks in self._waiting.values() for rank in ranks for place in rank]

    def _tag(self, client: str) -> int:
        return max(self._now, self._tags.get(client, 0))

    def _order(self, client: str) -> tuple[int, int]:
        first = min(rank[0].arrival for rank in self._waiting[client] if rank)
        return self._tags[client], first

    def _taken_out(self, client: str) -> None:
        self._length -= 1
        if not any(self._waiting[client]):
            del self._waiting[client]
            if self._tags[client] <= self._now:
                del self._tags[client]  # it is owed nothing and owes nothing
        if not self._waiting:
            self._tags.clear()
            self._now = 0

    def __len__(self) -> int:
        return self._length
