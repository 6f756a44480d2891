"""Who gets in, who is throttled, and whose word on addresses counts."""

import ipaddress
import secrets
from collections.abc import Sequence

import pytest
from edge import TOKEN_PATH, Edge, Reply, request, serving, visitor
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from broker.errors import AgentNotAllowed, Invalid, MissingAuth
from broker.web.auth import Client, ClientAuthenticator, secret_of

Headers = list[tuple[str, str]]


async def request_with(edge: Edge, *headers: tuple[str, str], source: str | None = None) -> Reply:
    """Ask for a token with exactly these headers."""
    body = b'{"agent_id":"a","fingerprint":"%s"}' % visitor().encode()
    return await edge.raw(request("POST", TOKEN_PATH, headers, body), source=source)


class TestSecret:
    @pytest.mark.parametrize(
        "form", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer   {}", "Bearer {}  "]
    )
    async def test_bearer_is_the_same_as_api_secret(self, edge: Edge, form: str) -> None:
        """The scheme is read without regard to case (RFC 9110 section 11.1)."""
        reply = await request_with(edge, ("Authorization", form.format(edge.secret)))
        assert reply.status == 200

    @pytest.mark.parametrize("name", ["api-secret", "API-Secret", "Api-Secret"])
    async def test_header_names_are_read_without_regard_to_case(
        self, edge: Edge, name: str
    ) -> None:
        """As HTTP demands."""
        assert (await request_with(edge, (name, edge.secret))).status == 200

    @pytest.mark.parametrize(
        ("headers", "status", "code"),
        [
            ([], 401, "MISSING_AUTH"),
            ([("api-secret", "")], 401, "MISSING_AUTH"),
            ([("api-secret", "   ")], 401, "MISSING_AUTH"),
            ([("Authorization", "Bearer")], 401, "MISSING_AUTH"),
            ([("Authorization", "Bearer ")], 401, "MISSING_AUTH"),
            ([("Authorization", "Basic YTpi")], 401, "MISSING_AUTH"),
            ([("Authorization", "SECRET")], 401, "MISSING_AUTH"),
            ([("api-secret", "x")], 401, "UNAUTHORIZED"),
            ([("api-secret", "SECRETx")], 401, "UNAUTHORIZED"),
            ([("api-secret", "Bearer SECRET")], 401, "UNAUTHORIZED"),
            ([("api-secret", "\u00e9\u202e")], 401, "UNAUTHORIZED"),
            ([("api-secret", "x" * 8000)], 401, "UNAUTHORIZED"),
            ([("Authorization", "Bearer x")], 401, "UNAUTHORIZED"),
            ([("api-secret", "x"), ("Authorization", "Bearer SECRET")], 401, "UNAUTHORIZED"),
            ([("api-secret", "SECRET"), ("api-secret", "SECRET")], 400, "VALIDATION_ERROR"),
            ([("api-secret", "SECRET"), ("API-SECRET", "x")], 400, "VALIDATION_ERROR"),
            ([("api-secret", "x"), ("api-secret", "SECRET")], 400, "VALIDATION_ERROR"),
            (
                [("Authorization", "Bearer SECRET"), ("Authorization", "Bearer SECRET")],
                400,
                "VALIDATION_ERROR",
            ),
        ],
    )
    async def test_what_is_not_one_known_secret_is_refused(
        self, edge: Edge, headers: Headers, status: int, code: str
    ) -> None:
        """No secret, another's, two at once: each has its code, and none gets a token."""
        own = [(name, value.replace("SECRET", edge.secret)) for name, value in headers]
        reply = await request_with(edge, *own)
        assert (reply.status, reply.code) == (status, code)
        assert edge.secret not in reply.text

    @given(st.lists(st.text(max_size=20), max_size=3), st.lists(st.text(max_size=20), max_size=3))
    def test_a_secret_is_found_or_one_of_two_errors_is_raised(
        self, given_secrets: list[str], authorizations: list[str]
    ) -> None:
        """Whatever headers come: one secret, or MissingAuth, or Invalid."""
        headers = CIMultiDict([("api-secret", value) for value in given_secrets])
        headers.extend([("authorization", value) for value in authorizations])
        try:
            secret = secret_of(CIMultiDictProxy(headers))
        except (MissingAuth, Invalid):
            return
        assert secret in given_secrets or any(secret in value for value in authorizations)


