"""What the vendor can say, as bytes: tokens in every generation's shape, refusals, pages.

Knows the wire format.  Does not know when each answer is given, and never shows a body in a
`repr`, because a body may hold a token.
"""

from collections.abc import Sequence
from enum import Enum
from typing import assert_never

import msgspec
from msgspec import Struct
from typing_extensions import override

JSON = ("Content-Type", "application/json")
"""The header of every answer that comes from the API itself and not from the edge before it."""

DEFAULT_MODEL = "fake-model"
"""Echoed by a vendor that was given no list of models and was asked for none."""

Header = tuple[str, str]
Headers = tuple[Header, ...]


class Shape(Enum):
    """The forms that the body of a successful mint has had, oldest first."""

    SESSION_ID = "session_id"
    """`success` and `data` with `token`, `session_id`."""
    SID = "sid"
    """`success` and `data` with `token`, `sid`."""
    STATUS = "status"
    """`status`, `status_code` and `data` with `token`, `sid`."""
    MODELS = "models"
    """The same with `supported_models`, and `model` if the request named one."""
    NEWEST = "newest"
    """The same with `supported_models` and always `model`."""


class Refusal(Enum):
    """HTTP status and error code of every documented refusal."""

    MISSING_AUTH = (401, "MISSING_AUTH")
    UNAUTHORIZED = (401, "UNAUTHORIZED")
    RUNTIME_SUSPENDED = (403, "RUNTIME_SUSPENDED")
    INSUFFICIENT_BALANCE = (402, "INSUFFICIENT_BALANCE")
    ACCOUNT_SUSPENDED = (403, "ACCOUNT_SUSPENDED")
    PLAN_REQUIRED = (403, "PLAN_REQUIRED")
    CONCURRENCY_LIMIT_REACHED = (403, "CONCURRENCY_LIMIT_REACHED")
    SESSION_DURATION_LIMIT = (403, "SESSION_DURATION_LIMIT")
    NOT_FOUND = (404, "NOT_FOUND")
    METHOD_NOT_ALLOWED = (405, "METHOD_NOT_ALLOWED")
    GONE = (410, "GONE")
    MODEL_NOT_GENERATED = (409, "MODEL_NOT_GENERATED")
    AGENT_NOT_READY = (409, "AGENT_NOT_READY")
    VALIDATION_ERROR = (400, "VALIDATION_ERROR")
    UNPROCESSABLE = (422, "VALIDATION_ERROR")
    RATE_LIMITED = (429, "RATE_LIMITED")
    SESSION_LIMIT = (429, "SESSION_LIMIT")
    INTERNAL_ERROR = (500, "INTERNAL_ERROR")
    BAD_GATEWAY = (502, "BAD_GATEWAY")
    SERVICE_UNAVAILABLE = (503, "SERVICE_UNAVAILABLE")
    GATEWAY_TIMEOUT = (504, "GATEWAY_TIMEOUT")


class Answer(Struct, frozen=True):
    """One HTTP answer.  A header may occur several times."""

    status: int
    body: bytes
    headers: Headers = (JSON,)

    def plus(self, headers: Headers) -> "Answer":
        """Return the same answer with further headers."""
        return Answer(self.status, self.body, self.headers + headers)

    @override
    def __repr__(self) -> str:
        return f"Answer({self.status}, {len(self.body)} bytes)"


_encode = msgspec.json.Encoder().encode


def json_answer(content: object, status: int = 200) -> Answer:
    """Return anything as JSON."""
    return Answer(status, _encode(content))


def refusal(what: Refusal | tuple[int, str], message: str = "refused by the fake vendor") -> Answer:
    """Return the vendor's error envelope for this status and code; all three numbers agree."""
    status, code = what.value if isinstance(what, Refusal) else what
    detail = {"code": code, "message": message, "httpStatus": status}
    return json_answer({"error": detail, "status": "error", "status_code": status}, status)


def token_answer(
    shape: Shape, token: str, session: str, model: str | None, models: Sequence[str]
) -> Answer:
    """Return a successful mint; `model` is what was asked for, `models` what the agent can."""
    data: dict[str, object] = {"token": token}
    data["session_id" if shape is Shape.SESSION_ID else "sid"] = session
    match shape:
        case Shape.SESSION_ID | Shape.SID:
            return json_answer({"success": True, "data": data})
        case Shape.STATUS:
            pass
        case Shape.MODELS | Shape.NEWEST:
            data["supported_models"] = models or (model or DEFAULT_MODEL,)
            if shape is Shape.NEWEST or model is not None:
                data["model"] = model or next(iter(models), DEFAULT_MODEL)
        case _:
            assert_never(shape)
    return json_answer({"status": "success", "status_code": 200, "data": data})
