"""Servers that several suites use: started when the first test asks, killed at the end."""

from collections.abc import Iterator

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

settings.register_profile("broker", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("broker")  # what is slow on a busy machine is no defect


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
