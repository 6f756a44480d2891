"""The fast lane: answers as the ordinary path does, or is not taken."""

import ast
import asyncio
import gc
import inspect
import json
import re
import secrets
from collections.abc import Callable
from itertools import product
from typing import Any

import aiohttp.web_protocol
import pytest
import structlog
from aiohttp.http import RawRequestMessage
from edge import AGENT, TOKEN_PATH, Edge, Line, request, serving, visitor
from lane_streams import Worlds
from msgspec import structs

from broker import errors
from broker.app.wiring import NO_LANE
from broker.web import aiohttp_internals, connection, known_heads, lane_connection
from broker.web.aiohttp_internals import ATTRIBUTES, IMPORTS, METHODS, fault_of_lane
from broker.web.known_heads import MAX_KNOWN, KnownHead, KnownHeads, split
from broker.web.lane_connection import LaneConnection
from broker.wire.request import well_formed

TIMEOUT = 60.0

TRACES = ["", f"traceparent: 00-{'a' * 32}-{'b' * 16}-01\r\n"]


def _kept(heads: KnownHeads, data: bytes) -> KnownHead:
    """Keep the head of a request, as if it had been read."""
    head = split(data)
    message: Any = type("Message", (), {"headers": {}})
    handler: Any = None
    heads.keep(head.compared, KnownHead(head, len(data), message, handler, "", None))
    known = heads.known_in(data)
    assert known is not None
    return known


@pytest.fixture(autouse=True)
def _with_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it on in this file, also where the suite runs without it."""
    monkeypatch.delenv(NO_LANE, raising=False)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note each request that takes the lane: whether its first step was the last."""
    taken: list[bool] = []
    run = LaneConnection._run

    def noted(self: LaneConnection, *asked: Any) -> bool:
        is_over = run(self, *asked)
        taken.append(is_over)
        return is_over

    monkeypatch.setattr(LaneConnection, "_run", noted)
    return taken


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Note what the parser is asked to read on connections that are idle."""
    asked: list[bytes] = []
    read = LaneConnection._read_first

    def noted(self: LaneConnection, data: bytes, end: int) -> None:
        asked.append(data)
        read(self, data, end)

    monkeypatch.setattr(LaneConnection, "_read_first", noted)
    return asked


async def idle(edge: Edge) -> Line:
    """Connect, and let aiohttp's loop wait for the first request."""
    line = await edge.connect()
    line.send(request("GET", "/livez"))
    assert (await line.answer()).status == 200
    await asyncio.sleep(0)
    return line


class TestDifference:
    @pytest.mark.parametrize("waits", [False, True], ids=["memory", "elsewhere"])
    async def test_random_streams_are_answered_as_without_it(self, *, waits: bool) -> None:
        """Bytes, ends of connections, counts: `tests/load/lane_fuzz.py` does a million of them."""
        with structlog.testing.capture_logs():
            worlds = Worlds(waits=waits)
            for seed in range(1200):
                assert not await worlds.compare(seed)


