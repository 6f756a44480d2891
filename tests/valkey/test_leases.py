"""S4, F4 and G9 between two replicas on one server: who mints, who waits, what they are told."""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
from foreign import FOREIGN
from msgspec.structs import replace
from replica import HOUR, KEY, SECOND, TIMEOUT, Replica, opened
from servers import StoreServer, store_server, valkey_binary
from shared_store_cases import WIDE, limits_of, request_of

from broker import errors
from broker.model import EmbedToken, LimitName, Secret, TokenRequest
from broker.rules.bucket import Limit, Verdict
from broker.stores.base import Kept, Lease, Rejection
from broker.testing import FakeClock
from broker.valkey import leases as leases_module
from broker.valkey import store as valkey_module
from broker.valkey.client.guarded import Operation
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script
from broker.valkey.leases import LEASE, LEASE_MEMORY

pytestmark = pytest.mark.parts


def token_of(replica: Replica, lease: Lease, lifetime: int = HOUR) -> EmbedToken:
    """Make what an issuer makes under a lease."""
    mono, wall = replica.moments()
    return EmbedToken(
        body=secrets.token_bytes(300),
        dies_mono=mono + lifetime,
        dies_wall=wall + lifetime,
        lifetime=lifetime,
        mark=lifetime // 5,
        version=lease.fence,
        epoch=lease.epoch,
        origin="a key",
    )


def never(_token: EmbedToken) -> bool:
    """Want a mint whatever is held."""
    return False


def always(_token: EmbedToken) -> bool:
    """Take what is there."""
    return True


async def lead(replica: Replica, request: TokenRequest) -> Lease:
    """Become the one who mints."""
    lease = await replica.store.lead(request, request.key, never)
    assert isinstance(lease, Lease)
    return lease


async def keep(replica: Replica, request: TokenRequest, lease: Lease) -> tuple[Kept, EmbedToken]:
    """Mint and keep."""
    token = token_of(replica, lease)
    return await replica.store.keep(request, request.key, token, lease), token


async def found(replica: Replica, request: TokenRequest) -> bytes | None:
    """Return the answer that a visit would get."""
    token = (await replica.store.admit(request, request.key)).token
    return None if token is None else token.body


class Pair:
    """Two replicas whose clocks, and the server's, are moved by the test."""

    def __init__(self, server: StoreServer, limits: "object | None" = None) -> None:
        self.clock = FakeClock()
        self.one, self.other = (
            Replica(server.address, limits or limits_of(), clock=self.clock, now=self.clock.wall)
            for _ in range(2)
        )


@pytest.fixture
async def pair(valkey: StoreServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    """Two that hear each other's news, and look again by themselves only after a minute."""
    monkeypatch.setattr(leases_module, "RECHECK", 60.0)
    valkey.flush()
    pair = Pair(valkey)
    async with opened(pair.one, beside=True), opened(pair.other, beside=True):
        await subscribed(valkey, 2)
        yield pair
        await pair.one.settled()
        assert pair.one.errors == pair.other.errors == {}


@pytest.fixture
async def deaf_pair(valkey: StoreServer) -> AsyncIterator[Pair]:
    """Two that are not subscribed: every message is lost."""
    valkey.flush()
    pair = Pair(valkey)
    async with opened(pair.one), opened(pair.other):
        yield pair
        assert pair.one.errors == pair.other.errors == {}


async def subscribed(server: StoreServer, replicas: int) -> None:
    """Wait until this many replicas are subscribed."""
    await eventually(lambda: len(server.command("PUBSUB", "CHANNELS", "etb:wake:*")) >= replicas)


async def eventually(condition: Callable[[], bool]) -> None:
    """Let the loop run until it is true."""
    async with asyncio.timeout(TIMEOUT):
        while not condition():  # noqa: ASYNC110 - what is waited for is another program's
            await asyncio.sleep(0.001)


async def waiting(
    replica: Replica, request: TokenRequest, count: int = 1
) -> "list[asyncio.Task[object]]":
    """Start leaders that have to wait, and return once the last of them does."""
    tasks = [
        asyncio.create_task(replica.remote.lead(request, request.key, always)) for _ in range(count)
    ]
    await eventually(lambda: asleep(replica) >= count)
    return tasks


def asleep(replica: Replica) -> int:
    """Count who waits."""
    return sum(map(len, replica.remote.leases._sleepers.values()))


# --- woken


async def test_S4_who_waits_is_woken_with_the_token(pair: Pair) -> None:
    """A hundred in the other replica: each gets the token at once, nobody else leads, none charged.

    Looking again by themselves would take a minute.
    """
    pair.one.use_limits(limits_of(mints=Limit(1, HOUR)))
    pair.other.use_limits(limits_of(mints=Limit(1, HOUR)))
    request = request_of()
    lease = await lead(pair.one, request)
    tasks = await waiting(pair.other, request, 100)
    began = time.monotonic()
    kept, token = await keep(pair.one, request, lease)
    told = await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT)
    assert time.monotonic() - began < 5
    assert kept is Kept.KEPT
    assert {each.body for each in told} == {token.body}
    assert asleep(pair.other) == 0
    assert isinstance(await pair.other.store.lead(request, request.key, never), Rejection)


