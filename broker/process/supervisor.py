"""Keeps workers: binds what they share, replaces who dies, and answers for all of them.

Start: both addresses are bound here, so that an address in use is one error and not N; then each
worker is given the listening sockets, the settings and its row of the shared cells.  The sockets
are shared, not bound again by each worker with SO_REUSEPORT: that would reset what is queued for
a worker that dies, and does not exist for Unix sockets.

Life: a worker that dies is replaced, its counts stay, its gauges go.  SIGHUP, or a secret file that
changed: the settings are read and checked here, then workers take them over one by one, the next
when the last has said so; one that starts meanwhile begins with them.  The store's secrets are read
here only, and travel with the settings: workers with two sealing keys would be two fleets.

Stop: readiness turns here and in every worker, which drain by themselves; this copy of the sockets
is closed with the last of theirs.  If this process is killed, workers notice and drain.

Knows nothing of tokens: no request passes here, only scrapes and probes.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from aiohttp.web import Application
from prometheus_client import CollectorRegistry

from broker.app import credentials, factory
from broker.app.reload import check_restart, in_force, needs_restart, read_aside
from broker.clock import sleep_unless
from broker.config.schema import ConfigError
from broker.config.secret_files import SecretFiles
from broker.config.settings import Settings
from broker.exit_codes import FATAL_EXIT_CODES
from broker.process.ipc import Start, packed
from broker.process.worker_process import WorkerProcess, reason_of
from broker.process.worker_watch import WorkerWatch
from broker.rules import restarts
from broker.tasks import Background, aside
from broker.telemetry import exposition, logs
from broker.telemetry.cells import share, shared
from broker.telemetry.labels import BackgroundTask
from broker.telemetry.readiness import Readiness
from broker.web import admin
from broker.web.listener import CannotListen, listen
from broker.web.server import BACKLOG

if TYPE_CHECKING:
    from broker.app.session_admin import SessionAdminApi

log = structlog.get_logger()

ROUND = 0.5
"""Seconds between looks at workers, at what they take of the machine, and at secret files."""

GRACE = 2.0
"""Seconds beyond `drain` in which a worker must have ended: it closes connections and says so."""


class CannotStart(Exception):
    """A worker said at the start that it cannot work, and why, on standard error."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Read(NamedTuple):
    """What a reload has read: what the files say, and what of it can be in force.

    `told` is what workers are told; `put_in_force` is for what is served here.
    """

    loaded: Settings
    settings: Settings
    files: SecretFiles
    other_key: bool
    told: Settings
    put_in_force: Callable[[], None]


def _nothing() -> None:
    """Put nothing in force: no sessions are served here."""


