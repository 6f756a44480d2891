"""Row N6: what proxies say of their client; each line of two tables, over sockets."""

import ipaddress
import re
import secrets
from collections.abc import Iterable
from typing import NamedTuple

import pytest
from documents import table
from edge import Edge, request, serving, visitor
from hypothesis import example, given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from broker.rules.forwarded import tokens_in
from broker.web.auth import ClientAuthenticator
from broker.web.token_status import VERIFY_PATH

PROXY, OTHER_PROXY, STRANGER = "127.0.0.9", "127.0.0.10", "198.51.100.77"
TRUSTING = {"server": {"trusted_proxies": [PROXY, OTHER_PROXY]}}
BURST = 30

Headers = list[tuple[str, str]]


class Row(NamedTuple):
    """A line of a table: what is sent, as `Name: value` or `GET target`, and what comes of it."""

    sent: list[str]
    outcome: str


def rows(first_column: str) -> list[Row]:
    """Read the table of the documentation whose first column is called so."""
    return [
        Row(re.findall(r"`((?:GET |[A-Za-z-]+: )[^`]+)`", sent), outcome)
        for sent, outcome in table(first_column, "What a proxy says of its client")
    ]


def headers_of(sent: Iterable[str]) -> Headers:
    """Return the headers of a row."""
    lines = [line.replace("PROXY", OTHER_PROXY) for line in sent if not line.startswith("GET ")]
    return [(name, value) for name, _, value in (line.partition(": ") for line in lines)]


URLS = rows("the proxy sends to `verify`")
ADDRESSES = rows("the proxy sends")


@pytest.mark.parametrize("row", URLS, ids=lambda row: " + ".join(row.sent))
async def test_N6_the_uri_that_a_client_asked_for(row: Row) -> None:
    """As the table says, from a trusted proxy; from anybody else, never."""
    async with serving(TRUSTING) as edge:
        good, other = (
            (await edge.request_token(visitor())).token,
            (await edge.request_token(visitor())).token,
        )
        sent = [line.replace("TOKEN", good).replace("OTHER", other) for line in row.sent]
        target = next((s.removeprefix("GET ") for s in sent if s.startswith("GET ")), VERIFY_PATH)
        asked = request("GET", target, headers_of(sent))
        assert str((await edge.raw(asked, source=PROXY)).status) == row.outcome
        assert (await edge.raw(asked, source="127.0.0.8")).status == 401


async def fail(edge: Edge, headers: Headers) -> int:
    """Ask with a secret that nobody has."""
    sent = edge.asking(secret=secrets.token_urlsafe(24), headers=headers)
    return (await edge.raw(sent, source=PROXY)).status


@pytest.mark.parametrize("row", ADDRESSES, ids=lambda row: " + ".join(row.sent) or "nothing")
async def test_N6_the_address_that_a_client_has(row: Row) -> None:
    """As the table says: whose failures are counted together, and whose are not."""
    headers = headers_of(row.sent)
    async with serving(TRUSTING) as edge:
        for _ in range(BURST):
            assert await fail(edge, headers) == 401
        throttled = await fail(edge, headers) == 429
        assert throttled == (row.outcome != "nobody")
        assert await fail(edge, [("X-Forwarded-For", STRANGER)]) == 401
        named = re.fullmatch(r"`([^`]+)`", row.outcome)
        if named:
            same = named[1].replace("/64", "ffff:1")
            assert await fail(edge, [("X-Forwarded-For", same)]) == 429
        if row.outcome != "the proxy, `local` over a Unix socket":
            assert await fail(edge, []) == 401
        assert (await edge.request_token()).status == 200


