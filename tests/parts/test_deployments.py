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

import httpx
import pytest
import yaml
from documents import BLOCKS, words_of
from gateways import Broker
from running import free_port, output_of, tool, until

pytestmark = pytest.mark.parts

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"
MANIFESTS = sorted((CONFIG / "kubernetes").glob("*.yaml"))
UNIT = CONFIG / "systemd" / "embed-token-broker.service"
COMPOSE = CONFIG / "container" / "compose.yaml"

SWITCHED_OFF = re.compile(r"(?m)^( *)#(?=[\w\[]|- )")
"""What is there for a relay is commented out without a blank; prose has one."""


def relaying(text: str) -> str:
    """Return a shipped file with its lines for a relay switched on."""
    changed = SWITCHED_OFF.sub(r"\1", text)
    assert changed != text
    return changed


def require_relay(path: Path, environment: dict[str, str]) -> None:
    """Check that this configuration is good, and that its tokens come from the vendor."""
    env = {**os.environ, **environment}
    for command in ("check", "config show"):
        broker = [sys.executable, "-m", "broker", *command.split(), "--config", str(path)]
        done = subprocess.run(broker, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert 'kind = "upstream"' in done.stdout


def with_state_in(folder: Path) -> str:
    """Return the unit's configuration with its state file in a folder that is there.

    systemd makes the unit's own: StateDirectory.  At ports that nobody else has, because `check`
    looks whether they are free.
    """
    text = (CONFIG / "systemd" / "broker.toml").read_text(encoding="utf-8")
    shipped = "sqlite:///var/lib/embed-token-broker/state.db"
    assert tomllib.loads(text)["store"]["url"] == shipped
    assert "StateDirectory=embed-token-broker\n" in UNIT.read_text(encoding="utf-8")
    text = text.replace(shipped, f"sqlite://{folder / 'state.db'}")
    assert "[admin]" not in text
    text = text.replace('"127.0.0.1:8080"', '"127.0.0.1:0"')
    return f'{text}\n[admin]\nlisten = "127.0.0.1:0"\n'


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
            "config/gateway.toml",
            "config/systemd",
            "pyproject.toml",
            "LICENSE",
            "broker",
        }
        for name in copied:
            assert (ROOT / name).exists()
            assert f"\n!{name}\n" in let_in

    def test_the_compose_file_passes_its_schema(self) -> None:
        """That of the compose specification."""
        command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
        assert output_of([*command, str(COMPOSE)]) == "ok -- validation done\n"

    def test_every_file_that_compose_mounts_is_there(self) -> None:
        """And its services are locked in: read-only, no capabilities, on loopback."""
        compose = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
        for name, service in compose["services"].items():
            for mount in service.get("volumes", ()):
                source = mount.partition(":")[0]
                if source.startswith("."):
                    assert (COMPOSE.parent / source).resolve().exists(), (name, source)
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        named = {s for service in compose["services"].values() for s in service.get("secrets", ())}
        assert named == compose["secrets"].keys()

    def test_who_watches_the_broker_finds_it_again_when_it_was_restarted(self) -> None:
        """By the names of services: the network of a container ends with it."""
        services = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
        assert not [name for name, service in services.items() if "network_mode" in service]
        scraping, shipped = (
            yaml.safe_load((CONFIG / folder / "prometheus.yml").read_text(encoding="utf-8"))
            for folder in ("container", "prometheus")
        )
        (job,) = scraping["scrape_configs"]
        (target,) = job["static_configs"][0]["targets"]
        admin = tomllib.loads((CONFIG / "container" / "broker.toml").read_text(encoding="utf-8"))
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

    def test_the_configuration_in_it_is_a_good_one(self) -> None:
        """`broker check` finds its secret files absent here, and nothing else."""
        path = CONFIG / "container" / "broker.toml"
        done = output_of([sys.executable, "-m", "broker", "check", "--config", str(path)])
        assert done == "configuration ok\n"
        given = {f"/run/secrets/{name}" for name in yaml.safe_load(COMPOSE.read_text())["secrets"]}
        text = path.read_text(encoding="utf-8")
        wanted = set(re.findall(r'"(/run/secrets/\w+)"', re.sub(r"(?m)^#.*", "", text)))
        assert wanted <= given

    def test_its_lines_for_a_relay_make_one(self, tmp_path: Path) -> None:
        """With the # taken away in both files: each secret is declared, and given to the broker."""
        path = tmp_path / "broker.toml"
        path.write_text(relaying((CONFIG / "container" / "broker.toml").read_text()))
        require_relay(path, {})
        compose = yaml.safe_load(relaying(COMPOSE.read_text(encoding="utf-8")))
        given = {f"/run/secrets/{name}" for name in compose["services"]["broker"]["secrets"]}
        assert set(re.findall(r'"(/run/secrets/\w+)"', path.read_text())) <= given
        assert set(compose["services"]["broker"]["secrets"]) <= compose["secrets"].keys()

    @pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare"
    )
    def test_the_broker_runs_on_a_read_only_root_as_nobody(self, tmp_path: Path) -> None:
        """No capability, no write anywhere, as the container file and the manifests have it.

        In a mount namespace: it serves, is healthy, and ends within its drain.
        """
        broker = Broker(tmp_path)
        locked = "mount -o remount,bind,ro / && exec setpriv --reuid=10001 --regid=10001"
        locked += " --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs -- "
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
        serving = [*command, f"{locked}{sys.executable} -B -m broker serve"]
        environment = broker.environment()
        health = [sys.executable, "-m", "broker", "healthcheck"]

        def healthy() -> bool:
            done = subprocess.run(health, check=False, capture_output=True, env=environment)
            return done.returncode == 0

        with subprocess.Popen(
            serving, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            try:
                until(lambda: process.poll() is not None or healthy(), "a healthy broker")
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert broker.token()["token"]
                writing = f"{locked}sh -c '! touch /tmp/x /x 2>/dev/null'"
                assert subprocess.run([*command, writing], check=False).returncode == 0
                process.terminate()
                assert process.wait(timeout=9) == 0
            finally:
                process.kill()

    def test_it_builds_and_runs_where_an_engine_is_at_hand(self) -> None:
        """Read-only, not root, healthy, ended within the drain."""
        engine = next((e for e in ("docker", "podman") if _engine_answers(e)), None)
        if engine is None:
            pytest.skip("no container engine answers on this machine")
        tag = f"embed-token-broker-test:{secrets.token_hex(4)}"
        output_of(
            [
                engine,
                "build",
                "-q",
                "-f",
                str(CONFIG / "container" / "Dockerfile"),
                "-t",
                tag,
                str(ROOT),
            ]
        )
        port = free_port()
        command = [engine, "run", "--detach", "--rm", "--read-only", "--cap-drop", "ALL"]
        command += [
            "-p",
            f"127.0.0.1:{port}:8080",
            tag,
            "serve",
            "--dev",
            "--listen",
            "0.0.0.0:8080",
        ]
        name = output_of(command).strip()
        try:
            until(lambda: _ready(f"http://127.0.0.1:{port}/readyz"), "the container")
            assert output_of([engine, "exec", name, "id", "-u"]) == "10001\n"
            assert output_of([engine, "exec", name, "broker", "healthcheck"]) == ""
        finally:
            output_of([engine, "stop", "--time", "20", name])
            output_of([engine, "rmi", tag])


def _ready(url: str) -> bool:
    try:
        return httpx.get(url).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _engine_answers(engine: str) -> bool:
    if shutil.which(engine) is None:
        return False
    done = subprocess.run([engine, "info"], check=False, capture_output=True, timeout=30)
    return done.returncode == 0


def resources() -> Iterator[dict[str, Any]]:
    """Yield every resource of every manifest."""
    for path in MANIFESTS:
        yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))


