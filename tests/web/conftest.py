"""A broker with the default limits, and a way to start others."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from edge import Edge, hang_up, raise_file_limit, serving


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    """A broker with default settings, whose clock stands still."""
    async with serving() as edge:
        yield edge


@pytest.fixture(autouse=True)
async def _no_connection_is_left() -> AsyncIterator[None]:
    yield
    hang_up()
    await asyncio.sleep(0)  # transports close their sockets in the next turn


@pytest.fixture(autouse=True, scope="session")
def _many_files() -> None:
    raise_file_limit()
