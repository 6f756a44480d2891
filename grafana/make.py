"""Write the dashboards.

    python grafana/make.py [--check]

What is shown stands in `page_broker.py` and `page_vendor.py`, a few lines a panel; this file knows
what Grafana wants to be told about each.  The result, `dashboards/*.json`, is in the repository, so
that importing it takes no script; tests/test_dashboards.py holds it to this source and to the
metrics, and a test with parts has Grafana's own types (`types/`) read it.

Why not Grafana's SDK for Python: what it adds is types, and those of `@grafana/schema` are checked
all the same, on the JSON that ships.  Why not JSON by hand: a panel takes 80 lines of it, of which
five say something.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from page_broker import BROKER
from page_vendor import VENDOR
from shapes import Dashboard, Heat, Panel, Row, Stat, States

FOLDER = Path(__file__).parent / "dashboards"

COLUMNS = 24
"""Of Grafana's grid."""

SOURCE = {"type": "prometheus", "uid": "${datasource}"}

EVERY = 'job="$job", instance=~"$instance"'
"""What each query is about; the pages write it as @."""

Json = dict[str, Any]


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
            yield {"gridPos": place, "id": number, **_panel(panel)}
            x += width
        y += row.height


def _panel(panel: Panel) -> Json:
    common = {
        "datasource": SOURCE,
        "description": panel.description,
        "targets": [_target(n, panel, *query) for n, query in enumerate(panel.queries.items())],
        "title": panel.title,
    }
    match panel:
        case Stat():
            return {**common, **_stat(panel)}
        case States():
            return {**common, **_states(panel)}
        case Heat():
            return {**common, **_heat(panel)}
        case _:
            return {**common, **_curves(panel)}


def _target(number: int, panel: Panel, legend: str, expr: str) -> Json:
    return {
        "datasource": SOURCE,
        "editorMode": "code",
        "expr": expr.replace("@", EVERY).replace("[~]", "[$__rate_interval]"),
        "format": "heatmap" if isinstance(panel, Heat) else "time_series",
        "legendFormat": legend,
        "range": True,
        "refId": chr(ord("A") + number),
    }


def _thresholds(panel: Panel, calm: str) -> Json:
    steps: list[Json] = [{"color": calm, "value": None}]
    if panel.alarm is not None:
        steps.append({"color": "red", "value": panel.alarm})
    return {"mode": "absolute", "steps": steps}


def _stat(panel: Stat) -> Json:
    defaults = {
        "color": {"mode": "thresholds"},
        "noValue": panel.nothing,
        "thresholds": _thresholds(panel, "green" if panel.alarm is not None else "text"),
        "unit": panel.unit,
    }
    return {
        "type": "stat",
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "colorMode": "value",
            "graphMode": "area",
            "justifyMode": "auto",
            "orientation": "auto",
            "percentChangeColorMode": "standard",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "showPercentChange": False,
            "textMode": panel.text,
            "wideLayout": True,
        },
    }


def _curves(panel: Panel) -> Json:
    custom: Json = {
        "drawStyle": "line",
        "fillOpacity": 30 if panel.stacked else 5,
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"group": "A", "mode": "normal" if panel.stacked else "none"},
        "thresholdsStyle": {"mode": "off" if panel.alarm is None else "dashed"},
    }
    defaults = {
        "color": {"mode": "palette-classic"},
        "custom": custom,
        "min": 0,
        "thresholds": _thresholds(panel, "transparent"),
        "unit": panel.unit,
    }
    return {
        "type": "timeseries",
        "fieldConfig": {
            "defaults": defaults,
            "overrides": [_coloured(*pair) for pair in panel.colours.items()],
        },
        "options": {
            "legend": {
                "calcs": ["lastNotNull", "max"],
                "displayMode": "table",
                "placement": "bottom",
                "showLegend": True,
            },
            "tooltip": {"hideZeros": False, "mode": "multi", "sort": "desc"},
        },
    }


def _coloured(name: str, colour: str) -> Json:
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [{"id": "color", "value": {"fixedColor": colour, "mode": "fixed"}}],
    }


def _states(panel: States) -> Json:
    words = {
        value: {"color": colour, "index": n, "text": text}
        for n, (value, (text, colour)) in enumerate(panel.words.items())
    }
    defaults = {
        "color": {"mode": "thresholds"},
        "custom": {"fillOpacity": 70, "lineWidth": 0},
        "mappings": [{"options": words, "type": "value"}],
        "thresholds": _thresholds(panel, "green"),
        "unit": panel.unit,
    }
    return {
        "type": "state-timeline",
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "alignValue": "left",
            "legend": {
                "calcs": [],
                "displayMode": "list",
                "placement": "bottom",
                "showLegend": False,
            },
            "mergeValues": True,
            "rowHeight": 0.8,
            "showValue": "auto",
            "tooltip": {"hideZeros": False, "mode": "single", "sort": "none"},
        },
    }


def _heat(panel: Heat) -> Json:
    custom = {"scaleDistribution": {"type": "linear"}}
    return {
        "type": "heatmap",
        "fieldConfig": {"defaults": {"custom": custom, "unit": panel.unit}, "overrides": []},
        "options": {
            "calculate": False,
            "cellGap": 1,
            "color": {
                "exponent": 0.5,
                "fill": "dark-orange",
                "mode": "scheme",
                "reverse": False,
                "scale": "exponential",
                "scheme": "Spectral",
                "steps": 64,
            },
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "tooltip": {"mode": "single", "showColorScale": False, "yHistogram": False},
            "yAxis": {"axisPlacement": "left", "reverse": False, "unit": panel.unit},
        },
    }


if __name__ == "__main__":
    sys.exit(main())
