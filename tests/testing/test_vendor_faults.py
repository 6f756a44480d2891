"""Every way in which the fake vendor fails, seen by a real client over loopback."""

import asyncio
import errno
import socket
import sys

import aiohttp
import jwt
import msgspec
import pytest

from broker.testing.vendor import faults
from broker.testing.vendor import mint as mint_module
from broker.testing.vendor.mint import visitor_mark
from broker.testing.vendor.replies import Answer, Refusal

AGENT = "A78WKV4515"
LATER = 0.02
"""Seconds after which a client of these tests takes silence for silence."""


async def silent(awaitable) -> bool:
    """Whether nothing comes of it for a while."""
    try:
        await asyncio.wait_for(awaitable, LATER)
    except TimeoutError:
        return True
    return False


class TestRefusals:
    @pytest.mark.parametrize("what", Refusal)
    async def test_have_the_envelope(self, vendor, caller, what):
        """The status on the wire and both numbers in the body agree, for every documented code."""
        vendor.fail(faults.error(what))
        reply = await caller.mint()
        status, code = what.value
        message = reply.json["error"]["message"]
        assert reply.status == status
        assert reply.json == {
            "error": {"code": code, "message": message, "httpStatus": status},
            "status": "error",
            "status_code": status,
        }
        assert vendor.journal.calls[0].status == status
        assert vendor.journal.calls[0].fault == f"{status} {code}"

    async def test_may_have_codes_that_nobody_documented(self, vendor, caller):
        """A status and a code can be given instead, and headers."""
        vendor.fail(faults.error((418, "TEAPOT"), headers={"X-RateLimit-Remaining": "-1"}))
        reply = await caller.mint()
        assert (reply.status, reply.code) == (418, "TEAPOT")
        assert reply.headers["X-RateLimit-Remaining"] == "-1"

    @pytest.mark.parametrize(
        "value", ["7", "1.5", "-1", "99999999999", "soon", "", "Wed, 21 Oct 2026 07:28:00 GMT"]
    )
    async def test_carry_any_retry_after(self, vendor, caller, value):
        """Retry-After goes out as it was given, whatever it means."""
        vendor.fail(faults.error(Refusal.RATE_LIMITED, retry_after=value))
        assert (await caller.mint()).headers.getall("Retry-After") == [value]

    async def test_carry_retry_after_twice_or_not_at_all(self, vendor, caller):
        """Two headers of the name, in order; none unless asked for."""
        vendor.fail(faults.error(Refusal.RATE_LIMITED, retry_after=["3", "9"]), times=1)
        vendor.fail(faults.error(Refusal.RATE_LIMITED))
        assert (await caller.mint()).headers.getall("Retry-After") == ["3", "9"]
        assert "Retry-After" not in (await caller.mint()).headers

    async def test_hide_behind_a_200(self, vendor, caller):
        """The real status is in the body only."""
        vendor.fail(faults.hidden_error(Refusal.UNAUTHORIZED))
        reply = await caller.mint()
        assert (reply.status, reply.json["status_code"], reply.code) == (200, 401, "UNAUTHORIZED")

    @pytest.mark.parametrize("status", [200, 401])
    async def test_may_be_bare(self, vendor, caller, status):
        """No envelope, only the word."""
        vendor.fail(faults.bare_unauthorized(status))
        reply = await caller.mint()
        assert (reply.status, reply.body) == (status, b'{"error":"Unauthorized"}')

    @pytest.mark.parametrize("status", [502, 504])
    async def test_may_be_pages_of_the_cdn(self, vendor, caller, status):
        """HTML under a gateway's status."""
        vendor.fail(faults.html(status))
        reply = await caller.mint()
        assert reply.status == status
        assert reply.headers["Content-Type"].startswith("text/html")
        assert reply.body.startswith(b"<!DOCTYPE html>")

    async def test_may_be_the_edges(self, vendor, caller):
        """A text 403 for a User-Agent that the edge dislikes, and only for that one."""
        vendor.fail(faults.edge_denied(), where=lambda call: "curl" in (call.user_agent or ""))
        denied = await caller.mint(headers={"User-Agent": "curl/8"})
        assert (denied.status, denied.body) == (403, b"error code: 1010")
        assert denied.headers["Content-Type"].startswith("text/plain")
        assert (await caller.mint()).status == 200

    @pytest.mark.parametrize("status", [302, 307])
    async def test_may_be_redirects(self, vendor, caller, status):
        """To any URL."""
        vendor.fail(faults.redirect("http://127.0.0.2:1/elsewhere", status))
        reply = await caller.mint()
        assert (reply.status, reply.body) == (status, b"")
        assert reply.headers["Location"] == "http://127.0.0.2:1/elsewhere"


