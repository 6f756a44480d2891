"""The configuration as a JSON Schema: editors complete keys, and flag what does not fit.

Made from the settings classes: their types, bounds and defaults, and the docstrings below their
fields.  What a rule of `config.validate` says of one key stands here as a pattern or a bound; what
it says of several keys together has no place in a schema.  Draft 7, because the language servers
for TOML know nothing later.
"""

import ast
import inspect
import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Struct
from msgspec.structs import FieldInfo, fields

from broker.config import addresses, settings, validate
from broker.config.load import MIN_CLIENT_SECRET
from broker.config.schema import MAX_DURATION, UNITS, bare, encode, is_table
from broker.config.settings import Duration, Settings
from broker.model import AGENT_ID, MIN_KEY_BYTES, Secret
from broker.rules import bucket, passing
from broker.units import SECOND

DRAFT = "http://json-schema.org/draft-07/schema#"

Schema = dict[str, Any]

_FORMS = ("_file", "_files")
"""Endings of the other forms of a secret; a table has one of them."""


def json_schema() -> Schema:
    """Return the schema of a whole configuration file."""
    table = _table(Settings, _docstrings())
    return {"$schema": DRAFT, "title": "embed-token-broker", **table, "definitions": _SPANS}


def up_to(most: int) -> str:
    """Return a regular expression of the whole numbers from 0 to `most`, with leading zeros."""
    digits = str(most)
    same_length = [
        f"{digits[:place]}[0-{int(digit) - 1}]{_any(len(digits) - place - 1)}"
        for place, digit in enumerate(digits)
        if digit != "0"
    ]
    shorter = [f"[0-9]{{1,{len(digits) - 1}}}"] if len(digits) > 1 else []
    return f"0*(?:{'|'.join([*shorter, *same_length, digits])})"


def from_(least: int) -> str:
    """Return a regular expression of the whole numbers from `least` on, with leading zeros."""
    digits = str(least)
    same_length = [
        f"{digits[:place]}[{int(digit) + 1}-9]{_any(len(digits) - place - 1)}"
        for place, digit in enumerate(digits)
        if digit != "9"
    ]
    return f"0*(?:{'|'.join([*same_length, digits, f'[1-9]{_any(len(digits))}[0-9]*'])})"


def _any(digits: int) -> str:
    """So many digits."""
    return {0: "", 1: "[0-9]"}.get(digits, f"[0-9]{{{digits}}}")


def span(least: int = 0, most: int = MAX_DURATION) -> Schema:
    """Return the schema of a span of time of so many microseconds.

    Three rules, because an editor shows the one that is broken: how a span is written, which are
    too short, which too long.  In units that are longer than `least` only 0 counts as too short.
    """
    rules = [r for r in (_shorter(least), _longer(most)) if r]
    return {
        "type": "string",
        "pattern": rf"^[0-9]+(\.[0-9]+)?({'|'.join(UNITS)})$",
        "allOf": [{"not": {"type": "string", "pattern": f"^({rule})$"}} for rule in rules],
    }


def _shorter(least: int) -> str:
    """Return a regular expression of spans below so many microseconds."""
    return "|".join(
        rf"{up_to(-(-least // size) - 1)}(\.[0-9]+)?{unit}"
        if size <= least
        else rf"0+(\.0+)?{unit}"
        for unit, size in UNITS.items()
        if least
    )


def _longer(most: int) -> str:
    """Return a regular expression of spans above so many microseconds."""
    forms = []
    for unit, size in UNITS.items():
        whole = most // size
        beyond = rf"0*{whole or ''}\.[0-9]*[1-9][0-9]*"
        forms.append(rf"({from_(whole + 1)}(\.[0-9]+)?|{beyond}){unit}")
    return "|".join(forms)


_SPANS = {
    "span": span(),
    "span_longer_than_0": span(1),
    "keep_alive": span(*(one.us for one in validate.KEEP_ALIVE_BOUNDS)),
    "store_timeout": span(*(one.us for one in validate.STORE_TIMEOUT_BOUNDS)),
}
"""Definitions of the schema: each is used by its name."""


def _span(name: str) -> Schema:
    return {"allOf": [{"$ref": f"#/definitions/{name}"}]}


