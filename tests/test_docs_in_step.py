"""What is written for operators says what the code does: settings, metrics, commands, examples."""

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from documents import ROOT, SECTIONS, TEXT
from msgspec import NODEFAULT, Struct
from msgspec.structs import FieldInfo, fields
from processes import environment

from broker.cli.main import _parser
from broker.config import load as config
from broker.config import schema
from broker.config.settings import Settings
from broker.telemetry.cells import Kind
from broker.telemetry.metrics import Metrics

REFERENCE = ROOT / "config" / "broker.toml"
SHIPPED = sorted((ROOT / "config").glob("*.toml"))

SWITCHED_OFF = re.compile(r"^#(?=[\w\[\"])", re.MULTILINE)
"""What is not set by default is commented out without a blank; prose has one."""

TWO_FORMS = re.compile(r"^#?(secret|api_secret|encryption_key) = .*\n", re.MULTILINE)
"""Secrets that are there in both forms, which a real file must not have."""


def reference(*, everything: bool) -> dict[str, Any]:
    """Return the tree of broker.toml, with what is commented out in it or without."""
    text = REFERENCE.read_text(encoding="utf-8")
    return tomllib.loads(SWITCHED_OFF.sub("", text) if everything else text)


def told(tree: Mapping[str, Any], kind: Any = Settings, path: str = "") -> Iterator[str]:
    """Every key of a tree by its path; entries of free tables under `*`."""
    kind = schema.bare(kind)
    for name, value in tree.items():
        free = get_origin(kind) in (dict, Mapping)
        here = f"{path}{'*' if free else name}"
        inner = get_args(kind)[1] if free else schema.fields_of(kind).get(name)
        if isinstance(value, Mapping) and inner is not None:
            yield from told(value, inner, f"{here}.")
        else:
            yield here


