"""Every call guarded, timed and counted: the breaker before the store, and what it costs nobody."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_store_cases import limits_of
from typing_extensions import override

from broker.rules.breaker import Outcome, StoreBreaker
from broker.stores.memory import MemoryStore
from broker.stores.token_cache import TokenCache
from broker.telemetry import exposition
from broker.telemetry.cells import SharedCells
from broker.telemetry.metrics import STORE_ERRORS, Metrics
from broker.testing import FakeClock, run_virtual
from broker.valkey.client.errors import NoScript, Reason, Redirect, StoreFailed, error_of
from broker.valkey.client.guarded import Operation, Question, StoreClient
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script
from broker.valkey.client.shapes import ANYTHING, Shape
from broker.valkey.client.target import Target
from broker.valkey.client.topology import Topology
from broker.valkey.fallback import SharedStore
from broker.valkey.leases import RENEWAL

SECOND = 1_000_000
Answer = Callable[[bytes], Reply]


class Answering(Topology):
    """Nodes that say what the test wants, and count who asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.answer: Answer = lambda _packed: b"fine"
        self.closed = False

    @override
    async def open(self) -> None:
        """Nothing is opened."""

    @override
    async def close(self) -> None:
        self.closed = True

    @override
    async def command(self, key: bytes, packed: bytes, shape: Shape = ANYTHING) -> Reply:
        self.asked.append(packed)
        await asyncio.sleep(0)
        return self.answer(packed)

    @override
    def anywhere(self) -> Target:
        raise NotImplementedError

    def fail(self, reason: Reason) -> None:
        """Let every call fail."""

        def failing(_packed: bytes) -> Reply:
            raise StoreFailed(reason)

        self.answer = failing


class Shop:
    """A server with its parts in reach."""

    def __init__(self, *, scripts: bool = False) -> None:
        self.scripts = scripts
        self.clock, self.nodes = FakeClock(), Answering()
        self.metrics = Metrics("local", shared_store=True)
        self.server = StoreClient(self.nodes, self.clock, self.metrics.store, draw=lambda: 0.0)

    async def call(self) -> Reply | Reason:
        """Call; returns the reply or why there is none."""
        try:
            if self.scripts:
                return await self.server.run(Operation.VISIT, Script.SPEND, [b"key"])
            return await self.server.command(Operation.VISIT, b"key", b"packed")
        except StoreFailed as failed:
            return failed.reason

    @property
    def errors(self) -> dict[str, float]:
        """What was counted."""
        all_ = {reason: self.metrics.store.errors[reason].value for reason in STORE_ERRORS}
        return {reason: count for reason, count in all_.items() if count}


@pytest.fixture(params=[False, True], ids=["commands", "scripts"])
def shop(request: pytest.FixtureRequest) -> Shop:
    """A server that answers, asked by commands or by scripts."""
    return Shop(scripts=request.param)


async def test_a_call_is_answered_and_timed(shop: Shop) -> None:
    """Its reply, and one observation under its operation."""
    assert await shop.call() == b"fine"
    assert (shop.errors, shop.server.is_away) == ({}, False)


@pytest.mark.parametrize("reason", list(Reason))
async def test_S1_five_failures_in_a_row_open_the_breaker(shop: Shop, reason: Reason) -> None:
    """Each is counted under its reason; the calls that are then not made are not counted."""
    shop.nodes.fail(reason)
    for _ in range(4):
        assert await shop.call() is reason
        assert not shop.server.is_away
    assert await shop.call() is reason
    assert shop.server.is_away
    asked = len(shop.nodes.asked)
    assert await shop.call() is Reason.CONNECTION
    assert len(shop.nodes.asked) == asked == 5
    assert shop.errors == {reason.value: 5}


async def test_S3_a_probe_that_succeeds_closes_it(shop: Shop) -> None:
    """After half a second one call is let through; the others wait for what it tells."""
    shop.nodes.fail(Reason.TIMEOUT)
    for _ in range(5):
        await shop.call()
    shop.clock.advance(0.499_999)
    assert await shop.call() is Reason.CONNECTION
    shop.clock.advance(0.000_001)
    shop.nodes.answer = lambda _packed: b"back"
    replies = await asyncio.gather(*(shop.call() for _ in range(10)))
    assert replies == [b"back", *[Reason.CONNECTION] * 9]
    assert not shop.server.is_away
    assert await shop.call() == b"back"


