"""POST /v1/embed-tokens/request and its neighbours, as they are on the wire."""

import asyncio
import email.utils
import itertools
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import jwt
import pytest
from edge import (
    AGENT,
    OTHER_AGENT,
    TOKEN_PATH,
    Edge,
    Reply,
    clock_of_today,
    request,
    serving,
    visitor,
)
from processes import until

from broker import errors
from broker.issue import IssuedToken
from broker.issuers.base import Turn
from broker.model import AGENT_RULE, Minted, Outcome, TokenRequest
from broker.stores.base import Rejection, Visit
from broker.web.router import new_ids

MINT_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]+")


def date_of(edge: Edge) -> str:
    """Return the Date header of this moment."""
    return email.utils.formatdate(edge.time.wall() // 1_000_000, usegmt=True)


def claims_of(edge: Edge, reply: Reply) -> dict[str, Any]:
    """Verify the token of an answer with the key that only the broker should have used.

    Its dates are not compared with the real clock: the broker lives by one that tests move.
    """
    timeless = {"verify_exp": False, "verify_iat": False, "verify_nbf": False}
    return jwt.decode(reply.token, edge.key, ["HS256"], audience="embed", options=timeless)


def common(reply: Reply, edge: Edge) -> tuple[tuple[str, str], ...]:
    """What every answer begins with."""
    request_id = reply.header("X-Request-Id")
    assert request_id is not None
    return (
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(reply.body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Date", date_of(edge)),
        ("X-Request-Id", request_id),
    )


class TestSuccess:
    async def test_a_mint_is_answered_in_both_shapes_with_every_header(self, edge: Edge) -> None:
        """The vendor's documented shape and today's at once; every header, nothing else."""
        fingerprint = visitor()
        reply = await edge.request_token(fingerprint)
        now = edge.time.wall() // 1_000_000
        data = reply.json["data"]
        assert reply.json == {
            "success": True,
            "status": "success",
            "status_code": 200,
            "data": {
                "token": data["token"],
                "session_id": data["session_id"],
                "sid": data["session_id"],
                "expires_at": now + 3595,
            },
        }
        assert re.fullmatch(r"[0-9a-f]{32}", data["sid"])
        assert (reply.status, reply.reason) == (200, "OK")
        assert reply.headers == (
            *common(reply, edge),
            ("Cache-Status", "embed-token-broker; fwd=miss"),
            ("X-RateLimit-Limit", "20"),
            ("RateLimit-Policy", '"fingerprint";q=20;w=20'),
            ("X-RateLimit-Remaining", "19"),
            ("X-RateLimit-Reset", str(now + 2)),
            ("RateLimit", '"fingerprint";r=19;t=1'),
        )
        assert MINT_ID.fullmatch(reply.header("X-Request-Id") or "")
        assert claims_of(edge, reply) == {
            "iss": "embed-token-broker",
            "aud": "embed",
            "sub": AGENT,
            "agent_id": AGENT,
            "fingerprint": fingerprint,
            "sid": data["sid"],
            "jti": data["sid"],
            "client_id": "web",
            "iat": now - 5,
            "nbf": now - 5,
            "exp": data["expires_at"],
        }

    async def test_reuse_answers_the_same_bytes_and_says_hit(self, edge: Edge) -> None:
        """One visitor, one token, one session: only the headers tell the second answer apart."""
        fingerprint = visitor()
        first = await edge.request_token(fingerprint)
        second = await edge.request_token(fingerprint)
        assert second.body == first.body
        now = edge.time.wall() // 1_000_000
        assert second.headers == (
            *common(second, edge),
            ("Cache-Status", "embed-token-broker; hit"),
            ("X-RateLimit-Limit", "20"),
            ("RateLimit-Policy", '"fingerprint";q=20;w=20'),
            ("X-RateLimit-Remaining", "18"),
            ("X-RateLimit-Reset", str(now + 3)),
            ("RateLimit", '"fingerprint";r=18;t=1'),
        )
        assert first.header("X-Request-Id") != second.header("X-Request-Id")

    async def test_fresh_mints_anew_and_is_reused_from_then_on(self, edge: Edge) -> None:
        """`fresh` asks for a new session; whoever comes after it gets that one."""
        fingerprint = visitor()
        first = await edge.request_token(fingerprint)
        fresh = await edge.request_token(fingerprint, fresh=True)
        after = await edge.request_token(fingerprint, fresh=False)
        assert fresh.cache_status == "embed-token-broker; fwd=miss"
        assert fresh.session != first.session
        assert after.body == fresh.body
        assert after.cache_status == "embed-token-broker; hit"

    @pytest.mark.parametrize(
        "headers",
        [
            [("Cache-Control", "no-cache")],
            [("Cache-Control", "no-store"), ("Pragma", "no-cache")],
            [("Cache-Control", "max-age=0, must-revalidate")],
            [("If-None-Match", "*"), ("Range", "bytes=0-1")],
        ],
    )
    async def test_the_requests_cache_control_is_ignored(
        self, edge: Edge, headers: list[tuple[str, str]]
    ) -> None:
        """Clients send no-cache on their own: if it counted, they would drain the budget."""
        fingerprint = visitor()
        first = await edge.request_token(fingerprint)
        second = await edge.request_token(fingerprint, headers=headers)
        assert second.body == first.body
        assert second.cache_status == "embed-token-broker; hit"

    async def test_a_model_is_passed_on_and_has_a_token_of_its_own(self, edge: Edge) -> None:
        """The model is in the claims and in `data`; leaving it out is yet another token."""
        fingerprint = visitor()
        replies = [
            await edge.request_token(fingerprint, model=m) for m in ("essence", "expression", None)
        ]
        plain = await edge.request_token(fingerprint)
        assert [claims_of(edge, reply).get("model") for reply in replies] == [
            "essence",
            "expression",
            None,
        ]
        assert [reply.json["data"].get("model") for reply in replies] == [
            "essence",
            "expression",
            None,
        ]
        assert len({reply.token for reply in replies}) == 3
        assert plain.body == replies[2].body

    @pytest.mark.parametrize(
        "content_type",
        [None, "application/json", "application/x-www-form-urlencoded", "text/plain; charset=x"],
    )
    async def test_the_content_type_does_not_matter(
        self, edge: Edge, content_type: str | None
    ) -> None:
        """`curl -d` sends a form's type, others none: the body is JSON all the same."""
        headers = [] if content_type is None else [("Content-Type", content_type)]
        assert (await edge.request_token(headers=headers)).status == 200

    async def test_joiners_of_a_mint_are_told_so(self, edge: Edge) -> None:
        """Ten at once for one key: one miss, nine that collapsed into it (RFC 9211), one token."""
        fingerprint = visitor()
        hold, go = _slow(edge)
        asking = asyncio.create_task(edge.all_at_once([edge.asking(fingerprint)] * 10))
        await _until(lambda: sum(len(f._waiters) for f in _flights(edge)) == 10)
        go.set()
        replies = await asking
        assert sorted(str(reply.cache_status) for reply in replies) == [
            "embed-token-broker; fwd=miss",
            *["embed-token-broker; fwd=miss; collapsed"] * 9,
        ]
        assert len({reply.body for reply in replies}) == 1
        assert hold.calls == 1

    async def test_a_query_string_changes_nothing(self, edge: Edge) -> None:
        """Somebody's cache buster does not make a route unknown."""
        assert (await edge.request_token(path=f"{TOKEN_PATH}?t=1&t=2")).status == 200
        assert (await edge.get("/livez?x")).status == 200


class TestConnections:
    async def test_http_1_0_is_answered_and_closed(self, edge: Edge) -> None:
        """A raw HTTP/1.0 client without Host gets its token; keep-alive only if it asks."""
        data = edge.asking().replace(b"HTTP/1.1\r\nHost: broker", b"HTTP/1.0", 1)
        line = await edge.connect()
        line.send(data)
        reply = await line.answer()
        assert reply.status == 200
        assert reply.header("Connection") == "close"
        assert await line.rest() == b""
        await line.close()
        line = await edge.connect()
        line.send(data.replace(b"HTTP/1.0", b"HTTP/1.0\r\nConnection: keep-alive", 1) * 2)
        assert [(await line.answer()).header("Connection") for _ in "ab"] == ["keep-alive"] * 2
        await line.close()
        line = await edge.connect()
        for _ in range(3):  # one by one, where the fast lane would take another version's
            line.send(data.replace(b"HTTP/1.0", b"HTTP/1.0\r\nConnection: keep-alive", 1))
            assert (await line.answer()).header("Connection") == "keep-alive"
        await line.close()

    async def test_connection_close_is_obeyed(self, edge: Edge) -> None:
        """A client that wants the connection closed is told so, and it is closed."""
        line = await edge.connect()
        line.send(edge.asking(headers=[("Connection", "close")]))
        assert (await line.answer()).header("Connection") == "close"
        assert await line.rest() == b""
        await line.close()

    async def test_pipelined_requests_are_answered_in_their_order(self, edge: Edge) -> None:
        """Fifty requests in one write: fifty answers, in order, on one connection."""
        ids = [f"pipelined-{n}" for n in range(50)]
        line = await edge.connect()
        line.send(b"".join(edge.asking(headers=[("X-Request-Id", i)]) for i in ids))
        replies = [await line.answer() for _ in ids]
        await line.close()
        assert [reply.header("X-Request-Id") for reply in replies] == ids
        assert {reply.status for reply in replies} == {200}

    async def test_draining_is_told_and_requests_are_still_taken(self, edge: Edge) -> None:
        """While a balancer looks away: /readyz 503, tokens as before, connections closed."""
        edge.app.parts.readiness.draining = True
        reply = await edge.request_token()
        assert (reply.status, reply.header("Connection")) == (200, "close")
        ready = await edge.get("/readyz")
        assert (ready.status, ready.json) == (503, {"status": "draining"})
        assert (await edge.get("/livez")).status == 200

    async def test_a_refusal_ends_its_connection_in_a_drain_too(self, edge: Edge) -> None:
        """Who is told to wait comes back to another process."""
        fingerprint = visitor()
        while (await edge.request_token(fingerprint)).status == 200:
            pass
        edge.app.parts.readiness.draining = True
        reply = await edge.request_token(fingerprint)
        assert (reply.status, reply.header("Connection")) == (429, "close")


class TestRequestId:
    @pytest.mark.parametrize("given", ["a", "Az09._-", "x" * 64, "9f86-d081.88_4c"])
    async def test_a_good_one_is_kept(self, edge: Edge, given: str) -> None:
        """On every kind of answer: 200, refusal, unknown route."""
        headers = [("X-Request-Id", given)]
        assert (await edge.request_token(headers=headers)).header("X-Request-Id") == given
        assert (await edge.request_token("zz", headers=headers)).header("X-Request-Id") == given
        assert (await edge.get("/nowhere", X_Request_Id=given)).header("X-Request-Id") == given

    @pytest.mark.parametrize(
        "given", ["", "x" * 65, "a b", 'a"b', "a;b", "é", "\u202eabc", "a,b", "<script>", "a/b"]
    )
    async def test_any_other_is_replaced(self, edge: Edge, given: str) -> None:
        """What could break a log or a header is not repeated."""
        reply = await edge.request_token(headers=[("X-Request-Id", given)])
        assert reply.status == 200
        assert MINT_ID.fullmatch(reply.header("X-Request-Id") or "")

    def test_they_are_counted_in_hexadecimal(self) -> None:
        """One after the other, over the borders of blocks."""
        ids = list(itertools.islice(new_ids("a"), 1000))
        assert [int(each.removeprefix("a-"), 16) for each in ids] == list(range(1000))

    async def test_ours_are_unique(self, edge: Edge) -> None:
        """Each answer has another one, unparseable requests included."""
        replies = [await edge.get("/livez") for _ in range(20)]
        replies += [await edge.raw(b"nonsense\r\n\r\n") for _ in range(5)]
        assert len({reply.header("X-Request-Id") for reply in replies}) == 25


class TestOtherRoutes:
    @pytest.mark.parametrize("path", ["/livez", "/health", "/healthz", "/readyz"])
    async def test_probes(self, edge: Edge, path: str) -> None:
        """Probes answer GET and HEAD with the headers of every answer."""
        reply = await edge.get(path)
        assert (reply.status, reply.body) == (200, b'{"status":"ok"}')
        assert reply.headers == common(reply, edge)
        head = await edge.get(path, "HEAD")
        assert (head.status, head.body) == (200, b"")
        assert [name for name, _ in head.headers] == [name for name, _ in reply.headers]
        assert head.header("Content-Length") == reply.header("Content-Length")

    @pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
    async def test_other_methods_are_405_with_allow_and_never_cors(
        self, edge: Edge, method: str
    ) -> None:
        """A preflight fails like any other method: this door is not for browsers."""
        reply = await edge.get(
            TOKEN_PATH, method, Origin="https://site.example", Access_Control_Request_Method="POST"
        )
        assert reply.status == 405
        assert reply.header("Allow") == "POST"
        assert not [name for name, _ in reply.headers if name.startswith("Access-Control")]
        assert [name for name, _ in reply.headers] == [
            "Content-Type",
            "Content-Length",
            "Cache-Control",
            "X-Content-Type-Options",
            "Date",
            "X-Request-Id",
            "Allow",
        ]
        if method != "HEAD":
            assert reply.code == "METHOD_NOT_ALLOWED"

    async def test_405_of_a_probe_names_its_methods(self, edge: Edge) -> None:
        """`Allow` lists what the route has, in a fixed order."""
        reply = await edge.get("/livez", "POST")
        assert (reply.code, reply.header("Allow")) == ("METHOD_NOT_ALLOWED", "GET, HEAD")

    @pytest.mark.parametrize(
        "path",
        ["/", "/v1", TOKEN_PATH + "/", "//livez", "/LIVEZ", "/docs", "/openapi.json", "/%2e"],
    )
    async def test_unknown_routes_are_404(self, edge: Edge, path: str) -> None:
        """Paths are exact; pages are not served unless configured."""
        reply = await edge.get(path)
        assert reply.code == "NOT_FOUND"
        assert TOKEN_PATH in reply.message
        assert reply.headers == common(reply, edge)

    async def test_metrics_are_elsewhere_and_the_404_says_where(self, edge: Edge) -> None:
        """The most common mistake of a scrape configuration explains itself."""
        reply = await edge.get("/metrics")
        assert reply.code == "NOT_FOUND"
        assert f"{edge.app.admin_url}/metrics" in reply.message

    async def test_validate(self, edge: Edge) -> None:
        """A known secret is valid, another is not, none is an error of the caller."""
        path = "/v1/validate"
        known = await edge.post(b"", path=path)
        assert (known.status, known.json) == (200, {"valid": True})
        assert known.headers == common(known, edge)
        unknown = await edge.post(b"", path=path, secret=secrets.token_urlsafe(24))
        assert (unknown.status, unknown.json) == (200, {"valid": False})
        none = await edge.raw(request("POST", path, [], b""))
        assert (none.status, none.code) == (401, "MISSING_AUTH")
        assert (await edge.get(path)).header("Allow") == "POST"


def _body(**fields: object) -> dict[str, object]:
    return {"agent_id": AGENT, "fingerprint": visitor(), **fields}


Case = tuple[int, str, str, Callable[[Edge], Awaitable[Reply]], dict[str, str]]

CASES: dict[str, Case] = {
    "no agent": (
        400,
        "MISSING_PARAM",
        "agent_id: required; send the agent's code",
        lambda edge: edge.post(b'{"fingerprint":"abcd"}'),
        {},
    ),
    "no fingerprint": (
        400,
        "MISSING_PARAM",
        "fingerprint: required; send a stable per-device hex string",
        lambda edge: edge.post(b'{"agent_id":"a"}'),
        {},
    ),
    "empty body": (
        400,
        "MISSING_PARAM",
        "agent_id: required; the body is empty, send a JSON object",
        lambda edge: edge.post(b""),
        {},
    ),
    "malformed": (
        400,
        "VALIDATION_ERROR",
        "body: not valid JSON in UTF-8; send an object with agent_id and fingerprint",
        lambda edge: edge.post(b"{"),
        {},
    ),
    "wrong type": (
        400,
        "VALIDATION_ERROR",
        "fresh: expected bool, got str",
        lambda edge: edge.request_token(fresh="yes"),
        {},
    ),
    "bad agent": (
        400,
        "VALIDATION_ERROR",
        f"agent_id: must be {AGENT_RULE}; send the agent's code as the vendor shows it",
        lambda edge: edge.request_token(agent="a/b"),
        {},
    ),
    "bad fingerprint": (
        400,
        "VALIDATION_ERROR",
        (
            "fingerprint: must be 4 to 128 hex digits or a UUID, one stable value per device;"
            ' the broker\'s operator can set [limits] fingerprint_format = "any"'
        ),
        lambda edge: edge.request_token("anonymous"),
        {},
    ),
    "bad model": (
        400,
        "VALIDATION_ERROR",
        "model: must be 1 to 64 printable characters; leave it out for the default",
        lambda edge: edge.request_token(model=""),
        {},
    ),
    "secret twice": (
        400,
        "VALIDATION_ERROR",
        "api-secret: sent twice; send the header once",
        lambda edge: edge.request_token(headers=[("Api-Secret", edge.secret)]),
        {},
    ),
    "no secret": (
        401,
        "MISSING_AUTH",
        "api-secret: missing; send the client secret in this header",
        lambda edge: edge.raw(request("POST", TOKEN_PATH, [], b"{}")),
        {"WWW-Authenticate": "Bearer"},
    ),
    "unknown secret": (
        401,
        "UNAUTHORIZED",
        (
            "unknown client secret: check it against the broker's [clients]; without them it is"
            " the vendor's key"
        ),
        lambda edge: edge.fail_to_log_in(),
        {"WWW-Authenticate": "Bearer"},
    ),
    "browser": (
        403,
        "SECRET_IN_BROWSER",
        (
            "a client secret came with an Origin header, so from a browser: it has leaked into"
            " a page; replace it, and request tokens from your backend"
        ),
        lambda edge: edge.request_token(headers=[("Origin", "https://site.example")]),
        {},
    ),
    "too large": (
        413,
        "PAYLOAD_TOO_LARGE",
        "body: more than 8192 bytes; send agent_id and fingerprint only",
        lambda edge: edge.post(b" " * 8193),
        {"Connection": "close"},
    ),
    "encoded": (
        415,
        "UNSUPPORTED_TYPE",
        "content-encoding: send the body as it is, without compression",
        lambda edge: edge.request_token(headers=[("Content-Encoding", "gzip")]),
        {},
    ),
    "not http": (
        400,
        "VALIDATION_ERROR",
        "request: not valid HTTP/1.1; send a well-formed request",
        lambda edge: edge.raw(b"hello\r\n\r\n"),
        {"Connection": "close"},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_every_error_of_a_caller_is_one_envelope(edge: Edge, case: Case) -> None:
    """Status, code, message, all three numbers, every header."""
    status, code, message, send, headers = case
    reply = await send(edge)
    assert reply.json == {
        "success": False,
        "status": "error",
        "status_code": status,
        "error": {"code": code, "message": message, "httpStatus": status},
    }
    assert reply.status == status
    assert reply.headers == (*common(reply, edge), *headers.items())


async def test_a_client_gets_no_agent_that_it_was_not_given() -> None:
    """403, before anything is charged or minted; agents given to it work, and "*" means all."""
    narrow = secrets.token_urlsafe(24)
    clients = {"narrow": {"secret": narrow, "agents": [AGENT]}}
    async with serving({"clients": clients}) as edge:
        fingerprint = visitor()
        denied = await edge.request_token(fingerprint, agent=OTHER_AGENT, secret=narrow)
        assert (denied.status, denied.code) == (403, "AGENT_NOT_ALLOWED")
        assert denied.message == "agent_id: this client may not use this agent; ask the operator"
        assert denied.headers == common(denied, edge)
        allowed = await edge.request_token(fingerprint, agent=AGENT, secret=narrow)
        assert (allowed.status, allowed.header("X-RateLimit-Remaining")) == (200, "19")
        assert (await edge.request_token(agent=OTHER_AGENT)).status == 200


class TestWhatIsBehindFails:
    @pytest.mark.parametrize(
        ("error", "status", "code", "headers"),
        [
            (errors.UpstreamUnavailable("it failed"), 502, "UPSTREAM_UNAVAILABLE", {}),
            (errors.UpstreamTimeout("too late"), 504, "UPSTREAM_TIMEOUT", {}),
            (errors.UpstreamRefused(402, "NO_CREDIT", "pay"), 402, "NO_CREDIT", {}),
            (
                errors.ServiceUnavailable("paused", 1_000_001),
                503,
                "SERVICE_UNAVAILABLE",
                {"Retry-After": "2"},
            ),
        ],
    )
    async def test_the_error_keeps_its_status_and_code(
        self, edge: Edge, error: errors.BrokerError, status: int, code: str, headers: dict[str, str]
    ) -> None:
        """What the issuer reports is what the caller reads, in the one envelope."""
        _failing(edge, error)
        reply = await edge.request_token()
        assert (reply.status, reply.code) == (status, code)
        assert reply.message == error.message
        assert reply.headers == (*common(reply, edge), *headers.items())

    async def test_a_defect_is_500_and_tells_nothing_but_where_to_look(self, edge: Edge) -> None:
        """The caller gets a request id; the log has the traceback under it."""
        edge.defects_expected = True
        _failing(edge, RuntimeError("out of cheese"))
        reply = await edge.request_token()
        assert (reply.status, reply.code) == (500, "INTERNAL_ERROR")
        assert reply.message == "internal error: see the log for this X-Request-Id"
        defects = edge.events("broker.defect")
        assert [event["request_id"] for event in defects] == [reply.header("X-Request-Id")]
        assert defects[0]["exception"][0]["exc_type"] == "RuntimeError"

    async def test_the_deadline_counts_from_the_head_and_not_from_the_body(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A body that takes its time takes it from the mint, or `deadline` would be exceeded.

        Sees a start of the clock behind the reading of the body.
        """
        given: list[float] = []
        async with serving({"server": {"deadline": "12s"}}) as edge:
            edge.mint_by(edge.app.parts.issuer.mint)
            finish = edge.app.parts.token_service.finish

            async def recorded(
                request: TokenRequest, begun: Visit | None, timeout: float
            ) -> IssuedToken | Rejection:
                given.append(timeout)
                return await finish(request, begun, timeout)

            monkeypatch.setattr(edge.app.parts.token_service, "finish", recorded)
            line = await edge.connect()
            data = edge.asking()
            line.send(data[:-10])
            connections = edge.app.parts.server.connections
            await until(lambda: any(one._request_in_progress for one in connections))
            edge.time.advance(0.5)
            line.send(data[-10:])
            assert (await line.answer()).status == 200
            await line.close()
        assert given == [11.5]

    async def test_a_deadline_is_504(self) -> None:
        """Nobody waits longer than `[server] deadline`; the mint goes on and is cached."""
        async with serving({"server": {"deadline": "30ms"}}) as edge:
            hold, go = _slow(edge)
            fingerprint = visitor()
            reply = await edge.request_token(fingerprint)
            assert (reply.status, reply.code) == (504, "UPSTREAM_TIMEOUT")
            go.set()
            await edge.app.parts.token_service.flights.drained()
            assert (await edge.request_token(fingerprint)).cache_status == "embed-token-broker; hit"
            assert hold.calls == 1

    async def test_a_used_up_budget_is_503_with_the_time_to_come_back(self) -> None:
        """The first mint has to wait longer than max_wait: told at once, and counted."""
        budget = {"rate": 1, "per": "60s", "burst": 1, "max_wait": "1s"}
        async with serving({"issuer": {"budget": budget}}) as edge:
            reply = await edge.request_token()
            assert (reply.status, reply.code) == (503, "SERVICE_UNAVAILABLE")
            assert reply.message == "the vendor's budget is used up"
            wait = int(reply.header("Retry-After") or "")
            assert 50 <= wait <= 67
            assert reply.headers == (*common(reply, edge), ("Retry-After", str(wait)))
            scraped = await edge.scrape()
            assert scraped['broker_rejections_total{limit="budget"}'] == 1
            assert scraped['broker_requests_total{outcome="shed"}'] == 1


@asynccontextmanager
async def limited(name: str, burst: int = 3) -> AsyncIterator[Edge]:
    """A broker on which this limit alone is narrow: one an hour."""
    async with serving({"limits": {name: {"rate": 1, "per": "1h", "burst": burst}}}) as edge:
        yield edge


class TestLimits:
    @pytest.mark.parametrize("name", ["fingerprint", "fingerprint_mints", "agent", "client"])
    async def test_a_429_names_its_limit_and_has_its_headers(self, name: str) -> None:
        """Headers and message are those of the denying limit, not of the visitor's."""
        async with limited(name) as edge:
            fingerprint = visitor()
            for _ in range(3):
                assert (await edge.request_token(fingerprint, fresh=True)).status == 200
            reply = await edge.request_token(fingerprint, fresh=True)
            assert (reply.status, reply.reason) == (429, "Too Many Requests")
            assert reply.code == "RATE_LIMITED"
            assert reply.message == f"limit {name} reached: retry after the time in Retry-After"
            now = edge.time.wall() // 1_000_000
            assert reply.headers == (
                *common(reply, edge),
                ("X-RateLimit-Limit", "3"),
                ("RateLimit-Policy", f'"{name}";q=3;w=10800'),
                ("X-RateLimit-Remaining", "0"),
                ("X-RateLimit-Reset", str(now + 10801)),
                ("RateLimit", f'"{name}";r=0;t=3600'),
                ("Retry-After", "3600"),
            )
            scraped = await edge.scrape()
            assert scraped[f'broker_rejections_total{{limit="{name}"}}'] == 1

    async def test_remaining_and_reset_agree_with_the_next_decision(self) -> None:
        """L10 at the wire: what `Remaining` promises is granted, and not one more."""
        async with limited("fingerprint", burst=5) as edge:
            fingerprint = visitor()
            promised = 5
            while promised:
                reply = await edge.request_token(fingerprint)
                promised -= 1
                assert reply.header("X-RateLimit-Remaining") == str(promised)
                assert reply.header("RateLimit") == f'"fingerprint";r={promised};t=3600'
            assert (await edge.request_token(fingerprint)).status == 429
            edge.time.advance(5 * 3600)
            assert (await edge.request_token(fingerprint)).header("X-RateLimit-Remaining") == "4"

    async def test_L9_a_second_less_than_retry_after_fails_and_retry_after_succeeds(self) -> None:
        """Whole seconds, rounded up, never 0: also when the refusal came in mid-second."""
        async with limited("fingerprint", burst=1) as edge:
            fingerprint = visitor()
            assert (await edge.request_token(fingerprint)).status == 200
            edge.time.advance(0.75)
            refused = await edge.request_token(fingerprint)
            assert refused.header("Retry-After") == "3600"  # 3,599.25 s, rounded up
            edge.time.advance(3599)
            again = await edge.request_token(fingerprint)
            assert (again.status, again.header("Retry-After")) == (429, "1")
            edge.time.advance(1)
            assert (await edge.request_token(fingerprint)).status == 200

    async def test_L6_of_1000_simultaneous_requests_of_a_visitor_exactly_burst_pass(self) -> None:
        """At one an hour: 20 of 1,000; other visitors notice nothing.

        The refused are told when: who waits that long passes, a second earlier does not.
        """
        async with limited("fingerprint", burst=20) as edge:
            fingerprint = visitor()
            replies = await edge.all_at_once([edge.asking(fingerprint)] * 1000)
            passed = [reply for reply in replies if reply.status == 200]
            refused = [reply for reply in replies if reply.status == 429]
            assert (len(passed), len(refused)) == (20, 980)
            assert len({reply.token for reply in passed}) == 1
            left = sorted(int(reply.header("X-RateLimit-Remaining") or "") for reply in passed)
            assert left == list(range(20))
            assert {reply.header("Retry-After") for reply in refused} == {"3600"}
            assert {reply.message for reply in refused} == {
                "limit fingerprint reached: retry after the time in Retry-After"
            }
            assert {reply.status for reply in [await edge.request_token() for _ in range(5)]} == {
                200
            }
            edge.time.advance(3599)
            assert (await edge.request_token(fingerprint)).status == 429
            edge.time.advance(1)
            assert (await edge.request_token(fingerprint)).status == 200
            scraped = await edge.scrape()
            assert scraped['broker_rejections_total{limit="fingerprint"}'] == 981

    async def test_L6_1000_visitors_on_an_agent_with_burst_30_get_30_mints(self) -> None:
        """The limit holds over all visitors; joiners and reuse charge no mint limit (L5)."""
        async with limited("agent", burst=30) as edge:
            visitors = [visitor() for _ in range(1000)]
            replies = await edge.all_at_once([edge.asking(one) for one in visitors])
            served = {v: r for v, r in zip(visitors, replies, strict=True) if r.status == 200}
            refused = [reply for reply in replies if reply.status == 429]
            assert (len(served), len(refused)) == (30, 970)
            assert len({reply.token for reply in served.values()}) == 30
            assert {reply.header("RateLimit") for reply in refused} == {'"agent";r=0;t=3600'}
            again = await edge.all_at_once([edge.asking(one) for one in served] * 5)
            assert {reply.cache_status for reply in again} == {"embed-token-broker; hit"}
            assert (await edge.request_token(agent=OTHER_AGENT)).status == 200
            scraped = await edge.scrape()
            assert scraped['broker_requests_total{outcome="minted"}'] == 31
            assert scraped['broker_rejections_total{limit="agent"}'] == 970

    async def test_F1_1000_simultaneous_first_requests_of_a_key_are_one_mint(self) -> None:
        """One token, one session, one charge of the agent: the next visitor sees 29 of 30 left."""
        limits = {
            "fingerprint": {"burst": 1000, "rate": 1000},
            "agent": {"rate": 1, "per": "1h", "burst": 2},
        }
        async with serving({"limits": limits}) as edge:
            hold, go = _slow(edge)
            fingerprint = visitor()
            asking = asyncio.create_task(edge.all_at_once([edge.asking(fingerprint)] * 1000))
            await _until(lambda: sum(len(f._waiters) for f in _flights(edge)) == 1000)
            go.set()
            replies = await asking
            assert {reply.status for reply in replies} == {200}
            assert len({reply.body for reply in replies}) == 1
            assert hold.calls == 1
            assert sum(r.cache_status == "embed-token-broker; fwd=miss" for r in replies) == 1
            assert (await edge.request_token()).status == 200  # the second of two
            assert (await edge.request_token()).status == 429  # so the crowd was charged once
            scraped = await edge.scrape()
            assert scraped['broker_requests_total{outcome="minted"}'] == 2
            assert scraped['broker_requests_total{outcome="coalesced"}'] == 999

    async def test_a_limit_with_dry_run_counts_and_never_denies(self) -> None:
        """L12 at the wire: the answer's headers tell what would have been."""
        section = {"rate": 1, "per": "1h", "burst": 1, "dry_run": True}
        async with serving({"limits": {"fingerprint": section}}) as edge:
            fingerprint = visitor()
            replies = [await edge.request_token(fingerprint) for _ in range(3)]
            assert {reply.status for reply in replies} == {200}
            assert [reply.header("X-RateLimit-Remaining") for reply in replies] == ["0"] * 3
            scraped = await edge.scrape()
            assert scraped['broker_dry_run_rejections_total{limit="fingerprint"}'] == 2
            assert scraped['broker_rejections_total{limit="fingerprint"}'] == 0

    async def test_L8_the_largest_burst_means_what_it_says(self) -> None:
        """2^31 - 1 is a limit like any other, not "unlimited" and not an overflow."""
        section = {"rate": 1, "per": "1h", "burst": 2**31 - 1}
        async with serving({"limits": {"fingerprint": section}}) as edge:
            reply = await edge.request_token()
            assert reply.header("X-RateLimit-Limit") == "2147483647"
            assert reply.header("X-RateLimit-Remaining") == "2147483646"
            assert reply.header("RateLimit-Policy") == '"fingerprint";q=2147483647;w=7730941129200'

    async def test_L8_a_limit_that_is_left_out_of_the_file_is_the_default_not_none(self) -> None:
        """Unset never means unlimited: without a line about it, the visitor's limit is there."""
        async with serving() as edge:
            fingerprint = visitor()
            statuses = [(await edge.request_token(fingerprint)).status for _ in range(21)]
            assert statuses == [200] * 20 + [429]


class TestKeys:
    async def test_G8_no_token_crosses_to_another_key(self) -> None:
        """Keys whose parts run into each other, or differ in case, have tokens of their own."""
        second = secrets.token_urlsafe(24)
        clients = {"weba": {"secret": second, "agents": ["*"]}}
        limits = {"fingerprint": {"burst": 1000}, "fingerprint_mints": {"burst": 1000}}
        async with serving({"clients": clients, "limits": limits}) as edge:
            tail = visitor()
            keys = list(
                itertools.product(
                    (edge.secret, second),
                    ("b", "ab", "abc", "bc", "ABC"),
                    (tail, f"c{tail}", f"{tail}ef", tail.upper() + "F"),
                    (None, "ef", "Ef", "e"),
                )
            )
            tokens: dict[str, tuple[object, ...]] = {}
            for key in keys * 2:
                secret, agent, fingerprint, model = key
                reply = await edge.request_token(
                    fingerprint, agent=agent, secret=secret, model=model
                )
                claims = claims_of(edge, reply)
                assert claims["agent_id"] == claims["sub"] == agent
                assert claims["fingerprint"] == fingerprint
                assert claims.get("model") == model
                assert tokens.setdefault(reply.token, key) == key
            assert len(tokens) == len(keys) == 160

    async def test_L13_hostile_ids_are_refused_or_limited_never_shared(self) -> None:
        """Where any fingerprint is allowed, strange ones are ordinary: limited, apart, opaque."""
        limits = {
            "fingerprint_format": "any",
            "fingerprint": {"rate": 1, "per": "1h", "burst": 2},
        }
        strange = ["{}", ":", "a:b", "a|b", "a|", "|a", "*", "0", "null", "\u00e9", "e\u0301", "💡"]
        async with serving({"limits": limits}) as edge:
            tokens = set()
            for fingerprint in strange:
                replies = [await edge.request_token(fingerprint) for _ in range(3)]
                assert [reply.status for reply in replies] == [200, 200, 429], fingerprint
                assert claims_of(edge, replies[0])["fingerprint"] == fingerprint
                tokens.add(replies[0].token)
            assert len(tokens) == len(strange)
            for hostile in ("\x00", "a\x1fb", "\u202eabc", "x" * 257, "\n", "\x1b[31m", "\u200b"):
                assert (await edge.request_token(hostile)).code == "VALIDATION_ERROR", hostile
            huge = await edge.request_token("a" * 65536)
            assert huge.code == "PAYLOAD_TOO_LARGE"
            empty = await edge.post(b'{"agent_id":"a","fingerprint":""}')
            assert empty.code == "VALIDATION_ERROR"


def test_every_outcome_is_one_of_these() -> None:
    """The table of this file is complete: a new outcome needs a test here."""
    assert {outcome.value for outcome in Outcome} == {
        "minted",
        "reused",
        "coalesced",
        "limited",
        "invalid",
        "unauthorized",
        "forbidden",
        "shed",
        "failed",
    }


class _Hold:
    """Counts mints and lets none end before it may."""

    def __init__(self, edge: Edge, go: asyncio.Event) -> None:
        self.calls = 0
        self._mint: Callable[..., Awaitable[Any]] = edge.app.parts.issuer.mint
        self._go = go

    async def __call__(self, request: TokenRequest, turn: Turn) -> Minted:
        await turn()
        self.calls += 1
        await self._go.wait()
        return await self._mint(request, _at_once)


async def _at_once() -> None:
    """A turn that was taken already."""


def _slow(edge: Edge) -> tuple[_Hold, asyncio.Event]:
    """Make the issuer wait for an event."""
    go = asyncio.Event()
    hold = _Hold(edge, go)
    edge.mint_by(hold)
    return hold, go


def _failing(edge: Edge, error: Exception) -> None:
    """Make the issuer fail."""

    async def fail(*args: object) -> Any:
        raise error

    edge.mint_by(fail)


def _flights(edge: Edge) -> list[Any]:
    return list(edge.app.parts.token_service.flights._by_key.values())


async def _until(condition: Callable[[], bool]) -> None:
    """Give the other tasks turns until something is so."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


async def test_date_is_renewed_every_second() -> None:
    """The Date header follows the clock, back and forth, to the second."""
    clock = clock_of_today()
    async with serving(clock=clock) as edge:
        for seconds in (0.0, 0.7, 0.1, 3.0, -2.0):
            clock.step_wall(seconds)
            assert (await edge.get("/livez")).header("Date") == date_of(edge)
