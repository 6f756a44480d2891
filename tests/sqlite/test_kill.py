"""G11: `kill -9` at any moment: real processes, a real file, the fake vendor's journal."""

import asyncio
import random
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from processes import (
    AGENT,
    TIMEOUT,
    Broker,
    Caller,
    Tree,
    environment,
    good,
    merged,
    secret_file,
    secret_in,
    until,
    write,
)
from state_files import copied, records_in

from broker.model import Secret
from broker.sqlite.records import TokenRow
from broker.testing import FakeVendor, VendorSettings

KILLS = 50
ROOMY: Tree = {"rate": 1_000_000, "burst": 1_000_000}


def relay(folder: Path, vendor: FakeVendor) -> Tree:
    """A relay with a file, whose budget and limits are far away."""
    paid = write(folder / "vendor", vendor.secret.reveal() + "\n")
    return merged(
        good(folder),
        {
            "issuer": {
                "kind": "upstream",
                "upstream": {"base_url": vendor.url, "api_secret_files": [paid]},
                "budget": {"rate": 60_000, "per": "60s", "burst": 1_000, "window": 61_000},
            },
            "admin.secret_file": secret_file(folder / "admin"),
            "store.url": f"sqlite://{folder / 'state.db'}",
            **{f"limits.{kind}": ROOMY for kind in ("fingerprint", "fingerprint_mints", "agent")},
        },
    )


SEED = {"PYTHONHASHSEED": "0"}
"""For brokers, so that it is known who shares a cell of `stores.epochs`: to end one ends both."""

_STRANGERS = """
import secrets
from broker.model import visitor_of
from broker.stores.epochs import CELLS
drawn = (secrets.token_hex(8) for _ in range(20_000))
print(*{hash(visitor_of("web", name)) % CELLS: name for name in drawn}.values())
"""


def strangers() -> list[str]:
    """Return visitors of whom no two share a cell."""
    command = [sys.executable, "-c", _STRANGERS]
    done = subprocess.run(command, env=environment(**SEED), capture_output=True, check=True)
    return done.stdout.decode().split()


class Crowd:
    """Visitors who ask at random, some of whom end their session; what they were answered."""

    def __init__(self, tree: Tree) -> None:
        self.strangers = strangers()
        self.secret = secret_in(tree["clients"]["web"]["secret_file"])
        self.admin = secret_in(tree["admin"]["secret_file"])
        self.tokens: dict[str, str] = {}
        self.ended: dict[str, str] = {}
        self.unsure: set[str] = set()

    async def live(self, caller: Caller) -> None:
        """Ask, again and again, until the broker is gone."""
        try:
            while True:
                await self.act(caller)
        except (aiohttp.ClientError, OSError):
            return

    async def act(self, caller: Caller) -> None:
        if self.tokens and random.random() < 0.3:
            known = random.choice(list(self.tokens))
            if known not in self.unsure:
                token = await caller.token(known)
                assert known in self.unsure or token == self.tokens[known]
            return
        if len(self.tokens) > 5 and random.random() < 0.1:
            await self.end(caller, random.choice(list(self.tokens)))
            return
        visitor = self.strangers.pop()
        token = await caller.token(visitor)
        self.tokens[visitor] = token

    async def end(self, caller: Caller, visitor: str) -> None:
        """Have a token revoked; between question and answer nobody knows."""
        if visitor in self.unsure:
            return
        self.unsure.add(visitor)
        token = self.tokens.pop(visitor)
        async with caller.http.post(
            f"{caller.url}/v1/revoke", data={"token": token}, headers={"api-secret": self.secret}
        ) as answer:
            assert answer.status == 200, await answer.text()
        self.ended[visitor] = token

    async def check(self, caller: Caller, vendor: FakeVendor, most: int = 2**31) -> None:
        """Ask for what was answered, or so many of it: it is there, nothing is minted anew."""
        before = len(vendor.journal.calls)
        known = list(self.tokens.items())
        for visitor, token in random.sample(known, min(len(known), most)):
            status, body, answer = await caller.request_token(visitor)
            assert status == 200, body
            assert body["data"]["token"] == token
            assert answer.headers["Cache-Status"].endswith("hit")
        assert len(vendor.journal.calls) == before
        for token in random.sample(list(self.ended.values()), min(len(self.ended), 20)):
            assert await verified(caller, token) == 401


async def verified(caller: Caller, token: str) -> int:
    """Show a token to the broker's own verifier."""
    url = f"{caller.url}/v1/embed-tokens/verify"
    async with caller.http.get(url, headers={"X-Embed-Token": token}) as answer:
        return answer.status


