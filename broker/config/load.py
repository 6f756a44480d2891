"""From file, environment and flags to a checked settings tree.

Precedence: flag, environment, file, default.  `BROKER_SECTION__KEY` overrides `[section] key` at
any depth.  Everything is checked here, before anything is opened: a `ConfigError` is one line that
names the key, the rule and the remedy, and the process ends with exit code 78 (EX_CONFIG of
sysexits.h).
"""

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from msgspec.structs import replace

from broker.config import files
from broker.config.schema import ConfigError, bare, build, fields_of, is_table, refuse_unknown
from broker.config.settings import BudgetSettings, Settings
from broker.config.validate import check, normal_base_url
from broker.model import Secret

DEFAULT_PATH = Path("/etc/embed-token-broker/broker.toml")
"""Where a packaged broker is configured."""

ENV_PREFIX = "BROKER_"
"""Variables with this prefix and a double underscore override keys of the file."""

VENDOR_VARIABLES = ("BITHUMAN_API_SECRET", "BITHUMAN_API_KEY")
"""Environment variables in which the vendor's own examples keep the key: the usual, the old."""

MIN_CLIENT_SECRET = 16
"""Characters: a throttle cannot stop guessing from many addresses, the length of a secret can."""


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
        _merge(tree, _override(tree, name, parts, environ[name]))
    _merge(tree, flags)
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> Settings:
    """Check a raw tree and build the settings from it; raises ConfigError."""
    settings = build(tree)
    if settings.issuer.kind == "upstream" and settings.issuer.budget is None:
        issuer = replace(settings.issuer, budget=BudgetSettings())  # a relay always has one
        settings = replace(settings, issuer=issuer)
    check(settings)
    upstream = settings.issuer.upstream
    upstream = replace(upstream, base_url=normal_base_url(upstream.base_url))
    return replace(settings, issuer=replace(settings.issuer, upstream=upstream))


def overridden(path: Path | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the keys of a file that do not count, each with the variable that does.

    A variable that says the same as the file overrides nothing.  Raises ConfigError.
    """
    variables = list(_from_environment(environ))
    tree = _read_file(path) if path is not None and variables else {}
    found: dict[str, str] = {}
    for name, parts in variables:
        for key in _replaced(tree, _override(tree, name, parts, environ[name]), ()):
            found[key] = name
    return found


def _replaced(
    tree: Mapping[str, Any], over: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[str]:
    """Yield the keys of a tree that another one replaces by something else, in whatever form."""
    for key, value in over.items():
        below = tree.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            yield from _replaced(below, value, (*path, key))
            continue
        for form in dict.fromkeys((key, *_twins(key))):
            if form in tree and (form != key or str(below) != str(value)):
                yield ".".join((*path, form))


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
    return inline if file is None else secret_in(f"{name}_file", file)


def found_in(name: str, file: str | None) -> str:
    """Name a secret in an error: by the setting that was used and, if it is in one, its file."""
    return name if file is None else f"{name}_file: {file}"


def secret_in(setting: str, file: str) -> Secret:
    """Return the secret in the file that a setting names; raises ConfigError."""
    try:
        text = files.read_text(file)
    except files.CannotRead as error:
        raise ConfigError(f"{setting}: {error}") from None
    secret = text.removesuffix("\n").removesuffix("\r")
    if not secret:
        raise ConfigError(f"{setting}: {file} is empty")
    return Secret(secret)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = files.read_text(path)
    except files.CannotRead as error:
        raise ConfigError(str(error)) from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError, too
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the variables that override keys, and their path, in a stable order."""
    names = [name for name in environ if name.startswith(ENV_PREFIX) and "__" in name]
    for name in sorted(names):
        yield name, name.removeprefix(ENV_PREFIX).split("__")
    for name in names:
        for form in (f"{name}_FILE", f"{name}_FILES"):
            if form in names:
                raise ConfigError(f"{name} and {form} are both set: keep one")


def _override(
    tree: Mapping[str, Any], variable: str, parts: list[str], text: str
) -> dict[str, Any]:
    """Return one key from the environment as a tree to be laid over this one.

    Sections and keys are found without regard to case.
    """
    kind: Any = Settings
    node: Any = tree
    path: list[str] = []
    for part in parts:
        if not isinstance(node or {}, Mapping) or not (kind is None or is_table(kind)):
            raise ConfigError(f"{variable}: {'.'.join(path)} is not a section")
        name, kind = _step(kind, node or {}, part)
        node = (node or {}).get(name)
        path.append(name)
    over: Any = _parse_value(kind, text)
    for name in reversed(path):
        over = {name: over}
    try:
        refuse_unknown(Settings, over, ())
    except ConfigError as error:
        raise ConfigError(f"{variable}: {error}") from None
    return dict(over)


def _step(kind: Any, node: Mapping[str, Any], part: str) -> tuple[str, Any]:
    """Go one level down: a field of a section, or an entry of a table such as [clients]."""
    kind = bare(kind)
    if get_origin(kind) in (dict, Mapping):
        name = next((known for known in node if known.lower() == part.lower()), part)
        return name, get_args(kind)[1]
    fields = fields_of(kind)
    return part.lower(), fields.get(part.lower())


def _parse_value(kind: Any, text: str) -> Any:
    """Lists are written as in TOML or with commas; everything else is text until it is checked."""
    if get_origin(bare(kind)) is tuple:
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
