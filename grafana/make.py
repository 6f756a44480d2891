"""Write the dashboards.

    python grafana/make.py [--check]

What is shown stands in `page_broker.py` and `page_vendor.py`, a few lines a panel; this file and
`panel_json.py` know what Grafana wants to be told about each.  The result, `dashboards/*.json`, is
in the repository, so that importing it takes no script; tests/test_dashboards.py holds it to this
source and to the metrics, and a test with parts has Grafana's own types (`types/`) read it.

Why not Grafana's SDK for Python: what it adds is types, and those of `@grafana/schema` are checked
all the same, on the JSON that ships.  Why not JSON by hand: a panel takes 80 lines of it, of which
five say something.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from page_broker import BROKER
from page_vendor import VENDOR
from panel_json import EVERY, SOURCE, Json, panel_json
from shapes import Dashboard, Row

FOLDER = Path(__file__).parent / "dashboards"

COLUMNS = 24
"""Of Grafana's grid."""


def main() -> int:
    """Write every dashboard; with `--check` only say which ones are not up to date."""
    stale = []
    for dashboard in (BROKER, VENDOR):
        path, text = FOLDER / f"{dashboard.name}.json", text_of(dashboard)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    for name in stale:
        print(f"{name} is not what grafana/make.py writes: run it", file=sys.stderr)
    return 1 if stale else 0


def text_of(dashboard: Dashboard) -> str:
    """Return a dashboard as Grafana imports it."""
    return json.dumps(_dashboard(dashboard), indent=1) + "\n"


def _dashboard(dashboard: Dashboard) -> Json:
    return {
        "annotations": {"list": [_alerts(), _restarts()]},
        "description": dashboard.description,
        "editable": True,
        "graphTooltip": 1,  # one cross-hair for all panels
        "links": [_siblings()],
        "panels": list(_placed(dashboard.rows)),
        "refresh": "30s",
        "schemaVersion": 41,
        "tags": ["embed-token-broker"],
        "templating": {"list": [_data_source(), *_choices()]},
        "time": {"from": "now-3h", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "title": dashboard.title,
        "uid": dashboard.uid,
        "version": 1,
    }


def _alerts() -> Json:
    """Alerts that fire, as regions on every panel."""
    return _annotation(
        "Alerts",
        "red",
        'ALERTS{alertname=~"Broker.*", alertstate="firing", job=~"$job|"}',
        "{{alertname}}",
    )


def _restarts() -> Json:
    return _annotation(
        "Restarts",
        "blue",
        f'resets(broker_requests_total{{{EVERY}, outcome="minted"}}[$__rate_interval]) > 0',
        "restarted: {{instance}}",
    )


def _annotation(name: str, colour: str, expr: str, title: str) -> Json:
    return {
        "datasource": SOURCE,
        "enable": True,
        "iconColor": colour,
        "name": name,
        "target": {"editorMode": "code", "expr": expr, "refId": "Anno"},
        "titleFormat": title,
    }


def _siblings() -> Json:
    return {
        "asDropdown": False,
        "icon": "dashboard",
        "includeVars": True,
        "keepTime": True,
        "tags": ["embed-token-broker"],
        "targetBlank": False,
        "title": "",
        "tooltip": "",
        "type": "dashboards",
        "url": "",
    }


def _data_source() -> Json:
    return {
        "includeAll": False,
        "label": "Data source",
        "multi": False,
        "name": "datasource",
        "options": [],
        "query": "prometheus",
        "refresh": 1,
        "regex": "",
        "type": "datasource",
    }


def _choices() -> Iterator[Json]:
    yield _choice("job", "Job", "label_values(broker_build_info, job)")
    yield {
        **_choice("instance", "Instance", 'label_values(broker_build_info{job="$job"}, instance)'),
        "allValue": ".*",
        "includeAll": True,
        "multi": True,
    }


def _choice(name: str, label: str, query: str) -> Json:
    return {
        "datasource": SOURCE,
        "includeAll": False,
        "label": label,
        "multi": False,
        "name": name,
        "options": [],
        "query": {
            "qryType": 1,
            "query": query,
            "refId": "PrometheusVariableQueryEditor-VariableQuery",
        },
        "refresh": 2,
        "regex": "",
        "sort": 1,
        "type": "query",
    }


def _placed(rows: Sequence[Row]) -> Iterator[Json]:
    """Give each panel its place: rows from top to bottom, panels side by side, wrapping."""
    y = number = 0
    for row in rows:
        number += 1
        yield {
            "collapsed": False,
            "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
            "id": number,
            "panels": [],
            "title": row.title,
            "type": "row",
        }
        y, x = y + 1, 0
        width = COLUMNS // row.across
        for panel in row.panels:
            if x + width > COLUMNS:
                x, y = 0, y + row.height
            number += 1
            place = {"h": row.height, "w": width, "x": x, "y": y}
            yield {"gridPos": place, "id": number, **panel_json(panel)}
            x += width
        y += row.height


if __name__ == "__main__":
    sys.exit(main())
