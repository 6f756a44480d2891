"""A relay whose clock stands still, and a whole broker, each before a vendor of its own."""

from collections.abc import AsyncIterator

import pytest
from relaying import UNLIMITED, House, Relay, broker_before, relaying

from broker.testing import FakeVendor


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    """Service, issuer and client before a vendor; one clock for both, moved by hand."""
    async with relaying() as relay:
        yield relay


@pytest.fixture
async def vendor() -> AsyncIterator[FakeVendor]:
    """A vendor on the system's clocks."""
    async with FakeVendor(UNLIMITED, seed=1) as vendor:
        yield vendor


@pytest.fixture
async def house(vendor: FakeVendor) -> AsyncIterator[House]:
    """A whole broker before `vendor`."""
    async with broker_before(vendor) as house:
        yield house
