"""How a shared store can fail, in words that are counted."""

import os
import ssl
from enum import Enum

from typing_extensions import override

from broker.config.addresses import MAX_PORT


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

    `detail` is for the log: the server's own word for an error, such as NOPERM, or why there is no
    connection; never what was sent.  With `of_key` the server is well, and it is this key or slot
    that is not.
    """

    def __init__(self, reason: Reason, detail: str = "", *, of_key: bool = False) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.detail = detail
        self.of_key = of_key

    @property
    def is_wrong_server(self) -> bool:
        """Whether the connection leads to the wrong server: another one may lead to the right."""
        return self.reason in _WRONG_SERVER and not self.of_key

    @property
    def is_foreign(self) -> bool:
        """Whether something of another type lies under this key: nobody of ours put it there."""
        return self.detail == "WRONGTYPE"

    @override
    def __repr__(self) -> str:
        return f"StoreFailed({self.reason.value}, {self.detail!r})"


UNKNOWN_COMMAND = "unknown command"
"""What a server says of a command that was renamed, or that it never had, as a Sentinel."""

TOO_MANY_CLIENTS = "max number of clients reached"
"""What a server says instead of anything else, and hangs up."""

_SAID = (UNKNOWN_COMMAND, TOO_MANY_CLIENTS)

_LARGEST = 2**53
"""Up to there scripts count exactly; as microseconds that is the year 2255."""


_NUMERIC = (int, bytes)


def number(reply: object, most: int = _LARGEST) -> int:
    """Read a number that the store told, 0 to `most`; raises StoreFailed for what is none.

    Others may write there: what cannot be read is a call that failed, and not a defect.
    """
    if isinstance(reply, _NUMERIC):
        try:
            found = int(reply)
        except ValueError:
            found = -1
        if 0 <= found <= most:
            return found
    raise StoreFailed(Reason.OTHER, "a number out of bounds")


class NoScript(Exception):
    """The server does not have the script (any more): it has to be sent in full."""


class Redirect(Exception):
    """Another node of the cluster has this slot; `asking` for this one call only."""

    def __init__(self, slot: int, host: str, port: int, *, asking: bool) -> None:
        super().__init__(f"{host}:{port}")
        self.slot, self.host, self.port, self.asking = slot, host, port, asking


SLOTS = 16384
"""Slots of a cluster."""

LONGEST_HOST = 255
"""Characters of a name (RFC 1035)."""

_DIGITS = 5
"""Of a slot, or of a port."""

TRY_AGAIN = "TRYAGAIN"
"""What a cluster says of a slot that is on its way, in the moment in which it is in two places."""

UNKNOWN = "?"
"""What nodes call one whose name they were not told; it is behind the address that was asked."""

_REASONS = {
    "READONLY": Reason.READONLY,
    "LOADING": Reason.LOADING,
    "BUSY": Reason.TIMEOUT,
    "OOM": Reason.OUT_OF_MEMORY,
    "CLUSTERDOWN": Reason.CLUSTER_DOWN,
    "MASTERDOWN": Reason.CLUSTER_DOWN,
    TRY_AGAIN: Reason.CLUSTER_DOWN,
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

_FORBIDDEN_TO_A_SCRIPT = "ACL failure in script"
"""What servers say of a command or a key that the user of a script has no right to."""

_WRONG_SERVER = frozenset({Reason.READONLY, Reason.LOADING, Reason.CLUSTER_DOWN})

_BY_A_SCRIPT = "user_script"
"""What servers put into an error that a script ran into: of what lies in its keys."""


def error_of(text: str) -> Exception:
    """Turn an error reply into what the caller can act on."""
    first, _, rest = text.partition(" ")
    if first == "NOSCRIPT":
        return NoScript()
    if first in ("MOVED", "ASK"):
        return _elsewhere(rest, asking=first == "ASK")
    if first == "ERR":
        first = next((word for word in _WITHIN_SCRIPTS if f"{word} " in rest), first)
        first = "NOPERM" if _FORBIDDEN_TO_A_SCRIPT in rest else first
    of_key = first in ("WRONGTYPE", TRY_AGAIN) or (first == "ERR" and _BY_A_SCRIPT in rest)
    word = first if first.isalpha() else ""
    if first == "ERR" and not of_key:
        word = next((known for known in _SAID if rest.startswith(known)), word)
    return StoreFailed(_REASONS.get(first, Reason.OTHER), word, of_key=of_key)


def why(error: BaseException) -> str:
    """Say in a few words why there is no connection."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return getattr(error, "reason", None) or "TLS"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)  # its own text names the address, or not, by event loop
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


def _elsewhere(rest: str, *, asking: bool) -> Exception:
    """Read `SLOT HOST:PORT`."""
    slot, _, where = rest.partition(" ")
    host, _, port = where.rpartition(":")
    host = "" if host == UNKNOWN else host
    if not (slot.isascii() and slot.isdigit() and len(slot) <= _DIGITS and int(slot) < SLOTS):
        return StoreFailed(Reason.CLUSTER_DOWN, "MOVED")
    if not (
        port.isascii() and port.isdigit() and len(port) <= _DIGITS and is_node(host, int(port))
    ):
        return StoreFailed(Reason.CLUSTER_DOWN, "MOVED")
    return Redirect(int(slot), host, int(port), asking=asking)


def is_node(host: str, port: int) -> bool:
    """Whether a cluster may mean a node by this: no host is that of who was asked."""
    return (
        0 < port <= MAX_PORT and len(host) <= LONGEST_HOST and host.isascii() and host.isprintable()
    )
