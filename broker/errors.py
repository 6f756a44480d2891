"""Every way a request can fail, split by whose fault it is.

    BrokerError
    ├── CallerError                 the request cannot succeed as it stands
    │   ├── MissingParam            400 MISSING_PARAM
    │   ├── Invalid                 400 VALIDATION_ERROR
    │   ├── MissingAuth             401 MISSING_AUTH
    │   ├── Unauthorized            401 UNAUTHORIZED
    │   ├── AgentNotAllowed         403 AGENT_NOT_ALLOWED
    │   ├── RouteNotAllowed         403 ROUTE_NOT_ALLOWED
    │   ├── SecretInBrowser         403 SECRET_IN_BROWSER
    │   ├── NotFound                404 NOT_FOUND
    │   ├── MethodNotAllowed        405 METHOD_NOT_ALLOWED
    │   ├── RequestTimeout          408 REQUEST_TIMEOUT
    │   ├── PayloadTooLarge         413 PAYLOAD_TOO_LARGE
    │   ├── UnsupportedType         415 UNSUPPORTED_TYPE
    │   ├── RateLimited             429 RATE_LIMITED
    │   └── HeadTooLarge            431 HEAD_TOO_LARGE
    ├── VendorError                 what stands behind us failed or refused
    │   ├── UpstreamRefused         the vendor's status and code: on agent, model, account
    │   ├── UpstreamUnavailable     502 UPSTREAM_UNAVAILABLE
    │   └── UpstreamTimeout         504 UPSTREAM_TIMEOUT
    └── OurError                    we cannot take the request now
        ├── ServiceUnavailable      503 SERVICE_UNAVAILABLE
        │   ├── BudgetExhausted     503, because the vendor's budget is used up
        │   ├── SessionEnded        503, because the session was ended while it was minted
        │   └── StoreAway           503, because nothing can be done without the shared store
        └── Internal                500 INTERNAL_ERROR: a defect, never a documented answer

`transient` says whether the same request may succeed later without anybody changing anything;
only then is a token below its floor good enough.  Messages
never quote what the caller sent (it may be a secret, or carry control characters).
"""

from typing import ClassVar

from typing_extensions import override

from broker.model import LimitName, Outcome
from broker.rules.bucket import Verdict


class BrokerError(Exception):
    """A failed request: `status` and `code` as on the wire, `outcome` as in metrics."""

    status: int = 500
    code: str = "INTERNAL_ERROR"
    transient: bool = False
    remembered: bool = False
    """Whether this repeats what was known already, without a new call: logs count it."""
    reason: str = ""
    """What went wrong on the way to the vendor, as the metric calls it; empty for anything else."""
    outcome: ClassVar[Outcome] = Outcome.FAILED

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    @property
    def retry_after(self) -> int | None:
        """Microseconds after which a new attempt makes sense, where that is known."""
        return None

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.status} {self.code})"


class CallerError(BrokerError):
    """The request cannot succeed as it stands."""

    outcome = Outcome.INVALID


class MissingParam(CallerError):
    """A required field is absent."""

    status, code = 400, "MISSING_PARAM"


class Invalid(CallerError):
    """A field, or the body as a whole, breaks a rule that the message names."""

    status, code = 400, "VALIDATION_ERROR"


class MissingAuth(CallerError):
    """No client secret."""

    status, code, outcome = 401, "MISSING_AUTH", Outcome.UNAUTHORIZED


class Unauthorized(CallerError):
    """A client secret that nobody has."""

    status, code, outcome = 401, "UNAUTHORIZED", Outcome.UNAUTHORIZED


class AgentNotAllowed(CallerError):
    """A known client asks for an agent it was not given."""

    status, code, outcome = 403, "AGENT_NOT_ALLOWED", Outcome.FORBIDDEN


class RouteNotAllowed(CallerError):
    """A known client asks for a route of the vendor, and may not."""

    status, code, outcome = 403, "ROUTE_NOT_ALLOWED", Outcome.FORBIDDEN


class SecretInBrowser(CallerError):
    """The secret of `client` arrived from a browser: it has leaked into a page."""

    status, code, outcome = 403, "SECRET_IN_BROWSER", Outcome.FORBIDDEN

    def __init__(self, message: str, client: str) -> None:
        super().__init__(message)
        self.client = client


