"""The store fails under traffic: rows S1-S5, promise G10, with replicas and servers as processes.

Each test prints what was admitted and how long recovery took.  `known` are visitors who have a
token, `new` ones have none, and `greedy` is one visitor who asks far more than the limit allows.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from processes import Broker, Tree, merged, secret_in
from replicas import (
    Crowd,
    Replica,
    away,
    back,
    pair,
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


Running = tuple[StoreServer, list[Broker], Tree]


@pytest.fixture(scope="module", params=["local", "closed"])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Two replicas, and a store that the tests may ruin."""
    folder = tmp_path_factory.mktemp(request.param)
    with store_server(valkey_binary()) as server:
        tree = limited(merged(tree_for(folder, server), {"store.on_error": request.param}))
        with pair(folder, tree) as brokers:
            yield server, brokers, tree


@pytest.fixture
async def scene(running: Running) -> AsyncIterator["Scene"]:
    """Those replicas under traffic; nobody may get a 500, or wait too long."""
    server, brokers, tree = running
    secret = secret_in(tree["clients"]["web"]["secret_file"])
    fleet = [Replica(broker, secret) for broker in brokers]
    await back(fleet)
    async with Crowd() as crowd:
        known = [visitor() for _ in range(20)]
        for fingerprint in known:
            for replica in fleet:
                assert (await replica.request_token(fingerprint)).status == 200
        greedy = visitor()
        scene = Scene(server, fleet, crowd)
        for replica in fleet:
            crowd.let("known", replica, 20, known)
            crowd.let("new", replica, 4)
            crowd.let("greedy", replica, 15, [greedy])
        await asyncio.sleep(2)
        yield scene
    for replica in fleet:
        await replica.http.close()
        assert "broker.defect" not in replica.broker.log()
        assert "Traceback" not in replica.broker.log()
    statuses = Counter(reply.status for _, _, reply in crowd.replies)
    assert not set(statuses) - {200, 429, 503}, statuses
    assert crowd.slowest("known") < HELD
    assert crowd.slowest("new") < NEW


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
    """A store, two replicas, and their traffic since `began`."""

    def __init__(self, store: StoreServer, fleet: Sequence[Replica], crowd: Crowd) -> None:
        self.store = store
        self.fleet = fleet
        self.crowd = crowd
        self.began = time.monotonic()

    async def heal(self, heal: Callable[[], None]) -> str:
        """Let the store be well again, for two seconds; returns how long recovery took."""
        await asyncio.to_thread(heal)
        recovered = await back(self.fleet)
        await asyncio.sleep(2)
        await self.crowd.stop()
        return f"well {recovered:.2f} s after the store was"

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


local = pytest.mark.parametrize("running", ["local"], indirect=True, scope="module")
closed = pytest.mark.parametrize("running", ["closed"], indirect=True, scope="module")


@local
class TestOnItsOwn:
    """`on_error = "local"`."""

    async def test_S1_S3_S5_G10_a_store_that_is_killed_and_comes_back_without_its_data(
        self, scene: Scene
    ) -> None:
        """Everybody is served all the time; it admits one burst more than one that remembers."""
        scene.store.kill()
        noticed = await away(scene.fleet)
        for replica in scene.fleet:
            await says(replica, 200, "degraded")
            assert (await replica.probe("/livez"))[0] == 200
        await asyncio.sleep(3)
        recovery = await scene.heal(scene.store.start)
        admitted, allowed = scene.report(
            f"killed, back without data: noticed after {noticed:.2f} s, {recovery}"
        )
        assert set(scene.crowd.statuses("known")) == {200}
        assert set(scene.crowd.statuses("new")) == {200}
        assert admitted <= allowed + BURST + EXTRA
        for replica in scene.fleet:
            await says(replica, 200, "ok")

    async def test_S1_S3_a_store_that_is_killed_and_comes_back_with_its_data(
        self, scene: Scene
    ) -> None:
        """What was spent at the store and here is both remembered: no burst after recovery."""
        scene.store.command("SAVE")
        scene.store.kill()
        noticed = await away(scene.fleet)
        await asyncio.sleep(1.5)
        recovery = await scene.heal(scene.store.start)
        admitted, allowed = scene.report(
            f"killed, back with data: noticed after {noticed:.2f} s, {recovery}"
        )
        assert set(scene.crowd.statuses("known")) == {200}
        assert set(scene.crowd.statuses("new")) == {200}
        assert admitted <= allowed + EXTRA

    async def test_S1_S3_a_store_that_hangs_for_ten_seconds(self, scene: Scene) -> None:
        """It keeps connections open and answers nothing; no request waits for it."""
        scene.store.pause()
        noticed = await away(scene.fleet)
        await asyncio.sleep(10)
        recovery = await scene.heal(scene.store.resume)
        admitted, allowed = scene.report(f"paused 10 s: noticed after {noticed:.2f} s, {recovery}")
        assert set(scene.crowd.statuses("known")) == {200}
        assert set(scene.crowd.statuses("new")) == {200}
        assert admitted <= allowed + EXTRA

    async def test_S2_a_store_that_forgets_the_scripts_in_the_middle_of_load(
        self, scene: Scene
    ) -> None:
        """SCRIPT FLUSH twenty times: no request fails, none is decided elsewhere."""
        script = 'broker_store_errors_total{reason="script"}'
        before = [await replica.metric(script) for replica in scene.fleet]
        for _ in range(20):
            await asyncio.to_thread(scene.store.command, "SCRIPT", "FLUSH")
            await asyncio.sleep(0.1)
        await scene.crowd.stop()
        scene.report("SCRIPT FLUSH, 20 times")
        assert set(scene.crowd.statuses("known")) == {200}
        assert set(scene.crowd.statuses("new")) == {200}
        assert [await replica.metric(script) for replica in scene.fleet] == before


