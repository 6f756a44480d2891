"""What ships for containers, Kubernetes and systemd is checked by the tools of each."""

import os
import re
import secrets
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import BLOCKS, words_of
from processes import run
from running import output_of, tool

pytestmark = pytest.mark.parts

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"
MANIFESTS = sorted((CONFIG / "kubernetes").glob("*.yaml"))
UNIT = CONFIG / "systemd" / "embed-token-broker.service"
COMPOSE = {
    name: CONFIG / "container" / f"compose.{name}.yaml"
    for name in ("relay", "signer", "monitoring")
}

ROLES = {"relay": "upstream", "signer": "local"}
"""What ships for each place, and where its tokens come from."""


def require(path: Path, kind: str, environment: dict[str, str] | None = None) -> None:
    """Check that this configuration is good, and where its tokens come from."""
    for command in ("check", "config show"):
        done = run(*command.split(), "--config", str(path), **(environment or {}))
        assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout.decode())["issuer"]["kind"] == kind


KUBERNETES = ("1.29", "1.34", "1.37")
"""The first that knows native sidecars, and later ones."""


class TestContainer:
    def test_the_container_file_is_clean(self) -> None:
        """Not one finding of hadolint, not even of style."""
        command = [tool("hadolint"), "--failure-threshold", "style"]
        assert output_of([*command, str(CONFIG / "container" / "Dockerfile")]) == ""

    def test_it_copies_what_the_build_gets_to_see_and_nothing_is_missing(self) -> None:
        """Each source of a COPY is in the repository and let in by the ignore file."""
        text = (CONFIG / "container" / "Dockerfile").read_text(encoding="utf-8")
        let_in = (CONFIG / "container" / "Dockerfile.dockerignore").read_text(encoding="utf-8")
        copied = [
            word for line in re.findall(r"(?m)^COPY (?!--)(.*)", text) for word in line.split()[:-1]
        ]
        assert set(copied) == {
            "config/lock/runtime.txt",
            "pyproject.toml",
            "LICENSE",
            "broker",
            "config",  # what `broker config example` prints
        }
        for name in copied:
            assert (ROOT / name).exists()
            assert f"\n!{name}\n" in let_in or name == "config"

    def test_the_compose_files_pass_their_schema(self) -> None:
        """That of the compose specification."""
        command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
        assert output_of([*command, *map(str, COMPOSE.values())]) == "ok -- validation done\n"

    @pytest.mark.parametrize("name", COMPOSE)
    def test_every_file_that_compose_mounts_is_there(self, name: str) -> None:
        """And its services are locked in: read-only, no capabilities, on loopback."""
        compose = composed(name)
        for service_name, service in compose["services"].items():
            for mount in service.get("volumes", ()):
                source = mount.partition(":")[0]
                if source.startswith("."):
                    assert (CONFIG / "container" / source).resolve().exists(), service_name
                else:
                    assert source in compose["volumes"]
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        named = {s for service in compose["services"].values() for s in service.get("secrets", ())}
        assert named == compose["secrets"].keys()

    @pytest.mark.parametrize("role", ROLES)
    def test_its_head_makes_each_secret(self, role: str) -> None:
        """Of the broker and of Grafana: by `keys generate`, or with the vendor's key."""
        text = COMPOSE[role].read_text(encoding="utf-8")
        (generated,) = re.findall(r"for name in ([\w ]+); do", text)
        made = set(generated.split()) | set(re.findall(r"cp vendor\.key secrets/(\w+)", text))
        assert composed(role)["include"] == ["compose.monitoring.yaml"]
        assert made == composed(role)["secrets"].keys() | composed("monitoring")["secrets"].keys()

    @pytest.mark.parametrize("role", ROLES)
    def test_who_watches_the_broker_finds_it_again_when_it_was_restarted(self, role: str) -> None:
        """By the names of services: the network of a container ends with it."""
        services = composed("monitoring")["services"] | composed(role)["services"]
        assert not [name for name, service in services.items() if "network_mode" in service]
        scraping, shipped = (
            yaml.safe_load((CONFIG / folder / "prometheus.yml").read_text(encoding="utf-8"))
            for folder in ("container", "prometheus")
        )
        (job,) = scraping["scrape_configs"]
        (target,) = job["static_configs"][0]["targets"]
        admin = tomllib.loads((CONFIG / "container" / f"{role}.toml").read_text(encoding="utf-8"))
        assert target == f"broker:{admin['admin']['listen'].rpartition(':')[2]}"
        job["static_configs"] = shipped["scrape_configs"][0]["static_configs"]
        del shipped["alerting"]
        assert scraping == shipped
        mounted = {mount.split(":")[1]: mount for mount in services["prometheus"]["volumes"]}
        assert mounted["/etc/prometheus/rules.yml"].startswith("../prometheus/rules.yml:")
        assert mounted["/etc/prometheus/prometheus.yml"].startswith("./prometheus.yml:")

    def test_grafana_asks_the_prometheus_beside_it(self) -> None:
        """As the data source that ships does, under the service's name."""
        asked, shipped = (
            yaml.safe_load(path.read_text(encoding="utf-8"))
            for path in (
                CONFIG / "container" / "datasource.yml",
                ROOT / "grafana" / "provisioning" / "datasources" / "prometheus.yml",
            )
        )
        (source,) = asked["datasources"]
        assert source["url"] == "http://prometheus:9090"
        source["url"] = shipped["datasources"][0]["url"]
        assert asked == shipped

    @pytest.mark.parametrize(("role", "kind"), ROLES.items())
    def test_what_it_runs_is_a_good_configuration(self, role: str, kind: str) -> None:
        """And compose gives it each secret that it names, and no other."""
        path = CONFIG / "container" / f"{role}.toml"
        require(path, kind)
        (broker,) = composed(role)["services"].values()
        assert f"./{role}.toml:/etc/embed-token-broker/broker.toml:ro" in broker["volumes"]
        named = re.findall(r'"/run/secrets/(\w+)"', path.read_text(encoding="utf-8"))
        assert sorted(named) == sorted(broker["secrets"])


