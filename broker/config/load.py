"""From file, environment and flags to a checked settings tree.

Precedence: flag, environment, file, default.  `BROKER_SECTION__KEY` overrides `[section] key` at
any depth.  Everything is checked here, before anything is opened: a `ConfigError` is one line that
names the key, the rule and the remedy, and the process ends with exit code 78 (EX_CONFIG of
sysexits.h).
"""

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace

from broker.config import environment, files
from broker.config.environment import twins
from broker.config.schema import ConfigError, build_what_fits
from broker.config.settings import BudgetSettings, Settings
from broker.config.validate import normal_base_url
from broker.config.validate import problems as rules
from broker.model import Secret

DEFAULT_PATH = Path("/etc/embed-token-broker/broker.toml")
"""Where a packaged broker is configured."""

VENDOR_VARIABLES = ("BITHUMAN_API_SECRET", "BITHUMAN_API_KEY")
"""Environment variables in which the vendor's own examples keep the key: the usual, the old."""

MIN_CLIENT_SECRET = 16
"""Characters: a throttle cannot stop guessing from many addresses, the length of a secret can."""


class Examined(NamedTuple):
    """The settings of a configuration, and all that is wrong with it.

    `settings` are without the values of the keys in `left_out`, which do not fit.
    """

    settings: Settings
    problems: list[ConfigError]
    left_out: list[str]


def load(
    path: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """Read and merge every source; raises ConfigError.

    `flags` and `defaults` are trees like the file's; `defaults` yields to everything else.
    """
    return sound(examine(path, environ, flags, defaults))


def from_tree(tree: Mapping[str, Any]) -> Settings:
    """Check a raw tree and build the settings from it; raises ConfigError."""
    return sound(examine_tree(tree))


def examine(
    path: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> Examined:
    """Read and merge every source, and find all that is wrong; raises ConfigError for the file."""
    tree: dict[str, Any] = {}
    _merge(tree, defaults or {})
    _merge(tree, _read_file(path) if path is not None else {})
    given, problems = environment.read(tree, environ)
    for variable in given:
        _merge(tree, variable.tree)
    _merge(tree, flags)
    found = examine_tree(tree)
    names = {given.key: given.name for given in given if not _has(flags, given.key)}
    problems += [_by_variable(problem, names) for problem in found.problems]
    return Examined(found.settings, problems, found.left_out)


def examine_tree(tree: Mapping[str, Any]) -> Examined:
    """Build settings from a raw tree, without what is wrong in it."""
    settings, misfits = build_what_fits(tree)
    if settings.issuer.kind == "upstream" and settings.issuer.budget is None:
        issuer = replace(settings.issuer, budget=BudgetSettings())  # a relay always has one
        settings = replace(settings, issuer=issuer)
    left_out = [".".join(path) for path, _ in misfits]
    left_out += [key for _, problem in misfits for key in problem.beside]
    if "issuer.kind" in left_out:  # what else it needs, the kind decides
        left_out.append("issuer")
    problems = [problem for _, problem in misfits]
    broken = [each for each in rules(settings) if not follows_from(each, left_out)]
    upstream = settings.issuer.upstream
    with suppress(ValueError):  # it is among the problems
        upstream = replace(upstream, base_url=normal_base_url(upstream.base_url))
    settings = replace(settings, issuer=replace(settings.issuer, upstream=upstream))
    # a list that has something wrong twice is told once
    told: dict[str, ConfigError] = {}
    for problem in problems + broken:
        told.setdefault(str(problem), problem)
    return Examined(settings, list(told.values()), left_out)


def follows_from(problem: ConfigError, keys: Iterable[str]) -> bool:
    """Whether a problem may be there only because the values of these keys were left out.

    The forms of a secret are one, and a table that lacks something may lack what was left out.
    """
    looked_at = {_stem(key) for key in (problem.key, *problem.beside)}
    return any(
        f"{one}.".startswith(f"{_stem(key)}.") or f"{_stem(key)}.".startswith(f"{one}.")
        for key in keys
        for one in looked_at
    )


def _stem(key: str) -> str:
    return twins(key)[0]


def sound(found: Examined) -> Settings:
    """Return the settings; raises ConfigError for the first problem."""
    for problem in found.problems:
        raise problem
    return found.settings


def _by_variable(problem: ConfigError, names: Mapping[str, str]) -> ConfigError:
    """Name the variable that is wrong: there is nothing about it in the file.

    A rule of a table, such as a limit, names in its text the value that breaks it.
    """
    first_word = str(problem).removeprefix(f"{problem.key}: ").partition(" ")[0]
    for key in (problem.key, f"{problem.key}.{first_word}"):
        if key in names:
            return ConfigError(f"{names[key]}: {problem}", *problem.beside)
    return problem


def _has(tree: Mapping[str, Any], key: str) -> bool:
    node: Any = tree
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node is not None


def overridden(path: Path | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the keys of a file that do not count, each with the variable that does.

    A variable that says the same as the file overrides nothing.  Raises ConfigError.
    """
    tree = _read_file(path) if path is not None else {}
    variables, _ = environment.read(tree, environ)
    return {key: one.name for one in variables for key in _replaced(tree, one.tree, ())}


def _replaced(
    tree: Mapping[str, Any], over: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[str]:
    """Yield the keys of a tree that another one replaces by something else, in whatever form."""
    for key, value in over.items():
        below = tree.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            yield from _replaced(below, value, (*path, key))
            continue
        for form in dict.fromkeys((key, *twins(key))):
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
        remedy = "; `broker init` makes one, --config names another" if error.is_absent else ""
        raise ConfigError(f"{error}{remedy}") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError, too
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _merge(tree: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Lay one tree over another; neither keeps a part of the other.

    A secret and its `..._file` are one setting in two forms: the source that comes later decides.
    """
    for key, value in over.items():
        for twin in twins(key):
            if twin not in over:
                tree.pop(twin, None)
        if not isinstance(value, Mapping):
            tree[key] = value
            continue
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        _merge(tree[key], value)