class TestBodies:
    @pytest.mark.parametrize("fault", faults.tokenless(), ids=lambda fault: fault.name)
    async def test_without_a_token_are_200s_all_the_same(self, vendor, caller, fault):
        """Each of them answers 200, and `data.token` is no text that could be a token."""
        vendor.fail(fault)
        reply = await caller.mint()
        assert reply.status == 200
        try:
            token = msgspec.json.decode(reply.body, type=dict)["data"]["token"]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
            token = None
        assert not (isinstance(token, str) and token)
        assert vendor.journal.calls[0].fault == fault.name

    def test_without_a_token_have_names_of_their_own(self):
        """So a failing test says which one it was."""
        names = [fault.name for fault in faults.tokenless()]
        assert len(set(names)) == len(names)

    async def test_can_be_anything(self, vendor, caller):
        """Any bytes or JSON, any status, any type."""
        vendor.fail(faults.body({"data": []}), times=1)
        vendor.fail(faults.body(b"\x00\xff", 206, "application/octet-stream"))
        first, second = await caller.mint(), await caller.mint()
        assert (first.status, first.json) == (200, {"data": []})
        assert (second.status, second.body) == (206, b"\x00\xff")

    async def test_can_be_empty(self, vendor, caller):
        """Content-Length 0 under the status that the vendor would have given."""
        vendor.fail(faults.empty())
        good, bad = await caller.mint(), await caller.mint(secret="wrong")
        assert (good.status, good.headers["Content-Length"], good.body) == (200, "0", b"")
        assert (bad.status, bad.body) == (401, b"")

    async def test_can_be_truncated(self, vendor, caller):
        """HTTP is content; the JSON ends in the middle."""
        vendor.fail(faults.truncated())
        reply = await caller.mint()
        assert reply.body.startswith(b'{"status":"success"')
        assert int(reply.headers["Content-Length"]) == len(reply.body)
        with pytest.raises(msgspec.DecodeError):
            reply.json  # noqa: B018 - the attribute decodes

    async def test_can_be_huge(self, vendor, caller):
        """10 MB, and a good token for whoever reads to the end."""
        vendor.fail(faults.huge())
        reply = await caller.mint()
        assert len(reply.body) > 10 * faults.MEBIBYTE
        assert reply.body.startswith(b"    ")
        assert vendor.claims_of(reply.token)

    async def test_can_be_a_gzip_bomb(self, vendor, caller):
        """Little on the wire, much in memory, and a good token at its end."""
        vendor.fail(faults.gzip_bomb(8 * faults.MEBIBYTE + 5))
        first, second = await caller.mint(), await caller.mint()
        assert first.headers["Content-Encoding"] == "gzip"
        assert int(first.headers["Content-Length"]) < 20_000
        assert len(first.body) > 8 * faults.MEBIBYTE + 5
        assert first.session != second.session
        assert vendor.claims_of(second.token)


