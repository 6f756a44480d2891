"""What ships for Prometheus, Alertmanager and Grafana, as their own tools read it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import plain
import pytest
import yaml
from documents import PAGES
from running import daemon, free_port, output_of, until

pytestmark = pytest.mark.parts

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "config" / "prometheus"
GRAFANA = ROOT / "grafana"
RULES = PROMETHEUS / "rules.yml"
RULES_TEST = PROMETHEUS / "rules_test.yml"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))


def read(path: Path) -> Any:
    """Read a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_scrape_configuration_is_valid() -> None:
    """`promtool check config` finds nothing to say against it, its rules included."""
    said = output_of(["promtool", "check", "config", str(PROMETHEUS / "prometheus.yml")])
    assert said.count("SUCCESS") == 3
    assert "FAILED" not in said


def test_the_rules_are_valid() -> None:
    """With every lint there is."""
    command = ["promtool", "check", "rules", "--lint=all", "--lint-fatal", str(RULES)]
    assert "SUCCESS" in output_of(command)


def test_every_alert_fires_and_resolves() -> None:
    """As rules_test.yml tells it, labels and words included."""
    assert "SUCCESS" in output_of(["promtool", "test", "rules", str(RULES_TEST)])


def test_every_alert_is_tested_to_fire_and_to_resolve() -> None:
    """Quiet, firing, quiet: each alert has all three in its test."""
    (group,) = read(RULES)["groups"]
    alerts = [rule["alert"] for rule in group["rules"] if "alert" in rule]
    tests = {test["name"]: test for test in read(RULES_TEST)["tests"]}
    assert list(tests) == alerts
    for name, test in tests.items():
        moments = test["alert_rule_test"]
        assert {moment["alertname"] for moment in moments} == {name}
        assert ["exp_alerts" in moment for moment in moments] == [False, True, False]


def test_the_routes_are_valid() -> None:
    """`amtool` reads what ships for Alertmanager."""
    assert "SUCCESS" in output_of(["amtool", "check-config", str(PROMETHEUS / "alertmanager.yml")])


