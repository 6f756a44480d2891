"""How a mint failed, as those are told who waited for it in another replica.

Only what would have happened to them as well: a refusal, a fault of the vendor, a limit, a budget.
A mint that was cancelled, a defect, or a store that is away from one replica tells others nothing;
the next of them tries.

What comes back was read from the store, where others may write: it becomes an answer only within
the bounds of what a broker would have written.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct
from typing_extensions import override

from broker import errors
from broker.model import LimitName
from broker.rules.bucket import Limit, verdict_from_wait

LONGEST_WAIT = 300_000_000
"""Microseconds: the longest pause of a budget, and so of what a caller is told to wait."""

Status = Literal[400, 402, 403, 404, 409, 410, 422, 429]
"""Statuses of the vendor's that pass."""

Code = Annotated[str, Meta(pattern=r"\A[A-Z][A-Z0-9_]{0,63}\Z")]
"""Codes of the vendor's that pass."""

Message = Annotated[str, Meta(max_length=1024)]

_Wait = Annotated[int, Meta(ge=0, le=LONGEST_WAIT)]
_Number = Annotated[int, Meta(ge=1, le=2**62)]


class _Told(Struct, frozen=True, array_like=True, tag=True):
    """A failure that is told; its fields are checked when it is read."""

    def error(self) -> errors.BrokerError:
        """Return it as an error; raises ValueError."""
        raise NotImplementedError


class _Refused(_Told, frozen=True, tag="refused"):
    status: Status
    code: Code
    message: Message

    @override
    def error(self) -> errors.BrokerError:
        return errors.UpstreamRefused(self.status, self.code, printable(self.message))


class _Unavailable(_Told, frozen=True, tag="unavailable"):
    message: Message

    @override
    def error(self) -> errors.BrokerError:
        return errors.UpstreamUnavailable(printable(self.message))


class _Timeout(_Told, frozen=True, tag="timeout"):
    message: Message

    @override
    def error(self) -> errors.BrokerError:
        return errors.UpstreamTimeout(printable(self.message))


class _Budget(_Told, frozen=True, tag="budget"):
    message: Message
    wait: _Wait

    @override
    def error(self) -> errors.BrokerError:
        return errors.BudgetExhausted(printable(self.message), self.wait)


class _Busy(_Told, frozen=True, tag="busy"):
    message: Message
    wait: _Wait

    @override
    def error(self) -> errors.BrokerError:
        return errors.ServiceUnavailable(printable(self.message), self.wait)


class _Limited(_Told, frozen=True, tag="limited"):
    limit: LimitName
    burst: _Number
    interval: _Number
    full_in: _Number

    @override
    def error(self) -> errors.BrokerError:
        limit = Limit(self.burst, self.interval)
        return errors.RateLimited(self.limit, verdict_from_wait(self.full_in, limit, allowed=False))


_Any = _Refused | _Unavailable | _Timeout | _Budget | _Busy | _Limited
_decoder: "msgspec.json.Decoder[_Any]" = msgspec.json.Decoder(_Any)


def encode(error: BaseException | None) -> bytes:
    """Return what others are told; empty if the next of them is to try."""
    told = _told(error)
    return b"" if told is None else msgspec.json.encode(told)


def _told(error: BaseException | None) -> _Told | None:  # noqa: PLR0911 - a line an error
    match error:
        case errors.RateLimited():
            verdict = error.verdict
            limit = verdict.limit
            return _Limited(error.limit, limit.burst, limit.interval, verdict.full_in)
        case errors.UpstreamRefused():
            return _Refused(error.status, error.code, error.message)  # type: ignore[arg-type]  # the vendor's passed its own table
        case errors.UpstreamTimeout():
            return _Timeout(error.message)
        case errors.UpstreamUnavailable():
            return _Unavailable(error.message)
        case errors.BudgetExhausted():
            return _Budget(error.message, min(error.wait, LONGEST_WAIT))
        case errors.SessionEnded() | errors.StoreAway():
            return None
        case errors.ServiceUnavailable():
            return _Busy(error.message, min(error.wait, LONGEST_WAIT))
        case _:
            return None


def decode(told: bytes) -> errors.BrokerError:
    """Return the error to raise; what cannot be read is a fault of the vendor's, at most."""
    try:
        return _decoder.decode(told).error()
    except (msgspec.DecodeError, ValueError, RecursionError):
        return errors.UpstreamUnavailable("another replica's mint failed")


def printable(message: str) -> str:
    """Return a message that may be shown; raises ValueError."""
    if not message.isprintable():
        raise ValueError("not printable")
    return message
