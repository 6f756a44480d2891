"""What is passed on, without a vendor: whose 429 counts, whose fault it is, what a head says."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp.web import RequestPayloadError
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict
from structlog.testing import capture_logs

from broker import errors
from broker.issuers.vendor.client import Answer, CallFailed
from broker.rules.passing import BadTarget
from broker.telemetry.labels import PassedOutcome, Reason
from broker.telemetry.logs import RefusalLog
from broker.telemetry.metrics import Metrics
from broker.testing import FakeClock
from broker.web.auth import Client
from broker.web.pass_through import MAX_ACCEPTED, MAX_READ, SUSPECT, Access, PassThrough
from broker.web.passage import Passage, head_of, upload, verdict_on

GOOD, BAD, NEW = (name.encode() for name in ("good", "bad", "new"))


class Passed:
    """An answer of the vendor's whose body comes in pieces."""

    def __init__(self, status: int, pieces: tuple[bytes, ...] = (b"",)) -> None:
        self.status, self.reason = status, "Whatever"
        self.headers: CIMultiDict[str] = CIMultiDict()
        self._pieces = list(pieces)
        self.taken = 0

    async def chunk(self) -> bytes:
        self.taken += 1
        return self._pieces.pop(0) if self._pieces else b""


class Vendor:
    """A pass-through whose answers the test gives; `heeded` are the 429s that pause mints."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.heeded: list[Answer] = []
        self.metrics = Metrics("upstream", pass_through=True).pass_through
        nothing: Any = None
        issuer: Any = SimpleNamespace(heed_elsewhere=self.heeded.append)
        access = Access(("/v1/*",), needs_switch=True)
        self.passing = PassThrough(
            nothing, access, nothing, nothing, issuer, self.metrics, self.clock
        )
        self.passage: Any = SimpleNamespace(moved=lambda: None)

    def says(self, status: int, key: bytes, pieces: tuple[bytes, ...] = ()) -> bytes:
        """Let an answer to this key arrive; returns what was read of it."""
        if status == 429:
            answer: Any = Passed(429, pieces)
            return asyncio.run(self.passing._heeded(self.passage, answer, key))
        self.passing._remember(key, is_refused=status == 401)
        return b""

    def observed(self, outcome: PassedOutcome) -> float:
        """Return how many ended so."""
        histogram = self.metrics.duration[outcome]
        return sum(histogram._cells[histogram._first : histogram._sum])


class TestThrottled:
    def test_V3_a_429_soon_after_a_refused_key_may_be_for_failed_logins(self) -> None:
        """It pauses no mints, and each one begins the time anew in which the next may be, too."""
        vendor = Vendor()
        vendor.says(401, BAD)
        for _ in range(3):
            vendor.clock.advance(SUSPECT / 1_000_000 - 1)
            vendor.says(429, NEW)
        assert vendor.heeded == []
        vendor.clock.advance(SUSPECT / 1_000_000)
        vendor.says(429, NEW)
        assert len(vendor.heeded) == 1

    def test_V3_one_to_a_key_that_was_accepted_counts(self) -> None:
        """Whoever failed: until the vendor refuses that key itself."""
        vendor = Vendor()
        vendor.says(200, GOOD)
        vendor.says(401, BAD)
        vendor.says(429, GOOD)
        assert len(vendor.heeded) == 1
        vendor.says(401, GOOD)
        vendor.says(429, GOOD)
        assert len(vendor.heeded) == 1

    def test_V3_without_a_refusal_any_counts(self) -> None:
        """A key that nobody knows is no reason to doubt."""
        vendor = Vendor()
        vendor.says(429, NEW)
        assert [answer.status for answer in vendor.heeded] == [429]

    def test_M1_accepted_keys_are_bounded(self) -> None:
        """Callers have any number of them."""
        vendor = Vendor()
        for number in range(3 * MAX_ACCEPTED):
            vendor.says(200, b"%d" % number)
            assert len(vendor.passing._accepted) <= MAX_ACCEPTED
        assert b"%d" % (3 * MAX_ACCEPTED - 1) in vendor.passing._accepted

    def test_M1_a_429_is_read_as_far_as_its_code_can_be(self) -> None:
        """All of a short one; of one without an end not much more than the bound."""
        vendor = Vendor()
        assert vendor.says(429, NEW, (b"a", b"b", b"")) == b"ab"
        assert vendor.heeded[-1].body == b"ab"
        piece = b"x" * 1000
        read = vendor.says(429, NEW, (piece,) * 1000)
        assert MAX_READ < len(read) <= MAX_READ + len(piece)


def client(name: str) -> Client:
    """Make a client of this name."""
    return Client(name, secrets.token_bytes(32), None, allow_origin=False)


@given(steps=st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
def test_places_are_counted_by_client_and_nobody_is_kept(steps: list[tuple[str, bool]]) -> None:
    """Whatever comes and goes: the gauge is the sum, and who has none under way is forgotten."""
    vendor, model = Vendor(), dict.fromkeys("abc", 0)
    for name, comes in steps:
        if not comes and not model[name]:
            continue
        change = 1 if comes else -1
        model[name] += change
        vendor.passing._hold(client(name), change)
        assert dict(vendor.passing._under_way) == {n: count for n, count in model.items() if count}
        assert vendor.metrics.in_flight.value == sum(model.values())


def passage(**how: Any) -> Passage:
    """Make a request on its way."""
    nothing: Any = None
    made = Passage(nothing, "id", client("web"), "/v1/*", nothing)
    for name, value in how.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("how", "error", "outcome", "kind"),
    [
        ({"broke_off": True}, ConnectionError(), PassedOutcome.REFUSED, errors.Invalid),
        ({}, RequestPayloadError("x"), PassedOutcome.REFUSED, errors.Invalid),
        ({"awaits_caller": True}, TimeoutError(), PassedOutcome.REFUSED, errors.RequestTimeout),
        ({}, TimeoutError(), PassedOutcome.FAILED, errors.UpstreamTimeout),
        (
            {"awaits_caller": True, "status": 200, "is_begun": True},
            TimeoutError(),
            PassedOutcome.BROKEN,
            errors.UpstreamTimeout,
        ),
        ({"is_begun": True}, ConnectionError(), PassedOutcome.LEFT, errors.Internal),
        ({}, ConnectionError(), PassedOutcome.FAILED, errors.UpstreamTimeout),
        ({}, BadTarget("it has two"), PassedOutcome.REFUSED, errors.Invalid),
        ({}, CallFailed(Reason.TLS), PassedOutcome.FAILED, errors.UpstreamUnavailable),
        ({}, CallFailed(Reason.TIMEOUT), PassedOutcome.FAILED, errors.UpstreamTimeout),
        (
            {"is_begun": True},
            CallFailed(Reason.CONNECT),
            PassedOutcome.BROKEN,
            errors.UpstreamUnavailable,
        ),
    ],
)
def test_whose_fault_it_is(
    how: dict[str, Any],
    error: Exception,
    outcome: PassedOutcome,
    kind: type[errors.BrokerError],
) -> None:
    """The caller's, the vendor's, or nobody's; before the answer has begun and after."""
    found, told = verdict_on(passage(**how), error)
    assert (found, type(told)) == (outcome, kind)
    if outcome in (PassedOutcome.FAILED, PassedOutcome.BROKEN):
        reason = error.reason if isinstance(error, CallFailed) else Reason.TIMEOUT
        assert told.reason == reason.value


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_a_head_is_the_vendor_s_with_what_it_lacks(*, chunked: bool, last: bool) -> None:
    """An id and no storing where it says nothing of either; then what is between neighbours."""
    answer: Any = Passed(203)
    ending = ["Transfer-Encoding: chunked"] * chunked + ["Connection: close"] * last + ["", ""]
    say: Callable[..., bytes] = head_of
    given = say(answer, [("Content-Type", "a/b")], "id", chunked=chunked, last=last)
    added = ["X-Request-Id: id", "Cache-Control: no-store"]
    lines = ["HTTP/1.1 203 Whatever", "Content-Type: a/b", *added, *ending]
    assert given.decode() == "\r\n".join(lines)
    own = [("x-request-id", "theirs"), ("CACHE-CONTROL", "public")]
    lines = ["HTTP/1.1 203 Whatever", "x-request-id: theirs", "CACHE-CONTROL: public", *ending]
    assert say(answer, own, "id", chunked=chunked, last=last).decode() == "\r\n".join(lines)


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\0b", "a\x7fb"])
def test_a_head_with_a_control_character_is_none(text: str) -> None:
    """It would be two heads for somebody behind us; a tab is text."""
    answer: Any = Passed(200)
    with pytest.raises(CallFailed):
        head_of(answer, [("A", text)], "id", chunked=False, last=False)
    assert b"a\tb" in head_of(answer, [("A", "a\tb")], "id", chunked=False, last=False)


