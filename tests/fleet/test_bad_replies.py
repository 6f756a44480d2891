"""Whoever answers in the store's place says what he likes: an outage of the store, and no more.

Brokers as processes, each before a relay of its own to one store; some of its calls, then all, get
each reply of `bad_replies`, while visitors come and operators look.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from bad_replies import BAD, Between
from processes import merged
from replicas import AGENT, Crowd, Replica, joined, start, tree_for, until, visitor
from servers import StoreServer

from broker.testing import FakeVendor

pytestmark = pytest.mark.parts

BROKERS = 4
"""At a time: most of it is waiting."""

SOME, ALL = 1.0, 0.7
"""Seconds in which some calls, and all, are answered badly."""

GOOD_AGAIN = 20.0
"""Seconds in which a broker must be well again: a breaker waits five, and machines are busy."""

ROOM = 150 * 2**20
"""Bytes by which a broker may grow meanwhile, all in all."""

ANSWERS = {200, 429, 502, 503}


class Place:
    """A broker, and what stands between it and the store."""

    def __init__(self, between: Between, replica: Replica, known: list[str]) -> None:
        self.between = between
        self.replica = replica
        self.known = known

    async def suffers(self, names: Sequence[str]) -> dict[str, Counter[int]]:
        """Meet one evil after the other; returns how each was answered, by its name."""
        return {name: await self._suffers(name) for name in names}

    async def _suffers(self, name: str) -> Counter[int]:
        between, dice = self.between, random.Random(name)
        token = await self.token(self.known[0])
        async with Crowd() as crowd:
            crowd.let("known", self.replica, 15, self.known)
            crowd.let("new", self.replica, 5)
            looks = asyncio.create_task(self._look(token))
            between.is_meant = lambda _call: dice.random() < 0.3
            between.ill = BAD[name]
            await asyncio.sleep(SOME)
            between.is_meant = lambda _call: True
            await asyncio.sleep(ALL)
            between.ill = None
            assert between.said, name
            await crowd.stop()
            looks.cancel()
            looked = await asyncio.gather(looks, return_exceptions=True)
            assert isinstance(looked[0], asyncio.CancelledError), looked
        took = await until(self._is_well, f"all to be well after {name}", GOOD_AGAIN)
        print(f"{name}: well after {took:.1f} s")
        statuses = Counter(reply.status for _, _, reply in crowd.replies)
        assert set(statuses) <= ANSWERS, (name, statuses)
        return statuses

    async def token(self, fingerprint: str) -> str:
        """Ask until there is one: a call that takes 50 ms on a busy machine is an outage, too."""
        given: list[str] = []

        async def request_token() -> bool:
            reply = await self.replica.request_token(fingerprint)
            given.extend([reply.token] if reply.status == 200 else [])
            return bool(given)

        await until(request_token, "a token", GOOD_AGAIN)
        return given[0]

    async def _is_well(self) -> bool:
        reply = await self.replica.request_token(visitor())
        await asyncio.sleep(0.1)
        return reply.status == 200 and not await self.replica.is_degraded()

    async def _look(self, token: str) -> None:
        """Check a token, list sessions and look for one, for ever; nothing is a defect."""
        http, broker = self.replica.http, self.replica.broker
        bearer = {"Authorization": f"Bearer {token}"}
        while True:
            for url, headers in (
                (f"{broker.url}/v1/embed-tokens/verify", bearer),
                (f"{broker.admin_url}/v1/sessions?agent_id={AGENT}", {}),
                (f"{broker.admin_url}/v1/sessions/none", {}),
                (f"{broker.admin_url}/readyz", {}),
            ):
                async with http.get(url, headers=headers) as answer:
                    assert answer.status < 500 or answer.status == 503, (url, answer.status)
            await asyncio.sleep(0.05)


def largest(replica: Replica) -> int:
    """Return the bytes that its process had at most."""
    status = Path(f"/proc/{replica.broker.process.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@asynccontextmanager
async def places(
    folder: Path, store: StoreServer, vendor: FakeVendor, on_error: str
) -> AsyncIterator[list[Place]]:
    """Run brokers, each with visitors who have a token."""
    async with AsyncExitStack() as stack:
        made = []
        tree = merged(tree_for(folder, store, vendor), {"store.on_error": on_error})
        for _ in range(BROKERS):
            between = Between(store.address.path)
            await between.open()
            stack.push_async_callback(between.close)
            url = f"valkey://127.0.0.1:{between.port}"
            replica = await start(folder, merged(tree, {"store.url": url}))
            stack.push_async_callback(replica.close)
            made.append(Place(between, replica, [visitor() for _ in range(10)]))
        await joined(place.replica for place in made)
        for place in made:
            for fingerprint in place.known:
                _ = await place.token(fingerprint)
        yield made


@pytest.mark.parametrize("on_error", ["local", "closed"])
async def test_S1_no_reply_of_the_store_is_more_than_an_outage(
    tmp_path: Path, store: StoreServer, vendor: FakeVendor, on_error: str
) -> None:
    """Nobody gets a 500, no memory is lost, and it ends with the first good replies."""
    names = list(BAD)
    async with places(tmp_path, store, vendor, on_error) as made:
        before = [largest(place.replica) for place in made]
        told = await asyncio.gather(
            *(place.suffers(names[number::BROKERS]) for number, place in enumerate(made))
        )
        for place, had in zip(made, before, strict=True):
            assert largest(place.replica) - had < ROOM
        for answers in told:
            for name, statuses in answers.items():
                print(f"{name}: {dict(statuses)}")
        assert sum(len(answers) for answers in told) == len(BAD)
