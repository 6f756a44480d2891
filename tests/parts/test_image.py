"""The image, built from the shipped file and run as an engine runs it, without one."""

import importlib.metadata
import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import plain
import pytest
from gateways import AGENT
from image import Builder, Image
from running import START, free_port, output_of, tool, until

pytestmark = [
    pytest.mark.parts,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts and changes of user need root"),
]

CONTAINER = Path(__file__).parents[2] / "config" / "container"
LOCK = CONTAINER.parent / "lock" / "runtime.txt"

LARGEST = 100 * 2**20
"""Bytes that the broker may add to its base: its packages have about 40 MiB, compiled."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """Build it once; nothing is kept."""
    folder = tmp_path_factory.mktemp("image")
    builder = Builder(folder)
    try:
        yield builder.build()
    finally:
        builder.clear()


def test_its_last_stage_has_nothing_to_build_or_install_with(
    image: Image, record_property: Callable[[str, object], None]
) -> None:
    """No pip, no compiler, no cache, nothing of the build; all is root's, but the state."""
    found = {path.relative_to(image.root).as_posix(): path for path in image.root.rglob("*")}
    unwanted = re.compile(
        r"(^|/)(pip|pip3|gcc|cc|c\+\+|g\+\+|ld|as|make|ensurepip|runtime\.txt)(-[\d.]+\.dist-info)?$"
        r"|^src/|(^|/)\.cache(/|$)|\.whl$|^var/(cache|lib/apt)/."
    )
    assert [name for name in found if unwanted.search(name)] == []
    compiled = {path.parent.parent for path in image.site.rglob("__pycache__/*.pyc")}
    assert image.site / "broker" / "web" in compiled
    writable = [
        name
        for name, path in found.items()
        if not path.is_symlink() and (path.stat().st_mode & 0o002 or path.stat().st_uid != 0)
    ]
    assert writable == ["tmp", "var/lib/embed-token-broker"]
    assert (found["var/lib/embed-token-broker"].stat().st_mode & 0o777) == 0o700
    size = image.size - image.base_size
    record_property(
        "figure",
        f"image, {image.size / 2**20:.0f} MiB, {size / 2**20:.0f} MiB of them the broker's",
    )
    assert size < LARGEST


def test_its_bill_of_materials_lists_what_is_in_it(image: Image, tmp_path: Path) -> None:
    """As the release workflow makes it, from the lock file: CycloneDX, valid, with hashes."""
    bill = tmp_path / "sbom.json"
    making = [tool("cyclonedx-py"), "requirements", str(LOCK), "--output-reproducible"]
    making += [
        "--pyproject",
        str(CONTAINER.parents[1] / "pyproject.toml"),
        "--mc-type",
        "application",
    ]
    output_of([*making, "--output-format", "JSON", "--output-file", str(bill)])
    read = json.loads(bill.read_text(encoding="utf-8"))
    assert read["bomFormat"] == "CycloneDX"
    assert read["metadata"]["component"]["name"] == "embed-token-broker"
    listed = {entry["name"]: entry["version"] for entry in read["components"]}
    there = {
        _plain(found.name): found.version
        for found in importlib.metadata.distributions(path=[str(image.site)])
    }
    assert there.pop("embed-token-broker")
    assert {name: listed[name] for name in there} == there
    needless = listed.keys() - there.keys()
    assert needless <= set(re.findall(r"(?m)^([\w-]+)==\S+ ; ", LOCK.read_text(encoding="utf-8")))
    assert all(entry["externalReferences"][0]["hashes"] for entry in read["components"])


def test_it_relays_as_nobody_on_a_read_only_root_and_ends_when_told(
    image: Image, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """With what compose mounts for a relay: healthy, a token, a restart that keeps it, exit 0.

    Process 1 of its namespace, user 10001, no capability and none to be had, no place to write but
    its volume.
    """
    made = {name: secrets.token_urlsafe(32) for name in ("web", "admin", "vendor")}
    state = tmp_path / "state"
    mounts = {CONTAINER / "relay.toml": "/etc/embed-token-broker/broker.toml"}
    mounts[state] = "/var/lib/embed-token-broker"
    state.mkdir(mode=0o700)
    os.chown(state, 10001, 10001)
    for name, value in made.items():
        (tmp_path / name).write_text(value + "\n", encoding="utf-8")
        (tmp_path / name).chmod(0o400)
        os.chown(tmp_path / name, 10001, 10001)
        mounts[tmp_path / name] = f"/run/secrets/{name}"
    port, admin = free_port(), free_port()
    with _FakeVendor(made["vendor"]) as vendor:
        variables = {
            "BROKER_SERVER__LISTEN": f"127.0.0.1:{port}",
            "BROKER_ADMIN__LISTEN": f"127.0.0.1:{admin}",
            "BROKER_ISSUER__UPSTREAM__BASE_URL": vendor,
        }
        command = [*image.config["Entrypoint"], *image.config["Cmd"]]
        tokens = []
        for life in ("first", "second"):
            log = tmp_path / f"{life}.log"
            began = time.monotonic()
            with image.container(command, mounts, variables, log) as container:
                until(
                    lambda: container.process.poll() is not None or _is_ready(port),
                    "the container to be ready",
                )
                assert container.process.poll() is None, log.read_text(encoding="utf-8")
                record_property("figure", f"image, ready after {time.monotonic() - began:.2f} s")
                _, *health = image.config["Healthcheck"]["Test"]
                assert container.exec(*health).returncode == 0
                if life == "first":
                    _assert_locked_in(container.pid)
                    tried = container.exec("sh", "-c", "touch /x /tmp/x /opt/x /etc/x; id -u")
                    assert tried.stderr.count("Read-only file system") == 4, tried
                    assert tried.stdout == "10001\n"
                tokens.append(_token(port, made["web"]))
                container.stop()
                assert container.process.wait(timeout=START) == 0, log.read_text(encoding="utf-8")
        assert tokens[0] == tokens[1]


def _assert_locked_in(pid: int) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        if ":\t" in line
    )
    assert status["NSpid"].split()[1:] == ["1"]
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"10001"}
    assert status["NoNewPrivs"] == "1"
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name


class _FakeVendor:
    """`broker fake-vendor`, from this repository, with a key of the test."""

    def __init__(self, key: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "broker", "fake-vendor", "--listen", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "BITHUMAN_API_SECRET": key},
        )

    def __enter__(self) -> str:
        assert self._process.stdout is not None
        url: str = json.loads(self._process.stdout.readline())["url"]
        return url

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def _is_ready(port: int) -> bool:
    try:
        return plain.get(f"http://127.0.0.1:{port}/readyz").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _token(port: int, secret: str) -> str:
    answer = plain.post(
        f"http://127.0.0.1:{port}/v1/embed-tokens/request",
        json={"agent_id": AGENT, "fingerprint": "9f86d081884c7d65"},
        headers={"api-secret": secret},
    )
    token: str = answer.raise_for_status().json()["data"]["token"]
    return token


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
