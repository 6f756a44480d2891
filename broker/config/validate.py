"""Rules that no type can express: between settings, and about addresses, limits and URLs.

Each failure is one line that names the key, the rule and the remedy.
"""

import ipaddress
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from broker.config.addresses import MAX_PORT, StateFileAddress, StoreAddress, parse_store_url
from broker.config.schema import ConfigError
from broker.config.settings import Duration, Settings, StoreSettings, UpstreamSettings
from broker.model import AGENT_ID, AGENT_RULE
from broker.rules import bucket, outstanding, passing

MAX_VENDOR_KEYS = 4
"""Keys in the vendor's list: a rotation needs two."""

KEEP_ALIVE_BOUNDS = Duration(1_000_000), Duration(3_600_000_000)
"""The least and the most of `server.keep_alive`: below it clients connect for every request, and
above it lies no balancer's own time."""

STORE_TIMEOUT_BOUNDS = Duration(10_000), Duration(2_000_000)
"""The least and the most of `store.timeout`: less is the noise of a busy machine, and with more one
call that hangs would cost a lease: it lasts 3 s, and is renewed each second, when the renewals
before are over."""

_PORT = re.compile(r"[0-9]{1,5}")

_OWN_PORTS = {"http": 80, "https": 443}
"""Schemes that a vendor may have, and the port that each means where none is written."""

_HOST = re.compile(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]+(%[A-Za-z0-9]+)?")

_API_PATHS = re.compile(r"(/+v1(/+(validate|embed-tokens(/+request)?))?)*/*$", re.IGNORECASE)
"""The end of a path that the broker adds by itself, and slashes that mean nothing."""

_EXPECTED_BASE_URL = 'expected "https://HOST", or "https://HOST/PREFIX"'


def problems(settings: Settings) -> Iterator[ConfigError]:
    """Yield each rule that is broken, of those that no type can express."""
    for section in ("fingerprint", "fingerprint_mints", "agent", "client"):
        yield from _limit(f"limits.{section}", getattr(settings.limits, section))
    yield from _budget(settings)
    for name, client in settings.clients.items():
        yield from _agents(f"clients.{name}.agents", client.agents)
    yield from _upstream(settings)
    yield from _reuse(settings)
    yield from _server(settings)
    yield from _store(settings)


def _budget(settings: Settings) -> Iterator[ConfigError]:
    budget = settings.issuer.budget
    if budget is None:
        return
    broken = list(_rate("issuer.budget", budget.rate, budget.per, budget.burst))
    yield from broken
    if budget.max_wait.us <= 0:
        yield ConfigError("issuer.budget.max_wait: must be longer than 0")
    if broken or settings.issuer.kind != "upstream":
        return
    most = bucket.most_in_window(budget.rate, budget.per.us, budget.burst, outstanding.WINDOW)
    if most <= budget.window:
        return
    room = max(budget.window - budget.burst, 0) * budget.per.us // outstanding.WINDOW
    lower = f"set rate to {room} or less" if room else f"set burst below {budget.window}"
    yield ConfigError(
        f"issuer.budget.rate: a burst of {budget.burst} and what refills in a minute are {most}"
        f" calls, and the vendor takes {budget.window}: {lower}, or window = {most} if your plan"
        " has that many",
        *(f"issuer.budget.{name}" for name in ("per", "burst", "window")),
    )


def _limit(path: str, limit: Any) -> Iterator[ConfigError]:
    if limit is None:
        return
    yield from _rate(path, limit.rate, limit.per, limit.burst)
    for agent, override in getattr(limit, "overrides", {}).items():
        if not AGENT_ID.fullmatch(agent):
            yield ConfigError(f"{path}.overrides: {agent!r} is not an agent id ({AGENT_RULE})")
            continue
        yield from _rate(
            f"{path}.overrides.{agent}",
            limit.rate if override.rate is None else override.rate,
            limit.per if override.per is None else override.per,
            limit.burst if override.burst is None else override.burst,
        )


def _agents(path: str, agents: Iterable[str]) -> Iterator[ConfigError]:
    for agent in dict.fromkeys(agents):
        if agent != "*" and not AGENT_ID.fullmatch(agent):
            yield ConfigError(f'{path}: {agent!r} is neither "*" nor an agent id ({AGENT_RULE})')


