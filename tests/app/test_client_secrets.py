"""A client's secret is changed without a gap: two at once, row N26, on a real process."""

import asyncio
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from processes import AGENT, Broker, good, merged, put, secret_file, secret_in, toml, write

from broker.app import factory
from broker.config import load as config
from broker.config.schema import ConfigError


async def asked(broker: Broker, secret: str) -> int:
    """Ask for a token; returns the status."""
    body = {"agent_id": AGENT, "fingerprint": "beefbeef"}
    async with (
        aiohttp.ClientSession() as http,
        http.post(
            f"{broker.url}/v1/embed-tokens/request", json=body, headers={"api-secret": secret}
        ) as answer,
    ):
        return answer.status


async def test_N26_a_secret_is_changed_while_its_client_asks(tmp_path: Path) -> None:
    """Old alone, both, new alone: whoever follows in that order is never refused."""
    tree = put(good(tmp_path), "limits.fingerprint", {"rate": 60_000, "burst": 10_000})
    old, new = tree["clients"]["web"]["secret_file"], secret_file(tmp_path / "next")
    statuses: Counter[int] = Counter()
    with Broker.configured(tmp_path, tree) as broker:
        using, stop = [secret_in(old)], asyncio.Event()

        async def keep_asking() -> None:
            while not stop.is_set():
                statuses[await asked(broker, using[0])] += 1

        async def reloaded(changed: dict[str, object]) -> None:
            write(tmp_path / "broker.toml", toml(merged(tree, changed)))
            assert (await asyncio.to_thread(broker.reload))["event"] == "broker.reloaded"

        assert await asked(broker, secret_in(new)) == 401
        asking = asyncio.create_task(keep_asking())
        await reloaded({"clients.web.next_secret_file": new})
        assert [await asked(broker, secret_in(each)) for each in (old, new)] == [200, 200]
        using[0] = secret_in(new)
        assert await asked(broker, secret_in(new)) == 200
        stop.set()
        await asking
        stop.clear()
        asking = asyncio.create_task(keep_asking())
        await reloaded({"clients.web.secret_file": new})
        assert await asked(broker, secret_in(old)) == 401
        stop.set()
        await asking
        assert await asyncio.to_thread(broker.end) == 0
    assert statuses.keys() == {200}


def test_N26_the_next_secret_is_held_to_the_same_rules(tmp_path: Path) -> None:
    """Another one than any there is, long enough, in one place; both stand for the same client."""
    tree = good(tmp_path)
    first, other = tree["clients"]["web"]["secret_file"], secret_file(tmp_path / "other")
    both = put(tree, "clients.web.next_secret_file", other)
    one, two = factory.clients(config.load(None, {}, both), {})
    assert (one.name, one.agents) == (two.name, two.agents) == ("web", None)
    assert one.digest != two.digest
    assert ("clients.web.next_secret_file", other) in factory.watched_files(
        config.load(None, {}, both)
    )
    shop = put(both, "clients.shop", {"secret_file": other, "agents": ["A1"]})
    for wrong, told in (
        (
            put(tree, "clients.web.next_secret_file", first),
            "next_secret_file: .*: the same as its secret",
        ),
        (
            shop,
            (
                "clients.shop.secret_file: .*: the same as that of 'web'; a client is known by its"
                " secret: make another one with `broker keys generate`"
            ),
        ),
        (put(tree, "clients.web.next_secret", "short"), "next_secret: shorter than 16 characters"),
        (put(both, "clients.web.next_secret", "x" * 20), "next_secret"),
    ):
        with pytest.raises(ConfigError, match=told):
            factory.clients(config.load(None, {}, wrong), {})
