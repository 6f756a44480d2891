"""Every way in which the vendor fails, through the real client: rows V1-V5 and V7-V9.

For each: what the caller is told, what is counted, for how long it is remembered, and that a
visitor whose token is held does not notice.
"""

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import msgspec
import pytest
from relaying import (
    IMPATIENT,
    UNLIMITED,
    House,
    Relay,
    broker_before,
    relaying,
    until,
    visitor,
)

from broker.errors import BrokerError
from broker.issuers.vendor.api import MAX_BODY
from broker.issuers.vendor.client import CONNECT_TIMEOUT, USER_AGENT, CallFailed
from broker.rules.breaker import MIN_CALLS
from broker.telemetry.labels import Reason
from broker.testing import FakeVendor, Refusal
from broker.testing.vendor import faults
from broker.testing.vendor.faults import Fault

BROKEN = (502, "UPSTREAM_UNAVAILABLE")
LATE = (504, "UPSTREAM_TIMEOUT")
SHED = (503, "SERVICE_UNAVAILABLE")


def told(error: BrokerError) -> tuple[int, str]:
    """What a caller sees of an error."""
    return error.status, error.code


VERDICTS: list[tuple[Refusal, int | None]] = [
    # what the vendor says, and for how many seconds it is remembered
    (Refusal.INSUFFICIENT_BALANCE, 15),
    (Refusal.ACCOUNT_SUSPENDED, 15),
    (Refusal.PLAN_REQUIRED, 30),
    (Refusal.NOT_FOUND, 30),
    (Refusal.GONE, 30),
    (Refusal.MODEL_NOT_GENERATED, 30),
    (Refusal.AGENT_NOT_READY, 30),
    (Refusal.CONCURRENCY_LIMIT_REACHED, None),
    (Refusal.SESSION_DURATION_LIMIT, None),
    (Refusal.VALIDATION_ERROR, None),
    (Refusal.UNPROCESSABLE, None),
    (Refusal.SESSION_LIMIT, None),
]

ACCOUNT_WIDE = {Refusal.INSUFFICIENT_BALANCE, Refusal.ACCOUNT_SUSPENDED}


async def test_a_refusal_that_is_remembered_is_one_line_a_minute(vendor: FakeVendor) -> None:
    """What the vendor says is written each time; what is answered from memory is counted."""
    async with broker_before(vendor, {"log": {"level": "info"}}) as house:
        vendor.fail(faults.error(Refusal.NOT_FOUND))
        for _ in range(12):
            assert (await house.request_token()).code == "NOT_FOUND"
        assert len(vendor.journal.calls) == 1
    assert len(house.events("broker.embed_token")) == 2  # the vendor's, the first from memory
    (summary,) = house.events("broker.refusals")
    assert (summary["kind"], summary["unwritten"]) == ("refused", 10)


