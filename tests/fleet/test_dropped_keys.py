"""What a signing key signed is gone with the key, wherever it was kept: row N20, real processes."""

import asyncio
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from processes import AGENT, Broker, Tree, good, merged, secret_file, secret_in, toml, write
from replicas import visitor
from servers import StoreServer

pytestmark = pytest.mark.parts


@pytest.fixture(params=["file", "valkey"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Tree:
    """Settings of a broker whose tokens survive it: in a file, or on a server."""
    keys = {kid: {"secret_file": secret_file(tmp_path / kid)} for kid in ("old", "new")}
    store: Mapping[str, Any] = {"url": f"sqlite://{tmp_path / 'state.db'}"}
    if request.param == "valkey":
        server: StoreServer = request.getfixturevalue("store")
        store = {"url": server.url}
    return merged(
        good(tmp_path),
        {
            "issuer.local.keys": keys,
            "issuer.local.signing_key": "old",
            "store": {**store, "encryption_key_file": secret_file(tmp_path / "seal")},
        },
    )


@pytest.fixture
def visitors() -> Iterator[tuple[str, str]]:
    """Two of them."""
    return visitor(), visitor()


async def token(broker: Broker, tree: Tree, fingerprint: str) -> tuple[str, bool]:
    """Ask for a token; returns it, and whether it was a hit."""
    secret = secret_in(tree["clients"]["web"]["secret_file"])
    body = {"agent_id": AGENT, "fingerprint": fingerprint}
    async with (
        aiohttp.ClientSession() as http,
        http.post(
            f"{broker.url}/v1/embed-tokens/request", json=body, headers={"api-secret": secret}
        ) as answer,
    ):
        assert answer.status == 200, await answer.text()
        said = await answer.json()
        return said["data"]["token"], answer.headers["Cache-Status"].endswith("hit")


async def verified(broker: Broker, shown: str) -> int:
    """Show a token to the broker's own verifier."""
    url = f"{broker.url}/v1/embed-tokens/verify"
    async with (
        aiohttp.ClientSession() as http,
        http.get(url, headers={"X-Embed-Token": shown}) as answer,
    ):
        return answer.status


def only_new(tree: Tree) -> Tree:
    """Take the old key out."""
    kept = {"new": tree["issuer"]["local"]["keys"]["new"]}
    return merged(tree, {"issuer.local.keys": kept, "issuer.local.signing_key": "new"})


async def test_N20_a_key_that_is_dropped_while_the_broker_is_down(
    tree: Tree, tmp_path: Path, visitors: tuple[str, str]
) -> None:
    """Its tokens are minted anew; those of the key that stays are hits, in the same start."""
    first, second = visitors
    with Broker.configured(tmp_path, tree) as broker:
        by_old, _ = await token(broker, tree, first)
        write(tmp_path / "broker.toml", toml(merged(tree, {"issuer.local.signing_key": "new"})))
        assert (await asyncio.to_thread(broker.reload))["event"] == "broker.reloaded"
        assert await token(broker, tree, first) == (by_old, True), "turned, not dropped"
        by_new, _ = await token(broker, tree, second)
        assert await asyncio.to_thread(broker.end) == 0
    with Broker.configured(tmp_path, only_new(tree)) as broker:
        again, was_hit = await token(broker, tree, first)
        assert (was_hit, again == by_old) == (False, False)
        assert await verified(broker, again) == 200
        assert await verified(broker, by_old) == 401
        assert await token(broker, tree, second) == (by_new, True)
        assert await asyncio.to_thread(broker.end) == 0


async def test_N20_a_key_that_is_dropped_while_the_broker_runs(
    tree: Tree, tmp_path: Path, visitors: tuple[str, str]
) -> None:
    """By a reload: at once, and it does not come back with a restart, be it a crash."""
    first, _ = visitors
    with Broker.configured(tmp_path, tree) as broker:
        by_old, _ = await token(broker, tree, first)
        write(tmp_path / "broker.toml", toml(only_new(tree)))
        assert (await asyncio.to_thread(broker.reload))["event"] == "broker.reloaded"
        again, was_hit = await token(broker, tree, first)
        assert (was_hit, again == by_old) == (False, False)
        assert await token(broker, tree, first) == (again, True)
        assert await asyncio.to_thread(broker.end, signal.SIGTERM) == 0
    with Broker.configured(tmp_path, only_new(tree)) as broker:
        assert await token(broker, tree, first) == (again, True)
        assert await asyncio.to_thread(broker.end) == 0
