"""The vendor's other routes, for callers that have one base URL for everything.

    a route that is passed on? -> whose request? -> a place? -> the vendor -> its answer, streamed

The caller's own key goes along, and no other: the broker's never does.  Nothing is charged to the
budget, and nothing cached.  Both directions are streamed: what is in memory at a time is some
buffers, however large a body is, and neither side is read faster than the other one takes.

Who may.  Where there are no `[clients]`, on this machine only, the key of the vendor that a caller
sends has to be the broker's: any other would be a failed login at the vendor, and those are counted
by address, so a stranger's would cost the broker its mints.  Where there are clients, the client
secret comes as `Authorization: Bearer` and stays here; `api-secret` is the caller's key of the
vendor.  A client secret in its place is refused, so that no SDK shows one to the vendor.

Half an answer.  A vendor that breaks off leaves the caller with a broken transfer: its
connection is cut, so that this cannot be taken for a whole one.  A caller that leaves ends the
vendor's connection.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from http import HTTPStatus
from typing import Protocol

import structlog
from aiohttp.hdrs import CONTENT_LENGTH, TRANSFER_ENCODING, UPGRADE
from aiohttp.web_request import BaseRequest
from msgspec import Struct

from broker import errors
from broker.issuers.vendor.client import Answer
from broker.issuers.vendor.passing import PassedAnswer, PassThroughClient, unpacked
from broker.model import Clock, Secret
from broker.rules.passing import BadTarget, has_place, route_of, to_the_caller, to_the_vendor
from broker.telemetry.labels import PassedOutcome
from broker.telemetry.pass_through_metrics import PassThroughMetrics
from broker.units import SECOND
from broker.web.auth import API_SECRET, Client, ClientAuthenticator, bearer_of, secret_of
from broker.web.passage import (
    FAILURES,
    STALLED,
    Passage,
    cut,
    head_of,
    refused_target,
    upload,
    verdict_on,
)
from broker.web.response import Answer as OwnAnswer
from broker.web.router import Routes

log = structlog.get_logger()

METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
"""What the vendor's routes answer to."""

MAX_PASSED = 128
"""Requests that are passed on at a time, by each process: with their buffers some 20 MB, and few
beside the connections that it may have.  One client has half of them at most: see `has_place`."""

RETRY = 1_000_000
"""Microseconds after which a place may be free."""

MAX_READ = 64 * 1024
"""Bytes that are read of a 429 before it is passed on: its code says whether it is to be heeded."""

MAX_ACCEPTED = 1024
"""Keys remembered that the vendor has accepted last."""

SUSPECT = 60 * SECOND
"""Microseconds after a refused key in which a 429 to one that was not accepted yet may be for
failed logins: the vendor counts those by the address, for a minute, whichever key they had."""

_BODILESS = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})
_OUTCOMES = {2: PassedOutcome.OK, 3: PassedOutcome.REDIRECT, 4: PassedOutcome.CALLER_ERROR}


class Heeds(Protocol):
    """Who is told of a vendor that is asked too much."""

    def heed_elsewhere(self, answer: Answer) -> bool:
        """Pause mints if this answer, on another route, asks for it."""
        ...


class Access(Struct, frozen=True):
    """What may be passed on, and for whom: `needs_switch` where there are clients."""

    routes: Sequence[str]
    needs_switch: bool