class TestVerdicts:
    @pytest.mark.parametrize(("what", "remembered"), VERDICTS)
    async def test_V2_pass_through_and_are_remembered_by_class(
        self, relay: Relay, what: Refusal, remembered: int | None
    ) -> None:
        """Status and code are the vendor's; no retry, no breaker, no pause; then the right TTL."""
        await relay.request_token()
        planned = relay.vendor.fail(faults.error(what))
        error = await relay.failure()
        assert told(error) == what.value
        assert not error.transient
        assert error.retry_after is None
        assert relay.calls == 2
        assert relay.errors == {"refused": 1}
        assert relay.statuses == {"200": 1, str(what.value[0]): 1}
        assert not relay.issuer.credentials.is_open
        assert relay.paused_for == 0
        assert told(await relay.failure()) == what.value
        assert relay.calls == (3 if remembered is None else 2)
        planned.stop()
        if remembered is not None:
            relay.clock.advance(remembered - 0.001)
            assert told(await relay.failure()) == what.value
            relay.clock.advance(0.001)
        await relay.request_token()

    @pytest.mark.parametrize("what", [what for what, ttl in VERDICTS if ttl is not None])
    async def test_V2_are_remembered_for_whom_they_hold(self, relay: Relay, what: Refusal) -> None:
        """Account-wide only 402 and a suspension; the others for one agent and one model."""
        relay.vendor.fail(faults.error(what), times=1)
        await relay.failure(agent="A", model="m")
        for agent, model in (("B", "m"), ("A", None), ("A", "n")):
            if what in ACCOUNT_WIDE:
                assert told(await relay.failure(agent=agent, model=model)) == what.value
            else:
                await relay.request_token(agent=agent, model=model)

    async def test_V2_one_bad_fingerprint_does_not_poison_an_agent(self, relay: Relay) -> None:
        """A 400 or a plain 422 is about one request: the next visitor is asked for."""
        bad = visitor()
        relay.vendor.fail(faults.error(Refusal.UNPROCESSABLE), fingerprint=bad)
        for _ in range(3):
            assert told(await relay.failure(bad)) == Refusal.UNPROCESSABLE.value
            await relay.request_token()

    async def test_M4_a_refusal_does_not_hide_a_later_success(self, relay: Relay) -> None:
        """A mint that was under way and succeeds proves that the refusal is over."""
        slow = visitor()
        relay.vendor.fail(faults.slow(0.05), fingerprint=slow)
        relay.vendor.fail(faults.error(Refusal.NOT_FOUND), times=1)
        late = relay.begin(slow)
        await relay.arrived(1)
        assert told(await relay.failure()) == Refusal.NOT_FOUND.value
        await late
        await relay.request_token()

    async def test_M4_a_timeout_is_not_remembered(self) -> None:
        """Neither is a reset or a page of the edge: the next visitor is asked for at once."""
        async with relaying(timeout=0.1) as relay:
            for fault in (faults.hang(), faults.edge_denied(), faults.html()):
                with relay.vendor.fail(fault):
                    await relay.failure()
                await relay.request_token()

    async def test_V2_the_vendor_s_message_is_shown_only_where_it_is_harmless(
        self, relay: Relay
    ) -> None:
        """What could be a key, a token or the fingerprint is not handed on."""
        fingerprint, key = visitor(), relay.vendor.secret.reveal()
        said = {
            "the agent sleeps": "the agent sleeps",
            f"no {fingerprint} here": "the vendor refused this request",
            f"your key {key} is fine": "the vendor refused this request",
            f"half of it: {key[:20]}0": "half of it: [...]",
        }
        for message, shown in said.items():
            envelope = {"error": {"code": "VALIDATION_ERROR", "message": message}}
            with relay.vendor.fail(faults.body(envelope, 400)):
                assert (await relay.failure(fingerprint)).message == shown


PASSING: list[tuple[Fault, tuple[int, str], str, str, int]] = [
    # fault, what the caller is told, counted reason and status, calls that it costs
    (faults.error(Refusal.INTERNAL_ERROR), BROKEN, "status_5xx", "500", 2),
    (faults.error(Refusal.BAD_GATEWAY), BROKEN, "status_5xx", "502", 2),
    (faults.error(Refusal.SERVICE_UNAVAILABLE), BROKEN, "status_5xx", "503", 2),
    (faults.error(Refusal.GATEWAY_TIMEOUT), BROKEN, "status_5xx", "504", 2),
    (faults.html(502), BROKEN, "status_5xx", "502", 2),
    (faults.html(504), BROKEN, "status_5xx", "504", 2),
    (faults.html(599), BROKEN, "status_5xx", "other", 2),
    (faults.edge_denied(), BROKEN, "edge_403", "403", 1),
    (faults.html(200), BROKEN, "not_json", "200", 1),
    (faults.redirect("/elsewhere"), BROKEN, "redirect", "other", 1),
    (faults.body(b"", 204), BROKEN, "unexpected_status", "other", 1),
    (faults.error((418, "TEAPOT")), BROKEN, "unexpected_status", "other", 1),
    (faults.huge(), BROKEN, "too_large", "200", 1),
    (faults.huge(MAX_BODY), BROKEN, "too_large", "200", 1),
    (faults.gzip_bomb(), BROKEN, "encoded", "200", 1),
    (faults.empty(), BROKEN, "not_json", "200", 1),
    (faults.reset(), BROKEN, "reset", "none", 2),
    (faults.reset(after=0), BROKEN, "reset", "none", 2),
    (faults.reset(after=10), BROKEN, "reset", "none", 2),
    (faults.cut(10), BROKEN, "reset", "none", 2),
    (faults.overlong(), BROKEN, "reset", "none", 2),
    (faults.hang(), LATE, "timeout", "none", 1),
    (faults.cut(10, hold=True), LATE, "timeout", "none", 1),
    (faults.overlong(hold=True), LATE, "timeout", "none", 1),
    (faults.drip(0.02), LATE, "timeout", "none", 1),
    (faults.slow(30), LATE, "timeout", "none", 1),
]


