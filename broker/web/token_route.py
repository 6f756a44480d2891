"""The route of tokens: from a request for one to its answer, its metrics and its line in the log.

Theory of operation.  What can be answered at once is answered by plain calls, from the head that
was read before to the bytes that go out: nearly all requests are.  What a store elsewhere has to be
asked for first is answered by the same calls, from where its word arrives (`_WaitingRequest`).
What has to wait, for its body or for its token, comes back as a coroutine that goes on where the
calls ended.  Each step is written once: the same calls answer what was waited for.
"""

from typing import Protocol, cast

import structlog
from typing_extensions import override

from broker import errors
from broker.issue import IssuedToken, TokenService
from broker.model import Clock, Outcome, TokenRequest, name_of
from broker.stores.base import Rejection, Visit
from broker.tasks import Later
from broker.telemetry.logs import RefusalLog, visitor_hash
from broker.telemetry.metrics import BUDGET, Metrics
from broker.telemetry.mint_line import MintLine
from broker.telemetry.readiness import Readiness
from broker.units import SECOND
from broker.web import body
from broker.web.auth import Client, ClientAuthenticator
from broker.web.caller import Caller, KnownCall, caller_of
from broker.web.response import JSON_TYPE, LIMIT_LABELS, Answer, Heads
from broker.web.whole_request import KnownRequest, Request, WholeRequest, Work
from broker.wire import request as wire
from broker.wire.known_bodies import KnownBodies
from broker.wire.responses import data_in

log = structlog.get_logger()

_CACHE_STATUS = {
    Outcome.REUSED: "Cache-Status: embed-token-broker; hit\r\n",
    Outcome.MINTED: "Cache-Status: embed-token-broker; fwd=miss\r\n",
    Outcome.COALESCED: "Cache-Status: embed-token-broker; fwd=miss; collapsed\r\n",
}

_OUTCOMES = {outcome: outcome.value for outcome in _CACHE_STATUS}
"""As they are logged: `value` is slow on Python 3.11."""

_MINTED, _LIMITED = Outcome.MINTED, Outcome.LIMITED

_COUNTED = frozenset({Outcome.SHED, Outcome.INVALID, Outcome.UNAUTHORIZED, Outcome.FORBIDDEN})
"""Outcomes that anybody can cause in any number: one a minute is written, the rest counted."""


class Frame(Protocol):
    """What this route has in common with all others."""

    refusals: RefusalLog
    heads: Heads

    def error(self, error: errors.BrokerError, request_id: str) -> Answer:
        """Return the answer of a failure."""
        ...

    def rejected(self, rejection: Rejection, request_id: str) -> Answer:
        """Return the 429 of a limit that refused."""
        ...

    def tell_of_leak(
        self, error: errors.SecretInBrowser, request_id: str, *, anyway: bool = False
    ) -> bool:
        """Write it, once a minute for each client; returns whether it was written now."""
        ...


