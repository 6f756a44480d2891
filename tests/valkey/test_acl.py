"""Must show 8: the generated ACL line is enough for a broker, and no command of it is too many.

Every operation of the shared store runs as that user; then again with each command taken away.
"""

import asyncio
import secrets
import ssl
from collections.abc import Callable, Iterator

import pytest
from replica import HOUR, Replica, opened
from servers import (
    AnyServer,
    StoreCluster,
    StoreServer,
    redis_binary,
    store_cluster,
    store_server,
    store_with_tls,
    valkey_binary,
)
from shared_store_cases import limits_of, request_of
from test_leases import always, eventually, keep, lead, never

from broker import errors
from broker.config.addresses import Access
from broker.issuers.vendor.replies import Refused, Scope
from broker.model import Secret, Session
from broker.pacing.slots import Budget
from broker.rules.bucket import Limit
from broker.sessions.base import Place, Query, place_of
from broker.stores.base import Kept
from broker.valkey.client.errors import StoreFailed
from broker.valkey.client.scripts import Script, acl_line

pytestmark = pytest.mark.parts

USER, PASSWORD = "broker", secrets.token_urlsafe(24)

LINE = acl_line(USER, f">{PASSWORD}")

COMMANDS = sorted(part[1:] for part in LINE.split() if part.startswith("+"))
CLUSTER_COMMANDS = ["asking", "cluster|slots"]


LONG, SHORT = 20.0, 0.5
"""Seconds in which it works on a busy machine, and after which it is taken not to work."""


async def everything(
    server: AnyServer, replica: Replica, asking: Callable[[], None], timeout: float = LONG
) -> bool:
    """Do all that a broker does with its store; returns whether all of it went well.

    `asking` is called once in the middle, for what a cluster does behind our back.  `timeout` is
    seconds for what comes by itself.
    """
    try:
        await _everything(server, replica, asking, timeout)
    except (AssertionError, TimeoutError, errors.BrokerError, StoreFailed):
        return False
    return replica.errors == {}


async def _everything(
    server: AnyServer, replica: Replica, asking: Callable[[], None], timeout: float
) -> None:
    request, store = request_of(), replica.store
    limit = Limit(20, HOUR)
    replica.use_limits(limits_of(limit, limit, limit, limit))
    slots = replica.slots(Budget(rate=6000, per=60, burst=1000, max_wait=5))
    async with opened(replica, beside=True):
        await replica.fleet.beat()
        nodes = server.nodes if isinstance(server, StoreCluster) else [server]
        async with asyncio.timeout(timeout):
            await eventually(
                lambda: any(node.command("PUBSUB", "CHANNELS", "etb:wake:*") for node in nodes)
            )
        assert (await store.admit(request, request.key)).rejection is None
        lease = await lead(replica, request)
        await replica.remote.leases.renew()
        kept, token = await keep(replica, request, lease)
        assert kept is Kept.KEPT
        assert (await store.admit(request, request.key)).token == token
        assert await store.peek(request, request.key) == token
        await store.revoke_visitor(request.client, request.fingerprint)
        lease = await lead(replica, request)
        kept, token = await keep(replica, request, lease)
        replica.token_cache.clear()
        assert await store.lead(request, request.key, always) is not None
        store.abandon(
            request, request.key, await lead(replica, request), errors.UpstreamTimeout("late")
        )
        await replica.settled()
        asking()
        for _ in range(3):
            await lead(replica, request_of())
        await slots.start()
        await asyncio.wait_for(slots._reserve(2), timeout)
        await asyncio.wait_for(slots._reserve(0), timeout)
        slots.pause(1.0)
        await slots._tasks.finish()
        for scope in Scope:
            replica.shared_backend.refusals.remember(
                request, Refused(404, "NOT_FOUND", "no", scope)
            )
        await replica.settled()
        assert await replica.shared_backend.refusals.find(request) is not None
        replica.shared_backend.refusals.forget(request)
        await replica.settled()
        assert await replica.shared_backend.refusals.find(request) is None
        await sessions_come_and_go(replica)
        await someone_waits(replica)
        await replica.fleet.leave()
        with_a_lost_member(replica)
        await replica.fleet.beat()
        await slots.close()


