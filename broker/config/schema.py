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

from broker.config.settings import Duration, Settings
from broker.model import Secret

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|m|h)")
_UNITS = {"us": 1, "ms": 1000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000}
_MAX_DURATION = 366 * 24 * _UNITS["h"]

_WORDS = {
    " | null": "",
    "`object`": "a table",
    "Object missing": "the table lacks the",
    "`array`": "a list",
    "`str` matching regex": "names matching",
    "`": "",
}
"""What the decoder says, in the words of a TOML file."""


_FILE_REMEDY = (
    "is gone: state is kept in a file as it changes, not at the end; take it out, and set"
    ' store.url = "sqlite:///var/lib/embed-token-broker/state.db"'
)

_RETIRED = {
    "store.snapshot_file": _FILE_REMEDY,
    "store.snapshot_max_age": _FILE_REMEDY,
}
"""Settings that were, and what is in their place."""


class ConfigError(Exception):
    """A configuration that cannot be used; the message is one line for the operator."""


def build(tree: Mapping[str, Any]) -> Settings:
    """Turn a raw tree into settings, by type only; raises ConfigError."""
    refuse_unknown(Settings, tree, ())
    try:
        return msgspec.convert(tree, Settings, strict=False, dec_hook=decode)
    except msgspec.ValidationError as error:
        raise ConfigError(explain(Settings, tree, (), error)) from None


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


def refuse_unknown(kind: Any, tree: object, path: tuple[str, ...]) -> None:
    """Raise for the first key that no setting has, and name the nearest one that exists."""
    kind = bare(kind)
    if not isinstance(tree, Mapping):
        return
    if get_origin(kind) in (dict, Mapping):
        for name, entry in tree.items():
            refuse_unknown(get_args(kind)[1], entry, (*path, name))
        return
    fields = fields_of(kind)
    if not fields:
        return  # a table where a value belongs: told with its type
    for name, entry in tree.items():
        if name not in fields:
            if remedy := _RETIRED.get(".".join((*path, name))):
                raise ConfigError(f"{'.'.join((*path, name))}: {remedy}")
            near = get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"unknown key {'.'.join((*path, name))}: {hint}")
        refuse_unknown(fields[name], entry, (*path, name))


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
    us = float(match[1]) * _UNITS[match[2]]
    if us > _MAX_DURATION:
        raise ValueError("a duration of more than a year")
    return Duration(round(us))


def explain(kind: Any, value: object, path: tuple[str, ...], error: Exception) -> str:
    """Say in one line which value does not fit: the innermost one, by its whole path."""
    for name, inner, entry in _entries(kind, value):
        try:
            msgspec.convert(entry, inner, strict=False, dec_hook=decode)
        except msgspec.ValidationError as reason:
            return explain(inner, entry, (*path, name), reason)
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
        yield name, fields.get(name) or get_args(kind)[1], entry