class TokenRoute:
    """Answers requests for tokens, within `deadline` seconds."""

    def __init__(
        self,
        frame: Frame,
        authenticator: ClientAuthenticator,
        token_service: TokenService,
        metrics: Metrics,
        clock: Clock,
        health: Readiness,
        deadline: float,
        *,
        any_fingerprint: bool,
    ) -> None:
        self._frame = frame
        self._heads = frame.heads
        self._authenticator = authenticator
        self._token_service = token_service
        self._metrics = metrics
        self._note_left = metrics.remaining.observe
        self._note_ended = {outcome: each.observe for outcome, each in metrics.requests.items()}
        self._handed_out = {
            outcome: (line, self._note_ended[outcome]) for outcome, line in _CACHE_STATUS.items()
        }
        self._mono = clock.mono
        self._health = health
        self._deadline = deadline
        self.any_fingerprint = any_fingerprint
        self._bodies = KnownBodies()
        self._mint_line = MintLine()
        self._again = self._begin  # one object for all that is kept
        self.debug = False

    def use_log(self, *, debug: bool) -> None:
        """Follow a change of the log's level; `debug` writes every hand-out."""
        self._mint_line = MintLine()
        self.debug = debug

    def __call__(self, request: Request, request_id: str) -> Answer | Later[Answer] | Work:
        """Answer, or return what is to be waited for; what goes wrong is answered, never raised."""
        started = self._mono()
        if type(request) is WholeRequest:
            known, content = request.facts, request.body
            if type(known) is Caller and len(content) <= wire.MAX_BODY:
                return self._issue(content, known, request, request_id, started)
        client: Client | None = None
        try:
            client = self._authenticator.identify(request, started)
            caller = caller_of(request, client)
            arrived = body.arrived(request, wire.MAX_BODY)
        except Exception as error:  # noqa: BLE001 - answered and told
            return self._failed(error, request_id, started, client, None)
        if arrived is None:
            return self._read(request, caller, request_id, started)
        return self._issue(arrived, caller, None, request_id, started)

    async def _read(
        self, request: Request, caller: Caller, request_id: str, started: int
    ) -> Answer:
        """Wait for the body."""
        try:
            content = await body.read(request, wire.MAX_BODY)
        except Exception as error:  # noqa: BLE001 - as above
            return self._failed(error, request_id, started, caller.client, None)
        answer = self._issue(content, caller, None, request_id, started)
        return answer if isinstance(answer, Answer) else await answer

    def _issue(
        self,
        content: bytes,
        caller: Caller,
        whole: WholeRequest | None,
        request_id: str,
        started: int,
    ) -> Answer | Later[Answer] | Work:
        """Read the body, and answer; `whole` is a request whose head was known."""
        client, request = caller.client, self._bodies.known(content, caller.client.name)
        is_known = request is not None
        try:
            if request is None:
                read = self._bodies.read(content, client.name, any_fingerprint=self.any_fingerprint)
                if isinstance(read, errors.BrokerError):
                    return self._refuse(read, request_id, started, client, None)
                request = read
            if client.agents is not None:
                client.require_agent(request.agent)
        except Exception as error:  # noqa: BLE001 - as above
            return self._failed(error, request_id, started, client, request)
        known = KnownCall(caller, request)
        if whole is None:
            return self._begin(known, request_id, started)
        if is_known and not whole.trace:  # what is known is good by any rule of fingerprints
            whole.again = KnownRequest(self._again, known)
        return self._begin(known, request_id, started, whole.trace)

    def _begin(
        self, known: KnownCall, request_id: str, started: int | None = None, trace: str = ""
    ) -> Answer | Later[Answer] | Work:
        """Answer with a token, if none is to be waited for; `started` is now if it is not said."""
        now = self._mono()
        if started is None:
            started = now
        caller, request = known.caller, known.request
        try:
            result = self._token_service.begin(request, now)
        except Exception as error:  # noqa: BLE001 - as above
            return self._failed(error, request_id, started, caller.client, request)
        if type(result) is IssuedToken:
            return self._issued(result, request_id, started, request)
        if type(result) is Rejection:
            return self._reject(result, request_id, started, caller.client, request)
        begun = cast("Visit | None", result)
        trace = trace or caller.traceparent
        waiting = _WaitingRequest(self, request, request_id, started, caller.client, trace)
        if begun is None and self._token_service.start_visit(request, now, waiting):
            return waiting
        return self._wait(waiting, begun, now)

    def answer_to(self, waiting: "_WaitingRequest") -> Answer | Work:
        """Answer with what the store has said to who has asked it."""
        request, said, now = waiting.request, waiting.said, self._mono()
        if isinstance(said, Exception):
            return self._failed(said, waiting.request_id, waiting.started, waiting.client, request)
        result: IssuedToken | Rejection | Visit | None = None
        try:
            if said is not None:
                result = self._token_service.begin(request, now, said)
        except Exception as error:  # noqa: BLE001 - as above
            return self._failed(error, waiting.request_id, waiting.started, waiting.client, request)
        if type(result) is IssuedToken:
            return self._issued(result, waiting.request_id, waiting.started, request)
        if type(result) is Rejection:
            return self._reject(
                result, waiting.request_id, waiting.started, waiting.client, request
            )
        return self._wait(waiting, cast("Visit | None", result), now)

    async def _wait(self, waiting: "_WaitingRequest", begun: Visit | None, now: int) -> Answer:
        """Wait for the token, or for the store."""
        started, client = waiting.started, waiting.client
        request = waiting.request.sent_with(waiting.request_id, waiting.trace)
        timeout = self._deadline - (now - started) / SECOND
        try:
            result = await self._token_service.finish(request, begun, timeout)
        except Exception as error:  # noqa: BLE001 - as above
            return self._failed(error, request.request_id, started, client, request)
        if isinstance(result, Rejection):
            return self._reject(result, request.request_id, started, client, request)
        return self._issued(result, request.request_id, started, request)

    def _issued(
        self, issued: IssuedToken, request_id: str, started: int, request: TokenRequest
    ) -> Answer:
        outcome, verdict, content = issued.outcome, issued.verdict, issued.token.body
        (line, note_ended), size, wall = self._handed_out[outcome], len(content), issued.wall
        if verdict is None:
            start = self._heads.plain(200, size, JSON_TYPE, request_id, wall) + line.encode()
        else:
            start = self._heads.write(line, size, request_id, verdict, wall)
        self._note_left(issued.left / 1_000_000)
        seconds = (self._mono() - started) / 1_000_000
        note_ended(seconds)
        if outcome is _MINTED or self.debug:
            self._log_issued(issued, request_id, seconds, request)
        return Answer(200, start, content, self._health.draining)

    def _failed(
        self,
        error: Exception,
        request_id: str,
        started: int,
        client: Client | None,
        request: TokenRequest | None,
    ) -> Answer:
        """Answer whatever went wrong; what nobody has foreseen is written as a defect."""
        if not isinstance(error, errors.BrokerError):
            log.error("broker.defect", request_id=request_id, exc_info=error)
            error = errors.Internal()
        return self._refuse(error, request_id, started, client, request)

    def _reject(
        self,
        rejection: Rejection,
        request_id: str,
        started: int,
        client: Client | None,
        request: TokenRequest | None,
    ) -> Answer:
        """Answer and count what a limit refused: no exception, for there may be a flood of them."""
        now = self._mono()
        seconds = (now - started) / SECOND
        kind = LIMIT_LABELS[rejection.limit]
        self._note_ended[_LIMITED](seconds)
        self._metrics.rejections[kind].inc()
        if self._frame.refusals.first(kind, now, anyway=self.debug) or self.debug:
            _log_failure(rejection.error(), kind, request_id, seconds, client, request)
        return self._frame.rejected(rejection, request_id)

    def _refuse(
        self,
        error: errors.BrokerError,
        request_id: str,
        started: int,
        client: Client | None,
        request: TokenRequest | None,
    ) -> Answer:
        """Answer and count a token request that failed."""
        if isinstance(error, errors.RateLimited):
            rejection = Rejection(error.limit, error.verdict)
            return self._reject(rejection, request_id, started, client, request)
        now = self._mono()
        seconds = (now - started) / SECOND
        self._note_ended[error.outcome](seconds)
        kind = error.code
        if isinstance(error, errors.BudgetExhausted):
            kind = BUDGET
            self._metrics.rejections[BUDGET].inc()
        elif isinstance(error, errors.UpstreamRefused):
            kind = "refused"  # the vendor's codes are an open set
        counted = error.outcome in _COUNTED or error.remembered
        if isinstance(error, errors.SecretInBrowser):  # an event of its own: somebody has to act
            told = self._frame.tell_of_leak(error, request_id, anyway=self.debug)
            worth_a_line = self.debug and not told
        elif counted:
            first = self._frame.refusals.first(kind, now, anyway=self.debug)
            worth_a_line = first or self.debug
        else:
            worth_a_line = True
        if worth_a_line:
            _log_failure(error, kind, request_id, seconds, client, request)
        return self._frame.error(error, request_id)

    def _log_issued(
        self, issued: IssuedToken, request_id: str, seconds: float, request: TokenRequest
    ) -> None:
        minted, outcome = issued.minted, issued.outcome
        names = data_in(issued.token.body) if minted is None else minted
        write = self._mint_line.write if outcome is _MINTED else _log_debug
        write(
            _OUTCOMES[outcome],
            request_id=request_id,
            client=request.client,
            agent=request.agent,
            visitor=visitor_hash(request.fingerprint),
            session=names.session_id,
            token=name_of(names.token),
            left_s=issued.left // 1_000_000,
            duration_ms=round(seconds * 1_000_000) / 1000,  # `seconds` are whole microseconds
        )


class _WaitingRequest(Later[Answer]):
    """A request for a token that waits: for the store's word at first."""

    route: TokenRoute
    request: TokenRequest
    request_id: str
    started: int
    client: Client
    trace: str

    @override
    def outcome(self) -> Answer | Work:
        return self.route.answer_to(self)


def _log_debug(outcome: str, **fields: object) -> None:
    log.debug("broker.embed_token", outcome=outcome, **fields)


def _log_failure(
    error: errors.BrokerError,
    kind: str,
    request_id: str,
    seconds: float,
    client: Client | None,
    request: TokenRequest | None,
) -> None:
    fields: dict[str, object] = {
        "request_id": request_id,
        "status": error.status,
        "code": error.code,
    }
    if isinstance(error, errors.RateLimited | errors.BudgetExhausted):
        fields["limit"] = kind
    if error.reason:
        fields["reason"] = error.reason
    if client is not None:
        fields["client"] = client.name
    if request is not None:
        fields |= {"agent": request.agent, "visitor": visitor_hash(request.fingerprint)}
    log.warning(
        "broker.embed_token",
        outcome=error.outcome.value,
        **fields,
        duration_ms=round(seconds * 1000, 3),
    )
