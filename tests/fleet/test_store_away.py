"""The store fails under traffic: rows S1-S5, promise G10, with replicas and servers as processes.

Each test prints what was admitted and how long recovery took.  `known` are visitors who have a
token, `new` ones have none, and `greedy` is one visitor who asks far more than the limit allows.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from processes import Tree, merged
from replicas import (
    Crowd,
    Replica,
    away,
    back,
    replicas,
    start,
    tree_for,
    until,
    visitor,
)
from servers import StoreServer, free_port, store_server, valkey_binary

pytestmark = pytest.mark.parts

BURST, RATE = 20, 5
"""The greedy visitor's limit: at once, and a second."""

HELD, NEW = 2.0, 4.0
"""Seconds that no request may take, with a token and without: a hung store costs 50 ms a call, a
new token three calls; the rest is for a machine that is busy with other tests."""


@pytest.fixture
def own_store() -> Iterator[StoreServer]:
    """A store that the test may ruin."""
    with store_server(valkey_binary()) as server:
        yield server


EXTRA = BURST + RATE / 2 * 5
"""What a loss of the store may admit beyond the limit: the buckets that both replicas begin with
when they are on their own are one burst together; and while one is back and the other is not, for
the five seconds that a breaker waits at most, that one's share comes on top."""


async def says(replica: Replica, status: int, state: str) -> None:
    """Wait until readiness says this: it is brought up to date twice a second."""

    async def look() -> bool:
        return await replica.probe("/readyz") == (status, {"status": state})

    await until(look, f"{state}, not {await replica.probe('/readyz')}")


def limited(tree: Tree) -> Tree:
    """Limit every visitor as the greedy one is."""
    return merged(tree, {"limits.fingerprint": {"rate": RATE, "per": "1s", "burst": BURST}})


class Scene:
    """Two replicas under traffic; `greedy` counts since `began`."""

    def __init__(self, fleet: Sequence[Replica], crowd: Crowd) -> None:
        self.fleet = fleet
        self.crowd = crowd
        self.began = time.monotonic()

    def report(self, what: str) -> tuple[int, float]:
        """Print and return what the greedy visitor was given, and what a limit would have given."""
        took = time.monotonic() - self.began
        admitted = self.crowd.statuses("greedy")[200]
        allowed = BURST + RATE * took
        print(
            f"{what}: known {dict(self.crowd.statuses('known'))} slowest"
            f" {self.crowd.slowest('known'):.2f} s, new {dict(self.crowd.statuses('new'))} slowest"
            f" {self.crowd.slowest('new'):.2f} s, greedy {admitted} in {took:.1f} s"
            f" where the limit allows {allowed:.0f}"
        )
        return admitted, allowed


@asynccontextmanager
async def under_traffic(folder: Path, tree: Tree) -> AsyncIterator[Scene]:
    """Run two replicas that are asked all the time; nobody may get a 500, or wait too long."""
    async with replicas(folder, limited(tree)) as fleet, Crowd() as crowd:
        known = [visitor() for _ in range(20)]
        for fingerprint in known:
            assert (await fleet[0].ask(fingerprint)).status == 200
            assert (await fleet[1].ask(fingerprint)).status == 200
        scene, greedy = Scene(fleet, crowd), visitor()
        for replica in fleet:
            crowd.let("known", replica, 20, known)
            crowd.let("new", replica, 4)
            crowd.let("greedy", replica, 15, [greedy])
        await asyncio.sleep(2)
        yield scene
        await crowd.stop()
    statuses = Counter(reply.status for _, _, reply in crowd.replies)
    assert not set(statuses) - {200, 429, 503}, statuses
    assert crowd.slowest("known") < HELD
    assert crowd.slowest("new") < NEW