async def test_F1_many_at_once_in_two_replicas_have_one_leader(pair: Pair) -> None:
    """Fifty in each, of one key: one leads, the others are given what it kept."""
    request = request_of()

    async def one(replica: Replica) -> object:
        lead = await replica.store.lead(request, request.key, always)
        if isinstance(lead, Lease):
            await asyncio.sleep(0.05)
            assert (await keep(replica, request, lead))[0] is Kept.KEPT
        return lead

    # a replica's own callers meet in its flight, so only one of each comes to the store at a time
    leads = await asyncio.gather(one(pair.one), one(pair.other))
    leads += await asyncio.gather(*(one(each) for each in [pair.one, pair.other] * 50))
    assert sum(isinstance(lead, Lease) for lead in leads) == 1
    assert len({lead.body for lead in leads if isinstance(lead, EmbedToken)}) == 1


FAILURES = [
    errors.UpstreamUnavailable("the vendor answered nonsense"),
    errors.UpstreamTimeout("too slow"),
    errors.UpstreamRefused(404, "NOT_FOUND", "no such agent"),
    errors.UpstreamRefused(402, "PAYMENT_REQUIRED", "caf\u00e9 \u4e2d"),
    errors.BudgetExhausted("used up", 7_000_000),
    errors.ServiceUnavailable("draining", 1_000_000),
    errors.RateLimited(
        LimitName.AGENT, Verdict(False, 0, 5 * SECOND, SECOND, Limit(burst=5, interval=SECOND))
    ),
]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
async def test_F4_the_error_of_a_mint_is_told_to_those_who_wait(
    pair: Pair, failure: errors.BrokerError
) -> None:
    """The same error, once each, in the other replica; none of them tries again."""
    request = request_of()
    lease = await lead(pair.one, request)
    tasks = await waiting(pair.other, request, 3)
    pair.one.store.abandon(request, request.key, lease, failure)
    told = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), TIMEOUT)
    for each in told:
        assert type(each) is type(failure)
        assert isinstance(each, errors.BrokerError)
        assert (each.status, each.code, each.message) == (
            failure.status,
            failure.code,
            failure.message,
        )
        assert (each.retry_after, each.transient) == (failure.retry_after, failure.transient)
    assert pair.other.remote.leases._held == {}


@pytest.mark.parametrize(
    "failure",
    [
        None,
        asyncio.CancelledError(),
        ValueError("defect"),
        errors.SessionEnded(),
        errors.StoreAway(),
    ],
)
async def test_F4_what_tells_others_nothing_lets_the_next_one_try(
    pair: Pair, failure: BaseException | None
) -> None:
    """A cancelled mint, a defect, an ended session, a lost store: one of those who wait leads."""
    request = request_of()
    lease = await lead(pair.one, request)
    (task,) = await waiting(pair.other, request)
    pair.one.store.abandon(request, request.key, lease, failure)
    next_ = await asyncio.wait_for(task, TIMEOUT)
    assert isinstance(next_, Lease)
    assert next_.fence > lease.fence


async def test_F4_who_did_not_wait_does_not_hear_of_it(pair: Pair) -> None:
    """A new request after the failure leads at once: no error is held against a key."""
    request = request_of()
    lease = await lead(pair.one, request)
    await waiting_and_gone(pair, request)
    pair.one.store.abandon(request, request.key, lease, errors.UpstreamTimeout("too slow"))
    await pair.one.settled()
    assert isinstance(await pair.other.store.lead(request, request.key, always), Lease)


async def waiting_and_gone(pair: Pair, request: TokenRequest) -> None:
    """Somebody waits in the other replica, and is cancelled; nothing of it is left."""
    (task,) = await waiting(pair.other, request)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert pair.other.remote.leases._sleepers == {}


async def test_F4_an_agents_limit_is_told_to_those_who_wait(pair: Pair) -> None:
    """The leader met the agent's limit after it became one: the others are refused with it."""
    for each in (pair.one, pair.other):
        each.use_limits(limits_of(agent=Limit(1, HOUR)))
    await lead(pair.one, request_of())
    request = request_of()
    refusal = await pair.one.store.lead(request, request.key, never)
    assert isinstance(refusal, Rejection)
    assert refusal.limit is LimitName.AGENT
    assert pair.one.remote.leases._held.keys() == set(pair.one.remote.leases._held) - {request.key}
    assert len(pair.one.remote.leases._held) == 1
    await pair.one.settled()
    refusal = await pair.other.store.lead(request, request.key, never)
    assert isinstance(refusal, Rejection)


async def test_S4_a_lost_message_costs_a_moment(deaf_pair: Pair) -> None:
    """Nobody is subscribed: they look again after a quarter of a second, and find it."""
    request = request_of()
    lease = await lead(deaf_pair.one, request)
    tasks = await waiting(deaf_pair.other, request, 5)
    _, token = await keep(deaf_pair.one, request, lease)
    told = await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT)
    assert {each.body for each in told} == {token.body}


