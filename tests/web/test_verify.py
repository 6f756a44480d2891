"""The question of proxies, byte by byte: is this token good?  Rows O2 and O5."""

import secrets
from collections.abc import Iterable

import pytest
from edge import AGENT, OTHER_AGENT, Edge, Reply, request, serving, visitor

from broker.rules.forwarded import tokens_in
from broker.web.token_status import VERIFY_PATH

PROXY = {"server": {"trusted_proxies": ["127.0.0.1"]}}
HOUR = 3600


async def verify(
    edge: Edge,
    *headers: tuple[str, str],
    path: str = VERIFY_PATH,
    method: str = "GET",
    source: str | None = None,
) -> Reply:
    """Ask as a proxy does."""
    sent = request(method, path, headers)
    return await edge.raw(sent, bodyless=method == "HEAD", source=source)


async def token_of(edge: Edge, fingerprint: str | None = None, agent: str = AGENT) -> str:
    """Have a token minted."""
    return (await edge.request_token(fingerprint or visitor(), agent=agent)).token


def told(reply: Reply) -> dict[str, str]:
    """Return what a proxy learns of the token."""
    return {name: value for name, value in reply.headers if name.startswith("X-Embed-")}


class TestAnswers:
    async def test_a_good_token_is_answered_with_whose_it_is_and_nothing_else(
        self, edge: Edge
    ) -> None:
        """200, an empty body, every header."""
        fingerprint = visitor()
        minted = await edge.request_token(fingerprint)
        reply = await verify(edge, ("Authorization", f"Bearer {minted.token}"))
        assert (reply.status, reply.body) == (200, b"")
        assert [name for name, _ in reply.headers] == [
            "Content-Type",
            "Content-Length",
            "Cache-Control",
            "X-Content-Type-Options",
            "Date",
            "X-Request-Id",
            "X-Embed-Session",
            "X-Embed-Agent",
            "X-Embed-Fingerprint",
            "X-Embed-Expires",
        ]
        assert told(reply) == {
            "X-Embed-Session": minted.session,
            "X-Embed-Agent": AGENT,
            "X-Embed-Fingerprint": fingerprint,
            "X-Embed-Expires": str(minted.json["data"]["expires_at"]),
        }

    @pytest.mark.parametrize(
        "method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"]
    )
    async def test_any_method_is_answered(self, edge: Edge, method: str) -> None:
        """A proxy may ask with its client's."""
        good = ("X-Embed-Token", await token_of(edge))
        assert (await verify(edge, good, method=method)).status == 200
        assert (await verify(edge, method=method)).status == 401

    async def test_no_body_is_waited_for(self, edge: Edge) -> None:
        """A proxy that passes on its client's Content-Length and no body gets its answer."""
        good = ("X-Embed-Token", await token_of(edge))
        reply = await verify(edge, good, ("Content-Length", "1000000"), method="POST")
        assert reply.status == 200

    async def test_a_missing_token_is_401_with_a_challenge(self, edge: Edge) -> None:
        """Also an empty one, and a scheme that is not ours."""
        for headers in ([], [("Authorization", "Basic YTpi")], [("X-Embed-Token", "")]):
            reply = await verify(edge, *headers)
            assert (reply.status, reply.code) == (401, "MISSING_AUTH")
            assert reply.header("WWW-Authenticate") == "Bearer"
            assert told(reply) == {}

    async def test_an_empty_header_beside_a_good_token_is_no_second_one(self, edge: Edge) -> None:
        """A proxy sends it that fills it from a variable without a value."""
        bearer = ("Authorization", f"Bearer {await token_of(edge)}")
        assert (await verify(edge, bearer, ("X-Embed-Token", ""))).status == 200

    async def test_O2_a_bad_token_is_401_and_says_why_without_quoting_it(self, edge: Edge) -> None:
        """Damaged, foreign, random, empty parts, far too long for a token."""
        good = await token_of(edge)
        async with serving() as other:
            foreign = await token_of(other)
        header, claims, _ = good.split(".")
        for bad in (
            good[:-2] + ("AA" if not good.endswith("AA") else "BB"),
            foreign,
            f"{header}.{claims}.",
            f"{header}.{claims}",
            secrets.token_urlsafe(60),
            "null",
            "a" * 8000,
        ):
            reply = await verify(edge, ("X-Embed-Token", bad))
            assert (reply.status, reply.code) == (401, "UNAUTHORIZED"), bad
            assert reply.header("WWW-Authenticate") == "Bearer"
            assert bad not in reply.text
            assert told(reply) == {}

    async def test_a_token_is_good_until_it_has_expired_and_a_minute_for_clocks(self) -> None:
        """The last moment of the leeway counts, the next does not."""
        async with serving() as edge:
            minted = await edge.request_token(visitor())
            good = ("X-Embed-Token", minted.token)
            ends = minted.json["data"]["expires_at"] + 60
            edge.time.advance((ends * 1_000_000 - 1 - edge.time.wall()) / 1_000_000)
            assert (await verify(edge, good)).status == 200
            edge.time.advance(0.000001)
            reply = await verify(edge, good)
            assert (reply.status, reply.message) == (401, "token: expired")

    async def test_a_token_of_another_agent_than_the_one_required_is_403(self, edge: Edge) -> None:
        """Every agent that is stated has to be the token's, however often it is stated."""
        good = ("X-Embed-Token", await token_of(edge))
        mine, other = (("X-Embed-Require-Agent", name) for name in (AGENT, OTHER_AGENT))
        assert (await verify(edge, good, mine)).status == 200
        for stated in ([other], [mine, other], [other, mine], [("X-Embed-Require-Agent", "")]):
            reply = await verify(edge, good, *stated)
            assert (reply.status, reply.code) == (403, "AGENT_NOT_ALLOWED")
            assert told(reply) == {}
        assert (await verify(edge, other)).status == 401

    async def test_a_visitor_s_name_cannot_break_the_head(self) -> None:
        """What is not visible ASCII is percent-encoded, and so is the sign of escapes."""
        async with serving({"limits": {"fingerprint_format": "any"}}) as edge:
            good = ("X-Embed-Token", await token_of(edge, "zoé 100%"))
            assert told(await verify(edge, good))["X-Embed-Fingerprint"] == "zo%C3%A9%20100%25"


