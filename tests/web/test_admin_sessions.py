"""Sessions on the admin listener: who may see them, what they show, how they end."""

import secrets
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import pytest
from edge import AGENT, OTHER_AGENT, Edge, Reply, serving, visitor

from broker.errors import ServiceUnavailable
from broker.web.token_status import VERIFY_PATH

PATH = "/v1/sessions"
ADMIN = secrets.token_urlsafe(24)


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    """A broker whose operator has a secret."""
    async with serving({"admin": {"secret": ADMIN}}) as edge:
        yield edge


async def look(edge: Edge, path: str = PATH, method: str = "GET", **query: str) -> Reply:
    """Ask as the operator."""
    target = f"{path}?{urlencode(query)}" if query else path
    return await edge.admin(target, method, **{"api-secret": ADMIN})


async def good(edge: Edge, token: str) -> bool:
    """Whether a proxy would let it in."""
    return (await edge.get(VERIFY_PATH, X_Embed_Token=token)).status == 200


class TestTheDoor:
    async def test_without_a_configured_secret_the_routes_do_not_exist(self) -> None:
        """404 for whoever asks, with any secret."""
        async with serving() as edge:
            for path in (PATH, f"{PATH}/x"):
                for method in ("GET", "DELETE"):
                    reply = await edge.admin(path, method, **{"api-secret": edge.secret})
                    assert (reply.status, reply.code) == (404, "NOT_FOUND")

    async def test_only_the_operator_s_secret_opens_them(self, edge: Edge) -> None:
        """Not none, not a client's; in either header; never from a browser."""
        for method, path in (("GET", PATH), ("GET", f"{PATH}/x"), ("DELETE", f"{PATH}/x")):
            bare = await edge.admin(path, method)
            assert (bare.status, bare.code) == (401, "MISSING_AUTH")
            assert bare.header("WWW-Authenticate") == "Bearer"
            client = await edge.admin(path, method, **{"api-secret": edge.secret})
            assert (client.status, client.code) == (401, "UNAUTHORIZED")
            assert bare.message == "api-secret: missing; send the admin secret in this header"
            assert client.message == "unknown admin secret: check it against the broker's [admin]"
            browser = {"api-secret": ADMIN, "Origin": "https://x.example"}
            assert (await edge.admin(path, method, **browser)).status == 403
        bearer = {"Authorization": f"Bearer {ADMIN}"}
        assert (await edge.admin(f"{PATH}?agent_id=A1", **bearer)).status == 200
        asked = await edge.request_token(secret=ADMIN)
        assert asked.status == 401

    async def test_guesses_are_throttled_and_the_right_secret_passes(self, edge: Edge) -> None:
        """As on the data listener, and apart from it."""
        for _ in range(30):
            wrong = {"api-secret": secrets.token_urlsafe(24)}
            assert (await edge.admin(PATH, **wrong)).status == 401
        throttled = await edge.admin(PATH, **{"api-secret": "x"})
        assert (throttled.status, throttled.header("Retry-After")) == (429, "2")
        assert (await look(edge, agent_id=AGENT)).status == 200
        assert (await edge.fail_to_log_in()).status == 401

    async def test_M1_guesses_are_forgotten_in_time(self, edge: Edge) -> None:
        """An address that has not failed for a while takes no room, as on the data listener."""
        await edge.admin(PATH, **{"api-secret": "x"})
        await edge.fail_to_log_in()
        parts = edge.app.parts
        assert parts.admin_authenticator is not None
        tables = [parts.admin_authenticator.failures, parts.authenticator.failures]
        assert [len(table) for table in tables] == [1, 1]
        edge.time.advance(120)
        await edge.app.housekeeping.purge()
        assert [len(table) for table in tables] == [0, 0]

    async def test_guesses_are_counted_and_a_leaked_secret_is_told(self, edge: Edge) -> None:
        """As on the data listener: an operator sees both; the leak once a minute."""
        for _ in range(33):
            await edge.admin(PATH, **{"api-secret": "x"})
        assert (await edge.scrape())['broker_rejections_total{limit="auth"}'] == 3
        for _ in range(3):
            browser = {"api-secret": ADMIN, "Origin": "https://x.example"}
            assert (await edge.admin(PATH, **browser)).status == 403
        (event,) = edge.events("broker.secret_in_browser")
        assert (event["client"], event["level"]) == ("admin", "error")

    async def test_metrics_and_probes_stay_open(self, edge: Edge) -> None:
        """A scraper has no secret."""
        for path in ("/metrics", "/livez", "/readyz"):
            assert (await edge.admin(path)).status == 200


