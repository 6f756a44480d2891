"""One panel as Grafana is told of it: queries, unit, thresholds, looks."""

from typing import Any

from shapes import Heat, Panel, Stat, States

SOURCE = {"type": "prometheus", "uid": "${datasource}"}

EVERY = 'job="$job", instance=~"$instance"'
"""What each query is about; the pages write it as @."""

Json = dict[str, Any]


def panel_json(panel: Panel) -> Json:
    """Return all of a panel but its id and its place."""
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
