"""Something of another type lies under a key of ours: it stops nothing, row N26.

The policy holds for what that key decides, the failure is counted, the server is not given up.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable

import pytest
from replica import Replica, opened
from servers import StoreServer
from shared_store_cases import limits_of, request_of

from broker.errors import StoreAway
from broker.model import Session, TokenRequest
from broker.pacing.slots import Budget
from broker.sessions.base import Place, Query, place_of
from broker.stores.base import Lease

pytestmark = pytest.mark.parts

TIMEOUT = 30.0

Names = Callable[[Replica, TokenRequest], bytes]


def put_something(server: StoreServer, key: bytes) -> None:
    """Let somebody write what none of ours would: neither text, hash nor sorted set."""
    server.command("DEL", key)
    server.command("RPUSH", key, "something")


def token(replica: Replica, request: TokenRequest) -> bytes:
    """Name the visitor's token."""
    return replica.names.visitor(request.visitor).token(replica.names.token_name(request.key))


def lease(replica: Replica, request: TokenRequest) -> bytes:
    """Name its lease."""
    return replica.names.visitor(request.visitor).lease(replica.names.token_name(request.key))


KEYS: dict[str, Names] = {
    "requests": lambda r, request: r.names.visitor(request.visitor).bucket("requests"),
    "mints": lambda r, request: r.names.visitor(request.visitor).bucket("mints"),
    "epoch": lambda r, request: r.names.visitor(request.visitor).epoch,
    "token": token,
    "lease": lease,
    "agent": lambda r, request: r.names.agent(request.agent),
    "refused": lambda r, request: r.names.refused(request),
}


@pytest.mark.parametrize("kind", KEYS)
async def test_N26_a_visitor_is_served_by_this_replica_s_share(
    valkey: StoreServer, kind: str
) -> None:
    """Whichever of their keys it is; others are served by the server as before."""
    valkey.flush()
    request, other = request_of(), TokenRequest("web", "B1", secrets.token_hex(16))
    async with opened(Replica(valkey.address, limits_of())) as replica:
        put_something(valkey, KEYS[kind](replica, request))
        for _ in range(20):
            assert (await replica.store.admit(request, request.key)).rejection is None
            lead = await replica.store.lead(request, request.key, lambda _token: False)
            assert isinstance(lead, Lease)
            await replica.store.release(request, request.key, lead)
            assert await replica.shared_backend.refusals.find(request) is None
        await replica.remote.leases.renew()
        await replica.settled()
        assert replica.errors.keys() == {"script"}
        counted = replica.errors["script"]
        assert not replica.server.is_away
        assert (await replica.store.admit(other, other.key)).rejection is None
        assert replica.errors["script"] == counted


async def test_N26_a_visitor_whose_epoch_is_foreign_is_not_said_to_be_ended(
    valkey: StoreServer,
) -> None:
    """503: nothing was ended.  Once it is taken away, the same request ends them."""
    valkey.flush()
    request = request_of()
    async with opened(Replica(valkey.address, limits_of())) as replica:
        key = replica.names.visitor(request.visitor).epoch
        put_something(valkey, key)
        with pytest.raises(StoreAway):
            await replica.store.revoke_visitor(request.client, request.fingerprint)
        valkey.command("DEL", key)
        await replica.store.revoke_visitor(request.client, request.fingerprint)


@pytest.mark.parametrize("kind", ["members", "budget", "queues"])
async def test_N26_a_fleet_goes_on_by_shares(valkey: StoreServer, kind: str) -> None:
    """Heartbeats and the budget: each replica has its share, and the server is used as before."""
    valkey.flush()
    async with opened(Replica(valkey.address, limits_of(), replicas=2)) as replica:
        slots = replica.slots(Budget(rate=6000, per=60, burst=100, max_wait=8))
        await slots.start()
        put_something(valkey, getattr(replica.names, kind))
        for _ in range(10):
            await replica.fleet.beat()
        assert await asyncio.wait_for(slots.take(lambda: 1), TIMEOUT)
        await slots.close()
        assert replica.errors.keys() <= {"script"}
        assert not replica.server.is_away
        request = request_of()
        assert (await replica.store.admit(request, request.key)).rejection is None


async def test_N26_sessions_are_found_and_listed_around_it(valkey: StoreServer) -> None:
    """A record is none, a mark is one, a list that cannot be read is 503 and not empty."""
    valkey.flush()
    async with opened(Replica(valkey.address, limits_of())) as replica:
        session_store, names = replica.shared_backend.sessions, replica.names
        now = replica.clock.wall() // 1_000_000
        made = [
            Session(f"s-{n}", "web", "A1", "beef", "", now, now + 600 + n, secrets.token_bytes(32))
            for n in range(3)
        ]
        for session in made:
            await session_store.record(session)
        first, second, third = made
        put_something(valkey, names.session(first.session_id))
        assert await session_store.find(first.session_id) is None
        assert await session_store.page(Query(agent="A1"), Place(), 10) == [second, third]
        assert await session_store.page(Query(agent="A1"), place_of(second), 10) == [third]
        put_something(valkey, names.handed_out(second.digest))
        assert await session_store.find_token(second.digest) is None
        put_something(valkey, names.ended(third.session_id))
        assert await session_store.ended(third.session_id)
        put_something(valkey, names.of_agent("A1"))
        await refused(session_store.page(Query(agent="A1"), Place(), 10))
        await session_store.record(
            Session("s-9", "web", "A1", "beef", "", now, now + 600, b"d" * 32)
        )
        assert await session_store.find_token(b"d" * 32) is not None
        assert not replica.server.is_away
        assert replica.errors.keys() == {"script"}


async def refused(asked: Awaitable[object]) -> None:
    """Whoever asks is told that nobody can know."""
    with pytest.raises(StoreAway):
        await asked
