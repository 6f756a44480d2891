"""The vendor's other routes through processes of their own: what is counted, and what they hold."""

import asyncio
import re
import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
from processes import TIMEOUT, Caller, Tree, secret_file, secret_in
from test_workers import WORKERS, Workers

from broker.testing import FakeVendor, VendorSettings, faults

MEBIBYTE = 1024 * 1024
LARGE = 100 * MEBIBYTE

SPARE = 24 * MEBIBYTE
"""Bytes by which a process may grow that passes several hundred megabytes on: buffers, and what
the allocator keeps."""


@pytest.fixture
async def vendor() -> AsyncIterator[FakeVendor]:
    """Run a vendor that has no limits."""
    async with FakeVendor(VendorSettings(ip=None), seed=1) as vendor:
        yield vendor


@pytest.fixture
def tree(vendor: FakeVendor, tmp_path: Path) -> Tree:
    """A relay whose one client may have everything passed on."""
    web = {"secret_file": secret_file(tmp_path / "web"), "agents": ["*"], "pass_through": True}
    (tmp_path / "vendor").write_text(vendor.secret.reveal(), encoding="utf-8")
    upstream = {"base_url": vendor.url, "pass_through": ["/v1/*"]}
    return {
        "server": {"listen": "127.0.0.1:0", "drain": "5s", "drain_lead": "0s"},
        "admin": {"listen": "127.0.0.1:0"},
        "clients": {"web": web},
        "issuer": {
            "kind": "upstream",
            "upstream": upstream | {"api_secret_files": [str(tmp_path / "vendor")]},
        },
    }


@pytest.fixture
def workers(tmp_path: Path, tree: Tree) -> Iterator[Workers]:
    """Run two workers."""
    with Workers.on(tmp_path, tree) as running:
        yield running


def peak(pid: int) -> int:
    """Return the most memory that a process has had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_two_workers_pass_on_and_count_as_one_broker(
    vendor: FakeVendor, workers: Workers, tree: Tree
) -> None:
    """Both take part; each answer is whole; neither grows with what goes through it."""
    secret = secret_in(tree["clients"]["web"]["secret_file"])
    key = vendor.add_secret().reveal()
    headers = {"api-secret": key, "Authorization": f"Bearer {secret}", "Connection": "close"}
    vendor.fail(faults.large(LARGE), path="/v1/large")
    vendor.fail(faults.large(LARGE, framed=False), path="/v1/chunked")

    async def fetch(target: str) -> int:
        got = 0
        async with (
            aiohttp.ClientSession(headers=headers) as http,
            http.get(workers.url + target) as response,
        ):
            assert response.status == 200
            async for chunk in response.content.iter_any():
                got += len(chunk)
        return got

    def workers_seen() -> set[str]:
        ids = (call.request_id or "" for call in vendor.journal.records)
        return {each.partition("-")[0] for each in ids}

    asked = 0
    async with asyncio.timeout(TIMEOUT):
        while len(workers_seen()) < WORKERS:
            await asyncio.gather(*(fetch("/v1/agents") for _ in range(8)))
            asked += 8
    before = {number: peak(pid) for number, pid in workers.pids().items()}
    sizes = await asyncio.gather(*(fetch(f"/v1/{n}") for n in ("large", "chunked") * 2))
    assert sizes == [LARGE] * 4
    grown = {number: peak(pid) - before[number] for number, pid in workers.pids().items()}
    print("grew by", {number: f"{size / MEBIBYTE:.1f} MiB" for number, size in grown.items()})
    assert max(grown.values()) < SPARE
    async with Caller(workers, secret) as caller:
        done = await caller.metric('broker_pass_through_requests_total{outcome="2xx"}')
        assert done == asked + 4
        assert await caller.metric("broker_pass_through_in_flight") == 0
    assert secrets.compare_digest(vendor.journal.records[-1].secret or "", digest_of(vendor, key))


def digest_of(vendor: FakeVendor, key: str) -> str:
    """Return what the journal has of a key."""
    return vendor.add_secret(key).digest().hex()
