"""How a shared store can fail, in words that are counted."""

import contextlib
from enum import Enum

from typing_extensions import override


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
    """The store gave no answer, or none to build on.

    `detail` is a word for the log: the server's own for an error, such as NOPERM.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.detail = detail

    @override
    def __repr__(self) -> str:
        return f"StoreFailed({self.reason.value}, {self.detail!r})"


_LARGEST = 2**63


def number(reply: object) -> int:
    """Read a number that the store told; raises StoreFailed for what is none.

    Others may write there: what cannot be read is a call that failed, and not a defect.
    """
    with contextlib.suppress(ValueError):
        if isinstance(reply, int | bytes) and -_LARGEST <= (found := int(reply)) < _LARGEST:
            return found
    raise StoreFailed(Reason.OTHER)


class Forgotten(Exception):
    """The server does not have the script (any more): it has to be sent in full."""


class Elsewhere(Exception):
    """Another node of the cluster has this slot; `asking` for this one call only."""

    def __init__(self, slot: int, host: str, port: int, *, asking: bool) -> None:
        super().__init__(f"{host}:{port}")
        self.slot, self.host, self.port, self.asking = slot, host, port, asking


_REASONS = {
    "READONLY": Reason.READONLY,
    "LOADING": Reason.LOADING,
    "BUSY": Reason.TIMEOUT,
    "OOM": Reason.OUT_OF_MEMORY,
    "CLUSTERDOWN": Reason.CLUSTER_DOWN,
    "MASTERDOWN": Reason.CLUSTER_DOWN,
    "TRYAGAIN": Reason.CLUSTER_DOWN,
    "ERR": Reason.SCRIPT,
    "CROSSSLOT": Reason.SCRIPT,
    "WRONGTYPE": Reason.SCRIPT,
    "NOPERM": Reason.OTHER,
    "NOAUTH": Reason.OTHER,
    "WRONGPASS": Reason.OTHER,
    "NOREPLICAS": Reason.READONLY,
    "MISCONF": Reason.READONLY,
}
"""By the first word of an error, as servers of this protocol begin one."""

_WITHIN_SCRIPTS = ("READONLY", "OOM", "NOPERM", "CLUSTERDOWN", "MISCONF", "NOREPLICAS")
"""Where a command fails in a script, servers put words of their own before its error."""

WORN = frozenset({Reason.READONLY, Reason.LOADING, Reason.CLUSTER_DOWN})
"""A connection that says this leads to the wrong server: another one may lead to the right one."""


def error_of(text: str) -> Exception:
    """Turn an error reply into what the caller can act on."""
    first, _, rest = text.partition(" ")
    if first == "NOSCRIPT":
        return Forgotten()
    if first in ("MOVED", "ASK"):
        return _elsewhere(rest, asking=first == "ASK")
    if first == "ERR":
        first = next((word for word in _WITHIN_SCRIPTS if f"{word} " in rest), first)
    return StoreFailed(_REASONS.get(first, Reason.OTHER), first if first.isalpha() else "")


def _elsewhere(rest: str, *, asking: bool) -> Exception:
    """Read `SLOT HOST:PORT`."""
    slot, _, where = rest.partition(" ")
    host, _, port = where.rpartition(":")
    if not slot.isdigit() or not port.isdigit():
        return StoreFailed(Reason.CLUSTER_DOWN, "MOVED")
    return Elsewhere(int(slot), host, int(port), asking=asking)