async def test_F4_a_lost_message_loses_no_error(deaf_pair: Pair) -> None:
    """The error stays for two seconds, for who looks again."""
    request = request_of()
    lease = await lead(deaf_pair.one, request)
    (task,) = await waiting(deaf_pair.other, request)
    deaf_pair.one.store.abandon(request, request.key, lease, errors.UpstreamTimeout("too slow"))
    with pytest.raises(errors.UpstreamTimeout, match="too slow"):
        await asyncio.wait_for(task, TIMEOUT)


async def test_F4_an_old_error_is_not_told_to_who_waits_for_the_next_leader(
    deaf_pair: Pair,
) -> None:
    """A mint failed, the next one is under way: who waits for that looks again, and waits on."""
    request = request_of()
    lease = await lead(deaf_pair.one, request)
    deaf_pair.one.store.abandon(request, request.key, lease, errors.UpstreamTimeout("too slow"))
    await deaf_pair.one.settled()
    next_ = await lead(deaf_pair.one, request)
    (task,) = await waiting(deaf_pair.other, request)
    sleepers = deaf_pair.other.remote.leases._sleepers
    first = set().union(*sleepers.values())
    await eventually(lambda: task.done() or not first & set().union(*sleepers.values()))
    await eventually(lambda: task.done() or asleep(deaf_pair.other) == 1)
    _, token = await keep(deaf_pair.one, request, next_)
    told = await asyncio.wait_for(task, TIMEOUT)
    assert isinstance(told, EmbedToken)
    assert told.body == token.body


# --- leases that end


async def test_S4_a_holder_that_died_is_succeeded(deaf_pair: Pair) -> None:
    """A lease's length later, not before; the successor's fence is larger."""
    request = request_of()
    lease = await lead(deaf_pair.one, request)
    (task,) = await waiting(deaf_pair.other, request)
    deaf_pair.clock.advance(LEASE / SECOND - 0.000_001)
    await asyncio.sleep(0.5)
    assert not task.done()
    deaf_pair.clock.advance(0.000_001)
    next_ = await asyncio.wait_for(task, TIMEOUT)
    assert isinstance(next_, Lease)
    assert next_.fence > lease.fence


async def test_S4_a_lease_that_is_renewed_does_not_end(deaf_pair: Pair) -> None:
    """A slow mint: renewed each second it holds for a minute; three seconds after the last not."""
    request = request_of()
    await lead(deaf_pair.one, request)
    (task,) = await waiting(deaf_pair.other, request)
    for _ in range(60):
        deaf_pair.clock.advance(2.9)
        await deaf_pair.one.remote.leases.renew()
    await asyncio.sleep(0.4)
    assert not task.done()
    deaf_pair.clock.advance(3)
    assert isinstance(await asyncio.wait_for(task, TIMEOUT), Lease)


class Gate:
    """Counts a replica's calls, and holds back those of one operation."""

    def __init__(self, replica: Replica, held: Operation | None = None) -> None:
        self.counted = Counter[Operation]()
        self.reached = asyncio.Event()
        self._held = held
        self._run = replica.server.run
        replica.server.run = self._pass  # type: ignore[method-assign]  # a slow network

    async def _pass(
        self, operation: Operation, script: Script, keys: Sequence[bytes], *arguments: bytes
    ) -> Reply:
        self.counted[operation] += 1
        if operation is self._held:
            self.reached.set()
            await asyncio.Event().wait()
        return await self._run(operation, script, keys, *arguments)


@pytest.mark.parametrize("ending", ["kept", "released", "abandoned", "denied"])
async def test_S4_a_lease_is_renewed_only_while_its_mint_is_under_way(
    deaf_pair: Pair, ending: str
) -> None:
    """Kept, handed out and not kept, failed, refused by the agent's limit: no renewal after it."""
    one, request = deaf_pair.one, request_of()
    if ending == "denied":
        one.use_limits(limits_of(agent=Limit(burst=1, interval=HOUR)))
        await keep(
            one, request_of(fingerprint="0001"), await lead(one, request_of(fingerprint="0001"))
        )
        assert isinstance(await one.store.lead(request, request.key, never), Rejection)
    else:
        lease = await lead(one, request)
        assert len(one.remote.leases) == 1
        if ending == "kept":
            await keep(one, request, lease)
        elif ending == "released":
            await one.store.release(request, request.key, lease)
        else:
            one.store.abandon(request, request.key, lease, errors.UpstreamTimeout("late"))
    await one.settled()
    gate = Gate(one)
    await one.remote.leases.renew()
    assert not gate.counted
    assert len(one.remote.leases) == 0


