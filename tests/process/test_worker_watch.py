"""How a supervisor looks at its workers: by their rows, without any process."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from web.edge import logging_to

from broker.config import load as config
from broker.process.worker_process import Usage
from broker.process.worker_watch import WorkerWatch
from broker.rules.hangs import HUNG, QUIET, START, Pulse
from broker.telemetry.cells import share, shared
from broker.telemetry.metrics import Metrics
from broker.telemetry.readiness import Readiness

DRAIN = 20.0


class Worker:
    """A worker as its watch sees it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.pid = 1000 + index
        self.is_ready, self.is_hung = True, False
        self.pulse = Pulse()
        self.counted_cpu = 0.0
        self.kills = 0
        self.taken: Usage | None = Usage(1.0, 4096 * index)

    @property
    def is_silent(self) -> bool:
        return self.is_hung or self.pulse.is_stuck

    def kill(self) -> None:
        self.kills += 1

    def usage(self) -> Usage | None:
        return self.taken


class WatchedWorkers:
    """Two workers and who watches them."""

    def __init__(self) -> None:
        width = Metrics("local", shared_store=True, workers=2).layout.width
        handle = share(3, width)
        self.cells = shared(handle, width)
        os.close(handle)
        self.metrics = Metrics("local", shared_store=True, workers=2, cells=self.cells.rows[0])
        self.workers = {index: Worker(index) for index in (1, 2)}
        self.health = Readiness()
        watched: Any = self.workers
        self.watch = WorkerWatch(watched, self.cells, self.metrics, self.health)
        self.out = io.StringIO()

    def beat(self, index: int, value: float) -> None:
        """Write a sign of life as a worker does."""
        process, row = self.metrics.process, self.cells.rows[index]
        process.beat.of(row).set(value)
        process.workers.of(row).set(value > 0)

    def counted(self, index: int) -> float:
        """Return whether this worker counts as one that takes requests."""
        return self.metrics.process.workers.of(self.cells.rows[index]).value

    def events(self) -> list[tuple[str, int]]:
        """What was logged, and of which worker."""
        lines = map(json.loads, self.out.getvalue().splitlines())
        return [(line["event"], line["worker"]) for line in lines]


@pytest.fixture
def watched() -> Iterator[WatchedWorkers]:
    """Workers whose log can be read."""
    made = WatchedWorkers()
    with _logging(made.out):
        yield made


@contextmanager
def _logging(out: io.StringIO) -> Iterator[None]:
    with logging_to(out, config.from_tree({"issuer": {"kind": "local"}})):
        yield


def test_N10_a_worker_that_is_silent_counts_no_more_and_is_told_once(
    watched: WatchedWorkers,
) -> None:
    """The other one is left alone; a sign of life makes it count again, and be told anew."""
    for start in (1.0, 101.0):
        watched.beat(1, start)
        for look in range(int(QUIET) + 3):
            watched.beat(2, start + look)
            watched.watch.look(1.0, DRAIN)
        assert (watched.counted(1), watched.counted(2)) == (0, 1)
        assert watched.health.hung
        watched.beat(1, start + 50)
        watched.watch.look(1.0, DRAIN)
        assert not watched.health.hung
        assert watched.counted(1) == 1
    assert watched.events() == [("broker.worker_silent", 1)] * 2
    assert all(worker.kills == 0 for worker in watched.workers.values())


@pytest.mark.parametrize(("ready", "after", "reason"), [(True, HUNG, "silent"), (False, START, "")])
def test_N10_a_worker_that_hangs_is_killed_once(
    watched: WatchedWorkers, *, ready: bool, after: float, reason: str
) -> None:
    """It is counted and told once, however long the kernel holds it, and said by readiness."""
    watched.workers[1].is_ready = ready
    watched.beat(1, 1.0 if ready else 0.0)
    looks = 0
    while not watched.workers[1].is_hung:
        watched.beat(2, 1.0 + looks)
        watched.watch.look(1.0, DRAIN)
        looks += 1
    assert looks == after + ready  # the first look hears what was written
    for more in range(5):
        watched.beat(2, 100.0 + more)
        watched.watch.look(1.0, DRAIN)
    assert (watched.workers[1].kills, watched.workers[2].kills) == (1, 0)
    assert watched.metrics.process.hangs.value == 1
    assert watched.health.hung
    hung = [json.loads(line) for line in watched.out.getvalue().splitlines()][-1]
    told = (hung["event"], hung["worker"], hung["pid"], hung["reason"])
    assert told == ("broker.worker_hung", 1, 1001, reason or "never ready")


def test_N10_a_worker_that_drains_has_its_time(watched: WatchedWorkers) -> None:
    """Its last beat is 0; nobody calls it silent, and it is killed after the drain's time."""
    watched.beat(1, 1.0)
    watched.watch.look(1.0, DRAIN)
    watched.beat(1, 0.0)
    for look in range(int(DRAIN)):
        watched.beat(2, 2.0 + look)
        watched.watch.look(1.0, DRAIN)
        assert not watched.health.hung
    assert watched.workers[1].kills == 0
    watched.watch.look(1.0, DRAIN)
    assert (watched.workers[1].kills, watched.events()) == (1, [("broker.worker_hung", 1)])


def test_memory_is_that_of_the_moment_and_time_is_added_up(watched: WatchedWorkers) -> None:
    """Who is gone takes no memory, and keeps what it has taken of the processor."""
    memory, cpu = watched.metrics.process.memory, watched.metrics.process.cpu
    watched.watch.publish(closed=False)
    assert [(memory[n].value, cpu[n].value) for n in ("1", "2")] == [(4096, 1), (8192, 1)]
    watched.workers[1].taken, watched.workers[2].taken = None, Usage(3.5, 5)
    watched.watch.publish(closed=False)
    assert [(memory[n].value, cpu[n].value) for n in ("1", "2")] == [(0, 1), (5, 3.5)]
    del watched.workers[2]
    watched.watch.publish(closed=False)
    assert [(memory[n].value, cpu[n].value) for n in ("1", "2")] == [(0, 1), (0, 3.5)]


def test_lines_that_the_supervisor_lost_are_counted(
    watched: WatchedWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once."""
    lost = iter((3, 0, 4))
    monkeypatch.setattr("broker.process.worker_watch.stderr.take_lost", lambda: next(lost))
    for total in (3, 3, 7):
        watched.watch.publish(closed=False)
        assert watched.metrics.process.log_lines_dropped.value == total


@pytest.mark.parametrize("closed", [False, True])
def test_S5_an_instance_refuses_when_none_of_its_workers_has_the_store(
    watched: WatchedWorkers, *, closed: bool
) -> None:
    """And only where they were told so; without any worker there is nobody to refuse."""
    degraded = watched.metrics.store.degraded
    for without in ((), (1,), (1, 2)):
        for index in (1, 2):
            degraded.of(watched.cells.rows[index]).set(index in without)
        watched.watch.publish(closed=closed)
        assert watched.health.degraded is bool(without)
        assert watched.health.refuses is (closed and len(without) == 2)
    watched.workers.clear()
    watched.watch.publish(closed=closed)
    assert not watched.health.refuses