def uri(token: str, path: str = "/viewer") -> str:
    """Return what a viewer is opened with."""
    return f"{path}?lang=en&token={token}&x=1"


class TestForwardedUris:
    """Row O5: whose word on the original URI counts, and what it can do."""

    @pytest.mark.parametrize("name", ["X-Original-URI", "X-Forwarded-Uri", "X-Original-URL"])
    async def test_O5_a_trusted_proxy_s_uri_counts(self, name: str) -> None:
        """In any of its forms, with the token anywhere in the query."""
        async with serving(PROXY) as edge:
            token = await token_of(edge)
            for form in (
                uri(token),
                f"/?token={token}",
                f"?token={token}",
                f"https://viewer.example/a/b?token={token}",
                f"/viewer?%74oken={token.replace('.', '%2E')}",
                f"/viewer?token={token}&token={token}",
                f"//?&&=&token={token}&",
            ):
                reply = await verify(edge, (name, form))
                assert reply.status == 200, (form, reply.body)

    @pytest.mark.parametrize("name", ["X-Original-URI", "X-Forwarded-Uri", "X-Original-URL"])
    async def test_O5_anybody_else_s_uri_does_not_count(self, name: str) -> None:
        """Not without a trusted proxy, nor from another address than its; the remedy is told."""
        async with serving() as edge:
            reply = await verify(edge, (name, uri(await token_of(edge))))
            assert reply.status == 401
            assert "server.trusted_proxies" in reply.message
        async with serving({"server": {"trusted_proxies": ["127.0.0.9"]}}) as edge:
            forwarded = (name, uri(await token_of(edge)))
            assert (await verify(edge, forwarded)).status == 401
            via = ("X-Forwarded-For", "127.0.0.9")
            assert (await verify(edge, forwarded, via)).status == 401
            assert (await verify(edge, forwarded, source="127.0.0.9")).status == 200

    async def test_O5_an_untrusted_uri_cannot_spoil_a_good_token(self) -> None:
        """Whoever may not speak is not heard, for good or ill."""
        async with serving() as edge:
            good = ("X-Embed-Token", await token_of(edge))
            forged = ("X-Forwarded-Uri", uri("other"))
            assert (await verify(edge, good, forged)).status == 200

    @pytest.mark.parametrize(
        "places",
        [
            ("Authorization", "X-Embed-Token"),
            ("X-Original-URI", "X-Forwarded-Uri"),
            ("X-Original-URI", "X-Original-URI"),
            ("X-Forwarded-Uri", "X-Embed-Token"),
            ("X-Embed-Token", "X-Embed-Token"),
            ("Authorization", "Authorization"),
            ("Authorization", "X-Original-URI"),
        ],
        ids="+".join,
    )
    async def test_O5_two_tokens_that_differ_open_nothing(self, places: tuple[str, str]) -> None:
        """Whichever place is the proxy's and whichever the client's: a good one hides no other.

        Twice the same is one.
        """
        async with serving(PROXY) as edge:
            good, other = await token_of(edge), await token_of(edge)
            for first, second in ((good, other), (good, "bad"), ("bad", good)):
                sent = [header(places[0], first), header(places[1], second)]
                reply = await verify(edge, *sent)
                assert (reply.status, reply.code) == (401, "UNAUTHORIZED")
                assert "two different" in reply.message
            sent = [header(place, good) for place in places]
            assert (await verify(edge, *sent)).status == 200

    async def test_O5_two_tokens_in_one_uri_open_nothing(self) -> None:
        """A viewer may read the first or the last of them: neither is known to be checked."""
        async with serving(PROXY) as edge:
            good = await token_of(edge)
            for form in (
                f"/?token={good}&token=bad",
                f"/?token=bad&token={good}",
                f"/?token={good}&%74oken=bad",
                f"/?token=&token={good}",
                f"/?token&token={good}",
                f"/?token={good}#",
                f"/?token={good}#&token=bad",
                f"/?a#token={good}",
            ):
                assert (await verify(edge, ("X-Original-URI", form))).status == 401

    @pytest.mark.parametrize(
        "form",
        [
            "/viewer/{}",
            "/viewer?Token={}",
            "/viewer?atoken={}",
            "/viewer?x=token={}",
            "/viewer;token={}",
            "token={}",
            "/viewer?token[]={}",
            "/viewer?token =%20{}",
        ],
    )
    async def test_O5_what_is_not_the_parameter_is_not_the_token(self, form: str) -> None:
        """Only `token`, in the query, spelt so."""
        async with serving(PROXY) as edge:
            reply = await verify(edge, ("X-Original-URI", form.format(await token_of(edge))))
            assert (reply.status, reply.code) == (401, "MISSING_AUTH")

    async def test_O5_an_empty_token_in_a_uri_is_no_leave_for_one_elsewhere(self) -> None:
        """The viewer would read the URI; other credentials than ours may stand beside a token."""
        async with serving(PROXY) as edge:
            good = await token_of(edge)
            for place in ("Authorization", "X-Embed-Token"):
                sent = [header(place, good), ("X-Original-URI", "/?token=")]
                assert (await verify(edge, *sent)).status == 401
            sent = [("Authorization", "Basic YTpi"), ("X-Original-URI", uri(good))]
            assert (await verify(edge, *sent)).status == 200

    async def test_O5_envoy_appends_the_uri_to_the_path(self) -> None:
        """Below the route, from a trusted proxy: the rest is the URI that its client asked for."""
        async with serving(PROXY) as edge:
            token = await token_of(edge)
            for rest in (f"/viewer?token={token}", f"?token={token}", f"/?a=b&token={token}"):
                assert (await verify(edge, path=VERIFY_PATH + rest)).status == 200
            assert (await verify(edge, path=f"{VERIFY_PATH}/viewer?token=bad")).status == 401
            assert (await verify(edge, path=f"{VERIFY_PATH}/viewer")).status == 401
            absolute = f"http://broker{VERIFY_PATH}/viewer?token={token}"
            assert (await verify(edge, path=absolute)).status == 200
        async with serving() as edge:
            rest = f"/viewer?token={await token_of(edge)}"
            assert (await verify(edge, path=VERIFY_PATH + rest)).status == 401

    async def test_O5_no_path_prefix_and_no_user_agent_opens_anything(self) -> None:
        """Near misses of the route are no route; a probe's name is no token."""
        async with serving(PROXY) as edge:
            token = await token_of(edge)
            for path in (f"{VERIFY_PATH}x", f"/x{VERIFY_PATH}", f"/{VERIFY_PATH}"):
                assert (await verify(edge, ("X-Embed-Token", token), path=path)).status == 404
            for agent in ("kube-probe/1.30", "GoogleHC/1.0", "ELB-HealthChecker/2.0"):
                for target in ("/healthz", "/robots.txt", "/favicon.ico", "/.well-known/x"):
                    sent = [("User-Agent", agent), ("X-Original-URI", target)]
                    assert (await verify(edge, *sent)).status == 401

    @pytest.mark.parametrize(
        "form", ["", "?", "/?token", "/?token=", "/?token=%", "/?token=%ff%fe", "/?" + "&" * 5000]
    )
    async def test_O5_a_strange_uri_is_401(self, form: str) -> None:
        """Empty, broken escapes, thousands of parts: an answer, and no token."""
        async with serving(PROXY) as edge:
            assert (await verify(edge, ("X-Forwarded-Uri", form))).status == 401


def header(place: str, token: str) -> tuple[str, str]:
    """Put a token into one of its places."""
    forms = {"Authorization": f"Bearer {token}", "X-Embed-Token": token}
    return place, forms.get(place, uri(token))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("/a?token=x", ["x"]),
        ("/a?token=x+y%2Bz", ["x y+z"]),
        ("/a?b=c&token=1&token=2", ["1", "2"]),
        ("/a?token", [""]),
        ("/a", []),
        ("", []),
    ],
)
def test_tokens_are_read_from_a_query(text: str, tokens: Iterable[str]) -> None:
    """As a form would decode them."""
    assert list(tokens_in(text)) == list(tokens)