async def test_S4_a_mint_that_is_cancelled_while_its_agent_is_charged_keeps_no_lease(
    deaf_pair: Pair,
) -> None:
    """It is ended, not only renewed no longer: another replica leads at once."""
    one, other, request = deaf_pair.one, deaf_pair.other, request_of()
    gate = Gate(one, Operation.AGENT)
    task = asyncio.create_task(one.store.lead(request, request.key, never))
    await asyncio.wait_for(gate.reached.wait(), TIMEOUT)
    assert len(one.remote.leases) == 1
    task.cancel()
    await asyncio.wait([task])
    await one.settled()
    assert len(one.remote.leases) == 0
    await one.remote.leases.renew()
    assert gate.counted[Operation.RENEW] == 0
    assert isinstance(
        await asyncio.wait_for(other.store.lead(request, request.key, never), TIMEOUT), Lease
    )


async def test_S4_an_old_leader_overwrites_nothing(deaf_pair: Pair) -> None:
    """Suspended past its lease: its token is superseded, while its successor mints and after."""
    one, other, request = deaf_pair.one, deaf_pair.other, request_of()
    old = await lead(one, request)
    deaf_pair.clock.advance(LEASE / SECOND)
    new = await lead(other, request)
    assert (await keep(one, request, old))[0] is Kept.SUPERSEDED
    assert await found(other, request) is None
    kept, token = await keep(other, request, new)
    assert kept is Kept.KEPT
    assert (await keep(one, request, old))[0] is Kept.SUPERSEDED
    assert await found(one, request) == await found(other, request) == token.body


async def test_S4_an_old_leader_releases_nothing(deaf_pair: Pair) -> None:
    """Its abandon does not end the lease of its successor: who waits goes on waiting."""
    one, other, request = deaf_pair.one, deaf_pair.other, request_of()
    old = await lead(one, request)
    deaf_pair.clock.advance(LEASE / SECOND)
    new = await lead(other, request)
    (task,) = await waiting(one, request)
    one.store.abandon(request, request.key, old, errors.UpstreamTimeout("late"))
    await one.settled()
    await asyncio.sleep(0.4)
    assert not task.done()
    _, token = await keep(other, request, new)
    assert (await asyncio.wait_for(task, TIMEOUT)).body == token.body


async def test_S4_an_old_leader_renews_nothing(deaf_pair: Pair) -> None:
    """Its renewal does not lengthen the lease of its successor, who may have died."""
    one, other, request = deaf_pair.one, deaf_pair.other, request_of()
    await lead(one, request)
    deaf_pair.clock.advance(LEASE / SECOND)
    await lead(other, request)
    deaf_pair.clock.advance(LEASE / SECOND - 1)
    await one.remote.leases.renew()
    deaf_pair.clock.advance(1)
    third = Replica(one.server.nodes._address, limits_of(), now=deaf_pair.clock.wall)
    async with opened(third):
        await asyncio.wait_for(lead(third, request), 1)


async def test_S4_the_lease_of_a_key_is_its_own(deaf_pair: Pair) -> None:
    """Another model, agent or visitor is minted meanwhile."""
    request = request_of()
    await lead(deaf_pair.one, request)
    for other in (replace(request, model="m"), replace(request, agent="B"), request_of()):
        await lead(deaf_pair.other, other)


async def lead_after_a_step(replica: Replica, request: TokenRequest) -> Lease:
    """Lead once the buckets of mints and agent have been cut to a full drain, and refilled."""
    for _ in range(2):
        lead = await asyncio.wait_for(replica.store.lead(request, request.key, never), TIMEOUT)
        if isinstance(lead, Lease):
            return lead
        assert isinstance(lead, Rejection)
        assert lead.verdict.full_in == WIDE.depth
        replica.clock.advance(WIDE.depth / SECOND)
    lead = await replica.store.lead(request, request.key, never)
    assert isinstance(lead, Lease)
    return lead


async def test_T5_a_servers_clock_that_steps_back_holds_nobody_up(deaf_pair: Pair) -> None:
    """By a day: the lease ends after its length, and the fence is larger all the same."""
    request = request_of()
    one, other = deaf_pair.one, deaf_pair.other
    lease = await lead(one, request)
    deaf_pair.clock.advance(-86_400)
    (task,) = await waiting(other, request)
    task.cancel()
    deaf_pair.clock.advance(LEASE / SECOND)
    next_ = await lead_after_a_step(other, request)
    assert next_.fence > lease.fence
    kept, token = await keep(other, request, next_)
    assert kept is Kept.KEPT
    assert await found(one, request) == token.body
    assert (await keep(one, request, lease))[0] is Kept.SUPERSEDED


async def test_F5_an_own_lease_does_not_stop_its_replica(deaf_pair: Pair) -> None:
    """An answer that was lost on its way leaves a lease behind: the same replica leads anew."""
    request = request_of()
    lost = await lead(deaf_pair.one, request)
    assert (await lead(deaf_pair.one, request)).fence > lost.fence


# --- G9: the epoch


async def test_G9_an_end_in_one_replica_is_exact_in_the_other(pair: Pair) -> None:
    """From the moment it was answered: also for a token that the other holds in front."""
    request = request_of()
    await keep(pair.one, request, await lead(pair.one, request))
    assert await found(pair.other, request) == await found(pair.one, request) is not None
    assert pair.other.token_cache.find(request.key) is not None
    await pair.one.store.revoke_visitor(request.client, request.fingerprint)
    assert await found(pair.other, request) is None
    assert await pair.other.store.peek(request, request.key) is None
    assert pair.other.token_cache.find(request.key) is None