class TestLines:
    """What is written of each, and counted."""

    @pytest.mark.parametrize("outcome", list(PassedOutcome))
    @pytest.mark.parametrize("vendor_id", ["", "id", "theirs"])
    def test_each_is_one_line_with_all_that_is_known(
        self, outcome: PassedOutcome, vendor_id: str
    ) -> None:
        """A warning with its reason where the vendor failed; its id where it has one of its own."""
        vendor = Vendor()
        made = passage(status=200, vendor_id=vendor_id, sent=3, received=4)
        made.request = SimpleNamespace(method="PUT")  # type: ignore[assignment]
        with capture_logs() as lines:
            vendor.passing._note(made, outcome, "timeout", 0.0125)
        failed = outcome in (PassedOutcome.FAILED, PassedOutcome.BROKEN)
        expected: dict[str, object] = {
            "event": "broker.pass_through",
            "log_level": "warning" if failed else "info",
            "outcome": outcome.value,
            "request_id": "id",
            "client": "web",
            "method": "PUT",
            "route": "/v1/*",
            "status": 200,
            "sent": 3,
            "received": 4,
            "duration_ms": 12.5,
        }
        if vendor_id == "theirs":
            expected["vendor_request_id"] = vendor_id
        if failed:
            expected["reason"] = "timeout"
        assert lines == [expected]
        assert vendor.observed(outcome) == 1

    @pytest.mark.parametrize("debug", [False, True])
    def test_a_refusal_of_a_kind_is_one_line_a_minute(self, *, debug: bool) -> None:
        """Each is counted; at debug each is written, too."""
        vendor = Vendor()
        routes: Any = SimpleNamespace(tokens=SimpleNamespace(debug=debug), refusals=RefusalLog())
        vendor.passing._routes = routes
        error = errors.RouteNotAllowed("no")
        with capture_logs() as lines:
            for _ in range(3):
                vendor.passing._refuse(error, "/v1/*", "id", time.perf_counter())
        assert len(lines) == (3 if debug else 1)
        assert (lines[0]["status"], lines[0]["code"], lines[0]["route"]) == (
            error.status,
            error.code,
            "/v1/*",
        )
        assert vendor.observed(PassedOutcome.REFUSED) == 3