class TestListing:
    async def test_a_session_is_shown_whole(self, edge: Edge) -> None:
        """In the list and by its id, every field; not its token."""
        fingerprint = visitor()
        minted = await edge.request_token(fingerprint, model="essence")
        shown = {
            "session_id": minted.session,
            "client": "web",
            "agent_id": AGENT,
            "fingerprint": fingerprint,
            "model": "essence",
            "issued_at": edge.time.wall() // 1_000_000,
            "expires_at": minted.json["data"]["expires_at"],
        }
        listed = await look(edge, agent_id=AGENT)
        assert listed.json == {"sessions": [shown], "next": None}
        assert listed.header("Cache-Control") == "no-store"
        assert (await look(edge, f"{PATH}/{minted.session}")).json == shown
        assert minted.token not in listed.text

    async def test_a_reused_token_is_one_session(self, edge: Edge) -> None:
        """However often it is handed out, and also when reuse has dropped it."""
        fingerprint = visitor()
        for _ in range(3):
            await edge.request_token(fingerprint)
        edge.app.parts.token_cache.clear()
        assert len((await look(edge, agent_id=AGENT)).json["sessions"]) == 1

    async def test_pages_lead_to_each_other(self, edge: Edge) -> None:
        """Each session once; the last page says that it is the last."""
        made = {(await edge.request_token()).session for _ in range(7)}
        seen: list[str] = []
        query = {"agent_id": AGENT, "limit": "3"}
        after, pages = "", 0
        while True:
            page = (await look(edge, **query, **({"after": after} if after else {}))).json
            seen += [session["session_id"] for session in page["sessions"]]
            pages += 1
            if page["next"] is None:
                break
            after = page["next"]
        assert (pages, len(seen), set(seen)) == (3, 7, made)
        whole = (await look(edge, agent_id=AGENT, limit="7")).json
        assert (len(whole["sessions"]), whole["next"]) == (7, None)  # full, and the last

    async def test_by_agent_and_by_visitor(self, edge: Edge) -> None:
        """What an operator is asked about: an agent, or the fingerprint of somebody's device."""
        fingerprint = visitor()
        mine = await edge.request_token(fingerprint)
        other = await edge.request_token(fingerprint, agent=OTHER_AGENT)
        await edge.request_token()

        async def ids(**query: str) -> list[str]:
            return [s["session_id"] for s in (await look(edge, **query)).json["sessions"]]

        assert set(await ids(fingerprint=fingerprint)) == {mine.session, other.session}
        assert await ids(agent_id=OTHER_AGENT) == [other.session]
        assert await ids(agent_id=AGENT, fingerprint=fingerprint) == [mine.session]
        assert await ids(agent_id="nobody") == []

    @pytest.mark.parametrize(
        "query",
        [
            {},
            {"agent_id": ""},
            {"agent_id": "A1", "limit": "0"},
            {"agent_id": "A1", "limit": "1001"},
            {"agent_id": "A1", "limit": "-1"},
            {"agent_id": "A1", "limit": "0" * 5000 + "1"},
            {"agent_id": "A1", "after": "1" * 5000 + ".x"},
            {"agent_id": "A1", "limit": "ten"},
            {"agent_id": "A1", "limit": "٣"},
            {"agent_id": "A1", "after": "x"},
            {"agent_id": "A1", "after": "1e5.x"},
            {"agent": "A1"},
            {"agent_id": "A1", "offset": "10"},
        ],
        ids=str,
    )
    async def test_a_query_that_is_not_understood_is_400(
        self, edge: Edge, query: dict[str, str]
    ) -> None:
        """Nobody named, a number that is none, a misspelt filter."""
        reply = await look(edge, **query)
        assert (reply.status, reply.code) == (400, "VALIDATION_ERROR")