async def test_G9_a_mint_in_flight_elsewhere_is_ended(pair: Pair) -> None:
    """Its token is kept nowhere; who waited for it leads in the new epoch, and that one counts."""
    request = request_of()
    lease = await lead(pair.one, request)
    (task,) = await waiting(pair.other, request)
    await pair.other.store.revoke_visitor(request.client, request.fingerprint)
    kept, _ = await keep(pair.one, request, lease)
    assert kept is Kept.ENDED
    assert pair.one.token_cache.find(request.key) is None
    next_ = await asyncio.wait_for(task, TIMEOUT)
    assert isinstance(next_, Lease)
    assert next_.epoch > lease.epoch
    kept, token = await keep(pair.other, request, next_)
    assert kept is Kept.KEPT
    assert await found(pair.one, request) == token.body


async def test_G9_an_ended_leader_is_told_so_also_when_it_was_succeeded(deaf_pair: Pair) -> None:
    """Suspended past its lease, and its visitor was ended meanwhile: its token is nobody's.

    The lease of its successor stands, and who waits for that is not woken for nothing.
    """
    one, other, request = deaf_pair.one, deaf_pair.other, request_of()
    old = await lead(one, request)
    deaf_pair.clock.advance(LEASE / SECOND)
    await one.store.revoke_visitor(request.client, request.fingerprint)
    new = await lead(other, request)
    assert (await keep(one, request, old))[0] is Kept.ENDED
    (task,) = await waiting(one, request)
    kept, token = await keep(other, request, new)
    assert kept is Kept.KEPT
    assert (await asyncio.wait_for(task, TIMEOUT)).body == token.body


async def test_G9_an_epoch_never_comes_twice(deaf_pair: Pair) -> None:
    """However often it is ended in one microsecond, and if the server's clock steps back."""
    request = request_of()
    epochs = []
    for step in (0, 0, 0, -3600, 0, 1):
        deaf_pair.clock.advance(step)
        await deaf_pair.one.store.revoke_visitor(request.client, request.fingerprint)
        lease = await lead_after_a_step(deaf_pair.one, request)
        epochs.append(lease.epoch)
        assert (await keep(deaf_pair.one, request, lease))[0] is Kept.KEPT
    assert epochs == sorted(set(epochs))


async def test_G9_an_end_holds_also_when_the_server_goes_away_after_it() -> None:
    """Here, where it was answered, and in the other replica, which heard of it: nothing of before.

    What is minted alone after the end belongs to the new epoch, and counts at the server later.
    """
    request, stranger = request_of(), request_of()
    with store_server(valkey_binary()) as server:
        pair = [Replica(server.address, limits_of(), timeout=0.2) for _ in range(2)]
        async with opened(pair[0], beside=True), opened(pair[1], beside=True):
            await subscribed(server, 2)
            for each in (request, stranger):
                await keep(pair[0], each, await lead(pair[0], each))
                assert await found(pair[1], each) == await found(pair[0], each) is not None
            await pair[0].store.revoke_visitor(request.client, request.fingerprint)
            await eventually(lambda: pair[1].shared_backend.alone._epochs.of(request.visitor) > 0)
            server.pause()
            for replica in pair:
                assert await found(replica, request) is None
                assert await found(replica, stranger) is not None
            lease = await lead(pair[0], request)
            kept, token = await keep(pair[0], request, lease)
            assert kept is Kept.KEPT
            assert await found(pair[0], request) == token.body
            server.resume()
            for replica in pair:
                replica.clock.advance(6)
            assert await found(pair[0], request) == token.body
            await pair[0].settled()
            assert await found(pair[1], request) == token.body


async def test_G9_a_mint_that_was_ended_is_not_kept_alone() -> None:
    """The server goes away between the end and the token: this replica knows of the end."""
    request = request_of()
    with store_server(valkey_binary()) as server:
        async with opened(Replica(server.address, limits_of(), timeout=0.2)) as replica:
            lease = await lead(replica, request)
            await replica.store.revoke_visitor(request.client, request.fingerprint)
            server.pause()
            assert (await keep(replica, request, lease))[0] is Kept.ENDED
            server.resume()


def epoch_key(replica: Replica, request: TokenRequest) -> bytes:
    """Return the name of a visitor's epoch."""
    return replica.names.visitor(request.visitor).epoch


def token_key(replica: Replica, request: TokenRequest) -> bytes:
    """Return the name of a token."""
    return replica.names.visitor(request.visitor).token(replica.names.token_name(request.key))


async def test_G9_a_server_that_forgot_an_end_is_told_of_it(
    pair: Pair, valkey: StoreServer
) -> None:
    """The epoch is lost (evicted, a failover): who knows of the end neither gives nor mints before.

    The other replica, which did not know, is right again with the next mint.
    """
    request = request_of()
    await keep(pair.one, request, await lead(pair.one, request))
    await pair.one.store.revoke_visitor(request.client, request.fingerprint)
    lease = await lead(pair.one, request)
    valkey.command("DEL", epoch_key(pair.one, request))
    pair.one.token_cache.clear()
    assert await found(pair.one, request) is None
    new = await lead(pair.one, request)
    assert new.epoch == lease.epoch
    kept, token = await keep(pair.one, request, new)
    assert kept is Kept.KEPT
    assert await found(pair.one, request) == await found(pair.other, request) == token.body


