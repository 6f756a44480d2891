"""What an answer of the vendor can mean, as a small closed set of values.

Nouns only: `vendor_api` makes them, the issuer matches on them with `assert_never`, the metrics
take their labels from `Reason`.  Nothing here knows what the vendor's JSON looks like.
"""

from enum import Enum
from typing import TypeAlias, assert_never

from msgspec import Struct

from broker.model import Minted
from broker.telemetry.labels import Reason


class Scope(Enum):
    """For whom a refusal holds, and so for whom it may be remembered."""

    ACCOUNT = "account"
    """For every mint of this account."""
    AGENT_MODEL = "agent_model"
    """For this agent and model, whoever the visitor is."""
    NEVER = "never"
    """For this one request: remembering it would let one bad visitor shut out the others."""


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
