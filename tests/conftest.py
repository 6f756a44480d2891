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

LONGEST = (
    "telemetry/test_dead_logs.py", "fleet/test_budget_alone.py", "parts/test_page.py",
    "parts/test_image.py", "valkey/test_shared_stalls.py", "parts/test_snippets.py",
    "app/test_memory.py", "vendor/test_pass_through.py", "config/test_json_schema.py",
    "web/test_connections.py", "vendor/test_egress.py", "limits/test_buckets.py",
    "fleet/test_store_clocks.py", "process/test_signals.py", "fleet/test_bad_replies.py",
    "process/test_hung_workers.py", "vendor/test_budget.py", "web/test_families.py",
    "app/test_background.py", "parts/test_wheel.py", "parts/test_gateways.py",
    "vendor/test_outage.py", "sqlite/test_kill.py", "parts/test_page_quality.py",
)  # fmt: skip
"""Files that take longest, by CPU and by waiting: the run ends with none of them."""

ROOMS_THAT_WAIT = (
    "fleet", "parts", "vendor", "process", "sqlite", "valkey", "web", "telemetry", "cli", "app",
)  # fmt: skip
"""Rooms of tests that start processes and wait for them, the slowest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what waits, so that it waits beside everything else and not at the end."""
    here = Path(__file__).parent
    if missing := [name for name in (*LONGEST, *ROOMS_THAT_WAIT) if not (here / name).exists()]:
        raise pytest.UsageError(f"tests/conftest.py puts {missing} first, and there is no such")
    first, rooms, last = len(LONGEST), len(ROOMS_THAT_WAIT), len(LONGEST) + len(ROOMS_THAT_WAIT)
    places = {here / name: place for place, name in enumerate(LONGEST)}
    by_room = dict(zip(ROOMS_THAT_WAIT, range(first, first + rooms), strict=True))

    def place(item: pytest.Item) -> int:
        room = item.path.relative_to(here).parts[0]
        return places.get(item.path, by_room.get(room, last))

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
