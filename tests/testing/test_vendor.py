"""The fake vendor while nothing is wrong with it: over real HTTP, on loopback."""

import asyncio
import datetime as dt
import hashlib
import io
import ipaddress
import logging
import socket
import ssl
from email.utils import parsedate_to_datetime

import aiohttp
import jwt
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from broker.model import Secret
from broker.testing.vendor import faults
from broker.testing.vendor.mint import visitor_mark
from broker.testing.vendor.replies import Refusal, Shape
from broker.testing.vendor.settings import Allowance, VendorSettings
from broker.testing.vendor.vendor import FakeVendor, serve_forever

AGENT = "A78WKV4515"


def change(vendor: FakeVendor, **changes: object) -> None:
    vendor.settings = msgspec.structs.replace(vendor.settings, **changes)


class TestAnswer:
    @pytest.mark.parametrize("model", [None, "m2"])
    @pytest.mark.parametrize("shape", Shape)
    async def test_has_the_shape_that_was_set(self, vendor, caller, shape, model):
        """Each generation's body, whole, with and without a model in the request."""
        change(vendor, shape=shape, models=("m1", "m2"))
        reply = await caller.mint(model=model)
        token, session = reply.token, reply.session
        new = {"status": "success", "status_code": 200}
        models = {"supported_models": ["m1", "m2"]}
        asked = {} if model is None else {"model": model}
        assert reply.status == 200
        assert reply.headers["Content-Type"] == "application/json"
        assert (
            reply.json
            == {
                Shape.SESSION_ID: {
                    "success": True,
                    "data": {"token": token, "session_id": session},
                },
                Shape.SID: {"success": True, "data": {"token": token, "sid": session}},
                Shape.STATUS: {**new, "data": {"token": token, "sid": session}},
                Shape.MODELS: {**new, "data": {"token": token, "sid": session, **models, **asked}},
                Shape.NEWEST: {
                    **new,
                    "data": {"token": token, "sid": session, **models, "model": model or "m1"},
                },
            }[shape]
        )

    async def test_names_some_model_where_none_is_known(self, vendor, caller):
        """A vendor without a list takes every model and echoes it."""
        data = (await caller.mint(model="any")).json["data"]
        assert (data["supported_models"], data["model"]) == (["any"], "any")
        assert (await caller.mint()).json["data"]["model"] == "fake-model"

    async def test_token_is_a_jwt_of_the_set_lifetime(self, vendor, caller):
        """HS256, exp - iat as configured, the session and the request among the claims."""
        reply = await caller.mint(model="m")
        claims = vendor.claims_of(reply.token)
        assert jwt.get_unverified_header(reply.token)["alg"] == "HS256"
        assert claims["exp"] - claims["iat"] == 3600
        assert (claims["sid"], claims["agent_id"], claims["model"]) == (reply.session, AGENT, "m")
        change(vendor, lifetime=60)
        claims = vendor.claims_of((await caller.mint()).token)
        assert claims["exp"] - claims["iat"] == 60

    async def test_session_names_the_visitor_and_is_new_each_time(self, vendor, caller):
        """A token that crossed over to another visitor can be told by its session id."""
        first, second = await caller.mint(fingerprint="a"), await caller.mint(fingerprint="a")
        other = await caller.mint(fingerprint="b")
        assert first.session != second.session
        assert first.session.startswith(visitor_mark(AGENT, "a"))
        assert second.session.startswith(visitor_mark(AGENT, "a"))
        assert other.session.startswith(visitor_mark(AGENT, "b"))
        assert not other.session.startswith(visitor_mark(AGENT, "a"))

    def test_marks_differ_at_every_boundary(self):
        """Neither parts that run into each other nor an absent model share a mark."""
        requests = [
            ("ab", "c"),
            ("a", "bc"),
            ("a", "b", "c"),
            ("a", "b", ""),
            ("a", "b"),
            ("A", "b"),
        ]
        assert len({visitor_mark(*request) for request in requests}) == len(requests)

    async def test_carries_the_vendors_headers(self, vendor, caller, ticks):
        """Date, request id and rate-limit headers; the id differs from answer to answer."""
        first, second = await caller.mint(), await caller.mint()
        assert first.headers["X-Request-Id"] != second.headers["X-Request-Id"]
        names = ("X-RateLimit-Limit", "X-RateLimit-Remaining")
        assert [first.headers[name] for name in names] == ["120", "119"]
        assert [second.headers[name] for name in names] == ["120", "118"]
        now = parsedate_to_datetime(second.headers["Date"]).timestamp()
        assert int(second.headers["X-RateLimit-Reset"]) - now in (1, 2)
        change(vendor, rate_headers=False)
        assert not [name for name in (await caller.mint()).headers if name.startswith("X-Rate")]

    async def test_clock_may_be_skewed(self, vendor, caller):
        """The vendor's clock shows in Date, iat, exp and the reset time alike; lifetimes stay."""
        before = await caller.mint()
        change(vendor, skew=-300.0)
        after = await caller.mint()
        date = [parsedate_to_datetime(it.headers["Date"]).timestamp() for it in (before, after)]
        claims = [vendor.claims_of(it.token) for it in (before, after)]
        resets = [int(it.headers["X-RateLimit-Reset"]) for it in (before, after)]
        assert date[0] - date[1] == 300
        assert claims[0]["iat"] - claims[1]["iat"] == 300
        assert claims[0]["exp"] - claims[1]["exp"] == 300
        assert resets[0] - resets[1] in (299, 300)

    async def test_date_moves_with_the_monotonic_clock(self, vendor, caller, ticks):
        """An injected clock moves the date as well, so tokens age with it."""
        first = vendor.claims_of((await caller.mint()).token)
        ticks.now += 1800
        second = vendor.claims_of((await caller.mint()).token)
        assert second["iat"] - first["iat"] == 1800

    async def test_latency_is_drawn_from_the_seed(self, new_caller):
        """Equal seeds draw equal latencies and session ids; a fixed latency is waited out."""

        async def draws(seed: int) -> tuple[list[float], str]:
            drawn: list[float] = []

            def latency(random):
                drawn.append(random.random() / 1000)
                return drawn[-1]

            settings = VendorSettings(latency=latency)
            async with FakeVendor(settings, seed=seed) as vendor, new_caller(vendor) as caller:
                sessions = [(await caller.mint()).session for _ in range(3)]
            return drawn, sessions[-1]

        assert await draws(1) == await draws(1)
        assert await draws(1) != await draws(2)
        settings = VendorSettings(latency=0.02)
        loop = asyncio.get_running_loop()
        async with FakeVendor(settings) as vendor, new_caller(vendor) as caller:
            started = loop.time()
            await caller.mint()
            assert loop.time() - started >= 0.02


