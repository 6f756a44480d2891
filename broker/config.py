"""From file, environment and flags to a checked settings tree.

Precedence: flag, environment, file, default.  `BROKER_SECTION__KEY` overrides `[section] key` at
any depth.  Everything is checked here, before anything is opened: a `ConfigError` is one line that
names the key, the rule and the remedy, and the process ends with exit code 78 (EX_CONFIG of
sysexits.h).
"""

import ipaddress
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import Struct
from yarl import URL

from broker.model import AGENT_ID, AGENT_RULE, Secret
from broker.rules import bucket
from broker.settings import Duration, Settings

DEFAULT_PATH = Path("/etc/embed-token-broker/broker.toml")
"""Where a packaged broker is configured."""

ENV_PREFIX = "BROKER_"
"""Variables with this prefix and a double underscore override keys of the file."""

VENDOR_VARIABLES = ("BITHUMAN_API_SECRET", "BITHUMAN_API_KEY")
"""Environment variables in which the vendor's own examples keep the key: the usual, the old."""

MAX_VENDOR_KEYS = 4
"""Keys in the vendor's list: a rotation needs two."""

MIN_CLIENT_SECRET = 16
"""Characters: below it a secret can be guessed at the rate that failed logins are throttled to."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|m|h)")
_WORDS = {
    " | null": "",
    "`object`": "a table",
    "Object missing": "the table lacks the",
    "`array`": "a list",
    "`str` matching regex": "names matching",
    "`": "",
}
"""What the decoder says, in the words of a TOML file."""

_PORT = re.compile(r"[0-9]{1,5}")
_UNITS = {"us": 1, "ms": 1000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000}
_MAX_DURATION = 366 * 24 * _UNITS["h"]


class ConfigError(Exception):
    """A configuration that cannot be used; the message is one line for the operator."""


def load(
    path: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """Read and merge every source; raises ConfigError.

    `flags` and `defaults` are trees like the file's; `defaults` yields to everything else.
    """
    tree: dict[str, Any] = {}
    _merge(tree, defaults or {})
    _merge(tree, _read_file(path) if path is not None else {})
    for name, parts in _from_environment(environ):
        _put(tree, name, parts, environ[name])
    _merge(tree, flags)
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> Settings:
    """Check a raw tree and build the settings from it; raises ConfigError."""
    _refuse_unknown(Settings, tree, ())
    try:
        settings = msgspec.convert(tree, Settings, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(Settings, tree, (), error)) from None
    _check(settings)
    return settings


def find_file(flag: str | None, environ: Mapping[str, str]) -> Path | None:
    """Choose the configuration file: flag, `BROKER_CONFIG`, the default path if it is there."""
    if flag:
        return Path(flag)
    if environ.get("BROKER_CONFIG"):
        return Path(environ["BROKER_CONFIG"])
    return DEFAULT_PATH if os.path.lexists(DEFAULT_PATH) else None


def read_secret(name: str, inline: Secret | None, file: str | None) -> Secret | None:
    """Return the secret that is given inline or in a file, None if neither is set."""
    if inline is not None and file is not None:
        raise ConfigError(f"{name} and {name}_file are both set: keep one")
    if file is None:
        return inline
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}_file: cannot read {file}: {_os_reason(error)}") from None
    secret = text.removesuffix("\n").removesuffix("\r")
    if not secret:
        raise ConfigError(f"{name}_file: {file} is empty")
    return Secret(secret)


def show(settings: Settings) -> str:
    """Render the effective settings as TOML, secrets masked."""
    lines: list[str] = []
    _render(msgspec.to_builtins(settings, enc_hook=_encode), (), lines)
    return "\n".join(lines).strip() + "\n"


def _render(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    if path and (plain or not table):
        lines.append(f"\n[{'.'.join(_toml_key(part) for part in path)}]")
    for key, value in plain.items():
        shown = f"# {key} is not set" if value is None else f"{key} = {_toml(value)}"
        lines.append(shown)
    for key, value in table.items():
        if isinstance(value, Mapping):
            _render(value, (*path, key), lines)


def _toml(value: object) -> str:
    """A JSON scalar or list is a TOML one, too."""
    return msgspec.json.encode(value).decode()


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {_os_reason(error)}") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError, too
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _os_reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or "error"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not a path"


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the variables that override keys, and their path, in a stable order."""
    names = [name for name in environ if name.startswith(ENV_PREFIX) and "__" in name]
    for name in sorted(names):
        yield name, name.removeprefix(ENV_PREFIX).split("__")
    for name in names:
        for form in (f"{name}_FILE", f"{name}_FILES"):
            if form in names:
                raise ConfigError(f"{name} and {form} are both set: keep one")