async def test_S3_probes_that_fail_wait_longer_up_to_five_seconds(shop: Shop) -> None:
    """0.5, 1, 2, 4, 5, 5: a store that is back is found within five seconds."""
    shop.nodes.fail(Reason.TIMEOUT)
    for _ in range(5):
        await shop.call()
    pauses = []
    for _ in range(6):
        began, asked = shop.clock.mono(), len(shop.nodes.asked)
        while len(shop.nodes.asked) == asked:
            shop.clock.advance(0.1)
            await shop.call()
        pauses.append((shop.clock.mono() - began) / SECOND)
    assert pauses == [0.5, 1, 2, 4, 5, 5]


async def test_a_probe_that_is_cancelled_does_not_wedge_it(shop: Shop) -> None:
    """Its caller left: the next one is the probe."""
    shop.nodes.fail(Reason.TIMEOUT)
    for _ in range(5):
        await shop.call()
    shop.clock.advance(0.5)
    shop.nodes.answer = lambda _packed: b"back"
    probe = asyncio.create_task(shop.call())
    await asyncio.sleep(0)
    probe.cancel()
    await asyncio.wait([probe])
    assert await shop.call() == b"back"


async def test_successes_are_tallied_and_outweigh_single_failures(shop: Shop) -> None:
    """One failure in a thousand calls, again and again, opens nothing."""
    for _ in range(20):
        for _ in range(50):
            await shop.call()
        answer, shop.nodes.answer = shop.nodes.answer, error
        await shop.call()
        shop.nodes.answer = answer
        shop.clock.advance(0.1)
    assert not shop.server.is_away
    assert shop.errors == {"script": 20}


async def test_S1_a_round_of_housekeeping_tallies_successes(shop: Shop) -> None:
    """They count for the second in which they were: they hide no failure of the next one."""
    tokens = TokenCache(9, keep_until=lambda token: token.dies_mono, mono=shop.clock.mono)
    limits = limits_of()
    alone = MemoryStore(limits, tokens, shop.clock)
    remote: Any = None  # it has nothing to be tidied
    store = SharedStore(shop.server, remote, alone, limits, lambda: 1, closed=False)
    for _ in range(100):
        await shop.call()
    store.purge_expired()
    shop.clock.advance(5)
    for number in range(6):
        shop.nodes.answer = error if number % 2 else lambda _packed: b"fine"
        await shop.call()
    assert shop.server.is_away


def test_S4_leases_are_renewed_every_second() -> None:
    """For as long as the store is there; whoever owns the task ends it."""
    renewed = list[float]()

    async def renew() -> None:
        renewed.append(asyncio.get_running_loop().time())

    async def main(_: FakeClock) -> None:
        nothing: Any = None
        remote: Any = SimpleNamespace(leases=SimpleNamespace(renew=renew))
        store = SharedStore(nothing, remote, nothing, limits_of(), lambda: 1, closed=False)
        began = asyncio.get_running_loop().time()
        keeping = asyncio.create_task(store.keep_leases())
        await asyncio.sleep(3.5 * RENEWAL)
        keeping.cancel()
        assert [at - began for at in renewed] == pytest.approx([1, 2, 3], abs=0.01)

    run_virtual(main)


def error(_packed: bytes) -> Reply:
    """Fail as a script does."""
    raise error_of("ERR wrong")


async def test_S1_half_of_the_calls_failing_is_a_store_that_is_away(shop: Shop) -> None:
    """Though successes come between: a node of a cluster that is gone, a server that flaps."""
    for number in range(40):
        shop.nodes.answer = error if number % 2 else lambda _packed: b"fine"
        await shop.call()
        if shop.server.is_away:
            break
    assert shop.server.is_away


async def test_what_is_told_in_the_background_is_waited_for(shop: Shop) -> None:
    """Its failure is counted and raised nowhere; closing waits for it, then closes the nodes."""
    shop.nodes.fail(Reason.READONLY)
    shop.server.tell(Operation.REFUSAL, b"key", b"packed")
    await shop.server.close()
    assert (shop.errors, shop.nodes.closed) == ({"readonly": 1}, True)