class TestDelivery:
    async def test_hangs_after_the_request_was_read(self, vendor, caller):
        """Not even a status line; the journal has the call, with what it asked for."""
        vendor.fail(faults.hang())
        assert await silent(caller.mint())
        (call,) = vendor.journal.calls
        assert (call.agent, call.fault, call.status) == (AGENT, "hang", None)

    async def test_is_late(self, vendor, caller):
        """A slow answer is a good one."""
        vendor.fail(faults.slow(LATER))
        started = asyncio.get_running_loop().time()
        assert (await caller.mint()).status == 200
        assert asyncio.get_running_loop().time() - started >= LATER

    async def test_resets_before_the_answer(self, vendor, caller):
        """A real RST, not an end of stream."""
        vendor.fail(faults.reset())
        with pytest.raises(aiohttp.ClientOSError) as caught:
            await caller.mint()
        assert caught.value.errno == errno.ECONNRESET
        assert vendor.journal.calls[0].status is None

    async def test_resets_in_mid_body(self, vendor, caller):
        """Status, headers and the first bytes arrive; then the RST."""
        vendor.fail(faults.reset(after=10))
        async with caller.request_token() as response:
            assert response.status == 200
            assert await response.content.read(10) == b'{"status":'
            with pytest.raises(aiohttp.ClientPayloadError, match="ConnectionResetError"):
                await response.read()
        assert vendor.journal.calls[0].status == 200

    @pytest.mark.parametrize("after", [0, 10])
    async def test_ends_in_mid_body(self, vendor, caller, after):
        """The connection is closed in good order, short of its Content-Length."""
        vendor.fail(faults.cut(after))
        async with caller.request_token() as response:
            assert response.content_length > 100
            if after:
                assert await response.content.read(after) == b'{"status":'
            with pytest.raises(aiohttp.ClientPayloadError) as caught:
                await response.read()
        assert "ConnectionReset" not in str(caught.value)

    async def test_stalls_in_mid_body(self, vendor, caller):
        """Some bytes, and then nothing on an open connection."""
        vendor.fail(faults.cut(10, hold=True))
        async with caller.request_token() as response:
            assert await response.content.read(10) == b'{"status":'
            assert await silent(response.content.read(1))

    async def test_promises_more_than_there_is(self, vendor, caller):
        """The whole body under a Content-Length that is too long."""
        vendor.fail(faults.overlong(100), times=1)
        vendor.fail(faults.overlong(100, hold=True))
        async with caller.request_token() as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        async with caller.request_token() as response:
            whole = await response.content.readexactly(response.content_length - 100)
            assert vendor.claims_of(msgspec.json.decode(whole)["data"]["token"])
            assert await silent(response.content.read(1))

    async def test_drips(self, vendor, caller):
        """One byte, and the next only after the interval; in the end it is a good answer."""
        with vendor.fail(faults.drip(interval=3600)):
            async with caller.request_token() as response:
                assert await response.content.read(100) == b"{"
                assert await silent(response.content.read(1))
        vendor.fail(faults.drip(interval=0, chunk=50))
        assert vendor.claims_of((await caller.mint()).token)

    async def test_spoils_one_connection_only(self, vendor, caller):
        """After each of them the next call succeeds."""
        for fault in (faults.reset(), faults.reset(5), faults.cut(5), faults.overlong()):
            vendor.fail(fault, times=1)
            with pytest.raises(aiohttp.ClientError):
                await caller.mint()
            assert (await caller.mint()).status == 200


