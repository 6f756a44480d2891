"""A relay is seen through: Prometheus, its rules, the dashboards and the pager, in bad weather."""

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import plain
import plots
import pytest
from actors import Pager
from monitoring import monitoring, samples
from processes import Broker, good, put
from running import output_of, until
from weather import ROOT, SHORT, Watched, watched

from broker.telemetry.metrics import REQUEST_BUCKETS

pytestmark = pytest.mark.parts

DASHBOARDS = sorted((ROOT / "grafana" / "dashboards").glob("*.json"))

JOB = "embed-token-broker"

OF_THE_FILE = "broker_state_file_"
"""How the metrics of a state file begin."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Let it blow once, for all tests of this file."""
    with watched(tmp_path_factory.mktemp("weather"), SHORT) as run:
        yield run


def reported(run: Watched, name: str) -> dict[str, float]:
    """Return the values of one metric by its only label, as the broker reports them now."""
    return samples(plain.get(f"{run.broker.admin_url}/metrics").text, name)


def quantile(values: Sequence[float], q: float) -> float:
    """Return the value that a share `q` of the others does not exceed."""
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


def filled(query: str) -> str:
    """Put in what Grafana puts in, for one scrape a second."""
    for variable, value in {
        "$__rate_interval": "5s",
        "$job": JOB,
        "$instance": ".*",
    }.items():
        query = query.replace(variable, value)
    assert "$" not in query
    return query


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """Return the panels of a dashboard that ask something."""
    everything = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
    return [panel for panel in everything if panel.get("targets")]


def test_the_crowd_was_answered(run: Watched) -> None:
    """What the other tests rest on: the run was as loaded and as mixed as it was meant to be."""
    counted = run.counted
    assert counted["unanswered"] == counted["dropped"] == 0
    assert sum(counted["requests"].values()) == counted["asked"] > 4000
    assert all(counted["requests"].values()), counted
    seen = {name for name, count in counted["rejections"].items() if count}
    assert seen == {"fingerprint", "fingerprint_mints", "agent", "auth", "budget"}


def test_M3_counters_equal_the_client_s_counts(run: Watched) -> None:
    """Exactly, after timeouts, retries, a reload and five kinds of refusal; Prometheus agrees."""
    assert reported(run, "broker_requests_total") == run.counted["requests"]
    assert reported(run, "broker_rejections_total") == run.counted["rejections"]
    for outcome, count in run.counted["requests"].items():
        query = f'broker_requests_total{{outcome="{outcome}"}}'
        assert run.prometheus.values(query, at=run.ended) == [count]

    def all_told() -> bool:  # the last renewal in the background may be under way
        calls = sum(reported(run, "broker_upstream_requests_total").values())
        return calls == run.vendor.asked

    until(all_told, "every call to the vendor to be counted")


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_of_every_panel_returns_data(run: Watched, dashboard: Path) -> None:
    """Each one has had a finite value in the run; printed with its last one.

    Of the state file, which a broker on a shared store has not, below.
    """
    silent = []
    print()
    for panel in panels(dashboard):
        for target in panel["targets"]:
            curves = run.prometheus.curves(filled(target["expr"]), run.began, run.ended)
            print(f"{dashboard.stem} | {panel['title']} | {target['expr']}")
            for name, points in sorted(curves.items())[:12]:
                largest = max(value for _, value in points)
                print(f"    {name or '-'}: {points[-1][1]:.4g}, at most {largest:.4g}")
            if not curves and OF_THE_FILE not in target["expr"]:
                silent.append((panel["title"], target["expr"]))
    assert silent == []


