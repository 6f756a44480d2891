"""Two replicas, one visitor: rows L6 and F1-F9, promises G1, G2 and G8, over real sockets."""

import asyncio
import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
from processes import Broker, Tree, merged, secret_in
from replicas import (
    AGENT,
    LONG_STORE_TIMEOUT,
    UNLIMITED,
    Replica,
    Reply,
    back,
    leases,
    pair,
    replicas,
    tree_for,
    undisturbed,
    until,
    visitor,
)
from servers import StoreServer, free_port

from broker.testing import FakeVendor, Refusal
from broker.testing.vendor import faults
from broker.testing.vendor.mint import visitor_mark

pytestmark = pytest.mark.parts

LEASE, RECHECK = 3.0, 0.35
"""Seconds: how long a leader that was killed is waited for, and how late that is noticed."""


FEW, TWICE = "B50FEW0001", "C02TWO0001"
"""Agents with limits that a test can meet: 50 requests of a visitor, 2 mints."""


@pytest.fixture(scope="module")
def running(
    valkey: StoreServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[Broker], Tree]]:
    """Two brokers before an address where each test has a vendor of its own."""
    folder = tmp_path_factory.mktemp("pair")
    vendor = FakeVendor(UNLIMITED, port=free_port(), secrets=[secrets.token_urlsafe(24)])
    tree = merged(
        tree_for(folder, valkey, vendor),
        {
            f"limits.fingerprint.overrides.{FEW}": {"rate": 1, "per": "1h", "burst": 50},
            f"limits.agent.overrides.{TWICE}": {"rate": 1, "per": "1h", "burst": 2},
            **LONG_STORE_TIMEOUT,
        },
    )
    with pair(folder, tree) as brokers:
        yield brokers, tree


@pytest.fixture
async def vendor(running: tuple[list[Broker], Tree]) -> AsyncIterator[FakeVendor]:
    """A vendor without limits, where the brokers expect it."""
    upstream = running[1]["issuer"]["upstream"]
    port = int(upstream["base_url"].rpartition(":")[2])
    async with FakeVendor(UNLIMITED, seed=1, port=port, secrets=[upstream["api_secret"]]) as vendor:
        yield vendor


@pytest.fixture
async def fleet(
    running: tuple[list[Broker], Tree], vendor: FakeVendor
) -> AsyncIterator[list[Replica]]:
    """Those brokers, and somebody who asks them."""
    brokers, tree = running
    fleet = [
        Replica(broker, secret_in(tree["clients"]["web"]["secret_file"])) for broker in brokers
    ]
    await back(fleet)
    yield fleet
    for replica in fleet:
        assert "broker.defect" not in replica.broker.log()
        await replica.http.close()


def begin(replica: Replica, fingerprint: str) -> "asyncio.Task[Reply]":
    """Let somebody ask, and go on."""
    return asyncio.get_running_loop().create_task(replica.request_token(fingerprint))


async def called(vendor: FakeVendor, count: int) -> None:
    """Return when that many mints have reached the vendor."""
    async with asyncio.timeout(20):
        await vendor.journal.arrived(count)


async def waits(store: StoreServer, replica_count: int) -> None:
    """Return when that many replicas have said at the store that they wait for a leader."""

    async def look() -> bool:
        return await asyncio.to_thread(waiting, store) == replica_count

    await until(look, f"{replica_count} replicas to wait")


def waiting(store: StoreServer) -> int:
    """Count the replicas that wait for a leader."""
    with store.client() as client:
        names = list(client.scan_iter(match="etb:*lease:*", count=1000))
        fields = [field for name in names for field in client.hkeys(name)]
    return sum(field.startswith(b"waiter:") for field in fields)


class TestLimits:
    async def test_L6_a_thousand_at_once_on_two_replicas_are_a_burst(
        self, fleet: list[Replica]
    ) -> None:
        """Exactly `burst` of one visitor's requests pass, whichever replica they meet."""
        fingerprint = visitor()
        async with undisturbed(fleet):
            replies = await asyncio.gather(
                *(fleet[turn % 2].request_token(fingerprint, FEW) for turn in range(1000))
            )
        statuses = Counter(reply.status for reply in replies)
        print(f"1,000 at once on two replicas, burst 50: {dict(statuses)}")
        assert statuses == {200: 50, 429: 950}
        assert len({reply.token for reply in replies if reply.status == 200}) == 1