@pytest.mark.parts
async def test_G11_kill_at_any_moment_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    """D3: whoever had an answer has the same one after it; who was ended stays out."""
    vendor_settings = VendorSettings(ip=None, latency=lambda draw: draw.uniform(0.0, 0.02))
    async with FakeVendor(vendor_settings) as vendor:
        tree = relay(tmp_path, vendor)
        crowd, starts = Crowd(tree), []
        for _ in range(KILLS):
            with Broker.configured(tmp_path, tree, **SEED) as broker:
                starts.append(broker.seconds_to_start)
                async with Caller(broker, crowd.secret) as caller:
                    await crowd.check(caller, vendor, most=50)  # what is lost stays so: see below
                    lives = [asyncio.ensure_future(crowd.live(caller)) for _ in range(20)]
                    await asyncio.sleep(random.uniform(0.0, 0.5))
                    assert await asyncio.to_thread(broker.end, signal.SIGKILL) == -signal.SIGKILL
                    await asyncio.gather(*lives)
                assert broker.events("broker.state_file_moved_aside") == []
                assert broker.events("broker.defect") == []
        with Broker.configured(tmp_path, tree, **SEED) as broker:
            async with Caller(broker, crowd.secret) as caller:
                await crowd.check(caller, vendor)
        minted: dict[str | None, int] = {}
        for call in vendor.journal.calls:
            if call.is_mint:
                minted[call.fingerprint] = minted.get(call.fingerprint, 0) + 1
        assert {visitor for visitor in crowd.tokens if minted[visitor] > 1} == set()
        assert len(crowd.tokens) > KILLS
        print(f"{len(crowd.tokens)} tokens, {len(crowd.ended)} ends, start {max(starts):.2f} s")


async def test_G11_one_kill(tmp_path: Path) -> None:
    """The same once, quickly, and what it says at the start."""
    async with FakeVendor(VendorSettings(ip=None)) as vendor:
        tree = relay(tmp_path, vendor)
        crowd = Crowd(tree)
        with Broker.configured(tmp_path, tree) as broker:
            async with Caller(broker, crowd.secret) as caller:
                for _ in range(20):
                    visitor = secrets.token_hex(8)
                    crowd.tokens[visitor] = await caller.token(visitor)
                await crowd.end(caller, next(iter(crowd.tokens)))
                assert await asyncio.to_thread(broker.end, signal.SIGKILL) == -signal.SIGKILL
        with Broker.configured(tmp_path, tree) as broker:
            opened = broker.events("broker.state_file_opened")[0]
            assert (opened["tokens"], opened["sessions"]) == (19, 19)
            assert opened["path"] == str(tmp_path / "state.db")
            async with Caller(broker, crowd.secret) as caller:
                await crowd.check(caller, vendor)
                assert await caller.metric("broker_state_file_degraded") == 0
                assert await caller.metric("broker_state_file_bytes") > 0


def local(folder: Path) -> Tree:
    """A broker that signs itself, with a file."""
    return merged(good(folder), {"store.url": f"sqlite://{folder / 'state.db'}"})


async def test_G11_an_end_takes_what_a_local_issuer_signed_before_it_along(tmp_path: Path) -> None:
    """Tokens that were answered a moment earlier are there again; AGENT's end is, too."""
    tree = local(tmp_path)
    secret = secret_in(tree["clients"]["web"]["secret_file"])
    visitors = [secrets.token_hex(8) for _ in range(30)]
    with Broker.configured(tmp_path, tree) as broker:
        async with Caller(broker, secret) as caller:
            tokens = [await caller.token(visitor, agent=AGENT) for visitor in visitors]
            async with caller.http.post(
                f"{caller.url}/v1/revoke", data={"token": tokens[0]}, headers={"api-secret": secret}
            ) as answer:
                assert answer.status == 200  # its commit took everything before it along
            assert await asyncio.to_thread(broker.end, signal.SIGKILL) == -signal.SIGKILL
    with Broker.configured(tmp_path, tree) as broker:
        async with Caller(broker, secret) as caller:
            assert await verified(caller, tokens[0]) == 401
            assert await verified(caller, tokens[1]) == 200
            again = [await caller.token(visitor, agent=AGENT) for visitor in visitors[1:]]
            assert again == tokens[1:]


BEHIND = 50_000
"""Microseconds that the file is behind at most, while no other program has the processor."""


async def test_G11_a_local_issuer_loses_the_last_50_ms_at_most(tmp_path: Path) -> None:
    """Nobody waits for the file, and it tells itself how old a token was when it was written.

    Each token comes alone, so that no other's commit takes it along.  A busy machine delays any of
    them, so one that was written in time is enough; nothing that the file has is lost to a kill.
    """
    tree = local(tmp_path)
    secret, signing = (
        secret_in(keys["secret_file"])
        for keys in (tree["clients"]["web"], tree["issuer"]["local"]["keys"]["one"])
    )
    tokens: dict[str, str] = {}
    with Broker.configured(tmp_path, tree) as broker:
        async with Caller(broker, secret) as caller, asyncio.timeout(TIMEOUT):
            while min(ages := ages_in(tmp_path / "state.db", signing), default=BEHIND + 1) > BEHIND:
                visitor = secrets.token_hex(8)
                tokens[visitor] = await caller.token(visitor)
                await until(lambda: len(ages_in(tmp_path / "state.db", signing)) == len(tokens))
        assert await asyncio.to_thread(broker.end, signal.SIGKILL) == -signal.SIGKILL
    assert min(ages) >= 0
    with Broker.configured(tmp_path, tree) as broker:
        assert broker.events("broker.state_file_opened")[0]["tokens"] == len(tokens)
        async with Caller(broker, secret) as caller:
            assert {each: await caller.token(each) for each in tokens} == tokens


def ages_in(file: Path, signing: str) -> list[int]:
    """Return the microseconds that each token in the file had been there when it was written."""
    records = records_in(copied(file), Secret(signing.encode().hex()))
    return [row.lifetime - row.left for row in records if isinstance(row, TokenRow)]
