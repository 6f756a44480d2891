"""Must show 6 and 8: what lies in the store, how long, how large, and what a hit costs it."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace
from replica import HOUR, Replica, opened
from servers import StoreServer
from shared_store_cases import limits_of, request_of
from test_leases import always, keep, lead, never

from broker import errors
from broker.issuers.vendor.replies import Refused, Scope
from broker.model import TokenRequest
from broker.pacing.slots import Budget
from broker.rules.bucket import Limit, limit
from broker.stores.base import Lease
from broker.testing import FakeClock
from broker.valkey.leases import LEASE_MEMORY

pytestmark = pytest.mark.parts

CANARY = "c0ffee5eed"
"""Part of every fingerprint, token and model of these tests: it must not be seen in the store."""

MODEL = f"model-{CANARY}"

CLIENT, AGENT = "client-canary", "AGENT-CANARY"
"""Who asks and for whom: no reader of the store learns that, either."""


def visitor() -> TokenRequest:
    """Make a request of a visitor with the canary."""
    return TokenRequest(CLIENT, AGENT, CANARY + secrets.token_hex(8), MODEL)


@asynccontextmanager
async def used(server: StoreServer) -> AsyncIterator[None]:
    """Fill the store with everything that a broker puts there, under random operations."""
    server.flush()
    chance = random.Random(8)
    kinds = [limit(rate, 60_000_000, burst) for rate, burst in [(6, 6), (60, 20), (60, 1000)]]
    limits = limits_of(*kinds, client=Limit(100_000, 100))
    own = replace(limits.fingerprint, overrides={AGENT: limits.fingerprint.rule})
    limits = replace(limits, fingerprint=own)  # so that the agent has buckets of its own
    async with opened(Replica(server.address, limits), beside=True) as replica:
        slots = replica.slots(Budget(rate=106, per=60, burst=8, max_wait=5))
        await slots.start()
        requests = [visitor() for _ in range(20)]
        for _ in range(600):
            await anything(replica, chance, chance.choice(requests))
        await slots._reserve(3)
        slots.pause(0.5)
        await slots._tasks.finish()
        for scope in Scope:
            replica.shared_backend.refusals.remember(
                visitor(), Refused(404, "NOT_FOUND", "no", scope)
            )
        await replica.settled()
        yield
        await slots.close()
        assert replica.errors == {}


async def anything(replica: Replica, chance: random.Random, request: TokenRequest) -> None:
    """Do one of the things that the story does."""
    match chance.randrange(5):
        case 0 | 1:
            await replica.store.admit(request, request.key)
        case 2:
            if isinstance(lease := await replica.store.lead(request, request.key, always), Lease):
                mono, wall = replica.moments()
                lifetime = chance.choice([1, 999, 1_000_000, HOUR])
                _, token = await keep(replica, request, lease)
                body = f"{{'token': 'secret-{CANARY}'}}".encode()
                token = replace(token, body=body, dies_mono=mono + lifetime)
                await replica.store.keep(
                    request, request.key, replace(token, dies_wall=wall + HOUR), lease
                )
        case 3:
            lease = await replica.store.lead(request, request.key, never)
            if isinstance(lease, Lease) and chance.random() < 0.8:
                failure = chance.choice([None, errors.UpstreamTimeout("late")])
                replica.store.abandon(request, request.key, lease, failure)
        case _:
            if chance.random() < 0.1:
                await replica.store.revoke_visitor(request.client, request.fingerprint)


async def test_L3_every_key_has_an_end(valkey: StoreServer) -> None:
    """None stays for ever, none for more than two hours, whatever was done with it."""
    async with used(valkey):
        with valkey.client() as client:
            lasting = {key: client.pttl(key) for key in client.scan_iter(count=1000)}
    kinds = {key.rpartition(b"}:")[2].partition(b":")[0] for key in lasting}
    assert kinds >= {
        *(b"requests", b"mints", b"epoch", b"token", b"lease", b"bucket"),
        *(b"refused", b"budget", b"members"),
    }
    assert {key: left for key, left in lasting.items() if not 0 < left <= 7_200_000} == {}


async def test_S4_a_lease_that_was_renewed_is_remembered_as_long_as_before(
    valkey: StoreServer,
) -> None:
    """Its fence stays while its holder may still be under way, also after the lease has ended."""
    valkey.flush()
    request = visitor()
    async with opened(Replica(valkey.address, limits_of())) as replica:
        await lead(replica, request)
        await replica.remote.leases.renew()
        names = replica.names
        name = names.visitor(request.visitor).lease(names.token_name(request.key))
        assert LEASE_MEMORY // 2 < valkey.command("PTTL", name) * 1000 <= LEASE_MEMORY


async def test_G7_nothing_in_the_store_tells_a_visitor_or_a_token(valkey: StoreServer) -> None:
    """Nor a client, an agent or a model, in names or values: as a plain client reads them."""
    seen = 0
    async with used(valkey):
        with valkey.client() as client:
            for key in client.scan_iter(count=1000):
                seen += 1
                fields = client.hgetall(key) if client.type(key) == b"hash" else {}
                content = b" ".join([client.dump(key) or b"", *fields.keys(), *fields.values()])
                for word in (CANARY, AGENT, CLIENT):
                    assert word.encode() not in key
                    assert word.encode() not in content, key
    assert seen > 50


async def test_G7_a_token_is_ciphertext(valkey: StoreServer) -> None:
    """No byte of the answer's text survives, and two copies of one token look different."""
    valkey.flush()
    request, sealed = visitor(), []
    async with opened(Replica(valkey.address, limits_of())) as replica:
        body = b'{"data": {"token": "' + b"A" * 400 + b'"}}'
        for _ in range(2):
            lease = await lead(replica, request)
            _, token = await keep(replica, request, lease)
            await replica.store.keep(request, request.key, replace(token, body=body), lease)
            names = replica.names
            name = names.visitor(request.visitor).token(names.token_name(request.key))
            sealed.append(valkey.command("HGET", name, "sealed"))
    assert all(len(each) < len(body) + 100 for each in sealed)
    assert all(b"AAAA" not in each and b"token" not in each for each in sealed)
    assert sealed[0][16:] != sealed[1][16:]
    assert sealed[0][:4] == sealed[1][:4]  # the key's id, to tell after a rotation


