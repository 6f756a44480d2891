"""S1 to S3: every way in which one server can fail, through real sockets, and what follows.

The promise of the `local` policy: an answer within the timeout, the right word in the metrics, and
no limit multiplied.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from redis.exceptions import RedisError
from replica import HOUR, SECOND, Replica, opened
from servers import (
    StoreCluster,
    StoreServer,
    free_port,
    redis_binary,
    store_cluster,
    store_server,
    until,
    valkey_binary,
)
from shared_store_cases import limits_of, request_of

from broker import errors
from broker.config.addresses import Access, StoreAddress
from broker.limits.policy import Limits
from broker.model import EmbedToken, Secret, TokenRequest
from broker.rules.bucket import Limit
from broker.stores.base import Lease
from broker.testing import FakeClock

pytestmark = pytest.mark.parts

TIMEOUT = 0.2
"""Seconds for a call: four times the default, because test machines are noisy."""

ANSWERED_WITHIN = TIMEOUT + 0.3
"""Seconds within which every caller must have an answer."""

VISITOR = request_of("abcd")


@pytest.fixture
def server() -> Iterator[StoreServer]:
    """A Valkey of this test's own: it is going to be hurt."""
    with store_server(valkey_binary()) as server:
        yield server


async def admitted(replica: Replica, times: int, request: TokenRequest | None = None) -> int:
    """Count the visits that pass; each is answered within patience, and none fails."""
    passed = 0
    for _ in range(times):
        began = time.monotonic()
        visit = await replica.store.admit(request or VISITOR, (request or VISITOR).key)
        assert time.monotonic() - began < ANSWERED_WITHIN
        passed += visit.rejection is None
    return passed


async def served_alone(replica: Replica, reason: str) -> None:
    """Every part of the story is answered here, in time; failures bear this reason only."""
    request = request_of("0001")
    async with asyncio.timeout(4 * ANSWERED_WITHIN):
        visit = await replica.store.admit(request, request.key)
        assert (visit.rejection, visit.token) == (None, None)
        assert await replica.store.peek(request, request.key) is None
        lease = await replica.store.lead(request, request.key, lambda _token: False)
        assert isinstance(lease, Lease)
        replica.store.abandon(request, request.key, lease, None)
        await replica.settled()
    assert set(replica.errors) == {reason}


async def back_at_the_server(replica: Replica) -> None:
    """Let time pass on the replica's clock until a probe has closed the breaker."""
    async with asyncio.timeout(10):
        while True:
            replica.clock.advance(6)
            with suppress(errors.BrokerError):
                before = replica.errors
                await replica.store.admit(VISITOR, VISITOR.key)
                if replica.errors == before and not replica.server.is_away:
                    return
            await asyncio.sleep(0.02)


@asynccontextmanager
async def replica_of(
    address: StoreAddress, limits: Limits | None = None, on_error: str = "local"
) -> AsyncIterator[Replica]:
    """Open a replica with a short timeout."""
    replica = Replica(address, limits or limits_of(), timeout=TIMEOUT, on_error=on_error)
    async with opened(replica) as replica:
        yield replica


async def lose(replica: Replica) -> None:
    """Visit until the breaker knows that the server is away."""
    await admitted(replica, 5, request_of("ffff"))
    assert replica.server.is_away


async def test_S1_absent_at_start(tmp_path: Path) -> None:
    """No socket, then nobody behind a port: answered alone, at once."""
    for address in (
        StoreAddress(path=str(tmp_path / "nowhere")),
        StoreAddress(hosts=(("127.0.0.1", free_port()),)),
    ):
        async with replica_of(address) as replica:
            await served_alone(replica, "connection")


async def test_S1_absent_at_start_and_there_later() -> None:
    """It goes on alone, then shares as soon as a probe has found the server."""
    with store_server(valkey_binary()) as server:
        server.kill()
        async with replica_of(server.address, limits_of(Limit(50, HOUR))) as replica:
            await lose(replica)
            server.start()
            await back_at_the_server(replica)
            assert server.all_keys() != []


async def test_S1_a_name_that_does_not_resolve() -> None:
    """As a server that is not there."""
    async with replica_of(StoreAddress(hosts=(("store.invalid", 6379),))) as replica:
        await served_alone(replica, "connection")


async def test_S1_lost_mid_run(server: StoreServer) -> None:
    """-9: answered alone from the next call on; shared again after a start."""
    async with replica_of(server.address) as replica:
        await admitted(replica, 3)
        assert replica.errors == {}
        server.kill()
        await served_alone(replica, "connection")
        server.start()
        await back_at_the_server(replica)


