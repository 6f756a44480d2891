"""What others ask about tokens: is it good (proxies), what is it, end it (backends).

`/v1/introspect` (RFC 7662) and `/v1/revoke` (RFC 7009) take a form with `token` and a client's
secret, and know that client's tokens only: of any other they say what they say of nonsense.

`/v1/embed-tokens/verify` is asked by a proxy in front of a viewer (nginx `auth_request`, Envoy
`ext_authz`, Caddy `forward_auth`) for each of the viewer's requests: any method, no body is read.
Those who call it know three answers: 200, 401, 403.  The fourth is 503, where only a shared store
that is away could tell: nobody is let in (nginx makes 500 of it), and nobody is told that a good
token is bad.

A URI in a header is the proxy's word about what its client asked for, so it counts from trusted
proxies only, and so does what follows the route's own path, where Envoy puts it.  Wherever a token
is found, all that are found must be the same one, and all URIs must bear the same: a proxy that
passes on a header which its client made up would otherwise let one token open the door for
another, or for none.  What viewers read in two ways is refused for the same reason: an empty token
beside another one, a URI with a fragment (`rules/forwarded.py`).
Credentials of another scheme than Bearer are no token of ours, and may stand beside one.
"""

from collections.abc import Awaitable, Callable, Iterator
from urllib.parse import parse_qsl, quote

from aiohttp.hdrs import AUTHORIZATION
from msgspec import UNSET, Struct
from multidict import CIMultiDictProxy, istr

from broker.errors import (
    AgentNotAllowed,
    Invalid,
    MissingAuth,
    MissingParam,
    Unauthorized,
)
from broker.issuers.keyring import BadToken
from broker.model import Clock, Session
from broker.rules import forwarded
from broker.sessions.admin import TokenIntrospector
from broker.stores.base import Rejection
from broker.tables import Recent
from broker.web import body
from broker.web.auth import Client, ClientAuthenticator
from broker.web.lane import ANY_METHOD
from broker.web.response import Answer
from broker.web.router import Routes
from broker.web.whole_request import LaneHandler, Request, WholeRequest, Work
from broker.wire import request as wire
from broker.wire.responses import ActiveToken, InactiveToken, plain_body

VERIFY_PATH = "/v1/embed-tokens/verify"

_TOKEN = istr("X-Embed-Token")
_REQUIRED_AGENT = istr("X-Embed-Require-Agent")
_FORWARDED_URIS = (istr("X-Original-URI"), istr("X-Forwarded-Uri"), istr("X-Original-URL"))
"""nginx as its manual shows it; Caddy and Traefik; ingress-nginx, which tells the absolute URL."""

_SAFE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%")
"""What stands for itself in a header of ours: all of visible ASCII but the sign of escapes."""


MOST_FORMS = 2048
"""Forms that are not read again, 4 KB each at most: a backend asks about a token many times."""

LONGEST_FORM = 2048
"""Bytes of such a form; a token of ours has 500."""

_FIELDS = 16
"""Fields of a form that are read at all; the RFCs name two."""

_INACTIVE = plain_body(InactiveToken(active=False))


Charge = Callable[[str], Awaitable[Rejection | None]]
"""Charges the limit of a client, by its name."""


def add(
    routes: Routes,
    authenticator: ClientAuthenticator,
    introspector: TokenIntrospector,
    clock: Clock,
    charge: Charge,
) -> None:
    """Serve what this module is about; `charge` is met by what changes something."""
    known_forms = Recent(_token_field, MOST_FORMS)
    verify = _verifier(routes, authenticator, introspector)

    async def introspect(request: Request, request_id: str) -> Answer:
        client = _identified(request, authenticator, clock)
        content = body.arrived(request, wire.MAX_BODY)
        if content is None:
            content = await body.read(request, wire.MAX_BODY)
        read = known_forms if len(content) <= LONGEST_FORM else _token_field
        session = await introspector.introspect(read(content), client.name)
        text = _INACTIVE if session is None else plain_body(_active(session, client.name))
        return routes.answer(200, text, request_id)

    async def revoke(request: Request, request_id: str) -> Answer:
        client = _identified(request, authenticator, clock)
        token = _token_field(await body.read(request, wire.MAX_BODY))
        rejection = await charge(client.name)
        if rejection is not None:
            raise rejection.error()
        await introspector.revoke(token, client.name)
        return routes.answer(200, b"", request_id, content_type="text/plain")

    routes.add_to_lane(VERIFY_PATH, ANY_METHOD, verify)
    routes.add(f"{VERIFY_PATH}/*", ANY_METHOD, verify)
    routes.add_to_lane("/v1/introspect", "POST", introspect)
    routes.add_to_lane("/v1/revoke", "POST", revoke)


def _verifier(
    routes: Routes, authenticator: ClientAuthenticator, introspector: TokenIntrospector
) -> LaneHandler:
    """Make what answers proxies: by a call, where nothing has to be waited for."""

    def verify(request: Request, request_id: str) -> Answer | Work:
        asked = request.facts if type(request) is WholeRequest else None
        if type(asked) is not VerifyRequest:
            asked = _read_head(request, trusted=authenticator.trusts(request.remote))
        try:
            session = introspector.check_at_once(asked.token)
        except BadToken as error:
            raise _refused(error) from None
        return (
            verify_later(asked, request_id) if session is None else good(asked, session, request_id)
        )

    async def verify_later(asked: VerifyRequest, request_id: str) -> Answer:
        try:
            session = await introspector.check(asked.token)
        except BadToken as error:
            raise _refused(error) from None
        return good(asked, session, request_id)

    def good(asked: VerifyRequest, session: Session, request_id: str) -> Answer:
        for agent in asked.agents:
            if agent != session.agent:
                raise AgentNotAllowed(
                    "token: good, but for another agent than the one required here"
                )
        return routes.answer(200, b"", request_id, session_headers(session), "text/plain")

    return verify


