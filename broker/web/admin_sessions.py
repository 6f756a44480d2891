"""Sessions for the operator, on the admin listener: list, look at, end.

Served only where the admin listener has a secret: whoever may end sessions may read visitors'
fingerprints, which metrics and probes never show.
"""

from collections.abc import Awaitable, Callable

from aiohttp import web

from broker.errors import Invalid, NotFound, RateLimited, SecretInBrowser
from broker.model import Clock, Session
from broker.sessions.admin import PAGE, SessionAdmin
from broker.sessions.base import Place, Query, place_of
from broker.telemetry.cells import Counter
from broker.telemetry.logs import RefusalLog
from broker.web.admin import answer
from broker.web.auth import ClientAuthenticator
from broker.wire.responses import EndedAnswer, SessionAnswer, SessionsAnswer, plain_body

MOST_IN_PAGE = 1000
"""Sessions that one answer may have, about 250 KB."""

_DIGITS = 15
"""Digits of a moment in Unix seconds, generously."""

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add(
    app: web.Application,
    authenticator: ClientAuthenticator,
    register: SessionAdmin,
    clock: Clock,
    throttled: Counter,
    refusals: RefusalLog,
) -> None:
    """Serve /v1/sessions to who is known; `throttled` counts guesses that were refused.

    Whoever calls this has `refusals` summed up from time to time, and at the end.
    """
    guarded = _Guard(authenticator, clock, throttled, refusals)

    async def listed(request: web.Request) -> web.StreamResponse:
        query, after, limit = _query(request)
        page = list(await register.page(query, after, limit + 1))
        more = len(page) > limit
        del page[limit:]
        return _json(
            SessionsAnswer([_answer(s) for s in page], _written(page[-1]) if more else None)
        )

    async def one(request: web.Request) -> web.StreamResponse:
        session = await register.find(request.match_info["session_id"])
        if session is None:
            raise NotFound(_UNKNOWN)
        return _json(_answer(session))

    async def end(request: web.Request) -> web.StreamResponse:
        scope = request.query.get("scope", "session")
        if scope not in ("session", "visitor"):
            raise Invalid("scope: must be session or visitor; leave it out for the one session")
        ended = await register.end(request.match_info["session_id"], visitor=scope == "visitor")
        if not ended:
            raise NotFound(_UNKNOWN)
        return _json(EndedAnswer(ended))

    app.router.add_get("/v1/sessions", guarded(listed))
    app.router.add_get("/v1/sessions/{session_id}", guarded(one))
    app.router.add_delete("/v1/sessions/{session_id}", guarded(end))


class _Guard:
    """Lets in who has the secret, and tells of those who guess or who leaked it."""

    def __init__(
        self,
        authenticator: ClientAuthenticator,
        clock: Clock,
        throttled: Counter,
        refusals: RefusalLog,
    ) -> None:
        self._authenticator = authenticator
        self._clock = clock
        self._throttled = throttled
        self._refusals = refusals

    def __call__(self, handler: _Handler) -> _Handler:
        async def answer_known(request: web.Request) -> web.StreamResponse:
            now = self._clock.mono()
            try:
                self._authenticator.identify(request, now)
            except RateLimited:
                self._throttled.inc()
                raise
            except SecretInBrowser as error:
                _ = self._refusals.tell_of_leak(error.client, now)
                raise
            return await handler(request)

        return answer_known


_UNKNOWN = "no such session: it has expired, was ended, or was never handed out here"


def _query(request: web.Request) -> tuple[Query, Place, int]:
    given = request.query
    unknown = given.keys() - {"agent_id", "fingerprint", "after", "limit"}
    if unknown:  # one that was misspelt would list others
        raise Invalid("query: takes agent_id, fingerprint, after and limit")
    query = Query(given.get("agent_id", ""), given.get("fingerprint", ""))
    if query == Query():
        raise Invalid("query: needs agent_id or fingerprint; send one of them, or both")
    expires, _, session_id = given.get("after", "0.").partition(".")
    limit = given.get("limit", str(PAGE))
    if not _is_number(expires):
        raise Invalid("after: must be the `next` of an earlier answer; leave it out to start")
    if not (_is_number(limit) and 1 <= int(limit) <= MOST_IN_PAGE):
        raise Invalid(f"limit: must be 1 to {MOST_IN_PAGE}")
    return query, Place(int(expires), session_id), int(limit)


def _is_number(text: str) -> bool:
    """Whether this is one of a size that can be meant; `int` fails for thousands of digits."""
    return text.isascii() and text.isdigit() and len(text) <= _DIGITS


def _written(session: Session) -> str:
    place = place_of(session)
    return f"{place.expires}.{place.session_id}"


def _answer(session: Session) -> SessionAnswer:
    return SessionAnswer(
        session_id=session.session_id,
        client=session.client,
        agent_id=session.agent,
        fingerprint=session.fingerprint,
        model=session.model or None,
        issued_at=session.issued,
        expires_at=session.expires,
    )


def _json(content: SessionsAnswer | SessionAnswer | EndedAnswer) -> web.StreamResponse:
    return answer(200, plain_body(content))