class Supervisor:
    """The parent of all workers.  `load` reads the settings anew; it raises ConfigError.

    Raises ConfigError itself for settings with which no worker could start.
    """

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
        self._files = SecretFiles(file for _, file in factory.watched_files(settings))
        factory.check(settings, environ)
        self._sealing_key = credentials.sealing_key(settings)
        self._told = factory.with_store_secrets(settings, self._sealing_key)
        count, width = settings.server.workers, factory.metrics(settings).layout.width
        self._memory = share(count + 1, width)
        self._shared_cells = shared(self._memory, width)
        self.metrics = factory.metrics(settings, self._shared_cells.rows[0])
        self._children: dict[int, WorkerProcess] = {}
        self._health = Readiness(lambda: any(child.serves for child in self._children.values()))
        self._watch = WorkerWatch(self._children, self._shared_cells, self.metrics, self._health)
        self._stopping = asyncio.Event()
        self._reload_wanted = asyncio.Event()
        self._workers_met = asyncio.Event()
        self._start_failed: int | None = None
        self._aborted = False
        self._background = Background(self.metrics.process.background)
        self._keepers = Background(self.metrics.process.background)

    async def start(self) -> None:
        """Open everything and wait for all workers; raises CannotListen or CannotStart."""
        server = self._settings.server
        application = admin.build(self.registry(), self._health)
        self._registrar = await self._open_registrar(application)
        self._admin = await admin.AdminListener.open(
            application,
            self._settings.admin.listen,
            keep_alive=server.keep_alive.seconds,
        )
        self.admin_url = self._admin.url
        try:
            self._listener, self.url = await listen(
                asyncio.Protocol, server.listen, "server.listen", BACKLOG, serve=False
            )
        except CannotListen:
            await self._admin.close()
            if self._registrar is not None:
                await self._registrar.close()
            raise
        for index in range(1, server.workers + 1):
            keep = partial(self._keep, index)
            self._keepers.start(BackgroundTask.WORKERS, keep, until=self._stopping)
        self._background.start(BackgroundTask.WORKER_WATCH, self._watch_workers)
        await self._workers_met.wait()
        if self._start_failed is not None:
            await self._end()
            raise CannotStart(self._start_failed)
        self._background.start(BackgroundTask.HOUSEKEEPING, self._do_rounds)
        self._background.start(BackgroundTask.WATCHED_FILES, self._watch_files)
        self._background.start(BackgroundTask.RELOADS, self._obey_reloads)
        log.info(
            "broker.started",
            url=self.url,
            admin_url=self.admin_url,
            issuer=self._settings.issuer.kind,
            workers=server.workers,
        )

    async def _open_registrar(self, application: Application) -> "SessionAdminApi | None":
        """Serve /v1/sessions, if there is a secret for it; workers have no admin listener."""
        if not factory.admin_clients(self._settings):
            return None
        from broker.app.session_admin import SessionAdminApi  # noqa: PLC0415 - the store's client is slow to import

        registrar = SessionAdminApi(self._told, self.metrics)
        registrar.serve_on(application)
        await registrar.open()
        return registrar

    async def run(self) -> None:
        """Wait until `stop` is called, then let all workers drain."""
        await self._stopping.wait()
        server = self._settings.server
        ends = time.monotonic() + server.drain.seconds + GRACE
        lead = server.drain_lead.seconds
        self._health.draining = True
        log.info("broker.draining", lead_s=lead, drain_s=server.drain.seconds)
        for child in self._children.values():
            child.stop()
        await asyncio.sleep(lead)
        self._listener.close()
        await self._keepers.wait(ends - time.monotonic())
        await self._end()
        log.info("broker.stopped")

    def stop(self) -> None:
        """Begin to drain."""
        self._stopping.set()
        self._workers_met.set()

    def abort(self) -> None:
        """End all workers at once, also those that are just being started."""
        self._aborted = True
        for child in self._children.values():
            child.kill()

    def want_reload(self) -> None:
        """Read the settings again, and let all workers take them over."""
        self._reload_wanted.set()

    def registry(self) -> CollectorRegistry:
        """What a scrape shows: the sum of all."""
        return exposition.registry(self.metrics.layout.families, self._shared_cells, self._publish)

    async def _keep(self, index: int) -> None:
        """Keep one worker alive until the end."""
        delay = 0.0
        while not self._stopping.is_set():
            settings = self._told
            try:
                child = await WorkerProcess.start(self._begin(index, settings))
            except OSError as error:
                reason, lived = f"cannot be started: {error.strerror}", 0.0
            else:
                reason, lived = await self._attend(child, settings), child.lived
            if self._stopping.is_set():
                return
            delay = restarts.delay(delay, lived)
            self.metrics.process.restarts.inc()
            log.error("broker.worker_died", worker=index, reason=reason, again_in_s=delay)
            await sleep_unless(self._stopping, delay)

    async def _attend(self, child: WorkerProcess, settings: Settings) -> str:
        """See one process through its life, begun with these settings; returns how it ended."""
        self._children[child.index] = child
        try:
            if self._aborted:
                child.kill()
            elif self._stopping.is_set():
                child.stop()
            missed = settings is not self._told  # a reload, while there was nobody to lead
            if await child.met():
                log.info("broker.worker_started", worker=child.index, pid=child.pid)
                self._note_met()
            if missed and (failure := await self._lead(child, packed(self._told))):
                self._report_failure([failure])
            code = await child.gone()
            if not self._workers_met.is_set() and code in FATAL_EXIT_CODES:
                self._start_failed = code
                self.stop()
        finally:
            child.kill()  # if it is not gone: its row of the shared cells is its successor's
            del self._children[child.index]
            self.metrics.layout.drop_gauges(self._shared_cells.rows[child.index])
        return reason_of(code)

    def _note_met(self) -> None:
        if sum(child.is_ready for child in self._children.values()) == self._count:
            self._workers_met.set()

    @property
    def _count(self) -> int:
        return self._settings.server.workers

    def _begin(self, index: int, settings: Settings) -> Start:
        return Start(
            worker=index,
            settings=packed(settings),
            dev=self._dev,
            url=self.url,
            admin_url=self.admin_url,
            listeners=tuple(listener.fileno() for listener in self._listener.sockets),
            shared_cells=self._memory,
            layout=self.metrics.layout_id,
            log_key=logs.share_key(),
        )

    async def _obey_reloads(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            try:
                await self.rolling_reload()
            except BaseException:
                self._note_reload(failed=True)
                raise

    async def rolling_reload(self) -> None:
        """Check new settings, then put them in force, one worker after the other."""
        try:
            read = await read_aside(self._read)
        except ConfigError as error:
            self._report_failure([str(error)])
            return
        read.put_in_force()
        changed = needs_restart(self._settings, read.loaded, other_key=read.other_key)
        self._settings, self._told, self._files = read.settings, read.told, read.files
        tree = packed(read.told)
        failures = [await self._lead(child, tree) for child in list(self._children.values())]
        logs.configure(read.settings.log)
        if any(failures):
            self._report_failure([failure for failure in failures if failure])
            return
        self._note_reload(failed=False)
        log.info("broker.reloaded", needs_restart=changed)

    def _read(self) -> _Read:
        """Read all files anew; raises ConfigError."""
        loaded = self._load()
        check_restart(self._settings, loaded, self._environ)
        settings = in_force(self._settings, loaded)
        files = SecretFiles(file for _, file in factory.watched_files(settings))
        factory.check(settings, self._environ)
        other_key = credentials.sealing_key(settings) != self._sealing_key
        told = factory.with_store_secrets(settings, self._sealing_key)
        registrar = self._registrar
        put_in_force = _nothing if registrar is None else registrar.prepared(told)
        return _Read(loaded, settings, files, other_key, told, put_in_force)

    async def _lead(self, child: WorkerProcess, tree: dict[str, Any]) -> str | None:
        """Let a worker follow once it is ready; returns why it did not.

        One that does not answer is ended: its replacement begins with these settings.  One that
        does not become ready is the affair of whoever watches.
        """
        _ = await child.met()
        try:
            return await child.follow(tree)
        except TimeoutError:
            self._watch.end_hung(child, "no answer to a reload")
            return f"worker {child.index} did not answer and was ended"

    def _note_reload(self, *, failed: bool) -> None:
        self.metrics.process.reloads["failure" if failed else "success"].inc()
        self.metrics.process.reload_failed.set(failed)

    def _report_failure(self, failures: list[str]) -> None:
        self._note_reload(failed=True)
        log.error("broker.reload_failed", error="; ".join(dict.fromkeys(failures)))

    async def _do_rounds(self) -> None:
        while True:
            await asyncio.sleep(ROUND)
            self._publish()
            if self._registrar is not None:
                self._registrar.tidy()

    async def _watch_files(self) -> None:
        while True:
            await asyncio.sleep(ROUND)
            files = self._files
            if await aside(files.changed) and files is self._files:
                log.info("broker.secret_files_changed")
                self.want_reload()

    async def _watch_workers(self) -> None:
        """Look for signs of life; apart from housekeeping, which may fail."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(ROUND)
            now = time.monotonic()
            self._watch.look(now - last, self._settings.server.drain.seconds + GRACE)
            last = now

    def _publish(self) -> None:
        self._watch.publish(closed=self._settings.store.on_error == "closed")

    async def _end(self) -> None:
        """End whoever is left, and close everything."""
        self.abort()
        await self._keepers.wait(GRACE)  # killed is gone at once, unless the kernel holds it
        await self._keepers.close()
        await self._background.close()
        self._listener.close()
        await self._admin.close()
        if self._registrar is not None:
            await self._registrar.close()