class TestKeys:
    async def test_only_known_secrets_mint(self, vendor, caller):
        """No secret and a wrong one have codes of their own, and mint nothing."""
        assert (await caller.mint()).status == 200
        missing = await caller.mint(secret=None)
        wrong = await caller.mint(secret="wrong")
        assert (missing.status, missing.code) == (401, "MISSING_AUTH")
        assert (wrong.status, wrong.code) == (401, "UNAUTHORIZED")

    async def test_secrets_come_and_go_at_run_time(self, vendor, caller):
        """A revoked secret is refused as suspended, one that never was as unknown."""
        second = vendor.add_secret("second")
        assert (await caller.mint(secret="second")).status == 200
        vendor.revoke_secret(second)
        revoked = await caller.mint(secret="second")
        assert (revoked.status, revoked.code) == (403, "RUNTIME_SUSPENDED")
        vendor.revoke_secret("second", Refusal.UNAUTHORIZED)
        assert (await caller.mint(secret="second")).code == "UNAUTHORIZED"
        vendor.revoke_secret("second", None)
        assert (await caller.mint(secret="second")).code == "UNAUTHORIZED"
        vendor.add_secret("second")
        assert (await caller.mint(secret="second")).status == 200
        assert (await caller.mint()).status == 200

    async def test_secrets_are_generated_or_given(self, new_caller):
        """Two vendors never share a secret by default; given ones are the only ones."""
        assert FakeVendor().secret != FakeVendor().secret
        given = FakeVendor(secrets=["one", "two"])
        assert given.secret == Secret("one")
        async with given, new_caller(given) as caller:
            assert (await caller.mint(secret="two")).status == 200

    async def test_validate_tells_good_from_bad(self, vendor, caller):
        """`/v1/validate` answers 200 either way."""
        for secret, valid in ((None, False), ("wrong", False), ("", True)):
            reply = await caller.mint(secret=secret, path="/v1/validate", body=b"")
            assert (reply.status, reply.json) == (200, {"valid": valid})
        vendor.revoke_secret(vendor.secret)
        assert (await caller.mint(path="/v1/validate")).json == {"valid": False}
        assert vendor.journal.calls == []


