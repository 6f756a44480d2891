"""What the vendor's failures mean: two tables, and the order in which they are asked.

The code decides first and the status second: there are two kinds of 429 and several of 403.
Knows nothing of bodies and headers.  Invariant: what the tables do not know is nobody's verdict,
so it reaches no caller, condemns no key and is remembered by nobody.
"""

from collections.abc import Mapping
from enum import Enum
from http import HTTPStatus

from broker.issuers.vendor.replies import Scope


class OurFault(Enum):
    """What a failure says about us, where it is no verdict on what the caller asked for."""

    BAD_KEY = "bad_key"
    THROTTLED = "throttled"


BY_CODE: Mapping[str, tuple[int, Scope | OurFault]] = {
    # code                       usual status, meaning
    "UNAUTHORIZED":              (401, OurFault.BAD_KEY),
    "MISSING_AUTH":              (401, OurFault.BAD_KEY),
    "RUNTIME_SUSPENDED":         (403, OurFault.BAD_KEY),
    "INSUFFICIENT_BALANCE":      (402, Scope.ACCOUNT),
    "ACCOUNT_SUSPENDED":         (403, Scope.ACCOUNT),
    "PLAN_REQUIRED":             (403, Scope.AGENT_MODEL),
    "NOT_FOUND":                 (404, Scope.AGENT_MODEL),
    "MODEL_NOT_GENERATED":       (409, Scope.AGENT_MODEL),
    "AGENT_NOT_READY":           (409, Scope.AGENT_MODEL),
    "CONCURRENCY_LIMIT_REACHED": (403, Scope.NEVER),
    "SESSION_DURATION_LIMIT":    (403, Scope.NEVER),
    "VALIDATION_ERROR":          (400, Scope.NEVER),
    "MISSING_PARAM":             (400, Scope.NEVER),
    "SESSION_LIMIT":             (429, Scope.NEVER),
    "RATE_LIMITED":              (429, OurFault.THROTTLED),
}  # fmt: skip
"""What the vendor's codes mean; the usual status stands in where an answer names none."""

BY_STATUS: Mapping[int, Scope | OurFault] = {
    400: Scope.NEVER,
    402: Scope.ACCOUNT,
    403: Scope.NEVER,
    404: Scope.NEVER,
    409: Scope.NEVER,
    410: Scope.AGENT_MODEL,
    422: Scope.NEVER,
    429: OurFault.THROTTLED,
}
"""What a status means with a code that is not above.  One that is not here reaches no caller."""

KEY_STATUSES = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
"""Where a code about the key is believed.  With any other status it is no refusal either: a
caller who read UNAUTHORIZED would look for the mistake in a secret of their own."""


def meaning_of(status: int, code: str) -> Scope | OurFault | None:
    """Look a failure up; `code` is empty where the answer had none.

    None means that nobody knows: a status that never passes, or an envelope without a code.
    """
    by_status = BY_STATUS.get(status)
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return Scope.NEVER if code == "SESSION_LIMIT" else by_status
    _, by_code = BY_CODE.get(code, (status, None))
    if by_code is OurFault.BAD_KEY:
        return by_code if status in KEY_STATUSES else None
    if by_status is None or not code:
        return None
    # A 400 is about one request whatever its code, and so is never remembered.
    return by_status if by_code is None or status == HTTPStatus.BAD_REQUEST else by_code


def usual_status(code: str) -> int | None:
    """Return the status that this code has in the vendor's documentation."""
    known = BY_CODE.get(code)
    return None if known is None else known[0]
