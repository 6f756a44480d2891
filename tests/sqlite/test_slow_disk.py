"""D6, and D1 while it runs: a disk that is slow, or fails, under a real broker (`disk_shim.c`)."""

import asyncio
import secrets
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from processes import Broker, Caller, secret_in, until_true
from test_kill import relay, verified

from broker.testing import FakeVendor, VendorSettings

pytestmark = pytest.mark.parts

SLOW = 3.0
"""Seconds that each fsync takes."""


class House:
    """A relay whose disk does as it is told."""

    def __init__(self, folder: Path, vendor: FakeVendor) -> None:
        self.folder = folder
        self.vendor = vendor
        self.tree = relay(folder, vendor)
        self.secret = secret_in(self.tree["clients"]["web"]["secret_file"])
        self.library = folder / "disk_shim.so"
        source = Path(__file__).with_name("disk_shim.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", self.library, source, "-ldl"], check=True)
        self.told = folder / "disk"
        self.disk("well")

    def disk(self, how: str) -> None:
        self.told.write_text(how)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[tuple[Broker, Caller]]:
        shim = {"LD_PRELOAD": str(self.library), "DISK_SHIM": str(self.told)}
        with Broker.configured(self.folder, self.tree, **shim) as broker:
            async with Caller(broker, self.secret) as caller:
                yield broker, caller


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """A relay on a shim, before a vendor."""
    async with FakeVendor(VendorSettings(ip=None)) as vendor:
        yield House(tmp_path, vendor)


async def revoked(caller: Caller, token: str) -> tuple[int, str]:
    """End a session; returns the status and what was said."""
    async with caller.http.post(
        f"{caller.url}/v1/revoke", data={"token": token}, headers={"api-secret": caller.secret}
    ) as answer:
        return answer.status, await answer.text()


async def state(caller: Caller) -> str:
    """Return what /readyz says."""
    async with caller.http.get(f"{caller.admin_url}/readyz") as answer:
        assert answer.status == 200
        return await answer.text()


async def test_D6_a_slow_disk_delays_no_hit(house: House) -> None:
    """G5: a hit is at once; a mint waits for a second at most; an end waits for the disk."""
    async with house.running() as (broker, caller):
        held = secrets.token_hex(8)
        token = await caller.token(held)
        other = await caller.token(secrets.token_hex(8))
        house.disk(f"slow {SLOW}")
        ending = asyncio.ensure_future(revoked(caller, other))
        await asyncio.sleep(0.1)
        hits = []
        while not ending.done():
            began = time.monotonic()
            assert await caller.token(held) == token
            hits.append(time.monotonic() - began)
            await asyncio.sleep(0.01)
        assert (await ending)[0] == 200, "slow, and yet on the disk"
        assert len(hits) > 10, "none of them waited for the disk"
        assert sorted(hits)[len(hits) // 2] < SLOW / 10
        ending = asyncio.ensure_future(revoked(caller, await caller.token(secrets.token_hex(8))))
        await asyncio.sleep(0.1)
        minted = await caller.token(late := secrets.token_hex(8))
        assert not ending.done(), "the mint did not wait for the whole of it"
        await until_true(lambda: says(caller, "degraded"))
        await ending
        house.disk("well")
        await until_true(lambda: says(caller, '"ok"'))
        assert await caller.metric("broker_state_file_late_total") >= 1
        assert broker.events("broker.state_file_failed")[0]["reason"] == "slow"
        assert broker.events("broker.state_file_recovered")
        assert await asyncio.to_thread(broker.end, signal.SIGKILL) == -signal.SIGKILL
    async with house.running() as (_, caller):
        assert await caller.token(held) == token
        assert await caller.token(late) == minted
        assert await verified(caller, other) == 401


async def says(caller: Caller, word: str) -> bool:
    """Whether /readyz says so."""
    return word in await state(caller)


@pytest.mark.parametrize(("how", "reason"), [("eio", "io"), ("erofs", "io")])
async def test_D1_a_disk_that_fails_while_it_runs(house: House, how: str, reason: str) -> None:
    """Visitors notice nothing; an end is 503 and says so; then all of it is written."""
    async with house.running() as (broker, caller):
        held, late = secrets.token_hex(8), secrets.token_hex(8)
        token, ended = await caller.token(held), await caller.token(secrets.token_hex(8))
        house.disk(how)
        minted = await caller.token(late)
        assert await caller.token(held) == token
        status, said = await revoked(caller, ended)
        assert status == 503
        assert "holds until the broker restarts only" in said
        assert await verified(caller, ended) == 401
        await until_true(lambda: says(caller, "degraded"))
        failed = broker.logged("broker.state_file_failed", 1)
        assert failed[0]["reason"] == reason
        assert failed[0]["detail"]
        house.disk("well")
        await until_true(lambda: says(caller, '"ok"'))
        assert (await revoked(caller, ended))[0] == 200
        assert await asyncio.to_thread(broker.end, signal.SIGKILL) == -signal.SIGKILL
    async with house.running() as (_, caller):
        assert await caller.token(held) == token
        assert await caller.token(late) == minted
        assert await verified(caller, ended) == 401