class TestPassingFaults:
    @pytest.mark.parametrize(
        ("fault", "expected", "reason", "status", "cost"),
        PASSING,
        ids=[f"{number}-{fault.name}" for number, (fault, *_) in enumerate(PASSING)],
    )
    async def test_V4_V5_end_in_a_bounded_passing_error(
        self, fault: Fault, expected: tuple[int, str], reason: str, status: str, cost: int
    ) -> None:
        """The caller is told 502 or 504, once; all is counted; whoever is known is served."""
        async with relaying(timeout=1) as relay:
            known = visitor()
            held = await relay.request_token(known)
            with relay.vendor.fail(fault):
                new = relay.begin()
                await relay.arrived(2)
                answer = await relay.request_token(known)
                assert answer.token is held.token
                with pytest.raises(BrokerError) as caught:
                    await new
            assert told(caught.value) == expected
            assert caught.value.transient
            assert relay.calls == 1 + cost
            assert relay.errors == {reason: cost}
            expected_statuses = {"200": 1}
            expected_statuses[status] = expected_statuses.get(status, 0) + cost
            assert relay.statuses == expected_statuses
            assert not relay.issuer.credentials.is_open
            assert relay.paused_for == 0
            await relay.request_token()

    @pytest.mark.parametrize("fault", faults.tokenless(), ids=lambda fault: fault.name)
    async def test_V4_a_200_without_a_token_is_an_error(self, relay: Relay, fault: Fault) -> None:
        """Never a token of the broker's making, never a defect; nothing of it is kept."""
        relay.vendor.fail(fault)
        fingerprint = visitor()
        error = await relay.failure(fingerprint)
        assert told(error) == BROKEN
        assert relay.calls == 1
        assert sum(relay.errors.values()) == 1
        assert set(relay.errors) <= {"not_json", "no_token", "bad_key"}
        assert len(relay.tokens) == 0

    async def test_V4_a_body_of_just_the_bound_is_read(self, relay: Relay) -> None:
        """The bound is not one byte lower than it says."""
        await relay.request_token()
        reply = len(await _plain_answer(relay))
        relay.vendor.fail(faults.huge(MAX_BODY - reply))
        await relay.request_token()
        relay.vendor.heal()
        relay.vendor.fail(faults.huge(MAX_BODY - reply + 1))
        assert told(await relay.failure()) == BROKEN

    async def test_V4_a_body_without_end_is_left_at_the_bound(self) -> None:
        """The client hangs up soon after the bound; it does not read on until its time is up."""
        sent = 0

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
            try:
                while sent < 100_000_000:
                    writer.write(b" " * 65_536)
                    sent += 65_536
                    await writer.drain()
            except ConnectionError:
                pass
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with relaying(base_url=f"http://127.0.0.1:{port}") as relay:
            assert told(await relay.failure()) == BROKEN
            assert relay.errors == {"too_large": 1}
        server.close()
        await server.wait_closed()
        assert sent < 20_000_000  # what the kernel's buffers take, and no more

    async def test_V5_refused_connections(self, relay: Relay) -> None:
        """Nobody listens: 502, one retry, each counted."""
        known = visitor()
        held = await relay.request_token(known)
        await relay.vendor.refuse_connections()
        assert told(await relay.failure()) == BROKEN
        assert (await relay.request_token(known)).token is held.token
        assert relay.errors == {"connect": 2}
        assert relay.statuses == {"200": 1, "none": 2}
        await relay.vendor.accept_connections()
        await relay.request_token()

    async def test_V5_connections_that_nobody_accepts(self) -> None:
        """A hang before the request is out: 504 within the timeout, and no retry."""
        async with relaying(timeout=0.3) as relay:
            known = visitor()
            held = await relay.request_token(known)
            await relay.vendor.ignore_connections()
            new = relay.begin()
            await asyncio.sleep(0.02)
            assert (await relay.request_token(known)).token is held.token
            with pytest.raises(BrokerError) as caught:
                await new
            assert told(caught.value) == LATE
            assert relay.errors == {"timeout": 1}
            await relay.vendor.accept_connections()
            await relay.request_token()

    async def test_N13_a_call_without_a_connection_does_not_hold_its_slot_for_long(self) -> None:
        """It cannot arrive: its slot is for one that may get through, whatever a call may take."""
        async with relaying(timeout=60) as relay:
            await relay.vendor.ignore_connections()
            call = relay.issuer._client.mint(relay.vendor.secret, b"{}", {})
            with pytest.raises(CallFailed) as failed:
                await asyncio.wait_for(call, 5 * CONNECT_TIMEOUT)
            assert failed.value.reason is Reason.TIMEOUT

    async def test_V5_a_name_without_an_address(self) -> None:
        """The resolver knows nothing: 502, counted as dns."""
        async with relaying(base_url="https://vendor.invalid", timeout=5.0) as relay:
            assert told(await relay.failure()) == BROKEN
            assert set(relay.errors) == {"dns"}
            assert relay.calls == 0

    async def test_V5_no_tls_where_tls_is_expected(self) -> None:
        """A server that speaks plain HTTP on the port of HTTPS gets no key and no retry."""
        async with FakeVendor(UNLIMITED) as plain:
            base_url = plain.url.replace("http:", "https:")
            async with relaying(base_url=base_url) as relay:
                assert told(await relay.failure()) == BROKEN
                assert relay.errors == {"tls": 1}
            assert plain.journal.calls == []

    async def test_V5_a_certificate_that_nobody_vouches_for(self) -> None:
        """502, counted as tls; the request, and so the key, stays here."""
        async with FakeVendor(UNLIMITED, tls=_self_signed()) as vendor:
            async with relaying(base_url=vendor.url) as relay:
                assert told(await relay.failure()) == BROKEN
                assert relay.errors == {"tls": 1}
            assert vendor.journal.calls == []

    @pytest.mark.parametrize(
        "garbage",
        [
            b"SSH-2.0-OpenSSH\r\n",
            b"HTTP/1.1 two hundred\r\n\r\n",
            b"\x00" * 100,
            b"HTTP/1.1 200 OK",
        ],
    )
    async def test_V5_something_that_is_not_http(self, garbage: bytes) -> None:
        """Whatever answers on that port: a passing error, not a defect."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(garbage)
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with relaying(base_url=f"http://127.0.0.1:{port}") as relay:
            assert told(await relay.failure()) == BROKEN
            assert set(relay.errors) <= {"reset", "not_json"}
        server.close()
        await server.wait_closed()

    async def test_V5_a_connection_that_was_closed_while_it_was_idle(self, relay: Relay) -> None:
        """The pool's stale connections cost no caller a failure."""
        await relay.request_token()
        await relay.vendor.refuse_connections()
        await relay.vendor.accept_connections()
        await relay.request_token()


