"""Builds everything, opens and closes the outside world.

Start: settings -> parts -> snapshot -> listeners.  Stop: readiness turns, requests are still taken
for `drain_lead` (a balancer needs that long to look away), the listener closes, what is under way
ends, the snapshot is sealed.  Reload: everything is built from the new settings first and swapped
in only if all of it could be built.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog
from aiohttp import web

from broker import logs, parts, scrape
from broker.board import Board
from broker.clock import SystemClock
from broker.health import Health
from broker.issue import TokenDesk
from broker.issuers.local import LocalIssuer
from broker.issuers.upstream import UpstreamIssuer
from broker.issuers.vendor_client import VendorClient
from broker.listen import CannotListen, listen
from broker.metrics import Metrics
from broker.model import LimitName
from broker.pacer import Paced, Pacer, Unpaced
from broker.pauses import PauseKeeper
from broker.schema import ConfigError
from broker.settings import Settings
from broker.stores import snapshot
from broker.stores.memory import MemoryStore
from broker.stores.tokens import TokenCache
from broker.watch import SecretFiles
from broker.web import admin
from broker.web.door import Door
from broker.web.routes import Routes
from broker.web.server import BACKLOG, DataServer

log = structlog.get_logger()

HOUSEKEEPING = 0.5
"""Seconds between rounds of housekeeping; also how fast a changed secret file is noticed."""

MINT_GRACE = 6.0
"""Seconds that a mint may take beyond its turn and its call: the longest back-off of a key and the
pause before a retry.  A mint may outlive its callers, because its token is worth caching; but the
call has a timeout of its own, and must be the one to tell that it ran out."""


class App:
    """One broker process.  `load` reads the settings anew, for a reload; it raises ConfigError."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Settings],
        environ: Mapping[str, str],
        *,
        dev: bool = False,
    ) -> None:
        self._settings = settings
        self._load = load
        self._environ = environ
        self._dev = dev
        self._clock = SystemClock()
        self._health = Health()
        self._stopping = asyncio.Event()
        self._pauses = PauseKeeper()
        self._admin_listener: asyncio.Server | None = None
        self._started = False
        self._restored = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._build()

    def _build(self) -> None:
        settings, clock = self._settings, self._clock
        now = clock.mono()
        self._files = SecretFiles(file for _, file in parts.secret_files(settings))
        policy = self._policy = parts.reuse(settings)
        budget = parts.budget(settings)
        self.metrics = Metrics(settings.issuer.kind, budget=budget is not None)
        self._sealing_key = parts.sealing_key(settings)
        self._tokens = TokenCache(
            settings.reuse.max_tokens,
            keep_until=lambda token: token.dies_mono - policy.marks(token.lifetime).outage,
            mono=clock.mono,
            counts=self.metrics.tokens.counts,
        )
        self.store = MemoryStore(
            parts.limits(settings), self._tokens, clock, self.metrics.limits.counts
        )
        self._paced = (
            None if budget is None else Paced(budget, self.metrics.budget.queue_wait.observe)
        )
        self.door = Door(
            parts.clients(settings, self._environ),
            parts.trusted_proxies(settings),
            now,
            self.metrics.limits.counts[LimitName.AUTH],
        )
        pacer: Pacer = self._paced or Unpaced()
        self.issuer = self._build_issuer()
        self.desk = TokenDesk(
            self.store,
            self.issuer,
            pacer,
            policy,
            clock,
            self.metrics.mints,
            mint_timeout=MINT_GRACE
            + (budget.max_wait if budget else 0.0)
            + settings.issuer.upstream.timeout.seconds,
        )
        self._registry = scrape.registry(
            self.metrics.sheet.families, Board([self.metrics.sheet.cells]), self._publish
        )

    def _build_issuer(self) -> LocalIssuer | UpstreamIssuer:
        settings = self._settings
        if settings.issuer.kind == "local":
            local = settings.issuer.local
            return LocalIssuer(parts.keyring(settings), local.issuer, local.audience, self._clock)
        assert self._paced is not None  # the relay always has a budget
        upstream = settings.issuer.upstream
        keys = parts.vendor_keys(settings, self._environ)  # before the client, which must be closed
        return UpstreamIssuer(
            VendorClient(upstream.base_url, upstream.timeout.seconds),
            keys,
            self._paced,
            self._clock,
            self.metrics.upstream,
        )

    async def start(self) -> None:
        """Open everything; raises CannotListen with nothing left open."""
        self._loop = asyncio.get_running_loop()
        self._restore_snapshot()
        if self._paced is not None:
            await self._paced.start()
        self._pauses.start()
        try:
            await self._open_admin()
            await self._open_data()
        except CannotListen:
            await self._close_outside()
            if self._restored:  # loading took the file away: the next start needs it, too
                self._save_snapshot()
            raise
        self._tasks.add(self._loop.create_task(self._keep_house()))
        self._started = True
        log.info("broker.started", url=self.url, admin_url=self.admin_url, issuer=self.issuer.name)

    async def run(self) -> None:
        """Serve until `stop` is called, then drain."""
        await self._stopping.wait()
        await self._drain()

    def stop(self) -> None:
        """Begin to drain."""
        self._stopping.set()

    def reload(self) -> bool:
        """Read the settings again; all of it takes effect, or nothing does."""
        if not self._started:
            log.info("broker.reload_skipped", reason="the start has just read everything")
            return False
        try:
            settings = self._load()
            files = SecretFiles(
                file for _, file in parts.secret_files(settings)
            )  # before they are read: a change in between is noticed
            clients, limits = parts.clients(settings, self._environ), parts.limits(settings)
            use_keys = self._new_keys(settings)
        except ConfigError as error:
            self.metrics.process.reloads["failure"].inc()
            log.error("broker.reload_failed", error=str(error))
            return False
        self.door.use_clients(clients)
        self.store.use_limits(limits)
        use_keys()
        logs.configure(settings.log)
        self._routes.use_log(debug=settings.log.level == "debug")
        self._routes.any_fingerprint = settings.limits.fingerprint_format == "any"
        self._files = files
        self.metrics.process.reloads["success"].inc()
        log.info("broker.reloaded", needs_restart=_needs_restart(self._settings, settings))
        return True

    def _new_keys(self, settings: Settings) -> Callable[[], None]:
        """Read the issuer's keys; returns what puts them in force."""
        issuer = self.issuer
        if settings.issuer.kind != issuer.name:
            return lambda: None  # told as needing a restart
        if isinstance(issuer, UpstreamIssuer):
            keys = parts.vendor_keys(settings, self._environ)
            return lambda: issuer.use_keys(keys)
        keyring = parts.keyring(settings)
        return lambda: issuer.use_keyring(keyring)

    async def _open_admin(self) -> None:
        self._admin = web.AppRunner(
            admin.build(self._registry, self._health), access_log=None, handle_signals=False
        )
        await self._admin.setup()
        server = self._admin.server
        assert server is not None  # set by setup()
        self._admin_listener, self.admin_url = await listen(
            admin.connections(server), self._settings.admin.listen, "admin.listen", BACKLOG
        )

    async def _open_data(self) -> None:
        settings = self._settings
        self._routes = Routes(
            self.door,
            self.desk,
            self.metrics,
            self._clock,
            self._health,
            deadline=settings.server.deadline.seconds,
            any_fingerprint=settings.limits.fingerprint_format == "any",
            admin_url=self.admin_url,
        )
        self._routes.use_log(debug=settings.log.level == "debug")
        self._server = DataServer(self._routes, self._routes.error_head)
        self._listener, self.url = await listen(
            self._server, settings.server.listen, "server.listen", BACKLOG
        )
        self._add_pages()

    def _add_pages(self) -> None:
        """Pages for people: imported only where they are served."""
        if not self._settings.server.docs:
            return
        from broker.web import docs  # noqa: PLC0415 - rare, and keeps the start short

        docs.add(self._routes, self.url)
        if self._dev:
            docs.add_development(self._routes, self._registry, self.url)
            self.door.trust_origins(docs.own_origins(self.url))

    def _publish(self) -> None:
        """Bring the gauges up to date."""
        metrics = self.metrics
        metrics.process.workers.set(1)
        for name, bucket in self.store.buckets.items():
            metrics.limits.tracked[name].set(len(bucket))
        metrics.limits.tracked[LimitName.AUTH].set(len(self.door.failures))
        metrics.tokens.cached.set(len(self._tokens))
        metrics.mints.in_flight.set(len(self.desk.flights))
        if self._paced is not None:
            metrics.budget.remaining.set(self._paced.remaining)
            metrics.budget.queue_depth.set(self._paced.depth)
        if isinstance(self.issuer, UpstreamIssuer):
            metrics.upstream.breakers["credentials"].set(self.issuer.credentials.is_open)
            metrics.upstream.breakers["health"].set(self.issuer.health.is_open)

    async def _drain(self) -> None:
        server = self._settings.server
        ends = time.monotonic() + server.drain.seconds
        self._health.draining = True
        log.info("broker.draining", lead_s=server.drain_lead.seconds, drain_s=server.drain.seconds)
        await asyncio.sleep(server.drain_lead.seconds)
        self._listener.close()
        await self._server.drain(max(ends - time.monotonic(), 0.1))
        with contextlib.suppress(TimeoutError):  # mints under way are paid for: into the snapshot
            async with asyncio.timeout(max(ends - time.monotonic(), 0.1)):
                await self.desk.flights.drained()
        await self._close_outside()
        self._save_snapshot()
        log.info("broker.stopped")

    async def _close_outside(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.desk.flights.close()
        if self._paced is not None:
            await self._paced.close()
        if isinstance(self.issuer, UpstreamIssuer):
            await self.issuer.close()
        await self._admin.cleanup()
        if self._admin_listener is not None:
            self._admin_listener.close()
        self._pauses.stop()

    def _restore_snapshot(self) -> None:
        store = self._settings.store
        if store.snapshot_file is None or self._sealing_key is None:
            return
        try:
            count = snapshot.load(
                Path(store.snapshot_file),
                self._sealing_key,
                self.store,
                self._clock,
                snapshot.Terms(
                    self.issuer.origins,
                    store.snapshot_max_age.us,
                    lambda lifetime: self._policy.marks(lifetime).floor,
                ),
            )
        except snapshot.SnapshotIgnored as reason:
            log.warning("broker.snapshot_ignored", reason=str(reason))
        else:
            self._restored = True
            log.info("broker.snapshot_loaded", tokens=count)

    def _save_snapshot(self) -> None:
        path = self._settings.store.snapshot_file
        if path is None or self._sealing_key is None:
            return
        try:
            count = snapshot.save(
                Path(path), self._sealing_key, self.store, self._clock, self.issuer.origin
            )
        except OSError as error:
            log.error("broker.snapshot_failed", reason=error.strerror)
        else:
            log.info("broker.snapshot_saved", tokens=count)

    async def _keep_house(self) -> None:
        """Expire, measure the loop, notice changed secrets: so that no request has to."""
        loop = self._loop
        while True:
            due = loop.time() + HOUSEKEEPING
            await asyncio.sleep(HOUSEKEEPING)
            self.metrics.loop_lag.observe(max(loop.time() - due, 0.0))
            try:
                self._tidy()
            except Exception:
                log.exception("broker.defect")  # the next round comes all the same

    def _tidy(self) -> None:
        now = self._clock.mono()
        self.store.tidy()
        self.door.failures.tidy(now)
        self._routes.refusals.flush(now)
        self.desk.renewal_log.flush(now)
        self._pauses.tidy()
        if self._files.changed():
            log.info("broker.secret_files_changed")
            self.reload()


def _needs_restart(old: Settings, new: Settings) -> list[str]:
    """Sections that differ and are not taken over by a reload."""
    fixed = ("server", "admin", "reuse", "store")
    names = [name for name in fixed if getattr(old, name) != getattr(new, name)]
    if old.issuer.budget != new.issuer.budget or old.issuer.kind != new.issuer.kind:
        names.append("issuer")
    before, after = old.issuer, new.issuer
    fixed_parts = {
        "local.issuer": before.local.issuer != after.local.issuer,
        "local.audience": before.local.audience != after.local.audience,
        "upstream.base_url": before.upstream.base_url != after.upstream.base_url,
        "upstream.timeout": before.upstream.timeout != after.upstream.timeout,
    }
    return names + [f"issuer.{name}" for name, differs in fixed_parts.items() if differs]
