"""Dashboards, rules and runbook name only what the broker reports, and explain themselves."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import below, section

from broker.telemetry import exposition
from broker.telemetry.cells import SharedCells
from broker.telemetry.metrics import Metrics
from broker.web.pass_through import MAX_PASSED

ROOT = Path(__file__).parents[1]

DASHBOARDS = sorted((ROOT / "grafana" / "dashboards").glob("*.json"))

RULES = yaml.safe_load((ROOT / "config" / "prometheus" / "rules.yml").read_text(encoding="utf-8"))

RUNBOOK = "When an alert fires"
"""The heading under which every alert has its own."""

NAME = re.compile(r"(?<![\w:])(?:broker|process|python)_[a-z_]+[a-z](?![\w:])")
"""A metric in a query, but not one that a rule records."""

SELECTOR = re.compile(r"([\w:]+)\{([^}]*)\}")

BURN_WINDOWS = {"5m", "30m", "1h", "6h"}
"""What an objective is measured over, whatever the scrape interval."""


def panels_of(dashboard: Path) -> Iterator[dict[str, Any]]:
    """Yield every panel that shows something."""
    for panel in json.loads(dashboard.read_text(encoding="utf-8"))["panels"]:
        if panel["type"] != "row":
            yield panel


def panels_by_link() -> dict[str, dict[str, Any]]:
    """Every panel by the link that leads to it."""
    return {
        f"/d/{json.loads(path.read_text(encoding='utf-8'))['uid']}?viewPanel={panel['id']}": panel
        for path in DASHBOARDS
        for panel in panels_of(path)
    }


def rules(kind: str) -> dict[str, dict[str, Any]]:
    """Every rule of a kind ("alert" or "record"), by its name."""
    return {
        rule[kind]: rule for group in RULES["groups"] for rule in group["rules"] if kind in rule
    }


ALERTS = rules("alert")

RECORDED = rules("record")


def queries() -> list[str]:
    """Every query there is: of panels, of rules."""
    shown = [
        target["expr"]
        for path in DASHBOARDS
        for panel in panels_of(path)
        for target in panel["targets"]
    ]
    return shown + [rule["expr"] for rule in (*ALERTS.values(), *RECORDED.values())]


def reported() -> dict[str, list[dict[str, str]]]:
    """Every series that a query can ask for, with all parts of the broker in place."""
    layout = Metrics(
        "upstream", budget=True, shared_store=True, state_file=True, pass_through=True, workers=2
    ).layout
    registry = exposition.registry(layout.families, SharedCells([layout.cells]), lambda: None)
    series: dict[str, list[dict[str, str]]] = {}
    for family in registry.collect():
        for sample in family.samples:
            series.setdefault(sample.name, []).append(sample.labels)
    return series


def test_there_are_two_dashboards_and_many_alerts() -> None:
    """Nothing to read would make the other tests here pass."""
    assert [path.stem for path in DASHBOARDS] == ["broker", "vendor"]
    assert len(ALERTS) >= 10
    assert len(RECORDED) >= 5


def test_dashboards_are_what_the_script_writes() -> None:
    """A change in the JSON alone would be lost with the next one in the script."""
    command = [sys.executable, str(ROOT / "grafana" / "make.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_metric_that_is_asked_for_is_reported() -> None:
    """Renaming a metric turns this red: a panel without data looks like a quiet night."""
    named = {name for query in queries() for name in NAME.findall(query)}
    assert len(named) > 30
    assert named - reported().keys() == set()


def test_every_reported_metric_is_on_a_dashboard() -> None:
    """A new metric that nobody sees turns this red."""
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for path in DASHBOARDS
        for name in NAME.findall(path.read_text(encoding="utf-8"))
    }
    ours = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in reported()
        if name.startswith("broker_")
    }
    assert ours - shown == set()


def test_every_label_that_is_asked_for_exists() -> None:
    """A misspelt outcome selects nothing, and an alert on nothing never fires."""
    series = reported()
    asked = [
        (name, matcher)
        for query in queries()
        for name, inner in SELECTOR.findall(query)
        for matcher in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', inner)
    ]
    ours = [(n, m) for n, m in asked if n in series and m[0] not in ("job", "instance")]
    assert len(ours) > 20
    for name, (label, operator, value) in ours:
        words = value.split("|") if operator == "=~" else [value]
        known = {labels.get(label) for labels in series[name]}
        assert set(words) <= known, (name, label, value)


def test_every_label_that_is_summed_by_exists() -> None:
    """A sum by a label that is not there is one curve where there should be several."""
    series = reported()
    for query in queries():
        names = [name for name in NAME.findall(query) if name in series]
        labels = {label for name in names for one in series[name] for label in one}
        for inner in re.findall(r"sum by \(([^)]*)\)", query):
            wanted = set(inner.split(", ")) - {"job", "instance"}
            assert not names or wanted <= labels, query


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_says_what_it_shows_and_in_which_unit(dashboard: Path) -> None:
    """At three in the morning nobody reads source code to understand a curve."""
    wanting = [
        panel["title"]
        for panel in panels_of(dashboard)
        if len(panel.get("description", "")) < 20
        or not panel["fieldConfig"]["defaults"].get("unit")
    ]
    assert wanting == []


def test_the_panel_of_what_is_passed_on_knows_the_bound() -> None:
    """Whoever looks at it wants to know when others are refused."""
    metric = "broker_pass_through_in_flight"
    shown = [
        panel["description"]
        for dashboard in DASHBOARDS
        for panel in panels_of(dashboard)
        if any(metric in target["expr"] for target in panel["targets"])
    ]
    assert len(shown) == 1
    assert f"of the {MAX_PASSED} places" in shown[0]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_follows_the_variables(dashboard: Path) -> None:
    """Rates use the interval that Grafana derives from the scrape's; data source, job, instance."""
    raw = json.loads(dashboard.read_text(encoding="utf-8"))
    names = {variable["name"] for variable in raw["templating"]["list"]}
    assert names == {"datasource", "job", "instance"}
    for panel in panels_of(dashboard):
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            expr = target["expr"]
            selectors = SELECTOR.findall(expr)
            assert selectors, expr
            for name, selector in selectors:
                if name != "ALERTS":
                    assert 'job="$job", instance=~"$instance"' in selector, expr
            windows = set(re.findall(r"\[(.*?)\]", expr))
            fixed = BURN_WINDOWS if "Burn rate" in panel["title"] or "increase(" in expr else set()
            assert windows <= {"$__rate_interval"} | fixed, expr


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