class TestOnItsOwn:
    """`on_error = "local"`."""

    async def test_S1_S3_S5_G10_a_store_that_is_killed_and_comes_back_without_its_data(
        self, own_store: StoreServer, tmp_path: Path
    ) -> None:
        """Everybody is served all the time; it admits one burst more than one that remembers."""
        async with under_traffic(tmp_path, tree_for(tmp_path, own_store)) as scene:
            own_store.kill()
            noticed = await away(scene.fleet)
            for replica in scene.fleet:
                await says(replica, 200, "degraded")
                assert (await replica.probe("/livez"))[0] == 200
            await asyncio.sleep(5)
            await asyncio.to_thread(own_store.start)
            recovered = await back(scene.fleet)
            await asyncio.sleep(5)
            await scene.crowd.stop()
            admitted, allowed = scene.report(
                f"killed, back without data: noticed after {noticed:.2f} s, well {recovered:.2f} s"
                " after it was back"
            )
            assert set(scene.crowd.statuses("known")) == {200}
            assert set(scene.crowd.statuses("new")) == {200}
            assert admitted <= allowed + BURST + EXTRA
            for replica in scene.fleet:
                await says(replica, 200, "ok")

    async def test_S1_S3_a_store_that_is_killed_and_comes_back_with_its_data(
        self, own_store: StoreServer, tmp_path: Path
    ) -> None:
        """What was spent at the store and here is both remembered: no burst after recovery."""
        async with under_traffic(tmp_path, tree_for(tmp_path, own_store)) as scene:
            own_store.ask("SAVE")
            own_store.kill()
            noticed = await away(scene.fleet)
            await asyncio.sleep(3)
            await asyncio.to_thread(own_store.start)
            recovered = await back(scene.fleet)
            await asyncio.sleep(5)
            await scene.crowd.stop()
            admitted, allowed = scene.report(
                f"killed, back with data: noticed after {noticed:.2f} s, well {recovered:.2f} s"
                " after it was back"
            )
            assert set(scene.crowd.statuses("known")) == {200}
            assert set(scene.crowd.statuses("new")) == {200}
            assert admitted <= allowed + EXTRA

    async def test_S1_S3_a_store_that_hangs_for_ten_seconds(
        self, own_store: StoreServer, tmp_path: Path
    ) -> None:
        """It keeps connections open and answers nothing; no request waits for it."""
        async with under_traffic(tmp_path, tree_for(tmp_path, own_store)) as scene:
            own_store.pause()
            noticed = await away(scene.fleet)
            await asyncio.sleep(10)
            own_store.resume()
            recovered = await back(scene.fleet)
            await asyncio.sleep(5)
            await scene.crowd.stop()
            admitted, allowed = scene.report(
                f"paused 10 s: noticed after {noticed:.2f} s, well {recovered:.2f} s after it went"
                " on"
            )
            assert set(scene.crowd.statuses("known")) == {200}
            assert set(scene.crowd.statuses("new")) == {200}
            assert admitted <= allowed + EXTRA

    async def test_S2_a_store_that_forgets_the_scripts_in_the_middle_of_load(
        self, own_store: StoreServer, tmp_path: Path
    ) -> None:
        """SCRIPT FLUSH twenty times: no request fails, none is decided elsewhere."""
        async with under_traffic(tmp_path, tree_for(tmp_path, own_store)) as scene:
            for _ in range(20):
                await asyncio.to_thread(own_store.ask, "SCRIPT", "FLUSH")
                await asyncio.sleep(0.1)
            await scene.crowd.stop()
            admitted, allowed = scene.report("SCRIPT FLUSH, 20 times")
            assert set(scene.crowd.statuses("known")) == {200}
            assert set(scene.crowd.statuses("new")) == {200}
            script = 'broker_store_errors_total{reason="script"}'
            assert [await replica.metric(script) for replica in scene.fleet] == [0, 0]
            assert admitted <= allowed + 1

    async def test_S3_S5_a_start_without_the_store(self, tmp_path: Path) -> None:
        """Degraded, with the share that is configured; well by itself, without a second burst."""
        port = free_port()
        tree = merged(
            tree_for(tmp_path, f"valkey://127.0.0.1:{port}"),
            {
                "limits.fingerprint": {"rate": 1, "per": "1h", "burst": BURST},
                "store.replicas": 2,
            },
        )
        fleet = await asyncio.gather(start(tmp_path, tree), start(tmp_path, tree))
        try:
            for replica in fleet:
                await says(replica, 200, "degraded")
                assert await replica.is_degraded()
            fingerprint = visitor()
            asked = [await fleet[turn % 2].ask(fingerprint) for turn in range(3 * BURST)]
            alone = Counter(reply.status for reply in asked)
            assert alone[200] == BURST, "half of it on each"
            with store_server(
                valkey_binary(), "--port", str(port), "--bind", "127.0.0.1"
            ) as server:
                recovered = await back(fleet)
                after = [await fleet[turn % 2].ask(fingerprint) for turn in range(BURST)]
                assert {reply.status for reply in after} == {429}
                await says(fleet[0], 200, "ok")
                assert server.all_keys()
            print(
                f"start without the store: {alone[200]} admitted of {3 * BURST} with burst {BURST},"
                f" well {recovered:.2f} s after it was there, then {len(after)} refused of as many"
            )
        finally:
            for replica in fleet:
                await replica.close()


