"""What a process does beside its requests: it purges, measures, gives signs of life, watches files.

Done here in rounds, so that no request has to do it.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial

import structlog

from broker.app.gc_tuning import GcTuner
from broker.app.wiring import Parts
from broker.config.secret_files import SecretFiles
from broker.issuers.upstream import UpstreamIssuer
from broker.model import LimitName
from broker.tasks import aside
from broker.telemetry.streams import stderr

log = structlog.get_logger()

HOUSEKEEPING = 0.5
"""Seconds between rounds of housekeeping, and between looks at secret files."""

BEAT = 0.5
"""Seconds between signs of life; see `rules.hangs` for who reads them."""


class Housekeeping:
    """Purges what has expired and publishes gauges; `tuner` collects garbage in the same rounds."""

    def __init__(self, parts: Parts, tuner: GcTuner) -> None:
        self._parts = parts
        self._tuner = tuner

    async def run(self) -> None:
        """Do a round now and then, for ever, and measure the loop."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + HOUSEKEEPING
            await asyncio.sleep(HOUSEKEEPING)
            self._parts.metrics.loop_lag.observe(max(loop.time() - due, 0.0))
            await self.purge()
            self.do_round()

    async def purge(self) -> None:
        """Drop what has expired, a millisecond's worth at a time: others get their turn between."""
        parts = self._parts
        authenticators = (parts.authenticator, parts.admin_authenticator)
        failures = [each.failures for each in authenticators if each is not None]
        steps: list[Callable[[], bool]] = [
            parts.store.purge_expired,
            parts.session_store.purge_expired,
            *(partial(each.purge_expired, parts.clock.mono()) for each in failures),
        ]
        if parts.durable is not None:
            steps.append(parts.durable.tell_buckets)
        while steps:
            steps = [step for step in steps if await _and_yield(step)]

    def do_round(self) -> None:
        """Flush logs, collect garbage, bring readiness and gauges up to date."""
        parts = self._parts
        now = parts.clock.mono()
        for refusals in parts.refusal_logs:
            refusals.flush(now)
        self._tuner.tidy()
        if parts.shared_backend is not None:
            parts.readiness.degraded = parts.shared_backend.is_degraded
            parts.readiness.refuses = parts.shared_backend.refuses
        if parts.durable is not None:
            parts.durable.publish()
            parts.readiness.degraded = parts.durable.is_degraded
        self.publish()

    def publish(self) -> None:
        """Bring the gauges up to date."""
        parts, metrics = self._parts, self._parts.metrics
        metrics.process.log_lines_dropped += stderr.take_lost()
        metrics.process.workers.set(not parts.readiness.draining)
        for name, bucket in parts.store.buckets.items():
            metrics.limits.tracked[name].set(len(bucket))
        metrics.limits.tracked[LimitName.AUTH].set(len(parts.authenticator.failures))
        metrics.tokens.cached.set(len(parts.token_cache))
        metrics.sessions.recorded.set(len(parts.session_store))
        metrics.mints.in_flight.set(len(parts.token_service.flights))
        if parts.pacer is not None:
            metrics.budget.remaining.set(parts.pacer.remaining)
            metrics.budget.queue_depth.set(parts.pacer.depth)
            metrics.budget.outstanding.set(parts.pacer.outstanding)
        if parts.shared_backend is not None:
            metrics.store.degraded.set(parts.shared_backend.is_degraded)
        if parts.durable is not None:
            metrics.state_file.degraded.set(parts.durable.is_degraded)
        if isinstance(parts.issuer, UpstreamIssuer):
            metrics.upstream.breakers["credentials"].set(parts.issuer.credentials.is_open)
            metrics.upstream.breakers["health"].set(parts.issuer.health.is_open)

    async def beat(self) -> None:
        """Give signs of life, apart from the rounds: only a loop that stands is silent."""
        beat = self._parts.metrics.process.beat
        while True:
            beat.set(0 if self._parts.readiness.draining else time.monotonic())
            await asyncio.sleep(BEAT)


async def _and_yield(step: Callable[[], bool]) -> bool:
    """Do a step, then let others have their turn."""
    more = step()
    await asyncio.sleep(0)
    return more


class FileWatch:
    """Wants a reload when one of `files` has changed; a reload may put others in their place."""

    def __init__(self, files: SecretFiles, reload_wanted: asyncio.Event) -> None:
        self.files = files
        self._reload_wanted = reload_wanted

    async def run(self) -> None:
        """Look now and then, for ever."""
        while True:
            await asyncio.sleep(HOUSEKEEPING)
            files = self.files
            if await aside(files.changed) and files is self.files:
                log.info("broker.secret_files_changed")
                self._reload_wanted.set()
