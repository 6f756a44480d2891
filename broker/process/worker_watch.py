"""Watches workers from outside: signs of life, what they take of the machine, the store they miss.

Reads their rows of the shared cells and the kernel's figures.  Ends those that hang; who keeps them
replaces them.
"""

from collections.abc import Mapping

import structlog

from broker.process.worker_process import WorkerProcess
from broker.telemetry.cells import SharedCells
from broker.telemetry.metrics import Metrics
from broker.telemetry.readiness import Readiness
from broker.telemetry.streams import stderr

log = structlog.get_logger()


class WorkerWatch:
    """Looks at `workers`, by their rows of `shared_cells`; tells `metrics` and `health`."""

    def __init__(
        self,
        workers: Mapping[int, WorkerProcess],
        shared_cells: SharedCells,
        metrics: Metrics,
        health: Readiness,
    ) -> None:
        self._workers = workers
        self._shared_cells = shared_cells
        self._metrics = metrics
        self._health = health

    def look(self, elapsed: float, hung_after: float) -> None:
        """Look for signs of life, `elapsed` seconds after the last look.

        A worker that gives none for `hung_after` seconds is ended.
        """
        for worker in list(self._workers.values()):
            self._look_at(worker, elapsed, hung_after)
        self._health.hung = any(worker.is_silent for worker in self._workers.values())

    def _look_at(self, worker: WorkerProcess, elapsed: float, hung_after: float) -> None:
        """Note whether a worker has given a sign of life; end it if it gives none for long."""
        if worker.is_hung:
            return  # killed; the kernel holds it
        process, row = self._metrics.process, self._shared_cells.rows[worker.index]
        was_quiet = worker.pulse.is_quiet
        beat = process.beat.of(row).value
        worker.pulse = pulse = worker.pulse.after(beat, elapsed, ready=worker.is_ready)
        if pulse.is_quiet and beat:
            process.workers.of(row).set(0)  # until it says otherwise
            if not was_quiet:
                log.warning("broker.worker_silent", worker=worker.index, pid=worker.pid)
        if pulse.is_hung(hung_after):
            self.end_hung(worker, "silent" if worker.is_ready else "never ready")

    def end_hung(self, worker: WorkerProcess, reason: str) -> None:
        """Kill a worker that hangs, once: the one who keeps it replaces it."""
        worker.is_hung = True
        worker.kill()
        self._metrics.process.hangs.inc()
        log.error("broker.worker_hung", worker=worker.index, pid=worker.pid, reason=reason)

    def publish(self, *, closed: bool) -> None:
        """Note what each worker takes of the machine, and how all of them are.

        `closed` tells whether a worker without the shared store refuses.
        """
        self._note_store(closed=closed)
        process = self._metrics.process
        process.log_lines_dropped += stderr.take_lost()
        for label, memory in process.memory.items():
            worker = self._workers.get(int(label))
            usage = None if worker is None else worker.usage()
            memory.set(0 if usage is None else usage.resident_bytes)
            if worker is not None and usage is not None and usage.cpu_seconds > worker.counted_cpu:
                process.cpu[label] += usage.cpu_seconds - worker.counted_cpu
                worker.counted_cpu = usage.cpu_seconds

    def _note_store(self, *, closed: bool) -> None:
        """Learn from the workers' rows whether they are without the shared store."""
        degraded = self._metrics.store.degraded
        without = [degraded.of(self._shared_cells.rows[index]).value > 0 for index in self._workers]
        self._health.degraded = any(without)
        self._health.refuses = closed and bool(without) and all(without)