class TestDoor:
    async def test_refuses_connections_and_reopens_on_its_port(self, vendor, caller):
        """Pooled connections are dropped too; nothing is recorded meanwhile."""
        url = vendor.url
        assert (await caller.mint()).status == 200
        await vendor.refuse_connections()
        await vendor.refuse_connections()
        for _ in range(2):
            with pytest.raises(aiohttp.ClientConnectorError) as caught:
                await caller.mint()
            assert caught.value.os_error.errno == errno.ECONNREFUSED
        await vendor.accept_connections()
        assert vendor.url == url
        assert (await caller.mint()).status == 200
        assert len(vendor.journal) == 2

    async def test_ignores_connections(self, vendor, caller):
        """Whoever connects waits; the vendor never learns of it, and recovers on its port."""
        assert (await caller.mint()).status == 200
        await vendor.ignore_connections()
        await vendor.ignore_connections()
        assert await silent(caller.mint())
        assert len(vendor.journal) == 1
        await vendor.accept_connections()
        await vendor.accept_connections()
        assert (await caller.mint()).status == 200

    @pytest.mark.skipif(sys.platform != "linux", reason="other kernels complete the handshake")
    async def test_ignored_connections_do_not_even_connect(self, vendor):
        """The backlog is full: the handshake of TCP itself stays unanswered."""
        await vendor.ignore_connections()
        host, port = vendor.url.removeprefix("http://").split(":")
        with socket.socket() as client:
            client.setblocking(False)
            connecting = asyncio.get_running_loop().sock_connect(client, (host, int(port)))
            assert await silent(connecting)

    async def test_goes_from_any_state_to_any_other(self, vendor, caller):
        """Refusing, ignoring and closed; each can follow each."""
        await vendor.ignore_connections()
        await vendor.refuse_connections()
        with pytest.raises(aiohttp.ClientConnectorError):
            await caller.mint()
        await vendor.ignore_connections()
        assert await silent(caller.mint())
        await vendor.close()
        with pytest.raises(aiohttp.ClientConnectorError):
            await caller.mint()
        await vendor.start()
        assert (await caller.mint()).status == 200
        await vendor.refuse_connections()


class TestTokens:
    async def test_may_be_the_same_again(self, vendor, caller):
        """While it is set, a visitor gets the token it had; a new visitor a new one."""
        before = await caller.mint(fingerprint="a")
        with vendor.fail(faults.same_token()):
            again = await caller.mint(fingerprint="a")
            other = await caller.mint(fingerprint="b")
            other_again = await caller.mint(fingerprint="b")
        assert (again.token, again.session) == (before.token, before.session)
        assert other.session.startswith(visitor_mark(AGENT, "b"))
        assert other_again.token == other.token
        assert (await caller.mint(fingerprint="a")).token != before.token

    async def test_are_remembered_of_those_who_came_last(self, vendor, caller, monkeypatch):
        """Of more visitors than it remembers those go first that were unseen longest."""
        monkeypatch.setattr(mint_module, "REMEMBERED", 2)
        with vendor.fail(faults.same_token()):
            first = {each: (await caller.mint(fingerprint=each)).token for each in "ab"}
            assert (await caller.mint(fingerprint="a")).token == first["a"]
            await caller.mint(fingerprint="c")
            assert (await caller.mint(fingerprint="a")).token == first["a"]
            assert (await caller.mint(fingerprint="b")).token != first["b"]

    @pytest.mark.parametrize(
        "exp", [253402300799, -1, 0, 1.5, "tomorrow", True, None, [1], float("inf")]
    )
    async def test_may_carry_any_claim(self, vendor, caller, exp):
        """A claim goes into the token as it was given, whatever its type."""
        vendor.fail(faults.claims(exp=exp))
        token = (await caller.mint()).token
        claims = jwt.decode(token, options={"verify_signature": False})
        assert claims["exp"] == exp
        assert type(claims["exp"]) is type(exp)

    async def test_may_lack_claims(self, vendor, caller):
        """`exp` missing, others changed at the same time."""
        vendor.fail(faults.claims(without=["exp"], iat=5))
        claims = vendor.claims_of((await caller.mint()).token)
        assert "exp" not in claims
        assert claims["iat"] == 5

    @pytest.mark.parametrize("seconds", [0, 1, -60])
    async def test_may_live_for_any_time(self, vendor, caller, seconds):
        """0 and 1 second, and `exp` before `iat`."""
        vendor.fail(faults.lifetime(seconds))
        claims = vendor.claims_of((await caller.mint()).token)
        assert claims["exp"] - claims["iat"] == seconds


