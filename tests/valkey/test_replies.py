"""Everything that reads a reply, with replies that nobody expects: it fails as the store does.

Those that have another shape never arrive (`tests/valkey/test_connection.py`); what has the right
one and says what no script would, does.  Time is virtual: nothing may wait for more than a minute.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replica import SECOND, Replica
from shared_store_cases import limits_of, request_of
from typing_extensions import override

from broker.config.addresses import StoreAddress
from broker.errors import BrokerError, SessionTaken
from broker.issuers.vendor.replies import Scope
from broker.model import EmbedToken, Session
from broker.pacing.slots import Budget
from broker.rules.bucket import Limit
from broker.sessions.base import Place, Query, SessionsFull
from broker.stores.base import Lease, Rejection
from broker.testing import FakeClock, run_virtual
from broker.valkey import mint_errors
from broker.valkey.client import shapes
from broker.valkey.client.errors import NoScript, Reason, Redirect, StoreFailed, error_of, number
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script
from broker.valkey.client.shapes import ANYTHING, Shape
from broker.valkey.client.target import Target
from broker.valkey.client.topology import Topology, _owners_of
from broker.valkey.membership import MOST_PARTS

CALLS = 12
"""Replies to an act; then the server hangs up: an act may go on for as long as it is told to."""

MINUTE = 60.0

LIMIT = Limit(burst=5, interval=SECOND)

NUMBERS = st.sampled_from(
    [0, 1, 2, -1, 3, 1000, 10**6, 10**15, 2**53, 2**53 + 1, 2**63 - 1, -(2**63)]
) | st.integers(-(2**63), 2**63 - 1)

WORDS = (
    b"kept", b"ended", b"superseded", b"token", b"wait", b"failed", b"denied", b"lead", b"OK",
    b"", b"x", b"\xff", b"1_0", b" 1", b"nan", b"inf", b"-1", b"9" * 30, b"9" * 5000,
    b"[" * 10_000, b'["refused",' + b"[" * 5000, b'["limited","agent",1,1,1]', b"x" * 100_000,
)  # fmt: skip

TEXTS = st.sampled_from(WORDS) | NUMBERS.map(lambda number: b"%d" % number) | st.binary(max_size=20)

ALL_SHAPES = {name: shape for name, shape in vars(shapes).items() if isinstance(shape, Shape)}


def trees(leaves: int = 10) -> st.SearchStrategy[Reply]:
    """Any replies."""
    return st.recursive(
        st.none() | NUMBERS | TEXTS, lambda inner: st.lists(inner, max_size=8), max_leaves=leaves
    )


OF_KIND: Mapping[type, st.SearchStrategy[Any]] = {
    int: NUMBERS,
    bytes: TEXTS,
    list: st.lists(trees(), max_size=5),
    type(None): st.none(),
}


def fitting(shape: Shape) -> st.SearchStrategy[Reply]:
    """Replies of this shape, whatever they say."""
    if shape is ANYTHING:
        return trees()
    choices: list[st.SearchStrategy[Any]] = [OF_KIND[kind] for kind in shape._kinds]
    choices += [st.just(shape._word)] if shape._word else []
    for form in sorted(shape._forms, key=str):
        head = st.tuples(*(OF_KIND[kind] for kind in form)).map(list)
        turn = st.tuples(*(OF_KIND[kind] for kind in shape._tail)).map(list)
        tail = st.lists(turn, max_size=4 if shape._tail else 0)
        choices.append(st.tuples(head, tail).map(lambda both: sum(both[1], both[0])))
    return st.one_of(choices)


class Liar(Topology):
    """A server that answers in the right shape, and lies."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw
        self.left = CALLS

    @override
    async def open(self) -> None:
        """Nothing is opened."""

    @override
    async def close(self) -> None:
        """Nothing is closed."""

    @override
    async def command(self, key: bytes, packed: bytes, shape: Shape = ANYTHING) -> Reply:
        assert shape is not ANYTHING, packed[:40]
        await asyncio.sleep(0.001)
        self.left -= 1
        if self.left < 0:
            raise StoreFailed(Reason.CONNECTION)
        reply: Reply = self._draw(fitting(shape))
        assert shape.fits(reply)
        return reply

    @override
    def anywhere(self) -> Target:
        raise NotImplementedError