async def test_G9_a_token_that_outlived_its_epoch_is_not_given_by_who_knows(
    deaf_pair: Pair, valkey: StoreServer
) -> None:
    """Held at the server and in front, and the server has lost the epoch since the end."""
    request, one = request_of(), deaf_pair.one
    await keep(one, request, await lead(one, request))
    await one.store.revoke_visitor(request.client, request.fingerprint)
    valkey.command("DEL", epoch_key(one, request))
    assert await found(one, request) is None
    assert isinstance(await one.store.lead(request, request.key, always), Lease)
    one.token_cache.clear()
    assert await found(one, request) is None


async def test_G9_a_writer_of_the_store_brings_no_ended_token_back(
    deaf_pair: Pair, valkey: StoreServer
) -> None:
    """Another epoch or version beside it is not that of its seal; neither front gives it out."""
    one, other, request = deaf_pair.one, deaf_pair.other, request_of()
    await keep(one, request, await lead(one, request))
    assert await found(other, request) is not None
    await one.store.revoke_visitor(request.client, request.fingerprint)
    epoch = valkey.command("GET", epoch_key(one, request))
    valkey.command("HSET", token_key(one, request), "epoch", epoch)
    assert await found(other, request) is await found(one, request) is None
    other.token_cache.clear()
    assert await found(other, request) is None
    lease = await asyncio.wait_for(other.store.lead(request, request.key, always), TIMEOUT)
    assert isinstance(lease, Lease)
    _, token = await keep(other, request, lease)
    valkey.command("HSET", token_key(one, request), "version", lease.fence + 1)
    other.token_cache.clear()
    assert await found(other, request) is None
    assert token.version == lease.fence


async def test_G9_a_token_that_is_known_is_gone_with_its_session(
    deaf_pair: Pair, valkey: StoreServer
) -> None:
    """So not even a server that forgets the epoch gives it to a replica that never heard of it."""
    one, request, stranger = deaf_pair.one, request_of(), request_of()
    for each in (request, stranger):
        await keep(one, each, await lead(one, each))
    await one.store.revoke_visitor(request.client, request.fingerprint, request.key)
    assert valkey.command("EXISTS", token_key(one, request), epoch_key(one, request)) == 1
    valkey.command("DEL", epoch_key(one, request))
    assert await found(deaf_pair.other, request) is None
    assert await found(deaf_pair.other, stranger) is not None


async def test_news_of_an_end_is_looked_up_and_not_believed(
    pair: Pair, valkey: StoreServer
) -> None:
    """Channels are open to more than keys are: a forged message ends nobody."""
    request = request_of()
    _, token = await keep(pair.one, request, await lead(pair.one, request))
    name = epoch_key(pair.one, request)
    for noise in (b"ended", b"ended ", b"ended x", b"ended " + name, b"ended etb:{\xff}:epoch"):
        valkey.command("PUBLISH", pair.one.names.channel, noise)
    for number in range(3_000):
        pair.one.remote.on_message(b"ended etb:{%d}:epoch" % number)
    assert len(pair.one.remote._asked) <= valkey_module.MOST_ASKED
    await pair.one.settled()
    assert pair.one.remote._asked == set()
    assert await found(pair.one, request) == token.body


# --- what others wrote


def in_the_store(replica: Replica, request: TokenRequest) -> dict[str, bytes]:
    """Return the names of a visitor's keys."""
    names, name = replica.names.visitor(request.visitor), replica.names.token_name(request.key)
    return {
        "bucket": names.bucket("requests"),
        "epoch": names.epoch,
        "token": names.token(name),
        "lease": names.lease(name),
    }


JUNK_AT = ["bucket", "epoch", "version", "dies", "sealed", "of", "fence", "holder"]
"""A visitor's keys, and fields of a token and of a lease; its end is below, for that takes time."""


@pytest.mark.parametrize("junk", FOREIGN)
async def test_S1_N26_junk_in_the_store_is_no_failure(valkey: StoreServer, junk: str) -> None:
    """In a bucket, an epoch, any field of a token or a lease: an exhausted bucket, or as if absent.

    Nobody is refused for longer than a full drain, and the next token that is kept is found.
    """
    limit = Limit(3, SECOND)
    async with opened(Replica(valkey.address, limits_of(limit))) as replica:
        for place in JUNK_AT:
            valkey.flush()
            replica.token_cache.clear()
            request = request_of()
            await keep(replica, request, await lead(replica, request))
            keys = in_the_store(replica, request)
            if place in ("bucket", "epoch"):
                valkey.command("SET", keys[place], junk.encode("latin-1"))
            elif place in ("version", "dies", "sealed", "of"):
                field = "epoch" if place == "of" else place
                valkey.command("HSET", keys["token"], field, junk.encode("latin-1"))
            else:
                held = {"fence": 1, "holder": "x", "ends": 1, place: junk.encode("latin-1")}
                valkey.command(
                    "HSET", keys["lease"], *(part for pair in held.items() for part in pair)
                )
            for _ in range(2):
                visit = await replica.store.admit(request, request.key)
                if visit.rejection is not None:
                    assert 0 < visit.rejection.verdict.retry_after <= limit.depth
                lease = await asyncio.wait_for(
                    replica.store.lead(request, request.key, never), TIMEOUT
                )
                if isinstance(lease, Lease):
                    await keep(replica, request, lease)
            replica.token_cache.clear()
            assert await replica.store.peek(request, request.key) is not None, place
        assert replica.errors == {}


