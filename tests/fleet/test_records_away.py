"""Sessions that were recorded while the store was away are known to the fleet afterwards."""

import asyncio
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from replicas import replica_here, tree_for, until
from servers import StoreServer, store_server, valkey_binary

from broker.app.app import App
from broker.model import Session
from broker.valkey import session_fallback

pytestmark = pytest.mark.parts


@pytest.fixture
def frail() -> Iterator[StoreServer]:
    """A store that the test may kill."""
    with store_server(valkey_binary()) as server:
        yield server


def handed_out() -> Session:
    """Make a session of the vendor's: only its record tells whose it is."""
    now = int(time.time())
    return Session(
        session_id=secrets.token_hex(16),
        client="web",
        agent="A1",
        fingerprint=secrets.token_hex(8),
        model="",
        issued=now,
        expires=now + 3600,
        digest=secrets.token_bytes(32),
    )


async def away_and_back(store: StoreServer, app: App) -> list[Session]:
    """Record sessions in an outage, until the replica has found the store again."""
    store.kill()
    made = [handed_out() for _ in range(50)]
    for session in made:
        await app.parts.session_store.record(session)
    await asyncio.to_thread(store.start)
    shared_backend = app.parts.shared_backend
    assert shared_backend is not None

    async def is_back() -> bool:
        return not shared_backend.is_degraded  # it sees that by itself: it has a heartbeat

    await until(is_back, "the replica to be back")
    return made


async def missing(app: App, made: list[Session]) -> int:
    """Count what a replica does not know."""
    return [await app.parts.session_store.find(session.session_id) for session in made].count(None)


async def test_S1_records_of_an_outage_are_written_when_it_is_over(
    frail: StoreServer, tmp_path: Path
) -> None:
    """In the background: an operator of another replica finds and ends them."""
    tree = tree_for(tmp_path, frail)
    async with replica_here(tree) as one, replica_here(tree) as other:
        made = await away_and_back(frail, one)

        async def is_known() -> bool:
            return await missing(other, made) == 0

        await until(is_known, "the other replica to know all of them")
        assert await other.parts.introspector.end(made[0].session_id, visitor=False) == 1
        assert await one.parts.session_store.find(made[0].session_id) is None


async def test_S1_records_of_an_outage_are_written_on_drain(
    frail: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that goes leaves nothing that only it knew."""
    monkeypatch.setattr(session_fallback, "CATCH_UP", 3600.0)
    tree = tree_for(tmp_path, frail)
    async with replica_here(tree) as other:
        async with replica_here(tree) as one:
            made = await away_and_back(frail, one)
            assert await missing(other, made) == len(made)
        assert await missing(other, made) == 0
