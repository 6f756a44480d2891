"""The life of one broker process: it starts, serves, reloads, drains and closes.

Start: settings -> parts -> state file -> listeners.  Stop: readiness turns, requests are still
taken for `drain_lead` (a balancer needs that long to look away), the listener closes, what is under
way ends, the state file is closed.  Reload: everything is built from the new settings first and
swapped in only if all of it could be built.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

import structlog

from broker.app import factory, wiring
from broker.app.gc_tuning import GcTuner
from broker.app.housekeeping import FileWatch, Housekeeping
from broker.app.reload import Reloader
from broker.app.worker_context import WorkerContext
from broker.clock import SystemClock, sleep_unless
from broker.config.secret_files import SecretFiles
from broker.config.settings import Settings
from broker.issuers.upstream import UpstreamIssuer
from broker.model import LimitName
from broker.tasks import Background
from broker.telemetry import exposition
from broker.telemetry.cells import SharedCells
from broker.telemetry.labels import BackgroundTask
from broker.web import admin, admin_sessions
from broker.web.acceptor import Acceptor
from broker.web.listener import CannotListen, Listener, listen
from broker.web.server import BACKLOG

log = structlog.get_logger()


class App:
    """One broker process.  `load` reads the settings anew, for a reload; it raises ConfigError.

    With a `worker` it is one of several.  Then its supervisor has the admin listener, watches
    secret files, tells it what to follow, and writes of the life of the whole.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Settings],
        environ: Mapping[str, str],
        *,
        dev: bool = False,
        worker: WorkerContext | None = None,
    ) -> None:
        self._settings = settings
        self._dev = dev
        self._worker = worker
        self._stopping = asyncio.Event()
        self._lead_over = asyncio.Event()
        self._reload_wanted = asyncio.Event()
        self._tuner = GcTuner()
        # before they are read: a change in between is noticed
        files = SecretFiles(file for _, file in factory.watched_files(settings))
        self.watch = FileWatch(files, self._reload_wanted)
        self.parts = wiring.build(settings, environ, SystemClock(), worker)
        self.metrics = self.parts.metrics
        self.housekeeping = Housekeeping(self.parts, self._tuner)
        self.reloader = Reloader(self.parts, settings, environ, load, self.watch)
        layout = self.metrics.layout
        shared_cells = SharedCells([layout.cells]) if worker is None else worker.shared_cells
        self._registry = exposition.registry(
            layout.families, shared_cells, self.housekeeping.publish
        )
        self._background = Background(self.metrics.process.background)
        self._admin: admin.AdminListener | None = None
        self._listener: Listener | Acceptor | None = None
        self.url = ""
        self.admin_url = ""

    async def start(self) -> None:
        """Open everything; raises CannotListen, ConfigError, StateFileInUse, nothing left open."""
        parts = self.parts
        self._tuner.start()
        # The file before the addresses: in a deploy whose processes overlap, the old one has both
        # and gives the addresses up first.  To look at those now would end the new one at once;
        # where they are somebody else's, the file is free, and the end comes as soon.
        if parts.durable is not None:
            try:
                await parts.durable.open(self._stopping)
            except BaseException:
                await self._close_outside()
                raise
        if parts.shared_backend is not None:
            await parts.shared_backend.open()
        if parts.pacer is not None:
            await parts.pacer.start()
        try:
            await self._open_admin()
            await self._open_data()
        except CannotListen:
            await self._close_admin()
            await self._close_file()
            await self._close_outside()
            raise
        self.housekeeping.do_round()
        self._start_background()
        if self._worker is None:
            name = parts.issuer.name
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

    def _start_background(self) -> None:
        start = self._background.start
        start(BackgroundTask.HOUSEKEEPING, self.housekeeping.run)
        self.metrics.process.beat.set(time.monotonic())  # before it says that it is ready
        start(BackgroundTask.BEAT, self.housekeeping.beat)
        if self._worker is None:
            start(BackgroundTask.WATCHED_FILES, self.watch.run)
            start(BackgroundTask.RELOADS, lambda: self.reloader.run(self._reload_wanted))

    async def _open_admin(self) -> None:
        if self._worker is not None:
            self.admin_url = self._worker.admin_url
            return
        parts = self.parts
        application = admin.build(self._registry, parts.readiness)
        if parts.admin_authenticator is not None:
            admin_sessions.add(
                application,
                parts.admin_authenticator,
                parts.introspector,
                parts.clock,
                self.metrics.rejections[LimitName.AUTH.value],
                parts.admin_refusals,
            )
        self._admin = await admin.AdminListener.open(
            application,
            self._settings.admin.listen,
            keep_alive=self._settings.server.keep_alive.seconds,
        )
        self.admin_url = self._admin.url

    async def _open_data(self) -> None:
        await self.parts.server.prove_lane()
        self.parts.routes.admin_url = self.admin_url
        self._listener, self.url = await self._listen()
        wiring.add_pages(self.parts, self._settings, self._registry, self.url, dev=self._dev)

    async def _listen(self) -> tuple[Listener | Acceptor, str]:
        server, worker = self.parts.server, self._worker
        if worker is None:
            return await listen(server, self._settings.server.listen, "server.listen", BACKLOG)
        acceptor = Acceptor(worker.sockets, server, worker.ahead)
        acceptor.start(BACKLOG)
        return acceptor, worker.url

    async def _drain(self) -> None:
        server, parts = self._settings.server, self.parts
        ends = time.monotonic() + server.drain.seconds
        parts.readiness.draining = True
        self.metrics.process.beat.set(0)
        self.housekeeping.publish()
        if self._worker is None:
            lead = server.drain_lead.seconds
            log.info("broker.draining", lead_s=lead, drain_s=server.drain.seconds)
        await sleep_unless(self._lead_over, server.drain_lead.seconds)
        if self._listener is not None:
            self._listener.close()
        await parts.server.drain(max(ends - time.monotonic(), 0.1))
        with contextlib.suppress(TimeoutError):  # mints under way are paid for: into the file
            async with asyncio.timeout(max(ends - time.monotonic(), 0.1)):
                await parts.token_service.flights.drained()
        await self._close_admin()  # before the file: it has every end that was answered
        await self._close_file()  # before whatever else there is, which may hang
        await self._close_outside()
        for refusals in parts.refusal_logs:
            refusals.sum_up()
        if self._worker is None:
            log.info("broker.stopped")

    async def _close_admin(self) -> None:
        if self._admin is not None:
            await self._admin.close()

    async def _close_file(self) -> None:
        if self.parts.durable is not None:
            await self.parts.durable.close()

    async def _close_outside(self) -> None:
        parts = self.parts
        await self._background.close()
        await parts.token_service.flights.close()
        if isinstance(parts.issuer, UpstreamIssuer):
            await parts.issuer.close()  # before the budget, which tells what that leaves out
        if parts.pass_through is not None:
            await parts.pass_through.close()
        if parts.pacer is not None:
            await parts.pacer.close()
        if parts.shared_backend is not None:
            await parts.shared_backend.close()
        self._tuner.stop()