@closed
class TestClosed:
    """`on_error = "closed"`."""

    @pytest.mark.parametrize("fault", ["killed", "paused"])
    async def test_S1_G10_every_request_is_refused_until_it_is_back(
        self, fault: str, scene: Scene
    ) -> None:
        """503 with Retry-After, readiness 503, liveness 200; then all is as before."""
        hurt, heal = _fault(scene.store, fault)
        hurt()
        failed = time.monotonic()
        noticed = await away(scene.fleet)
        for replica in scene.fleet:
            await says(replica, 503, "no_store")
            assert (await replica.probe("/livez"))[0] == 200
        await asyncio.sleep(1.5)
        healing = time.monotonic()
        recovery = await scene.heal(heal)
        scene.report(f"{fault}, closed: noticed after {noticed:.2f} s, {recovery}")
        # a call to the store that was out when it came back was answered, late on a busy machine
        during = scene.crowd.of("known", failed + 0.1, healing - 0.5)
        assert {reply.status for reply in during} == {503}
        assert {int(reply.headers["Retry-After"]) for reply in during} <= {1, 2}
        after = scene.crowd.statuses("known", time.monotonic() - 1.8)
        assert after[200] > 0.9 * after.total(), "one that the machine delayed may be refused"
        for replica in scene.fleet:
            await says(replica, 200, "ok")


class TestStart:
    """Without the store."""

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
            asked = [await fleet[turn % 2].request_token(fingerprint) for turn in range(3 * BURST)]
            alone = Counter(reply.status for reply in asked)
            assert alone[200] == BURST, "half of it on each"
            with store_server(
                valkey_binary(), "--port", str(port), "--bind", "127.0.0.1"
            ) as server:
                recovered = await back(fleet)
                after = [await fleet[turn % 2].request_token(fingerprint) for turn in range(BURST)]
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

    async def test_S1_a_start_without_the_store_is_not_ready(self, tmp_path: Path) -> None:
        """It starts all the same, refuses, and is well by itself."""
        port = free_port()
        tree = tree_for(tmp_path, f"valkey://127.0.0.1:{port}")
        replica = await start(tmp_path, merged(tree, {"store.on_error": "closed"}))
        try:
            await says(replica, 503, "no_store")
            assert (await replica.probe("/livez"))[0] == 200
            refused = await replica.request_token()
            assert refused.status == 503
            assert int(refused.headers["Retry-After"]) >= 1
            with store_server(valkey_binary(), "--port", str(port), "--bind", "127.0.0.1"):
                recovered = await back([replica])
                assert (await replica.request_token()).status == 200
            print(f"closed, started without the store: well {recovered:.2f} s after it was there")
        finally:
            await replica.close()


def _fault(store: StoreServer, name: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what hurts a store, and what heals it."""
    if name == "killed":
        return store.kill, store.start
    return store.pause, store.resume