class Writer:
    """Where a body goes; what it was told stands between the pieces."""

    def __init__(self) -> None:
        self.done: list[object] = []

    def enable_chunking(self) -> None:
        self.done.append("chunked")

    async def write(self, piece: bytes) -> None:
        self.done.append(piece)

    async def write_eof(self) -> None:
        self.done.append("end")


@pytest.mark.parametrize("status", [200, 204, 304])
@pytest.mark.parametrize("length", [None, "2"])
@pytest.mark.parametrize("version", [(1, 0), (1, 1)])
@pytest.mark.parametrize("ends", ["", "draining", "close", "unread"])
def test_an_answer_is_framed_for_its_caller(
    status: int, length: str | None, version: tuple[int, int], ends: str
) -> None:
    """By the vendor's length, in chunks, or by the connection's end; it is said which."""
    vendor = Vendor()
    routes: Any = SimpleNamespace(draining=ends == "draining")
    vendor.passing._routes = routes
    heads, writer = list[bytes](), Writer()
    request = SimpleNamespace(
        version=version,
        keep_alive=ends != "close",
        content=SimpleNamespace(is_eof=lambda: ends != "unread"),
        transport=SimpleNamespace(write=heads.append),
        writer=writer,
    )
    made = passage(status=status, limit=SimpleNamespace(reschedule=lambda _: None))
    made.request = request  # type: ignore[assignment]
    has_body = status == 200
    answer: Any = Passed(status, (b"b",) if has_body else ())
    if length is not None:
        answer.headers["Content-Length"] = length
    told = asyncio.run(vendor.passing._answer(made, answer, b"a" if has_body else b""))
    chunks = has_body and length is None and version == (1, 1)
    by_its_end = has_body and length is None and version == (1, 0)
    pieces: list[object] = [b"a", b"b"] if has_body else []
    assert writer.done == (["chunked", *pieces, "end"] if chunks else pieces)
    (head,) = heads
    last = bool(ends) or version == (1, 0) or by_its_end
    assert (b"Connection: close" in head) is told.closes is last
    assert (b"Transfer-Encoding: chunked" in head) is chunks
    assert (b"Content-Length: 2" in head) is (length is not None and status != 204)
    assert made.received == len(pieces)
    assert made.is_begun
    assert told.is_written


