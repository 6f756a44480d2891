"""Processes without their store, or before a vendor that stands still: rows N13, N18, N22, N24.

By the vendor's own journal.  The budget is the shipped one in small where a minute would be long.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from processes import Tree, merged
from replicas import Crowd, Replica, back, start, tree_for
from servers import StoreServer, free_port

from broker.testing import FakeVendor
from broker.valkey.membership import UNSEEN_PARTS

pytestmark = pytest.mark.parts

RATE, PER, BURST = 20, 2.0, 4
SMALL = {
    "issuer.budget": {
        "rate": RATE,
        "per": f"{PER:g}s",
        "burst": BURST,
        "max_wait": "2s",
        "window": 604,
    }
}
SHIPPED = {"issuer.budget": {"rate": 106, "per": "60s", "burst": 8, "max_wait": "8s"}}

SLACK = 5
"""Calls that a busy machine moves into the next of these short windows."""

VENDOR_ALLOWS = 120
"""Calls a minute."""


async def closed(fleet: Sequence[Replica]) -> None:
    """End them all."""
    for replica in fleet:
        await replica.close()


@pytest.mark.parametrize("workers", [1, 6])
async def test_N18_a_start_without_the_store_serves_somebody(
    workers: int, vendor: FakeVendor, tmp_path: Path
) -> None:
    """A relay with the shipped budget and no store: a first visitor within its share's interval.

    A connection each: without the store one worker of all has the share.
    """
    tree = tree_for(tmp_path, f"valkey://127.0.0.1:{free_port()}", vendor)
    replica = await start(tmp_path, merged(tree, SHIPPED | {"server.workers": workers}))
    await replica.http.close()
    replica.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
    try:
        async with asyncio.timeout(150):
            while (reply := await replica.request_token()).status != 200:
                assert reply.status == 503
                assert int(reply.headers["Retry-After"]) >= 1
                await asyncio.sleep(0.5)
    finally:
        await replica.close()


async def test_N18_a_quiet_fleet_that_loses_its_store_serves_the_first_who_comes(
    store: StoreServer, vendor: FakeVendor, tmp_path: Path
) -> None:
    """Two workers, nobody for a while: the share has filled, so the next visitor does not wait."""
    tree = tree_for(tmp_path, store, vendor)
    replica = await start(tmp_path, merged(tree, SHIPPED | {"server.workers": 2}))
    try:
        await back([replica])
        assert (await replica.request_token()).status == 200
        await asyncio.sleep(3)
        store.kill()
        await asyncio.sleep(15)
        reply = await replica.request_token()
        assert reply.status == 200
        assert reply.seconds < 2
    finally:
        await replica.close()
        store.start()


async def test_N24_relays_that_never_saw_the_store_fit_the_vendors_minute(
    vendor: FakeVendor, tmp_path: Path
) -> None:
    """Five of them in full demand for a minute, from their start on."""
    tree = merged(tree_for(tmp_path, f"valkey://127.0.0.1:{free_port()}", vendor), SHIPPED)
    fleet = [await start(tmp_path, tree) for _ in range(5)]
    try:
        async with Crowd() as crowd:
            for place, replica in enumerate(fleet):
                crowd.let(f"relay {place}", replica, 4)
            await asyncio.sleep(60)
            await crowd.stop()
        print(f"{len(fleet)} relays: fullest minute {vendor.journal.in_window(60)}")
        assert 0 < vendor.journal.in_window(60) <= VENDOR_ALLOWS * len(fleet) / UNSEEN_PARTS
    finally:
        await closed(fleet)


async def test_N22_a_fleet_has_one_budget_however_its_vendor_is_spelled(
    store: StoreServer, vendor: FakeVendor, tmp_path: Path
) -> None:
    """A slash at the end, upper case: the two instances are members of one fleet."""
    tree = merged(tree_for(tmp_path, store, vendor), SMALL)
    plain = vendor.url.replace("127.0.0.1", "localhost")
    spelled: list[Tree] = [
        merged(tree, {"issuer.upstream.base_url": url})
        for url in (plain, f"{plain}/", plain.replace("localhost", "LOCALHOST"))
    ]
    fleet = [await start(tmp_path, each) for each in spelled]
    try:
        await back(fleet)
        assert len({name for name in store.all_keys() if name.endswith(b"members")}) == 1
        async with Crowd() as crowd:
            for place, replica in enumerate(fleet):
                crowd.let(f"replica {place}", replica, 12)
            await asyncio.sleep(6)
            await crowd.stop()
        assert vendor.journal.in_window(PER) <= RATE + BURST + SLACK
    finally:
        await closed(fleet)


class Dam:
    """A network before the vendor that can stand still: what is sent meanwhile arrives at its end.

    Also what a caller sent that has given up since.
    """

    def __init__(self, vendor: FakeVendor) -> None:
        self._port = int(vendor.url.rpartition(":")[2])
        self.flows = asyncio.Event()
        self.flows.set()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[str]:
        """Forward connections; yields the URL to call instead of the vendor's."""
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _forward(self, theirs: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        answers, onwards = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._pump(theirs, onwards), self._pump(answers, back))

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                await self.flows.wait()
                target.write(data)
                await target.drain()
        target.close()