@pytest.mark.parametrize("junk", ["nan", "1" + "0" * 18])
async def test_S4_N26_a_lease_whose_end_is_junk_lasts_no_longer_than_a_new_one(
    deaf_pair: Pair, valkey: StoreServer, junk: str
) -> None:
    """Its holder was killed; whoever waits is next after three seconds."""
    one, other, request = deaf_pair.one, deaf_pair.other, request_of()
    lease = await lead(one, request)
    one.remote.leases.drop(in_the_store(one, request)["lease"])
    valkey.command("HSET", in_the_store(one, request)["lease"], "ends", junk)
    waiting = asyncio.create_task(other.store.lead(request, request.key, never))
    ends = in_the_store(one, request)["lease"], "ends"
    await eventually(
        lambda: valkey.command("HGET", *ends) == b"%d" % (deaf_pair.clock.wall() + LEASE)
    )
    deaf_pair.clock.advance(LEASE / SECOND)
    next_one = await asyncio.wait_for(waiting, TIMEOUT)
    assert isinstance(next_one, Lease)
    assert next_one.fence > lease.fence


async def test_S4_a_waiter_with_an_odd_name_stops_nobody(
    deaf_pair: Pair, valkey: StoreServer
) -> None:
    """Its name goes back as the bytes that it is; the token is kept, and all others are woken."""
    one, request = deaf_pair.one, request_of()
    lease = await lead(one, request)
    with valkey.client() as client:
        client.hset(in_the_store(one, request)["lease"], b"waiter:\xff\xfe", b"1")
    assert (await keep(one, request, lease))[0] is Kept.KEPT


# --- the front


async def test_S3_a_token_minted_alone_outlives_the_servers_older_one() -> None:
    """Renewed while the server was away: at its return nobody mints again, and all get it."""
    request, clock = request_of(), FakeClock()
    with store_server(valkey_binary()) as server:
        one, other = (
            Replica(server.address, limits_of(), timeout=0.2, clock=clock, now=clock.wall)
            for _ in range(2)
        )
        async with opened(one), opened(other):
            clock.advance(10)
            await keep(one, request, await lead(one, request))
            assert await found(other, request) is not None
            clock.advance(10)
            server.pause()
            kept, token = await keep(one, request, await lead(one, request))
            assert kept is Kept.KEPT
            server.resume()
            clock.advance(6)
            held = await one.store.lead(request, request.key, always)
            assert isinstance(held, EmbedToken)
            assert held.body == await found(one, request) == token.body
            await one.settled()
            assert await found(other, request) == token.body


async def test_a_token_the_server_forgot_is_put_back(pair: Pair) -> None:
    """The front's counts, and the other replica finds it at the server again."""
    request = request_of()
    _, token = await keep(pair.one, request, await lead(pair.one, request))
    with_server_flushed(pair)
    assert await found(pair.one, request) == token.body
    await pair.one.settled()
    assert await found(pair.other, request) == token.body


async def test_a_token_that_is_put_back_takes_no_leaders_place(pair: Pair) -> None:
    """A younger mint is under way: its lease stands, and its token follows."""
    request = request_of()
    await keep(pair.one, request, await lead(pair.one, request))
    with_server_flushed(pair)
    pair.clock.advance(0.000_001)
    lease = await lead(pair.other, request)
    await found(pair.one, request)
    await pair.one.settled()
    kept, token = await keep(pair.other, request, lease)
    assert kept is Kept.KEPT
    assert await found(pair.one, request) == token.body


def with_server_flushed(pair: Pair) -> None:
    """Let the server lose its memory."""
    from redis import Redis

    path = pair.one.shared_backend.server.nodes._address.path
    with Redis(unix_socket_path=path, protocol=2) as client:
        client.flushall()


async def test_a_newer_token_replaces_the_fronts(pair: Pair) -> None:
    """The version tells: a renewal in one replica reaches the other with its next visit."""
    request = request_of()
    await keep(pair.one, request, await lead(pair.one, request))
    assert await found(pair.other, request) == await found(pair.one, request)
    _, newer = await keep(pair.other, request, await lead(pair.other, request))
    assert await found(pair.one, request) == newer.body