_RATE = {"exclusiveMinimum": 0, "maximum": bucket.MAX_RATE * MAX_DURATION // SECOND}
_BURST = {"minimum": 1, "maximum": bucket.MAX_BURST}

_LISTEN = {
    "pattern": r"^(unix:/[^\u0000-\u001f]*"
    r"|(\[[0-9A-Fa-f:.]+(%[A-Za-z0-9]+)?\]|[^\[\]:*]+):[0-9]{1,5})$",
    "not": {"pattern": f"^[^/]*:{from_(addresses.MAX_PORT + 1)}$"},
}
_NETWORK = (
    r"^(((25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])(\.|(?=/|$))){4}(/(3[0-2]|[12]?[0-9]))?"
    r"|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(/[0-9]{1,3})?)$"
)
_STORE = (
    r"^(memory://|sqlite:///(?!.*/?\.\.(/|$))[^/?#\u0000-\u001f]([^?#\u0000-\u001f]*[^/?#\u0000-\u001f])?"
    r"|unix:///[^/?#].*|(valkeys?|rediss?)(\+cluster)?://[^/@?#]+(/[0-9]*)?)$"
)
_RESERVED = "".join(f"[{c.upper()}{c}]" if c.isalpha() else c for c in passing.RESERVED)
_ROUTE = rf"^(?!{_RESERVED}(/|$))(?!.*/\.\.?(/|$)){passing.ROUTE.pattern}$"
_AGENT = f"^{AGENT_ID.pattern}$"

_BOUNDS: Mapping[tuple[type[Struct], str], Schema] = {
    (settings.ServerSettings, "listen"): _LISTEN,
    (settings.ServerSettings, "deadline"): _span("span_longer_than_0"),
    (settings.ServerSettings, "keep_alive"): _span("keep_alive"),
    (settings.ServerSettings, "trusted_proxies"): {"items": {"pattern": _NETWORK}},
    (settings.AdminSettings, "listen"): _LISTEN,
    (settings.AdminSettings, "secret"): {"minLength": MIN_CLIENT_SECRET},
    (settings.ClientSettings, "secret"): {"minLength": MIN_CLIENT_SECRET},
    (settings.ClientSettings, "next_secret"): {"minLength": MIN_CLIENT_SECRET},
    (settings.ClientSettings, "agents"): {"items": {"pattern": rf"^(?:\*|{AGENT_ID.pattern})$"}},
    (settings.KeySettings, "secret"): {"minLength": MIN_KEY_BYTES},
    (settings.UpstreamSettings, "base_url"): {"pattern": "^[Hh][Tt][Tt][Pp][Ss]?://[^?#@]+$"},
    (settings.UpstreamSettings, "api_secret_files"): {"maxItems": validate.MAX_VENDOR_KEYS},
    (settings.UpstreamSettings, "pass_through"): {"items": {"pattern": _ROUTE}},
    (settings.UpstreamSettings, "timeout"): _span("span_longer_than_0"),
    (settings.BudgetSettings, "max_wait"): _span("span_longer_than_0"),
    (settings.StoreSettings, "url"): {"pattern": _STORE},
    (settings.StoreSettings, "timeout"): _span("store_timeout"),
    (settings.StoreSettings, "encryption_key"): {"minLength": MIN_KEY_BYTES},
    **{
        (kind, name): bounds
        for kind in (
            settings.BudgetSettings,
            settings.LimitSettings,
            settings.AgentOverrideSettings,
            settings.FingerprintLimitSettings,
            settings.FingerprintMintsLimitSettings,
            settings.AgentLimitSettings,
        )
        for name, bounds in (
            ("rate", _RATE),
            ("burst", _BURST),
            ("per", _span("span_longer_than_0")),
        )
    },
}
"""What the rules of `config.validate` and of the factory say of one key, beside its type."""


def _table(kind: type[Struct], texts: Mapping[tuple[str, str], str]) -> Schema:
    """Return the schema of a table: its keys, which of them are required, which exclude another."""
    keys = {field.name: _key(kind, field, texts) for field in fields(kind)}
    table: Schema = {
        "description": inspect.cleandoc(kind.__doc__ or ""),
        "type": "object",
        "additionalProperties": False,
        "properties": keys,
    }
    required = [field.name for field in fields(kind) if field.required]
    two_forms = [[name, name + end] for name in keys for end in _FORMS if name + end in keys]
    if required:
        table["required"] = required
    if two_forms:
        table["allOf"] = [{"not": {"required": pair}} for pair in two_forms]
    return table


def _key(kind: type[Struct], field: FieldInfo, texts: Mapping[tuple[str, str], str]) -> Schema:
    value = bare(field.type)
    key: Schema
    if get_origin(value) is Mapping:
        names, entries = get_args(value)
        rule = msgspec.json.schema(names)
        if field.name == "overrides":
            rule = {"type": "string", "pattern": _AGENT}
        key = {
            "type": "object",
            "propertyNames": rule,
            "additionalProperties": _table(entries, texts),
        }
    elif is_table(value):
        key = _table(value, texts)
    else:
        key = _merged(_value(field.type), _BOUNDS.get((kind, field.name), {}))
        if field.default not in (None, NODEFAULT):
            key["default"] = msgspec.json.decode(
                msgspec.json.encode(field.default, enc_hook=encode)
            )
    return {"description": texts[kind.__name__, field.name], **_described(key)}


def _described(key: Schema) -> Schema:
    """Leave out the description of a table's class, where its place says more."""
    return {name: value for name, value in key.items() if name != "description"}


def _value(kind: Any) -> Schema:
    """Return the schema of a type; TOML has no null, so `| None` is what may be left out."""
    schema = msgspec.json.schema(kind, schema_hook=_own_type)
    choices = [one for one in schema.pop("anyOf", ()) if one != {"type": "null"}]
    if len(choices) == 1:
        return {**schema, **choices[0]}
    return {**schema, "anyOf": choices} if choices else schema


def _own_type(kind: type) -> Schema:
    if kind is Duration:
        return _span("span")
    if kind is Secret:
        return {"type": "string"}
    raise NotImplementedError(kind)


def _merged(schema: Schema, bounds: Schema) -> Schema:
    """Add bounds to a schema, and those of its items to its items."""
    items = {**schema.get("items", {}), **bounds.get("items", {})}
    return {**schema, **bounds, **({"items": items} if items else {})}


def _docstrings() -> dict[tuple[str, str], str]:
    """Return the docstring below each setting, by its class and name, as one paragraph."""
    found = {}
    for section in ast.parse(inspect.getsource(settings)).body:
        if not isinstance(section, ast.ClassDef):
            continue
        for statement, following in zip(section.body, section.body[1:], strict=False):
            match statement, following:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[section.name, name] = re.sub(r"\s+", " ", text)
                case _:
                    continue
    return found
