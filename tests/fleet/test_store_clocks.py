"""Clocks that are wrong: rows L3, L4, T5 and N19 for replicas and for the store."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import faked_time
import pytest
from processes import merged
from replicas import (
    LONG_STORE_TIMEOUT,
    Crowd,
    Replica,
    Reply,
    back,
    joined,
    replicas,
    start,
    tree_for,
    undisturbed,
    visitor,
)
from servers import StoreServer

from broker.testing import FakeVendor, VendorSettings

pytestmark = pytest.mark.parts

BURST, RATE = 10, 2
TAU = BURST / RATE
"""Seconds that a bucket takes to refill."""

BUDGET_RATE, BUDGET_PER, BUDGET_BURST = 20, 2.0, 4
BUDGET = {
    "rate": BUDGET_RATE, "per": f"{BUDGET_PER:g}s", "burst": BUDGET_BURST, "max_wait": "6s",
    "window": 604,
}  # fmt: skip
SLACK = 5
"""Calls that a stall of half a second moves into the next window."""

LIFETIME = 8
"""Seconds that a token lives."""


class TestReplicas:
    async def test_L4_replicas_whose_clocks_differ_by_5_s_admit_the_same_total(
        self, store: StoreServer, tmp_path: Path
    ) -> None:
        """A burst at once and then the rate, as if it were one clock: it is, the store's."""
        limit = {"rate": RATE, "per": "1s", "burst": BURST}
        tree = merged(tree_for(tmp_path, store), {"limits.fingerprint": limit} | LONG_STORE_TIMEOUT)
        ahead = faked_time.environment("+5s")
        fleet = [await start(tmp_path, tree), await start(tmp_path, tree, **ahead)]
        try:
            await joined(fleet)
            async with undisturbed(fleet):
                fingerprint, replies = visitor(), list[Reply]()
                began = time.monotonic()
                replies += await asyncio.gather(
                    *(each.request_token(fingerprint) for each in fleet)
                )
                spent, last = time.monotonic(), 0.0
                while last < spent + 3:
                    last = time.monotonic()
                    requests = [each.request_token(fingerprint) for each in fleet * BURST]
                    replies += await asyncio.gather(*requests)
                took = time.monotonic() - began
            dates = [
                parsedate_to_datetime(reply.headers["Date"]).timestamp() for reply in replies[:2]
            ]
            assert 4 <= dates[1] - dates[0] <= 6, "the clocks do differ"
            admitted = Counter(reply.status for reply in replies)[200]
            least, most = BURST + RATE * (last - spent), BURST + RATE * took
            print(f"clocks 5 s apart: {admitted} admitted, allowed {least:.1f} to {most:.1f}")
            assert math.floor(least) <= admitted <= most
            assert len({reply.token for reply in replies if reply.status == 200}) == 1
        finally:
            for replica in fleet:
                await replica.close()

    @pytest.mark.parametrize("offset", ["+1d", "-1d"])
    async def test_N19_a_replica_whose_date_is_a_day_off_neither_stops_nor_unbounds_the_budget(
        self, vendor: FakeVendor, store: StoreServer, tmp_path: Path, offset: str
    ) -> None:
        """It writes first, beside the others, and when it is killed: the budget is one, and used.

        Also after its death: the others withhold its share, as anybody's, and make calls.
        """
        tree = merged(tree_for(tmp_path, store, vendor), {"issuer.budget": BUDGET})
        off = await start(tmp_path, tree, **faked_time.environment(offset))
        fleet = [off]
        try:
            async with Crowd() as crowd:
                crowd.let("off", off, 12)
                await asyncio.sleep(3)
                fleet += [await start(tmp_path, tree) for _ in range(2)]
                await joined(fleet)
                for replica in fleet[1:]:
                    crowd.let("others", replica, 12)
                began = time.monotonic()
                await asyncio.sleep(6)
                beside = _calls(vendor, began)
                date = parsedate_to_datetime(
                    (await off.request_token()).headers["Date"]
                ).timestamp()
                assert abs(date - time.time()) > 86_000, "its date is off"
                assert not await off.is_degraded()
                await off.kill()
                killed = time.monotonic()
                await asyncio.sleep(8)
                after = _calls(vendor, killed + 3)
                await crowd.stop()
            fullest = vendor.journal.in_window(BUDGET_PER)
            print(
                f"{offset}: {beside} calls in 6 s beside it, {after} in 5 s after its death;"
                f" fullest window {fullest}"
            )
            assert fullest <= BUDGET_RATE + BUDGET_BURST + SLACK
            assert beside >= 6 / BUDGET_PER * BUDGET_RATE / 2
            assert after >= 5 / BUDGET_PER * BUDGET_RATE / 4
            served = {reply.status for reply in crowd.of("others", began)}
            assert 200 in served
            assert served <= {200, 503}
        finally:
            for replica in fleet:
                await replica.close()


def _calls(vendor: FakeVendor, since: float) -> int:
    return sum(call.mono >= since for call in vendor.journal.calls)


