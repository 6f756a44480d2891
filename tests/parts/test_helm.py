"""The chart, by Helm's own library: linted, rendered with eleven sets of values, and packaged."""

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

from broker.cli.main import main
from broker.version import VERSION

pytestmark = pytest.mark.parts

CONFIG = Path(__file__).parents[2] / "config"
CHART = CONFIG / "helm" / "embed-token-broker"

BACKEND = {
    "containers": [{"name": "backend", "image": "registry.example/backend:1.0.0"}],
    "labels": {"team": "shop"},
    "volumes": [{"name": "scratch", "emptyDir": {}}],
}
SIDECAR = {"role": "sidecar", "backend": BACKEND}
VALUES: dict[str, dict[str, Any]] = {
    "a gateway as it ships": {},
    "a gateway that signs": {"issuer": {"kind": "local"}},
    "a gateway on a Valkey elsewhere": {
        "store": {"url": "valkeys://valkey.internal:6379", "username": "broker"}
    },
    "one gateway without a store": {"replicas": 1, "valkey": {"enabled": False}},
    "a gateway for two backends": {
        "clients": {"web": {"agents": ["A78WKV4515"]}, "support": {"agents": ["B21XTR8807", "X"]}},
        "env": {"BROKER_LIMITS__AGENT__RATE": "900", "BROKER_LOG__LEVEL": "debug"},
    },
    "a gateway that is watched": {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    },
    "a gateway whose password leaves the cluster": {"store": {"url": "valkey://10.0.0.9"}},
    "a gateway in a cluster with rules of its own": {
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "image": {"tag": "1.2.3", "pullSecrets": [{"name": "registry"}]},
    },
    "a sidecar that relays": SIDECAR,
    "a sidecar that signs": {**SIDECAR, "issuer": {"kind": "local"}, "replicas": 9},
    "a sidecar that is watched": {**SIDECAR, "replicas": 20, "podMonitor": {"enabled": True}},
}
SEEN_BY_OTHERS = {
    "a gateway whose password leaves the cluster",
    "a gateway in a cluster with rules of its own",
}
"""Where nothing of the chart keeps others from secrets in clear text: `check` says so."""

KUBERNETES = ("1.29", "1.34", "1.37")
"""The first that knows native sidecars, and later ones."""

OPERATOR = "monitoring.coreos.com/v1"
"""Kinds of the Prometheus operator, which no Kubernetes has by itself."""


