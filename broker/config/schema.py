"""Types and values of a configuration: what exists, how it is written, what does not fit.

Knows the settings tree and TOML's words for it; does not know where a tree comes from.
"""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import Struct

from broker.config.addresses import USUAL_FILE
from broker.config.settings import Duration, Settings
from broker.model import Secret

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|m|h)")
UNITS = {"us": 1, "ms": 1000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000}
"""Units of a span of time, each in microseconds."""
MAX_DURATION = 366 * 24 * UNITS["h"]
"""Microseconds of the longest span: nothing here takes a year."""

_WORDS = {
    " | null": "",
    "`object`": "a table",
    "Object missing": "the table lacks the",
    "`array`": "a list",
    "`str` matching regex": "names matching",
    "`": "",
}
"""What the decoder says, in the words of a TOML file."""


Path = tuple[str, ...]
"""Where a value stands: the names of the tables above it, and its own."""

_FILE_REMEDY = (
    "is gone: state is kept in a file as it changes, not at the end; take it out, and set"
    f' store.url = "{USUAL_FILE}"'
)

_RETIRED = {
    "store.snapshot_file": _FILE_REMEDY,
    "store.snapshot_max_age": _FILE_REMEDY,
}
"""Settings that were, and what is in their place."""


class ConfigError(Exception):
    """A configuration that cannot be used; the message is one line for the operator.

    It begins with the key that is wrong; `beside` are other keys that the rule looked at.
    """

    def __init__(self, message: str, *beside: str) -> None:
        super().__init__(message)
        self.beside = beside

    @property
    def key(self) -> str:
        """The path of the key that is wrong, "" where the message names none."""
        path, colon, _ = str(self).removeprefix("unknown key ").partition(": ")
        return path if colon and " " not in path else ""


def build(tree: Mapping[str, Any]) -> Settings:
    """Turn a raw tree into settings, by type only; raises ConfigError."""
    settings, wrong = build_what_fits(tree)
    for _, error in wrong:
        raise error
    return settings


def build_what_fits(
    tree: Mapping[str, Any],
) -> tuple[Settings, list[tuple[Path, ConfigError]]]:
    """Turn a raw tree into settings, by type only.

    Returns them without what does not fit: each of that with its path, and what is wrong with it.
    """
    found: list[tuple[Path, ConfigError]] = []
    while wrong := list(unknown_keys(Settings, tree)) or list(misfits(Settings, tree)):
        told = [path for path, _ in found]  # what lacks something may lack what was left out
        found += [one for one in wrong if not any(path[: len(one[0])] == one[0] for path in told)]
        for path, _ in wrong:
            tree = without(tree, path)
    return msgspec.convert(tree, Settings, strict=False, dec_hook=decode), found