async def test_N13_a_process_that_ends_in_a_stall_leaves_its_calls_owed(
    store: StoreServer, vendor: FakeVendor, tmp_path: Path
) -> None:
    """SIGTERM with calls out before a network that stands still: the store is told of them."""
    dam = Dam(vendor)
    async with dam.opened() as url:
        here = {"issuer.upstream.base_url": url, "issuer.upstream.timeout": "1s"}
        replica = await start(tmp_path, merged(tree_for(tmp_path, store, vendor), SMALL | here))
        try:
            await back([replica])
            assert (await replica.request_token()).status == 200
            assert owed_in(store) == 0
            dam.flows.clear()
            replies = await asyncio.gather(*(replica.request_token() for _ in range(2)))
            assert [reply.status for reply in replies] == [504, 504]
        finally:
            await replica.close()
            dam.flows.set()
        assert owed_in(store) == 2


def owed_in(store: StoreServer) -> int:
    """Return how many calls may yet arrive that nobody sees the end of."""
    (name,) = (name for name in store.all_keys() if name.endswith(b"budget"))
    return int(store.command("HGET", name, "owed"))


@pytest.mark.parametrize(("replicas", "workers"), [(3, 1), (1, 2)])
async def test_N13_a_vendor_that_stalls_gets_no_more_than_a_window_at_once(
    replicas: int, workers: int, store: StoreServer, vendor: FakeVendor, tmp_path: Path
) -> None:
    """In full demand; for four windows nothing gets through, then all that was sent, at once.

    Before the stall the budget is used, and after it again.
    """
    dam = Dam(vendor)
    async with dam.opened() as url:
        here = {"issuer.upstream.base_url": url, "server.workers": workers}
        tree = merged(tree_for(tmp_path, store, vendor), SMALL | here)
        fleet = [await start(tmp_path, tree) for _ in range(replicas)]
        try:
            await back(fleet)
            async with Crowd() as crowd:
                for place, replica in enumerate(fleet):
                    crowd.let(f"replica {place}", replica, 36 / replicas)
                await asyncio.sleep(6)
                before = len(vendor.journal.calls)
                dam.flows.clear()
                await asyncio.sleep(4 * PER)
                during = len(vendor.journal.calls) - before
                dam.flows.set()
                await asyncio.sleep(6)
                after = len(vendor.journal.calls) - before - during
                await crowd.stop()
            worst = vendor.journal.in_window(PER)
            print(f"{before} calls in 6 s, {after} in 6 s after a stall; fullest window {worst}")
            assert during <= 2
            assert min(before, after) >= 0.5 * 6 / PER * RATE
            assert worst <= RATE + BURST + SLACK
        finally:
            await closed(fleet)
