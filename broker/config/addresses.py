"""Where a store is: from `[store] url` to a value, or to an error that names the remedy.

Knows how an address is written; opens nothing.
"""

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qs, urlsplit

from msgspec import Struct

from broker.model import Secret

if TYPE_CHECKING:
    import ssl

MEMORY = "memory://"

FILE_SCHEME = "sqlite"

USUAL_FILE = "sqlite:///var/lib/embed-token-broker/state.db"
"""What remedies and examples name: the folder that unit and image have for it."""

DEFAULT_PORT = 6379
"""Registered for this protocol; Valkey kept it."""

MAX_PORT = 2**16 - 1
"""TCP has no more."""

MAX_DB = 2**31 - 1

_TLS = {"valkey": False, "redis": False, "valkeys": True, "rediss": True}
_SCHEMES = {
    **{scheme: (tls, False) for scheme, tls in _TLS.items()},
    **{f"{scheme}+cluster": (tls, True) for scheme, tls in _TLS.items()},
}

_EXPECTED = (
    "expected memory://, sqlite:///PATH for a file, valkey://HOST[:PORT][/DB], valkeys:// for TLS, unix:///PATH[?db=N],"
    " or valkey+cluster://HOST[:PORT][,HOST[:PORT]...]"
)


class StateFileAddress(Struct, frozen=True):
    """A file on this machine."""

    path: Path


class StoreAddress(Struct, frozen=True):
    """A server, a cluster by some of its nodes, or a Unix socket (`path`)."""

    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    db: int = 0
    tls: bool = False
    cluster: bool = False

    @property
    def shown(self) -> str:
        """Where that is, for logs."""
        if self.path:
            return f"unix:{self.path}"
        return ",".join(f"[{h}]:{p}" if ":" in h else f"{h}:{p}" for h, p in self.hosts)


class Access(Struct, frozen=True):
    """How to be let in: ACL user, password, and whom to trust where the address says TLS."""

    username: str = ""
    password: Secret | None = None
    tls: "ssl.SSLContext | None" = None


def parse_store_url(text: str) -> StoreAddress | StateFileAddress | None:
    """Return the address, None for memory; raises ValueError."""
    if text == MEMORY:
        return None
    if text.lower().startswith(f"{FILE_SCHEME}:"):
        return _file(text)
    # Not by urllib: versions of Python differ in what they think of brackets in a list of hosts.
    scheme, separator, rest = text.partition("://")
    netloc, _, path = rest.partition("/")
    if "@" in netloc:
        raise ValueError("holds a user or password; use store.username and store.password_file")
    if not separator or "#" in rest or not text.isprintable():
        raise ValueError(_EXPECTED)
    if scheme.lower() == "unix":
        return _socket(urlsplit(text))
    if "sentinel" in scheme.lower():
        raise ValueError(
            "Sentinel is not asked for the primary: name that itself, by an address that follows it"
            " (a virtual one, a proxy, a service), as valkey://HOST:PORT; or use a cluster"
        )
    if scheme.lower() not in _SCHEMES or not netloc or "?" in rest:
        raise ValueError(_EXPECTED)
    tls, cluster = _SCHEMES[scheme.lower()]
    hosts = tuple(_host(part) for part in netloc.split(","))
    db = _db(path)
    if not cluster and len(hosts) > 1:
        raise ValueError("several hosts: only a cluster has them, valkey+cluster://")
    if cluster and db:
        raise ValueError("a cluster has no databases: leave the number out")
    return StoreAddress(hosts=hosts, db=db, tls=tls, cluster=cluster)


def _file(text: str) -> StateFileAddress:
    """Read a path as it is written: nothing in it is escaped."""
    path = text[len(FILE_SCHEME) :].removeprefix("://")
    usable = path.startswith("/") and path.isprintable() and not path.startswith("//")
    if not usable or path.endswith("/") or "?" in path or "#" in path or ".." in Path(path).parts:
        raise ValueError(f"a state file needs an absolute path: {USUAL_FILE}")
    return StateFileAddress(Path(path))


def _socket(url: SplitResult) -> StoreAddress:
    query = parse_qs(url.query, keep_blank_values=True)
    if url.netloc or len(url.path) < 2 or not query.keys() <= {"db"}:  # noqa: PLR2004 - "/" and a name
        raise ValueError("a Unix socket needs an absolute path: unix:///run/valkey.sock?db=0")
    return StoreAddress(path=url.path, db=_db(query.get("db", [""])[-1]))


def _host(part: str) -> tuple[str, int]:
    host, colon, port = part.rpartition(":")
    if not colon or part.endswith("]"):
        host, port = part, str(DEFAULT_PORT)
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if bare == host and ":" in host:
        raise ValueError("an IPv6 address needs brackets, such as valkey://[::1]:6379")
    if not bare or not port.isascii() or not port.isdigit() or not 0 < int(port) <= MAX_PORT:
        raise ValueError(_EXPECTED)
    return bare, int(port)


def _db(text: str) -> int:
    if not text:
        return 0
    if not text.isascii() or not text.isdigit() or int(text) > MAX_DB:
        raise ValueError("the database is a number, such as valkey://localhost/1")
    return int(text)
