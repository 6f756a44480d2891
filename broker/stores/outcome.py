"""How a mint failed, as those are told who waited for it in another replica.

Only what would have happened to them as well: a refusal, a fault of the vendor, a limit, a budget.
A mint that was cancelled, or a defect, tells others nothing; the next of them tries.
"""

import msgspec
from msgspec import Struct

from broker import errors
from broker.model import LimitName
from broker.rules.bucket import Limit, Verdict
from broker.stores.base import Denial


class _Failure(Struct, frozen=True, array_like=True):
    kind: str
    status: int
    code: str
    message: str
    wait: int
    limit: str = ""
    burst: int = 0
    interval: int = 0
    full_in: int = 0


_decoder = msgspec.json.Decoder(_Failure)


def encode(error: BaseException | None) -> bytes:
    """Return what others are told; empty if the next of them is to try."""
    match error:
        case errors.RateLimited():
            verdict = error.verdict
            limit = verdict.limit
            told = _Failure(
                "limited",
                error.status,
                error.code,
                "",
                verdict.retry_after,
                error.limit.value,
                limit.burst,
                limit.interval,
                verdict.full_in,
            )
        case errors.SessionEnded():
            return b""
        case errors.UpstreamRefused():
            told = _Failure("refused", error.status, error.code, error.message, 0)
        case errors.UpstreamTimeout():
            told = _Failure("timeout", error.status, error.code, error.message, 0)
        case errors.UpstreamUnavailable():
            told = _Failure("unavailable", error.status, error.code, error.message, 0)
        case errors.BudgetExhausted():
            told = _Failure("budget", error.status, error.code, error.message, error.wait)
        case errors.ServiceUnavailable():
            told = _Failure("busy", error.status, error.code, error.message, error.wait)
        case _:
            return b""
    return msgspec.json.encode(told)


def limited(denial: Denial) -> errors.RateLimited:
    """Return a limit's refusal as an error, for those who wait elsewhere."""
    return errors.RateLimited(denial.limit, denial.verdict)


def decode(told: bytes) -> errors.BrokerError:
    """Return the error to raise; what cannot be read is a fault of the vendor's, at most."""
    try:
        failure = _decoder.decode(told)
        if failure.kind == "limited":
            limit = Limit(failure.burst, failure.interval)
            verdict = Verdict(False, 0, failure.full_in, failure.wait, limit)  # noqa: FBT003 - as in bucket
            return errors.RateLimited(LimitName(failure.limit), verdict)
    except (msgspec.DecodeError, ValueError):
        return errors.UpstreamUnavailable("another replica's mint failed")
    return _plain(failure)


def _plain(failure: _Failure) -> errors.BrokerError:
    match failure.kind:
        case "refused":
            return errors.UpstreamRefused(failure.status, failure.code, failure.message)
        case "timeout":
            return errors.UpstreamTimeout(failure.message)
        case "budget":
            return errors.BudgetExhausted(failure.message, failure.wait)
        case "busy":
            return errors.ServiceUnavailable(failure.message, failure.wait)
        case _:
            return errors.UpstreamUnavailable(failure.message)