async def test_T5_a_token_dies_by_the_servers_clock_too(deaf_pair: Pair) -> None:
    """A replica whose clocks stand still does not give out what the server knows to be dead."""
    request = request_of()
    lease = await lead(deaf_pair.one, request)
    token = token_of(deaf_pair.one, lease, 60 * SECOND)
    await deaf_pair.one.store.keep(request, request.key, token, lease)
    reader = Replica(
        deaf_pair.one.shared_backend.server.nodes._address, limits_of(), now=lambda: later
    )
    later = deaf_pair.clock.wall() + 59 * SECOND
    async with opened(reader):
        held = (await reader.store.admit(request, request.key)).token
        assert held is not None
        assert held.left(*reader.moments()) == SECOND
        later += SECOND
        reader.token_cache.clear()
        assert (await reader.store.admit(request, request.key)).token is None


async def test_G8_a_token_of_another_key_or_issuer_is_not_adopted(valkey: StoreServer) -> None:
    """Sealed with another key, or signed by what is no longer trusted: minted anew, no loop."""
    valkey.flush()
    request = request_of()
    async with opened(Replica(valkey.address, limits_of())) as one:
        await keep(one, request, await lead(one, request))
    # the same names, so that it is found, but sealed otherwise
    for reader in (
        Replica(valkey.address, limits_of(), origins=("another key",)),
        with_other_seal(Replica(valkey.address, limits_of())),
    ):
        async with opened(reader):
            assert await found(reader, request) is None
            lease = await asyncio.wait_for(reader.store.lead(request, request.key, always), TIMEOUT)
            assert isinstance(lease, Lease)
            reader.store.abandon(request, request.key, lease, None)
            assert reader.errors == {}


async def test_N20_a_token_keeps_the_name_of_its_key_whoever_writes_it(valkey: StoreServer) -> None:
    """Put back after the key was turned, it is still the old key's: gone with that.

    And one whose key is dropped while it is written is not held in front.
    """
    valkey.flush()
    request, good = request_of(), ["a key", "a new key"]
    async with opened(Replica(valkey.address, limits_of(), origins=good)) as one:
        await keep(one, request, await lead(one, request))
        valkey.flush()
        assert await found(one, request) is not None, "from the front, and put back"
        await one.settled()
        for origins, is_there in ((good, True), (["a new key"], False)):
            async with opened(Replica(valkey.address, limits_of(), origins=origins)) as reader:
                assert (await found(reader, request) is not None) == is_there
        good.remove("a key")
        other = request_of()
        await keep(one, other, await lead(one, other))
        assert one.token_cache.find(other.key) is None
        assert await found(one, other) is None


def with_other_seal(replica: Replica) -> Replica:
    """Seal with a key of its own, as after a rotation."""
    from broker.sealing import Seal

    replica.remote._near_cache._seal = Seal(Secret(secrets.token_urlsafe(48)))
    return replica


async def test_G8_a_sealed_token_copied_under_another_visitors_name_does_not_open(
    valkey: StoreServer,
) -> None:
    """Whoever may write to the server can delete tokens, but not give one to somebody else."""
    valkey.flush()
    mine, yours = request_of(), request_of()
    async with opened(Replica(valkey.address, limits_of())) as replica:
        await keep(replica, mine, await lead(replica, mine))
        names = replica.names
        source = names.visitor(mine.visitor).token(names.token_name(mine.key))
        target = names.visitor(yours.visitor).token(names.token_name(yours.key))
        valkey.command("COPY", source, target)
        assert await found(replica, yours) is None
        assert await found(replica, mine) is not None


async def test_a_mint_begun_alone_is_kept_alone() -> None:
    """The server came back meanwhile: it knows ends that were not known when the mint began.

    So the token counts here until the next visit has asked about its visitor's epoch.
    """
    request = request_of()
    with store_server(valkey_binary()) as server:
        one, other_one = (Replica(server.address, limits_of(), timeout=0.2) for _ in range(2))
        async with opened(one) as replica, opened(other_one):
            await other_one.store.revoke_visitor(request.client, request.fingerprint)
            server.pause()
            lease = await lead(replica, request)
            server.resume()
            kept, token = await keep(replica, request, lease)
            assert kept is Kept.KEPT
            assert replica.token_cache.find(request.key) == token
            assert await found(replica, request) is None
            other = request_of()
            server.pause()
            lease = await lead(replica, other)
            server.resume()
            _, token = await keep(replica, other, lease)
            assert await found(replica, other) == token.body
            await replica.settled()
            replica.token_cache.clear()
            assert await found(replica, other) == token.body


def test_the_numbers_fit_each_other() -> None:
    """A lease is remembered for longer than it lasts, and survives two lost renewals."""
    assert LEASE_MEMORY > 10 * LEASE
    assert 3 * leases_module.RENEWAL * SECOND <= LEASE
    assert (leases_module.RECHECK + leases_module.RECHECK_JITTER) * SECOND < leases_module.LEASE
    assert (
        leases_module.ERROR_MEMORY > (leases_module.RECHECK + leases_module.RECHECK_JITTER) * SECOND
    )
    assert WIDE.depth < SECOND
    assert KEY.reveal()
