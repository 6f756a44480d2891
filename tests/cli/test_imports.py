"""What a command loads: most of the time of a short one is imports."""

import json
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment, good, put, toml, write

SLOW = {
    "aiohttp",
    "asyncio",
    "cryptography",
    "jwt",
    "prometheus_client",
    "redis",
    "structlog",
    "uvloop",
}
"""What takes as long to import as everything that a short command needs."""

LOADED = """
import contextlib, io, json, sys
from broker.cli import main

said = io.StringIO()
with contextlib.redirect_stdout(said):
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:
        code = end.code
json.dump([code, said.getvalue() != "", sorted(sys.modules)], sys.stdout)
"""


def loaded(*arguments: str, **variables: str) -> set[str]:
    """Run a command that shall end well and say something; returns the modules it has loaded."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments],
        capture_output=True,
        env=environment(**variables),
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code, has_spoken, modules = json.loads(done.stdout)
    assert (code, has_spoken) == (0, True)
    return set(modules)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["help", "serve"],
        ["completion", "bash"],
        ["config", "example", "relay"],
        ["serve", "--help"],
        ["keys", "generate"],
        ["mint", "--help"],
    ],
)
def test_command_without_settings_loads_no_part_of_a_server(arguments: list[str]) -> None:
    """Nor what reads settings."""
    modules = loaded(*arguments)
    assert modules & SLOW == set()
    assert "broker.config.load" not in modules


@pytest.mark.parametrize("command", ["config show", "keys list", "store acl"])
def test_command_that_reads_settings_loads_no_server(command: str, tmp_path: Path) -> None:
    """Neither with keys in the configuration."""
    path = write(tmp_path / "broker.toml", toml(good(tmp_path)))
    assert loaded(*command.split(), "--config", path) & SLOW == set()


def test_keys_are_turned_without_a_server(tmp_path: Path) -> None:
    """Nor with keys in a file of their own."""
    tree = put(good(tmp_path), "issuer.local", {"keys_file": str(tmp_path / "keys.json")})
    path = write(tmp_path / "broker.toml", toml(tree))
    for command in ("rotate", "list"):
        assert loaded("keys", command, "--config", path) & SLOW == set()


def test_relay_is_shown_without_a_server() -> None:
    """With a proxy from the environment, whose address has to be understood."""
    key, proxy = secrets.token_urlsafe(24), "http://proxy.example:3128"
    modules = loaded("config", "show", BITHUMAN_API_SECRET=key, HTTPS_PROXY=proxy)
    assert modules & SLOW == set()
    assert "broker.issuers.vendor.egress" in modules