class TestFlights:
    async def test_F1_G1_a_thousand_first_requests_on_two_replicas_are_one_call(
        self, fleet: list[Replica], store: StoreServer, vendor: FakeVendor
    ) -> None:
        """One call, one token, one session, one charge of the agent."""
        store.command("DEL", f"etb:{{agent:{TWICE}}}:bucket")
        before = len(vendor.journal.calls)
        fingerprint = visitor()
        async with undisturbed(fleet):
            with vendor.fail(faults.slow(1.5)):
                replies = await asyncio.gather(
                    *(fleet[turn % 2].request_token(fingerprint, TWICE) for turn in range(1000))
                )
            calls = len(vendor.journal.calls) - before
            later = [(await replica.request_token(agent=TWICE)).status for replica in fleet]
        assert {reply.status for reply in replies} == {200}
        assert len({(reply.token, reply.session) for reply in replies}) == 1
        assert calls == 1
        assert later == [200, 429], "one charge of two was left"
        slowest = max(reply.seconds for reply in replies)
        print(f"1,000 first requests, a mint of 1.5 s: 1 call, slowest answer {slowest:.2f} s")

    async def test_F2_G2_the_caller_of_the_minting_replica_leaves_in_the_queue(
        self, fleet: list[Replica], store: StoreServer, vendor: FakeVendor
    ) -> None:
        """Its place is given up, and the other replica mints for its own caller."""
        fingerprint = visitor()
        vendor.fail(faults.error(Refusal.RATE_LIMITED, retry_after="2"), times=1)
        pausing = begin(fleet[0], visitor())  # whom the vendor tells to wait, and all others too
        await called(vendor, 1)
        first = begin(fleet[0], fingerprint)
        await until(lambda: _is(leases(store), 2), "the first to lead")
        second = begin(fleet[1], fingerprint)
        await waits(store, 1)
        first.cancel()
        assert (await second).status == 200
        assert (await pausing).status == 200
        minted = [call.fingerprint for call in vendor.journal.calls]
        assert minted.count(fingerprint) == 1

    async def test_F2_G2_the_caller_of_the_minting_replica_leaves_mid_mint(
        self, fleet: list[Replica], store: StoreServer, vendor: FakeVendor
    ) -> None:
        """The mint was sent: it is finished, and the other replica's caller has its token."""
        fingerprint = visitor()
        with vendor.fail(faults.slow(1.0)):
            first = begin(fleet[0], fingerprint)
            await called(vendor, 1)
            second = begin(fleet[1], fingerprint)
            await waits(store, 1)
            first.cancel()
            reply = await second
        assert reply.status == 200
        assert (await fleet[0].request_token(fingerprint)).token == reply.token
        assert len(vendor.journal.calls) == 1

    async def test_F3_all_callers_of_both_replicas_leave(
        self, fleet: list[Replica], store: StoreServer, vendor: FakeVendor
    ) -> None:
        """What was sent is finished and held for both; nothing is left under way."""
        fingerprint = visitor()
        with vendor.fail(faults.slow(0.5)):
            callers = [begin(fleet[turn % 2], fingerprint) for turn in range(10)]
            await called(vendor, 1)
            await waits(store, 1)
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
            await until(lambda: _is(leases(store), 0), "the mint to end")
        for replica in fleet:
            assert (await replica.request_token(fingerprint)).reused
            assert await replica.metric("broker_mints_in_flight") == 0
        assert len(vendor.journal.calls) == 1

    @pytest.mark.parametrize(
        ("fault", "status", "code"),
        [
            (faults.error(Refusal.VALIDATION_ERROR), 400, "VALIDATION_ERROR"),
            (faults.truncated(), 502, "UPSTREAM_UNAVAILABLE"),
        ],
        ids=["refused", "broken"],
    )
    async def test_F4_a_failed_mint_is_the_one_error_of_all_who_wait(
        self,
        fault: faults.Fault,
        status: int,
        code: str,
        fleet: list[Replica],
        store: StoreServer,
        vendor: FakeVendor,
    ) -> None:
        """On both replicas, after one call; whoever comes later may try again."""
        fingerprint = visitor()
        with vendor.fail(faults.combined(fault, faults.slow(1.0))):
            callers = [begin(fleet[turn % 2], fingerprint) for turn in range(100)]
            await called(vendor, 1)
            await waits(store, 1)
            replies = await asyncio.gather(*callers)
        assert len(vendor.journal.calls) == 1
        assert {reply.status for reply in replies} == {status}
        assert len({str(reply.body) for reply in replies}) == 1
        assert replies[0].body["error"]["code"] == code
        print(f"100 who waited on two replicas: {status} {code} for all, 1 call")
        assert (await fleet[1].request_token(fingerprint)).status == 200

    async def test_F9_half_of_those_who_wait_on_two_replicas_leave(
        self, fleet: list[Replica], vendor: FakeVendor
    ) -> None:
        """At random moments; the other half get the token of one mint."""
        chance = random.Random(9)
        fingerprint = visitor()
        with vendor.fail(faults.slow(1.0)):
            callers = [begin(fleet[turn % 2], fingerprint) for turn in range(100)]
            chance.shuffle(callers)
            await called(vendor, 1)
            for caller in callers[:50]:
                await asyncio.sleep(chance.uniform(0, 0.02))
                caller.cancel()
            replies = await asyncio.gather(*callers[50:])
        assert len({reply.token for reply in replies}) == 1
        assert len(vendor.journal.calls) == 1

    async def test_S4_another_takes_over_from_a_leader_that_was_killed(
        self, store: StoreServer, vendor: FakeVendor, tmp_path: Path
    ) -> None:
        """A kill -9 mid-mint: the other replica mints once the lease has ended, and not before."""
        async with replicas(tmp_path, tree_for(tmp_path, store, vendor)) as fleet:
            fingerprint = visitor()
            vendor.fail(faults.hang(), times=1)
            first = begin(fleet[0], fingerprint)
            await called(vendor, 1)
            await asyncio.sleep(1.5)  # long enough to have been renewed
            second = begin(fleet[1], fingerprint)
            await waits(store, 1)
            killed = time.monotonic()
            await fleet[0].kill()
            with pytest.raises(aiohttp.ClientError):
                await first
            reply = await second
            took = time.monotonic() - killed
        print(f"the other replica had a token {took:.2f} s after the leader was killed")
        assert reply.status == 200
        assert len(vendor.journal.calls) == 2
        assert took < LEASE + RECHECK + 1, "the mint itself takes a moment, too"

    async def test_S4_a_lease_is_kept_while_its_mint_takes_longer(
        self, fleet: list[Replica], vendor: FakeVendor
    ) -> None:
        """Renewed every second: a mint of one and a half leases is one call for both replicas."""
        fingerprint = visitor()
        with vendor.fail(faults.slow(1.5 * LEASE)):
            replies = await asyncio.gather(*(each.request_token(fingerprint) for each in fleet))
        assert len({reply.token for reply in replies}) == 1
        assert len(vendor.journal.calls) == 1