class TestThrottling:
    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            ("7", 7),
            ("1.5", 1.5),
            ("0", 1),
            ("-3", 1),
            ("299", 299),
            ("301", 300),
            ("99999999999999999999", 300),
            ("soon", 5),
            ("", 5),
            (("3", "9"), 9),
            ((), 5),
        ],
    )
    async def test_V1_retry_after_pauses_the_whole_budget_for_as_long(
        self, value: str | tuple[str, ...], seconds: float
    ) -> None:
        """Clamped to 1 s - 5 min, 5 s if it says nothing; the caller is told the same."""
        async with relaying(budget=IMPATIENT) as relay:
            known = visitor()
            held = await relay.request_token(known)
            relay.vendor.fail(faults.error(Refusal.RATE_LIMITED, retry_after=value))
            error = await relay.failure()
            assert told(error) == SHED
            assert error.retry_after is not None
            assert 0.9 * seconds - 0.2 <= error.retry_after / 1e6 <= 1.1 * seconds + 0.1
            assert seconds - 0.5 <= relay.paused_for <= seconds
            assert relay.calls == 2  # one attempt: the second would not be in time
            other = await relay.failure(agent="B", client="other")
            assert told(other) == SHED
            assert relay.calls == 2
            assert relay.errors == {"rate_limited": 1}
            assert (await relay.request_token(known)).token is held.token

    @pytest.mark.parametrize("skew", [0, 300, -300])
    async def test_V1_a_date_is_held_against_the_vendor_s_clock(self, skew: int) -> None:
        """Seven seconds from the vendor's now are seven seconds, whatever time it is there."""
        settings = msgspec.structs.replace(UNLIMITED, skew=float(skew))
        async with relaying(settings, budget=IMPATIENT) as relay:
            now = datetime.fromtimestamp(relay.clock.wall() / 1e6 + skew, UTC)
            at = format_datetime(now + timedelta(seconds=7), usegmt=True)
            relay.vendor.fail(faults.error(Refusal.RATE_LIMITED, retry_after=at))
            await relay.failure()
            assert 5.5 <= relay.paused_for <= 7

    async def test_V1_who_can_outwait_a_short_pause_is_served_after_it(self, relay: Relay) -> None:
        """A 429 is waited out inside the caller's patience, with one more call."""
        relay.vendor.fail(faults.error(Refusal.RATE_LIMITED, retry_after="1"), times=1)
        await relay.request_token()
        assert [call.status for call in relay.vendor.journal.calls] == [429, 200]
        first, second = relay.vendor.journal.calls
        assert first.mono == second.mono  # its clock stands still; ours waited
        assert relay.errors == {"rate_limited": 1}

    async def test_V2_session_limit_does_not_pause(self, relay: Relay) -> None:
        """The other 429: capacity, not pace; the next visitor's mint is not held up."""
        relay.vendor.fail(faults.error(Refusal.SESSION_LIMIT, retry_after="60"), times=1)
        assert told(await relay.failure()) == (429, "SESSION_LIMIT")
        assert relay.paused_for == 0
        await relay.request_token()

    async def test_V1_a_hint_that_little_is_left_is_believed(self, relay: Relay) -> None:
        """X-RateLimit-Remaining below our own count: the budget shrinks to it."""
        await until(lambda: relay.pacer.remaining == 100, "a whole burst")
        slots = relay.pacer._slots
        slots._limit = msgspec.structs.replace(slots._limit, interval=60_000_000)
        headers = {"X-RateLimit-Remaining": "3"}
        relay.vendor.fail(faults.error(Refusal.UNPROCESSABLE, headers=headers))
        corrected: list[int] = []
        original = relay.pacer.sync_remaining

        async def sync_remaining(remaining: int) -> None:
            await original(remaining)
            corrected.append(remaining)

        relay.pacer.sync_remaining = sync_remaining  # type: ignore[method-assign]
        await relay.failure()
        assert corrected == [3]
        assert relay.pacer.remaining <= 3


