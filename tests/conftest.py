"""Servers that several suites use: started when the first test asks, killed at the end."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from servers import (
    StoreCluster,
    StoreServer,
    redis_binary,
    store_cluster,
    store_server,
    valkey_binary,
)
from structlog.dev import ConsoleRenderer, plain_traceback

ROOMS_THAT_WAIT = ("fleet", "parts", "vendor", "process", "valkey", "web", "telemetry")
"""Rooms of tests that start processes and wait for them, the slowest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what waits, so that it waits beside everything else and not at the end."""
    here = Path(__file__).parent
    last = len(ROOMS_THAT_WAIT)

    def place(item: pytest.Item) -> int:
        room = item.path.relative_to(here).parts[0]
        return ROOMS_THAT_WAIT.index(room) if room in ROOMS_THAT_WAIT else last

    items.sort(key=place)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured, with their name; it comes from any process of the run."""
    for report in terminalreporter.stats.get("passed", ()):
        for name, value in report.user_properties:
            if name == "figure":
                terminalreporter.write_line(f"{report.nodeid.rpartition('/')[2]}: {value}")


settings.register_profile("broker", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("broker")  # what is slow on a busy machine is no defect
settings.register_profile("again", parent=settings.get_profile("broker"), max_examples=20)


ConsoleRenderer.get_active().exception_formatter = plain_traceback
"""What tests log before a broker configures it: to draw one in colour takes up to seconds."""


@pytest.fixture(scope="session")
def valkey() -> Iterator[StoreServer]:
    """Valkey 9 on a Unix socket; tests flush it, and leave its settings as they were."""
    with store_server(valkey_binary()) as server:
        yield server


@pytest.fixture(scope="session")
def redis7() -> Iterator[StoreServer]:
    """Redis 7 by TCP."""
    with store_server(redis_binary(), tcp=True) as server:
        yield server


@pytest.fixture(scope="session")
def valkey_cluster() -> Iterator[StoreCluster]:
    """Three nodes of Valkey 9."""
    with store_cluster(valkey_binary()) as cluster:
        yield cluster
