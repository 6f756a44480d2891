"""The dashboards name only what the broker reports, and explain themselves."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker import scrape
from broker.board import Board
from broker.metrics import Metrics

FOLDER = Path(__file__).parents[1] / "grafana"

DASHBOARDS = sorted(FOLDER.glob("*.json"))


def panels_of(dashboard: Path) -> Iterator[dict[str, Any]]:
    """Yield every panel that shows something, those of collapsed rows included."""
    for panel in json.loads(dashboard.read_text(encoding="utf-8"))["panels"]:
        yield from panel.get("panels", ())
        if panel["type"] != "row":
            yield panel


def reported_names() -> set[str]:
    """Every name that a query can ask for, with all parts of the broker in place."""
    sheet = Metrics("upstream", budget=True, shared_store=True, workers=2).sheet
    registry = scrape.registry(sheet.families, Board([sheet.cells]), lambda: None)
    return {sample.name for family in registry.collect() for sample in family.samples}


def test_there_is_a_dashboard() -> None:
    """An empty folder would make the other tests here pass."""
    assert DASHBOARDS


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_metric_of_a_dashboard_is_reported(dashboard: Path) -> None:
    """Renaming a metric turns this red: a panel without data looks like a quiet night."""
    named = set(
        re.findall(r"\b(?:broker|process|python)_[a-z_]+", dashboard.read_text(encoding="utf-8"))
    )
    assert named
    assert named - reported_names() == set()


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_says_what_it_shows_and_in_which_unit(dashboard: Path) -> None:
    """At three in the morning nobody reads source code to understand a curve."""
    wanting = [
        panel["title"]
        for panel in panels_of(dashboard)
        if not panel.get("description") or not panel["fieldConfig"]["defaults"].get("unit")
    ]
    assert wanting == []


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_follows_the_variables(dashboard: Path) -> None:
    """Rates use the interval that Grafana derives from the scrape's; data source, job, instance."""
    raw = json.loads(dashboard.read_text(encoding="utf-8"))
    assert {variable["name"] for variable in raw["templating"]["list"]} >= {
        "datasource",
        "job",
        "instance",
    }
    for panel in panels_of(dashboard):
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            expr = target["expr"]
            selectors = re.findall(r"\{([^}]*)\}", expr)
            assert selectors, expr
            for selector in selectors:
                assert 'job="$job", instance=~"$instance"' in selector, expr
            assert re.findall(r"rate\([^[]*\[(.*?)\]", expr) == ["$__rate_interval"] * expr.count(
                "rate("
            )


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_places_of_their_own(dashboard: Path) -> None:
    """No two panels overlap, none leaves the 24 columns, and ids are unique."""
    raw = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in raw}) == len(raw)
    taken: set[tuple[int, int]] = set()
    for panel in raw:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
