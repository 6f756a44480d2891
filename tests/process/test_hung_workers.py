"""Workers that are there and do nothing: seen, told, killed, replaced, and counted."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from processes import (
    Caller,
    Tree,
    far_away,
    good,
    is_alive,
    merged,
    until,
    until_true,
)
from test_serve import client_secret
from test_supervisor import supervised, worker_settings
from test_workers import WORKERS, Workers, request_tokens

from broker.app.reload import UNREADABLE
from broker.process import supervisor as supervisor_module
from broker.rules import hangs

HANGS, RESTARTS = "broker_worker_hangs_total", "broker_worker_restarts_total"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A configuration that serves, with limits that are far away."""
    return merged(good(tmp_path), far_away())


async def says(caller: Caller, status: int, state: str) -> bool:
    """Whether readiness is this."""
    async with caller.http.get(f"{caller.admin_url}/readyz") as answer:
        return (answer.status, await answer.json()) == (status, {"status": state})


async def counts(caller: Caller, name: str, value: float) -> bool:
    """Whether a metric has this value."""
    return await caller.metric(name) == value


async def test_N10_a_stopped_worker_is_seen_killed_and_replaced(tmp_path: Path, tree: Tree) -> None:
    """SIGSTOP: not counted on after a few seconds, gone after ten; each is told, once."""
    with Workers.on(tmp_path, tree) as workers:
        async with Caller(workers, client_secret(tree)) as caller:
            assert await says(caller, 200, "ok")
            hung, began = workers.pids()[1], time.monotonic()
            os.kill(hung, signal.SIGSTOP)
            await until_true(lambda: says(caller, 200, "worker_hung"))
            assert await counts(caller, "broker_workers", WORKERS - 1)
            assert await counts(caller, HANGS, 0)
            await until_true(lambda: counts(caller, HANGS, 1))
            seen = time.monotonic() - began
            await until(lambda: workers.pids()[1] != hung)
            assert not is_alive(hung)
            await until_true(lambda: says(caller, 200, "ok"))
            await until_true(lambda: counts(caller, "broker_workers", WORKERS))
            assert await caller.metric(RESTARTS) == 1
            await request_tokens(workers, caller)
        print(f"\nkilled {seen:.1f} s after it stood")
        (silent,), (told,) = (
            workers.events("broker.worker_silent"),
            workers.events("broker.worker_hung"),
        )
        assert (silent["worker"], silent["pid"]) == (1, hung)
        assert (told["worker"], told["pid"], told["reason"]) == (1, hung, "silent")
        assert [e["reason"] for e in workers.events("broker.worker_died")] == ["SIGKILL"]
        assert workers.end() == 0


async def test_N10_nobody_is_left_to_serve_when_all_hang(tmp_path: Path, tree: Tree) -> None:
    """The instance is not ready, says why, and serves again by itself."""
    with Workers.on(tmp_path, tree) as workers:
        async with Caller(workers, client_secret(tree)) as caller:
            before = workers.pids()
            for pid in before.values():
                os.kill(pid, signal.SIGSTOP)
            await until_true(lambda: says(caller, 503, "no_worker"))
            assert await counts(caller, "broker_workers", 0)
            await until(lambda: not set(before.values()) & set(workers.pids().values()))
            await until_true(lambda: says(caller, 200, "ok"))
            assert await caller.metric(HANGS) == WORKERS
            await request_tokens(workers, caller)


async def test_N10_a_worker_that_goes_on_in_time_lives(tmp_path: Path, tree: Tree) -> None:
    """It stood for longer than it is counted on, and comes back: nothing is lost."""
    with Workers.on(tmp_path, tree) as workers:
        async with Caller(workers, client_secret(tree)) as caller:
            before = workers.pids()
            os.kill(before[1], signal.SIGSTOP)
            await until_true(lambda: says(caller, 200, "worker_hung"))
            os.kill(before[1], signal.SIGCONT)
            await until_true(lambda: says(caller, 200, "ok"))
            await until_true(lambda: counts(caller, "broker_workers", WORKERS))
            assert workers.pids() == before
            assert await caller.metric(HANGS) == 0


async def test_N10_a_suspended_machine_kills_nobody(tmp_path: Path, tree: Tree) -> None:
    """All processes stand for longer than a hang; the supervisor wakes first."""
    with Workers.on(tmp_path, tree) as workers:
        async with Caller(workers, client_secret(tree)) as caller:
            before = workers.pids()
            everybody = [workers.process.pid, *before.values()]
            for pid in everybody:
                os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(hangs.HUNG + 2)  # the clocks go on, and nothing else
            os.kill(workers.process.pid, signal.SIGCONT)
            await until_true(lambda: says(caller, 200, "ok"))
            await asyncio.sleep(hangs.LONGEST_LOOK)  # it looks at those who still sleep
            for pid in everybody:
                os.kill(pid, signal.SIGCONT)
            await request_tokens(workers, caller)
            assert workers.pids() == before
            assert [await caller.metric(name) for name in (HANGS, RESTARTS)] == [0, 0]
            assert workers.events("broker.worker_died") == []