def _put(tree: dict[str, Any], variable: str, parts: list[str], text: str) -> None:
    """Set one key from the environment; sections and keys are found without regard to case."""
    kind: Any = Settings
    node: Any = tree
    path: list[str] = []
    for part in parts:
        if not isinstance(node or {}, Mapping) or not (kind is None or _is_table(kind)):
            raise ConfigError(f"{variable}: {'.'.join(path)} is not a section")
        name, kind = _step(kind, node or {}, part)
        node = (node or {}).get(name)
        path.append(name)
    over: Any = _parse_value(kind, text)
    for name in reversed(path):
        over = {name: over}
    try:
        _refuse_unknown(Settings, over, ())
    except ConfigError as error:
        raise ConfigError(f"{variable}: {error}") from None
    _merge(tree, over)


def _step(kind: Any, node: Mapping[str, Any], part: str) -> tuple[str, Any]:
    """Go one level down: a field of a section, or an entry of a table such as [clients]."""
    kind = _bare(kind)
    if get_origin(kind) in (dict, Mapping):
        name = next((known for known in node if known.lower() == part.lower()), part)
        return name, get_args(kind)[1]
    fields = _fields(kind)
    return part.lower(), fields.get(part.lower())


def _parse_value(kind: Any, text: str) -> Any:
    """Lists are written as in TOML or with commas; everything else is text until it is checked."""
    if get_origin(_bare(kind)) is tuple:
        if text.lstrip().startswith("["):
            try:
                return tomllib.loads(f"value = {text}")["value"]
            except tomllib.TOMLDecodeError:
                return text
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _merge(tree: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Lay one tree over another; neither keeps a part of the other.

    A secret and its `..._file` are one setting in two forms: the source that comes later decides.
    """
    for key, value in over.items():
        for twin in _twins(key):
            if twin not in over:
                tree.pop(twin, None)
        if not isinstance(value, Mapping):
            tree[key] = value
            continue
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        _merge(tree[key], value)


def _twins(key: str) -> tuple[str, ...]:
    """Other forms of a secret: inline, one file, several files."""
    stem = key.removesuffix("_files").removesuffix("_file")
    return stem, f"{stem}_file", f"{stem}_files"


def _refuse_unknown(kind: Any, tree: object, path: tuple[str, ...]) -> None:
    """Raise for the first key that no setting has, and name the nearest one that exists."""
    kind = _bare(kind)
    if not isinstance(tree, Mapping):
        return
    if get_origin(kind) in (dict, Mapping):
        for name, entry in tree.items():
            _refuse_unknown(get_args(kind)[1], entry, (*path, name))
        return
    fields = _fields(kind)
    if not fields:
        return  # a table where a value belongs: told with its type
    for name, entry in tree.items():
        if name not in fields:
            near = get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"unknown key {'.'.join((*path, name))}: {hint}")
        _refuse_unknown(fields[name], entry, (*path, name))


def _fields(kind: Any) -> dict[str, Any]:
    """Settings of a section, by name."""
    if isinstance(kind, type) and issubclass(kind, Struct):
        return {field.name: field.type for field in msgspec.structs.fields(kind)}
    return {}


def _is_table(kind: Any) -> bool:
    return bool(_fields(_bare(kind))) or get_origin(_bare(kind)) in (dict, Mapping)


def _bare(kind: Any) -> Any:
    """Strip `| None` and Annotated from a type."""
    if hasattr(kind, "__metadata__"):
        return _bare(get_args(kind)[0])
    if NoneType in get_args(kind):
        return _bare(next(part for part in get_args(kind) if part is not NoneType))
    return kind


def _decode(kind: type, value: object) -> object:
    if kind is Secret:
        if not isinstance(value, str):
            raise ValueError("a secret is text")
        return Secret(value)
    if kind is Duration:
        return _duration(value)
    raise NotImplementedError(kind)


def _encode(value: object) -> object:
    if isinstance(value, Secret):
        return "**********"
    return str(value)


def _duration(value: object) -> Duration:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('a duration needs a number and a unit (us, ms, s, m, h), such as "12s"')
    us = float(match[1]) * _UNITS[match[2]]
    if us > _MAX_DURATION:
        raise ValueError("a duration of more than a year")
    return Duration(round(us))


def _explain(kind: Any, value: object, path: tuple[str, ...], error: Exception) -> str:
    """Say in one line which value does not fit: the innermost one, by its whole path."""
    for name, inner, entry in _entries(kind, value):
        try:
            msgspec.convert(entry, inner, strict=False, dec_hook=_decode)
        except msgspec.ValidationError as reason:
            return _explain(inner, entry, (*path, name), reason)
    text = str(error).partition(" - at ")[0]
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    if get_origin(_bare(kind)) is Literal:
        text = f"must be {' or '.join(get_args(_bare(kind)))}"
    return f"{'.'.join(path) or 'configuration'}: {text[:1].lower()}{text[1:]}"


def _entries(kind: Any, value: object) -> Iterator[tuple[str, Any, object]]:
    """Name, type and value of what a table holds."""
    if not isinstance(value, Mapping) or not _is_table(kind):
        return
    kind = _bare(kind)
    fields = _fields(kind)
    for name, entry in value.items():
        yield name, fields.get(name) or get_args(kind)[1], entry


def _check(settings: Settings) -> None:
    """Rules that span more than one value."""
    for section in ("fingerprint", "fingerprint_mints", "agent", "client"):
        _check_limit(f"limits.{section}", getattr(settings.limits, section))
    budget = settings.issuer.budget
    if budget is not None:
        _check_rate("issuer.budget", budget.rate, budget.per, budget.burst)
        if budget.max_wait.us <= 0:
            raise ConfigError("issuer.budget.max_wait: must be longer than 0")
    for name, client in settings.clients.items():
        _check_agents(f"clients.{name}.agents", client.agents)
    _check_upstream(settings)
    _check_reuse(settings)
    _check_server(settings)
    _check_snapshot(settings)


def _check_limit(path: str, limit: Any) -> None:
    if limit is None:
        return
    _check_rate(path, limit.rate, limit.per, limit.burst)
    for agent, override in getattr(limit, "overrides", {}).items():
        if not AGENT_ID.fullmatch(agent):
            raise ConfigError(f"{path}.overrides: {agent!r} is not an agent id ({AGENT_RULE})")
        _check_rate(
            f"{path}.overrides.{agent}",
            limit.rate if override.rate is None else override.rate,
            limit.per if override.per is None else override.per,
            limit.burst if override.burst is None else override.burst,
        )


def _check_agents(path: str, agents: Iterable[str]) -> None:
    for agent in agents:
        if agent != "*" and not AGENT_ID.fullmatch(agent):
            raise ConfigError(f'{path}: {agent!r} is neither "*" nor an agent id ({AGENT_RULE})')


def _check_rate(path: str, rate: float, per: Duration, burst: int) -> None:
    try:
        bucket.limit(rate, per.us, burst)
    except ValueError as error:
        raise ConfigError(
            f"{path}: {error}; no number switches a limit off: raise it, or set dry_run = true"
        ) from None


def _check_upstream(settings: Settings) -> None:
    upstream = settings.issuer.upstream
    try:
        url = URL(upstream.base_url)
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host or url.query_string or url.user:
        raise ConfigError(
            'issuer.upstream.base_url: expected "https://HOST", without query or user'
        )
    if url.scheme == "http" and not is_loopback(url.host):
        raise ConfigError(
            "issuer.upstream.base_url: http would show the key to the network; use https"
        )
    if len(upstream.api_secret_files) > MAX_VENDOR_KEYS:
        raise ConfigError(
            f"issuer.upstream.api_secret_files: more than {MAX_VENDOR_KEYS}; each refused key is"
            " tried twice a minute, and the vendor allows 30 failures"
        )
    if upstream.timeout.us <= 0:
        raise ConfigError("issuer.upstream.timeout: must be longer than 0")


def is_loopback(host: str) -> bool:
    """Whether this host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_reuse(settings: Settings) -> None:
    reuse = settings.reuse
    if reuse.floor_in_outage.us > reuse.floor.us:
        raise ConfigError("reuse.floor_in_outage: must not be longer than reuse.floor")
    if reuse.refresh_ahead.us < reuse.floor.us:
        raise ConfigError("reuse.refresh_ahead: must not be shorter than reuse.floor")


def _check_server(settings: Settings) -> None:
    server = settings.server
    if server.deadline.us <= 0:
        raise ConfigError("server.deadline: must be longer than 0")
    if server.drain_lead.us > server.drain.us:
        raise ConfigError("server.drain_lead: must not be longer than server.drain")
    for path, listen in (("server", server.listen), ("admin", settings.admin.listen)):
        try:
            parse_address(listen)
        except ValueError as error:
            raise ConfigError(f"{path}.listen: {error}") from None
    for network in server.trusted_proxies:
        try:
            ipaddress.ip_network(network)
        except ValueError:
            raise ConfigError(
                f"server.trusted_proxies: {network!r} is neither an address nor a network"
            ) from None


def _check_snapshot(settings: Settings) -> None:
    store = settings.store
    if store.snapshot_file and not (store.encryption_key or store.encryption_key_file):
        raise ConfigError(
            "store.encryption_key_file: required with store.snapshot_file, because it holds"
            " tokens; make one with `broker keys generate`"
        )


def parse_address(text: str) -> tuple[str, int] | str:
    """Read `HOST:PORT`, `[V6]:PORT` or `unix:/path`; raises ValueError.

    Returns (host, port), or the path of a Unix socket.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not os.path.isabs(path) or not path.isprintable():
            raise ValueError("a Unix socket needs an absolute path, such as unix:/run/broker.sock")
        return path
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or not _PORT.fullmatch(port) or int(port) > 65535:
        raise ValueError('expected "HOST:PORT" (0 chooses a port) or "unix:/path"')
    if bare == host and ":" in host:
        raise ValueError('an IPv6 address needs brackets, such as "[::1]:8080"')
    return bare, int(port)
