"""Introspection (RFC 7662) and revocation (RFC 7009) for backends, byte by byte."""

import asyncio
import json
import secrets
from collections.abc import Iterable
from unittest.mock import ANY
from urllib.parse import urlencode

import pytest
from edge import AGENT, Edge, Reply, request, serving, visitor

from broker.errors import ServiceUnavailable
from broker.model import Session
from broker.sessions.admin import NotRecorded
from broker.sessions.base import SessionsFull
from broker.web.token_status import VERIFY_PATH

INACTIVE = b'{"active":false}'


async def post(
    edge: Edge,
    path: str,
    body: bytes | dict[str, str],
    *,
    secret: str | None = None,
    headers: Iterable[tuple[str, str]] = (),
) -> Reply:
    """Post a form as a client."""
    content = body if isinstance(body, bytes) else urlencode(body).encode()
    own = [("api-secret", edge.secret if secret is None else secret)]
    return await edge.raw(request("POST", path, [*own, *headers], content))


async def introspect(edge: Edge, token: str, **how: object) -> Reply:
    """Ask what a token is."""
    return await post(edge, "/v1/introspect", {"token": token}, **how)  # type: ignore[arg-type]


async def revoke(edge: Edge, token: str, **how: object) -> Reply:
    """End a token's session."""
    return await post(edge, "/v1/revoke", {"token": token}, **how)  # type: ignore[arg-type]


async def verified(edge: Edge, token: str) -> int:
    """Return the status that a proxy would get."""
    return (await edge.get(VERIFY_PATH, X_Embed_Token=token)).status


def two_clients() -> tuple[str, dict[str, object]]:
    """Return another client's secret, and the settings that know it."""
    secret = secrets.token_urlsafe(24)
    return secret, {"clients": {"shop": {"secret": secret, "agents": ["*"]}}}


class TestIntrospection:
    async def test_a_good_token_of_the_client_s_own_is_told_whole(self, edge: Edge) -> None:
        """Every field, byte for byte where order counts; the model only where one was asked for."""
        fingerprint = visitor()
        minted = await edge.request_token(fingerprint)
        reply = await introspect(edge, minted.token)
        expires = minted.json["data"]["expires_at"]
        assert (reply.status, reply.header("Content-Type")) == (200, "application/json")
        assert reply.header("Cache-Control") == "no-store"
        assert reply.json == {
            "active": True,
            "client_id": "web",
            "sub": AGENT,
            "agent_id": AGENT,
            "fingerprint": fingerprint,
            "sid": minted.session,
            "iat": expires - 3600,
            "exp": expires,
        }
        with_model = await edge.request_token(fingerprint, model="essence")
        assert (await introspect(edge, with_model.token)).json["model"] == "essence"

    async def test_anything_that_is_not_live_is_exactly_inactive(self) -> None:
        """Nonsense, foreign, damaged, expired, revoked, another client's: the same 16 bytes."""
        shop, tree = two_clients()
        async with serving(tree) as edge, serving() as foreign:
            good = (await edge.request_token()).token
            gone = (await edge.request_token()).token
            await revoke(edge, gone)
            for token in (
                "x",
                "a.b.c",
                good[:-3] + "AAA",
                (await foreign.request_token()).token,
                gone,
            ):
                assert (await introspect(edge, token)).body == INACTIVE
            assert (await introspect(edge, good, secret=shop)).body == INACTIVE
            assert (await introspect(edge, good)).json["active"] is True
            edge.time.advance(3600 + 60)
            assert (await introspect(edge, good)).body == INACTIVE

    async def test_a_form_is_read_as_forms_are(self, edge: Edge) -> None:
        """A hint and unknown fields are ignored, a content type is not asked for."""
        token = (await edge.request_token()).token
        for form in (
            {"token": token, "token_type_hint": "refresh_token"},
            {"foo": "bar", "token": token},
            urlencode({"token": token}).replace(".", "%2E").encode(),
        ):
            assert (await post(edge, "/v1/introspect", form)).json["active"] is True

    @pytest.mark.parametrize("path", ["/v1/introspect", "/v1/revoke"])
    @pytest.mark.parametrize(
        ("body", "code"),
        [
            (b"", "MISSING_PARAM"),
            (b"token=", "MISSING_PARAM"),
            (b"Token=x", "MISSING_PARAM"),
            (b'{"token": "x"}', "MISSING_PARAM"),
            (b"token=x&token=x", "VALIDATION_ERROR"),
            (b"token=x\xff", "VALIDATION_ERROR"),
            (b"&".join([b"a=b"] * 17), "VALIDATION_ERROR"),
        ],
    )
    async def test_what_is_no_form_with_one_token_is_400(
        self, edge: Edge, path: str, body: bytes, code: str
    ) -> None:
        """Absent, empty, misspelt, JSON, doubled, not ASCII, endless."""
        reply = await post(edge, path, body)
        assert (reply.status, reply.code) == (400, code)

    @pytest.mark.parametrize("path", ["/v1/introspect", "/v1/revoke"])
    async def test_only_a_client_may_ask(self, edge: Edge, path: str) -> None:
        """As for tokens: 401 without a secret, with a wrong one; 403 from a browser; bounded."""
        form = urlencode({"token": "x"}).encode()
        bare = await edge.raw(request("POST", path, [], form))
        assert (bare.status, bare.code) == (401, "MISSING_AUTH")
        wrong = await post(edge, path, form, secret=secrets.token_urlsafe(24))
        assert (wrong.status, wrong.code) == (401, "UNAUTHORIZED")
        browser = await post(edge, path, form, headers=[("Origin", "https://x.example")])
        assert (browser.status, browser.code) == (403, "SECRET_IN_BROWSER")
        assert (await edge.get(path)).status == 405
        large = await post(edge, path, b"token=" + b"x" * 8192)
        assert (large.status, large.code) == (413, "PAYLOAD_TOO_LARGE")

    async def test_failures_are_throttled_as_everywhere(self, edge: Edge) -> None:
        """Whoever guesses secrets here meets the limit of guessing them elsewhere."""
        for _ in range(30):
            assert (await edge.fail_to_log_in()).status == 401
        wrong = await introspect(edge, "x", secret=secrets.token_urlsafe(24))
        assert (wrong.status, wrong.header("Retry-After")) == (429, "2")
        assert (await introspect(edge, "x")).body == INACTIVE


