"""How a shared store can fail, in words that are counted."""

from enum import Enum

from redis import exceptions as foreign


class Reason(Enum):
    """Label of `broker_store_errors_total`."""

    TIMEOUT = "timeout"
    CONNECTION = "connection"
    READONLY = "readonly"
    LOADING = "loading"
    OUT_OF_MEMORY = "out_of_memory"
    CLUSTER_DOWN = "cluster_down"
    SCRIPT = "script"
    OTHER = "other"


class StoreFailed(Exception):
    """The store gave no answer, or none to build on."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Forgotten(Exception):
    """The server does not have the script (any more): it has to be sent in full."""


class Elsewhere(Exception):
    """Another node of the cluster has this slot; `asking` for this one call only."""

    def __init__(self, slot: int, host: str, port: int, *, asking: bool) -> None:
        super().__init__(f"{host}:{port}")
        self.slot, self.host, self.port, self.asking = slot, host, port, asking


_REASONS: tuple[tuple[type[BaseException], Reason], ...] = (
    (foreign.ReadOnlyError, Reason.READONLY),
    (foreign.BusyLoadingError, Reason.LOADING),
    (foreign.OutOfMemoryError, Reason.OUT_OF_MEMORY),
    (foreign.ClusterDownError, Reason.CLUSTER_DOWN),
    (foreign.MasterDownError, Reason.CLUSTER_DOWN),
    (foreign.TryAgainError, Reason.CLUSTER_DOWN),
    (foreign.TimeoutError, Reason.TIMEOUT),
    (foreign.ConnectionError, Reason.CONNECTION),
    (TimeoutError, Reason.TIMEOUT),
    (OSError, Reason.CONNECTION),
)

_WORN = frozenset({Reason.READONLY, Reason.LOADING, Reason.CLUSTER_DOWN})
"""A connection that says this leads to the wrong server: another one may lead to the right one."""


def reason_of(error: BaseException) -> Reason:
    """Classify what the client library raised."""
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    if isinstance(error, foreign.ResponseError):
        text = str(error)
        if text.startswith("OOM ") or " OOM " in text:  # within a script
            return Reason.OUT_OF_MEMORY
        if "READONLY" in text:
            return Reason.READONLY
        return Reason.SCRIPT
    return Reason.OTHER


def translate(error: foreign.ResponseError) -> Exception:
    """Turn an error reply into what the caller can act on; fresh, so that it holds no frames."""
    if isinstance(error, foreign.NoScriptError):
        return Forgotten()
    if isinstance(error, foreign.AskError | foreign.MovedError):
        asking = isinstance(error, foreign.AskError) and not isinstance(error, foreign.MovedError)
        return Elsewhere(error.slot_id, error.host, error.port, asking=asking)
    return StoreFailed(reason_of(error))


def is_worn(error: Exception) -> bool:
    """Whether the connection that brought this is not to be used again."""
    return isinstance(error, StoreFailed) and error.reason in _WORN