def without(tree: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a tree without what stands at a path; without anything for an empty one."""
    if not path:
        return {}
    name, *rest = path
    left = {key: value for key, value in tree.items() if key != name or rest}
    inner = left.get(name)
    return {**left, name: without(inner, tuple(rest))} if isinstance(inner, Mapping) else left


def show(settings: Settings, notes: Mapping[str, str] = MappingProxyType({})) -> str:
    """Render the effective settings as TOML, secrets masked.

    What is inherited is a comment: read back, it is inherited still.  `notes` are further comments,
    by the path of a key.
    """
    lines: list[str] = []
    _render(msgspec.to_builtins(settings, enc_hook=encode), (), {}, notes, lines)
    return "\n".join(lines).strip() + "\n"


def _render(
    table: Mapping[str, Any],
    path: tuple[str, ...],
    inherited: Mapping[str, Any],
    notes: Mapping[str, str],
    lines: list[str],
) -> None:
    """Append a table; in an override, `inherited` is the table that has what it leaves out."""
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    if path and (plain or not table):
        lines.append(f"\n[{'.'.join(_toml_key(part) for part in path)}]")
    for key, value in plain.items():
        shown = f"# {key} is not set" if value is None else f"{key} = {_toml(value)}"
        if value is None and key in inherited:
            shown = f"# {key} = {_toml(inherited[key])}, inherited"
        note = notes.get(".".join((*path, key)))
        lines.append(f"{shown}  # {note}" if note else shown)
    for key, value in table.items():
        if isinstance(value, Mapping):
            above = table if key == "overrides" else inherited
            _render(value, (*path, key), above, notes, lines)


def _toml(value: object) -> str:
    """A JSON scalar or list is a TOML one, too."""
    return msgspec.json.encode(value).decode()


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def unknown_keys(kind: Any, tree: object, path: Path = ()) -> Iterator[tuple[Path, ConfigError]]:
    """Yield each key that no setting has, with the nearest one that exists."""
    kind = bare(kind)
    if not isinstance(tree, Mapping):
        return
    if get_origin(kind) in (dict, Mapping):
        for name, entry in tree.items():
            yield from unknown_keys(get_args(kind)[1], entry, (*path, name))
        return
    fields = fields_of(kind)
    if not fields:
        return  # a table where a value belongs: told with its type
    for name, entry in tree.items():
        here = (*path, name)
        if name in fields:
            yield from unknown_keys(fields[name], entry, here)
        else:
            yield here, _unknown(here, fields)


def _unknown(path: Path, fields: Mapping[str, Any]) -> ConfigError:
    shown = ".".join(path)
    if remedy := _RETIRED.get(shown):
        return ConfigError(f"{shown}: {remedy}")
    if near := get_close_matches(path[-1], fields, n=1):
        meant = ".".join((*path[:-1], near[0]))
        return ConfigError(f"unknown key {shown}: did you mean {near[0]!r}?", meant)
    return ConfigError(f"unknown key {shown}: known: {', '.join(fields)}")


def fields_of(kind: Any) -> dict[str, Any]:
    """Settings of a section, by name."""
    if isinstance(kind, type) and issubclass(kind, Struct):
        return {field.name: field.type for field in msgspec.structs.fields(kind)}
    return {}


def is_table(kind: Any) -> bool:
    """Whether this type holds keys of its own."""
    return bool(fields_of(bare(kind))) or get_origin(bare(kind)) in (dict, Mapping)


def bare(kind: Any) -> Any:
    """Strip `| None` and Annotated from a type."""
    if hasattr(kind, "__metadata__"):
        return bare(get_args(kind)[0])
    if NoneType in get_args(kind):
        return bare(next(part for part in get_args(kind) if part is not NoneType))
    return kind


def decode(kind: type, value: object) -> object:
    """Read the types that msgspec does not know; raises ValueError."""
    if kind is Secret:
        if not isinstance(value, str):
            raise ValueError("a secret is text")
        return Secret(value)
    if kind is Duration:
        return duration(value)
    raise NotImplementedError(kind)


def encode(value: object) -> object:
    """Write the types that msgspec does not know; secrets come out masked."""
    if isinstance(value, Secret):
        return "**********"
    return str(value)


def duration(value: object) -> Duration:
    """Read "12s"; raises ValueError."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('a duration needs a number and a unit (us, ms, s, m, h), such as "12s"')
    us = float(match[1]) * UNITS[match[2]]
    if us > MAX_DURATION:
        raise ValueError("a duration of more than a year")
    return Duration(round(us))


def misfits(kind: Any, value: object, path: Path = ()) -> Iterator[tuple[Path, ConfigError]]:
    """Yield each value that does not fit its type: the innermost ones, by their whole paths."""
    try:
        msgspec.convert(value, kind, strict=False, dec_hook=decode)
    except msgspec.ValidationError as error:
        inner = [
            misfit
            for name, entry_kind, entry in _entries(kind, value)
            for misfit in misfits(entry_kind, entry, (*path, name))
        ]
        yield from inner or [(path, ConfigError(_misfit(kind, path, error)))]


def _misfit(kind: Any, path: Path, error: Exception) -> str:
    text = str(error).partition(" - at ")[0]
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    if get_origin(bare(kind)) is Literal:
        text = f"must be {' or '.join(get_args(bare(kind)))}"
    elif words := _words_of(kind):
        text = f"must be {' or '.join(words)}, or a whole number from 1"
    return f"{'.'.join(path) or 'configuration'}: {text[:1].lower()}{text[1:]}"


def _words_of(kind: Any) -> list[str]:
    """Words that stand for a number; the decoder names the number only, or the words only."""
    literals = [part for part in get_args(bare(kind)) if get_origin(part) is Literal]
    return [f'"{word}"' for literal in literals for word in get_args(literal)]


def _entries(kind: Any, value: object) -> Iterator[tuple[str, Any, object]]:
    """Name, type and value of what a table holds."""
    if not isinstance(value, Mapping) or not is_table(kind):
        return
    kind = bare(kind)
    fields = fields_of(kind)
    for name, entry in value.items():
        if not fields or name in fields:
            yield name, fields.get(name) or get_args(kind)[1], entry