def _rate(path: str, rate: float, per: Duration, burst: int) -> Iterator[ConfigError]:
    try:
        bucket.limit(rate, per.us, burst)
    except ValueError as error:
        yield ConfigError(
            f"{path}: {error}; no number switches a limit off: raise it, or set dry_run = true"
        )


def _upstream(settings: Settings) -> Iterator[ConfigError]:
    upstream = settings.issuer.upstream
    try:
        normal_base_url(upstream.base_url)
    except ValueError as error:
        yield ConfigError(f"issuer.upstream.base_url: {error}")
    if len(upstream.api_secret_files) > MAX_VENDOR_KEYS:
        yield ConfigError(
            f"issuer.upstream.api_secret_files: more than {MAX_VENDOR_KEYS}; each refused key is"
            " tried twice a minute, and the vendor allows 30 failures"
        )
    if upstream.timeout.us <= 0:
        yield ConfigError("issuer.upstream.timeout: must be longer than 0")
    yield from _pass_through(settings)


def _pass_through(settings: Settings) -> Iterator[ConfigError]:
    name, routes = "issuer.upstream.pass_through", settings.issuer.upstream.pass_through
    for route in routes:
        try:
            passing.check_route(route)
        except ValueError as error:
            yield ConfigError(f"{name}: {error}")
    if routes and settings.issuer.kind != "upstream":
        yield ConfigError(
            f"{name}: a local issuer has no vendor to pass requests on to; take it out, or set"
            ' issuer.kind = "upstream"'
        )
    for client, given in settings.clients.items():
        if given.pass_through and not routes:
            yield ConfigError(
                f"clients.{client}.pass_through: no route is passed on; name some in {name},"
                ' such as ["/v1/agent/*"]'
            )


def normal_base_url(url: str) -> str:
    """Return the one way to write this vendor's address; raises ValueError with the remedy.

    What differs in writing only is mended: capitals in scheme and host, a dot behind the host, the
    scheme's own port, slashes at the end, and the paths of the API's own calls (other APIs want
    their `/v1` here).  So whatever is named after the vendor has one name.  What would be lost, or
    shown to somebody, is refused: a query, a fragment, a user or a password, plain HTTP to another
    machine.  No message repeats a password.
    """
    if url == UpstreamSettings().base_url:
        return url  # it is normal
    from yarl import URL  # noqa: PLC0415 - commands about keys shall not wait for it

    try:
        given = URL(url)
        port = given.explicit_port
    except ValueError:
        raise ValueError(f"not a URL; {_EXPECTED_BASE_URL}") from None
    host = (given.raw_host or "").rstrip(".")
    usable = _HOST.fullmatch(host) and url == url.strip() and "@" not in given.raw_path
    if given.scheme not in _OWN_PORTS or port == 0 or not usable:
        raise ValueError(_EXPECTED_BASE_URL)
    shown = f"[{host}]" if ":" in host else host
    origin = f"{given.scheme}://{shown}"
    if port is not None and port != _OWN_PORTS[given.scheme]:
        origin += f":{port}"
    normal = origin + _API_PATHS.sub("", given.raw_path)
    if given.user is not None or given.password is not None:
        raise ValueError(
            f"must not hold a user or a password, because it is shown; write {normal!r}, and put"
            " the vendor's key into a file of api_secret_files"
        )
    if "?" in url or "#" in url:
        raise ValueError(f"must not have a query or a fragment; write {normal!r}")
    if given.scheme == "http" and not is_loopback(host):
        raise ValueError(
            "http would show the key to the network; use https:"
            f" write {normal.replace('http', 'https', 1)!r}"
        )
    return normal


def is_loopback(host: str) -> bool:
    """Whether this host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_everywhere(host: str) -> bool:
    """Whether this host stands for every address of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _reuse(settings: Settings) -> Iterator[ConfigError]:
    reuse = settings.reuse
    if reuse.floor_in_outage.us > reuse.floor.us:
        yield ConfigError(
            "reuse.floor_in_outage: must not be longer than reuse.floor", "reuse.floor"
        )
    if reuse.refresh_ahead.us < reuse.floor.us:
        yield ConfigError(
            "reuse.refresh_ahead: must not be shorter than reuse.floor", "reuse.floor"
        )