class TestLimits:
    async def test_an_ip_has_a_bucket_of_120_refilled_continuously(self, vendor, caller, ticks):
        """The burst is the minute's number; the next one is there half a second later."""
        assert [(await caller.mint()).status for _ in range(120)] == [200] * 120
        refused = await caller.mint()
        assert (refused.status, refused.code) == (429, "RATE_LIMITED")
        assert refused.headers["Retry-After"] == "1"
        assert refused.headers["X-RateLimit-Remaining"] == "0"
        ticks.now += 0.499
        assert (await caller.mint()).status == 429
        ticks.now += 0.001
        assert (await caller.mint()).status == 200
        assert (await caller.mint()).status == 429

    async def test_each_ip_has_its_own_bucket_and_the_account_one(self, new_caller, vendor, caller):
        """A second egress IP helps against the first limit only."""
        change(vendor, ip=Allowance(2), account=Allowance(3))
        async with new_caller(vendor, "127.0.0.2") as other:
            own = [(await caller.mint()).status for _ in range(3)]
            others = [(await other.mint()).status for _ in range(2)]
        assert (own, others) == ([200, 200, 429], [200, 429])
        assert {call.remote for call in vendor.journal.calls} == {"127.0.0.1", "127.0.0.2"}

    async def test_limits_can_be_lifted_and_lowered_at_run_time(self, vendor, caller):
        """None means no limit; a lower one holds from the next call on."""
        change(vendor, ip=None)
        assert {(await caller.mint()).status for _ in range(130)} == {200}
        change(vendor, ip=Allowance(1, per=3600))
        replies = [await caller.mint() for _ in range(2)]
        assert [it.status for it in replies] == [200, 429]
        assert replies[1].headers["Retry-After"] == "3600"

    async def test_failed_authentications_run_out(self, vendor, caller, ticks):
        """The 31st of a minute gets 429 instead of 401; a good secret is not concerned."""
        assert [(await caller.mint(secret="x")).status for _ in range(30)] == [401] * 30
        throttled = await caller.mint(secret="x")
        assert (throttled.status, throttled.code) == (429, "RATE_LIMITED")
        assert throttled.headers["Retry-After"] == "2"
        assert (await caller.mint()).status == 200
        ticks.now += 2
        assert [(await caller.mint(secret="x")).status for _ in range(2)] == [401, 429]

    async def test_failed_authentications_may_lock_an_ip_out(self, vendor, caller, ticks):
        """With `lockout` a good secret gets 429 too, until a failure is allowed again."""
        change(vendor, failures=Allowance(1), lockout=True)
        await caller.mint(secret="x")
        assert (await caller.mint()).status == 429
        ticks.now += 60
        assert (await caller.mint()).status == 200

    @pytest.mark.parametrize(("count", "per"), [(0, 60), (-1, 60), (1, 0), (float("nan"), 60)])
    def test_allowances_that_allow_nothing_are_rejected(self, count, per):
        """Such a number is a typing error, not a limit."""
        with pytest.raises(ValueError, match="allowance"):
            Allowance(count, per)