class TestTaken:
    async def test_hits_and_refusals_end_with_their_first_step(
        self, steps: list[bool], edge: Edge
    ) -> None:
        """So does what is asked about tokens, and a mint where it waits for nothing."""
        line, fingerprint = await idle(edge), visitor()
        steps.clear()  # the check at the start took some
        line.send(edge.asking(fingerprint))
        minted = await line.answer()
        assert (minted.cache_status, steps) == ("embed-token-broker; fwd=miss", [True])
        wrong = edge.asking(secret=secrets.token_urlsafe(24))
        verify = request("GET", "/v1/embed-tokens/verify", [("X-Embed-Token", minted.token)])
        own = [("api-secret", edge.secret)]
        introspect = request("POST", "/v1/introspect", own, f"token={minted.token}".encode())
        for raw_request, status in (
            (edge.asking(fingerprint), 200),
            (edge.asking("no hex"), 400),
            (wrong, 401),
            (verify, 200),
            (introspect, 200),
            (edge.asking(fingerprint), 200),
        ):
            line.send(raw_request)
            assert (await line.answer()).status == status
        assert steps == [True] * 7
        await line.close()

    async def test_a_head_that_came_twice_is_not_read_again(
        self, parsed: list[bytes], edge: Edge
    ) -> None:
        """Whatever differs by a byte is; bodies are always."""
        line, fingerprint = await idle(edge), visitor()
        requests = [edge.asking(fingerprint)] * 2 + [edge.asking(visitor()) for _ in range(3)]
        for sent in requests:
            line.send(sent)
            assert (await line.answer()).status == 200
        assert parsed[-2:] == requests[:2]
        other = edge.asking(visitor(), headers=[("X-A", "b")])
        line.send(other)
        assert (await line.answer()).status == 200
        assert parsed[-1] == other
        await line.close()

    @pytest.mark.parametrize(
        "header",
        [
            ("Connection", "close"),
            ("Content-Encoding", "identity"),
            ("Expect", "100-continue"),
            ("Origin", "https://shop.example"),
            ("TE", "trailers"),
            ("Upgrade", "h2c"),
        ],
    )
    async def test_a_head_that_tells_more_is_read_each_time(
        self, edge: Edge, header: tuple[str, str]
    ) -> None:
        """How to go on, or who may ask, is no fact to be kept."""
        for _ in range(3):
            line = await idle(edge)
            line.send(edge.asking(visitor(), headers=[header]))
            assert (await line.answer()).status in (200, 403)
            await line.close()
        assert edge.app.parts.server._lane is not None
        assert not edge.app.parts.server._lane.heads

    async def test_a_head_that_names_a_forwarded_uri_is_read_each_time(
        self, parsed: list[bytes], edge: Edge
    ) -> None:
        """What it means depends on who sends it."""
        line, uri = await idle(edge), ("X-Original-URI", "/x?token=a")
        raw_request = request("GET", "/v1/embed-tokens/verify", [uri, ("X-Embed-Token", "a")])
        for _ in range(4):
            line.send(raw_request)
            assert (await line.answer()).status == 401
        assert parsed[-4:] == [raw_request] * 4
        await line.close()

    @pytest.mark.parametrize("name", ["traceparent", "Traceparent"])
    async def test_a_trace_of_its_own_makes_no_other_head(
        self, parsed: list[bytes], edge: Edge, name: str
    ) -> None:
        """It is passed on with its own request; one that is no good, or double, is read."""
        asked: list[str] = []
        mint = edge.app.parts.issuer.mint

        async def noted(request: Any, turn: Any) -> Any:
            asked.append(request.traceparent)
            return await mint(request, turn)

        edge.mint_by(noted)
        line = await idle(edge)
        parsed.clear()
        traces = [f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01" for _ in range(6)]
        for trace in traces:
            line.send(edge.asking(visitor(), headers=[(name, trace)]))
            assert (await line.answer()).status == 200
        assert asked == traces
        assert len(parsed) == 2  # what came twice is known
        odd = [[traces[0].upper()], ["ff" + traces[0][2:]], traces[:2], traces[1:3], traces[:2]]
        for values in odd:
            line.send(edge.asking(visitor(), headers=[(name, value) for value in values]))
            assert (await line.answer()).status == 200
        assert asked[6:] == ["", "", traces[0], traces[1], traces[0]]
        for trace in traces[:3]:  # the first of two counts, whatever is wrong with it
            twice = [(name, traces[0].upper()), (name, trace)]
            line.send(edge.asking(visitor(), headers=twice))
            assert (await line.answer()).status == 200
        assert asked[11:] == [""] * 3
        await line.close()

    async def test_a_trace_in_a_body_is_none(self, edge: Edge) -> None:
        """What is behind the head is looked at by nobody who looks for its headers."""
        line = await idle(edge)
        trace = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
        body = f"{{\r\ntraceparent: {trace}\r\n}}".encode()
        for _ in range(3):
            line.send(request("POST", TOKEN_PATH, [("api-secret", edge.secret)], body))
            assert (await line.answer()).status == 400
        await line.close()

    @pytest.mark.parametrize("is_alone", [True, False])
    async def test_bytes_of_a_head_are_no_request(self, edge: Edge, *, is_alone: bool) -> None:
        """A known request comes where another head has begun: by itself, or behind a body."""
        line, fingerprint = await idle(edge), visitor()
        for _ in range(3):
            line.send(edge.asking(fingerprint))
            assert (await line.answer()).status == 200
        ours = next(iter(edge.app.parts.server.connections))
        begun = b"GET /livez HTTP/1.1\r\nX-Part: "
        if not is_alone:
            head, end, body = edge.asking(fingerprint).partition(b"\r\n\r\n")
            ours.data_received(head + end)  # packets of a socket might come in one piece
            begun = body + begun
        ours.data_received(begun)
        if not is_alone:
            assert (await line.answer()).status == 200
        ours.data_received(edge.asking(fingerprint))
        assert (await line.answer()).json == {"status": "ok"}
        await line.close()

    async def test_a_connection_takes_any_number_of_heads(self, edge: Edge) -> None:
        """The parser is told of each that was answered: it stops at a number that wait."""
        line = await idle(edge)
        for number in range(100):
            line.send(edge.posting(b"{}", headers=[("X-Number", str(number))]))
            assert (await line.answer()).code == "MISSING_PARAM"
        line.send(request("GET", "/livez") * 2)
        async with asyncio.timeout(TIMEOUT):
            assert [(await line.answer()).status for _ in range(2)] == [200] * 2
        await line.close()

    async def test_a_client_that_is_taken_away_is_not_known_any_more(self, edge: Edge) -> None:
        """G7: its heads are forgotten with it, at once."""
        line, fingerprint = await idle(edge), visitor()
        for _ in range(3):
            line.send(edge.asking(fingerprint))
            assert (await line.answer()).status == 200
        edge.app.parts.authenticator.use_clients([])
        line.send(edge.asking(fingerprint))
        assert (await line.answer()).code == "UNAUTHORIZED"
        await line.close()

    async def test_a_request_that_came_before_is_looked_up_whole(
        self, monkeypatch: pytest.MonkeyPatch, edge: Edge
    ) -> None:
        """By all of its bytes: with its own id and charge, and for as long as heads are known."""
        looked: list[bytes] = []
        lane = edge.app.parts.server._lane
        assert lane is not None
        known_in, heads = lane.heads.known_in, lane.heads
        monkeypatch.setattr(heads, "known_in", lambda data: looked.append(data) or known_in(data))
        line, fingerprint = await idle(edge), visitor()
        looked.clear()
        replies = []
        for _ in range(6):
            line.send(edge.asking(fingerprint))
            replies.append(await line.answer())
        assert {reply.status for reply in replies} == {200}
        assert len({reply.header("X-Request-Id") for reply in replies}) == 6
        remaining = [int(reply.header("X-RateLimit-Remaining") or "") for reply in replies]
        assert remaining == [*range(remaining[0], remaining[0] - 6, -1)]
        assert len({reply.token for reply in replies}) == 1
        assert looked == [edge.asking(fingerprint)] * 3  # read, read again and kept, known
        line.send(edge.asking(visitor()))
        assert (await line.answer()).token != replies[0].token
        lane.forget()
        line.send(edge.asking(fingerprint))
        assert (await line.answer()).token == replies[0].token
        assert looked[-1] == edge.asking(fingerprint)
        await line.close()

    async def test_a_client_that_may_do_less_is_not_known_any_more(self, edge: Edge) -> None:
        """G7: nor its requests as they came: a drain and another set of agents count at once."""
        line, fingerprint, parts = await idle(edge), visitor(), edge.app.parts
        for _ in range(4):
            line.send(edge.asking(fingerprint))
            assert (await line.answer()).status == 200
        assert parts.server._lane is not None
        assert parts.server._lane.find_request(edge.asking(fingerprint)) is not None
        known = parts.server._lane.find_request(edge.asking(fingerprint))
        assert not re.search(f"{fingerprint}|{edge.secret}", repr(known))
        (client,) = {each.name: each for each in parts.authenticator._clients.values()}.values()
        parts.authenticator.use_clients([structs.replace(client, agents=frozenset({"other"}))])
        for _ in range(3):
            line.send(edge.asking(fingerprint))
            assert (await line.answer()).status == 403
        parts.authenticator.use_clients([client])
        for _ in range(4):
            line.send(edge.asking(fingerprint))
            assert (await line.answer()).status == 200
        parts.readiness.draining = True
        line.send(edge.asking(fingerprint))
        assert (await line.answer()).header("Connection") == "close"
        await line.close()

    async def test_a_stricter_rule_of_fingerprints_counts_for_what_came_before(
        self, edge: Edge
    ) -> None:
        """A request that is good by a looser rule only is not kept whole: a reload may end it."""
        line, tokens = await idle(edge), edge.app.parts.routes.tokens
        tokens.any_fingerprint = True
        for _ in range(5):
            line.send(edge.asking("no hex"))
            assert (await line.answer()).status == 200
        tokens.any_fingerprint = False
        line.send(edge.asking("no hex"))
        assert (await line.answer()).status == 400
        await line.close()

    async def test_G6_whole_requests_hold_no_heads(self, edge: Edge) -> None:
        """One body under more heads than are known: what aiohttp parsed goes with the head."""
        line, body = await idle(edge), json.dumps({"agent_id": AGENT, "fingerprint": visitor()})
        lane = edge.app.parts.server._lane
        assert lane is not None
        lane.heads._most = 30
        gc.collect()
        before = sum(isinstance(each, RawRequestMessage) for each in gc.get_objects())
        for number in range(300):
            for _ in range(3):
                line.send(edge.posting(body.encode(), headers=[("X-Backend", str(number))]))
                assert (await line.answer()).status in (200, 429)
        assert len(lane._requests) >= 299
        gc.collect()
        alive = sum(isinstance(each, RawRequestMessage) for each in gc.get_objects())
        assert alive - before <= 3 * 30 + 10  # the third generation is being freed
        assert not any(map(gc.is_tracked, lane._requests._young.values()))
        await line.close()

    async def test_a_request_with_an_id_or_a_trace_of_its_own_is_not_kept_whole(
        self, edge: Edge
    ) -> None:
        """None like it comes again: its place is for another."""
        lane, line = edge.app.parts.server._lane, await idle(edge)
        assert lane is not None
        for header in (("X-Request-Id", "mine"), ("traceparent", f"00-{'7' * 32}-{'b' * 16}-01")):
            for _ in range(5):
                line.send(edge.asking("beef", headers=[header]))
                assert (await line.answer()).status == 200
        assert not lane._requests
        await line.close()

    async def test_known_heads_do_not_cross_routes_peers_or_bodies(self, edge: Edge) -> None:
        """A head is known with its route; the body's length is part of it."""
        line = await idle(edge)
        for body in (b"token=a", b"token=b", b"token=c"):
            for path in (TOKEN_PATH, "/v1/introspect"):
                line.send(edge.posting(body, path=path))
                reply = await line.answer()
                assert reply.status == (400 if path == TOKEN_PATH else 200)
        await line.close()

    @pytest.mark.parametrize("value", TRACES)
    @pytest.mark.parametrize("is_last", [True, False])
    async def test_any_other_byte_is_another_head(self, value: str, *, is_last: bool) -> None:
        """But for the trace, and the body: each byte by itself, as the last head and as any."""
        heads, other = KnownHeads(), b"GET / HTTP/1.1\r\nHost: b\r\n\r\n"
        data = f"POST /t HTTP/1.1\r\n{value}Content-Length: 2\r\n\r\n{{}}".encode()
        known = _kept(heads, data)
        assert _kept(heads, other) is not None
        trace = range(*re.search(rb"[0-9a-f-]{55}|$", data).span())  # type: ignore[union-attr]
        for place, byte in product(range(len(data) - 2), range(256)):
            mutated = data[:place] + bytes([byte]) + data[place + 1 :]
            is_same = mutated == data or (
                place in trace and well_formed(mutated[trace[0] : trace[-1] + 1].decode("latin-1"))
            )
            if is_last:
                assert heads.known_in(data) is known
            else:
                assert heads.known_in(other) is not known
            assert heads.known_in(mutated) is (known if is_same else None), mutated
        for cut in range(len(data)):
            assert (
                heads.known_in(data[:cut]) is heads.known_in(data[:cut] + data[cut + 1 :]) is None
            )
        assert heads.known_in(data + b" ") is None
        assert heads.known_in(data[:-2] + b"[]") is known

    @pytest.mark.parametrize(
        ("instead", "status"),
        [
            ("\0", 400),
            ("\r\n\r\n", 400),
            ("\r\nOrigin: https://shop.example".rjust(55, "7"), 403),
            ("", 400),  # what is behind the body then is no request
        ],
        ids=["nul", "end", "browser", "nothing"],
    )
    async def test_what_stands_where_a_trace_stood_is_read(
        self, parsed: list[bytes], edge: Edge, instead: str, status: int
    ) -> None:
        """Also if it is as long as one, or what the table itself might put there."""
        line, fingerprint = await idle(edge), visitor()
        for _ in range(4):
            trace = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
            line.send(edge.asking(fingerprint, headers=[("traceparent", trace)]))
            assert (await line.answer()).status == 200
        asked = edge.asking(fingerprint, headers=[("traceparent", trace)])
        padding = b" " * (len(trace) - len(instead))  # then all of it is as long as what is known
        line.send(asked.replace(trace.encode(), instead.encode()) + padding)
        assert (await line.answer()).status == status
        assert parsed[-1].startswith(asked.partition(trace.encode())[0] + instead.encode())
        await line.close()

    async def test_a_refusal_by_a_limit_is_a_value_to_its_bytes(
        self, steps: list[bool], edge: Edge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """But for the line of the first in a minute: a flood of them makes no exception."""
        line, fingerprint = await idle(edge), visitor()
        for _ in range(21):
            line.send(edge.asking(fingerprint))
            reply = await line.answer()
        assert (reply.status, reply.code) == (429, "RATE_LIMITED")
        edge.app.parts.routes.tokens.use_log(debug=False)
        monkeypatch.setattr(errors.RateLimited, "__init__", None)
        steps.clear()
        line.send(edge.asking(fingerprint))
        again = await line.answer()
        assert (again.status, again.body, steps) == (429, reply.body, [True])
        await line.close()

    async def test_the_table_of_heads_is_bounded(self) -> None:
        """G6: two generations; what is asked for stays."""
        heads = KnownHeads()
        known: Any = type("Known", (), {"message": type("Message", (), {"headers": {}})})
        for n in range(5 * MAX_KNOWN):
            assert not heads.came_before(b"%d" % n)
            assert heads.came_before(b"%d" % n)
            heads.keep(b"%d" % n, known)
            heads.find(b"0")
        assert len(heads) <= 2 * MAX_KNOWN
        assert heads.find(b"0") is known
        heads.keep(b"x" * (known_heads.LONGEST + 1), known)
        assert heads.find(b"x" * (known_heads.LONGEST + 1)) is None
        for n in range(3 * known_heads.MAX_ONCE):
            heads.came_before(b"once %d" % n)
        assert len(heads._once) <= known_heads.MAX_ONCE


class TestGivenUp:
    async def test_who_leaves_before_it_goes_on_ends_what_was_begun(
        self, steps: list[bool], edge: Edge
    ) -> None:
        """A mint that was begun in the lane is given up with its only caller, as any other."""
        began, ended = asyncio.Event(), asyncio.Event()

        async def wait_for_a_turn(*_args: object) -> object:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        edge.mint_by(wait_for_a_turn)
        lines = [await idle(edge) for _ in range(3)]
        steps.clear()
        for line in lines:
            line.send(edge.asking())
        async with asyncio.timeout(TIMEOUT):
            await began.wait()
            for line in lines:
                line.writer.transport.abort()
            await ended.wait()
            await edge.app.parts.token_service.flights.drained()
        assert steps == [False] * 3
        assert edge.events("broker.embed_token") == []

    async def test_what_was_begun_and_not_gone_on_with_is_cancelled(self, edge: Edge) -> None:
        """The connection is lost in the same turn of the loop."""
        ended: list[type[BaseException]] = []

        async def wait_for_a_turn(*_args: object) -> object:
            try:
                return await asyncio.Event().wait()
            except BaseException as error:
                ended.append(type(error))
                raise

        edge.mint_by(wait_for_a_turn)
        line = await idle(edge)
        ours = next(iter(edge.app.parts.server.connections))
        assert isinstance(ours, LaneConnection)
        ours.data_received(edge.asking())
        assert ours._begun is not None
        assert ours.transport is not None
        ours.transport.abort()
        ours.connection_lost(None)
        async with asyncio.timeout(TIMEOUT):
            await edge.app.parts.server._leaving.finish()
            await edge.app.parts.token_service.flights.drained()
        assert ended == [asyncio.CancelledError]
        await line.close()

    async def test_a_defect_is_answered_by_the_ordinary_path(
        self, edge: Edge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where even the refusal fails: 500 in the envelope, and the connection ends."""
        edge.defects_expected = True

        def fail(*_args: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(edge.app.parts.routes.tokens, "_refuse", fail)
        line = await idle(edge)
        line.send(edge.asking("no hex"))
        reply = await line.answer()
        assert (reply.status, reply.code) == (500, "INTERNAL_ERROR")
        assert await line.rest() == b""
        await line.close()


def _silent(_self: LaneConnection, run: Any, *asked: Any) -> bool:
    run(*asked).close()
    return True


def _raises(_self: LaneConnection, run: Any, *asked: Any) -> bool:
    run(*asked).close()
    raise AttributeError


def _twice(self: LaneConnection, run: Any, *asked: Any) -> bool:
    work = run(*asked)
    try:
        work.send(None)
    except StopIteration as end:
        assert self.transport is not None
        for _ in range(2):
            self.transport.write(end.value.head + b"\r\n" + end.value.body)
    else:
        work.close()
    return True


def _untold(_self: LaneConnection) -> None:
    """Say nothing."""


class TestAiohttp:
    def test_every_private_name_is_listed(self) -> None:
        """What the connections use of aiohttp is in the list, and nothing else is."""
        used = {name for module in (connection, lane_connection) for name in _foreign(module)}
        assert used == {*ATTRIBUTES, *METHODS}
        imported = {name for module in (connection, lane_connection) for name in _imported(module)}
        assert imported == set(IMPORTS)
        for name in METHODS:
            assert callable(getattr(aiohttp.web.RequestHandler, name))
        for name in IMPORTS:
            assert hasattr(aiohttp.web_protocol, name)

    async def test_the_installed_release_bears_the_lane(self) -> None:
        """A release that does not makes the broker slower; whoever upgrades is told here."""
        assert await fault_of_lane() is None

    @pytest.mark.parametrize("name", [*METHODS, *aiohttp_internals.PARSER_METHODS, "_waiter"])
    async def test_a_name_that_is_gone_is_told(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """By its name, before anything is asked."""
        names = tuple(f"{known}_renamed" if known == name else known for known in ATTRIBUTES)
        monkeypatch.setattr(aiohttp_internals, "ATTRIBUTES", names)
        for kind in ("METHODS", "PARSER_METHODS"):
            listed = getattr(aiohttp_internals, kind)
            renamed = tuple(f"{one}_renamed" if one == name else one for one in listed)
            monkeypatch.setattr(aiohttp_internals, kind, renamed)
        fault = await fault_of_lane()
        assert fault is not None
        assert f"has no {name}_renamed" in fault

    @pytest.mark.parametrize("broken", [_silent, _twice, _raises])
    async def test_a_lane_that_does_otherwise_is_left_alone(
        self, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., bool]
    ) -> None:
        """The ordinary path serves; the log and a gauge say so."""
        monkeypatch.setattr(LaneConnection, "_run", broken)
        async with serving() as edge:
            assert [(await edge.request_token()).status for _ in range(3)] == [200] * 3
            (event,) = edge.events("broker.fast_lane_off")
            assert event["aiohttp"] == aiohttp.__version__
            assert event["reason"]
            assert (await edge.scrape())["broker_fast_lane_off"] == 1

    @pytest.mark.parametrize("name", ["_go_on_told", "_hand_over"])
    async def test_a_lane_that_does_not_tell_what_it_is_told_is_found(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """Where the answer waits for a call, with nothing behind it and with more."""
        monkeypatch.setattr(LaneConnection, name, _untold)
        assert await fault_of_lane() is not None

    async def test_the_gauge_is_0_while_it_serves(self, edge: Edge) -> None:
        """Without a word in the log."""
        assert (await edge.scrape())["broker_fast_lane_off"] == 0
        assert edge.events("broker.fast_lane_off") == []

    async def test_tests_can_switch_it_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By an environment variable; no setting."""
        monkeypatch.setenv(NO_LANE, "1")
        async with serving() as edge:
            assert (await edge.request_token()).status == 200
            assert (await edge.scrape())["broker_fast_lane_off"] == 1
            assert edge.app.parts.server._lane is None


def _foreign(module: Any) -> set[str]:
    """Private attributes of `self` that the classes of a module do not define themselves."""
    ours: set[str] = {"_begun"}
    for kind in (connection.DataConnection, LaneConnection):
        ours |= {name for name in vars(kind) if name not in vars(aiohttp.web.RequestHandler)}
        ours |= set(kind.__slots__)
    tree = ast.parse(inspect.getsource(module))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {
        node.attr
        for kind in classes
        if kind.name.endswith("Connection")
        for node in ast.walk(kind)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr not in ours
        if not node.attr.startswith("__")
    }


def _imported(module: Any) -> set[str]:
    return {
        name.name
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aiohttp")
        for name in node.names
        if name.name.startswith("_")
    }