def _server(settings: Settings) -> Iterator[ConfigError]:
    server = settings.server
    if server.deadline.us <= 0:
        yield ConfigError("server.deadline: must be longer than 0")
    least, most = KEEP_ALIVE_BOUNDS
    if not least.us <= server.keep_alive.us <= most.us:
        yield ConfigError(
            f"server.keep_alive: must be {least} to {most}; set it some seconds longer than the"
            " balancer in front keeps an idle connection"
        )
    if server.drain_lead.us > server.drain.us:
        yield ConfigError(
            "server.drain_lead: must not be longer than server.drain; raise drain or lower"
            " drain_lead",
            "server.drain",
        )
    yield from _listen(server.listen, settings.admin.listen)
    for network in dict.fromkeys(server.trusted_proxies):
        try:
            ipaddress.ip_network(network)
        except ValueError:
            yield ConfigError(
                f"server.trusted_proxies: {network!r} is neither an address nor a network,"
                " such as 10.0.0.1 or 10.0.0.0/8 (no bits set behind the prefix)"
            )


def _listen(data: str, admin: str) -> Iterator[ConfigError]:
    places = []
    for path, listen in (("server", data), ("admin", admin)):
        try:
            places.append(parse_address(listen))
        except ValueError as error:
            yield ConfigError(f"{path}.listen: {error}")
    if len(places) > 1 and _overlap(*places):
        yield ConfigError(
            f"admin.listen: {admin} is taken by server.listen ({data}); choose another port",
            "server.listen",
        )


def _overlap(first: tuple[str, int] | str, second: tuple[str, int] | str) -> bool:
    """Whether two listeners cannot have these addresses at once; a port of 0 is never the same."""
    if isinstance(first, str) or isinstance(second, str):
        return first == second
    (host, port), (other_host, other_port) = first, second
    same_host = host == other_host or is_everywhere(host) or is_everywhere(other_host)
    return port == other_port != 0 and same_host


def _store(settings: Settings) -> Iterator[ConfigError]:
    store = settings.store
    least, most = STORE_TIMEOUT_BOUNDS
    if not least.us <= store.timeout.us <= most.us:
        yield ConfigError(
            f"store.timeout: must be {least} to {most}; a server nearby takes less than 1ms, so put"
            " it nearer if it needs more"
        )
    try:
        address = parse_store_url(store.url)
    except ValueError as error:
        yield ConfigError(f"store.url: {error}")
        return
    yield from _certificates(store, address)
    has_key = bool(store.encryption_key or store.encryption_key_file)
    if not isinstance(address, StoreAddress):
        if settings.server.workers > 1:
            yield ConfigError(
                "server.workers: more than 1 needs a shared store, because each worker would have"
                " limits, tokens and a budget of its own, and a state file is one process'; set"
                " store.url to a Valkey, or workers = 1",
                "store.url",
            )
        return
    if not has_key:
        yield ConfigError(
            "store.encryption_key_file: required with a shared store, because it holds tokens;"
            " make one with `broker keys generate` and give every replica the same",
            "store.url",
        )


def _certificates(
    store: StoreSettings, address: StoreAddress | StateFileAddress | None
) -> Iterator[ConfigError]:
    if store.tls_key_file and not store.tls_cert_file:
        yield ConfigError(
            "store.tls_key_file: needs store.tls_cert_file, whose key it is", "store.tls_cert_file"
        )
    if not isinstance(address, StoreAddress) or address.tls:
        return
    for name in ("tls_ca_file", "tls_cert_file"):
        if getattr(store, name):
            yield ConfigError(
                f"store.{name}: store.url has no TLS; write valkeys:// or valkeys+cluster://",
                "store.url",
            )


def parse_address(text: str) -> tuple[str, int] | str:
    """Read `HOST:PORT`, `[V6]:PORT` or `unix:/path`; raises ValueError.

    Returns (host, port), or the path of a Unix socket.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not Path(path).is_absolute() or not path.isprintable():
            raise ValueError("a Unix socket needs an absolute path, such as unix:/run/broker.sock")
        return path
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if bare == "*":
        raise ValueError('for every address, of IPv4 and IPv6, write "[::]:8080"')
    if not colon or not bare or not _PORT.fullmatch(port) or int(port) > MAX_PORT:
        raise ValueError('expected "HOST:PORT" (0 chooses a port) or "unix:/path"')
    if bare == host and ":" in host:
        raise ValueError('an IPv6 address needs brackets, such as "[::1]:8080"')
    return bare, int(port)
