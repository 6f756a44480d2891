"""The JSON Schema of the configuration: editors flag what the loader refuses, and nothing good."""

import functools
import json
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from documents import ROOT
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import fields
from processes import Tree, put, run
from test_config import WRONG, alone, beside, keys

from broker.config import load as config
from broker.config import schema, validate
from broker.config.json_schema import from_, json_schema, up_to
from broker.config.schema import MAX_DURATION, ConfigError
from broker.config.settings import Settings
from broker.rules import passing

if TYPE_CHECKING:
    from jsonschema import Draft7Validator

SHIPPED = sorted((ROOT / "config").rglob("*.toml"))


@functools.cache
def validator() -> "Draft7Validator":
    """Validate by the schema; loaded by who needs it, because that takes seconds."""
    from jsonschema import Draft7Validator

    Draft7Validator.check_schema(json_schema())
    return Draft7Validator(json_schema())


def is_good(tree: object) -> bool:
    """Whether an editor would flag nothing."""
    return bool(validator().is_valid(tree))


def beyond_one_key(dotted: str, value: object) -> bool:
    """Whether a refusal is about several keys together, or a number that JSON cannot express."""
    together = [
        ("server.drain_lead", "16s"),
        ("reuse.floor_in_outage", "6m"),
        ("reuse.refresh_ahead", "4m"),
        ("server.trusted_proxies", ["10.0.0.1/8"]),  # bits behind the prefix
    ]
    if isinstance(value, float) and math.isnan(value):
        return True
    # a rate that suits its burst and span, and `$` that looks past the last line end in Python
    return (dotted, value) in together or value in (1e12, 5e-324, "1s\n")


ROUTES = st.lists(
    st.sampled_from(
        ["v1", "V1", "embed-tokens", "Embed-Tokens", "agent", ".", "..", "*", "%2f", ""]
    )
).map(lambda names: "".join(f"/{name}" for name in names))


class TestSchema:
    def test_is_one(self) -> None:
        """Of draft 7."""
        validator()

    def test_the_file_that_ships_is_what_the_command_prints(self) -> None:
        """Made by `broker config schema > config/schema.json`."""
        done = run("config", "schema")
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == (ROOT / "config" / "schema.json").read_bytes()
        assert json.loads(done.stdout) == json_schema()

    def test_says_of_every_key_what_it_is_for_and_its_default(self) -> None:
        """In the words of the settings classes."""

        def look(table: Mapping[str, Any], kind: type[Struct], path: str) -> None:
            assert list(table["properties"]) == [field.name for field in fields(kind)]
            for field in fields(kind):
                key = table["properties"][field.name]
                assert len(key["description"]) > 10, f"{path}{field.name}"
                inner = key.get("additionalProperties") or key
                bare = schema.bare(field.type)
                if isinstance(bare, type) and issubclass(bare, Struct):
                    look(inner, bare, f"{path}{field.name}.")
                elif not field.required and not schema.is_table(bare):
                    default = schema.encode(field.default)
                    shown = key.get("default")
                    assert field.default is None or str(shown) == default or shown is not None

        look(json_schema(), Settings, "")
        budget = json_schema()["properties"]["issuer"]["properties"]["budget"]["properties"]
        assert (budget["rate"]["default"], budget["per"]["default"]) == (106, "1m")
        assert budget["window"] == {
            "description": budget["window"]["description"],
            "type": "integer",
            "minimum": 1,
            "default": 120,
        }

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
    def test_every_file_that_ships_names_it_and_is_valid(self, path: Path) -> None:
        """By its first line, where language servers look for it."""
        text = path.read_text(encoding="utf-8")
        named = re.match(r"#:schema (\S+)\n", text)
        assert named is not None
        assert (path.parent / named[1]).resolve() == ROOT / "config" / "schema.json"
        assert [error.message for error in validator().iter_errors(tomllib.loads(text))] == []

    def test_every_example_in_the_reference_is_valid(self) -> None:
        """Also what is commented out in it: each secret in one of its forms."""
        text = (ROOT / "config" / "broker.toml").read_text(encoding="utf-8")
        text = re.sub(r"(?m)^#?\w*(secret|encryption_key|password|proxy) = .*\n", "", text)
        text = re.sub(r"(?m)^#keys_file = .*\n", "", text)
        tree = tomllib.loads(re.sub(r"(?m)^#(?=[\w\[\"])", "", text))
        assert [error.message for error in validator().iter_errors(tree)] == []