class TestBrowsers:
    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ([], 200),
            ([("Origin", "https://site.example")], 403),
            ([("Origin", "null")], 403),
            ([("Origin", "")], 403),
            ([("origin", "http://127.0.0.1:8080")], 403),
            ([("Sec-Fetch-Mode", "cors")], 200),
            ([("Sec-Fetch-Mode", "cors"), ("Sec-Fetch-Site", "cross-site")], 200),
            ([("Referer", "https://site.example/")], 200),
            ([("User-Agent", "Mozilla/5.0 (X11; Linux x86_64) Chrome/130")], 200),
            ([("Sec-Fetch-Mode", "cors"), ("Origin", "https://site.example")], 403),
        ],
    )
    async def test_origin_alone_makes_a_browser(
        self, edge: Edge, headers: Headers, status: int
    ) -> None:
        """Node's own fetch sends `Sec-Fetch-Mode: cors` from a server and must work."""
        reply = await edge.request_token(headers=headers)
        assert reply.status == status
        if status == 403:
            assert reply.code == "SECRET_IN_BROWSER"
            scraped = await edge.scrape()
            assert scraped['broker_requests_total{outcome="forbidden"}'] == 1

    async def test_every_client_whose_secret_leaked_is_named_on_every_route(self) -> None:
        """Each once a minute, whatever the others do: somebody has to replace each of them."""
        shop = secrets.token_urlsafe(24)
        async with serving(
            {"clients": {"shop": {"secret": shop, "agents": ["*"]}}}, level="info"
        ) as edge:
            headers = [("Origin", "https://site.example")]
            for _ in range(2):
                await edge.request_token(headers=headers)
                for path in ("/v1/introspect", "/v1/revoke", "/v1/validate"):
                    reply = await edge.post(b"", path=path, secret=shop, headers=headers)
                    assert reply.code == "SECRET_IN_BROWSER"
            told = edge.events("broker.secret_in_browser")
            assert [event["client"] for event in told] == ["web", "shop"]
            edge.time.advance(61)
            await edge.post(b"", path="/v1/revoke", secret=shop, headers=headers)
            assert [event["client"] for event in edge.events("broker.secret_in_browser")][2:] == [
                "shop"
            ]

    async def test_an_origin_without_a_known_secret_is_only_unauthorized(self, edge: Edge) -> None:
        """Nothing has leaked: there is no secret to warn about."""
        reply = await edge.request_token(secret="x", headers=[("Origin", "https://site.example")])
        assert (reply.status, reply.code) == (401, "UNAUTHORIZED")

    async def test_allow_origin_header_is_for_that_client_alone(self) -> None:
        """A proxy that adds the secret to browsers' requests is one client, not all of them."""
        proxy = secrets.token_urlsafe(24)
        section = {"secret": proxy, "agents": ["*"], "allow_origin_header": True}
        async with serving({"clients": {"proxy": section}}) as edge:
            headers = [("Origin", "https://site.example")]
            allowed = await edge.request_token(secret=proxy, headers=headers)
            assert allowed.status == 200
            assert not [name for name, _ in allowed.headers if name.startswith("Access-Control")]
            assert (await edge.request_token(headers=headers)).status == 403
            path = "/v1/validate"
            assert (await edge.post(b"", path=path, secret=proxy, headers=headers)).status == 200
            assert (await edge.post(b"", path=path, headers=headers)).status == 403

    async def test_development_pages_may_use_the_secret_from_their_own_origin(self) -> None:
        """The docs page mints a token; a page elsewhere still may not."""
        async with serving({"server": {"docs": True}}, dev=True) as edge:
            own = [edge.app.url, f"http://localhost:{edge.port}"]
            replies = [await edge.request_token(headers=[("Origin", origin)]) for origin in own]
            assert [reply.status for reply in replies] == [200, 200]
            other = await edge.request_token(
                headers=[("Origin", f"http://localhost:{edge.port + 1}")]
            )
            assert other.code == "SECRET_IN_BROWSER"

    async def test_docs_without_development_exempt_no_origin(self) -> None:
        """In production the documentation is to be read, not to be fed with secrets."""
        async with serving({"server": {"docs": True}}) as edge:
            reply = await edge.request_token(headers=[("Origin", edge.app.url)])
            assert reply.code == "SECRET_IN_BROWSER"


