"""The JSON that goes out, as types: what callers read, what the API document is built from.

The success body has two vendor generations' shapes at once (`success` with `session_id`, and
`status` with `sid`), so clients of either work unchanged.  Bytes are made once, when a token is
stored, not when it is handed out.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from broker.errors import BrokerError
from broker.model import Minted
from broker.telemetry.readiness import HealthState

ErrorCode = Annotated[
    str,
    Meta(
        pattern="^[A-Z][A-Z0-9_]*$",
        description="What failed, for programs",
        examples=["VALIDATION_ERROR"],
    ),
]


class TokenData(Struct, frozen=True):
    """The token and the session it opens.  Fields that the vendor adds pass through."""

    token: Annotated[str, Meta(description="The embed token, a JWT")]
    session_id: Annotated[str, Meta(description="Names the visitor's session from mint to expiry")]
    sid: Annotated[str, Meta(description="The same as `session_id`")]
    expires_at: Annotated[int, Meta(description="The token's `exp`: Unix seconds")]


class TokenAnswer(Struct, frozen=True):
    """A token was minted or reused."""

    success: Literal[True]
    status: Literal["success"]
    status_code: Literal[200]
    data: TokenData


class ErrorDetail(Struct, frozen=True):
    """What failed."""

    code: ErrorCode
    message: Annotated[str, Meta(description="What failed and what to do, for people")]
    httpStatus: Annotated[int, Meta(ge=400, le=599)]  # noqa: N815 - the vendor's spelling


class ErrorAnswer(Struct, frozen=True):
    """Every failure has this shape; all three numbers equal the HTTP status."""

    success: Literal[False]
    status: Literal["error"]
    status_code: Annotated[int, Meta(ge=400, le=599)]
    error: ErrorDetail


class ValidAnswer(Struct, frozen=True):
    """Whether the client secret of the request is a known one."""

    valid: bool


class HealthAnswer(Struct, frozen=True):
    """`ok`, or the reason why not."""

    status: HealthState


class ActiveToken(Struct, frozen=True):
    """A token that is good and was handed to the caller (RFC 7662 section 2.2)."""

    active: Literal[True]
    client_id: Annotated[str, Meta(description="The client it was handed to")]
    sub: Annotated[str, Meta(description="The same as `agent_id`")]
    agent_id: Annotated[str, Meta(description="The agent that it opens")]
    fingerprint: Annotated[str, Meta(description="Its visitor")]
    sid: Annotated[str, Meta(description="The session's id")]
    iat: Annotated[int, Meta(description="Issued: Unix seconds")]
    exp: Annotated[int, Meta(description="Expires: Unix seconds")]
    model: Annotated[str, Meta(description="The model that was asked for")] | UnsetType = UNSET


class InactiveToken(Struct, frozen=True):
    """Expired, revoked, unknown, another client's: no reason is given."""

    active: Literal[False]


class SessionAnswer(Struct, frozen=True):
    """A live session, as an operator sees it."""

    session_id: str
    client: str
    agent_id: str
    fingerprint: str
    model: str | None
    issued_at: Annotated[int, Meta(description="Unix seconds")]
    expires_at: Annotated[int, Meta(description="Unix seconds")]


class SessionsAnswer(Struct, frozen=True):
    """A page of live sessions; `next` is the `after` of the following page, null at the end."""

    sessions: list[SessionAnswer]
    next: str | None


class EndedAnswer(Struct, frozen=True):
    """How many sessions were ended."""

    ended: int


_encode = msgspec.json.Encoder().encode

_TO_SESSION, _TO_SID = b'","session_id":"', b'","sid":"'
"""What stands between the names in a success body."""


def success_body(minted: Minted) -> bytes:
    """Return the ready 200 body of a token, in no more memory than it needs."""
    data: dict[str, object] = {
        **minted.extra,
        "token": minted.token,
        "session_id": minted.session_id,
        "sid": minted.session_id,
        "expires_at": minted.expires_at,
    }
    encoded = _encode({"success": True, "status": "success", "status_code": 200, "data": data})
    # Copied, because the encoder's bytes keep the buffer it wrote into: up to half as much again.
    return memoryview(encoded).tobytes()


class AnswerTemplate:
    """Makes the bodies of answers whose tokens expire together and come with the same `extra`."""

    def __init__(self, expires_at: int, extra: Mapping[str, object]) -> None:
        empty = success_body(Minted("", "", expires_at, 0, extra=extra))
        self._opening, _, self._closing = empty.rpartition(_TO_SESSION + _TO_SID)

    def body(self, token: bytes, session_id: str) -> bytes:
        """Return `success_body`, for names that JSON writes as they are: a JWT, and hex digits."""
        session = session_id.encode()
        return b"".join(
            (self._opening, token, _TO_SESSION, session, _TO_SID, session, self._closing)
        )


@lru_cache(maxsize=256)  # a flood of refusals says the same again and again
def error_body(status: int, code: str, message: str) -> bytes:
    """Return the ready body of a failure."""
    detail = ErrorDetail(code=code, message=message, httpStatus=status)
    return _encode(ErrorAnswer(success=False, status="error", status_code=status, error=detail))


def error_body_of(error: BrokerError) -> bytes:
    """Return the ready body of this error."""
    return error_body(error.status, error.code, error.message)


def plain_body(answer: Struct | Mapping[str, object]) -> bytes:
    """Return any other answer as JSON."""
    return _encode(answer)


class _NamesOnly(Struct):
    token: str
    session_id: str = ""


class _DataOnly(Struct):
    data: _NamesOnly


_decode_data = msgspec.json.Decoder(_DataOnly).decode


def data_in(body: bytes) -> _NamesOnly:
    """Read token and session back out of a ready success body: for logs, not per request."""
    return _decode_data(body).data


def token_in(body: bytes) -> str:
    """Read the token alone."""
    return data_in(body).token
