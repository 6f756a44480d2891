"""Suites that need real parts: a plain run does not even import them."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from website import Website

NODE = Path(__file__).with_name("node")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave these files alone unless their marker is asked for: their imports may be missing."""
    return True if config.getoption("markexpr") == "not parts" else None


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install what the lock file lists, without running anything of it; returns the folder."""
    from running import output_of

    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(NODE / name, folder)
    output_of(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)])
    return folder


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Run one browser for all tests of a module."""
    from browsing import chromium

    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Website]":
    """Run one site, and a development broker behind it, whose buckets refill slowly."""
    from running import broker
    from website import website

    slow = {"limits.fingerprint.rate": 1}
    with broker(tmp_path_factory.mktemp("broker"), slow) as running, website(running) as started:
        yield started