def rendered(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the resources that a release would have, by kind; Valkey's as `Valkey KIND`."""
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(dict(values), name="demo", namespace="shop")
    found = {}
    for resource in (r for text in texts.values() for r in yaml.safe_load_all(text) if r):
        beside = "Valkey " if resource["metadata"]["name"].endswith("-valkey") else ""
        assert beside + resource["kind"] not in found
        found[beside + resource["kind"]] = resource
    return found


@cache
def release(name: str) -> dict[str, dict[str, Any]]:
    """Render one of the sets of values."""
    return rendered(VALUES[name])


def pods(name: str) -> Iterator[dict[str, Any]]:
    """Yield the pods of a release: the broker's, then Valkey's."""
    for kind in ("Deployment", "Valkey Deployment"):
        if kind in release(name):
            yield release(name)[kind]["spec"]["template"]["spec"]


def broker_of(name: str) -> dict[str, Any]:
    """Return the broker's container."""
    pod = next(pods(name))
    (container,) = pod["initContainers" if "sidecar" in name else "containers"]
    return dict(container)


def test_it_lints_without_a_finding_but_that_it_has_no_icon() -> None:
    """By Helm itself."""
    found = helm.lint(str(CHART))
    assert [message["error"] for message in found["messages"]] == ["icon is recommended"]
    assert found["errors"] == []


@pytest.mark.parametrize("name", VALUES)
def test_what_it_renders_is_valid_strictly(name: str) -> None:
    """No unknown field, no wrong type, in any version from the first that has sidecars."""
    for resource in release(name).values():
        if resource["apiVersion"] != OPERATOR:
            for version in KUBERNETES:
                kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("name", VALUES)
def test_what_it_configures_is_good_and_has_its_secrets(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`broker check` says so; each secret file lies in a folder that is mounted."""
    text = release(name)["ConfigMap"]["data"]["broker.toml"]
    path = tmp_path / "broker.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for entry in broker_of(name).get("env", ()):
            patch.setenv(entry["name"], entry["value"])
        assert main(["check", "--config", str(path)]) == 0
    told = capsys.readouterr()
    assert told.out == "configuration ok\n"
    assert ("clear text" in told.err) == (name in SEEN_BY_OTHERS)
    mounts = [mount["mountPath"] for mount in broker_of(name)["volumeMounts"]]
    for file in re.findall(r'"(/run/secrets/[^"]+|/var/lib/[^"]+)"', text):
        assert file.rpartition("/")[0] in mounts
    volumes = {volume["name"] for volume in next(pods(name))["volumes"]}
    assert {mount["name"] for mount in broker_of(name)["volumeMounts"]} <= volumes


@pytest.mark.parametrize("name", VALUES)
def test_its_pods_keep_to_the_restricted_profile(name: str) -> None:
    """As the manifests do; what stands beside the broker is the user's."""
    for pod in pods(name):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
    for container in (broker_of(name), *list(pods(name))[-1]["containers"]):
        if container["name"] != "backend":
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]


def test_a_gateway_brings_what_it_needs_and_nothing_else() -> None:
    """A Valkey unless there is another; policy and disruption budget unless switched off."""
    whole = {"ServiceAccount", "ConfigMap", "Deployment", "Service"}
    guarded = {*whole, "PodDisruptionBudget", "NetworkPolicy"}
    valkey = {"Valkey Deployment", "Valkey Service", "Valkey NetworkPolicy"}
    assert release("a gateway as it ships").keys() == guarded | valkey
    assert release("a gateway on a Valkey elsewhere").keys() == guarded
    assert release("one gateway without a store").keys() == guarded - {"PodDisruptionBudget"}
    own = release("a gateway in a cluster with rules of its own")
    assert own.keys() == whole | valkey
    assert broker_of("a gateway in a cluster with rules of its own")["image"].endswith(":1.2.3")
    watched = release("a gateway that is watched").keys()
    assert watched == guarded | valkey | {"PodMonitor", "PrometheusRule"}
    assert release("a sidecar that relays").keys() == whole - {"Service"} | {"PodDisruptionBudget"}


@pytest.mark.parametrize("replicas", [1, 2, 5, 20, 50])
def test_sidecars_keep_within_the_vendor_s_window_through_a_rollout(replicas: int) -> None:
    """As config/kubernetes/relay.yaml reckons: one more than the replicas may be alive."""
    resources = rendered({**SIDECAR, "replicas": replicas})
    spec = resources["Deployment"]["spec"]
    pod = spec["template"]["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}
    assert spec["minReadySeconds"] > pod["terminationGracePeriodSeconds"] > 15 + 15
    assert pod["initContainers"][0]["restartPolicy"] == "Always"
    assert pod["containers"] == BACKEND["containers"]
    budget = tomllib.loads(resources["ConfigMap"]["data"]["broker.toml"])["issuer"]["budget"]
    alive = replicas + 1
    assert budget["rate"] * alive <= 106
    assert budget["rate"] * alive + budget["burst"] * (alive + 1) + 5 < 120


def test_rules_and_targets_are_those_of_config_prometheus() -> None:
    """One source for the rules; job and instance are what rules and dashboards ask for."""
    watched = release("a gateway that is watched")
    shipped = yaml.safe_load((CONFIG / "prometheus" / "rules.yml").read_text(encoding="utf-8"))
    assert watched["PrometheusRule"]["spec"] == shipped
    scraping = yaml.safe_load((CONFIG / "prometheus" / "kubernetes.yml").read_text("utf-8"))
    (job,) = scraping["scrape_configs"]
    (endpoint,) = watched["PodMonitor"]["spec"]["podMetricsEndpoints"]
    named, instance = endpoint["relabelings"]
    assert named == {"targetLabel": "job", "replacement": job["job_name"]}
    (rule,) = [r for r in job["relabel_configs"] if r.get("target_label") == "instance"]
    assert instance["sourceLabels"] == rule["source_labels"]
    assert instance["separator"] == rule["separator"]
    for name in ("a gateway that is watched", "a sidecar that is watched"):
        ports = {port["name"]: port["containerPort"] for port in broker_of(name)["ports"]}
        assert ports[endpoint["port"]] == 9464
        labels = release(name)["Deployment"]["spec"]["template"]["metadata"]["labels"]
        selected = release(name)["PodMonitor"]["spec"]["selector"]["matchLabels"]
        assert selected.items() <= labels.items()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"valkey": {"enabled": False}}, "replicas: a gateway of several needs what they share"),
        ({"role": "sidecar"}, "backend.containers: a sidecar needs the containers"),
        ({**SIDECAR, "replicas": 60}, "replicas: so many sidecars"),
        ({"role": "both"}, "role"),
        ({"issuer": {"budget": 120}}, "budget"),
        ({"replica": 3}, "replica"),
        ({"clients": {"web": None}}, "clients: name who may ask"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], said: str) -> None:
    """Before anything is installed."""
    with pytest.raises(helm.HelmError, match=re.escape(said)):
        rendered(values)


def test_it_is_packaged_with_its_version_and_its_rules(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The archive is what a release uploads; the link to the rules is a file in it."""
    import tarfile

    about = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert about["version"] == about["appVersion"] == VERSION
    helm.package(str(CHART), destination=str(tmp_path))
    (archive,) = tmp_path.iterdir()
    assert archive.name == f"embed-token-broker-{VERSION}.tgz"
    with tarfile.open(archive) as packed:
        member = packed.getmember("embed-token-broker/files/rules.yml")
        assert member.isfile()
        read = packed.extractfile(member)
        assert read is not None
        assert read.read() == (CONFIG / "prometheus" / "rules.yml").read_bytes()
    record_property("figure", f"chart, {archive.stat().st_size} bytes")
