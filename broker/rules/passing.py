"""Which requests may be passed on to the vendor, and what of their headers: no socket, no clock.

A target is judged as it came, byte by byte, because the broker and the vendor (with the edge before
it) may read one target differently, and a request that the broker takes for harmless must not be a
mint there: that would be one beside the budget.  So nothing is normalised, and what somebody could
normalise is refused: empty segments, `.` and `..`, parameters behind `;`, and each percent-encoding
of a character that means something in a path or needs none (RFC 3986 sections 2.3 and 6.2.2), or
that Unicode has as another form of an ASCII one (NFKC: a full-width slash, the Kelvin sign).

Sources: RFC 9110 section 7.6 (what a gateway removes and adds), RFC 9112 section 3.2 (targets);
Choudhury and Hahne, "Dynamic Queue Length Thresholds" (IEEE/ACM ToN 1998), for who has a place.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

ROUTE = re.compile(r"(?:/[A-Za-z0-9._~-]+)+(?:/\*)?")
"""How a route is configured: an exact path, or `/*` behind one for all that is below it."""

RESERVED = "/v1/embed-tokens"
"""The mint route and what is near it: never passed on, in whatever case it is written."""

_SEGMENT = r"(?:[A-Za-z0-9._~!$&'()*+,=:@-]|%[0-9A-Fa-f]{2})+"
_PATH = re.compile(rf"(?:/{_SEGMENT})+/?")
_QUERY = re.compile(r"[!-~]*")
_ENCODED = re.compile(r"%([0-9A-Fa-f]{2})")
_ASCII = re.compile(r"[\x00-\x7f]+")

_NEVER_ENCODED = frozenset(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/\\%;?#\x7f"
) | frozenset(range(0x20))
"""Bytes that a client has no reason to encode in a path, and an attacker has."""

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authentication-info",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Fields between two neighbours, in lower case."""

_NOT_FOR_THE_VENDOR = HOP_BY_HOP | {
    "expect",  # the broker answers it
    "forwarded",  # who is behind the broker is not the vendor's to know, nor to be told wrongly
    "host",  # the vendor's own
    "http2-settings",
    "via",  # the broker's own
    "x-original-uri",  # what some servers take for the target instead of the target
    "x-original-url",
    "x-real-ip",
    "x-request-id",  # the broker's own
    "x-rewrite-url",
}

_NEEDED = frozenset({"api-secret", "authorization", "content-length", "host"})
"""Fields that Connection must not name: without them the request would be another one."""

Field = tuple[str, str]


class BadTarget(ValueError):
    """A target that is below a route, and that somebody may read as something else."""


def check_route(route: str) -> None:
    """Raise ValueError for a route that cannot be configured."""
    if not ROUTE.fullmatch(route) or any(part in (".", "..") for part in route.split("/")):
        raise ValueError(
            f'{route!r} is not a route; write a path such as "/v1/agents", or "/v1/agent/*" for all'
            " that is below it"
        )
    if _is_reserved(route.removesuffix("/*")):
        raise ValueError(f"{route!r}: mints are the broker's own, within the budget; take it out")


def route_of(target: str, routes: Sequence[str]) -> str | None:
    """Return the first route that a request target belongs to, None for none.

    Raises BadTarget for one that would belong to one, if it were written as everybody reads it.
    """
    path, mark, query = target.partition("?")
    route = next((route for route in routes if _covers(route, path)), None)
    if route is None or _is_reserved(path):
        return None
    problem = _problem(path)
    if problem is None and mark and not _QUERY.fullmatch(query):
        problem = "its query has a character that must be encoded"
    if problem is None and "#" in query:
        problem = "it has a fragment"
    if problem is not None:
        raise BadTarget(problem)
    return route


def has_place(own: int, taken: int, places: int) -> bool:
    """Return whether a client with `own` requests under way may have one more passed on.

    `taken` of the `places` are in use, by all clients.  Each may take what it leaves free: one
    has half of them at most, two that take all they can end at a third each, and beside `k` clients
    `places / 2**k` are free whatever comes and goes.  Who may still come need not be known.
    """
    return own < places - taken


def to_the_vendor(fields: Iterable[Field], *, without: frozenset[str] = frozenset()) -> list[Field]:
    """Return the fields of a request that go on; `without` these, in lower case.

    Raises ValueError for a Connection header that would take away what the request needs.
    """
    fields = list(fields)
    named = _named(fields)
    if named & _NEEDED or any(name.startswith("content-") for name in named):
        raise ValueError("connection: must not name a header that the request is made of")
    dropped = _NOT_FOR_THE_VENDOR | named | without
    return [(name, value) for name, value in fields if not _is_dropped(name, dropped)]


def to_the_caller(fields: Iterable[Field]) -> list[Field]:
    """Return the fields of an answer that go on."""
    fields = list(fields)
    dropped = HOP_BY_HOP | (_named(fields) - {"content-length"})
    return [(name, value) for name, value in fields if _as_servers_read(name) not in dropped]


def _is_dropped(name: str, dropped: frozenset[str]) -> bool:
    read = _as_servers_read(name)
    is_second = "_" in name and (read in _NEEDED or read.startswith("content-"))
    return read in dropped or is_second or read.startswith("x-forwarded-")


def _as_servers_read(name: str) -> str:
    """Return a field's name in lower case, `_` as `-`: CGI and WSGI give both one name."""
    return name.lower().replace("_", "-")


def _covers(route: str, path: str) -> bool:
    return path.startswith(route[:-1]) if route.endswith("/*") else path == route


def _is_reserved(path: str) -> bool:
    lower = path.lower()
    return lower == RESERVED or lower.startswith((f"{RESERVED}/", f"{RESERVED};", f"{RESERVED}%"))


def _problem(path: str) -> str | None:
    if not _PATH.fullmatch(path):
        return "its path has an empty segment, or a character that must be encoded"
    if any(segment in (".", "..") for segment in path.split("/")):
        return 'its path has a segment "." or ".."'
    codes = [int(code, 16) for code in _ENCODED.findall(path)]
    if not _NEVER_ENCODED.isdisjoint(codes):
        return "its path encodes a letter, a digit, a slash or another character that must not be"
    try:
        text = _ENCODED.sub(lambda found: chr(int(found[1], 16)), path).encode("latin-1").decode()
    except UnicodeDecodeError:
        return "its path encodes what is not UTF-8"
    if any(map(str.isascii, unicodedata.normalize("NFKC", _ASCII.sub("", text)))):
        return "its path encodes a character that somebody may take for an ASCII one"
    return None


def _named(fields: Iterable[Field]) -> frozenset[str]:
    """Return the fields that Connection names (RFC 9110 section 7.6.1), in lower case."""
    lines = [value for name, value in fields if name.lower() == "connection"]
    return frozenset(_as_servers_read(part.strip()) for line in lines for part in line.split(","))
