"""What is shipped: wheel, sdist and zipapp, built, installed where nothing else is, and used.

pytest -m parts tests/parts/test_wheel.py -s     prints sizes and start-up times
"""

import asyncio
import json
import re
import secrets
import shlex
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from documents import under
from processes import AGENT, TIMEOUT, Caller, Executed, environment

pytestmark = pytest.mark.parts

ROOT = Path(__file__).resolve().parents[2]

PEX = Path(sys.executable).with_name("pex")
"""What makes the zipapp, beside this Python."""

BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # which they change
print(build_meta.build_wheel(folder), build_meta.build_sdist(folder))
"""
"""What a build front end does, without one."""

EXAMPLES = {
    "relay": "relay.toml",
    "signer": "signer.toml",
    "gateway": "gateway.toml",
    "relay --unit": "embed-token-broker.service",
}


class Artefacts(NamedTuple):
    """What was built, and where the wheel is installed: a virtual environment."""

    wheel: Path
    sdist: Path
    home: Path

    @property
    def python(self) -> Path:
        return self.home / "bin" / "python"

    @property
    def broker(self) -> Path:
        return self.home / "bin" / "broker"


def typed(*command: object, folder: Path, stdin: str = "", **variables: str) -> str:
    """Run a command that shall end well; returns what it prints."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        input=stdin,
        cwd=folder,
        env=environment(**variables),
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def clone(folder: Path) -> list[str]:
    """Copy what git knows into a folder, links as links; returns the names."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "broker", "config", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = listed.rstrip("\0").split("\0")
    for name in names:
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            copy.symlink_to((ROOT / name).readlink())
        else:
            copy.write_bytes((ROOT / name).read_bytes())
    return names


def pip(*words: object, folder: Path) -> str:
    """Run pip of this Python, for whatever environment the words name."""
    quiet = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q")
    return typed(*quiet, *words, folder=folder, HOME=str(Path.home()))


def environment_in(folder: Path) -> Path:
    """Make an empty virtual environment; a pip of its own would take seconds of CPU."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    """Wheel and sdist of a fresh clone; the wheel is installed, with its locked dependencies."""
    folder = tmp_path_factory.mktemp("built")
    clone(folder / "clone")
    home = environment_in(folder / "home")
    of_it = ("--python", home / "bin" / "python")
    install = (*of_it, "install", "--no-compile")  # Python compiles what is used
    pip(*install, "setuptools>=77", folder=folder)
    names = typed(home / "bin" / "python", "-c", BUILD, folder, folder=folder / "clone")
    wheel, sdist = (folder / name for name in names.split()[-2:])
    pip(*of_it, "uninstall", "-y", "setuptools", folder=folder)
    lock = ROOT / "config" / "lock" / "runtime.txt"
    pip(*install, "--require-hashes", "-r", lock, folder=folder)
    pip(*install, "--no-deps", wheel, folder=folder)
    return Artefacts(wheel, sdist, home)


@pytest.fixture
def installed(built: Artefacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artefacts:
    """The same, from a folder of its own: nothing of the clone is on the way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "executable", str(built.python))  # `Executed` starts that one
    where = typed(built.python, "-c", "import broker; print(broker.__file__)", folder=tmp_path)
    assert where.startswith(str(built.home))
    return built


def test_wheel_and_sdist_have_every_file_of_the_package(built: Artefacts, tmp_path: Path) -> None:
    """Packages, scripts for the store, pages, examples; pages for developers stay out."""
    names = clone(tmp_path / "clone")
    ours = {name for name in names if name.startswith("broker/") and not name.endswith(".md")}
    with zipfile.ZipFile(built.wheel) as wheel:
        assert ours <= set(wheel.namelist())
        in_wheel = {name: wheel.read(name) for name in ours}
    with tarfile.open(built.sdist) as sdist:
        packed = {m.name.partition("/")[2]: m for m in sdist.getmembers() if m.isfile()}
        assert ours | {"pyproject.toml", "LICENSE"} <= set(packed)
    assert in_wheel == {name: (ROOT / name).read_bytes() for name in ours}
    print(f"\nwheel {built.wheel.stat().st_size:,} B, sdist {built.sdist.stat().st_size:,} B")


def test_the_sdist_builds_the_same_wheel(built: Artefacts, tmp_path: Path) -> None:
    """Who packages the broker has the sdist alone."""
    pip("wheel", "--no-deps", "-w", tmp_path, built.sdist, folder=tmp_path)
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(built.wheel) as other:
        assert {i.filename: i.CRC for i in one.infolist() if "RECORD" not in i.filename} == {
            i.filename: i.CRC for i in other.infolist() if "RECORD" not in i.filename
        }


def test_the_metadata_is_of_its_own(built: Artefacts) -> None:
    """Licence, a description that has no relative links, no address that nobody has."""
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith("/METADATA")]
        told = wheel.read(name).decode()
    assert "License-Expression: MIT\n" in told
    assert "Summary: An async sidecar" in told
    assert "](" not in told
    assert "broker serve --dev" in told