def pods() -> list[dict[str, Any]]:
    """Return the pods that the manifests make."""
    found = [r["spec"]["template"]["spec"] for r in resources() if r["kind"] == "Deployment"]
    assert len(found) == len(MANIFESTS) == 2
    return found


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all containers of a pod."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


class TestKubernetes:
    @pytest.mark.parametrize("version", KUBERNETES)
    @pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
    def test_manifests_are_valid_strictly(self, path: Path, version: str) -> None:
        """No unknown field, no wrong type, in any version from the first that has sidecars."""
        done = output_of([tool("kubernetes-validate"), "--strict", "-k", version, str(path)])
        assert "passed" in done

    def test_pods_keep_to_the_restricted_profile(self) -> None:
        """The Pod Security Standards, field by field, and a read-only root beyond them."""
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
        gateway, sidecar = pods()
        configured = next(r for r in resources() if r["kind"] == "ConfigMap")["data"]["broker.toml"]
        server = tomllib.loads(configured)["server"]
        drain, lead = (float(server[name].removesuffix("s")) for name in ("drain", "drain_lead"))
        assert gateway["terminationGracePeriodSeconds"] > drain
        probe = gateway["containers"][0]["readinessProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"] < lead
        assert sidecar["terminationGracePeriodSeconds"] > 15 + 15

    def test_the_gateway_s_lines_for_a_relay_make_one(self, tmp_path: Path) -> None:
        """With the # taken away."""
        path = tmp_path / "broker.toml"
        configured = next(r for r in resources() if r["kind"] == "ConfigMap")["data"]["broker.toml"]
        path.write_text(relaying(configured), encoding="utf-8")
        require_relay(path, {})

    def test_the_sidecar_is_a_native_one(self) -> None:
        """It restarts, is started before the backend, and is probed."""
        (broker,) = pods()[1]["initContainers"]
        assert broker["restartPolicy"] == "Always"
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= broker.keys()

    def test_sidecars_keep_within_the_vendor_s_window_through_a_rollout(self) -> None:
        """106 a minute by all pods that live at once: replicas, added ones, and those that end.

        A pod that becomes available lets the next one end, by which time the last has ended.
        """
        (spec,) = [
            r["spec"]
            for r in resources()
            if r["kind"] == "Deployment" and r["metadata"]["name"] == "backend"
        ]
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
        """The gateway's file and the sidecar's variables, each by `broker check`."""
        configured = next(r for r in resources() if r["kind"] == "ConfigMap")["data"]["broker.toml"]
        path = tmp_path / "broker.toml"
        path.write_text(configured, encoding="utf-8")
        check = [sys.executable, "-m", "broker", "check"]
        assert output_of([*check, "--config", str(path)]) == "configuration ok\n"
        (broker,) = pods()[1]["initContainers"]
        variables = {entry["name"]: entry["value"] for entry in broker["env"]}
        done = subprocess.run(
            check, env={**os.environ, **variables}, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, "configuration ok\n"), done.stderr


