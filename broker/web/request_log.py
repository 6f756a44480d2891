"""The line of a token request that failed."""

import structlog

from broker import errors
from broker.model import TokenRequest
from broker.telemetry.logs import visitor_hash
from broker.web.auth import Client

log = structlog.get_logger()


def log_failure(
    error: errors.BrokerError,
    kind: str,
    request_id: str,
    seconds: float,
    client: Client | None,
    ask: TokenRequest | None,
) -> None:
    """Write who asked for what, and what came of it; `kind` is the limit where there is one."""
    fields: dict[str, object] = {
        "request_id": request_id,
        "status": error.status,
        "code": error.code,
    }
    if isinstance(error, errors.RateLimited | errors.BudgetExhausted):
        fields["limit"] = kind
    if error.reason:
        fields["reason"] = error.reason
    if client is not None:
        fields["client"] = client.name
    if ask is not None:
        fields |= {"agent": ask.agent, "visitor": visitor_hash(ask.fingerprint)}
    log.warning(
        "broker.embed_token",
        outcome=error.outcome.value,
        **fields,
        duration_ms=round(seconds * 1000, 3),
    )