class TestMintRequest:
    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"[]",
            b'"text"',
            b"\xff",
            b"[" * 100_000,
            b"{}",
            b'{"agent_id":"A"}',
            b'{"fingerprint":"f"}',
            b'{"agent_id":"","fingerprint":"f"}',
            b'{"agent_id":"A","fingerprint":""}',
            b'{"agent_id":5,"fingerprint":"f"}',
            b'{"agent_id":"A","fingerprint":null}',
            b'{"agent_id":"A","fingerprint":"f","model":7}',
            b'{"agent_id":"A","fingerprint":"f","model":""}',
            b'{"agent_id":"A","fingerprint":"' + b"f" * 513 + b'"}',
        ],
    )
    async def test_must_be_well_formed(self, vendor, caller, body):
        """Anything but an object with two strings and perhaps a third is a 400."""
        reply = await caller.mint(body=body)
        assert (reply.status, reply.code) == (400, "VALIDATION_ERROR")
        assert vendor.journal.calls[0].problem

    async def test_must_not_be_huge(self, vendor, caller):
        """A body of two megabytes is not kept, and refused."""
        body = io.BytesIO(b'{"agent_id":"A","fingerprint":"f"}' + b" " * 2_000_000)
        assert (await caller.mint(body=body)).code == "VALIDATION_ERROR"

    async def test_must_name_what_exists(self, vendor, caller):
        """Unknown agents, unknown models, and models refused for one agent."""
        change(
            vendor,
            unknown_agents=frozenset({"GONE"}),
            models=("m1", "m2"),
            model_errors={
                (AGENT, "m2"): Refusal.MODEL_NOT_GENERATED,
                ("B", "m1"): Refusal.PLAN_REQUIRED,
            },
        )
        cases = {
            ("GONE", None): (404, "NOT_FOUND"),
            (AGENT, "m3"): (400, "VALIDATION_ERROR"),
            (AGENT, "m2"): (409, "MODEL_NOT_GENERATED"),
            ("B", "m1"): (403, "PLAN_REQUIRED"),
        }
        for (agent, model), expected in cases.items():
            reply = await caller.mint(agent, model=model)
            assert (reply.status, reply.code) == expected
        assert (await caller.mint(model="m1")).status == 200
        assert (await caller.mint("B", model="m2")).status == 200

    async def test_must_go_to_a_known_route(self, vendor, caller):
        """Other paths are 404, other methods 405 with Allow."""
        assert (await caller.mint(path="/v1/other")).code == "NOT_FOUND"
        async with caller.http.get(vendor.url + "/v1/embed-tokens/request") as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")


class TestJournal:
    async def test_records_every_arrival(self, vendor, caller, ticks):
        """Who came when, asking for what, with what headers, and what it was told."""
        headers = {"User-Agent": "ua/1", "traceparent": "00-a-b-01", "X-Request-Id": "r1"}
        await caller.mint(model="m", headers=headers)
        ticks.now += 5
        await caller.mint(secret="wrong")
        await caller.mint(path="/v1/validate")
        first, second = vendor.journal.calls
        secret = hashlib.sha256(vendor.secret.reveal().encode()).hexdigest()
        assert first.mono == 1000.0
        assert second.mono == 1005.0
        assert second.wall - first.wall == pytest.approx(5)
        assert (first.agent, first.fingerprint, first.model) == (AGENT, "f1", "m")
        assert (first.user_agent, first.traceparent, first.request_id) == (
            "ua/1",
            "00-a-b-01",
            "r1",
        )
        assert (first.secret, first.remote, first.status) == (secret, "127.0.0.1", 200)
        assert (second.secret, second.status) == (hashlib.sha256(b"wrong").hexdigest(), 401)
        assert [call.path for call in vendor.journal.records][2] == "/v1/validate"
        assert vendor.journal.statuses() == {200: 1, 401: 1}

    async def test_can_be_waited_for(self, vendor, caller):
        """`arrived` returns once so many mints were read, whether or not they are answered."""
        vendor.fail(faults.hang())
        requests = [asyncio.create_task(caller.mint(fingerprint=str(n))) for n in range(3)]
        await vendor.journal.arrived(3)
        assert {call.fingerprint for call in vendor.journal.calls} == {"0", "1", "2"}
        assert {call.status for call in vendor.journal.calls} == {None}
        await vendor.close()
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert all(isinstance(it, aiohttp.ServerDisconnectedError) for it in results)


class TestSecrecy:
    async def test_nothing_secret_is_shown(self, vendor, caller, caplog):
        """No secret, token or fingerprint in any log at debug level, nor in any repr."""
        caplog.set_level(logging.DEBUG)
        secret = "canary-secret-0123456789"
        vendor.add_secret(secret)
        vendor.fail(faults.same_token(), fingerprint="canary-fp")
        reply = await caller.mint(fingerprint="canary-fp", secret=secret)
        vendor.fail(faults.body(reply.json), times=1)
        await caller.mint(fingerprint="canary-fp", secret=secret)
        await caller.mint(body=b"canary-fp", secret=secret)
        shown = [repr(it) for it in (vendor, vendor.journal, *vendor.journal.records)]
        shown += [repr(vars(vendor)), repr(vendor.settings), caplog.text]
        for canary in (secret, reply.token, "canary-fp"):
            assert canary not in "".join(shown)

    async def test_unreadable_requests_are_not_logged(self, vendor, caplog):
        """What is not even HTTP is refused without being quoted: a secret may be in it."""
        caplog.set_level(logging.DEBUG)
        host, port = vendor.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST / HTTP/1.1\r\napi-secret: canary\x00\r\n\r\n")
        assert b" 400 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
        assert caplog.text == ""

    async def test_its_own_accidents_are_logged(self, vendor, caller, caplog):
        """A predicate that raises is the test's mistake: 500, and the reason in the log."""
        vendor.fail(faults.hang(), where=lambda call: 1 / 0)
        assert (await caller.mint()).status == 500
        assert "ZeroDivisionError" in caplog.text


