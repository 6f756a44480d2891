"""The vendor's mint call as values: the bytes to send, and what an answer means.

Pure functions; time comes in, nothing is sent.  Knows what the vendor's answers look like and
what each says about our key, the account, the agent or the weather.  Does not know who asks
again, when, with which key, or how long a refusal is remembered.

Numbers inside the body count only where the HTTP status is 200, with which older revisions
wrapped their failures; `vendor_failures` says what a status and a code mean.

Invariants:
- `read_answer` never raises, and each answer becomes exactly one reply.
- `Granted` needs a 200, a readable body without any mark of failure, and a token.
- `BadKey` needs JSON that names a reason known to mean the key: no page of the edge, no bare
  status and no unknown code condemns a key.
- Of a vendor's failure nothing gets out but a code that looks like one and a message that
  `_passable` has gone over.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import assert_never

import msgspec
from msgspec import Struct

from broker.issuers.vendor.faults import OurFault, meaning_of, usual_status
from broker.issuers.vendor.headers import Headers, encoded, parse_retry_after, values, vendor_date
from broker.issuers.vendor.replies import BadKey, Broken, Granted, Refused, Reply, Scope, Throttled
from broker.issuers.vendor.token import claims_of, expires_at, is_token, lifetime, session_of
from broker.model import Minted, TokenRequest
from broker.rules.reuse import lifetime_of
from broker.telemetry.labels import Reason

MAX_BODY = 100 * 1024
"""Bytes of an answer that are read at all; real ones have about a thousand."""

MAX_MESSAGE = 200
"""Characters of a vendor's message that a caller gets to see."""

MAX_EXTRA = 4096
"""Bytes of JSON that are kept with a token, for its hour, beside what the broker writes."""

MAX_EXTRA_DEPTH = 4
"""Levels of lists and objects in such a field; those seen are strings and a flat list."""

OURS = frozenset({"token", "session_id", "sid", "expires_at"})
"""Fields of `data` that the broker writes itself; the vendor's do not pass through."""

_BARE = "Unauthorized"
"""All that an older revision said of a bad key, `{"error": "Unauthorized"}`, with 401 or 200.
Read as the code UNAUTHORIZED: were it a passing fault, a dead key would be tried until the
vendor throttles failed authentication, and then look like a lack of budget."""

_IN_PLACE = "the vendor refused this request"
"""The message where the vendor sent none, or none that may be shown."""

_FAILURES = range(400, 600)
"""The statuses of RFC 9110 sections 15.5 and 15.6."""

_CODE = re.compile(r"[A-Z][A-Z0-9_]{1,39}")
"""What looks like a code: short, capitals; the shape that callers are promised."""

_WORD = re.compile(r"[\w.~+/=:%@-]+")

_encode = msgspec.json.Encoder().encode
_decode_fields = msgspec.json.Decoder(dict[str, object]).decode


class _Failure(Struct, frozen=True):
    """The vendor's envelope; `code` is empty where there was none, or none like a code."""

    status: int
    code: str
    message: object


def build_request(request: TokenRequest) -> bytes:
    """Return the JSON body of a mint call; the fingerprint goes out byte for byte."""
    fields = {"agent_id": request.agent, "fingerprint": request.fingerprint}
    if request.model is not None:
        fields["model"] = request.model
    return _encode(fields)


def read_answer(
    status: int, headers: Headers, body: bytes, now: int, private: Iterable[str] = ()
) -> Reply:
    """Say what an answer means.

    `body` is what arrived, not decompressed; `now` is our wall clock in Unix microseconds;
    `private` are texts that no message may show, such as the key and the fingerprint that
    were sent.
    """
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Broken(Reason.STATUS_5XX)
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        return Broken(Reason.REDIRECT)
    if status < HTTPStatus.BAD_REQUEST and status != HTTPStatus.OK:
        return Broken(Reason.UNEXPECTED_STATUS)
    fields = _fields_of(headers, body)
    if isinstance(fields, Reason):
        return _unreadable(status, fields, headers, now)
    failure = _failure_in(status, fields)
    if failure is None:
        return _grant(fields, headers, now)
    return _classify(failure, headers, now, private)


def _fields_of(headers: Headers, body: bytes) -> dict[str, object] | Reason:
    if len(body) > MAX_BODY:
        return Reason.TOO_LARGE
    if encoded(headers):
        return Reason.ENCODED
    try:
        return _decode_fields(body.removeprefix(BOM_UTF8))
    except (ValueError, RecursionError):
        return Reason.NOT_JSON


