"""A vendor as a process of its own, which can be made to stand still, and those who ask.

    python tests/vendor/standing.py 127.0.0.1

Its first line says where it answers and with which key; at SIGTERM it prints when each mint call
arrived, in seconds of the monotonic clock that all processes of a machine share.
"""

import asyncio
import contextlib
import json
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from broker.testing import FakeVendor, VendorSettings

AGENT = "A78WKV4515"
TIMEOUT = 60.0
"""Seconds after which something that should happen is taken not to."""


def worst_window(times: Sequence[float], width: float) -> int:
    """Count the calls in the fullest window of this width, both ends included."""
    worst, first = 0, 0
    for last, time_ in enumerate(times):
        while time_ - times[first] > width:
            first += 1
        worst = max(worst, last - first + 1)
    return worst


class StandingVendor:
    """The process.  `arrivals` ends it, and returns what it saw.

    `prefix` is a command that runs it, `host` where it listens.
    """

    def __init__(self, prefix: Sequence[str] = (), host: str = "127.0.0.1") -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, __file__, host], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        told = json.loads(self._process.stdout.readline())
        self.url, self.key = str(told["url"]), str(told["key"])

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Let it do nothing; the kernel goes on taking its connections and what they bring."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def arrivals(self) -> list[float]:
        """End it; returns when calls arrived."""
        self._process.terminate()
        out, _ = self._process.communicate(timeout=TIMEOUT)
        times: list[float] = json.loads(out)
        return times

    def kill(self) -> None:
        """End it whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@contextmanager
def standing_vendor(
    prefix: Sequence[str] = (), host: str = "127.0.0.1"
) -> Iterator[StandingVendor]:
    """Run one."""
    vendor = StandingVendor(prefix, host)
    try:
        yield vendor
    finally:
        vendor.kill()


class Visitors:
    """New visitors who ask at a constant rate, whatever became of those before."""

    def __init__(self, urls: Callable[[], Sequence[str]], secret: str, rate: float) -> None:
        self._urls = urls
        self._secret = secret
        self._rate = rate
        self.answers: Counter[int | str] = Counter()

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Let them ask until the end of the block."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=timeout
        ) as http:
            task = asyncio.create_task(self._request_tokens(http))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def served(self, count: int) -> None:
        """Return when so many more have a token."""
        wanted = self.answers[200] + count
        async with asyncio.timeout(TIMEOUT):
            while self.answers[200] < wanted:  # noqa: ASYNC110 - others bring it about
                await asyncio.sleep(0.01)

    async def _request_tokens(self, http: aiohttp.ClientSession) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                for url in self._urls():
                    group.create_task(self._request_token(http, url))
                await asyncio.sleep(1 / self._rate)

    async def _request_token(self, http: aiohttp.ClientSession, url: str) -> None:
        request = {"agent_id": AGENT, "fingerprint": secrets.token_hex(16)}
        try:
            async with http.post(
                f"{url}/v1/embed-tokens/request", json=request, headers={"api-secret": self._secret}
            ) as answer:
                await answer.read()
                self.answers[answer.status] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            self.answers[type(error).__name__] += 1


def relay_settings(vendor: StandingVendor, secret: str) -> dict[str, Any]:
    """Return the settings of a relay before it, with the budget that ships."""
    return {
        "server": {"listen": "127.0.0.1:0", "drain": "2s", "drain_lead": "0s"},
        "admin": {"listen": "127.0.0.1:0"},
        "clients": {"web": {"secret": secret, "agents": ["*"]}},
        "issuer": {
            "kind": "upstream",
            "upstream": {"base_url": vendor.url, "api_secret": vendor.key},
        },
        "log": {"level": "info"},
    }


async def _serve(host: str) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with FakeVendor(VendorSettings(ip=None), host=host, monotonic=time.monotonic) as vendor:
        print(json.dumps({"url": vendor.url, "key": vendor.secret.reveal()}), flush=True)
        await ended.wait()
        print(json.dumps([call.mono for call in vendor.journal.calls]), flush=True)


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(sys.argv[1]))