def _identified(request: Request, authenticator: ClientAuthenticator, clock: Clock) -> Client:
    """Return whose secret a head bears; raises what `identify` does, UnsupportedType."""
    known = request.facts if isinstance(request, WholeRequest) else None
    if isinstance(known, Client):
        return known
    client = authenticator.identify(request, clock.mono())
    body.require_plain(request.headers)
    if isinstance(request, WholeRequest):
        request.facts = client
    return client


class VerifyRequest(Struct, frozen=True):
    """What the head of a proxy's question says: the token, and for which agents it must be."""

    token: str
    agents: tuple[str, ...]


def _read_head(request: Request, *, trusted: bool) -> VerifyRequest:
    """Read what is asked; a head whose meaning depends on the peer is read each time."""
    headers = request.headers
    asked = VerifyRequest(
        presented(request, trusted=trusted), tuple(headers.getall(_REQUIRED_AGENT, ()))
    )
    if isinstance(request, WholeRequest) and not any(name in headers for name in _FORWARDED_URIS):
        request.facts = asked
    return asked


def presented(request: Request, *, trusted: bool) -> str:
    """Return the one token that a request bears; `trusted` if its peer's URIs count.

    Raises MissingAuth for none, Unauthorized for two that differ or a URI read in two ways.
    """
    headers = request.headers
    found: set[str] = {*_bearers(headers), *headers.getall(_TOKEN, ())}
    found.discard("")
    if trusted:
        found.update(_forwarded(request))
    if len(found) > 1:
        raise Unauthorized("token: two different ones were sent; send one")
    if any(found):
        return found.pop()
    if not trusted and any(_forwarded(request)):
        raise MissingAuth(
            "token: only in a forwarded URI, which counts from server.trusted_proxies alone"
        )
    raise MissingAuth("token: missing; send it as Authorization: Bearer or X-Embed-Token")


def session_headers(session: Session) -> str:
    """Return the lines that tell the proxy whose token it is; `Expires` is Unix seconds."""
    return (
        f"X-Embed-Session: {_quoted(session.session_id)}\r\n"
        f"X-Embed-Agent: {session.agent}\r\n"
        f"X-Embed-Fingerprint: {_quoted(session.fingerprint)}\r\n"
        f"X-Embed-Expires: {session.expires}\r\n"
    )


def _quoted(text: str) -> str:
    """Escape what cannot stand in a header; nearly all are hex digits, which need no look."""
    return text if text.isascii() and text.isalnum() else quote(text, _SAFE)


def _refused(error: BadToken) -> Unauthorized:
    return Unauthorized(f"token: {error}")


def _bearers(headers: "CIMultiDictProxy[str]") -> Iterator[str]:
    for value in headers.getall(AUTHORIZATION, ()):
        scheme, _, token = value.partition(" ")
        if scheme.lower() == "bearer":
            yield token.strip()


def _forwarded(request: Request) -> tuple[str, ...]:
    """Return the tokens of the URI that the peer says its client asked for."""
    stated = [
        _tokens_in(uri)
        for name in _FORWARDED_URIS
        for uri in request.headers.getall(name, ())
        if uri
    ]
    rest = request.raw_path.partition(VERIFY_PATH)[2]
    tokens = _tokens_in(rest)
    if tokens or rest.partition("?")[0] not in ("", "/"):  # else it is the route as configured
        stated.append(tokens)
    if len({frozenset(tokens) for tokens in stated}) > 1:
        raise Unauthorized("token: two different ones, or one and none, in forwarded URIs")
    return stated[0] if stated else ()


def _tokens_in(uri: str) -> tuple[str, ...]:
    try:
        return forwarded.tokens_in(uri)
    except ValueError as error:
        raise Unauthorized(f"token: {error}") from None


def _token_field(content: bytes) -> str:
    """Return the form's `token`; other fields, such as RFC 7662's hint, change nothing."""
    try:
        fields = parse_qsl(content.decode("ascii"), keep_blank_values=True, max_num_fields=_FIELDS)
    except ValueError:
        raise Invalid("body: not a form; send token=... percent-encoded") from None
    values = [value for name, value in fields if name == "token"]
    if len(values) > 1:  # RFC 6749 section 3.1: parameters must not be included more than once
        raise Invalid("token: sent twice; send it once")
    if not values or not values[0]:
        raise MissingParam("token: required; send it as a field of a form, not as JSON")
    return values[0]


def _active(session: Session, client: str) -> ActiveToken:
    return ActiveToken(
        active=True,
        client_id=client,
        sub=session.agent,
        agent_id=session.agent,
        fingerprint=session.fingerprint,
        sid=session.session_id,
        iat=session.issued,
        exp=session.expires,
        model=session.model or UNSET,
    )