def composed(name: str) -> dict[str, Any]:
    """Read one of the compose files."""
    read: dict[str, Any] = yaml.safe_load(COMPOSE[name].read_text(encoding="utf-8"))
    return read


def resources(name: str = "*") -> Iterator[dict[str, Any]]:
    """Yield every resource of a manifest, or of all."""
    for path in MANIFESTS:
        if name in {"*", path.stem}:
            yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))


def pods(name: str = "*") -> list[dict[str, Any]]:
    """Return the pods that a manifest makes."""
    return [r["spec"]["template"]["spec"] for r in resources(name) if r["kind"] == "Deployment"]


def sidecar(name: str) -> dict[str, Any]:
    """Return the broker beside the backend."""
    (pod,) = pods(name)
    (broker,) = pod["initContainers"]
    return dict(broker)


def configured() -> str:
    """Return the gateway's configuration."""
    (found,) = [r for r in resources("gateway") if r["kind"] == "ConfigMap"]
    return str(found["data"]["broker.toml"])


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all containers of a pod."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


class TestKubernetes:
    @pytest.mark.parametrize("version", KUBERNETES)
    def test_manifests_are_valid_strictly(self, version: str) -> None:
        """No unknown field, no wrong type, in any version from the first that has sidecars."""
        command = [tool("kubernetes-validate"), "--strict", "-k", version, *map(str, MANIFESTS)]
        done = output_of(command).splitlines()
        for path in MANIFESTS:
            told = [line for line in done if str(path) in line]
            assert told, path
            assert all("passed" in line for line in told), told

    def test_pods_keep_to_the_restricted_profile(self) -> None:
        """The Pod Security Standards, field by field, and a read-only root beyond them."""
        assert [path.stem for path in MANIFESTS] == ["gateway", "relay", "signer"]
        assert len(pods()) == len(MANIFESTS) + 1  # the gateway's Valkey
        for pod in pods():
            security = pod["securityContext"]
            assert security["runAsNonRoot"] is True
            assert security["runAsUser"] > 0
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
            kinds = {"configMap", "secret", "emptyDir"}
            assert all(kinds & volume.keys() for volume in pod["volumes"])
            assert pod["automountServiceAccountToken"] is False
            for container in containers(pod):
                own = container["securityContext"]
                assert own == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert not any("hostPort" in port for port in container.get("ports", ()))
                assert "memory" in container["resources"]["limits"]
        enforced = next(r for r in resources() if r["kind"] == "Namespace")["metadata"]["labels"]
        assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"

    def test_a_pod_ends_later_than_its_broker_and_a_balancer_looks_away_sooner(self) -> None:
        """Grace beyond the drain; readiness probed often enough for the lead."""
        server = tomllib.loads(configured())["server"]
        drain, lead = (float(server[name].removesuffix("s")) for name in ("drain", "drain_lead"))
        gateway = pods("gateway")[0]
        assert gateway["terminationGracePeriodSeconds"] > drain
        probe = gateway["containers"][0]["readinessProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"] < lead
        for role in ROLES:
            assert pods(role)[0]["terminationGracePeriodSeconds"] > 15 + 15

    @pytest.mark.parametrize("role", ROLES)
    def test_the_sidecar_is_a_native_one(self, role: str) -> None:
        """It restarts, is started before the backend, and is probed."""
        broker = sidecar(role)
        assert broker["restartPolicy"] == "Always"
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= broker.keys()

    def test_the_gateway_s_valkey_is_beside_it(self) -> None:
        """At the address that the broker has for it, with the password that both read."""
        store = tomllib.loads(configured())["store"]
        (service,) = [r for r in resources("gateway") if r["kind"] == "Service"][1:]
        name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
        assert store["url"] == f"valkey://{name}:{port}"
        broker, valkey = pods("gateway")
        secret = {"secretName": "embed-token-broker-valkey", "defaultMode": 0o440}
        for pod in (broker, valkey):
            assert secret in [volume.get("secret") for volume in pod["volumes"]]
        mounted = [m["mountPath"] for m in broker["containers"][0]["volumeMounts"]]
        assert store["password_file"] == f"{mounted[-1]}/password"
        (valkey_mount,) = [m["mountPath"] for m in valkey["containers"][0]["volumeMounts"]]
        (shell,) = valkey["containers"][0]["args"]
        assert f"$(cat {valkey_mount}/password)" in shell

    @pytest.mark.parametrize("name", ["relay", "signer", "gateway"])
    def test_its_head_makes_each_secret(self, name: str) -> None:
        """Each file that the broker is told of is a key of a secret that the head creates."""
        (path,) = [path for path in MANIFESTS if path.stem == name]
        text = path.read_text(encoding="utf-8")
        head = text[: text.index("apiVersion")]
        made = set(re.findall(r"--from-file=(\w+)=", head))
        named = set(re.findall(r"/run/secrets/[\w-]+/(\w+)", text[text.index("apiVersion") :]))
        assert named == made

    def test_sidecars_keep_within_the_vendor_s_window_through_a_rollout(self) -> None:
        """106 a minute by all pods that live at once: replicas, added ones, and those that end.

        A pod that becomes available lets the next one end, by which time the last has ended.
        """
        (spec,) = [r["spec"] for r in resources("relay")]
        pod = spec["template"]["spec"]
        rolling = spec["strategy"]["rollingUpdate"]
        assert spec["minReadySeconds"] > pod["terminationGracePeriodSeconds"]
        alive = spec["replicas"] + rolling["maxSurge"] + rolling["maxUnavailable"]
        (broker,) = pod["initContainers"]
        given = {entry["name"]: entry["value"] for entry in broker["env"]}
        rate, burst = (int(given[f"BROKER_ISSUER__BUDGET__{name}"]) for name in ("RATE", "BURST"))
        assert rate * alive <= 106
        delayed = 5  # by a connect that hangs for 3 s, as the file reckons
        assert rate * alive + burst * (alive + 1) + delayed < 120

    def test_what_they_configure_is_a_good_configuration(self, tmp_path: Path) -> None:
        """The gateway's file and the sidecars' variables, each by `broker check`."""
        path = tmp_path / "broker.toml"
        path.write_text(configured(), encoding="utf-8")
        require(path, "upstream")
        path.write_text("", encoding="utf-8")
        for role, kind in ROLES.items():
            variables = {entry["name"]: entry["value"] for entry in sidecar(role)["env"]}
            require(path, kind, variables)