def token_of(replica: Replica) -> EmbedToken:
    """A token that lives for a minute."""
    mono, wall = replica.moments()
    life = 60 * SECOND
    return EmbedToken(b"-", mono + life, wall + life, life, 0, 1, 0, "a key")


def session_of(replica: Replica) -> Session:
    """A session that lives for a minute, with a token."""
    now = replica.clock.wall() // SECOND
    return Session(secrets.token_hex(16), "web", "agent", "0a", "", now, now + 60, b"\1" * 32)


async def visits(replica: Replica) -> None:
    """A visit's verdict has numbers that an answer can say; a held token changes nothing."""
    request = request_of("0a")
    for _ in range(2):
        visit = await replica.store.admit(request, request.key)
        for verdict in (visit.verdict, visit.rejection.verdict if visit.rejection else None):
            if verdict is not None:
                assert 0 <= verdict.remaining <= verdict.limit.burst
                assert 0 <= verdict.retry_after <= verdict.limit.depth
                assert 0 <= verdict.full_in <= verdict.limit.depth
                assert verdict.allowed or verdict.retry_after > 0
        replica.token_cache[request.key] = token_of(replica)
    _ = await replica.store.peek(request, request.key)


async def leads(replica: Replica) -> None:
    """From the first question to what becomes of a token."""
    request = request_of("0a")
    lead = await replica.store.lead(request, request.key, lambda _token: False)
    if isinstance(lead, Lease):
        await replica.store.renew_leases()
        await replica.store.keep(request, request.key, token_of(replica), lead)
    elif isinstance(lead, Rejection):
        assert 0 < lead.verdict.retry_after <= lead.verdict.limit.depth


async def keeps(replica: Replica) -> None:
    """A lease that is kept, released, abandoned."""
    request, lease = request_of("0a"), Lease(1, 0)
    await replica.store.keep(request, request.key, token_of(replica), lease)
    await replica.store.release(request, request.key, lease)
    replica.store.abandon(request, request.key, lease, None)


async def ends(replica: Replica) -> None:
    """An end, and news of one."""
    replica.remote.on_message(b"ended " + replica.names.visitor("x").epoch)
    await replica.store.revoke_visitor("web", "0a", "key")


async def beats(replica: Replica) -> None:
    """What a heartbeat is told can be gone by, and told again."""
    for _ in range(3):
        await replica.fleet.beat()
        assert 0 <= replica.fleet.parts <= MOST_PARTS
        assert replica.fleet.replicas >= 1
        assert 0 <= replica.fleet.withheld <= 1
        era, vouched = replica.fleet.time.vouched()
        assert len(era) <= 64
        assert 0 <= int(vouched) < 2**53 + MINUTE * SECOND
        assert replica.fleet._name.count(b"#") <= 1
    await replica.fleet.leave()


async def reserves(replica: Replica) -> None:
    """Whatever the budget says: no call is made far from its moment, predictions are numbers."""
    slots = replica.slots(Budget(rate=106, per=60, burst=8, max_wait=20))
    slots.on_pause(_is_a_time)
    await slots.start()
    try:
        loop = asyncio.get_running_loop()
        began, liar = loop.time(), replica.server.nodes
        assert isinstance(liar, Liar)
        taken = await slots.take(lambda: max(liar.left, 0))
        assert loop.time() - began < MINUTE
        if taken:
            slots.settle()
        if await slots.take_if_headroom():
            slots.abandon()
        assert slots.predict(3, loop.time(), drained=False) >= loop.time()
        assert isinstance(slots.remaining, int)
        slots.on_message(b"paused")
        slots.pause(1)
        await slots.sync_remaining(0)
        await slots.resume()
    finally:
        await slots.close()


def _is_a_time(seconds: float) -> None:
    assert 0 < seconds <= 2**53 / SECOND