class TestSystemd:
    @pytest.fixture
    def unit(self, tmp_path: Path) -> Path:
        """The unit, with a program that is on this machine."""
        path = tmp_path / UNIT.name
        text = UNIT.read_text(encoding="utf-8")
        broker = "/opt/embed-token-broker/bin/broker"
        assert f"ExecStart={broker} serve\n" in text
        path.write_text(text.replace(f"={broker} ", "=/bin/true "), encoding="utf-8")
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

    def test_what_it_configures_is_a_good_configuration(self, tmp_path: Path) -> None:
        """The shipped file with the unit's variables; `%d` is where systemd puts credentials."""
        text = UNIT.read_text(encoding="utf-8")
        variables = dict(re.findall(r"(?m)^Environment=(BROKER_\w+__\w+)=(.*)$", text))
        credentials = dict(re.findall(r"(?m)^LoadCredential=(\w+):(\S+)$", text))
        assert {f"%d/{name}" for name in credentials} == set(variables.values())
        for name in credentials:
            (tmp_path / name).write_text(secrets.token_urlsafe(36) + "\n", encoding="utf-8")
        given = {k: v.replace("%d", str(tmp_path)) for k, v in variables.items()}
        config = tmp_path / "broker.toml"
        config.write_text(with_state_in(tmp_path), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "broker", "check", "--config", str(config)],
            env={**os.environ, **given},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "configuration ok\n", "")

    def test_the_lines_for_a_relay_make_one(self, tmp_path: Path) -> None:
        """With the # taken away in unit and file, and the signing key out of the unit."""
        text = relaying(UNIT.read_text(encoding="utf-8"))
        variables = dict(re.findall(r"(?m)^Environment=(BROKER_\w+__\w+)=(.*)$", text))
        credentials = dict(re.findall(r"(?m)^LoadCredential=(\w+):(\S+)$", text))
        assert {f"%d/{name}" for name in credentials} == set(variables.values())
        for name in credentials:
            (tmp_path / name).write_text(secrets.token_urlsafe(36) + "\n", encoding="utf-8")
        path = tmp_path / "broker.toml"
        path.write_text(relaying(with_state_in(tmp_path)))
        given = {k: v.replace("%d", str(tmp_path)) for k, v in variables.items()}
        del given["BROKER_ISSUER__LOCAL__KEYS__MAIN__SECRET_FILE"]
        require_relay(path, given)

    def test_a_rotation_s_commands_do_what_their_page_says(self, tmp_path: Path) -> None:
        """Typed below a folder: the drop-ins hand both secrets over, then the new one stays alone.

        What starts services is left out; a later `Environment=` of a name is the one that counts.
        """
        for folder in ("etc/embed-token-broker/secrets", "etc/systemd/system"):
            (tmp_path / folder).mkdir(parents=True)
        stored = tmp_path / "etc" / "embed-token-broker" / "secrets"
        old = {}
        for name in ("web", "admin", "vendor"):
            old[name] = secrets.token_urlsafe(36)
            (stored / name).write_text(old[name] + "\n", encoding="utf-8")
        (tmp_path / "vendor.key").write_text(secrets.token_urlsafe(36) + "\n", encoding="utf-8")
        _, *steps = [
            block.text for block in BLOCKS if block.heading == "Rotation with the systemd unit"
        ]
        assert len(steps) == 4
        for step, both in zip(steps, (True, False, True, False), strict=True):
            self.typed(step, tmp_path)
            settings = self.handed_over(tmp_path)
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
    def handed_over(root: Path) -> dict[str, Any]:
        """Return what is in force with the unit for a relay and its drop-ins, by `config show`."""
        text = relaying(UNIT.read_text(encoding="utf-8"))
        text = re.sub(r"(?m)^.*signing_key.*\n", "", text).replace("=/etc/", f"={root}/etc/")
        text = text.replace(":/etc/", f":{root}/etc/")
        folder = root / "etc" / "systemd" / "system" / f"{UNIT.name}.d"
        text += "".join(path.read_text() for path in sorted(folder.glob("*.conf")))
        given = root / "given"
        shutil.rmtree(given, ignore_errors=True)
        given.mkdir()
        for name, path in re.findall(r"(?m)^LoadCredential=(\w+):(\S+)$", text):
            shutil.copy(path, given / name)
        variables = dict(re.findall(r"(?m)^Environment=(BROKER_\w+__\w+)=(.*)$", text))
        env = {k: v.replace("%d", str(given)) for k, v in variables.items()}
        config = root / "broker.toml"
        config.write_text(relaying(with_state_in(root)))
        require_relay(config, env)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            shown = output_of(
                [sys.executable, "-m", "broker", "config", "show", "--config", str(config)]
            )
        return tomllib.loads(shown)
