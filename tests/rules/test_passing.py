"""Which targets and headers go on, over everything that can be written."""

import unicodedata
import urllib.parse
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.rules.passing import (
    HOP_BY_HOP,
    BadTarget,
    check_route,
    has_place,
    route_of,
    to_the_caller,
    to_the_vendor,
)

ROUTES = ("/v1/*", "/v2/credit-summaries")

PIECES = st.sampled_from(
    [
        *("/", "//", "/v1", "/v1/", "/v2", "/v2/credit-summaries", "agents", "embed-tokens"),
        *("EMBED-tokens", "request", ".", "..", "%2e", "%2F", "%5c", "%25", "%65", "%c3%a4"),
        *("%e2%84%aa", "%ef%bc%8f", "%e2%80%a5", "embed%ef%bc%8dtokens", "embed-to%e2%84%aaens"),
        *("%c0%af", "%20", ";", "\\", "?", "#", "a=b", "é", "\n", "\0", " ", "%", "@", ":"),
    ]
)
TARGETS = st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=20).map("/v1/".__add__)

NAMES = st.sampled_from(
    [
        *("Connection", "Keep-Alive", "TE", "Host", "Expect", "X-Forwarded-For", "X-A", "x-b"),
        *("Accept-Encoding", "api-secret", "Content-Length", "Via", "X-Original-URL", "Upgrade"),
        *("X_Original_URL", "X_Forwarded_For", "Content_Length", "Api_Secret", "x_a"),
    ]
)
VALUES = st.sampled_from(["1", "close", "X-A", "x-B, close", "keep-alive", "", "upgrade"])
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=8)


def passed(target: str) -> str | None:
    """Return the route that a target is passed on by, None if it is not."""
    try:
        return route_of(target, ROUTES)
    except BadTarget:
        return None


@given(target=TARGETS)
@example(target="/v1/%65mbed-tokens/request")
@example(target="/v1/agents/..;/embed-tokens/request")
@example(target="/v1/embed-tokens%2frequest")
@example(target="/v1/embed%EF%BC%8Dtokens/request")
@example(target="/v1/embed-to%E2%84%AAens/request")
@example(target="/v1/x/%E2%80%A5/embed-tokens/request")
def test_what_is_passed_on_means_the_same_to_everybody(target: str) -> None:
    """However it is decoded, resolved or cleaned up: it is below its route, and never a mint."""
    if passed(target) is None:
        return
    assert target.isascii()
    assert target.isprintable()
    path = target.partition("?")[0]
    decoded = path
    for _ in range(3):  # as those do who decode twice
        decoded = urllib.parse.unquote(decoded, errors="strict")
        readings = {decoded, decoded.lower(), decoded.partition(";")[0].replace("\\", "/")}
        readings |= {unicodedata.normalize("NFKC", text).lower() for text in readings}
        readings |= {urllib.parse.urljoin("http://vendor", text) for text in readings}
        for text in readings:
            assert "//" not in text.removeprefix("http://")
            assert ".." not in text.split("/")
            assert "/v1/embed-tokens/" not in f"{text.lower()}/"
            assert text.removeprefix("http://vendor").startswith(("/v1/", "/v2/credit-summaries"))


@given(target=st.from_regex(r"/v1/[A-Za-z0-9_~.-]*[A-Za-z0-9](\?[!-~]*)?", fullmatch=True))
def test_ordinary_targets_are_passed_on(target: str) -> None:
    """Also with any query: it is nobody's path."""
    if "#" in target or target.lower().startswith("/v1/embed-tokens"):
        return
    assert passed(target) == "/v1/*"


@pytest.mark.parametrize(
    ("target", "route"),
    [
        ("/v1/agent/A78WKV4515", "/v1/*"),
        ("/v1/a%20b/%C3%A4", "/v1/*"),
        ("/v1/a@b:c,d(e)!", "/v1/*"),
        ("/v2/credit-summaries?app=imaginex", "/v2/credit-summaries"),
        ("/v2/credit-summaries/", None),
        ("/v2/other", None),
        ("/v1", None),
        ("", None),
        ("*", None),
        ("http://vendor/v1/agents", None),
    ],
)
def test_routes_are_exact_or_trees(target: str, route: str | None) -> None:
    """`/*` is all below; a path is that path, with any query."""
    assert route_of(target, ROUTES) == route