@pytest.mark.parametrize(
    ("rate", "burst", "asked", "passed"),
    [(1000, 1, 60, 60), (2, 1, 60, 1), (2.5, 1, 60, 1), (100_000, 3, 60, 60)],
)
async def test_L2_a_quick_bucket_limits_by_the_servers_own_clock(
    valkey: StoreServer, rate: float, burst: int, asked: int, passed: int
) -> None:
    """Sixty in a row: no more than the burst and what refilled in the time they took."""
    valkey.flush()
    rule, request = limit(rate, 1_000_000, burst), request_of()
    async with opened(Replica(valkey.address, limits_of(rule))) as replica:
        loop = asyncio.get_running_loop()
        began = loop.time()
        visits = [await replica.store.admit(request, request.key) for _ in range(asked)]
        took = (loop.time() - began) * 1_000_000
        admitted = sum(visit.rejection is None for visit in visits)
    assert admitted <= min(burst + took // rule.interval, passed)
    assert admitted >= burst


async def test_L1_and_L9_on_the_servers_own_clock(valkey: StoreServer) -> None:
    """Real time, no tricks: waiting as told succeeds; no window admits more than it may."""
    valkey.flush()
    rule, request = Limit(burst=3, interval=40_000), request_of()
    async with opened(Replica(valkey.address, limits_of(rule))) as replica:
        loop = asyncio.get_running_loop()
        times = []
        for _ in range(60):
            before = loop.time()
            visit = await replica.store.admit(request, request.key)
            if visit.rejection is None:
                times.append((before, loop.time()))
            else:
                wait = visit.rejection.verdict.retry_after
                assert 0 < wait <= rule.interval
                await asyncio.sleep(wait / 1_000_000)
                assert (await replica.store.admit(request, request.key)).rejection is None
                times.append((loop.time(), loop.time()))
    for first, (start, _) in enumerate(times):
        for last in range(first, len(times)):
            window = (times[last][1] - start) * 1_000_000
            assert last - first + 1 <= rule.burst + window / rule.interval + 1


async def test_L4_and_L6_two_replicas_whose_clocks_differ_admit_one_burst(
    valkey: StoreServer,
) -> None:
    """Five seconds apart, a thousand requests of one visitor at once, half to each: the burst."""
    valkey.flush()
    clocks = FakeClock(), FakeClock()
    clocks[1].advance(5)
    request, limits = request_of(), limits_of(Limit(20, HOUR))
    async with (
        opened(Replica(valkey.address, limits, clock=clocks[0])) as one,
        opened(Replica(valkey.address, limits, clock=clocks[1])) as other,
    ):
        visits = await asyncio.gather(
            *(each.store.admit(request, request.key) for each in [one, other] * 500)
        )
        assert sum(visit.rejection is None for visit in visits) == 20
        assert one.errors == other.errors == {}


async def test_a_hit_is_one_script_and_one_round_trip(valkey: StoreServer) -> None:
    """By the server's own count: a hundred hits, a hundred EVALSHA, and nothing else from us."""
    valkey.flush()
    request = request_of()
    async with opened(Replica(valkey.address, limits_of())) as replica:
        await keep(replica, request, await lead(replica, request))
        await replica.store.admit(request, request.key)  # loads the script
        valkey.command("CONFIG", "RESETSTAT")
        for _ in range(100):
            assert (await replica.store.admit(request, request.key)).token is not None
    commands = valkey.command("INFO", "commandstats")
    called = {name.removeprefix("cmdstat_"): told["calls"] for name, told in commands.items()}
    assert called.pop("evalsha") == 100
    inside = {"get": 200, "hmget": 100, "set": 100, "time": 100}
    assert {name: calls for name, calls in called.items() if name in inside} == inside
    assert called.keys() - inside.keys() <= {"config|resetstat", "info", "client|setinfo"}


@pytest.mark.parametrize("engine", ["valkey", "redis7"])
async def test_what_a_bucket_and_a_token_weigh(
    engine: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Printed for sizing; a token costs its answer and some 500 bytes more, a bucket under 200."""
    server: StoreServer = request.getfixturevalue(engine)
    server.flush()
    token_request, limits = request_of(), limits_of(Limit(20, HOUR), Limit(6, HOUR))
    async with opened(Replica(server.address, limits)) as replica:
        await replica.store.admit(token_request, token_request.key)
        lease = await lead(replica, token_request)
        _, token = await keep(replica, token_request, lease)
        body = secrets.token_bytes(900)
        await replica.store.keep(token_request, token_request.key, replace(token, body=body), lease)
        names = replica.names.visitor(token_request.visitor)
        keys = {
            "a bucket": names.bucket("requests"),
            "a token of 900": names.token(replica.names.token_name(token_request.key)),
        }
        weights = {what: server.command("MEMORY", "USAGE", key) for what, key in keys.items()}
    with capsys.disabled():
        print(f"\n    {engine}, bytes: {weights}")
    assert weights["a bucket"] < 200
    assert weights["a token of 900"] < 900 + 600