@pytest.mark.parametrize("stands", ["while True: pass", "import time; time.sleep(3600)"])
async def test_N10_a_loop_that_stands_is_seen(
    tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch, stands: str
) -> None:
    """A busy loop in Python, a call that blocks: the process runs, and does nothing for anybody."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        f"TRAP = pathlib.Path({str(tmp_path / 'trap')!r})\n"
        "def stand():\n"
        "    if TRAP.exists():\n"
        "        TRAP.unlink()\n"
        f"        exec({stands!r})\n"
        "if 'broker.process.worker' in open('/proc/self/cmdline').read():\n"
        "    from broker.app.housekeeping import Housekeeping\n"
        "    do_round = Housekeeping.do_round\n"
        "    Housekeeping.do_round = lambda self: (do_round(self), stand())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    with Workers.on(tmp_path, tree) as workers:
        async with Caller(workers, client_secret(tree)) as caller:
            before = set(workers.pids().values())
            (tmp_path / "trap").touch()
            await until_true(lambda: counts(caller, HANGS, 1))
            await until(lambda: len(set(workers.pids().values()) - before) == 1)
            await request_tokens(workers, caller)


class TestSupervisor:
    async def test_N10_a_start_that_does_not_end_is_ended(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A replacement that never becomes ready: killed, counted, and tried again."""
        start, pids = supervisor_module.WorkerProcess.start, list[int]()
        async with supervised(worker_settings(tmp_path, 1)) as supervisor:

            async def start_and_stand(
                begin: supervisor_module.Start,
            ) -> supervisor_module.WorkerProcess:
                started = await start(begin)
                if not pids:
                    os.kill(started.pid, signal.SIGSTOP)
                pids.append(started.pid)
                return started

            monkeypatch.setattr(supervisor_module.WorkerProcess, "start", start_and_stand)
            monkeypatch.setattr(hangs, "START", 2.0)
            supervisor._children[1].kill()
            await until(lambda: len(pids) == 2)
            monkeypatch.setattr(hangs, "START", 30.0)
            await until(lambda: 1 in supervisor._children and supervisor._children[1].is_ready)
            assert not is_alive(pids[0])
            assert supervisor.metrics.process.hangs.value == 1

    async def test_N10_one_worker_that_drains_by_itself_is_let_end(self, tmp_path: Path) -> None:
        """SIGTERM to a worker alone: its beat ends, and it is no hang."""
        settings = worker_settings(tmp_path, 2, server__drain_lead="4s")
        async with supervised(settings) as supervisor:
            pid = supervisor._children[1].pid
            os.kill(pid, signal.SIGTERM)
            await until(lambda: 1 in supervisor._children and supervisor._children[1].pid != pid)
            assert supervisor.metrics.process.hangs.value == 0
            assert supervisor._health.hung is False

    async def test_N2_the_watch_survives_a_failing_housekeeping(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are apart, so that a defect in one does not leave hung workers alone."""
        async with supervised(worker_settings(tmp_path, 1)) as supervisor:

            def fail() -> None:
                raise ValueError

            monkeypatch.setattr(supervisor, "_publish", fail)
            hung = supervisor._children[1].pid
            os.kill(hung, signal.SIGSTOP)
            await until(lambda: supervisor.metrics.process.hangs.value == 1)
            monkeypatch.undo()
            await until(lambda: 1 in supervisor._children and supervisor._children[1].is_ready)
            assert supervisor.metrics.process.background[HOUSEKEEPING].value >= 1


HOUSEKEEPING = supervisor_module.BackgroundTask.HOUSEKEEPING


async def test_N2_workers_whose_files_hang_say_so_and_serve(
    tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mount stands after the supervisor has read: no loop stands, and nobody is killed.

    They follow as soon as they can read, and hear meanwhile that they are to end.
    """
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import pathlib, time\n"
        f"TRAP = pathlib.Path({str(tmp_path / 'trap')!r})\n"
        "if 'broker.process.worker' in open('/proc/self/cmdline').read():\n"
        "    from broker.app import reload\n"
        "    from broker.config import files\n"
        "    opened, reload.READING = files.open_regular, 3.0\n"
        "    def stand(path, *, follow=True):\n"
        "        while TRAP.exists():\n"
        "            time.sleep(0.01)\n"
        "        return opened(path, follow=follow)\n"
        "    files.open_regular = stand\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    with Workers.on(tmp_path, tree) as workers:
        async with Caller(workers, client_secret(tree)) as caller:
            before = workers.pids()
            (tmp_path / "trap").touch()
            told = asyncio.create_task(asyncio.to_thread(workers.reload))
            while not told.done():
                await request_tokens(workers, caller)
                assert await says(caller, 200, "ok")
            assert (await told)["event"] == "broker.reload_failed"
            assert (await told)["error"] == UNREADABLE
            (tmp_path / "trap").unlink()
            assert (await asyncio.to_thread(workers.reload))["event"] == "broker.reloaded"
            assert workers.pids() == before
            assert [await caller.metric(name) for name in (HANGS, RESTARTS)] == [0, 0]
        (tmp_path / "trap").touch()
        workers.send(signal.SIGHUP)
        assert workers.end() == 0
        assert workers.events("broker.worker_died") == []