def settings(kind: Any = Settings, path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting there is by its path; entries of free tables under `*`."""
    for field in fields(kind):
        bare = schema.bare(field.type)
        if get_origin(bare) in (dict, Mapping):
            yield from settings(get_args(bare)[1], f"{path}{field.name}.*.")
        elif isinstance(bare, type) and issubclass(bare, Struct):
            yield from settings(bare, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", field


def value_at(tree: Mapping[str, Any], path: str) -> object:
    """Return what a tree says at a path, None where it says nothing."""
    node: Any = tree
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


class TestReferenceConfiguration:
    def test_has_every_setting_and_nothing_else(self) -> None:
        """Each key of the tree once, set or commented out; no key that does not exist."""
        there = set(told(reference(everything=True)))
        assert there == {path for path, _ in settings()}

    def test_sets_every_default_to_itself(self) -> None:
        """Uncommented is what has a default, and its value is that default."""
        active = reference(everything=False)
        for path, field in settings():
            if "*" in path:
                continue
            default = None if field.default is NODEFAULT else field.default
            if path.startswith(("issuer.budget.", "limits.client.")):
                assert value_at(active, path) is None, f"{path} is on, but not by default"
                active_tree = reference(everything=True)
            else:
                active_tree = active
            said = value_at(active_tree, path)
            if default is None:
                assert value_at(active, path) is None, f"{path} is set, but not by default"
                assert value_at(reference(everything=True), path) is not None, path
            else:
                assert said is not None, f"{path} is not there"
                shown = schema.encode(default) if not isinstance(said, int | float) else default
                plain = list(default) if isinstance(default, tuple) else default
                same = said in (plain, shown) or schema.duration(said) == default
                assert same, f"{path} is {said!r}, its default {default!r}"

    def test_means_the_defaults(self) -> None:
        """Loaded, it differs from the built-in settings by its example client and key alone."""
        tree = reference(everything=False)
        assert set(tree.pop("clients")) == {"web"}
        assert set(tree["issuer"]["local"].pop("keys")) == {"2026-11"}
        assert config.from_tree(tree) == Settings()

    def test_is_still_good_with_everything_switched_on(self) -> None:
        """Examples that are commented out have been checked, too."""
        text = REFERENCE.read_text(encoding="utf-8")
        on = SWITCHED_OFF.sub("", TWO_FORMS.sub("", text))
        settings = config.from_tree(tomllib.loads(on))
        assert settings.issuer.budget is not None
        assert settings.limits.client is not None
        assert list(settings.limits.agent.overrides) == ["A78WKV4515"]

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
    def test_gives_a_reason_for_every_key(self, path: Path) -> None:
        """Beside the key or right above it; examples that are switched off may share one."""
        key = re.compile(r"#?[\w\"-]+ = ")
        bare, keys, reasoned = [], 0, False
        for line in path.read_text(encoding="utf-8").splitlines():
            if not key.match(line):
                reasoned = line.startswith("# ")
                continue
            keys += 1
            if not (reasoned or "  #" in line):
                bare.append(line)
            reasoned = reasoned and line.startswith("#")
        assert keys >= 10
        assert bare == []


class TestShippedConfigurations:
    def test_are_the_ones_that_are_promised(self) -> None:
        """A reference, one for a first look, one for load tests."""
        assert {"broker.toml", "dev.toml", "load.toml"} <= {path.name for path in SHIPPED}

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
    def test_pass_the_check_in_a_fresh_clone(self, path: Path, tmp_path: Path) -> None:
        """No secret file, no variable, another folder: notes about files, and nothing else."""
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "broker", "check", "--config", copy.name],
            capture_output=True,
            cwd=tmp_path,
            env=environment(),
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, b"configuration ok\n"), done.stderr
        notes = done.stderr.decode().splitlines()
        assert [note for note in notes if not re.match(r"note: .* is not here; ", note)] == []


def commands(parser: argparse.ArgumentParser, path: str = "broker") -> Iterator[str]:
    """Every command of the command line, in full."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not inner:
        yield path
    for action in inner:
        for name, child in action.choices.items():
            yield from commands(child, f"{path} {name}")


def metric_names() -> set[str]:
    """Every metric by the name that Prometheus stores: counters end in _total."""
    counted = (Kind.COUNTER, Kind.COUNT)
    return {
        f"{family.name}_total" if family.kind in counted else family.name
        for family in Metrics("upstream").layout.families
        if family.kind is not Kind.PRIVATE
    }


def table_cells(text: str) -> str:
    """Return the rows of a document's tables."""
    return "\n".join(line for line in text.splitlines() if line.startswith("|"))


def absent(names: set[str], text: str) -> list[str]:
    """Return the names that a text does not have as whole words."""
    return sorted(n for n in names if not re.search(rf"(?<![\w]){re.escape(n)}(?![\w])", text))


class TestPages:
    def test_have_every_metric_in_one_table(self) -> None:
        """Under the name that a query uses."""
        (metrics,) = [section.text for section in SECTIONS if section.heading == "Metrics"]
        assert absent(metric_names(), table_cells(metrics)) == []

    def test_have_every_command(self) -> None:
        """As one would type it."""
        assert absent(set(commands(_parser())), TEXT) == []

    def test_name_no_metric_that_is_not_there(self) -> None:
        """A query copied from a page finds something."""
        known = metric_names()
        series = re.compile(r"(_bucket|_count|_sum)$")
        named = {series.sub("", name) for name in re.findall(r"\bbroker_[a-z_]+[a-z]\b", TEXT)}
        hosts = {"broker_web", "broker_api_secret"}
        assert sorted(named - known - hosts) == []

    def test_check_sees_what_is_missing(self) -> None:
        """These tests can fail: names are found, in tables only, and as whole words."""
        assert {
            "broker_requests_total",
            "broker_tokens_cached",
            "broker_build_info",
        } <= metric_names()
        assert {"broker serve", "broker config show", "broker keys generate"} <= set(
            commands(_parser())
        )
        text = "broker_a\n| `broker_b_total` | x |\n| broker_cc |"
        names = {"broker_a", "broker_b_total", "broker_b", "broker_c"}
        assert absent(names, table_cells(text)) == ["broker_a", "broker_b", "broker_c"]