def test_every_query_about_the_state_file_returns_data(tmp_path: Path) -> None:
    """On a broker that has one."""
    tree = put(good(tmp_path), "store.url", f"sqlite://{tmp_path / 'state.db'}")
    asked = [
        filled(target["expr"])
        for dashboard in DASHBOARDS
        for panel in panels(dashboard)
        for target in panel["targets"]
        if OF_THE_FILE in target["expr"]
    ]
    assert asked
    with (
        Broker.configured(tmp_path, tree) as started,
        Pager().listening() as pager,
        monitoring(tmp_path, started.admin_url, pager.url) as prometheus,
    ):
        for query in asked:
            until(partial(prometheus.values, query), query)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_variables_and_annotations_find_something(run: Watched, dashboard: Path) -> None:
    """Job and instance are offered; the alert that fired is a region on every panel."""
    raw = json.loads(dashboard.read_text(encoding="utf-8"))
    offered = {}
    for variable in raw["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert found is not None
            selector = found[1].replace("$job", JOB)
            offered[variable["name"]] = run.prometheus.label_values(found[2], selector)
    instance = run.broker.admin_url.removeprefix("http://")
    assert offered == {"job": [JOB], "instance": [instance]}
    alerts, restarts = (
        run.prometheus.curves(filled(one["target"]["expr"]), run.began, run.ended)
        for one in raw["annotations"]["list"]
    )
    assert any("BrokerCredentialBreakerOpen" in name for name in alerts)
    assert restarts == {}


def test_mint_quantiles_are_the_injected_ones(run: Watched) -> None:
    """Within one bucket, while the vendor's latency was all there was to a mint."""
    fair = run.forecast.fair
    begins, ends = run.moment(fair.begins), run.moment(fair.ends)
    injected = [took for at, took in run.vendor.drawn if begins < at + took < ends]
    assert len(injected) > 50
    rates = (
        'sum by (le) (increase(broker_mint_duration_seconds_bucket{outcome="minted"}'
        f"[{fair.ends - fair.begins:.0f}s]))"
    )
    print()
    for q in (0.5, 0.9, 0.99):
        (told,) = run.prometheus.values(f"histogram_quantile({q}, {rates})", at=ends)
        true = quantile(injected, q)
        apart = bisect_left(REQUEST_BUCKETS, told) - bisect_left(REQUEST_BUCKETS, true)
        print(f"p{q * 100:g}: injected {true:.4f} s, told {told:.4f} s, {apart:+d} buckets")
        assert abs(apart) <= 1


def test_an_alert_wakes_somebody_and_tells_when_it_is_over(run: Watched) -> None:
    """The vendor refuses the key: firing; a new key is in the file: resolved, over a webhook."""
    until(lambda: ("BrokerCredentialBreakerOpen", "resolved") in run.pager.heard, "the all-clear")
    heard = [status for name, status in run.pager.heard if name == "BrokerCredentialBreakerOpen"]
    assert heard[0] == "firing"
    assert heard[-1] == "resolved"


def test_the_readme_s_plots_can_be_drawn_of_it(run: Watched, tmp_path: Path) -> None:
    """Both, with something to see in every chart; small enough for a page."""
    plots.write(run, tmp_path)
    for name in ("visitors", "vendor"):
        text = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert len(text) < 40_000
        curves = re.findall(r'<path d="(M[^H"]*)"', text)
        assert sum(path.count("L") > 5 for path in curves) >= 5
        shipped = (ROOT / "grafana" / "plots" / f"{name}.svg").read_text(encoding="utf-8")
        titles = r'font-weight="600">([^<]+)<'
        assert re.findall(titles, shipped) == re.findall(titles, text)


def test_promtool_accepts_the_metrics_of_a_relay(run: Watched) -> None:
    """Names, units and help texts follow Prometheus' conventions."""
    text = plain.get(f"{run.broker.admin_url}/metrics").text
    assert "broker_upstream_requests_total" in text
    assert output_of(["promtool", "check", "metrics"], text) == ""


def test_O1_no_canary_in_log_or_metrics_at_debug_level(run: Watched) -> None:
    """Neither a secret, nor a key, nor a fingerprint, nor anything like a token."""
    fingerprints = run.vendor.fingerprints()
    assert len(fingerprints) > 400
    log, text = run.broker.log, plain.get(f"{run.broker.admin_url}/metrics").text
    written = Counter(json.loads(line)["event"] for line in log.splitlines())
    one_each = written["broker.embed_token"] + written["broker.secret_in_browser"]
    assert one_each == run.counted["asked"]  # debug: every single one
    for seen in (log, text):
        assert [key for key in run.vendor.keys if key in seen] == []
        assert run.broker.secret not in seen
        assert [one for one in fingerprints if one in seen] == []
        assert not re.search(r"eyJ[\w-]{8}", seen)  # how a JWT begins