class TestThrottle:
    async def test_an_address_that_keeps_failing_is_throttled_and_a_valid_secret_passes(
        self, edge: Edge
    ) -> None:
        """Thirty failures, then 429 with the headers of `auth`; a client is never locked out."""
        for left in range(30):
            reply = await edge.fail_to_log_in()
            assert (reply.status, left) == (401, left)
        reply = await edge.fail_to_log_in()
        assert (reply.status, reply.code) == (429, "RATE_LIMITED")
        assert reply.message == "limit auth reached: retry after the time in Retry-After"
        now = edge.time.wall() // 1_000_000
        assert reply.headers[6:] == (
            ("X-RateLimit-Limit", "30"),
            ("RateLimit-Policy", '"auth";q=30;w=60'),
            ("X-RateLimit-Remaining", "0"),
            ("X-RateLimit-Reset", str(now + 61)),
            ("RateLimit", '"auth";r=0;t=2'),
            ("Retry-After", "2"),
        )
        assert (await edge.request_token()).status == 200
        edge.time.advance(1.999)
        assert (await edge.fail_to_log_in()).status == 429
        edge.time.advance(0.001)
        assert (await edge.fail_to_log_in()).status == 401

    async def test_missing_secrets_and_validate_share_the_throttle(self, edge: Edge) -> None:
        """There is no second door to guess at; every 429 of it is counted."""
        wrong = secrets.token_urlsafe(24)
        for _ in range(10):
            assert (await request_with(edge)).status == 401
            assert (await edge.fail_to_log_in()).status == 401
            validated = await edge.post(b"", path="/v1/validate", secret=wrong)
            assert validated.json == {"valid": False}
        replies = [
            await request_with(edge),
            await edge.fail_to_log_in(),
            await edge.post(b"", path="/v1/validate", secret=wrong),
            await edge.post(b"", path="/v1/validate", secret=wrong),
        ]
        assert [reply.code for reply in replies] == ["RATE_LIMITED"] * 4
        assert [reply.header("Retry-After") for reply in replies] == ["2"] * 4
        assert (await edge.post(b"", path="/v1/validate")).json == {"valid": True}
        scraped = await edge.scrape()
        assert scraped['broker_rejections_total{limit="auth"}'] == 4

    async def test_other_errors_are_no_failed_log_in(self, edge: Edge) -> None:
        """A client with a bug in its bodies is not throttled for its secret."""
        for _ in range(40):
            assert (await edge.post(b"{")).status == 400
        assert (await edge.fail_to_log_in()).status == 401


PROXY, OUTSIDER = "127.0.0.9", "127.0.0.8"
VICTIM = "203.0.113.5"


async def exhaust(edge: Edge, *forwarded: str, source: str) -> None:
    """Fail until the address is throttled."""
    for _ in range(30):
        assert (await edge.fail_to_log_in(*forwarded, source=source)).status == 401
    assert (await edge.fail_to_log_in(*forwarded, source=source)).status == 429