def test_N6_the_tables_are_read_whole() -> None:
    """A table that is not found would prove nothing."""
    assert len(URLS) > 12
    assert len(ADDRESSES) > 20
    assert {row.outcome for row in URLS} == {"200", "401"}


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ([], "local"),
        ([("X-Forwarded-For", "203.0.113.5")], "203.0.113.5"),
        ([("X-Forwarded-For", "203.0.113.5, 10.0.0.1")], "203.0.113.5"),
        ([("X-Forwarded-For", "_a")], "local _a"),
        ([("X-Forwarded-For", "unknown")], None),
    ],
)
def test_N6_a_unix_socket_is_a_trusted_proxy(headers: Headers, named: str | None) -> None:
    """A proxy on the same host may use one: its clients are not all one subject."""
    assert subject(None, headers) == named


@pytest.mark.parametrize(
    "hop",
    [
        *("1.2.3.4:", "1.2.3.4:123456", "1.2.3", "010.0.0.1", "1.2.3.4/24", "[1.2.3.4", "1.2.3.4]"),
        *(
            "[::1]x",
            "[::1]:",
            "::1::2",
            "[]",
            "[]:80",
            "_",
            "_" + "a" * 65,
            "_a b",
            '"',
            '""',
            '"1"',
        ),
        *("localhost", "unknown:80", "-", "null", "\u0661.2.3.4", "1.2.3.4 5", "http://1.2.3.4"),
    ],
)
def test_N6_what_is_no_address_names_nobody(hop: str) -> None:
    """One stranger's failures would throttle all others of whom a proxy says the same."""
    for headers in ([("X-Forwarded-For", hop)], [("Forwarded", f'for="{hop}"')]):
        assert subject(PROXY, headers) is None


@pytest.mark.parametrize(
    "element",
    [
        *("for", "for=", "=1.2.3.4", "for =1.2.3.4", "for=1.2.3.4;for=1.2.3.4", 'for="1.2.3.4'),
        *('for=1.2.3.4"', 'for="1.2.3.4"x', "for=1.2.3.4;by", "for=1.2.3.4 by=x", "1.2.3.4"),
        *("xfor=1.2.3.4", 'by="for=1.2.3.4"', 'by=";for=1.2.3.4"', 'for="1.2.3.4, 1.2.3.4"'),
    ],
)
def test_N6_a_broken_element_of_forwarded_names_nobody(element: str) -> None:
    """What is not RFC 7239 is not guessed at."""
    assert subject(PROXY, [("Forwarded", element)]) is None


@pytest.mark.parametrize(
    ("element", "named"),
    [
        ("for=1.2.3.4;", "1.2.3.4"),
        ("FOR=1.2.3.4", "1.2.3.4"),
        ('by="a;b";for="1.2.3.4"', "1.2.3.4"),
        (r'for="\1.2.3.4"', "1.2.3.4"),
        ("for=1.2.3.4:80 ; proto=http", "1.2.3.4"),
        ("for=[2001:db8::1]:80", "2001:db8::/64"),
        ('for="_a:_b"', f"{PROXY} _a"),
        (f"for=1.2.3.4, for={OTHER_PROXY}", "1.2.3.4"),
        (f"for=_a, for={OTHER_PROXY}", f"{OTHER_PROXY} _a"),
        (f"for=1.2.3.4, for=5.6.7.8;by={OTHER_PROXY}", "5.6.7.8"),
    ],
)
def test_N6_forwarded_as_it_may_be_written(element: str, named: str) -> None:
    """Any case, any order, quoted or not, with the port."""
    assert subject(PROXY, [("Forwarded", element)]) == named


def subject(peer: str | None, headers: Headers) -> str | None:
    """Name the subject of a request."""
    trusted = [ipaddress.ip_network(text) for text in (PROXY, OTHER_PROXY, "10.0.0.0/8")]
    return ClientAuthenticator([], trusted, 0).address_of(
        CIMultiDictProxy(CIMultiDict(headers)), peer
    )


NASTY = st.text(
    alphabet=st.one_of(
        st.sampled_from(' ,;="\\[]:._%fFor=0123456789abunk\t'), st.characters(codec="utf-8")
    ),
    max_size=60,
)
"""Text of which much looks like one of these headers."""
FORMS = ["{}", '"{}"', "[{}]", "[{}]:443", '"[{}]:443"']