class TestEnding:
    async def test_G9_an_ended_session_is_over_once_the_answer_is_there(self, edge: Edge) -> None:
        """Not good, not listed, not handed out again; the second time it is unknown."""
        fingerprint = visitor()
        minted = await edge.request_token(fingerprint)
        path = f"{PATH}/{minted.session}"
        ended = await look(edge, path, "DELETE")
        assert (ended.status, ended.json) == (200, {"ended": 1})
        assert not await good(edge, minted.token)
        assert (await look(edge, agent_id=AGENT)).json["sessions"] == []
        for method in ("GET", "DELETE"):
            gone = await look(edge, path, method)
            assert (gone.status, gone.code) == (404, "NOT_FOUND")
        assert (await edge.request_token(fingerprint)).session != minted.session

    async def test_G9_an_end_that_failed_half_way_can_be_asked_for_again(self, edge: Edge) -> None:
        """503 while the store is away; the session is still found, and then it is over."""
        minted = await edge.request_token()
        path = f"{PATH}/{minted.session}"
        revoke_visitor = edge.app.parts.store.revoke_visitor

        async def away(*_: object) -> None:
            raise ServiceUnavailable("the shared store is away", 1_000_000)

        edge.app.parts.store.revoke_visitor = away  # type: ignore[method-assign]
        assert (await look(edge, path, "DELETE")).status == 503
        assert not await good(edge, minted.token)
        edge.app.parts.store.revoke_visitor = revoke_visitor  # type: ignore[method-assign]
        assert (await look(edge, path, "DELETE")).json == {"ended": 1}
        assert (await look(edge, path, "DELETE")).status == 404
        (event,) = edge.events("broker.session_ended")
        assert (event["session"], event["by"]) == (minted.session, "operator")

    async def test_N21_all_of_a_visitor_s_are_ended_by_the_retry_of_an_end_that_failed(
        self, edge: Edge
    ) -> None:
        """The session that was named goes last: by it the others are found again.

        However many were over before the store went away: 503, and then none is left.
        """
        for broken_at in (1, 2, 3):
            fingerprint = visitor()
            made = [
                await edge.request_token(fingerprint, agent=agent) for agent in ("A1", "A2", "A3")
            ]
            path = f"{PATH}/{made[1].session}"
            revoke_visitor, calls = edge.app.parts.store.revoke_visitor, 0

            async def away(*who: str, at: int = broken_at, end: Any = revoke_visitor) -> None:
                nonlocal calls
                calls += 1
                if calls == at:
                    raise ServiceUnavailable("the shared store is away", 1_000_000)
                await end(*who)

            edge.app.parts.store.revoke_visitor = away  # type: ignore[method-assign]
            refused = await look(edge, path, "DELETE", scope="visitor")
            assert (refused.status, calls) == (503, broken_at)
            again = await look(edge, path, "DELETE", scope="visitor")
            assert again.json == {"ended": 3 - (broken_at - 1)}
            assert (await look(edge, fingerprint=fingerprint)).json["sessions"] == []
            assert [await good(edge, each.token) for each in made] == [False] * 3
            edge.app.parts.store.revoke_visitor = revoke_visitor  # type: ignore[method-assign]

    async def test_one_session_of_a_visitor_or_all_of_them(self, edge: Edge) -> None:
        """`scope=visitor` ends what the visitor has with other agents, too; nobody else's."""
        fingerprint = visitor()
        first, second, third = [
            await edge.request_token(fingerprint, agent=agent) for agent in ("A1", "A2", "A3")
        ]
        other = await edge.request_token()
        await look(edge, f"{PATH}/{first.session}", "DELETE", scope="session")
        assert [await good(edge, r.token) for r in (first, second, third)] == [False, True, True]
        ended = await look(edge, f"{PATH}/{second.session}", "DELETE", scope="visitor")
        assert ended.json == {"ended": 2}
        assert not await good(edge, third.token)
        assert await good(edge, other.token)

    async def test_a_visitor_is_one_client_s(self) -> None:
        """The same fingerprint at another client is another visitor."""
        shop = secrets.token_urlsafe(24)
        tree = {
            "admin": {"secret": ADMIN},
            "clients": {"shop": {"secret": shop, "agents": ["*"]}},
        }
        async with serving(tree) as edge:
            fingerprint = visitor()
            mine, theirs = (
                await edge.request_token(fingerprint),
                await edge.request_token(fingerprint, secret=shop),
            )
            ended = await look(edge, f"{PATH}/{mine.session}", "DELETE", scope="visitor")
            assert ended.json == {"ended": 1}
            assert await good(edge, theirs.token)

    async def test_what_cannot_be_ended_says_so(self, edge: Edge) -> None:
        """Unknown ids, another scope, another method."""
        for name in ("x", "..", "%00", "%C3%A9", "x" * 3000):
            assert (await look(edge, f"{PATH}/{name}", "DELETE")).status == 404
        minted = await edge.request_token()
        path = f"{PATH}/{minted.session}"
        assert (await look(edge, path, "DELETE", scope="all")).status == 400
        assert await good(edge, minted.token)
        posted = await look(edge, path, "POST")
        assert (posted.status, posted.header("Allow")) == (405, "DELETE, GET, HEAD")


async def test_M3_checks_and_ends_are_counted(edge: Edge) -> None:
    """Every question by its verdict, every end once, and what is on record now."""
    kept, gone = await edge.request_token(), await edge.request_token()
    for token in (kept.token, gone.token, "bad"):
        await good(edge, token)
    await look(edge, f"{PATH}/{gone.session}", "DELETE")
    await look(edge, f"{PATH}/{gone.session}", "DELETE")
    scrape = await edge.scrape()
    assert scrape['broker_token_checks_total{verdict="good"}'] == 2
    assert scrape['broker_token_checks_total{verdict="refused"}'] == 1
    assert scrape["broker_sessions_ended_total"] == 1
    assert scrape["broker_sessions_recorded"] == 1
