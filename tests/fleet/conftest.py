"""Several replicas as real processes: a plain run does not even import these files."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from replicas import UNLIMITED
from servers import StoreServer

from broker.testing import FakeVendor


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave these files alone unless their marker is asked for: their imports may be missing."""
    return True if config.getoption("markexpr") == "not parts" else None


@pytest.fixture
def store(valkey: StoreServer) -> StoreServer:
    """A store without a key in it, shared by the tests that do it no harm."""
    valkey.flush()
    return valkey


@pytest.fixture
async def vendor() -> AsyncIterator[FakeVendor]:
    """A vendor without limits."""
    async with FakeVendor(UNLIMITED, seed=1) as vendor:
        yield vendor