class TestAgreement:
    @pytest.mark.parametrize(
        ("dotted", "value", "told"), [case for case in WRONG if not beyond_one_key(*case[:2])]
    )
    def test_what_the_loader_refuses_of_one_key_the_schema_refuses(
        self, dotted: str, value: object, told: str
    ) -> None:
        """The same wrong values as the loader's own tests: types, names, choices, bounds."""
        if dotted == "limits.agent.overrides.A B.rate":
            tree: Tree = {"limits": {"agent": {"overrides": {"A B": {"rate": value}}}}}
        else:
            tree = put({}, dotted, value)
        assert not is_good(tree), told

    @pytest.mark.parametrize("dotted", [name for name, _ in keys()])
    def test_unknown_keys_are_refused_at_every_depth(self, dotted: str) -> None:
        """One letter too many."""
        assert not is_good(put({}, f"{dotted}x", 1))

    @pytest.mark.parametrize("dotted", [name for name, _ in keys()])
    def test_any_value_of_any_key(self, dotted: str) -> None:
        """What the loader refuses for a key alone, the schema refuses; drawn from all types.

        The schema is the stricter one: it takes no number in quotes, as a variable holds it.
        """

        @profile(max_examples=60, deadline=None)
        @given(value=VALUES)
        def agree(value: object) -> None:
            base = beside(dotted)
            try:
                alone(dotted, value)
            except ConfigError:
                follows = dotted.startswith(("reuse.", "server.drain", "issuer.budget.", "limits."))
                refused = not is_good(put(base, dotted, value))
                assert refused or (follows and only_together(dotted, value))

        agree()

    @given(route=ROUTES)
    def test_routes_that_are_passed_on(self, route: str) -> None:
        """The same ones: none of them near a mint, none that is read in two ways."""
        try:
            passing.check_route(route)
        except ValueError:
            assert not is_good(put({}, "issuer.upstream.pass_through", [route]))
        else:
            assert is_good(put({}, "issuer.upstream.pass_through", [route]))

    @pytest.mark.parametrize(
        "pair",
        [
            "admin.secret",
            "clients.web.secret",
            "clients.web.next_secret",
            "issuer.local.keys.one.secret",
            "issuer.upstream.api_secret",
            "issuer.upstream.proxy",
            "store.password",
            "store.encryption_key",
        ],
    )
    def test_two_forms_of_a_secret_are_one_too_many(self, pair: str) -> None:
        """As at the start; each alone is good."""
        inline = put({}, pair, "k" * 40)
        is_list = pair.endswith("api_secret")
        file = put({}, f"{pair}_files", ["/x"]) if is_list else put({}, f"{pair}_file", "/x")
        both = put(
            inline, f"{pair}_files" if is_list else f"{pair}_file", ["/x"] if is_list else "/x"
        )
        assert (is_good(inline), is_good(file), is_good(both)) == (True, True, False)


def only_together(dotted: str, value: object) -> bool:
    """Whether the loader refuses this value for what other keys say beside it."""
    try:
        examined = config.examine_tree(put(beside(dotted), dotted, value))
    except (OverflowError, TypeError):
        return False
    kinds = ("must not be", "ages to refill", "rate must not exceed", "the vendor takes", "a year")
    return all(any(kind in str(each) for kind in kinds) for each in examined.problems)


SPANS = st.builds(
    lambda number, unit: f"{number}{unit}",
    st.one_of(
        st.integers(0, 10**16),
        st.sampled_from([0, 1, 9, 10, 60, 61, 366, 999, 1000, 2000, 2001, 3600, 3601, 8784, 8785]),
        st.sampled_from(["0.0", "1.0", "0.5", "59.9", "60.5", "2000.5", "8784.0", "8784.1", "00"]),
    ),
    st.sampled_from(["us", "ms", "s", "m", "h"]),
)

VALUES: st.SearchStrategy[object] = st.one_of(
    st.booleans(),
    st.integers(-(2**33), 2**33),
    st.floats(-(2**53) + 1, 2**53 - 1),  # beyond it a float is no whole number for the loader
    st.sampled_from(["", "x", "*", "a b", "A1", "/x", "unix:/x", "[::1]:0", "h:65536", "h:65535"]),
    st.sampled_from(["12", "12s", "1 s", "s", "-1s", "1d", "auto", "local", "upstream", "debug"]),
    st.sampled_from(["http://127.0.0.1:1", "https://x", "ftp://x", "memory://", "valkey://h"]),
    st.lists(st.sampled_from(["", "*", "a b", "A1", "10.0.0.1", "10.0.0.0/8", "::1", "1.2.3"])),
    st.dictionaries(st.sampled_from(["a", "secret", "rate"]), st.integers(), max_size=2),
    SPANS,
)


class TestSpans:
    """Bounds of spans of time are regular expressions, checked against the loader's arithmetic."""

    @pytest.mark.parametrize(
        ("dotted", "bounds"),
        [
            ("server.keep_alive", validate.KEEP_ALIVE_BOUNDS),
            ("store.timeout", validate.STORE_TIMEOUT_BOUNDS),
            ("server.drain", None),
            ("server.deadline", None),
        ],
    )
    def test_are_those_of_the_loader(self, dotted: str, bounds: Any) -> None:
        """But for a part of a unit that is longer than the least span, and what is rounded."""

        @profile(max_examples=400, deadline=None)
        @given(text=SPANS)
        def same(text: str) -> None:
            least, most = (0, MAX_DURATION) if bounds is None else (one.us for one in bounds)
            least = 1 if dotted == "server.deadline" else least
            try:
                us = schema.duration(text).us
            except ValueError:
                us = MAX_DURATION + 1
            good = is_good(put({}, dotted, text))
            fraction_of_long_unit = "." in text and text[-1] in "mh" and 0 < us < least
            is_rounded = "." in text and us == most
            assert good == (least <= us <= most) or fraction_of_long_unit or is_rounded

        @given(beside=st.integers(-(10**6), 10**6), unit=st.sampled_from(list(schema.UNITS)))
        def a_year_is_the_most(beside: int, unit: str) -> None:
            size = schema.UNITS[unit]
            number = max(MAX_DURATION // size + beside, 0)
            assert is_good(put({}, "server.drain", f"{number}{unit}")) == (
                number * size <= MAX_DURATION
            )

        same()
        a_year_is_the_most()

    @given(bound=st.integers(0, 10**6), number=st.integers(0, 2 * 10**6), zeros=st.integers(0, 2))
    def test_numbers_are_compared_by_their_digits(
        self, bound: int, number: int, zeros: int
    ) -> None:
        """For every bound, with leading zeros."""
        text = "0" * zeros + str(number)
        assert bool(re.fullmatch(up_to(bound), text)) == (number <= bound)
        assert bool(re.fullmatch(from_(bound), text)) == (number >= bound)