@pytest.mark.parametrize("rest", ["", "/request", "/other", ";a", "%20", "%20/request", "%3B"])
@pytest.mark.parametrize("start", ["/v1/embed-tokens", "/v1/Embed-TOKENS"])
def test_what_is_near_the_mint_route_is_no_route(start: str, rest: str) -> None:
    """Whatever stands behind its name: some servers trim blanks, and cut parameters off."""
    assert route_of(f"{start}{rest}", ROUTES) is None
    assert route_of(f"{start}-of-others", ROUTES) == "/v1/*"


def test_a_fragment_is_no_part_of_a_target() -> None:
    """Also behind a query: some end the target there, others do not."""
    for target in ("/v1/agents#a", "/v1/agents?a=1#b"):
        with pytest.raises(BadTarget):
            _ = route_of(target, ROUTES)


@given(fields=FIELDS)
@example(fields=[("Connection", "close, X-A"), ("X-A", "1"), ("x-b", "2")])
def test_between_neighbours_stays_what_is_between_neighbours(
    fields: list[tuple[str, str]],
) -> None:
    """Hop-by-hop headers, and those that Connection names, go no further; order is kept."""
    try:
        sent = to_the_vendor(fields)
    except ValueError:
        return
    names = {name.lower() for name, _ in sent}
    read = {name.replace("_", "-") for name in names}  # as CGI does, which knows one form
    assert read.isdisjoint(HOP_BY_HOP | {"host", "expect", "via", "x-original-url"})
    assert not any(name.startswith("x-forwarded-") for name in read)
    assert names.isdisjoint({"content_length", "api_secret"})
    assert names.isdisjoint(HOP_BY_HOP | {"host", "expect", "via", "x-original-url"})
    assert not any(name.startswith("x-forwarded-") for name in names)
    named = {
        part.strip().lower()
        for name, value in fields
        if name == "Connection"
        for part in value.split(",")
    }
    assert names.isdisjoint(named)
    kept = [field for field in fields if field[0].lower() in names]
    assert sent == kept
    back = [name.lower() for name, _ in to_the_caller(fields)]
    assert HOP_BY_HOP.isdisjoint(back)
    assert named.isdisjoint(back)


@pytest.mark.parametrize("named", ["api-secret", "Content-Length", "content-type", "HOST"])
def test_connection_takes_nothing_away_that_the_request_is_made_of(named: str) -> None:
    """It would be another request then, such as one without a key."""
    with pytest.raises(ValueError, match="connection: must not name"):
        to_the_vendor([("Connection", f"close, {named}"), ("api-secret", "x")])


def test_an_answer_keeps_its_length_whatever_connection_names() -> None:
    """Without it nobody could tell where the answer ends, and the next one begins."""
    fields = [("Connection", "close, Content-Length, X-A"), ("Content-Length", "2"), ("X-A", "1")]
    assert to_the_caller(fields) == [("Content-Length", "2")]


@pytest.mark.parametrize(
    "route",
    ["", "/", "/*", "v1/*", "/v1/*/x", "/v1/../x", "/v1/./x", "/v1//x", "/v1/x*", "/v1/%41"],
)
def test_what_is_no_route(route: str) -> None:
    """Refused when the settings are read."""
    with pytest.raises(ValueError, match="is not a route"):
        check_route(route)


COMERS = st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=400)
"""Clients, and whether each sends one more request or gets an answer to one."""


@given(places=st.integers(1, 200), schedule=COMERS)
@example(places=128, schedule=[(0, True)] * 100)
@example(places=128, schedule=[(n, True) for n in range(10) for _ in range(100)])
def test_no_client_takes_the_place_of_another(
    places: int, schedule: list[tuple[int, bool]]
) -> None:
    """One has half at most, and who has none is refused only if log2 of all places are others'."""
    held = Counter[int]()
    for client, comes in schedule:
        if not comes:
            held[client] = max(held[client] - 1, 0)
        elif has_place(held[client], held.total(), places):
            held[client] += 1
        free = places - held.total()
        holders = sum(map(bool, held.values()))
        assert free >= places >> holders
        assert max(held.values(), default=0) <= (places + 1) // 2