@given(
    NASTY, st.integers(0, 2**128 - 1), st.sampled_from(["X-Forwarded-For", "Forwarded"]), st.data()
)
@example('for="', 0, "Forwarded", None)
@example('x="\\', 0, "Forwarded", None)
@example('"', 0, "X-Forwarded-For", None)
def test_N6_nothing_to_the_left_chooses_the_address(
    left: str, number: int, name: str, data: st.DataObject | None
) -> None:
    """Whatever a client wrote before the proxy's word, in one line or in lines of its own."""
    address = ipaddress.ip_address(number)
    form = "[{}]:443" if data is None else data.draw(st.sampled_from(FORMS))
    apart = data is not None and data.draw(st.booleans())
    own = form.format(address)
    if name == "Forwarded":
        own = f"for={own};proto=https"
    alone = subject(PROXY, [(name, own)])
    if apart:
        assert subject(PROXY, [(name, left), (name, own)]) == alone or not is_plain(address)
    else:
        assert subject(PROXY, [(name, f"{left}, {own}")]) == alone or not is_plain(address)
    assert alone is not None


def is_plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether the walk ends here: the address is not of a trusted proxy."""
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped not in ipaddress.ip_network("10.0.0.0/8") and str(mapped) != PROXY


@given(
    st.lists(st.tuples(st.sampled_from(["X-Forwarded-For", "Forwarded"]), NASTY), max_size=4),
    NASTY | st.none() | st.just(PROXY),
)
def test_N6_no_header_is_an_exception(headers: Headers, peer: str | None) -> None:
    """A name that fits a table of names, or nobody."""
    named = subject(peer, headers)
    assert named is None or len(named) < 200


@given(NASTY.map("/?token=good&".__add__) | NASTY)
def test_N6_no_uri_is_another_exception(uri: str) -> None:
    """Tokens, or a ValueError; a token that is not the only one is never hidden."""
    try:
        found = tokens_in(uri)
    except ValueError:
        return
    assert all(isinstance(token, str) for token in found)
    if uri.startswith("/?token=good&"):
        assert found[0] == "good"


@pytest.mark.parametrize(
    "uri",
    [
        *("https://h#?token=a", "/?token=a#", "//h/#&token=b?token=a"),
        *("https://u:p@h/?token=a", "https://u@h?token=a", r"https://h\@x/?token=a"),
        *("ftp://h/?token=a", "javascript:x?token=a", "https:/h?token=a", "https:?token=a"),
        *(
            "https://h?token=a",
            "https://h?token=a&/viewer",
            "https://h:443?token=a&/viewer?token=a",
        ),
        *("https://?token=a", "https:///x?token=a", "h/x?token=a", "x?token=a", " /?token=a"),
        *("/?token=a;b", "/?a;token=b", "/?token=a&x=;token=b"),
    ],
)
def test_N6_a_uri_that_is_read_in_two_ways_is_not_read(uri: str) -> None:
    """Fragments, users, odd schemes, relative references, semicolons beside a token."""
    with pytest.raises(ValueError, match="in a "):
        tokens_in(uri)


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "/?token=a",
            "?token=a",
            "//x?token=a",
            "https://h/?token=a",
            "HTTPS://h:8443/x@y?token=a",
        ),
        *(
            "http://[2001:db8::1]:80/?token=a",
            "wss://h/?token=a",
            "/?%74%6Fken=%61",
            "/?x=;&token=a",
        ),
        *("/a%23b?token=a", "/a;b?token=a", "/?x=https://u@h/&token=a"),
    ],
)
def test_N6_a_uri_that_is_read_in_one_way_is_read(uri: str) -> None:
    """Paths and absolute URLs, with any other parameter."""
    assert tokens_in(uri) == ("a",)
