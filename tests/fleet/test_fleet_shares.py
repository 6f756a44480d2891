"""What each replica may spend on its own: together never more than the whole (G4, S5)."""

import asyncio
import time
from collections.abc import AsyncIterator
from fractions import Fraction

import pytest
from servers import StoreServer

from broker.config.addresses import Access
from broker.pacing.slots import Budget
from broker.telemetry.cells import MetricLayout
from broker.telemetry.metrics import StoreMetrics
from broker.testing import FakeClock
from broker.valkey import budget_share as budget
from broker.valkey import membership
from broker.valkey.client.guarded import StoreClient
from broker.valkey.client.topology import nodes_at
from broker.valkey.key_names import Names
from broker.valkey.membership import Fleet
from broker.valkey.slots import SharedSlots

pytestmark = pytest.mark.parts

LOST = 0.3
"""Seconds of silence after which a member is lost, here."""


class Members:
    """Members of one fleet; those who are cut off fall silent."""

    def __init__(self, store: StoreServer) -> None:
        self.server = StoreClient(
            nodes_at(store.address, Access(), 0.25),
            FakeClock(),
            StoreMetrics(MetricLayout(), shown=True),
        )
        self.names = Names(bytes(32), "a vendor")
        self.beating: list[Fleet] = []
        self.cut_off: list[Fleet] = []

    async def open(self) -> None:
        await self.server.nodes.open()

    async def close(self) -> None:
        await self.server.close()

    def join(self, name: str, fixed: int | None = None) -> Fleet:
        """Add a member."""
        member = Fleet(self.server, self.names, name, fixed)
        self.beating.append(member)
        return member

    def cut(self, member: Fleet) -> None:
        """Cut a member off."""
        self.beating.remove(member)
        self.cut_off.append(member)

    async def beat(self) -> None:
        """Let all who can say that they are there, twice: each has then heard of each."""
        for _ in range(2):
            for member in self.beating:
                await member.beat()

    async def pass_time(self) -> None:
        """Let those who were cut off become lost."""
        await asyncio.sleep(LOST + 0.05)
        await self.beat()

    def spent(self) -> Fraction:
        """What is spent at most: shares of those on their own, and what those here are left."""
        alone = sum((Fraction(1, member.parts) for member in self.cut_off), Fraction())
        left = 1 - Fraction(self.beating[0].withheld).limit_denominator(1000) if self.beating else 0
        return alone + left


@pytest.fixture
async def members(store: StoreServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Members]:
    """A fleet in which a member is lost after a moment."""
    monkeypatch.setattr(membership, "LOST", int(LOST * 1_000_000))
    members = Members(store)
    await members.open()
    yield members
    await members.close()


async def test_G4_S5_shares_add_up_when_replicas_are_lost_one_after_the_other(
    members: Members,
) -> None:
    """The later ones divide what the earlier ones left; the last one has no more than that."""
    a, b, c = members.join("a"), members.join("b"), members.join("c")
    await members.beat()
    assert [member.replicas for member in (a, b, c)] == [3, 3, 3]
    for member in (a, b, c):
        members.cut(member)
        if members.beating:
            await members.pass_time()
        assert members.spent() <= 1
    assert members.spent() == Fraction(3, 4)


async def test_G4_S5_a_newcomer_divides_what_those_who_are_lost_left(members: Members) -> None:
    """Three become four while one is cut off with a fourth; the others leave it that."""
    a, b, c = members.join("a"), members.join("b"), members.join("c")
    await members.beat()
    members.cut(a)
    await members.pass_time()
    d = members.join("d")
    await members.beat()
    for member in (b, c, d):
        members.cut(member)
    assert members.spent() <= 1


async def test_G4_S5_something_is_left_for_whoever_comes_later(members: Members) -> None:
    """Two have taken a third each and are lost: a newcomer has half of the last one."""
    a, b = members.join("a"), members.join("b")
    await members.beat()
    members.cut(a)
    members.cut(b)
    await asyncio.sleep(LOST + 0.05)
    late = members.join("late")
    await members.beat()
    assert late.withheld == pytest.approx(2 / 3, abs=1e-5)
    assert late.parts == 6
    members.cut_off.remove(a)
    members.beating.append(a)
    await members.beat()
    assert late.withheld == pytest.approx(1 / 3, abs=1e-5)
    assert late.parts == 5


async def test_G4_a_store_that_lost_its_memory_is_told_who_was_lost(
    members: Members, store: StoreServer
) -> None:
    """By those who knew them: the share stays withheld."""
    a, b = members.join("a"), members.join("b")
    await members.beat()
    members.cut(a)
    await members.pass_time()
    assert b.withheld == pytest.approx(1 / 3, abs=1e-5)
    store.flush()
    await members.beat()
    assert b.withheld == pytest.approx(1 / 3, abs=1e-5)
    await a.leave()
    await members.beat()
    assert b.withheld == 0


async def test_two_processes_with_one_name_are_two_members(members: Members) -> None:
    """The one that was there before takes another name."""
    first, second = members.join("same"), members.join("same")
    await members.beat()
    await members.beat()
    assert (first.replicas, second.replicas) == (2, 2)


async def test_G4_a_second_loss_is_waited_out_like_the_first(
    members: Members, store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asked for a call while the server was back: the share is the others' again.

    What is measured is when a call may be made, from the moment at which the store was lost.
    """
    monkeypatch.setattr(budget, "ALONE_AFTER", 1.0)
    member = members.join("a")
    slots = SharedSlots(
        Budget(rate=6000, per=60, burst=2, max_wait=8), members.server, members.names, member, "a",
        closed=False,
    )  # fmt: skip
    await members.beat()
    await slots.start()
    assert await slots.take(lambda: 1)
    slots.settle()
    waits = []
    for _ in range(2):
        store.command("CLIENT", "PAUSE", 2500)
        began = time.monotonic()
        assert await slots.take(lambda: 1)
        waits.append(time.monotonic() - began)
        slots.settle()
        await asyncio.sleep(max(2.6 - (time.monotonic() - began), 0))
        await members.beat()
    await slots.close()
    print(f"a call after {waits[0]:.2f} s, and the second time after {waits[1]:.2f} s")
    assert min(waits) >= 1.0