async def remembers(replica: Replica) -> None:
    """Refusals of the vendor."""
    refused = await replica.shared_backend.refusals.find(request_of("0a"))
    assert refused is None or refused.status in range(400, 430)
    replica.shared_backend.refusals.forget(request_of("0a"))


async def writes(replica: Replica) -> None:
    """Sessions are written, and written again."""
    session_store = replica.shared_backend.sessions
    session = session_of(replica)
    await session_store.record(session)
    await session_store.catch_up()
    await session_store.find_token(session.digest)
    await session_store.ended(session.session_id)


async def reads(replica: Replica) -> None:
    """A list has an end."""
    session_store = replica.shared_backend.sessions
    assert await session_store.page(Query(agent="agent"), Place(), 3) == []


async def forgets(replica: Replica) -> None:
    """A session is ended and forgotten; a note is left."""
    session_store, session = replica.shared_backend.sessions, session_of(replica)
    with suppress(SessionsFull):  # what the script says of one note too many
        await session_store.disown(session.digest, "web")
    await session_store.mark(session, by_client=True)
    await session_store.forget(session)
    await session_store.find(session.session_id)


ACTS: Mapping[str, Callable[[Replica], Awaitable[None]]] = {
    act.__name__: act
    for act in (
        visits, leads, keeps, ends, beats, reserves, remembers, writes, reads, forgets,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", ACTS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_what_no_script_would_say_fails_as_the_store_does(name: str, data: st.DataObject) -> None:
    """No other exception, also in the background; no wait without end."""

    async def scene(clock: FakeClock) -> None:
        unseen: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, told: unseen.append(told))
        limits = limits_of(LIMIT, LIMIT, LIMIT, LIMIT)
        replica = Replica(StoreAddress(path="/nowhere"), limits, clock=clock)
        replica.server.nodes = Liar(data.draw)
        async with asyncio.timeout(5 * MINUTE):
            with suppress(StoreFailed, BrokerError, SessionTaken):
                await ACTS[name](replica)
            await replica.settled()
        assert unseen == []

    run_virtual(scene)


@given(reply=trees(30))
def test_whatever_a_cluster_says_of_its_slots(reply: Reply) -> None:
    """Slots are slots, and their owners can be connected to."""
    for slot, (host, port) in _owners_of(reply, "asked").items():
        assert 0 <= slot < 16384
        assert host.isprintable()
        assert 0 < port < 65536


@pytest.mark.parametrize(
    "ranges",
    [
        [[0, 2**62, [b"h", 1]]],
        [[-5, 3, [b"h", 1]]],
        [[0, 16384, [b"h", 1]]],
        [[5, 3, [b"h", 1]]],
        [[0, 16383, [b"h", 0]]],
        [[0, 16383, [b"h", 65536]]],
        [[0, 16383, [b"h\0", 1]]],
        [[0, 16383, [b"\xff", 1]]],
        [[0, 16383, [b"h" * 300, 1]]],
        [[0, 16383, []]],
        [[0, 16383, 7]],
        [[0]],
        7,
        None,
    ],
)
def test_what_is_no_range_of_slots_tells_nothing(ranges: Reply) -> None:
    """And takes no time."""
    assert _owners_of(ranges, "asked") == {}


def test_slots_are_not_read_again_and_again() -> None:
    """A reply is a mebibyte at most, and would have room for a hundred million of them."""
    ranges: Reply = [[0, 16383, [b"h", port]] for port in range(1, 20_000)]
    assert set(_owners_of(ranges, "asked").values()) == {("h", 1)}


@given(text=st.text(max_size=40) | st.sampled_from(["MOVED", "ASK"]).flatmap(
    lambda word: st.text(max_size=30).map(lambda rest: f"{word} {rest}")
))  # fmt: skip
def test_an_error_is_one_of_three(text: str) -> None:
    """And another node is one that can be asked."""
    error = error_of(text)
    assert isinstance(error, StoreFailed | NoScript | Redirect)
    if isinstance(error, Redirect):
        assert 0 <= error.slot < 16384
        assert 0 < error.port < 65536
        assert error.host.isprintable()


@given(told=TEXTS)
def test_how_a_mint_failed_elsewhere_is_always_an_answer(told: bytes) -> None:
    """Deeply nested JSON, too."""
    assert isinstance(mint_errors.decode(told), BrokerError)


@given(reply=trees())
def test_a_number_is_one_that_scripts_count_with(reply: Reply) -> None:
    """Or the store's failure."""
    try:
        found = number(reply)
    except StoreFailed:
        return
    assert 0 <= found <= 2**53


@given(name=st.sampled_from(sorted(ALL_SHAPES)), reply=trees())
def test_a_shape_is_exact_and_tells_what_it_wants(name: str, reply: Reply) -> None:
    """Nothing of the reply is in the failure."""
    shape = ALL_SHAPES[name]
    fits = shape.fits(reply)
    assert fits or shape is not ANYTHING
    said = shape.failure().detail
    assert said == ALL_SHAPES[name].failure().detail
    assert said.isprintable()


def test_every_script_has_a_shape_that_names_it() -> None:
    """And what it wants, in words."""
    for script in Script:
        assert repr(script.shape).startswith(f"{script.value}: ")
    assert repr(shapes.VISIT).startswith("visit: [number, number] or [number, number, text")
    assert repr(shapes.GET) == "GET: text or nothing"
    assert repr(shapes.PAGE) == "page: [(text, text)...]"


FAR = 2**62

_SCOPE = Scope.AGENT_MODEL.value.encode()

LIES: list[tuple[str, Shape, Reply]] = [
    ("remembers", shapes.GET, b'[404,"A","no","%b",' % _SCOPE + b"[" * 100_000),
    ("reserves", shapes.BUDGET, [1, FAR, 0, 0, b"era", 1, -1, 0]),
    ("reserves", shapes.BUDGET, [1, -1, 0, 0, b"era", 1, -1, 0]),
    ("reserves", shapes.BUDGET, [1, 0, 0, 0, b"era", FAR, -1, 0]),
    ("reserves", shapes.BUDGET, [1, 0, 0, 0, b"era", 1, -1, -5]),
    ("beats", shapes.HEARTBEAT, [1, 1, 0, b"era", FAR]),
    ("beats", shapes.HEARTBEAT, [1, -1, 0, b"era", 1]),
    ("beats", shapes.HEARTBEAT, [1, 1, FAR, b"era", 1]),
    ("beats", shapes.HEARTBEAT, [1, 1, 0, b"e" * 1000, 1]),
    ("beats", shapes.HEARTBEAT, [0]),
    ("visits", shapes.VISIT, [1, FAR, b"0"]),
    ("visits", shapes.VISIT, [0, 0]),
    ("keeps", shapes.KEEP, [b"lost"]),
    ("reads", shapes.PAGE, [b"5", b"a"]),
    ("reads", shapes.PAGE, [b"5", b"a"] * 50),
]


@pytest.mark.parametrize(("name", "shape", "reply"), LIES)
def test_each_lie_by_itself(name: str, shape: Shape, reply: Reply) -> None:
    """Said to every such call, whatever else is asked."""
    usual: dict[Shape, Reply] = {shapes.GET: None, shapes.HOLD: 0, shapes.REVOKE: b"1"}

    async def scene(clock: FakeClock) -> None:
        limits = limits_of(LIMIT, LIMIT, LIMIT, LIMIT)
        replica = Replica(StoreAddress(path="/nowhere"), limits, clock=clock)
        nodes = replica.server.nodes = Liar(lambda _strategy: None)

        async def command(_key: bytes, _packed: bytes, asked: Shape = ANYTHING) -> Reply:
            await asyncio.sleep(0.001)
            nodes.left -= 1
            if nodes.left < 0:
                raise StoreFailed(Reason.CONNECTION)
            return reply if asked is shape else usual.get(asked, [1, SECOND])

        nodes.command = command
        async with asyncio.timeout(5 * MINUTE):
            with suppress(StoreFailed, BrokerError, SessionTaken):
                await ACTS[name](replica)
            await replica.settled()
        if name == "reads":
            assert nodes.left > CALLS - 4, "the list was read on and on"

    run_virtual(scene)