class TestClosed:
    """`on_error = "closed"`."""

    @pytest.mark.parametrize("fault", ["killed", "paused"])
    async def test_S1_G10_every_request_is_refused_until_it_is_back(
        self, fault: str, own_store: StoreServer, tmp_path: Path
    ) -> None:
        """503 with Retry-After, readiness 503, liveness 200; then all is as before."""
        tree = merged(tree_for(tmp_path, own_store), {"store.on_error": "closed"})
        async with under_traffic(tmp_path, tree) as scene:
            hurt, heal = _fault(own_store, fault)
            hurt()
            failed = time.monotonic()
            noticed = await away(scene.fleet)
            for replica in scene.fleet:
                await says(replica, 503, "no_store")
                assert (await replica.probe("/livez"))[0] == 200
            await asyncio.sleep(4)
            healing = time.monotonic()
            await asyncio.to_thread(heal)
            recovered = await back(scene.fleet)
            well = time.monotonic()
            await asyncio.sleep(3)
            await scene.crowd.stop()
            scene.report(
                f"{fault}, closed: noticed after {noticed:.2f} s, well {recovered:.2f} s after it"
                " was back"
            )
            during = scene.crowd.of("known", failed + 0.1, healing)
            assert {reply.status for reply in during} == {503}
            assert {int(reply.headers["Retry-After"]) for reply in during} <= {1, 2}
            assert set(scene.crowd.statuses("known", well + 0.2)) == {200}
            for replica in scene.fleet:
                await says(replica, 200, "ok")

    async def test_S1_a_start_without_the_store_is_not_ready(self, tmp_path: Path) -> None:
        """It starts all the same, refuses, and is well by itself."""
        port = free_port()
        tree = tree_for(tmp_path, f"valkey://127.0.0.1:{port}")
        replica = await start(tmp_path, merged(tree, {"store.on_error": "closed"}))
        try:
            await says(replica, 503, "no_store")
            assert (await replica.probe("/livez"))[0] == 200
            refused = await replica.ask()
            assert refused.status == 503
            assert int(refused.headers["Retry-After"]) >= 1
            with store_server(valkey_binary(), "--port", str(port), "--bind", "127.0.0.1"):
                recovered = await back([replica])
                assert (await replica.ask()).status == 200
            print(f"closed, started without the store: well {recovered:.2f} s after it was there")
        finally:
            await replica.close()


def _fault(store: StoreServer, name: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what hurts a store, and what heals it."""
    if name == "killed":
        return store.kill, store.start
    return store.pause, store.resume