class NotFound(CallerError):
    """No such route."""

    status, code = 404, "NOT_FOUND"


class MethodNotAllowed(CallerError):
    """The route exists, the method does not; `allow` lists those that do."""

    status, code = 405, "METHOD_NOT_ALLOWED"

    def __init__(self, allow: str) -> None:
        super().__init__(f"this route answers {allow} only")
        self.allow = allow


class PayloadTooLarge(CallerError):
    """The body is longer than a token request can be."""

    status, code = 413, "PAYLOAD_TOO_LARGE"


class UnsupportedType(CallerError):
    """A content encoding: the body must come as it is."""

    status, code = 415, "UNSUPPORTED_TYPE"


class RequestTimeout(CallerError):
    """The body did not arrive in time."""

    status, code = 408, "REQUEST_TIMEOUT"


REACHED = {
    name: f"limit {name.value} reached: retry after the time in Retry-After" for name in LimitName
}
"""What is told of a limit that refused."""


class RateLimited(CallerError):
    """One of our limits refused; `verdict` is what its bucket said."""

    status, code, outcome = 429, "RATE_LIMITED", Outcome.LIMITED
    transient = True

    def __init__(self, limit: LimitName, verdict: Verdict) -> None:
        super().__init__(REACHED[limit])
        self.limit = limit
        self.verdict = verdict

    @property
    @override
    def retry_after(self) -> int:
        return self.verdict.retry_after


class HeadTooLarge(CallerError):
    """The request line or the headers are longer than a listener reads (RFC 6585 section 5)."""

    status, code = 431, "HEAD_TOO_LARGE"


class VendorError(BrokerError):
    """What stands behind us failed or refused."""


class UpstreamRefused(VendorError):
    """The vendor's verdict on this agent, model or account, passed on with its status and code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class UpstreamUnavailable(VendorError):
    """The attempt failed, or our own key is bad: the vendor's 401 is never the caller's."""

    status, code, transient = 502, "UPSTREAM_UNAVAILABLE", True


class SessionTaken(UpstreamUnavailable):
    """The vendor, or a cache before it, gave a session or a token that is another visitor's."""

    def __init__(self) -> None:
        super().__init__("the vendor gave a session that is another visitor's")


class UpstreamTimeout(VendorError):
    """The vendor did not answer before the deadline."""

    status, code, transient = 504, "UPSTREAM_TIMEOUT", True


class OurError(BrokerError):
    """We cannot take the request now."""


class ServiceUnavailable(OurError):
    """Budget, pause, breaker or drain; `wait` is the predicted time in microseconds."""

    status, code, transient, outcome = 503, "SERVICE_UNAVAILABLE", True, Outcome.SHED

    def __init__(self, message: str, wait: int) -> None:
        super().__init__(message)
        self.wait = wait

    @property
    @override
    def retry_after(self) -> int:
        return self.wait


class BudgetExhausted(ServiceUnavailable):
    """The vendor's budget has no slot for this mint within the time a caller may wait."""


class SessionEnded(ServiceUnavailable):
    """The visitor's session was ended while its token was minted: that token is not good."""

    transient = False
    """What was held before was ended, too: it is no way out."""

    def __init__(self) -> None:
        super().__init__("the session was ended while its token was minted; ask again", 1_000_000)


RETRY_STORE = 1_000_000
"""Microseconds that callers are told to wait for a shared store: about a restart's length."""


class StoreAway(ServiceUnavailable):
    """Nothing can be done here without the shared store; another replica may reach it."""

    def __init__(self) -> None:
        super().__init__("the shared store is away", RETRY_STORE)


class NotDurable(ServiceUnavailable):
    """A session was ended, but the end is not on the disk: a restart would forget it."""

    def __init__(self) -> None:
        super().__init__(
            "the session was ended, but the end could not be written to disk: it holds until the"
            " broker restarts only; ask again",
            RETRY_STORE,
        )


class NotEnded(ServiceUnavailable):
    """A session was not ended: as many ends as may wait for a disk that fails do so already."""

    def __init__(self) -> None:
        super().__init__(
            "the session was not ended: too many ends wait for a disk that cannot be written; ask"
            " again",
            RETRY_STORE,
        )


class Internal(OurError):
    """A defect.  The caller learns nothing but the request id under which it was logged."""

    def __init__(self) -> None:
        super().__init__("internal error: see the log for this X-Request-Id")
