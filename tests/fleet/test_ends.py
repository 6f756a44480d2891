"""A visitor who was ended on one replica is over on the other from its next request on: G9."""

import asyncio
from pathlib import Path

import pytest
from replicas import replica_here, replicas, tree_for, visitor
from servers import StoreServer

from broker.errors import ServiceUnavailable
from broker.testing import FakeVendor
from broker.testing.vendor import faults

pytestmark = pytest.mark.parts


async def test_G9_an_ended_visitor_is_given_nothing_of_before(
    store: StoreServer, vendor: FakeVendor, tmp_path: Path
) -> None:
    """Held, held in the other replica's front, and being minted there at that very moment."""
    tree = tree_for(tmp_path, store, vendor)
    async with replicas(tmp_path, tree) as fleet, replica_here(tree) as ender:
        fingerprint, stranger = visitor(), visitor()
        before = [(await replica.request_token(fingerprint)).token for replica in fleet]
        strangers = [(await replica.request_token(stranger)).token for replica in fleet]
        await ender.parts.store.revoke_visitor("web", fingerprint)
        after = [(await replica.request_token(fingerprint)).token for replica in fleet]
        assert len(set(before)) == len(set(after)) == 1
        assert set(before).isdisjoint(after)
        assert [(await replica.request_token(stranger)).token for replica in fleet] == strangers

        newcomer = visitor()
        with vendor.fail(faults.slow(1.0), times=1) as slow:
            minting = asyncio.create_task(fleet[0].request_token(newcomer))
            async with asyncio.timeout(20):
                await vendor.journal.arrived(4)
            assert slow.met == 1
            waiting = asyncio.create_task(fleet[1].request_token(newcomer))
            await asyncio.sleep(0.3)
            await ender.parts.store.revoke_visitor("web", newcomer)
            refused, waited = await minting, await waiting
        assert refused.status == 503, "its token was minted before the end"
        assert int(refused.headers["Retry-After"]) >= 1
        assert waited.status == 200, "whoever waited elsewhere mints anew"
        sessions = [(await replica.request_token(newcomer)).session for replica in fleet]
        assert sessions == [waited.session] * 2
        assert len(vendor.journal.calls) == 5
        print("ended while it was minted: 503 there, a token of another session on the other")


async def test_G9_an_end_that_the_store_cannot_take_is_refused(
    store: StoreServer, tmp_path: Path
) -> None:
    """It must hold for every replica, or it is not said to have happened."""
    async with replica_here(tree_for(tmp_path, f"unix://{tmp_path}/nobody")) as ender:
        with pytest.raises(ServiceUnavailable):
            await ender.parts.store.revoke_visitor("web", visitor())