class TestRevocation:
    async def test_G9_a_revoked_token_is_not_good_and_not_handed_out_again(
        self, edge: Edge
    ) -> None:
        """From the answer on; the visitor's next request opens another session."""
        fingerprint = visitor()
        minted = await edge.request_token(fingerprint)
        assert await verified(edge, minted.token) == 200
        reply = await revoke(edge, minted.token)
        assert (reply.status, reply.body) == (200, b"")
        assert await verified(edge, minted.token) == 401
        told = await edge.get(VERIFY_PATH, X_Embed_Token=minted.token)
        assert told.message == "token: revoked"
        after = await edge.request_token(fingerprint)
        assert after.cache_status == "embed-token-broker; fwd=miss"
        assert after.session != minted.session
        assert await verified(edge, after.token) == 200

    async def test_what_cannot_be_revoked_is_answered_the_same(self) -> None:
        """Unknown, again, another client's: 200, and nothing changes."""
        shop, tree = two_clients()
        async with serving(tree) as edge:
            good = (await edge.request_token()).token
            answers = [
                await revoke(edge, "nonsense"),
                await revoke(edge, good, secret=shop),
            ]
            assert await verified(edge, good) == 200
            answers += [await revoke(edge, good), await revoke(edge, good)]
            assert {(reply.status, reply.body) for reply in answers} == {(200, b"")}
            assert await verified(edge, good) == 401

    async def test_nobody_else_s_session_ends(self, edge: Edge) -> None:
        """Another visitor's, and another agent's of the same visitor: both are still good."""
        fingerprint = visitor()
        mine = (await edge.request_token(fingerprint)).token
        same_visitor = (await edge.request_token(fingerprint, agent="B2")).token
        other = await edge.request_token()
        await revoke(edge, mine)
        assert [await verified(edge, t) for t in (mine, same_visitor, other.token)] == [
            401,
            200,
            200,
        ]

    async def test_G9_it_stays_revoked_for_as_long_as_clocks_are_forgiven(self, edge: Edge) -> None:
        """In the last second of the leeway, too, and although records have expired."""
        minted = await edge.request_token()
        await revoke(edge, minted.token)
        ends = minted.json["data"]["expires_at"] + 60
        while edge.time.wall() < (ends - 1) * 1_000_000:
            edge.time.advance(min(600, ends - 1 - edge.time.wall() / 1_000_000 + 0.001))
            edge.app.housekeeping.do_round()
            told = await edge.get(VERIFY_PATH, X_Embed_Token=minted.token)
            assert (told.status, told.message) == (401, "token: revoked")

    async def test_G9_revoked_while_a_mint_is_in_flight(self, edge: Edge) -> None:
        """A renewal was under way: neither it nor the held token is handed out, to anybody."""
        fingerprint = visitor()
        held = await edge.request_token(fingerprint)
        begun, go = asyncio.Event(), asyncio.Event()
        mint = edge.app.parts.issuer.mint

        async def slow(request: object, turn: object) -> object:
            begun.set()
            await go.wait()
            return await mint(request, turn)  # type: ignore[arg-type]

        edge.mint_by(slow)
        asking = [
            asyncio.ensure_future(edge.request_token(fingerprint, fresh=True)) for _ in range(5)
        ]
        await begun.wait()
        await revoke(edge, held.token)
        go.set()
        replies = await asyncio.gather(*asking)
        assert {(r.status, r.code, r.header("Retry-After")) for r in replies} == {
            (503, "SERVICE_UNAVAILABLE", "1")
        }
        assert (await edge.admin("/metrics")).status == 200
        after = await edge.request_token(fingerprint)
        assert after.session != held.session
        assert await verified(edge, after.token) == 200
        session_store = edge.app.parts.session_store
        assert (len(session_store), await session_store.find(after.session) is not None) == (
            1,
            True,
        )

    async def test_G9_an_end_that_failed_half_way_is_completed_by_the_next(
        self, edge: Edge
    ) -> None:
        """The store is away for a moment: 503, no token is good, and the retry does the rest."""
        fingerprint = visitor()
        first = await edge.request_token(fingerprint)
        second = await edge.request_token(fingerprint, agent="B2")
        revoke_visitor = edge.app.parts.store.revoke_visitor
        edge.app.parts.store.revoke_visitor = away  # type: ignore[method-assign]
        refused = await revoke(edge, first.token)
        assert (refused.status, await verified(edge, first.token)) == (503, 401)
        edge.app.parts.store.revoke_visitor = revoke_visitor  # type: ignore[method-assign]
        assert (await revoke(edge, first.token)).status == 200
        assert (await edge.request_token(fingerprint)).session != first.session
        assert (await edge.request_token(fingerprint, agent="B2")).session != second.session
        assert first.session not in edge.app.parts.session_store
        assert edge.events("broker.session_ended") == [
            {
                "event": "broker.session_ended",
                "session": first.session,
                "client": "web",
                "by": "client",
                "level": "info",
                "timestamp": ANY,
            }
        ]

    async def test_a_client_s_limit_counts_its_revocations(self) -> None:
        """Where there is one: a stolen secret ends no more sessions than it may ask for."""
        tight = {"limits": {"client": {"rate": 60, "burst": 3}}}
        async with serving(tight) as edge:
            token = (await edge.request_token()).token
            assert [(await revoke(edge, "x")).status for _ in range(3)] == [200, 200, 429]
            refused = await revoke(edge, token)
            assert (refused.code, refused.header("Retry-After")) == ("RATE_LIMITED", "1")
            assert "limit client" in refused.message
            assert await verified(edge, token) == 200
            assert (await edge.scrape())['broker_rejections_total{limit="client"}'] == 2
            edge.time.advance(1)
            assert (await revoke(edge, token)).status == 200
            assert await verified(edge, token) == 401

    async def test_too_many_ends_are_refused_not_forgotten(self, edge: Edge) -> None:
        """503 and Retry-After; what was ended stays so."""
        edge.app.parts.session_store._most_ended = 2
        first, second = (await edge.request_token()).token, (await edge.request_token()).token
        assert (await revoke(edge, first)).status == 200
        refused = await revoke(edge, second)
        assert (refused.status, refused.code) == (503, "SERVICE_UNAVAILABLE")
        assert refused.header("Retry-After") == "60"
        assert [await verified(edge, token) for token in (first, second)] == [401, 200]

    async def test_G6_too_many_unknown_tokens_are_refused(
        self, edge: Edge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """503 and Retry-After, and what to do: the store has room for so many of a client."""

        async def full(_token: str) -> Session:
            raise NotRecorded("not handed out here")

        async def disown(_digest: bytes, _client: str) -> None:
            raise SessionsFull

        token = (await edge.request_token()).token
        with monkeypatch.context() as patch:
            patch.setattr(edge.app.parts.introspector, "_session_of", full)
            patch.setattr(edge.app.parts.session_store, "disown", disown)
            refused = await revoke(edge, "x")
        assert (refused.status, refused.code) == (503, "SERVICE_UNAVAILABLE")
        assert refused.header("Retry-After") == "60"
        assert "not on record" in refused.message
        assert (await revoke(edge, token)).status == 200
        assert await verified(edge, token) == 401


async def away(*_: object) -> None:
    """Stand for a store that does not answer."""
    raise ServiceUnavailable("the shared store is away", 1_000_000)


async def test_a_token_of_another_maker_with_the_key_is_good_but_nobody_s(edge: Edge) -> None:
    """Without `client_id` it opens the viewer; no client can ask about it or end it."""
    import jwt

    now = edge.time.wall() // 1_000_000
    claims = {"iss": "embed-token-broker", "aud": "embed", "sub": AGENT, "agent_id": AGENT}
    claims |= {"fingerprint": "beef", "sid": "s1"}
    dates = {"iat": now, "nbf": now, "exp": now + 60}
    token = jwt.encode({**claims, **dates}, edge.key, "HS256")
    assert await verified(edge, token) == 200
    assert (await introspect(edge, token)).body == INACTIVE
    await revoke(edge, token)
    assert await verified(edge, token) == 200
    without = jwt.encode({**claims, **dates, "sid": None}, edge.key, "HS256")
    assert await verified(edge, without) == 401


async def test_G7_nothing_of_a_token_is_logged(edge: Edge) -> None:
    """Verified, introspected, revoked, refused, at debug level: no token, no visitor."""
    fingerprint = visitor()
    token = (await edge.request_token(fingerprint)).token
    for bad in (token, token[:-4] + "AAAA"):
        await verified(edge, bad)
        await introspect(edge, bad)
        await revoke(edge, bad)
    log = edge.log.getvalue()
    assert json.loads(log.splitlines()[0])
    assert token not in log
    assert fingerprint not in log