class TestRetriesAndBreaker:
    async def test_V7_a_failing_vendor_is_asked_twice_a_mint_and_soon_not_at_all(
        self, relay: Relay
    ) -> None:
        """Of 1,000 askers one after the other, the first few cost calls, the others none."""
        relay.vendor.fail(faults.error(Refusal.INTERNAL_ERROR))
        outcomes = [told(await relay.failure()) for _ in range(1000)]
        assert relay.calls == MIN_CALLS
        assert outcomes[: MIN_CALLS // 2] == [BROKEN] * (MIN_CALLS // 2)
        assert outcomes[MIN_CALLS // 2 :] == [SHED] * (1000 - MIN_CALLS // 2)
        assert relay.issuer.health.is_open

    async def test_V7_a_second_try_succeeds_unnoticed(self, relay: Relay) -> None:
        """One 5xx, one reset, one refused connection: the caller gets a token."""
        for fault in (faults.error(Refusal.INTERNAL_ERROR), faults.reset(), faults.html()):
            with relay.vendor.fail(fault, times=1):
                await relay.request_token()
        assert relay.calls == 6

    async def test_V7_what_took_long_is_not_tried_again(self) -> None:
        """A time-out has used the caller's patience up."""
        async with relaying(timeout=0.05) as relay:
            relay.vendor.fail(faults.hang())
            await relay.failure()
            assert relay.calls == 1

    async def test_V8_one_probe_under_a_thousand_waiters(self, relay: Relay) -> None:
        """Half-open: one call goes out, all others are told at once, whatever it takes."""
        await _open_health(relay)
        before = relay.calls
        relay.clock.advance(5)
        with relay.vendor.fail(faults.hang()):
            crowd = [relay.begin() for _ in range(1000)]
            await until(lambda: sum(task.done() for task in crowd) == 999, "999 answers")
            await relay.arrived(before + 1)
            errors = [task.exception() for task in crowd if task.done()]
            assert {told(error) for error in errors if isinstance(error, BrokerError)} == {SHED}
            await relay.vendor.refuse_connections()
            await relay.vendor.accept_connections()
            await asyncio.gather(*crowd, return_exceptions=True)
        assert relay.calls == before + 1
        relay.clock.advance(10)
        await relay.request_token()
        await asyncio.gather(*(relay.request_token() for _ in range(50)))

    async def test_V8_a_probe_that_fails_doubles_the_pause(self, relay: Relay) -> None:
        """5, 10, 20, 40, 60, 60 s: in an hour of outage about sixty calls."""
        await _open_health(relay)
        relay.vendor.fail(faults.html())
        before = relay.calls
        for _ in range(3600):
            relay.clock.advance(1)
            await relay.failure()
        assert 55 <= relay.calls - before <= 66

    async def test_V8_a_cancelled_probe_does_not_wedge_the_breaker(self, relay: Relay) -> None:
        """The broker's own timeout takes the probe away: the next caller is the next probe."""
        await _open_health(relay)
        relay.clock.advance(5)
        relay.minter._timeout = 0.05
        with relay.vendor.fail(faults.hang()):
            assert told(await relay.failure()) == LATE
        relay.minter._timeout = 5
        relay.vendor.heal()
        await relay.request_token()
        assert not relay.issuer.health.is_open

    async def test_V8_a_probe_deserted_by_its_callers_still_decides(self, relay: Relay) -> None:
        """Once sent it is finished, and what it learned counts."""
        await _open_health(relay)
        relay.vendor.heal()
        relay.clock.advance(5)
        with relay.vendor.fail(faults.slow(0.05)):
            before = relay.calls
            probe = relay.begin()
            await relay.arrived(before + 1)
            probe.cancel()
            await relay.settled()
        assert not relay.issuer.health.is_open


class TestOverHttp:
    """The same through the whole broker: status, envelope, headers and metrics on the wire."""

    async def test_V5_every_class_of_failure_on_the_wire(self, vendor: FakeVendor) -> None:
        """The envelope with the right status; Retry-After where there is a time to tell."""
        throttled = faults.error(Refusal.RATE_LIMITED, retry_after="120")
        rows: list[tuple[Fault, int, str]] = [
            (faults.error(Refusal.NOT_FOUND), 404, "NOT_FOUND"),
            (faults.error(Refusal.SESSION_LIMIT), 429, "SESSION_LIMIT"),
            (faults.error(Refusal.UNPROCESSABLE), 422, "VALIDATION_ERROR"),
            (faults.html(), 502, "UPSTREAM_UNAVAILABLE"),
            (faults.edge_denied(), 502, "UPSTREAM_UNAVAILABLE"),
            (faults.hang(), 504, "UPSTREAM_TIMEOUT"),
            (throttled, 503, "SERVICE_UNAVAILABLE"),
        ]
        tree = {"issuer": {"upstream": {"timeout": "300ms"}}}
        async with broker_before(vendor, tree) as house:
            known = visitor()
            first = await house.request_token(known)
            for number, (fault, status, code) in enumerate(rows):
                with vendor.fail(fault):
                    reply = await house.request_token(agent=f"agent-{number}")
                    again = await house.request_token(known)
                assert (reply.status, reply.code) == (status, code)
                assert ("Retry-After" in reply.headers) == (status == 503)
                assert reply.headers["Cache-Control"] == "no-store"
                assert reply.headers["X-Request-Id"]
                assert again.reused
                assert again.body == first.body
            assert 120 <= reply.retry_after <= 133  # the last one's, with its jitter
            metrics = await house.scrape()
        expected = {
            'broker_upstream_requests_total{status="200"}': 1,
            'broker_upstream_requests_total{status="404"}': 1,
            'broker_upstream_requests_total{status="429"}': 2,
            'broker_upstream_requests_total{status="422"}': 1,
            'broker_upstream_requests_total{status="502"}': 2,
            'broker_upstream_requests_total{status="403"}': 1,
            'broker_upstream_requests_total{status="none"}': 1,
            'broker_upstream_errors_total{reason="refused"}': 3,
            'broker_upstream_errors_total{reason="status_5xx"}': 2,
            'broker_upstream_errors_total{reason="edge_403"}': 1,
            'broker_upstream_errors_total{reason="timeout"}': 1,
            'broker_upstream_errors_total{reason="rate_limited"}': 1,
            'broker_rejections_total{limit="budget"}': 1,
            'broker_requests_total{outcome="minted"}': 1,
            'broker_requests_total{outcome="reused"}': len(rows),
            'broker_requests_total{outcome="failed"}': len(rows) - 1,
            'broker_requests_total{outcome="shed"}': 1,
        }
        assert {name: metrics[name] for name in expected} == expected

    async def test_M3_every_series_is_there_before_the_first_call(self, house: House) -> None:
        """At 0: an alert on a rate must not miss the first failure."""
        from broker.telemetry.labels import Reason

        metrics = await house.scrape()
        for reason in Reason:
            assert metrics[f'broker_upstream_errors_total{{reason="{reason.value}"}}'] == 0
        for breaker in ("credentials", "health"):
            assert metrics[f'broker_breaker_open{{breaker="{breaker}"}}'] == 0
        statuses = [name for name in metrics if name.startswith("broker_upstream_requests_total")]
        assert len(statuses) == 16
        assert sum(metrics[name] for name in statuses) == 0

    async def test_who_we_are_and_which_request_this_is(self, house: House) -> None:
        """User-Agent, request id and a well-formed traceparent reach the vendor; others do not."""
        good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        await house.request_token(headers={"X-Request-Id": "abc.1", "traceparent": good})
        await house.request_token(headers={"X-Request-Id": "b@d", "traceparent": "not one"})
        first, second = house.vendor.journal.calls
        assert (first.user_agent, first.request_id, first.traceparent) == (
            USER_AGENT,
            "abc.1",
            good,
        )
        assert second.traceparent is None
        assert second.request_id not in (None, "b@d")


async def _open_health(relay: Relay) -> None:
    relay.vendor.fail(faults.error(Refusal.INTERNAL_ERROR))
    for _ in range(MIN_CALLS // 2):
        await relay.failure()
    assert relay.issuer.health.is_open
    relay.vendor.heal()


async def _plain_answer(relay: Relay) -> bytes:
    """What the vendor sends for one mint."""
    seen: list[bytes] = []

    def look(answer: faults.Answer) -> faults.Answer:
        seen.append(answer.body)
        return answer

    with relay.vendor.fail(Fault(name="look", edit=look)):
        await relay.request_token()
    return seen[0]


def _self_signed() -> ssl.SSLContext:
    """Make a server's context with a certificate for 127.0.0.1 that nobody has signed."""
    import ipaddress
    import tempfile
    from pathlib import Path

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "vendor")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "server.pem")
        path.write_bytes(
            certificate.public_bytes(pem)
            + key.private_bytes(
                pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
    return context


async def test_M4_a_refusal_from_memory_says_so(relay: Relay) -> None:
    """The log counts those: anybody can repeat them, and no call bounds their number."""
    relay.vendor.fail(faults.error(Refusal.NOT_FOUND))
    remembered = []
    for _ in range(2):
        with pytest.raises(BrokerError) as refused:
            await relay.request_token()
        remembered.append(refused.value.remembered)
    assert remembered == [False, True]
    assert relay.calls == 1