class TestForwardedFor:
    async def test_O5_only_a_trusted_proxy_is_believed_and_only_from_the_right(self) -> None:
        """Spoofing matrix over real sockets: who is throttled together with a victim's address."""
        async with serving({"server": {"trusted_proxies": [PROXY]}}) as edge:
            await exhaust(edge, VICTIM, source=PROXY)

            async def status(*forwarded: str, source: str) -> int:
                return (await edge.fail_to_log_in(*forwarded, source=source)).status

            # the same address, however much is written to its left
            assert await status(f"198.51.100.1, {VICTIM}", source=PROXY) == 429
            assert await status(f"{PROXY}, 10.0.0.1,{VICTIM}", source=PROXY) == 429
            assert await status("198.51.100.1", VICTIM, source=PROXY) == 429
            assert await status(f"{VICTIM}, {PROXY}", source=PROXY) == 429
            assert await status(f"{VICTIM}, {PROXY}, {PROXY}", source=PROXY) == 429
            assert await status(f"::ffff:{VICTIM}", source=PROXY) == 429
            # another address, although the victim's was written to its left
            assert await status(f"{VICTIM}, 198.51.100.1", source=PROXY) == 401
            assert await status(VICTIM, "198.51.100.1", source=PROXY) == 401
            # who is not trusted speaks for itself only: throttled by nobody else's failures ...
            assert await status(VICTIM, source=OUTSIDER) == 401
            assert await status(source=PROXY) == 401
            # ... and not by changing what it claims
            for n in range(29):
                assert await status(f"198.51.100.{n}", source=OUTSIDER) == 401
            assert await status("198.51.100.99", source=OUTSIDER) == 429
            assert await status(source=OUTSIDER) == 429
            assert await status(source="127.0.0.7") == 401

    async def test_O5_without_trusted_proxies_nobody_is_believed(self, edge: Edge) -> None:
        """The default: a header that anybody can send chooses nothing."""
        for n in range(30):
            assert (await edge.fail_to_log_in(f"203.0.113.{n}")).status == 401
        assert (await edge.fail_to_log_in("203.0.113.99")).status == 429
        assert (await edge.fail_to_log_in(source="127.0.0.9")).status == 401

    async def test_O5_an_ipv6_network_is_one_address(self) -> None:
        """Anybody has 2^64 addresses: they share one budget of failures with their /64."""
        async with serving({"server": {"trusted_proxies": ["127.0.0.0/24"]}}) as edge:
            for n in range(30):
                reply = await edge.fail_to_log_in(f"2001:db8:0:1::{n:x}", source=PROXY)
                assert reply.status == 401
            same = await edge.fail_to_log_in("2001:db8:0:1:ffff::1", source=PROXY)
            assert same.status == 429
            other = await edge.fail_to_log_in("2001:db8:0:2::1", source=PROXY)
            assert other.status == 401

    @pytest.mark.parametrize("forwarded", ["", ",", " , ,"])
    async def test_O5_where_nothing_is_said_it_is_the_proxy_itself(self, forwarded: str) -> None:
        """An empty header neither fails nor opens a bucket of its own."""
        async with serving({"server": {"trusted_proxies": [PROXY]}}) as edge:
            await exhaust(edge, source=PROXY)
            assert (await edge.fail_to_log_in(forwarded, source=PROXY)).status == 429
            assert len(edge.app.parts.authenticator.failures) == 1

    @pytest.mark.parametrize("forwarded", ["unknown", "bogus", "1" * 4000])
    async def test_N6_what_cannot_be_read_is_counted_for_nobody(self, forwarded: str) -> None:
        """It opens no bucket, and joins none: those of whom it is said are strangers."""
        async with serving({"server": {"trusted_proxies": [PROXY]}}) as edge:
            await exhaust(edge, source=PROXY)
            for _ in range(31):
                assert (await edge.fail_to_log_in(forwarded, source=PROXY)).status == 401
            assert len(edge.app.parts.authenticator.failures) == 1

    @pytest.mark.parametrize(
        ("peer", "forwarded", "named"),
        [
            ("203.0.113.1", [], "203.0.113.1"),
            ("203.0.113.1", ["198.51.100.1"], "203.0.113.1"),
            ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
            ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
            ("10.0.0.1", ["10.0.0.2"], "10.0.0.2"),
            ("10.0.0.1", ["1.1.1.1, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
            ("10.0.0.1", ["1.1.1.1", "198.51.100.1", "10.0.0.2"], "198.51.100.1"),
            ("10.0.0.1", ["198.51.100.1, bogus"], None),
            ("10.0.0.1", ["198.51.100.1, bogus, 10.0.0.2"], None),
            ("fd00::1", ["2001:db8::7"], "2001:db8::/64"),
            ("fd00::1", ["::ffff:198.51.100.1"], "198.51.100.1"),
            ("2001:db8::7", ["198.51.100.1"], "2001:db8::/64"),
            ("fe80::1%eth0", [], "fe80::1%eth0"),
            (None, ["198.51.100.1"], "198.51.100.1"),
            ("", ["198.51.100.1"], "198.51.100.1"),
            ("", [], "local"),
        ],
    )
    def test_O5_the_walk_from_the_right(
        self, peer: str | None, forwarded: Sequence[str], named: str | None
    ) -> None:
        """As far as the one who says so is trusted, and no further; Unix sockets have no peer."""
        trusted = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")]
        headers = CIMultiDict([("X-Forwarded-For", value) for value in forwarded])
        assert (
            ClientAuthenticator([], trusted, 0).address_of(CIMultiDictProxy(headers), peer) == named
        )

    @given(st.lists(st.text(max_size=40), max_size=4), st.text(max_size=40))
    def test_O5_no_header_breaks_the_walk_or_is_repeated(
        self, forwarded: list[str], peer: str
    ) -> None:
        """What names the bucket is an address, a network or a short name, or there is none."""
        authenticator = ClientAuthenticator(
            [], [ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")], 0
        )
        headers = CIMultiDict([("X-Forwarded-For", value) for value in forwarded])
        named = authenticator.address_of(CIMultiDictProxy(headers), peer)
        said_by, _, name = (named or "local").partition(" ")
        assert said_by == "local" or str(ipaddress.ip_network(said_by.partition("%")[0]))
        assert len(name) <= 65


@pytest.mark.parametrize(
    ("agents", "allowed"),
    [(None, True), (frozenset({"A1"}), True), (frozenset({"B2"}), False), (frozenset(), False)],
)
def test_a_client_may_use_the_agents_that_it_was_given(
    agents: frozenset[str] | None, *, allowed: bool
) -> None:
    """None stands for all; an empty set is no right to any."""
    client = Client("web", b"", agents, allow_origin=False)
    if allowed:
        client.require_agent("A1")
        return
    with pytest.raises(AgentNotAllowed):
        client.require_agent("A1")