async def test_S2_a_script_that_is_forgotten_is_sent_in_full_once(shop: Shop) -> None:
    """And if the server claims not to know it even then, that is a failure of the script's."""

    def forgets(packed: bytes) -> Reply:
        if b"EVALSHA" in packed[:20]:
            raise NoScript
        return b"done"

    shop.nodes.answer = forgets
    assert (
        await shop.server.run(Operation.AGENT, Script.SPEND, [b"key"], b"1", b"1", b"0") == b"done"
    )
    assert [packed[:20].split()[2] for packed in shop.nodes.asked] == [b"EVALSHA", b"EVAL"]

    def never(_packed: bytes) -> Reply:
        raise NoScript

    shop.nodes.answer = never
    with pytest.raises(StoreFailed, match="script"):
        await shop.server.run(Operation.AGENT, Script.SPEND, [b"key"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("READONLY You can't write against a read only replica.", Reason.READONLY),
        ("LOADING Valkey is loading the dataset in memory", Reason.LOADING),
        ("OOM command not allowed when used memory > 'maxmemory'.", Reason.OUT_OF_MEMORY),
        ("ERR OOM allow-oom flag is not set on the script, can not run", Reason.OUT_OF_MEMORY),
        ("CLUSTERDOWN Hash slot not served", Reason.CLUSTER_DOWN),
        ("MASTERDOWN Link with MASTER is down", Reason.CLUSTER_DOWN),
        ("TRYAGAIN Multiple keys request during rehashing of slot", Reason.CLUSTER_DOWN),
        ("BUSY Valkey is busy running a script.", Reason.TIMEOUT),
        ("MISCONF Errors writing to the AOF file", Reason.READONLY),
        ("NOREPLICAS Not enough good replicas to write.", Reason.READONLY),
        ("ERR unknown command", Reason.SCRIPT),
        ("CROSSSLOT Keys in request don't hash to the same slot", Reason.SCRIPT),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", Reason.SCRIPT),
        ("NOPERM User broker has no permissions to run the 'get' command", Reason.OTHER),
        ("NOAUTH Authentication required.", Reason.OTHER),
        ("WRONGPASS invalid username-password pair", Reason.OTHER),
        ("EXECABORT whatever", Reason.OTHER),
        ("", Reason.OTHER),
        ("MOVED nonsense", Reason.CLUSTER_DOWN),
        ("MOVED 16384 127.0.0.1:6381", Reason.CLUSTER_DOWN),
        ("MOVED 3999 127.0.0.1:65536", Reason.CLUSTER_DOWN),
        ("ASK x y:z", Reason.CLUSTER_DOWN),
    ],
)
def test_S1_an_error_of_the_servers_is_classified(text: str, reason: Reason) -> None:
    """By its first word, or by that of the command that failed within a script."""
    error = error_of(text)
    assert isinstance(error, StoreFailed)
    assert error.reason is reason


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("MOVED 3999 127.0.0.1:6381", (3999, "127.0.0.1", 6381, False)),
        ("ASK 3999 ::1:6381", (3999, "::1", 6381, True)),
        ("MOVED 3999 :6381", (3999, "", 6381, False)),
        ("MOVED 16383 127.0.0.1:65535", (16383, "127.0.0.1", 65535, False)),
    ],
)
def test_S1_a_redirection_is_read(text: str, where: tuple[int, str, int, bool]) -> None:
    """Slot, host (an empty one means the same), port, and for how long."""
    error = error_of(text)
    assert isinstance(error, Redirect)
    assert (error.slot, error.host, error.port, error.asking) == where


@given(text=st.text())
def test_any_text_is_some_failure(text: str) -> None:
    """Nothing is raised while a reply is read."""
    assert isinstance(error_of(text), StoreFailed | NoScript | Redirect)