class TestStore:
    @pytest.fixture
    def moved(self, tmp_path: Path) -> Iterator[tuple[StoreServer, faked_time.Clock]]:
        """A store, and its date."""
        with faked_time.store_with_clock(tmp_path) as (server, clock):
            yield server, clock

    async def test_L3_T5_a_store_that_jumps_a_day_gives_one_burst_and_locks_nobody_out(
        self, moved: tuple[StoreServer, faked_time.Clock], tmp_path: Path
    ) -> None:
        """Forwards it forgets what was spent, once; backwards nobody waits longer than tau."""
        server, clock = moved
        limit = {"rate": RATE, "per": "1s", "burst": BURST}
        tree = merged(tree_for(tmp_path, server), {"limits.fingerprint": limit})
        async with replicas(tmp_path, tree) as fleet:
            fingerprint = visitor()
            began = time.monotonic()
            assert await _admitted(fleet, fingerprint) >= BURST
            clock.set("+1d")
            await _admitted(fleet, fingerprint, 1.0)
            clock.set("+0")
            locked = time.monotonic()
            while (await fleet[0].request_token(fingerprint)).status != 200:  # noqa: ASYNC110 - a process
                await asyncio.sleep(0.05)
            locked = time.monotonic() - locked
            await back(fleet)
            # Somebody who was never refused while it was ahead is full again a day from now.
            clock.set("+1d")
            spender = visitor()
            for replica in fleet:
                assert (await replica.request_token(spender)).status == 200
            clock.set("+0")
            started = time.monotonic()
            while (await fleet[1].request_token(spender)).status != 200:  # noqa: ASYNC110 - a process
                await asyncio.sleep(0.05)
            spent = time.monotonic() - started
            took = time.monotonic() - began
            print(
                f"a day forwards and back, {took:.1f} s in all: locked out {locked:.2f} and"
                f" {spent:.2f} s, tau is {TAU:.0f} s"
            )
        assert locked <= TAU + 1
        assert spent <= TAU + 1

    async def test_L3_a_store_that_jumps_a_day_forwards_admits_one_extra_burst(
        self, moved: tuple[StoreServer, faked_time.Clock], tmp_path: Path
    ) -> None:
        """And not one for each jump's direction: what was spent meanwhile stays spent."""
        server, clock = moved
        limit = {"rate": 1, "per": "1h", "burst": BURST}
        tree = merged(
            tree_for(tmp_path, server), {"limits.fingerprint": limit} | LONG_STORE_TIMEOUT
        )
        async with replicas(tmp_path, tree) as fleet, undisturbed(fleet):
            fingerprint = visitor()
            admitted = []
            for offset in ("+0", "+1d", "+0"):
                clock.set(offset)
                admitted.append(await _admitted(fleet, fingerprint))
        print(f"burst {BURST}: {admitted} admitted before, a day ahead, and back")
        assert admitted == [BURST, BURST, 0]

    async def test_T5_a_store_that_jumps_a_day_never_keeps_a_dead_token_alive(
        self, moved: tuple[StoreServer, faked_time.Clock], tmp_path: Path
    ) -> None:
        """Tokens of 8 s that the store, a day ahead, was told to keep for as long.

        After it has stepped back it says that they live for a day.  The replica that is asked did
        not mint them: it knows no more than what it reads.
        """
        server, clock = moved
        async with FakeVendor(VendorSettings(ip=None, lifetime=LIFETIME), seed=1) as vendor:
            tree = tree_for(tmp_path, server, vendor)
            async with replicas(tmp_path, tree) as fleet:
                visitors, least = [visitor() for _ in range(4)], []
                before = [await _served(fleet[0], fingerprint) for fingerprint in visitors[:2]]
                clock.set("+1d")
                ahead = [await _served(fleet[0], fingerprint) for fingerprint in visitors]
                assert [reply.token for reply in ahead[:2]] == [reply.token for reply in before]
                clock.set("+0")
                ends = time.monotonic() + LIFETIME + 2
                while time.monotonic() < ends:
                    for fingerprint in visitors:
                        reply = await _served(fleet[1], fingerprint)
                        exp = vendor.claims_of(reply.token)["exp"]
                        assert isinstance(exp, int)
                        least.append(exp - time.time())
                    await asyncio.sleep(0.1)
        print(f"{len(least)} tokens handed out; the least life left was {min(least):.1f} s")
        assert min(least) > 0


async def _served(replica: Replica, fingerprint: str) -> Reply:
    """Ask until there is a token: a clock that steps back leaves every bucket drained."""
    while (reply := await replica.request_token(fingerprint)).status == 429:  # noqa: ASYNC110 - a process
        await asyncio.sleep(0.01)
    return reply


async def _admitted(fleet: list[Replica], fingerprint: str, seconds: float = 0.0) -> int:
    """Ask on both until nobody is admitted at once, for at least so long; returns how many were."""
    ends, count = time.monotonic() + seconds, 0
    while True:
        replies = await asyncio.gather(
            *(fleet[turn % 2].request_token(fingerprint) for turn in range(2 * BURST))
        )
        passed = sum(reply.status == 200 for reply in replies)
        count += passed
        if time.monotonic() >= ends and passed < BURST:
            return count
        await asyncio.sleep(0.05)