class PassThrough:
    """Answers what no route of the broker does; give it to `Routes.use_elsewhere`."""

    def __init__(
        self,
        routes: Routes,
        access: Access,
        authenticator: ClientAuthenticator,
        client: PassThroughClient,
        issuer: Heeds,
        metrics: PassThroughMetrics,
        clock: Clock,
    ) -> None:
        self._routes = routes
        self._access = access
        self._authenticator = authenticator
        self._client = client
        self._issuer = issuer
        self._metrics = metrics
        self._clock = clock
        self._under_way = Counter[str]()  # by the name of the client; those that have none are out
        self._accepted: set[bytes] = set()
        self._suspect_until = 0

    async def __call__(self, request: BaseRequest, request_id: str) -> OwnAnswer:
        """Pass a request on, or say why not; raises BrokerError."""
        started = time.perf_counter()
        route = ""
        try:
            route = self._route(request)
            client, key = self._identify(request)
            fields = self._fields(request)
            self._require_place(client)
        except errors.BrokerError as error:
            if not isinstance(error, errors.NotFound):  # which has nothing to do with the vendor
                self._refuse(error, route, request_id, started)
            raise
        self._hold(client, 1)
        outcome, failure = PassedOutcome.LEFT, ""
        passage: Passage | None = None
        try:
            async with asyncio.timeout(STALLED) as limit:
                passage = Passage(request, request_id, client, route, limit)
                answer = await self._pass_on(passage, fields, key)
            outcome = _OUTCOMES.get(passage.status // 100, PassedOutcome.SERVER_ERROR)
        except FAILURES as error:
            assert passage is not None
            outcome, failed = verdict_on(passage, error)
            failure = failed.reason or failed.code
            if not passage.is_begun:
                raise failed from error
            return cut(request)
        except Exception:
            if passage is None or not passage.is_begun:
                raise
            outcome, failure = PassedOutcome.BROKEN, "defect"
            log.exception("broker.defect", request_id=request_id)
            return cut(request)  # an answer of ours would be the rest of the vendor's
        else:
            return answer
        finally:
            self._hold(client, -1)
            self._note(passage, outcome, failure, time.perf_counter() - started)

    def _require_place(self, client: Client) -> None:
        own = self._under_way[client.name]
        if not has_place(own, self._under_way.total(), MAX_PASSED):
            raise errors.ServiceUnavailable(
                f"too many requests are passed on already, {own} of them for this client: of"
                f" {MAX_PASSED} places a client may take as many as it leaves free",
                RETRY,
            )

    def _hold(self, client: Client, change: int) -> None:
        """Take a place (1), or give it back (-1)."""
        self._under_way[client.name] += change
        if not self._under_way[client.name]:
            del self._under_way[client.name]  # a reload may have taken it away
        self._metrics.in_flight.set(self._under_way.total())

    def _route(self, request: BaseRequest) -> str:
        """Return the route of a request that may be passed on; raises NotFound, Invalid, 405."""
        target = request.raw_path
        try:
            route = route_of(target, self._access.routes)
        except BadTarget as error:
            raise refused_target(error) from None
        if route is None:
            raise self._routes.not_found(target.partition("?")[0])
        if request.method not in METHODS:
            raise errors.MethodNotAllowed(", ".join(METHODS))
        return route

    def _identify(self, request: BaseRequest) -> tuple[Client, bytes]:
        """Return who asks, and which key of the vendor's goes along, as its digest."""
        now, headers = self._clock.mono(), request.headers
        if not self._access.needs_switch:
            client = self._authenticator.identify(request, now)
            return client, client.digest
        given = headers.get(API_SECRET, "")
        if given and self._authenticator.holder_of(given) is not None:
            raise errors.Invalid(
                "api-secret: this is a client secret, which the vendor must not see; send your key"
                " of the vendor in this header, and the client secret as Authorization: Bearer"
            )
        client = self._authenticator.identify(request, now, as_bearer=True)
        if not client.pass_through:
            raise errors.RouteNotAllowed(
                "this client may ask for tokens only; its operator can set pass_through = true"
            )
        return client, Secret(secret_of(headers, "vendor's key")).digest() if given else b""

    def _fields(self, request: BaseRequest) -> list[tuple[str, str]]:
        """Return the headers that go to the vendor; raises Invalid, MissingAuth."""
        headers = request.headers
        if UPGRADE in headers:
            raise errors.Invalid("upgrade: nothing but HTTP/1.1 is passed on; leave it out")
        if headers.get(TRANSFER_ENCODING, "chunked").lower() != "chunked":
            raise errors.Invalid("transfer-encoding: must be chunked, or be left out")
        if self._access.needs_switch and not headers.get(API_SECRET):
            raise errors.MissingAuth("api-secret: missing; send your own key of the vendor")
        # beside a key it is the client secret, or a second key that nobody has looked at
        without = frozenset({"authorization"} if API_SECRET in headers else ())
        if any(not text.isascii() for field in headers.items() for text in field):
            raise errors.Invalid("headers: must be ASCII to be passed on; encode what is not")
        try:
            fields = to_the_vendor(headers.items(), without=without)
        except ValueError as error:
            raise errors.Invalid(str(error)) from None
        if self._access.needs_switch:
            _require_hidden(bearer_of(headers), request.raw_path, fields)
        return fields

    async def _pass_on(
        self, passage: Passage, fields: list[tuple[str, str]], key: bytes
    ) -> OwnAnswer:
        request = passage.request
        fields = [*fields, ("X-Request-Id", passage.request_id), ("Via", "1.1 embed-token-broker")]
        sent = upload(passage) if request.body_exists else None
        async with self._client.send(request.method, request.raw_path, fields, sent) as answer:
            passage.moved()
            passage.status = answer.status
            passage.vendor_id = self._routes.given_id(answer.headers)
            first = b""
            if answer.status == HTTPStatus.TOO_MANY_REQUESTS:
                first = await self._heeded(passage, answer, key)
            else:
                self._remember(key, is_refused=answer.status == HTTPStatus.UNAUTHORIZED)
            return await self._answer(passage, answer, first)

    async def _heeded(self, passage: Passage, answer: PassedAnswer, key: bytes) -> bytes:
        """Return the beginning of a 429, which may pause mints.

        One soon after any 401 may be for failed logins, which are counted apart from all else.
        """
        content = bytearray()
        while len(content) <= MAX_READ and (chunk := await answer.chunk()):
            passage.moved()
            content += chunk
        now = self._clock.mono()
        if key not in self._accepted and now < self._suspect_until:
            self._suspect_until = now + SUSPECT
        else:
            _ = self._issuer.heed_elsewhere(unpacked(answer, bytes(content), MAX_READ))
        return bytes(content)

    def _remember(self, key: bytes, *, is_refused: bool) -> None:
        if is_refused:
            self._accepted.discard(key)
            self._suspect_until = self._clock.mono() + SUSPECT
            return
        if len(self._accepted) >= MAX_ACCEPTED:
            self._accepted.clear()
        self._accepted.add(key)

    async def _answer(self, passage: Passage, answer: PassedAnswer, first: bytes) -> OwnAnswer:
        """Send the vendor's answer, as it comes."""
        request, writer = passage.request, passage.request.writer
        fields = to_the_caller(answer.headers.items())
        is_framed = CONTENT_LENGTH in answer.headers and TRANSFER_ENCODING not in answer.headers
        has_body = answer.status not in _BODILESS
        is_chunked = has_body and not is_framed and request.version >= (1, 1)
        if not is_framed or answer.status == HTTPStatus.NO_CONTENT:
            fields = [field for field in fields if field[0].lower() != "content-length"]
        is_last = (
            self._routes.draining
            or not request.keep_alive
            or request.version < (1, 1)
            or not request.content.is_eof()
            or (has_body and not is_framed and not is_chunked)
        )
        head = head_of(answer, fields, passage.request_id, chunked=is_chunked, last=is_last)
        passage.is_begun = True
        if request.transport is None:
            raise ConnectionResetError
        request.transport.write(head)
        if is_chunked:
            writer.enable_chunking()
        chunk = first
        while chunk or (chunk := await answer.chunk()):
            await writer.write(chunk)
            passage.received += len(chunk)
            passage.moved()
            chunk = b""
        if is_chunked:
            await writer.write_eof()
        return OwnAnswer(answer.status, b"", b"", is_last, is_written=True)

    def _refuse(
        self, error: errors.BrokerError, route: str, request_id: str, started: float
    ) -> None:
        """Count what is not passed on; one of a kind is written in a minute."""
        seconds = time.perf_counter() - started
        self._metrics.duration[PassedOutcome.REFUSED].observe(seconds)
        now, anyway = self._clock.mono(), self._routes.tokens.debug
        if self._routes.refusals.first(error.code, now, anyway=anyway) or anyway:
            log.warning(
                "broker.pass_through",
                outcome=PassedOutcome.REFUSED.value,
                request_id=request_id,
                status=error.status,
                code=error.code,
                route=route,
                duration_ms=round(seconds * 1000, 3),
            )

    def _note(
        self, passage: Passage | None, outcome: PassedOutcome, failure: str, seconds: float
    ) -> None:
        self._metrics.duration[outcome].observe(seconds)
        if passage is None:
            return
        fields: dict[str, object] = {
            "outcome": outcome.value,
            "request_id": passage.request_id,
            "client": passage.client.name,
            "method": passage.request.method,
            "route": passage.route,
            "status": passage.status,
            "sent": passage.sent,
            "received": passage.received,
            "duration_ms": round(seconds * 1000, 3),
        }
        if passage.vendor_id and passage.vendor_id != passage.request_id:
            fields["vendor_request_id"] = passage.vendor_id
        if outcome in (PassedOutcome.FAILED, PassedOutcome.BROKEN):
            log.warning("broker.pass_through", **fields, reason=failure)
        else:
            log.info("broker.pass_through", **fields)


def _require_hidden(secret: str, target: str, fields: Sequence[tuple[str, str]]) -> None:
    """Raise Invalid if a client secret is anywhere else in a head: it would go along."""
    places = [("target", target), *((name.lower(), value) for name, value in fields)]
    for place, text in places:
        if secret in text:
            raise errors.Invalid(
                f"{place}: has the client secret, which the vendor must not see; send it as"
                " Authorization: Bearer, and nowhere else"
            )