def _unreadable(status: int, reason: Reason, headers: Headers, now: int) -> Reply:
    """Judge by the status alone: the body is no JSON object."""
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return _throttled(headers, now)
    return Broken(Reason.EDGE_403 if status == HTTPStatus.FORBIDDEN else reason)


def _failure_in(status: int, fields: Mapping[str, object]) -> _Failure | None:
    """Read the envelope of a failure; None for a 200 without any mark of one."""
    error = fields.get("error")
    detail = error if isinstance(error, dict) else {}
    code = _code_in(status, error)
    if status == HTTPStatus.OK:
        told = _failing(detail.get("httpStatus")) or _failing(fields.get("status_code"))
        marked = error or fields.get("success") is False or fields.get("status") == "error"
        if not (told or marked):
            return None
        status = told or usual_status(code) or status
    return _Failure(status, code, detail.get("message"))


def _code_in(status: int, error: object) -> str:
    if error == _BARE and status in {HTTPStatus.OK, HTTPStatus.UNAUTHORIZED}:
        return "UNAUTHORIZED"
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) and _CODE.fullmatch(code) else ""


def _failing(number: object) -> int | None:
    """Return a status found in a body if it is that of a failure."""
    return number if isinstance(number, int) and number in _FAILURES else None


def _classify(failure: _Failure, headers: Headers, now: int, private: Iterable[str]) -> Reply:
    match meaning_of(failure.status, failure.code):
        case OurFault.BAD_KEY:
            return BadKey(failure.code)
        case OurFault.THROTTLED:
            return _throttled(headers, now)
        case Scope() as scope:
            message = _passable(failure.message, private)
            return Refused(failure.status, failure.code, message, scope)
        case None:
            return Broken(_unknown(failure))
        case meaning:
            assert_never(meaning)


def _unknown(failure: _Failure) -> Reason:
    """Name a failure that the tables do not know."""
    if failure.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Reason.STATUS_5XX
    if failure.status == HTTPStatus.OK:
        return Reason.NO_TOKEN
    no_envelope = failure.status == HTTPStatus.FORBIDDEN and not failure.code
    return Reason.EDGE_403 if no_envelope else Reason.UNEXPECTED_STATUS


def _throttled(headers: Headers, now: int) -> Throttled:
    """Read how long to wait; a date is held against the vendor's clock, not against ours."""
    theirs = vendor_date(headers, now)
    return Throttled(
        parse_retry_after(values(headers, "retry-after"), now if theirs is None else theirs)
    )


def _grant(fields: Mapping[str, object], headers: Headers, now: int) -> Granted | Broken:
    data = fields.get("data")
    token = data.get("token") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not is_token(token):
        return Broken(Reason.NO_TOKEN)
    claims = claims_of(token)
    life = lifetime(claims, vendor_date(headers, now), now)
    return Granted(
        Minted(
            token=token,
            session_id=session_of((data.get("session_id"), data.get("sid")), claims, token),
            expires_at=expires_at(claims, life, now),
            lifetime=life,
            whole=lifetime_of(claims),
            extra=_extra(data),
        )
    )


def _extra(data: Mapping[str, object]) -> dict[str, object]:
    """Keep the vendor's further fields, in order, as far as they are shallow and there is room."""
    kept: dict[str, object] = {}
    room = MAX_EXTRA
    for name, value in data.items():
        if name in OURS or not _fits(value, MAX_EXTRA_DEPTH):
            continue
        size = len(_encode({name: value}))
        if size <= room:
            kept[name] = value
            room -= size
    return kept


def _fits(value: object, levels: int) -> bool:
    """Whether a JSON value has at most so many levels of lists and objects."""
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_fits(each, levels - 1) for each in inner)


def _passable(message: object, private: Iterable[str]) -> str:
    """Return of a vendor's message what a caller may read: one printable line, bounded.

    Words that could be a key, a token or a fingerprint are masked, so that half of one does
    not pass either.  A message that mentions a private text, in any case, is not passed on
    at all: what else it says about it cannot be judged here.
    """
    if not isinstance(message, str):
        return _IN_PLACE
    line = _one_line(message)
    mentioned = (_one_line(text).casefold() for text in private)
    if any(text and text in line.casefold() for text in mentioned):
        return _IN_PLACE
    return _WORD.sub(_mask, line)[:MAX_MESSAGE].strip() or _IN_PLACE


def _one_line(text: str) -> str:
    """Replace what cannot be printed (controls, line ends, bidi marks) by single spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _mask(word: re.Match[str]) -> str:
    """Hide what looks like an identifier: long, or of some length and with a digit in it."""
    text = word.group()
    hidden = len(text) > 24 or (len(text) > 5 and any(c.isdigit() for c in text))  # noqa: PLR2004
    return "[...]" if hidden else text