class TestLife:
    async def test_close_is_prompt_and_leaves_nothing(self, new_caller):
        """Hanging, dripping, delayed, unread and idle connections end with it; no task is left."""
        loop = asyncio.get_running_loop()
        vendor = FakeVendor(VendorSettings(ip=None))
        await vendor.start()
        before = asyncio.all_tasks()
        async with new_caller(vendor) as caller:
            await caller.mint()
            vendor.fail(faults.hang(), fingerprint="hang")
            vendor.fail(faults.drip(3600), fingerprint="drip")
            vendor.fail(faults.slow(3600), fingerprint="slow")
            vendor.fail(faults.cut(1, hold=True), fingerprint="hold")
            vendor.fail(faults.huge(), fingerprint="huge")
            prints = ("hang", "drip", "slow", "hold")
            requests = [asyncio.create_task(caller.mint(fingerprint=it)) for it in prints]
            async with caller.request_token(fingerprint="huge") as unread:
                await vendor.journal.arrived(6)
                started = loop.time()
                await vendor.close()
                assert loop.time() - started < 5
                assert unread.status == 200
            results = await asyncio.gather(*requests, return_exceptions=True)
            assert all(isinstance(it, aiohttp.ClientError) for it in results)
        assert asyncio.all_tasks() <= before
        await vendor.close()

    async def test_a_client_that_goes_away_leaves_nothing(self, new_caller, vendor):
        """The handler of a call whose connection is gone ends at once."""
        vendor.fail(faults.hang())
        before = asyncio.all_tasks()
        async with new_caller(vendor) as caller:
            request = asyncio.create_task(caller.mint())
            await vendor.journal.arrived(1)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
        for _ in range(10):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() <= before

    async def test_starts_again_on_its_port(self, vendor, caller):
        """Closed and started, it has the same URL, keys and journal."""
        url = vendor.url
        await caller.mint()
        await vendor.close()
        with pytest.raises(aiohttp.ClientConnectorError):
            await caller.mint()
        await vendor.start()
        await vendor.start()
        assert vendor.url == url
        assert (await caller.mint()).status == 200
        assert len(vendor.journal.calls) == 2

    async def test_a_taken_port_is_an_error(self, vendor):
        """Two vendors cannot share an address; the second leaves no socket behind."""
        port = int(vendor.url.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"):
            await FakeVendor(port=port).start()

    @pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
    async def test_speaks_ipv6(self):
        """An IPv6 host is bracketed in the URL."""
        async with FakeVendor(host="::1") as vendor, aiohttp.ClientSession() as http:
            assert vendor.url.startswith("http://[::1]:")
            async with http.post(vendor.url + "/v1/validate") as response:
                assert await response.json() == {"valid": False}
            assert vendor.journal.records[0].remote == "::1"

    async def test_speaks_tls(self, tmp_path):
        """With a certificate the URL is https; plain HTTP does not get through."""
        server, client = certificate(tmp_path / "cert.pem")
        async with FakeVendor(tls=server) as vendor, aiohttp.ClientSession() as http:
            assert vendor.url.startswith("https://127.0.0.1:")
            async with http.post(vendor.url + "/v1/validate", ssl=client) as response:
                assert response.status == 200
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await http.post(vendor.url + "/v1/validate")
            vendor.fail(faults.reset(), path=None)
            with pytest.raises(aiohttp.ClientError):
                await http.post(vendor.url + "/v1/validate", ssl=client)

    async def test_serves_for_ever_until_cancelled(self, new_caller):
        """The command's part: a vendor on an address, announced when it answers."""
        started: asyncio.Future[FakeVendor] = asyncio.get_running_loop().create_future()
        settings = VendorSettings(lifetime=5)
        serving = asyncio.create_task(
            serve_forever("127.0.0.1", 0, started=started.set_result, settings=settings)
        )
        vendor = await started
        async with new_caller(vendor) as caller:
            assert (await caller.mint()).status == 200
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving


def certificate(path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Make a certificate for 127.0.0.1; return a server's and a client's context."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fake vendor")])
    now = dt.datetime.now(dt.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=path)
