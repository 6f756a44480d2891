"""A relay in changing weather, watched: vendor, store, broker, k6, Prometheus, Alertmanager, pager.

Everything but the vendor is a real part, and all listen on loopback or a Unix socket.  The broker
has two workers that share a Valkey server.  Vendor and store fail by a schedule; Prometheus and
Alertmanager run what config/prometheus/ ships, with other addresses and less patience.  `watched`
runs all of it once and then leaves it there to be asked.
"""

import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plain
from actors import Pager, Store, Vendor
from monitoring import Prometheus, monitoring
from running import Broker, broker, tool, until

ROOT = Path(__file__).parents[2]
CROWD = ROOT / "tests" / "load" / "crowd.js"

SETTINGS = {
    "issuer.kind": "upstream",
    "issuer.upstream.pass_through": "/v1/agents",
    "clients.dev.pass_through": "true",
    "issuer.budget.rate": 3000,
    "issuer.budget.window": 3020,
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
        prometheus = stack.enter_context(monitoring(folder, started.admin_url, pager.url))
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
                run.vendor.turn(run.forecast.phases[0].name)
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
        _pass_on(run)
        _sleep_until(run.moment(phase.begins))
        if phase.begins:
            run.vendor.turn(phase.name)
        if phase.name == "store away":
            run.store.stand_still()
        _sleep_until(run.moment(phase.ends))
        run.vendor.calm()
        run.store.go_on()
        if phase.name == "key refused":
            key_file.write_text(run.vendor.new_key(), encoding="utf-8")
    _sleep_until(run.moment(run.forecast.length))


def _pass_on(run: Watched) -> None:
    """Ask for another route of the vendor's, whatever comes of it."""
    keys = {"api-secret": run.vendor.keys[-1], "Authorization": f"Bearer {run.broker.secret}"}
    plain.get(f"{run.broker.url}/v1/agents", headers=keys, timeout=60)


def _sleep_until(moment: float) -> None:
    time.sleep(max(moment - time.time(), 0))