class TestSystemd:
    @pytest.fixture
    def unit(self, tmp_path: Path) -> Path:
        """The unit, with a program that is on this machine."""
        path = tmp_path / UNIT.name
        text = UNIT.read_text(encoding="utf-8")
        broker = "/opt/embed-token-broker/bin/broker"
        assert f"\nExecStart={broker} serve\n" in text
        assert f"\nExecStartPre=-{broker} check\n" in text
        path.write_text(text.replace(f"{broker} ", "/bin/true "), encoding="utf-8")
        return path

    def test_the_unit_verifies_without_a_warning(self, unit: Path) -> None:
        """By systemd itself."""
        command = ["systemd-analyze", "verify", str(unit)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_its_sandbox_scores_ok(self, unit: Path) -> None:
        """Low is good: up to 2.0 is OK."""
        text = output_of(["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)])
        score = re.search(r"Overall exposure level for \S+: ([\d.]+) OK", text)
        assert score is not None, text
        assert float(score[1]) <= 2.0

    def test_it_is_started_again_however_often_it_failed(self) -> None:
        """No limit on starts: five failures in ten seconds would be the end, with no one about."""
        head = UNIT.read_text(encoding="utf-8").partition("[Service]")[0]
        assert "\nStartLimitIntervalSec=0\n" in head

    @pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare"
    )
    def test_it_leaves_what_process_metrics_are_read_from(self) -> None:
        """With the unit's view of /proc, `process_*` are all there."""
        found = re.findall(
            r"(?m)^(ProtectProc|ProcSubset)=(\w+)$", UNIT.read_text(encoding="utf-8")
        )
        names = {"ProtectProc": "hidepid", "ProcSubset": "subset"}
        options = ",".join(f"{names[name]}={value}" for name, value in found)
        assert "hidepid=invisible" in options
        mount = f"mount -t proc -o {options} proc /proc && exec"
        code = "from prometheus_client import generate_latest as g; print(g().decode())"
        inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
        text = output_of([*inside, f'{mount} {sys.executable} -c "{code}"'])
        assert set(re.findall(r"(?m)^process_\w+", text)) == {
            "process_cpu_seconds_total",
            "process_max_fds",
            "process_open_fds",
            "process_resident_memory_bytes",
            "process_start_time_seconds",
            "process_virtual_memory_bytes",
        }

    @pytest.mark.parametrize(("role", "kind"), ROLES.items())
    def test_what_it_runs_is_a_good_configuration(
        self, role: str, kind: str, tmp_path: Path
    ) -> None:
        """Its head makes each secret that the file names, and systemd copies each."""
        text = UNIT.read_text(encoding="utf-8")
        head = text[: text.index("[Unit]")]
        assert "\nLoadCredential=secret:/etc/embed-token-broker/secrets\n" in text
        assert (
            f"config/systemd/{role}.toml" in head or f"has {role}.toml as its broker.toml" in head
        )
        shipped = (CONFIG / "systemd" / f"{role}.toml").read_text(encoding="utf-8")
        named = set(
            re.findall(r'"/run/credentials/embed-token-broker.service/secret_(\w+)"', shipped)
        )
        assert named <= set(re.findall(r"/etc/embed-token-broker/secrets/(\w+)\n", head))
        for name in named:
            (tmp_path / name).write_text(secrets.token_urlsafe(36) + "\n", encoding="utf-8")
        path = tmp_path / "broker.toml"
        path.write_text(as_started(role, tmp_path, tmp_path), encoding="utf-8")
        require(path, kind)

    def test_a_rotation_s_commands_do_what_their_page_says(self, tmp_path: Path) -> None:
        """Typed below a folder: the file names both secrets, then the new one stays alone.

        What starts services is left out.
        """
        (tmp_path / "etc/embed-token-broker/secrets").mkdir(parents=True)
        stored = tmp_path / "etc" / "embed-token-broker" / "secrets"
        old = {}
        for name in ("web", "admin", "vendor"):
            old[name] = secrets.token_urlsafe(36)
            (stored / name).write_text(old[name] + "\n", encoding="utf-8")
        (tmp_path / "vendor.key").write_text(secrets.token_urlsafe(36) + "\n", encoding="utf-8")
        file = tmp_path / "etc" / "embed-token-broker" / "broker.toml"
        shutil.copy(CONFIG / "systemd" / "relay.toml", file)
        _, *steps = [
            block.text for block in BLOCKS if block.heading == "Rotation with the systemd unit"
        ]
        assert len(steps) == 4
        for step, both in zip(steps, (True, False, True, False), strict=True):
            self.typed(step, tmp_path)
            settings = self.handed_over(file, stored)
            web, upstream = settings["clients"]["web"], settings["issuer"]["upstream"]
            if step in steps[:2]:
                assert ("next_secret_file" in web) is both
            else:
                assert len(upstream["api_secret_files"]) == 1 + both
        for name in ("web", "vendor"):
            assert (stored / name).read_text(encoding="utf-8").strip() != old[name]
        assert sorted(path.name for path in stored.iterdir()) == sorted(old)

    @staticmethod
    def typed(step: str, root: Path) -> None:
        """Run the commands of a block, but for those of systemd, with /etc below a folder."""
        broker = "/opt/embed-token-broker/bin/broker"
        here = step.replace("sudo ", "").replace("/etc/", f"{root}/etc/")
        for line in here.replace(broker, f"{sys.executable} -m broker").splitlines():
            if next(words_of(line))[0] != "systemctl":
                output_of(["bash", "-ec", f"cd {root} && {line}"])

    @staticmethod
    def handed_over(file: Path, stored: Path) -> dict[str, Any]:
        """Return what is in force after a restart, by `config show`."""
        here = file.with_name("here.toml")
        text = file.read_text(encoding="utf-8").replace(
            SHIPPED_STATE, f"sqlite://{stored.parent}/s"
        )
        here.write_text(text.replace(COPIES, f"{stored}/"), encoding="utf-8")
        require(here, "upstream")
        shown = output_of([sys.executable, "-m", "broker", "config", "show", "--config", str(here)])
        return tomllib.loads(shown)


COPIES = "/run/credentials/embed-token-broker.service/secret_"
"""Where systemd puts its copies of the secret files."""

SHIPPED_STATE = "sqlite:///var/lib/embed-token-broker/state.db"
"""Below the folder that systemd makes: StateDirectory."""


def as_started(role: str, stored: Path, state: Path) -> str:
    """Return a configuration of the unit, with secrets and state in folders of this machine."""
    text = (CONFIG / "systemd" / f"{role}.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text)["store"]["url"] == SHIPPED_STATE
    assert "StateDirectory=embed-token-broker\n" in UNIT.read_text(encoding="utf-8")
    return text.replace(SHIPPED_STATE, f"sqlite://{state / 'state.db'}").replace(
        COPIES, f"{stored}/"
    )
