"""A broker with the default limits, and a way to start others."""

from collections.abc import AsyncIterator

import pytest
from edge import Edge, raise_file_limit, serving


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    """A broker with default settings, whose clock stands still."""
    async with serving() as edge:
        yield edge


@pytest.fixture(autouse=True, scope="session")
def _many_files() -> None:
    raise_file_limit()
