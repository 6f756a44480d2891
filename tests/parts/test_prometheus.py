"""What Prometheus is told under load: valid, the same in both formats, true, and bounded."""

import asyncio
import re
import secrets
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import plain
import pytest
from monitoring import samples
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text
from running import Broker, broker, output_of, until

pytestmark = pytest.mark.parts

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

AGENT = "A78WKV4515"

Series = set[tuple[str, frozenset[tuple[str, str]]]]

LIMITED = {
    "issuer.budget.rate": 6000,
    "issuer.budget.window": 6020,
    "issuer.budget.burst": 20,
    "issuer.budget.max_wait": "100ms",
    "limits.fingerprint.burst": 8,
    "limits.fingerprint_mints.burst": 2,
    "limits.agent.burst": 60,
    "limits.agent.overrides.tight.burst": 1,
    "limits.client.rate": 24000,  # 400 a second: met on a slow machine, too
    "limits.client.burst": 400,
}
"""A broker whose every limit is met within a second of load."""


class Client:
    """Asks for tokens and counts what it is refused, by the name in the message."""

    def __init__(self, started: Broker) -> None:
        self._broker = started
        self.statuses: Counter[int] = Counter()
        self.refusals: Counter[str] = Counter()

    async def crowd(self) -> None:
        """One round of everything at once: newcomers, a hammering visitor, strangers, mistakes."""
        known = secrets.token_hex(8)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=64), headers={"api-secret": self._broker.secret}
        ) as self._session:
            await self._request_token(known)
            await asyncio.gather(
                *(self._request_token(secrets.token_hex(8)) for _ in range(120)),
                *(self._request_token(known) for _ in range(20)),
                *(self._request_token(secrets.token_hex(8), agent="tight") for _ in range(20)),
                *(self._request_token("not hex") for _ in range(5)),
            )
            visitor = secrets.token_hex(8)
            for _ in range(5):
                await self._request_token(visitor, fresh=True)
            await asyncio.gather(
                *(self._request_token(known, secret=secrets.token_hex(16)) for _ in range(40))
            )

    async def exhaust_the_client(self) -> None:
        """More requests at once than the client's limit admits."""
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=64), headers={"api-secret": self._broker.secret}
        ) as self._session:
            known = secrets.token_hex(8)
            for _ in range(20):  # a busy machine may ask more slowly than the bucket refills
                await asyncio.gather(*(self._request_token(known) for _ in range(2000)))
                if self.refusals["client"]:
                    return

    async def _request_token(
        self, visitor: str, *, agent: str = AGENT, fresh: bool = False, secret: str = ""
    ) -> None:
        body = {"agent_id": agent, "fingerprint": visitor, "fresh": fresh}
        headers = {"api-secret": secret} if secret else {}
        async with self._session.post(
            self._broker.token_url, json=body, headers=headers
        ) as response:
            answer = await response.json()
        self.statuses[response.status] += 1
        if response.status == 429:
            self.refusals[re.findall(r"limit (\w+) reached", answer["error"]["message"])[0]] += 1
        elif response.status == 503:
            self.refusals["budget"] += 1


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Run a broker of which every limit is soon met."""
    with broker(tmp_path_factory.mktemp("broker"), LIMITED) as started:
        yield started


@pytest.fixture(scope="module")
def loaded(limited: Broker) -> Client:
    """Load until every limit has refused."""
    client = Client(limited)
    asyncio.run(client.crowd())
    asyncio.run(client.crowd())
    asyncio.run(client.exhaust_the_client())
    return client


def scrape(started: Broker, accept: str = "") -> str:
    """Return the exposition of a broker."""
    response = plain.get(f"{started.admin_url}/metrics", headers={"Accept": accept})
    assert response.status_code == httpx.codes.OK
    return response.text


def series_of(families: Any) -> Series:
    """Return every series by name and labels, but for the times of creation."""
    return {
        (sample.name, frozenset(sample.labels.items()))
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_promtool_accepts_the_metrics(limited: Broker, loaded: Client) -> None:
    """Names, units and help texts follow Prometheus' conventions, under load, too."""
    assert output_of(["promtool", "check", "metrics"], scrape(limited)) == ""


def test_m3_both_exposition_formats_tell_the_same(limited: Broker, loaded: Client) -> None:
    """The text format and OpenMetrics parse, and hold the same series."""
    text = series_of(parse_text(scrape(limited)))
    openmetrics = scrape(limited, OPENMETRICS)
    assert openmetrics.endswith("# EOF\n")
    assert series_of(parse_openmetrics(openmetrics)) == text
    assert len(text) > 100


def test_m3_rejections_equal_the_refusals_that_clients_counted(
    limited: Broker, loaded: Client
) -> None:
    """Every 429 by its limit, every 503 as budget: broker and clients count the same."""
    counted = samples(scrape(limited), "broker_rejections_total")
    assert counted == {name: float(loaded.refusals[name]) for name in counted}
    assert set(loaded.refusals) == set(counted), "a limit was never met: the test proves too little"
    requests = samples(scrape(limited), "broker_requests_total")
    assert requests["limited"] == loaded.statuses[429]
    assert requests["shed"] == loaded.statuses[503]
    assert sum(requests.values()) == sum(loaded.statuses.values())


VISITORS = 20_000
"""Many times the series that there are, on 1,000 agents; tests/telemetry has more in a process."""


def test_m3_the_number_of_series_is_constant_under_20_000_visitors(tmp_path: Path) -> None:
    """Every series is there from the start; agents and visitors add none."""
    script = tmp_path / "strangers.lua"
    script.write_text(STRANGERS, encoding="utf-8")
    roomy = {
        "limits.agent.rate": 6_000_000,
        "limits.agent.burst": 1_000_000,
        "limits.fingerprint.burst": 3600,  # a bucket is kept for an hour, however slow this is
    }
    with broker(tmp_path, roomy) as started:
        before = series_of(parse_text(scrape(started)))
        rounds = iter(range(1000))

        def enough() -> bool:
            command = ["wrk", "-t1", "-c16", "-d1", "-s", str(script), started.token_url]
            subprocess.run(
                [*command, "--", started.secret, str(next(rounds))],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            tracked = samples(scrape(started), "broker_buckets_tracked")
            return tracked["fingerprint"] >= VISITORS

        until(enough, f"{VISITORS} visitors", timeout=400)
        after = scrape(started)
        statuses = samples(after, "broker_requests_total")
    assert series_of(parse_text(after)) == before
    assert statuses["minted"] >= VISITORS
    assert statuses["failed"] == statuses["shed"] == 0


STRANGERS = """
local secret, round, seen = "", 0, 0
function init(args)
  secret, round = args[1], tonumber(args[2])
end
function request()
  seen = seen + 1
  local body = string.format(
    '{"agent_id":"agent-%d","fingerprint":"%04x%08x"}', seen % 1000, round, seen)
  return wrk.format("POST", nil, {["api-secret"] = secret}, body)
end
"""
"""Nobody comes twice, on 1,000 agents."""
