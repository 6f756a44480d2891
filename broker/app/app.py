"""Builds everything, opens and closes the outside world.

Start: settings -> parts -> snapshot -> listeners.  Stop: readiness turns, requests are still taken
for `drain_lead` (a balancer needs that long to look away), the listener closes, what is under way
ends, the snapshot is sealed.  Reload: everything is built from the new settings first and swapped
in only if all of it could be built.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from broker.app import factory, snapshot
from broker.app.gc_tuning import GcTuner
from broker.app.reload import in_force, needs_restart, read_aside
from broker.app.worker_context import WorkerContext
from broker.clock import SystemClock, sleep_unless
from broker.config.schema import ConfigError
from broker.config.secret_files import SecretFiles
from broker.config.settings import Settings
from broker.issue import TokenService
from broker.issuers.local import LocalIssuer
from broker.issuers.upstream import UpstreamIssuer
from broker.issuers.vendor.client import VendorClient
from broker.minting import Minter, MintRules
from broker.model import LimitName
from broker.pacing.pacer import BudgetPacer, NoPacing, Pacer
from broker.pacing.slots import Budget
from broker.sessions.admin import TokenIntrospector
from broker.sessions.memory import MemorySessions
from broker.stores.memory import MemoryStore
from broker.stores.token_cache import TokenCache
from broker.tasks import Background, aside
from broker.telemetry import exposition, logs
from broker.telemetry.cells import SharedCells
from broker.telemetry.labels import BackgroundTask
from broker.telemetry.readiness import Readiness
from broker.telemetry.streams import stderr
from broker.web import admin, admin_sessions, token_status
from broker.web.acceptor import Acceptor
from broker.web.auth import ClientAuthenticator
from broker.web.listener import CannotListen, Listener, listen
from broker.web.pages import embed_script
from broker.web.router import Routes
from broker.web.server import BACKLOG, DataServer

if TYPE_CHECKING:
    from broker.app.shared_backend import SharedBackend
    from broker.valkey.fallback import SharedStore
    from broker.valkey.session_fallback import SharedSessions

log = structlog.get_logger()

HOUSEKEEPING = 0.5
"""Seconds between rounds of housekeeping, and between looks at secret files."""

BEAT = 0.5
"""Seconds between signs of life; see `rules.hangs` for who reads them."""

MINT_GRACE = 6.0
"""Seconds that a mint may take beyond its turn and its call: the longest back-off of a key and the
pause before a retry.  A mint may outlive its callers, because its token is worth caching; but the
call has a timeout of its own, and must be the one to tell that it ran out."""


class App:
    """One broker process.  `load` reads the settings anew, for a reload; it raises ConfigError.

    With a `seat` it is one worker of several.  Then its supervisor has the admin listener, watches
    secret files, tells it what to `follow`, and writes of the life of the whole.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Settings],
        environ: Mapping[str, str],
        *,
        dev: bool = False,
        seat: WorkerContext | None = None,
    ) -> None:
        self._settings = settings
        self._load = load
        self._environ = environ
        self._dev = dev
        self._seat = seat
        self._clock = SystemClock()
        self._health = Readiness()
        self._stopping = asyncio.Event()
        self._pauses = GcTuner()
        self._admin_refusals = logs.RefusalLog()
        self._admin: admin.AdminListener | None = None
        self._lead_over = asyncio.Event()
        self._reload_wanted = asyncio.Event()
        self._restored = False
        self._build()

    def _build(self) -> None:
        settings, clock = self._settings, self._clock
        now = clock.mono()
        self._files = SecretFiles(file for _, file in factory.watched_files(settings))
        policy = self._policy = factory.reuse(settings)
        budget = factory.budget(settings)
        self.metrics = self._seat.metrics if self._seat else factory.metrics(settings)
        self._background = Background(self.metrics.process.background)
        self._sealing_key = factory.sealing_key(settings)
        self._tokens = TokenCache(
            settings.reuse.max_tokens,
            keep_until=lambda token: token.dies_mono - policy.marks(token.lifetime).outage,
            mono=clock.mono,
            counts=self.metrics.tokens.counts,
        )
        self.sharing = self._share()
        self.store: MemoryStore | SharedStore = (
            self.sharing.store
            if self.sharing is not None
            else MemoryStore(
                factory.limits(settings), self._tokens, clock, self.metrics.limits.counts
            )
        )
        self._paced = None if budget is None else self._pace(budget)
        self.door = ClientAuthenticator(
            factory.clients(settings, self._environ),
            factory.trusted_proxies(settings),
            now,
            self.metrics.limits.counts[LimitName.AUTH],
        )
        admins = factory.admin_clients(settings)
        self._admin_door = (
            ClientAuthenticator(
                admins,
                factory.trusted_proxies(settings),
                now,
                self.metrics.limits.counts[LimitName.AUTH],
                section="[admin]",
                wanted="admin secret",
            )
            if admins
            else None
        )
        pacer: Pacer = self._paced or NoPacing()
        self.issuer = self._build_issuer()
        self.book: MemorySessions | SharedSessions = (
            self.sharing.book
            if self.sharing is not None
            else MemorySessions(settings.sessions.max_recorded, clock)
        )
        self.sessions = TokenIntrospector(self.issuer, self.book, self.store, self.metrics.sessions)
        longest = MINT_GRACE + settings.issuer.upstream.timeout.seconds
        longest += budget.max_wait if budget else 0.0
        self.minter = Minter(
            self.store,
            self.book,
            self.issuer,
            pacer,
            MintRules(policy, longest),
            clock,
            self.metrics.mints,
        )
        self.tokens = TokenService(self.store, self.minter, policy, clock)
        board = self._seat.board if self._seat else SharedCells([self.metrics.sheet.cells])
        self._registry = exposition.registry(self.metrics.sheet.families, board, self._publish)

    def _share(self) -> "SharedBackend | None":
        """Put the shared store together, if there is one; opens nothing."""
        address = factory.store_address(self._settings)
        if address is None or self._sealing_key is None:
            return None
        from broker.app.shared_backend import SharedBackend  # noqa: PLC0415 - its client is slow to import

        return SharedBackend(
            self._settings,
            address,
            factory.store_access(self._settings),
            self._sealing_key,
            factory.limits(self._settings),
            self._tokens,
            self._clock,
            self.metrics,
            place=self._place,
            is_first=self._seat is None or self._seat.worker == 1,
            origins=lambda: self.issuer.signer_ids,
        )

    @property
    def _place(self) -> str:
        """Name this process among those of its host: the same after a restart, if it can be."""
        listen = self._settings.server.listen
        if self._seat is not None:
            return f"{listen} worker {self._seat.worker}"
        return listen if not listen.endswith(":0") else f"{listen} {os.getpid()}"

    def _pace(self, budget: Budget) -> BudgetPacer:
        observe = self.metrics.budget.queue_wait.observe
        if self.sharing is None:
            return BudgetPacer(budget, observe, counts=self.metrics.process.background)
        slots = self.sharing.slots(budget)
        paced = BudgetPacer(budget, observe, slots, self.metrics.process.background)
        slots.pause_for = paced.pause_for
        return paced

    def _build_issuer(self) -> LocalIssuer | UpstreamIssuer:
        settings = self._settings
        if settings.issuer.kind == "local":
            local = settings.issuer.local
            return LocalIssuer(factory.keyring(settings), local.issuer, local.audience, self._clock)
        assert self._paced is not None  # the relay always has a budget
        upstream = settings.issuer.upstream
        keys = factory.vendor_keys(
            settings, self._environ
        )  # before the client, which must be closed
        proxy = factory.vendor_proxy(settings, self._environ)
        return UpstreamIssuer(
            VendorClient(upstream.base_url, upstream.timeout.seconds, proxy),
            keys,
            self._paced,
            self._clock,
            self.metrics.upstream,
            refusals=None if self.sharing is None else self.sharing.refusals,
        )

    async def start(self) -> None:
        """Open everything; raises CannotListen with nothing left open."""
        self._loop = asyncio.get_running_loop()
        self._pauses.start()
        self._restore_snapshot()
        if self.sharing is not None:
            await self.sharing.open()
        if self._paced is not None:
            await self._paced.start()
        try:
            await self._open_admin()
            await self._open_data()
        except CannotListen:
            await self._close_admin()
            if self._restored:  # loading took the file away: the next start needs it, too
                self._save_snapshot()
            await self._close_outside()
            raise
        self._tidy()
        self._background.start(BackgroundTask.HOUSEKEEPING, self._keep_house)
        self.metrics.process.beat.set(time.monotonic())  # before it says that it is ready
        self._background.start(BackgroundTask.BEAT, self._beat)
        if self._seat is None:
            self._background.start(BackgroundTask.WATCHED_FILES, self._watch_files)
            self._background.start(BackgroundTask.RELOADS, self._obey_reloads)
        if self._seat is None:
            name = self.issuer.name
            log.info("broker.started", url=self.url, admin_url=self.admin_url, issuer=name)

    async def run(self) -> None:
        """Serve until `stop` is called, then drain."""
        await self._stopping.wait()
        await self._drain()

    def stop(self, *, at_once: bool = False) -> None:
        """Begin to drain; `at_once` without the lead, for when nobody is told by readiness."""
        if at_once:
            self._lead_over.set()
        self._stopping.set()

    def want_reload(self) -> None:
        """Read the settings again as soon as all files can be read, and the start is over."""
        self._reload_wanted.set()

    async def _obey_reloads(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            await self.reload()

    async def reload(self) -> bool:
        """Read the settings again; all of it takes effect, or nothing does."""
        try:
            loaded, other_key, put_in_force = await read_aside(self._read)
            put_in_force()
        except ConfigError as error:
            self._note_reload(failed=True)
            log.error("broker.reload_failed", error=str(error))
            return False
        except Exception:
            self._note_reload(failed=True)
            log.exception("broker.defect")
            return False
        self._note_reload(failed=False)
        changed = needs_restart(self._settings, loaded, other_key=other_key)
        log.info("broker.reloaded", needs_restart=changed)
        return True

    def _note_reload(self, *, failed: bool) -> None:
        self.metrics.process.reloads["failure" if failed else "success"].inc()
        self.metrics.process.reload_failed.set(failed)

    def _read(self) -> tuple[Settings, bool, Callable[[], None]]:
        """Read all files anew; raises ConfigError.

        Returns what they say, whether there is another sealing key, and what puts them in force.
        """
        loaded = self._load()
        settings = in_force(self._settings, loaded)
        other_key = factory.sealing_key(settings) != self._sealing_key
        return loaded, other_key, self.prepared(settings)

    def prepared(self, settings: Settings) -> Callable[[], None]:
        """Read all that a running process can take over; raises ConfigError.

        Reading may take its time: in a thread of its own.  Returns what puts it in force, on the
        event loop; until then nothing has changed.
        """
        files = SecretFiles(
            file for _, file in factory.watched_files(settings)
        )  # before they are read: a change in between is noticed
        clients, limits = factory.clients(settings, self._environ), factory.limits(settings)
        admins = factory.admin_clients(settings)
        use_keys = self._new_keys(settings)
        access = factory.store_access(settings)

        def put_in_force() -> None:
            if self.sharing is not None:
                self.sharing.use_access(access)
            self.door.use_clients(clients)
            if self._admin_door is not None:
                self._admin_door.use_clients(admins)
            self.store.use_limits(limits)
            use_keys()
            logs.configure(settings.log)
            self._routes.use_log(debug=settings.log.level == "debug")
            self._routes.any_fingerprint = settings.limits.fingerprint_format == "any"
            self._files = files

        return put_in_force

    def _new_keys(self, settings: Settings) -> Callable[[], None]:
        """Read the issuer's keys; returns what puts them in force."""
        issuer = self.issuer
        if settings.issuer.kind != issuer.name:
            return lambda: None  # told as needing a restart
        if isinstance(issuer, UpstreamIssuer):
            keys = factory.vendor_keys(settings, self._environ)
            proxy = factory.vendor_proxy(settings, self._environ)

            def replace() -> None:
                issuer.use_keys(keys)
                issuer.use_proxy(proxy)

            return replace
        keyring = factory.keyring(settings)

        def turn() -> None:
            before = issuer.signer_ids
            issuer.use_keyring(keyring)
            if not before <= issuer.signer_ids:  # what a key that is gone signed opens nothing
                self._tokens.clear()

        return turn

    async def _open_admin(self) -> None:
        if self._seat is not None:
            self.admin_url = self._seat.admin_url
            return
        application = admin.build(self._registry, self._health)
        if self._admin_door is not None:
            throttled = self.metrics.rejections[LimitName.AUTH.value]
            admin_sessions.add(
                application,
                self._admin_door,
                self.sessions,
                self._clock,
                throttled,
                self._admin_refusals,
            )
        self._admin = await admin.AdminListener.open(
            application,
            self._settings.admin.listen,
            keep_alive=self._settings.server.keep_alive.seconds,
        )
        self.admin_url = self._admin.url

    async def _open_data(self) -> None:
        settings = self._settings
        self._routes = Routes(
            self.door,
            self.tokens,
            self.metrics,
            self._clock,
            self._health,
            deadline=settings.server.deadline.seconds,
            any_fingerprint=settings.limits.fingerprint_format == "any",
            admin_url=self.admin_url,
        )
        self._routes.use_log(debug=settings.log.level == "debug")
        token_status.add(
            self._routes, self.door, self.sessions, self._clock, self.store.charge_client
        )
        embed = embed_script.add(self._routes)
        self._server = DataServer(
            self._routes,
            self._routes.error_head,
            self.metrics.process.connections,
            keep_alive=settings.server.keep_alive.seconds,
        )
        self._listener, self.url = await self._listen()
        self._add_pages(embed)

    async def _listen(self) -> "tuple[Listener | Acceptor, str]":
        if self._seat is None:
            return await listen(
                self._server, self._settings.server.listen, "server.listen", BACKLOG
            )
        acceptor = Acceptor(self._seat.sockets, self._server, self._seat.ahead)
        acceptor.start(BACKLOG)
        return acceptor, self._seat.url

    def _add_pages(self, embed: embed_script.Script) -> None:
        """Pages for people: imported only where they are served."""
        if self._dev:
            from broker.app import dev  # noqa: PLC0415 - development only
            from broker.web.pages import demo  # noqa: PLC0415 - as above

            demo.add(self._routes, embed, self.url, dev.client_secret(self._settings))
        if not self._settings.server.docs:
            return
        from broker.web.pages import docs  # noqa: PLC0415 - rare, and keeps the start short

        docs.add(self._routes, self.url)
        if self._dev:
            docs.add_development(self._routes, self._registry, self.url)
            self.door.trust_origins(docs.own_origins(self.url))

    def _publish(self) -> None:
        """Bring the gauges up to date."""
        metrics = self.metrics
        metrics.process.log_lines_dropped += stderr.take_lost()
        metrics.process.workers.set(not self._health.draining)
        for name, bucket in self.store.buckets.items():
            metrics.limits.tracked[name].set(len(bucket))
        metrics.limits.tracked[LimitName.AUTH].set(len(self.door.failures))
        metrics.tokens.cached.set(len(self._tokens))
        metrics.sessions.recorded.set(len(self.book))
        metrics.mints.in_flight.set(len(self.tokens.flights))
        if self._paced is not None:
            metrics.budget.remaining.set(self._paced.remaining)
            metrics.budget.queue_depth.set(self._paced.depth)
            metrics.budget.outstanding.set(self._paced.outstanding)
        if self.sharing is not None:
            metrics.store.degraded.set(self.sharing.is_degraded)
        if isinstance(self.issuer, UpstreamIssuer):
            metrics.upstream.breakers["credentials"].set(self.issuer.credentials.is_open)
            metrics.upstream.breakers["health"].set(self.issuer.health.is_open)

    async def _drain(self) -> None:
        server = self._settings.server
        ends = time.monotonic() + server.drain.seconds
        self._health.draining = True
        self.metrics.process.beat.set(0)
        self._publish()
        if self._seat is None:
            lead = server.drain_lead.seconds
            log.info("broker.draining", lead_s=lead, drain_s=server.drain.seconds)
        await sleep_unless(self._lead_over, server.drain_lead.seconds)
        self._listener.close()
        await self._server.drain(max(ends - time.monotonic(), 0.1))
        with contextlib.suppress(TimeoutError):  # mints under way are paid for: into the snapshot
            async with asyncio.timeout(max(ends - time.monotonic(), 0.1)):
                await self.tokens.flights.drained()
        await self._close_admin()  # before the snapshot: it has every end that was answered
        self._save_snapshot()  # before whatever else there is, which may hang
        await self._close_outside()
        for refusals in self._refusal_logs:
            refusals.sum_up()
        if self._seat is None:
            log.info("broker.stopped")

    async def _close_admin(self) -> None:
        if self._admin is not None:
            await self._admin.close()

    async def _close_outside(self) -> None:
        await self._background.close()
        await self.tokens.flights.close()
        if isinstance(self.issuer, UpstreamIssuer):
            await self.issuer.close()  # before the budget, which tells what that leaves out
        if self._paced is not None:
            await self._paced.close()
        if self.sharing is not None:
            await self.sharing.close()
        self._pauses.stop()

    def _restore_snapshot(self) -> None:
        store = self._settings.store
        if store.snapshot_file is None or self._sealing_key is None:
            return
        assert isinstance(self.store, MemoryStore)  # checked with the settings
        assert isinstance(self.book, MemorySessions)  # goes with it
        try:
            count = snapshot.load(
                Path(store.snapshot_file),
                self._sealing_key,
                self.store,
                self.book,
                self._clock,
                snapshot.Terms(
                    self.issuer.signer_ids,
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
        assert isinstance(self.store, MemoryStore)  # as above
        assert isinstance(self.book, MemorySessions)
        try:
            count = snapshot.save(
                Path(path),
                self._sealing_key,
                self.store,
                self.book,
                self._clock,
                self.issuer.signer_ids,
            )
        except OSError as error:
            log.error("broker.snapshot_failed", reason=error.strerror)
        else:
            log.info("broker.snapshot_saved", tokens=count)

    async def _keep_house(self) -> None:
        """Expire, measure the loop: so that no request has to."""
        loop = self._loop
        while True:
            due = loop.time() + HOUSEKEEPING
            await asyncio.sleep(HOUSEKEEPING)
            self.metrics.loop_lag.observe(max(loop.time() - due, 0.0))
            self._tidy()

    async def _watch_files(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING)
            files = self._files
            if await aside(files.changed) and files is self._files:
                log.info("broker.secret_files_changed")
                self.want_reload()

    async def _beat(self) -> None:
        """Give a sign of life, apart from housekeeping: only a loop that stands is silent."""
        beat = self.metrics.process.beat
        while True:
            beat.set(0 if self._health.draining else time.monotonic())
            await asyncio.sleep(BEAT)

    @property
    def _refusal_logs(self) -> tuple[logs.RefusalLog, ...]:
        return self._routes.refusals, self.minter.renewal_log, self._admin_refusals

    def _tidy(self) -> None:
        now = self._clock.mono()
        self.store.purge_expired()
        self.book.purge_expired()
        self.door.failures.purge_expired(now)
        if self._admin_door is not None:
            self._admin_door.failures.purge_expired(now)
        for refusals in self._refusal_logs:
            refusals.flush(now)
        self._pauses.tidy()
        if self.sharing is not None:
            self._health.degraded = self.sharing.is_degraded
            self._health.refuses = self.sharing.refuses
        self._publish()
