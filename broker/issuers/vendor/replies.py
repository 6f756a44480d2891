"""What an answer of the vendor can mean, as a small closed set of values.

Nouns only: `vendor_api` makes them, the issuer matches on them with `assert_never`, the metrics
take their labels from `Reason`.  Nothing here knows what the vendor's JSON looks like.
"""

from enum import Enum
from typing import TypeAlias, assert_never

from msgspec import Struct

from broker.model import Minted


class Scope(Enum):
    """For whom a refusal holds, and so for whom it may be remembered."""

    ACCOUNT = "account"
    """For every mint of this account."""
    AGENT_MODEL = "agent_model"
    """For this agent and model, whoever the visitor is."""
    NEVER = "never"
    """For this one request: remembering it would let one bad visitor shut out the others."""


class Reason(Enum):
    """What went wrong between us and the vendor; the label of `broker_upstream_errors_total`.

    Down to EXPIRED it is read from an answer; TIMEOUT to PROXY_REFUSED are the client's to report,
    because there was no answer; the last three are verdicts, counted here beside the accidents.
    """

    STATUS_5XX = "status_5xx"
    """The vendor, or the edge in front of it, is unwell."""
    UNEXPECTED_STATUS = "unexpected_status"
    """A status that no mint call has, or a 4xx whose meaning nobody knows."""
    REDIRECT = "redirect"
    """3xx: never followed, because the key would go along."""
    EDGE_403 = "edge_403"
    """A 403 without the vendor's envelope: its edge did not like us."""
    NOT_JSON = "not_json"
    """HTML, text, nothing, or JSON that breaks off."""
    NO_TOKEN = "no_token"  # noqa: S105 - a label
    """A 200 without a usable token and without a failure that we know."""
    TOO_LARGE = "too_large"
    """A body beyond the bound, or an answer that is mostly frame."""
    HEADERS_TOO_LARGE = "headers_too_large"
    """A header, the headers in all, or interim answers before them, beyond the bound."""
    ENCODED = "encoded"
    """A compressed body, which we did not ask for and do not unpack."""
    EXPIRED = "expired"
    """A token with no life left on arrival."""
    TIMEOUT = "timeout"
    """No complete answer in time."""
    CONNECT = "connect"
    """No connection."""
    DNS = "dns"
    """No address for the vendor's name."""
    TLS = "tls"
    """No trust: the handshake or the certificate failed."""
    RESET = "reset"
    """The connection broke before the answer was complete."""
    PROXY_CONNECT = "proxy_connect"
    """No connection to the egress proxy, or no address for its name."""
    PROXY_AUTH = "proxy_auth"
    """The egress proxy wants to know who we are, or does not believe it: its 407."""
    PROXY_REFUSED = "proxy_refused"
    """The egress proxy opened no tunnel: its 502, or any other answer."""
    RATE_LIMITED = "rate_limited"
    """Too many calls."""
    BAD_KEY = "bad_key"
    """The key is not a good one, or no longer."""
    REFUSED = "refused"
    """The vendor's verdict on account, agent, model or request."""


class Granted(Struct, frozen=True):
    """A token.  Its lifetime may be 0: then it had expired on arrival."""

    minted: Minted


class BadKey(Struct, frozen=True, gc=False):
    """Our key is bad; `code` is the vendor's."""

    code: str


class Refused(Struct, frozen=True, gc=False):
    """The vendor's verdict, for the caller: status, code, and a message that is safe to show."""

    status: int
    code: str
    message: str
    scope: Scope


class Throttled(Struct, frozen=True, gc=False):
    """Too many calls; `retry_after` is microseconds in [1 s, 5 min], None if it was not said."""

    retry_after: int | None


class Broken(Struct, frozen=True, gc=False):
    """No answer to build on: passing, and nobody's verdict."""

    reason: Reason


Reply: TypeAlias = Granted | BadKey | Refused | Throttled | Broken
"""What an answer means."""


def reason_of(reply: Reply) -> Reason | None:
    """Return the label under which a reply counts as an error; None for a live token."""
    match reply:
        case Granted(minted):
            return None if minted.lifetime else Reason.EXPIRED
        case BadKey():
            return Reason.BAD_KEY
        case Refused():
            return Reason.REFUSED
        case Throttled():
            return Reason.RATE_LIMITED
        case Broken(reason):
            return reason
        case _:
            assert_never(reply)