class TestAim:
    async def test_all_calls_the_next_few_or_until_stopped(self, vendor, caller):
        """`times` counts calls that were met; `stop`, the block's end and `heal` end a fault."""
        few = vendor.fail(faults.error(Refusal.INTERNAL_ERROR), times=2)
        assert [(await caller.mint()).status for _ in range(3)] == [500, 500, 200]
        assert (few.left, few.met) == (0, 2)
        every = vendor.fail(faults.error(Refusal.INTERNAL_ERROR))
        assert [(await caller.mint()).status for _ in range(3)] == [500] * 3
        every.stop()
        assert (await caller.mint()).status == 200
        with vendor.fail(faults.html()):
            assert (await caller.mint()).status == 502
        assert (await caller.mint()).status == 200
        vendor.fail(faults.html())
        vendor.fail(faults.edge_denied())
        vendor.heal()
        assert (await caller.mint()).status == 200

    async def test_one_agent_visitor_model_or_whatever(self, vendor, caller):
        """Every condition must hold."""
        vendor.fail(faults.error(Refusal.NOT_FOUND), agent="B")
        vendor.fail(faults.error(Refusal.GONE), agent="C", fingerprint="x", model="m")
        vendor.fail(faults.html(), where=lambda call: call.fingerprint == "y")
        assert (await caller.mint()).status == 200
        assert (await caller.mint("B")).status == 404
        assert (await caller.mint("C", "x", "m")).status == 410
        assert (await caller.mint("C", "x")).status == 200
        assert (await caller.mint("C", "z", "m")).status == 200
        assert (await caller.mint(fingerprint="y")).status == 502

    async def test_one_after_the_other(self, vendor, caller):
        """What was set first is met first, so a sequence is a row of `times=1`."""
        for what in (Refusal.INTERNAL_ERROR, Refusal.RATE_LIMITED):
            vendor.fail(faults.error(what), times=1)
        assert [(await caller.mint()).status for _ in range(3)] == [500, 429, 200]

    async def test_one_route(self, vendor, caller):
        """Mints by default; another path or, with None, all of them."""
        vendor.fail(faults.html(), path="/v1/validate")
        assert (await caller.mint()).status == 200
        assert (await caller.mint(path="/v1/validate")).status == 502
        vendor.heal()
        vendor.fail(faults.truncated(), path=None)
        assert (await caller.mint(path="/v1/validate")).body == b'{"valid'
        assert (await caller.mint()).status == 200

    async def test_several_at_once(self, vendor, caller):
        """Combined faults each do their part; where they overlap, the last one wins."""
        both = faults.combined(
            faults.error(Refusal.INTERNAL_ERROR),
            faults.html(504),
            faults.truncated(),
            faults.cut(3),
        )
        vendor.fail(both)
        async with caller.request_token() as response:
            assert response.status == 504
            assert await response.content.read(3) == b"<!D"
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        vendor.heal()
        vendor.fail(faults.combined(faults.lifetime(7), faults.slow(0.001), faults.same_token()))
        claims = vendor.claims_of((await caller.mint()).token)
        assert claims["exp"] - claims["iat"] == 7

    async def test_whatever_is_met_is_charged(self, vendor, caller):
        """A call that met a fault took from the rate limit like any other."""
        vendor.fail(faults.error(Refusal.INTERNAL_ERROR), times=1)
        vendor.fail(faults.empty(), times=1)
        await caller.mint()
        await caller.mint()
        assert (await caller.mint()).headers["X-RateLimit-Remaining"] == "117"

    async def test_one_that_was_written_by_the_user(self, vendor, caller):
        """A fault is a value; whoever misses one makes it."""
        mine = faults.Fault(
            name="mine", edit=lambda it: Answer(299, it.body, (("X-Mine", "1"),)), delay=0.001
        )
        vendor.fail(mine)
        reply = await caller.mint()
        assert (reply.status, reply.headers["X-Mine"]) == (299, "1")
        assert repr(mine) == "Fault('mine')"