async def test_the_installed_wheel_serves(installed: Artefacts, tmp_path: Path) -> None:
    """Tokens, the API document, its page, the script for pages; it starts as fast as a clone."""
    secret = secrets.token_urlsafe(24)
    words = ("--dev", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
    with Executed(*words, logs=tmp_path, BROKER_DEV_SECRET=secret) as broker:
        async with Caller(broker, secret) as caller:
            assert (await caller.token("9f86d081884c7d65")).count(".") == 2
            for path in ("/docs", "/openapi.json", "/embed.js", "/demo"):
                async with caller.http.get(broker.url + path) as answer:
                    assert answer.status == 200, path
                    assert len(await answer.read()) > 200, path
    print(f"\nfrom the wheel: serves after {broker.seconds_to_start:.2f} s")
    began = time.perf_counter()
    typed(installed.broker, "version", folder=tmp_path)
    print(f"`broker version`: {time.perf_counter() - began:.2f} s")


def test_the_installed_wheel_prints_the_files_of_the_repository(
    installed: Artefacts, tmp_path: Path
) -> None:
    """To the letter; they are there once, and linked."""
    for words, name in EXAMPLES.items():
        shown = typed(installed.broker, "config", "example", *words.split(), folder=tmp_path)
        link = ROOT / "broker" / "cli" / "examples" / name
        assert link.is_symlink()
        assert link.resolve().is_relative_to(ROOT / "config")
        assert shown == link.read_text(encoding="utf-8")
    acl = typed(installed.broker, "store", "acl", folder=tmp_path)  # reads every script
    assert "+evalsha" in acl


async def test_from_the_wheel_to_a_first_token(installed: Artefacts, tmp_path: Path) -> None:
    """`init`, and what it prints; the vendor is the fake one of the same wheel."""
    key = secrets.token_urlsafe(24)
    began = time.perf_counter()
    vendor = await asyncio.create_subprocess_exec(
        *(str(installed.broker), "fake-vendor", "--listen", "127.0.0.1:0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(BITHUMAN_API_SECRET=key),
    )
    try:
        assert vendor.stdout is not None
        line = await asyncio.wait_for(vendor.stdout.readline(), TIMEOUT)
        init = ("init", "--kind", "relay", "--agent", AGENT, "--vendor-key-file", "-")
        listens = ("--listen", f"unix:{tmp_path}/s", "--admin-listen", f"unix:{tmp_path}/a")
        where = ("--folder", tmp_path / "made", "--base-url", json.loads(line)["url"])
        told = await asyncio.to_thread(
            typed, installed.broker, *init, *where, *listens, folder=tmp_path, stdin=key
        )
        check, serve, mint = re.findall(r"^  (\S.*)$", told, re.MULTILINE)[:3]
        assert await asyncio.to_thread(typed, *shlex.split(check), folder=tmp_path)
        words = shlex.split(serve)
        assert words[:2] == [str(installed.broker), "serve"]
        with Executed(*words[2:], logs=tmp_path) as broker:
            token = await asyncio.to_thread(typed, "sh", "-c", mint, folder=tmp_path)
            assert token.count(".") == 2
            assert broker.end() == 0
    finally:
        vendor.kill()
        await vendor.communicate()
    print(f"\nfrom init to a first token: {time.perf_counter() - began:.1f} s")


async def test_the_zipapp_serves(installed: Artefacts, tmp_path: Path) -> None:
    """One file, by the line of the page, made of what is installed; then it needs Python alone."""
    (line,) = [row for row in under("One file", "sh").text.splitlines() if "pex" in row]
    command = line.partition(" && ")[2]  # its first half installs the tool, which is here
    command = command.replace(".venv/bin/pex", str(PEX)).replace(".venv", str(installed.home))
    typed("sh", "-c", command, folder=tmp_path, PEX_ROOT=str(tmp_path / "root"))
    app = tmp_path / "broker.pyz"
    secret, socket = secrets.token_urlsafe(24), tmp_path / "s"
    began = time.perf_counter()
    given = environment(PEX_ROOT=str(tmp_path / "root"), BROKER_DEV_SECRET=secret)
    words = ("serve", "--dev", "--listen", f"unix:{socket}", "--admin-listen", f"unix:{socket}a")
    with (tmp_path / "log").open("wb") as log:
        running = await asyncio.create_subprocess_exec(
            str(app), *words, stdout=subprocess.PIPE, stderr=log, env=given, cwd=tmp_path
        )
    try:
        assert running.stdout is not None
        told = json.loads(await asyncio.wait_for(running.stdout.readline(), 2 * TIMEOUT))
        took = time.perf_counter() - began
        assert told["api_secret"] == secret
        token = await asyncio.to_thread(
            typed,
            *(app, "mint", AGENT, "--fingerprint", "9f86d081884c7d65", "--url", f"unix:{socket}"),
            folder=tmp_path,
            BROKER_API_SECRET=secret,
            PEX_ROOT=str(tmp_path / "root"),
        )
        assert token.count(".") == 2
        running.terminate()
        assert await asyncio.wait_for(running.wait(), TIMEOUT) == 0
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()
    again = time.perf_counter()
    typed(app, "version", folder=tmp_path, PEX_ROOT=str(tmp_path / "root"))
    print(
        f"\nzipapp {app.stat().st_size:,} B; serves after {took:.2f} s when it unpacks,"
        f" `version` then {time.perf_counter() - again:.2f} s"
    )