def test_the_routes_know_the_alerts() -> None:
    """Severities and names are those of the rules; warnings are repeated once a day at most."""
    tree = read(PROMETHEUS / "alertmanager.yml")
    (group,) = read(RULES)["groups"]
    alerts = [rule for rule in group["rules"] if "alert" in rule]
    assert {alert["labels"]["severity"] for alert in alerts} == {"critical", "warning"}
    (route,) = tree["route"]["routes"]
    assert route["matchers"] == ['severity="warning"']
    assert route["repeat_interval"] == "24h"
    names = [alert["alert"] for alert in alerts]
    for rule in tree["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            (pattern,) = re.findall(r'alertname=~?"(.*)"', matcher)
            for one in pattern.split("|"):
                assert [name for name in names if re.fullmatch(one, name)], one


def pods_of(manifest: Path) -> list[dict[str, Any]]:
    """Return what a cluster would tell of each container port of a manifest's pods."""
    every = yaml.safe_load_all(manifest.read_text(encoding="utf-8"))
    specs = [r["spec"]["template"]["spec"] for r in every if "template" in r.get("spec", {})]
    return [
        pod(manifest.stem, container["name"], port["name"], "Running")
        for spec in specs
        for container in (*spec["containers"], *spec.get("initContainers", ()))
        for port in container.get("ports", ({"name": ""},))
    ]


def pod(name: str, container: str, port: str, phase: str) -> dict[str, Any]:
    """Return a target as the discovery of a cluster has it."""
    meta = {
        "namespace": "shop",
        "pod_name": name,
        "pod_container_name": container,
        "pod_container_port_name": port,
        "pod_phase": phase,
    }
    labels = {f"__meta_kubernetes_{label}": value for label, value in meta.items()}
    return {"targets": [f"127.0.0.1:{free_port()}"], "labels": labels}


def test_pods_are_found_and_named(tmp_path: Path) -> None:
    """The relabelling of kubernetes.yml keeps the admin ports of both manifests, and nothing else.

    Not every build of Prometheus can ask a cluster (Debian's cannot), so the targets are given as
    a cluster would tell them.
    """
    tree = read(PROMETHEUS / "kubernetes.yml")
    (job,) = tree["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    job["static_configs"] = [
        *(
            pod
            for path in sorted((ROOT / "config" / "kubernetes").iterdir())
            for pod in pods_of(path)
        ),
        pod("ended", "embed-token-broker", "admin", "Failed"),
        pod("other", "shop", "admin", "Running"),
    ]
    (pagers,) = tree["alerting"]["alertmanagers"]
    assert pagers.pop("kubernetes_sd_configs") == [{"role": "endpoints"}]
    tree["rule_files"] = [str(RULES)]
    config = tmp_path / "kubernetes.yml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert "FAILED" not in output_of(["promtool", "check", "config", str(config)])
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data"]
    command += [f"--web.listen-address={address}"]

    def targets() -> list[dict[str, str]]:
        found = plain.get(f"http://{address}/api/v1/targets?state=active").json()
        return [target["labels"] for target in found["data"]["activeTargets"]]

    with daemon(command, tmp_path / "prometheus.log", f"http://{address}/-/ready"):
        until(targets, "the targets")
        assert sorted(target["instance"] for target in targets()) == [
            "shop/gateway",
            "shop/relay",
            "shop/signer",
        ]
        assert {target["job"] for target in targets()} == {"embed-token-broker"}


@pytest.mark.parametrize("path", sorted((GRAFANA / "provisioning").rglob("*.yml")), ids=str)
def test_provisioning_leads_to_what_ships(path: Path) -> None:
    """The data source has the scrape's interval; the provider reads the page's folder."""
    tree = read(path)
    assert tree["apiVersion"] == 1
    if "datasources" in tree:
        (source,) = tree["datasources"]
        scrape = read(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]
        assert source["jsonData"]["timeInterval"] == scrape
        assert source["type"] == "prometheus"
    else:
        (provider,) = tree["providers"]
        assert provider["options"]["path"] in PAGES["grafana/README.md"]


def test_a_budget_that_is_shared_is_counted_once(tmp_path: Path) -> None:
    """The dashboard's "Budget left" with two instances on one store, without one, and cut off."""
    (page,) = [json.loads(p.read_text(encoding="utf-8")) for p in DASHBOARDS if p.stem == "vendor"]
    expr = next(p for p in page["panels"] if p["title"] == "Budget left")["targets"][0]["expr"]
    expr = expr.replace("$job", "j").replace("$instance", ".*")

    def left(remaining: int, degraded: str | None) -> dict[str, Any]:
        series = []
        for instance in ("a", "b"):
            labels = f'{{job="j", instance="{instance}"}}'
            told = {"broker_upstream_budget_remaining": str(remaining)}
            told |= {} if degraded is None else {"broker_store_degraded": degraded}
            series += [{"series": name + labels, "values": value} for name, value in told.items()]
        wanted = [{"labels": "{}", "value": 8}]
        asked = {"expr": expr, "eval_time": "0m", "exp_samples": wanted}
        return {"interval": "1m", "input_series": series, "promql_expr_test": [asked]}

    file = tmp_path / "budget.yml"
    tests = [left(8, "0"), left(4, None), left(4, "1")]
    file.write_text(yaml.safe_dump({"tests": tests}), encoding="utf-8")
    assert "SUCCESS" in output_of(["promtool", "test", "rules", str(file)])


MISTAKES = {
    "word": (r'"drawStyle": "line"', '"drawStyle": "lines"'),
    "key": (r'"graphMode": "area"', '"graphModus": "area"'),
    "kind": (r'"type": "timeseries"', '"type": "timeserie"'),
    "type": (r'"schemaVersion": 41', '"schemaVersion": "41"'),
    "enum": (r'"mode": "thresholds"', '"mode": "threshold"'),
}
"""One of each sort, as a pattern in a dashboard and what is put there."""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the compiler says to each dashboard, and to the first one with each mistake.

    Grafana's own types are those of the lock file.
    """
    folder = tmp_path_factory.mktemp("types")
    for name in ("package.json", "package-lock.json", "tsconfig.json", "dashboard.ts"):
        shutil.copy(GRAFANA / "types" / name, folder)
    pages = {path.stem: path.read_text(encoding="utf-8") for path in DASHBOARDS}
    good = pages["broker"]
    for name, (pattern, mistake) in MISTAKES.items():
        pages[name] = re.sub(pattern, mistake, good, count=1)
        assert json.loads(pages[name]) != json.loads(good)
    for name, page in pages.items():
        text = f'import type {{ Page }} from "./dashboard.js";\nexport const page: Page = {page};\n'
        (folder / f"{name}.ts").write_text(text, encoding="utf-8")
    install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)]
    output_of(install)
    compiler = folder / "node_modules" / "typescript" / "bin" / "tsc"
    command = ["node", str(compiler), "-p", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    lines = (done.stdout + done.stderr).splitlines()
    return {name: "\n".join(s for s in lines if s.startswith(f"{name}.ts(")) for name in pages}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_are_what_grafana_s_types_describe(
    complaints: dict[str, str], dashboard: Path
) -> None:
    """`tsc --noEmit` accepts each against @grafana/schema, panel options included."""
    assert complaints[dashboard.stem] == ""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(complaints: dict[str, str], mistake: str) -> None:
    """The check can fail: on a word, on a key, on a kind, on a type, on a member of an enum."""
    assert "error TS" in complaints[mistake]
