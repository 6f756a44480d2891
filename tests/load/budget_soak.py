"""See whether the vendor ever gets more than it allows: three real minutes at saturation.

    python tests/load/budget_soak.py [--seconds 180] [--rate 20]

A broker process with the budget that ships, before the fake vendor; new visitors ask ten times as
often as there are slots.  In the middle the broker is restarted, later nobody answers at the
vendor's door for three seconds.  What counts is the vendor's own journal: the fullest 60 s must
hold 120 calls at most (rows V10 and G4), and at least 100 a minute should be used.

Exit code 0 if both hold, 1 if not.
"""

import argparse
import asyncio
import contextlib
import json
import secrets
import signal
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import Counter
from pathlib import Path

import aiohttp

from broker.testing import FakeVendor

ALLOWED, WANTED = 120, 100
"""Calls in any minute: at most, and on average at least."""

HANG = 3.0
"""Seconds in which nobody accepts connections at the vendor: the broker's connect timeout."""

TOKEN_PATH = "/v1/embed-tokens/request"


class Soak:
    """The broker process, and the crowd that asks it."""

    def __init__(self, folder: Path, vendor: FakeVendor) -> None:
        self._folder = folder
        self._vendor = vendor
        self._secret = secrets.token_urlsafe(24)
        self._process: Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._url = ""
        self.answers: Counter[int | str] = Counter()

    async def start(self) -> None:
        """Start the broker; returns when it answers."""
        config = self._folder / "broker.toml"
        config.write_text(
            f"""
            [server]
            listen = "127.0.0.1:0"
            drain = "1s"
            drain_lead = "0s"
            [admin]
            listen = "127.0.0.1:0"
            [clients.web]
            secret = "{self._secret}"
            agents = ["*"]
            [issuer]
            kind = "upstream"
            [issuer.upstream]
            base_url = "{self._vendor.url}"
            api_secret = "{self._vendor.secret.reveal()}"
            """
        )
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "broker", "serve", "--config", str(config),
            stdout=DEVNULL, stderr=PIPE,
        )  # fmt: skip
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            event = json.loads(line)
            if event["event"] == "broker.started":
                self._url = event["url"]
                self._reading = asyncio.create_task(self._read_away(self._process.stderr))
                return
        raise SystemExit("the broker did not start")

    async def stop(self) -> None:
        """Stop the broker as a supervisor does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        await self._process.wait()

    async def crowd(self, rate: float) -> None:
        """Let a new visitor ask every 1/rate seconds, for ever."""
        timeout = aiohttp.ClientTimeout(total=15)
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
            asyncio.TaskGroup() as group,
        ):
            while True:
                group.create_task(self._visit(http))
                await asyncio.sleep(1 / rate)

    async def _visit(self, http: aiohttp.ClientSession) -> None:
        request = {"agent_id": "A78WKV4515", "fingerprint": secrets.token_hex(16)}
        headers = {"api-secret": self._secret}
        try:
            async with http.post(self._url + TOKEN_PATH, json=request, headers=headers) as response:
                await response.read()
                self.answers[response.status] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            self.answers[type(error).__name__] += 1

    async def _read_away(self, stream: asyncio.StreamReader) -> None:
        while await stream.readline():
            pass


async def soak(seconds: float, rate: float) -> bool:
    """Run it; returns whether both figures hold."""
    with tempfile.TemporaryDirectory() as folder:
        async with FakeVendor(seed=1) as vendor:
            run = Soak(Path(folder), vendor)
            await run.start()
            began = time.monotonic()
            crowd = asyncio.create_task(run.crowd(rate))
            await asyncio.sleep(seconds / 2)
            await run.stop()
            await run.start()
            await asyncio.sleep(seconds / 4)
            await vendor.ignore_connections()
            await asyncio.sleep(HANG)
            await vendor.accept_connections()
            await asyncio.sleep(max(seconds - (time.monotonic() - began), 0))
            took = time.monotonic() - began
            crowd.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await crowd
            await run.stop()
            return report(vendor, run, took)


def report(vendor: FakeVendor, run: Soak, took: float) -> bool:
    """Print what the vendor saw."""
    journal = vendor.journal
    worst = journal.worst_window(60)
    first = journal.calls[0].mono
    used = len(journal.calls) / took * 60
    print(f"time                      {took:8.1f} s")
    print(
        f"calls to the vendor       {len(journal.calls):8d}   by answer {dict(journal.statuses())}"
    )
    print(f"worst 60 s window         {worst.count:8d}   from second {worst.start - first:.1f} on")
    print(f"calls a minute            {used:8.1f}")
    print(f"answers to the crowd      {run.answers.total():8d}   {dict(run.answers)}")
    good = worst.count <= ALLOWED and used >= WANTED
    print("kept" if good else f"NOT kept: at most {ALLOWED} and at least {WANTED} were promised")
    return good


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description="Does the vendor see more than it allows?")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--rate", type=float, default=20.0, help="callers a second")
    arguments = parser.parse_args()
    return 0 if asyncio.run(soak(arguments.seconds, arguments.rate)) else 1


if __name__ == "__main__":
    sys.exit(main())