async def test_S1_a_server_that_hangs(server: StoreServer) -> None:
    """Paused: each call is given up in time, five of them open the breaker, then none waits."""
    async with replica_of(server.address) as replica:
        await admitted(replica, 1)
        server.pause()
        await served_alone(replica, "timeout")
        await lose(replica)
        began = time.monotonic()
        assert await admitted(replica, 500) == 500
        assert time.monotonic() - began < TIMEOUT
        server.resume()
        await back_at_the_server(replica)


async def test_S1_a_server_that_accepts_and_says_nothing() -> None:
    """A port where somebody listens and never speaks (no accept): in time, like one that hangs."""
    writers: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _r, w: writers.append(w), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with replica_of(StoreAddress(hosts=(("127.0.0.1", port),))) as replica:
        await served_alone(replica, "timeout")
    silent.close()
    for writer in writers:
        writer.close()


async def test_S1_something_that_is_no_store() -> None:
    """It speaks HTTP: refused as such, no 500, nothing hangs."""

    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    other = await asyncio.start_server(http, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    async with replica_of(StoreAddress(hosts=(("127.0.0.1", port),))) as replica:
        request = VISITOR
        assert (await replica.store.admit(request, request.key)).rejection is None
        assert sum(replica.errors.values()) == 1
        assert set(replica.errors) <= {"connection", "other"}
    other.close()


async def test_S1_readonly(server: StoreServer) -> None:
    """A replica of another server refuses writes; it is left as soon as it is a master again."""
    with store_server(redis_binary(), tcp=True) as master:
        host, port = master.address.hosts[0]
        async with replica_of(server.address) as replica:
            await admitted(replica, 1)
            server.command("CONFIG", "SET", "replica-serve-stale-data", "yes")
            server.command("REPLICAOF", host, port)
            await served_alone(replica, "readonly")
            server.command("REPLICAOF", "NO", "ONE")
            await back_at_the_server(replica)


async def test_S1_a_replica_whose_master_is_gone(server: StoreServer) -> None:
    """MASTERDOWN is what it says then, and that is a store that is away."""
    async with replica_of(server.address) as replica:
        server.command("CONFIG", "SET", "replica-serve-stale-data", "no")
        server.command("REPLICAOF", "127.0.0.1", free_port())
        await served_alone(replica, "cluster_down")


async def test_S1_loading(tmp_path: Path) -> None:
    """A server that reads its memory from disk says LOADING until it is done."""
    with store_server(redis_binary(), "--key-load-delay", "1000", "--enable-debug-command", "yes",
                      "--loading-process-events-interval-bytes", "1024") as server:  # fmt: skip
        with server.client() as client, client.pipeline(transaction=False) as pipe:
            for key in range(4_000):
                pipe.set(f"other:{key}", "x" * 500)
            pipe.execute()
        reloading = asyncio.create_task(asyncio.to_thread(server.command, "DEBUG", "RELOAD"))
        async with replica_of(server.address) as replica:
            await asyncio.sleep(0)
            until_loading(server)
            await served_alone(replica, "loading")
            server.command("CONFIG", "SET", "key-load-delay", "0")
            await reloading
            await back_at_the_server(replica)


def until_loading(server: StoreServer) -> None:
    """Wait until the server says so itself."""

    def says_so() -> bool:
        try:
            server.command("GET", "x")
        except RedisError as error:
            return "loading" in str(error).lower()
        return False

    until(says_so, "the server to load")


async def test_S1_out_of_memory(server: StoreServer) -> None:
    """No room, and told to evict nothing: scripts that would write are refused."""
    async with replica_of(server.address) as replica:
        await admitted(replica, 1)
        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        server.command("CONFIG", "SET", "maxmemory", "1")
        await served_alone(replica, "out_of_memory")
        server.command("CONFIG", "SET", "maxmemory", "0")
        await back_at_the_server(replica)


async def test_S1_noscript_is_no_failure(server: StoreServer) -> None:
    """A script that the server does not have is sent in full: the caller notices nothing."""
    limit = Limit(burst=3, interval=HOUR)
    async with replica_of(server.address, limits_of(limit)) as replica:
        server.command("SCRIPT", "FLUSH")
        assert await admitted(replica, 2) == 2
        server.command("SCRIPT", "FLUSH")
        assert await admitted(replica, 3) == 1
        assert replica.errors == {}


async def test_S1_a_wrong_password(server: StoreServer) -> None:
    """It is let in nowhere: on its own, and the operator sees why it cannot connect."""
    server.command("CONFIG", "SET", "requirepass", "other")
    async with replica_of(server.address) as replica:
        request = VISITOR
        assert (await replica.store.admit(request, request.key)).rejection is None
        assert sum(replica.errors.values()) == 1


async def test_S1_a_value_of_another_type(server: StoreServer) -> None:
    """Somebody wrote into our keys: that call fails as a script, the others go on."""
    limit = Limit(burst=3, interval=HOUR)
    async with replica_of(server.address, limits_of(limit)) as replica:
        bucket = replica.names.visitor(VISITOR.visitor).bucket("requests")
        server.command("LPUSH", bucket, "x")
        assert await admitted(replica, 1) == 1
        assert set(replica.errors) == {"script"}
        assert await admitted(replica, 3, request_of("other")) == 3


async def test_S1_closed_refuses_with_503(server: StoreServer) -> None:
    """With `closed` each part of the story says ServiceUnavailable, and nothing is decided here."""
    async with replica_of(server.address, on_error="closed") as replica:
        await admitted(replica, 1)
        server.kill()
        request = VISITOR
        for _ in range(12):  # before and after the breaker opens
            for call in (
                lambda: replica.store.admit(request, request.key),
                lambda: replica.store.peek(request, request.key),
                lambda: replica.store.lead(request, request.key, lambda _token: False),
            ):
                with pytest.raises(errors.ServiceUnavailable) as caught:
                    await call()
                assert (caught.value.status, caught.value.retry_after) == (503, SECOND)
        assert replica.server.is_away
        assert [len(bucket) for bucket in replica.store.buckets.values()] == [0] * 4


async def test_G9_an_end_is_refused_while_the_server_is_away(server: StoreServer) -> None:
    """It must hold for every replica, so it is not done here alone: 503, whatever the policy."""
    async with replica_of(server.address) as replica:
        server.kill()
        with pytest.raises(errors.ServiceUnavailable):
            await replica.store.revoke_visitor("web", "abcd")


# --- a cluster


@pytest.fixture
def cluster() -> Iterator[StoreCluster]:
    """Three nodes of this test's own."""
    with store_cluster(valkey_binary()) as cluster:
        yield cluster


def owner_of(cluster: StoreCluster, key: bytes) -> tuple[int, StoreServer, StoreServer]:
    """Return the slot of a key, the node that has it, and one that has not."""
    from redis.crc import key_slot

    slot = key_slot(key)
    for node in cluster.nodes:
        for low, high, (_host, port, *_), *_rest in node.command("CLUSTER", "SLOTS"):
            if low <= slot <= high:
                mine = [n for n in cluster.nodes if n.address.hosts[0][1] == port]
                other = [n for n in cluster.nodes if n.address.hosts[0][1] != port]
                return slot, mine[0], other[0]
    raise AssertionError("nobody has it")


async def test_S1_moved_and_ask(cluster: StoreCluster) -> None:
    """A slot migrates while its agent is charged: no failed call, no token of the bucket twice."""
    agent = "A78WKV4515"
    async with opened(Replica(cluster.address, limits_of(agent=Limit(40, HOUR)))) as replica:
        slot, source, target = owner_of(cluster, replica.names.agent(agent))

        async def passed(times: int) -> int:
            leads = [
                await replica.store.lead(request, request.key, lambda _token: False)
                for request in (request_of(secrets.token_hex(8)) for _ in range(times))
            ]
            return sum(isinstance(lead, Lease) for lead in leads)

        assert await passed(10) == 10
        migrate(cluster, slot, source, target)
        assert await passed(10) == 10  # ASK
        asked = target.command("INFO", "commandstats")["cmdstat_asking"]["calls"]
        assert asked >= 10
        finish_migration(cluster, slot, source, target)
        assert await passed(30) == 20  # MOVED
        assert target.command("INFO", "commandstats")["cmdstat_asking"]["calls"] == asked
        assert replica.errors == {}


async def test_S1_tryagain(cluster: StoreCluster) -> None:
    """While a slot is on its way the cluster runs no script on keys of which some do not exist.

    Its visitors are decided here then, in time, and shared again when it has arrived.
    """
    async with replica_of(cluster.address, limits_of(Limit(50, HOUR))) as replica:
        slot, source, target = owner_of(cluster, replica.names.visitor(VISITOR.visitor).epoch)
        elsewhere = next(
            request
            for request in (request_of(f"{number:04}") for number in range(100))
            if owner_of(cluster, replica.names.visitor(request.visitor).epoch)[0] != slot
        )
        await admitted(replica, 1)
        migrate(cluster, slot, source, target)
        for _ in range(4):
            await admitted(replica, 1)
            await admitted(replica, 3, elsewhere)
        assert replica.errors == {"cluster_down": 4}
        assert not replica.server.is_away
        finish_migration(cluster, slot, source, target)
        await admitted(replica, 5)
        assert replica.errors == {"cluster_down": 4}


def migrate(cluster: StoreCluster, slot: int, source: StoreServer, target: StoreServer) -> None:
    """Move the keys of a slot, as a resharding does, but do not tell anybody yet."""
    target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", cluster.node_id(source))
    source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", cluster.node_id(target))
    keys = source.command("CLUSTER", "GETKEYSINSLOT", slot, 100)
    assert keys
    host, port = target.address.hosts[0]
    source.command("MIGRATE", host, port, "", 0, 5000, "KEYS", *keys)


def finish_migration(
    cluster: StoreCluster, slot: int, source: StoreServer, target: StoreServer
) -> None:
    """Tell every node whose the slot is now."""
    for node in (target, source, *cluster.nodes):
        node.command("CLUSTER", "SETSLOT", slot, "NODE", cluster.node_id(target))


async def test_S1_clusterdown(cluster: StoreCluster) -> None:
    """A third of the slots is nobody's: with full coverage asked for, the whole cluster is down."""
    async with replica_of(cluster.address) as replica:
        await admitted(replica, 1)
        _, owner, _ = owner_of(cluster, replica.names.visitor(request_of("0001").visitor).epoch)
        for node in cluster.nodes:
            if node is not owner:
                node.kill()
        until(
            lambda: b"cluster_state:fail" in owner.command("CLUSTER", "INFO"),
            "the node to see that it is alone",
        )
        await served_alone(replica, "cluster_down")


async def test_S1_a_node_that_dies_takes_its_own_slots_only(cluster: StoreCluster) -> None:
    """Partial coverage: visitors of other nodes are still shared until the breaker says no."""
    for node in cluster.nodes:
        node.command("CONFIG", "SET", "cluster-require-full-coverage", "no")
    async with replica_of(cluster.address, limits_of(Limit(3, HOUR))) as replica:
        _, dead, _ = owner_of(cluster, replica.names.visitor(VISITOR.visitor).epoch)
        elsewhere = next(
            request
            for request in (request_of(f"{number:04}") for number in range(100))
            if owner_of(cluster, replica.names.visitor(request.visitor).epoch)[1] is not dead
        )
        await admitted(replica, 1)
        dead.kill()
        assert await admitted(replica, 1) == 1
        assert await admitted(replica, 4, elsewhere) == 3
        assert set(replica.errors) <= {"connection", "timeout", "cluster_down"}
        assert sum(replica.errors.values()) == 1


# --- S2


@pytest.mark.parametrize("where", ["valkey", "cluster"])
async def test_S2_script_flush_under_load_fails_no_request(
    where: str, request: pytest.FixtureRequest
) -> None:
    """Twenty callers without a break, a flush every 20 ms: zero failures, and no token too many.

    For as long as it takes until each of them has asked for more than its burst.
    """
    server: StoreServer | StoreCluster = request.getfixturevalue(
        "valkey" if where == "valkey" else "valkey_cluster"
    )
    server.flush()
    nodes = server.nodes if isinstance(server, StoreCluster) else [server]
    limit = Limit(burst=50, interval=HOUR)
    async with opened(Replica(server.address, limits_of(limit))) as replica:
        done = asyncio.Event()
        asked, passed = [0] * 20, [0] * 20

        async def caller(number: int) -> None:
            token_request = request_of(f"{number:04}")
            while not done.is_set():
                visit = await replica.store.admit(token_request, token_request.key)
                asked[number] += 1
                passed[number] += visit.rejection is None
                lease = await replica.store.lead(
                    token_request, token_request.key, lambda _token: False
                )
                assert isinstance(lease, Lease)

        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(caller(number))
            flushes = 0
            while flushes < 25 or min(asked) < 60:
                for node in nodes:
                    await asyncio.to_thread(node.command, "SCRIPT", "FLUSH")
                await asyncio.sleep(0.02)
                flushes += 1
            done.set()
        assert replica.errors == {}
        assert passed == [50] * 20


# --- S3


async def test_S3_alone_a_replica_has_its_share_and_no_more(server: StoreServer) -> None:
    """S5: with three replicas seen last, a third of the burst; what the server gave is not new."""
    limit = Limit(burst=30, interval=HOUR)
    async with opened(
        Replica(server.address, limits_of(limit), timeout=TIMEOUT, replicas=3)
    ) as replica:
        server.kill()
        assert await admitted(replica, 50) == 10


async def test_S3_a_reload_while_the_server_is_away_gives_out_a_share_of_the_new_limit(
    server: StoreServer,
) -> None:
    """Limits that are changed in an outage are divided like those that they replace."""
    limits = limits_of(Limit(burst=30, interval=HOUR))
    async with opened(Replica(server.address, limits, timeout=TIMEOUT, replicas=3)) as replica:
        server.kill()
        assert await admitted(replica, 50) == 10
        replica.use_limits(limits_of(Limit(burst=60, interval=HOUR)))
        assert await admitted(replica, 50, request_of("0002")) == 20


async def test_M1_what_was_led_alone_is_forgotten_with_its_end(server: StoreServer) -> None:
    """Cached, released or abandoned: an outage of any length leaves nothing behind."""
    async with replica_of(server.address) as replica:
        server.kill()
        await lose(replica)
        for number in range(3):
            request = request_of(f"{number:04}")
            lease = await replica.store.lead(request, request.key, lambda _token: False)
            assert isinstance(lease, Lease)
            if number == 0:
                await replica.store.keep(
                    request,
                    request.key,
                    EmbedToken(b"{}", HOUR, HOUR, HOUR, 0, origin="a key"),
                    lease,
                )
            elif number == 1:
                await replica.store.release(request, request.key, lease)
            else:
                replica.store.abandon(request, request.key, lease, None)
        assert replica.store._led_alone == set()


async def test_S3_recovery_grants_no_second_burst(server: StoreServer) -> None:
    """What was charged here while the server was away is carried to it; time gives it back."""
    limit = Limit(burst=10, interval=10 * SECOND)
    clock = FakeClock()
    replica = Replica(
        server.address, limits_of(limit), timeout=TIMEOUT, clock=clock, now=clock.wall
    )
    async with opened(replica):
        server.kill()
        assert await admitted(replica, 20) == 10
        server.start()
        await reach(replica)
        assert await admitted(replica, 20) == 0
        clock.advance(30)
        assert await admitted(replica, 20) == 3
        clock.advance(100)
        assert await admitted(replica, 20) == 10


async def test_S3_a_share_that_was_spent_is_carried_whole(server: StoreServer) -> None:
    """A third was spent alone, at a third of the rate: not more than a third is left to wait for.

    The server kept what was spent there before; the later of both counts, never their sum.
    """
    limit = Limit(burst=30, interval=HOUR)
    replica = Replica(server.address, limits_of(limit), timeout=TIMEOUT, replicas=3)
    async with opened(replica):
        assert await admitted(replica, 12) == 12
        server.pause()
        alone = await admitted(replica, 40)
        assert alone == 10
        server.resume()
        await reach(replica)
        left = await admitted(replica, 40)
        assert 12 + left <= 30  # the server's own count
        assert left <= 30 - alone


async def reach(replica: Replica) -> None:
    """Probe until the server answers, by a visitor of its own, with hardly any time passing."""
    async with asyncio.timeout(10):
        while True:
            before = replica.errors
            await replica.store.peek(request_of("eeee"), request_of("eeee").key)
            if replica.errors == before and not replica.server.is_away:
                return
            replica.server._health = type(replica.server._health)()  # no patience: close it
            await asyncio.sleep(0.02)


async def test_S3_the_window_ends_when_the_server_is_back(server: StoreServer) -> None:
    """Neither early, while it is away, nor never: the first probe that is answered ends it."""
    async with replica_of(server.address) as replica:
        server.pause()
        await lose(replica)
        for _ in range(4):
            replica.clock.advance(6)
            await admitted(replica, 1)
            assert replica.server.is_away
        server.resume()
        replica.clock.advance(6)
        await admitted(replica, 1)
        assert not replica.server.is_away


# --- how a cluster is found


async def test_S7_any_node_that_lives_is_enough(valkey_cluster: StoreCluster) -> None:
    """Dead addresses before it cost the first call a moment, and no failure."""
    valkey_cluster.flush()
    host, port = valkey_cluster.nodes[1].address.hosts[0]
    address = StoreAddress((("127.0.0.1", free_port()), (host, port)), cluster=True)
    async with opened(Replica(address, limits_of(Limit(3, HOUR)))) as replica:
        for number in range(20):
            assert await admitted(replica, 4, request_of(f"{number:04}")) == 3
        assert replica.errors == {}


async def test_S7_a_node_that_hangs_does_not_hide_the_others(cluster: StoreCluster) -> None:
    """It is the first address: the topology is read at the second, within one call's time."""
    first = cluster.nodes[0]
    async with replica_of(cluster.address, limits_of(Limit(3, HOUR))) as replica:
        requests = (request_of(f"{number:04}") for number in range(100))
        elsewhere, another = [
            request
            for request in requests
            if owner_of(cluster, replica.names.visitor(request.visitor).epoch)[1] is not first
        ][:2]
        first.pause()
        await admitted(replica, 1, elsewhere)  # may be over before the second was asked
        await asyncio.sleep(2 * TIMEOUT)
        before = replica.errors
        assert await admitted(replica, 4, another) == 3
        assert replica.errors == before
        first.resume()


async def test_S1_a_cluster_that_is_called_a_server() -> None:
    """MOVED cannot be followed then: counted as cluster_down, answered alone."""
    with store_cluster(valkey_binary()) as cluster:
        async with replica_of(cluster.nodes[0].address) as replica:
            for number in range(20):
                await admitted(replica, 1, request_of(f"{number:04}"))
            assert set(replica.errors) == {"cluster_down"}


async def test_S1_a_server_that_is_called_a_cluster() -> None:
    """It says that it has none: cluster_down, answered alone, at once."""
    with store_server(redis_binary(), tcp=True) as server:
        address = StoreAddress(server.address.hosts, cluster=True)
        async with replica_of(address) as replica:
            await served_alone(replica, "cluster_down")


# --- another password


@pytest.mark.parametrize("where", ["server", "cluster"])
async def test_O7_a_new_password_counts_from_the_next_connection_on(
    where: str, request: pytest.FixtureRequest
) -> None:
    """Changed at the server, then told: no call fails, also when every connection is cut."""
    on: StoreServer | StoreCluster = request.getfixturevalue(where)
    nodes = on.nodes if isinstance(on, StoreCluster) else [on]
    old, new = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
    clients = [node.client() for node in nodes]  # they are let in already
    for client in clients:
        client.execute_command("ACL", "SETUSER", "broker", "on", f">{old}", "~*", "&*", "+@all")
        client.execute_command("ACL", "SETUSER", "default", "on", "nopass")
    replica = Replica(
        on.address, limits_of(), access=Access("broker", Secret(old)), timeout=TIMEOUT
    )
    async with opened(replica):
        requests = [request_of(f"{number:04}") for number in range(20)]
        for token_request in requests:
            await admitted(replica, 1, token_request)
        for client in clients:
            client.execute_command("ACL", "SETUSER", "broker", f"<{old}", f">{new}")
        replica.shared_backend.use_access(Access("broker", Secret(new)))
        for client in clients:
            client.execute_command("CLIENT", "KILL", "USER", "broker")
        await asyncio.sleep(0.05)
        for token_request in requests:
            await admitted(replica, 1, token_request)
        assert replica.errors == {}
    for client in clients:
        client.close()


async def test_S1_a_poisoned_key_does_not_part_us_from_the_server(server: StoreServer) -> None:
    """One visitor's bucket has another type: they alone are decided here, however often they come.

    The breaker hears that the server answers; each failure is counted.  Another's has what is no
    number: it counts as an exhausted one, without a failure, and refills.
    """
    limit = Limit(burst=3, interval=HOUR)
    async with replica_of(server.address, limits_of(limit)) as replica:
        listed, noise = request_of("0001"), request_of("0002")
        server.command("LPUSH", replica.names.visitor(listed.visitor).bucket("requests"), "x")
        server.command("SET", replica.names.visitor(noise.visitor).bucket("requests"), "noise")
        assert await admitted(replica, 20, listed) == 3
        assert replica.errors == {"script": 20}
        assert await admitted(replica, 20, noise) == 0
        assert not replica.server.is_away
        assert await admitted(replica, 4, request_of("0003")) == 3
        assert replica.errors == {"script": 20}