def test_an_answer_for_who_has_left_is_not_begun_in_vain() -> None:
    """The connection is gone: that is the caller's end, and no failure of the vendor."""
    vendor = Vendor()
    routes: Any = SimpleNamespace(draining=False)
    vendor.passing._routes = routes
    made, answer = passage(status=200), Passed(200)
    request = SimpleNamespace(
        version=(1, 1),
        keep_alive=True,
        content=SimpleNamespace(is_eof=lambda: True),
        transport=None,
        writer=Writer(),
    )
    made.request = request  # type: ignore[assignment]
    passed: Any = answer
    with pytest.raises(ConnectionResetError) as caught:
        asyncio.run(vendor.passing._answer(made, passed, b""))
    assert verdict_on(made, caught.value)[0] is PassedOutcome.LEFT


@pytest.mark.parametrize("status", [200, 401, 429, 500])
@pytest.mark.parametrize("has_body", [False, True])
def test_a_request_goes_on_with_its_id_and_is_remembered(status: int, *, has_body: bool) -> None:
    """Its body only if it has one; the vendor's own id is kept for the log."""
    vendor, sent = Vendor(), list[Any]()

    @asynccontextmanager
    async def send(*given: Any) -> AsyncIterator[Any]:
        sent.append(given)
        yield Passed(status)

    async def answered(_passage: Passage, _answer: Any, first: bytes) -> bytes:
        return first

    client: Any = SimpleNamespace(send=send)
    routes: Any = SimpleNamespace(given_id=lambda _headers: "theirs")
    vendor.passing._client, vendor.passing._routes = client, routes
    vendor.passing._answer = answered  # type: ignore[method-assign,assignment]
    vendor.says(200, BAD)
    made = passage(limit=SimpleNamespace(reschedule=lambda _: None))
    asked = SimpleNamespace(method="PUT", raw_path="/v1/x?y", body_exists=has_body)
    made.request = asked  # type: ignore[assignment]

    async def main() -> None:
        await vendor.passing._pass_on(made, [("A", "b")], BAD)

    asyncio.run(main())
    ((method, target, fields, body),) = sent
    assert (method, target) == ("PUT", "/v1/x?y")
    assert fields == [("A", "b"), ("X-Request-Id", "id"), ("Via", "1.1 embed-token-broker")]
    assert (body is not None) is has_body
    assert (made.status, made.vendor_id) == (status, "theirs")
    assert (BAD in vendor.passing._accepted) is (status != 401)
    assert len(vendor.heeded) == (status == 429)


class Body:
    """What a caller sends: pieces, and then an end or a failure."""

    def __init__(self, made: Passage, pieces: list[bytes], failure: Exception | None) -> None:
        self._made, self._pieces, self._failure = made, pieces, failure
        self.waited: list[bool] = []

    async def readany(self) -> bytes:
        self.waited.append(self._made.awaits_caller)
        if not self._pieces and self._failure is not None:
            raise self._failure
        return self._pieces.pop(0) if self._pieces else b""


@pytest.mark.parametrize("breaks", [False, True])
def test_a_body_is_counted_as_it_goes(*, breaks: bool) -> None:
    """While a piece is waited for the caller is late, and at no other time; a break is noted."""
    moves = list[float]()
    made = passage(limit=SimpleNamespace(reschedule=moves.append))
    error = RequestPayloadError("x") if breaks else None
    content = Body(made, [b"abc", b"de"], error)
    asked = SimpleNamespace(content=content, headers={}, version=(1, 1), transport=None)
    made.request = asked  # type: ignore[assignment]
    at_vendor = list[tuple[bool, int]]()

    async def main() -> None:
        async for _ in upload(made):
            at_vendor.append((made.awaits_caller, made.sent))

    if breaks:
        with pytest.raises(RequestPayloadError):
            asyncio.run(main())
    else:
        asyncio.run(main())
    assert at_vendor == [(False, 0), (False, 3)]
    assert content.waited == [True, True, True]
    assert (made.sent, made.broke_off, made.awaits_caller) == (5, breaks, breaks)
    assert len(moves) == (2 if breaks else 3)
