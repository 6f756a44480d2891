"""Variables that override keys of the file: `BROKER_SECTION__KEY`, at any depth.

Sections and keys are found without regard to case.  Other variables with the prefix are none of
ours: `BROKER_CONFIG`, and what a container platform adds (`BROKER_PORT`).
"""

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args, get_origin

from broker.config.schema import ConfigError, bare, fields_of, is_table, unknown_keys
from broker.config.settings import Settings

PREFIX = "BROKER_"
"""Variables with this prefix and a double underscore override keys of the file."""


class Variable(NamedTuple):
    """A variable, the path of the key that it sets, and that key alone as a tree."""

    name: str
    key: str
    tree: dict[str, Any]


def read(
    tree: Mapping[str, Any], environ: Mapping[str, str]
) -> tuple[list[Variable], list[ConfigError]]:
    """Return the variables to be laid over a tree, in order, and what is wrong with others."""
    names = sorted(name for name in environ if name.startswith(PREFIX) and "__" in name)
    problems = [
        ConfigError(f"{name} and {form} are both set: keep one")
        for name in names
        for form in (f"{name}_FILE", f"{name}_FILES")
        if form in names
    ]
    found = []
    for name in names:
        try:
            found.append(_variable(tree, name, environ[name]))
        except ConfigError as error:
            problems.append(error)
    return found, problems


def misspelt(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield variables that are not read, but would be with two underscores; each with that name.

    Only if all of it is the path of a setting: `BROKER_PORT` is a container platform's.
    """
    for name in sorted(environ):
        if name.startswith(PREFIX) and "__" not in name and (right := _right_name(name)):
            yield name, right


def twins(key: str) -> tuple[str, ...]:
    """Other forms of a secret: inline, one file, several files."""
    stem = key.removesuffix("_files").removesuffix("_file")
    return stem, f"{stem}_file", f"{stem}_files"


def _right_name(name: str) -> str | None:
    """Return how a variable is written whose words, with any underscores, are a setting's path."""
    words = [word for word in name.removeprefix(PREFIX).split("_") if word]
    path = next(_paths(Settings, words), None)
    return None if path is None else PREFIX + "__".join(path)


def _paths(kind: Any, words: list[str]) -> Iterator[list[str]]:
    """Yield each way to read words as the path of a setting below this type."""
    kind = bare(kind)
    if not is_table(kind):
        if not words:
            yield []
        return
    fields, free = fields_of(kind), None if fields_of(kind) else get_args(kind)[1]
    for count in range(1, len(words) + 1):
        name = "_".join(words[:count])
        inner = fields.get(name.lower(), free)
        if inner is not None:
            for rest in _paths(inner, words[count:]):
                yield [name, *rest]


def _variable(tree: Mapping[str, Any], name: str, text: str) -> Variable:
    """Return one key from the environment as a tree to be laid over this one."""
    kind: Any = Settings
    node: Any = tree
    path: list[str] = []
    for part in name.removeprefix(PREFIX).split("__"):
        if not isinstance(node or {}, Mapping) or not (kind is None or is_table(kind)):
            raise ConfigError(f"{name}: {'.'.join(path)} is not a section")
        key, kind = _step(kind, node or {}, part)
        node = (node or {}).get(key)
        path.append(key)
    over: Any = _parse_value(kind, text)
    for key in reversed(path):
        over = {key: over}
    for _, error in unknown_keys(Settings, over):
        right = _right_name(name)
        meant = f"{error}" if right is None else f"no such key; write {right}"
        raise ConfigError(f"{name}: {meant}", *error.beside)
    return Variable(name, ".".join(path), dict(over))


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