class TestNobodyElse:
    async def test_G8_F8_no_interleaving_gives_a_token_to_somebody_else(
        self, fleet: list[Replica], vendor: FakeVendor
    ) -> None:
        """60 visitors, two agents, two replicas, slow and failing mints, callers who leave."""
        chance = random.Random(8)
        statuses: Counter[int] = Counter()

        async def request_token(replica: Replica, fingerprint: str) -> tuple[str, str] | None:
            agent = chance.choice([AGENT, "B12ABC0001"])
            await asyncio.sleep(chance.uniform(0, 3))
            try:
                async with asyncio.timeout(chance.choice([0.02, 0.2, 20, 20])):
                    reply = await replica.request_token(fingerprint, agent)
            except TimeoutError:
                statuses[0] += 1
                return None
            statuses[reply.status] += 1
            if reply.status != 200:
                return None
            assert reply.session.startswith(visitor_mark(agent, fingerprint, None) + "-")
            return f"{agent} {fingerprint}", reply.token

        vendor.fail(faults.slow(0.3), where=lambda _call: chance.random() < 0.4)
        vendor.fail(faults.truncated(), where=lambda _call: chance.random() < 0.1)

        visitors = [visitor() for _ in range(60)]
        async with undisturbed(fleet):
            answers = await asyncio.gather(
                *(request_token(chance.choice(fleet), chance.choice(visitors)) for _ in range(2000))
            )
        got = {each for each in answers if each is not None}
        print(f"2,000 requests: {dict(statuses)}, {len(got)} tokens")
        assert len(got) == len({key for key, _ in got}) > 100, "one token each, on both replicas"


async def _is(counted: object, wanted: int) -> bool:
    return await counted == wanted  # type: ignore[misc]  # a coroutine that counts