@pytest.mark.parametrize("name", ALERTS)
class TestAlert:
    def test_says_what_happened_and_how_bad_it_is(self, name: str) -> None:
        """Summary and description for whoever is woken; severity for who that is."""
        alert = ALERTS[name]
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert len(alert["annotations"]["summary"]) > 15
        assert len(alert["annotations"]["description"]) > 60

    def test_links_to_a_panel_that_shows_it(self, name: str) -> None:
        """The panel's queries and the alert's share a metric; the panel names the alert."""
        panel = panels_by_link()[ALERTS[name]["annotations"]["panel"]]
        expr = ALERTS[name]["expr"]
        for record, rule in RECORDED.items():
            expr = expr.replace(record, rule["expr"])
        shown = " ".join(target["expr"] for target in panel["targets"])
        metric = re.compile(rf"{NAME.pattern}|\bup\b")
        assert set(metric.findall(expr)) & set(metric.findall(shown))
        assert name in panel["description"]

    def test_draws_its_line_on_the_panel(self, name: str) -> None:
        """Where a panel has an alarm, the alert fires there."""
        panel = panels_by_link()[ALERTS[name]["annotations"]["panel"]]
        for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1:]:
            line = rf"(>|==) {re.escape(str(step['value']))}\b"
            assert re.search(line, ALERTS[name]["expr"])

    def test_has_its_section_in_the_runbook(self, name: str) -> None:
        """What to do stands there under the alert's name, and the alert links to it."""
        assert section(name).text.strip()
        page = section(RUNBOOK).page
        assert ALERTS[name]["annotations"]["runbook"] == f"{page}#{name.lower()}"


def test_the_runbook_has_no_alert_that_does_not_exist() -> None:
    """An alert that was taken out takes its section with it."""
    assert {section.heading for section in below(RUNBOOK)} == ALERTS.keys()