async def sessions_come_and_go(replica: Replica) -> None:
    """Write down more sessions than a list may have, read them page by page, end one."""
    session_store = replica.shared_backend.sessions
    session_store._remote._most = 2
    expires = replica.clock.wall() // 1_000_000 + 600
    sessions = [
        Session(f"s-{number}", "web", "A1", "abcd", "", expires - 600, expires + number, b"d" * 32)
        for number in range(4)
    ]
    for session in sessions:
        await session_store.record(session)
    query = Query(agent="A1")
    assert await session_store.page(query, Place(0, ""), 1) == sessions[2:3]
    assert await session_store.page(query, place_of(sessions[2]), 1) == sessions[3:]
    assert await session_store.find_token(b"d" * 32) == sessions[3]
    await session_store.mark(sessions[3], by_client=True)
    await session_store.forget(sessions[3])
    assert await session_store.ended("s-3")


async def someone_waits(replica: Replica) -> None:
    """Mint for a waiter, who is this replica itself under another name."""
    request = request_of()
    lease = await lead(replica, request)
    own, replica.remote._replica = replica.remote._replica, b"other"
    task = asyncio.create_task(replica.remote.lead(request, request.key, never))
    await eventually(lambda: bool(replica.remote.leases._sleepers) or task.done())
    replica.remote._replica = own
    replica.store.abandon(request, request.key, lease, errors.UpstreamTimeout("late"))
    await replica.settled()
    (told,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(told, errors.UpstreamTimeout)


def with_a_lost_member(replica: Replica) -> None:
    """Let the next heartbeat tell of a member that the server does not know."""
    replica.fleet._others = {b"other": 2}


def set_user(server: AnyServer, line: str) -> None:
    """Give the user exactly these rights, and none of the scripts."""
    for node in server.nodes if isinstance(server, StoreCluster) else [server]:
        node.command("ACL", "SETUSER", USER, "reset", *line.split()[2:])
        node.command("SCRIPT", "FLUSH")
    server.flush()


def broker_of(server: AnyServer) -> Replica:
    """Make a replica that logs in as the user."""
    access = Access(USER, Secret(PASSWORD))
    return Replica(server.address, limits_of(), access=access, timeout=2.0, most_sessions=3)


@pytest.fixture(scope="module")
def guarded() -> Iterator[StoreServer]:
    """A server whose users are this module's affair."""
    with store_server(valkey_binary()) as server:
        yield server


@pytest.fixture(scope="module")
def guarded_cluster() -> Iterator[StoreCluster]:
    """A cluster likewise."""
    with store_cluster(valkey_binary()) as cluster:
        yield cluster


def nothing() -> None:
    """A single server has no slots to move."""


async def test_the_line_is_enough(guarded: StoreServer) -> None:
    """Nothing of what a broker does is refused."""
    set_user(guarded, acl_line(USER, f">{PASSWORD}"))
    assert await everything(guarded, broker_of(guarded), nothing)


@pytest.mark.parametrize("command", COMMANDS)
async def test_a_command_fewer_is_noticed(guarded: StoreServer, command: str) -> None:
    """Each of them is needed for something."""
    line = acl_line(USER, f">{PASSWORD}").split()
    line.remove(f"+{command}")
    set_user(guarded, " ".join(line))
    assert not await everything(guarded, broker_of(guarded), nothing, SHORT)


@pytest.mark.parametrize("rule", ["~etb:*", "&etb:*"])
async def test_keys_and_channels_are_needed_too(guarded: StoreServer, rule: str) -> None:
    """And nothing beyond them is touched, or `test_the_line_is_enough` would fail."""
    set_user(guarded, acl_line(USER, f">{PASSWORD}").replace(f" {rule}", ""))
    assert not await everything(guarded, broker_of(guarded), nothing, SHORT)


async def test_the_line_is_enough_with_tls() -> None:
    """Redis 7 with TLS, no default user, and the line as its ACL file has it."""
    with store_with_tls(redis_binary(), acl_line) as server:
        replica = Replica(server.address, limits_of(), access=server.access, most_sessions=3)
        assert await everything(server, replica, nothing)


async def test_a_server_that_asks_for_a_certificate_is_given_one() -> None:
    """And nobody without one gets as far as the password: the operator is told which way."""
    with store_with_tls(redis_binary(), acl_line, mutual=True) as server:
        replica = Replica(server.address, limits_of(), access=server.access, most_sessions=3)
        assert await everything(server, replica, nothing)
        authority = server.certificates["ssl_ca_certs"]
        tls = ssl.create_default_context(cafile=authority)
        access = Access(server.access.username, server.access.password, tls)
        async with opened(Replica(server.address, limits_of(), access=access)) as replica:
            request = request_of()
            assert (await replica.store.admit(request, request.key)).rejection is None
            assert set(replica.errors) <= {"connection", "other"}
            assert replica.errors != {}


async def test_a_server_whose_certificate_is_not_trusted_is_not_spoken_to() -> None:
    """Without its authority's file: no password is sent, the call fails as a connection."""
    with store_with_tls(redis_binary(), acl_line) as server:
        access = Access(server.access.username, server.access.password)
        async with opened(Replica(server.address, limits_of(), access=access)) as replica:
            request = request_of()
            assert (await replica.store.admit(request, request.key)).rejection is None
            assert set(replica.errors) == {"connection"}


@pytest.mark.parametrize("missing", [None, *CLUSTER_COMMANDS])
async def test_S7_the_line_on_a_cluster(guarded_cluster: StoreCluster, missing: str | None) -> None:
    """The two commands more are enough while a slot moves, and both are needed."""
    from test_shared_faults import finish_migration, migrate, owner_of

    cluster = guarded_cluster
    line = acl_line(USER, f">{PASSWORD}", cluster=True).split()
    assert set(CLUSTER_COMMANDS) <= {part[1:] for part in line}
    if missing:
        line.remove(f"+{missing}")
    set_user(cluster, " ".join(line))
    replica = broker_of(cluster)
    slot, source, target = owner_of(cluster, replica.names.agent(request_of().agent))
    went_well = await everything(cluster, replica, lambda: migrate(cluster, slot, source, target))
    finish_migration(cluster, slot, source, target)
    assert went_well == (missing is None)


async def test_another_database_needs_select(guarded: StoreServer) -> None:
    """With it the line is enough there, without it nobody gets that far."""
    from msgspec.structs import replace

    address = replace(guarded.address, db=3)
    for database in (True, False):
        set_user(guarded, acl_line(USER, f">{PASSWORD}", database=database))
        access = Access(USER, Secret(PASSWORD))
        replica = Replica(address, limits_of(), access=access, timeout=2.0, most_sessions=3)
        assert await everything(guarded, replica, nothing) == database


def test_the_line_is_made_of_the_scripts() -> None:
    """In order, and nothing but what is allowed after everything was forbidden."""
    head, _, allowed = acl_line("broker", "#abc").partition(" -@all ")
    assert head == "user broker on #abc resetkeys ~etb:* resetchannels &etb:*"
    commands = allowed.split()
    assert commands == sorted(set(commands))
    assert {"+evalsha", "+eval", "+time", "+hgetall", "+subscribe"} <= set(commands)
    more = acl_line("broker", "#abc", cluster=True, database=True).split()
    assert set(more) - set(allowed.split()) - set(head.split()) == {
        "-@all", "+asking", "+cluster|slots", "+select",
    }  # fmt: skip


def test_every_call_of_a_script_is_seen() -> None:
    """`redis.call` in any other way of writing would be missing in the line."""
    for script in Script:
        lines = [line for line in script.source.splitlines() if "redis." in line]
        assert all("redis.call('" in line for line in lines), script
        assert "pcall" not in script.source