@given(
    events=st.lists(
        st.tuples(st.sampled_from([*Outcome, 3, 40]), st.integers(0, 2 * SECOND)), max_size=60
    )
)
def test_a_single_failure_after_successes_never_opens(
    events: list[tuple[Outcome | int, int]],
) -> None:
    """Any history: it opens only at a failure, and only with five in a row or half of five."""
    health, now, row = StoreBreaker(), 10**12, 0
    for event, gap in events:
        now += gap
        if health.is_open:
            break
        health, ticket = health.allow(now)
        assert ticket is not None
        if isinstance(event, int):
            health, row = health.succeeded(event, now), 0
            assert not health.is_open
            continue
        calls = sum(tally.calls for tally in health.window if now // SECOND == tally.second)
        health = health.settle(ticket, event, now, lambda: 0.5)
        row += event is Outcome.FAILED
        if event is Outcome.SUCCEEDED:
            row = 0 if health.streak == 0 else row
        if health.is_open:
            assert event is Outcome.FAILED
            assert row >= 5 or calls + 1 >= 5
            assert 0 < health.wait(now) <= SECOND // 2


@pytest.mark.parametrize("reason", [Reason.TIMEOUT, Reason.SCRIPT, Reason.CONNECTION])
async def test_the_duration_counts_what_failed(reason: Reason) -> None:
    """To the answer or the failure, as its help says.  A call that is not made has none."""
    shop = Shop()
    await shop.call()
    shop.nodes.fail(reason)
    await shop.call()
    assert counted(shop) == 2
    while not shop.server.is_away:
        await shop.call()
    before = counted(shop)
    assert await shop.call() is Reason.CONNECTION
    assert counted(shop) == before


def counted(shop: Shop) -> float:
    """Return how many calls were timed."""
    layout = shop.metrics.layout
    registry = exposition.registry(layout.families, SharedCells([layout.cells]), lambda: None)
    name = "broker_store_duration_seconds_count"
    return registry.get_sample_value(name, {"operation": "visit"}) or 0.0


class Line:
    """A connection that takes questions and keeps them."""

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def send_for(self, _packed: bytes, _shape: Shape, question: Question) -> None:
        self.asked.append(question)


class NotedQuestion(Question):
    """Takes note of its end."""

    operation = Operation.VISIT

    ends: list[object]

    @override
    def take(self, reply: Reply) -> None:
        self.ends.append(reply)

    @override
    def fail(self, error: StoreFailed | None) -> None:
        self.ends.append(error and error.reason)


class Counter:
    """Whoever asks questions of a shop."""

    def __init__(self) -> None:
        self.shop, self.line, self.ends = Shop(), Line(), list[object]()
        self.shop.nodes.link = lambda _key: self.line  # type: ignore[assignment,return-value,method-assign]

    def send(self) -> bool:
        """Ask one question; False where only a call can."""
        server = self.shop.server
        link = server.link(b"key")
        if link is not None:
            link.send_for(b"packed", ANYTHING, NotedQuestion(server, server.permit, 0.0, self.ends))
        return link is not None

    def lose(self) -> None:
        """Ask, and get no answer, until the breaker stops it."""
        for _ in range(5):
            assert self.send()
            self.line.asked.pop().set_exception(StoreFailed(Reason.TIMEOUT))
        assert self.shop.server.is_away


async def test_S1_questions_that_fail_open_the_breaker_like_calls() -> None:
    """Each is counted and told; after that none is sent."""
    counter = Counter()
    counter.lose()
    assert counter.ends == [Reason.TIMEOUT] * 5
    assert counter.shop.errors == {"timeout": 5}
    assert not counter.send()
    assert counter.line.asked == []


async def test_S3_no_question_goes_beside_a_probe() -> None:
    """One call is let through; what else is asked meanwhile is left to the call, which waits."""
    counter = Counter()
    counter.lose()
    counter.shop.clock.advance(0.5)
    probe = asyncio.ensure_future(counter.shop.call())
    await asyncio.sleep(0)
    assert len(counter.shop.nodes.asked) == 1
    assert not counter.send()
    assert await probe == b"fine"
    assert counter.send()


async def test_S3_questions_open_the_breaker_a_second_time() -> None:
    """Their failures are those of the present: an outage before it hides none."""
    counter = Counter()
    counter.lose()
    counter.shop.clock.advance(0.5)
    assert await counter.shop.call() == b"fine"
    counter.shop.clock.advance(60)
    counter.lose()
