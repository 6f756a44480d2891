"""What supervisor and workers say to each other, and what happens when one does not play along."""

import asyncio
import io
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from processes import TIMEOUT, good, put, secret_file, secret_in, until, until_true
from test_config import alone, candidates, keys
from web.edge import logging_to

from broker.app import factory, session_admin
from broker.app.reload import in_force, needs_restart
from broker.app.worker_context import PeerLoad, WorkerContext
from broker.config import load as config
from broker.config import schema
from broker.config.settings import Settings
from broker.process import supervisor as supervisor_module
from broker.process import worker, worker_process
from broker.process.ipc import (
    ORDERS,
    REPORTS,
    Channel,
    Order,
    Ready,
    Reload,
    Reloaded,
    Report,
    Start,
    Stop,
    packed,
)
from broker.process.supervisor import CannotStart, Supervisor
from broker.process.worker_process import Usage, reason_of, usage
from broker.rules import restarts
from broker.tasks import TaskSet
from broker.telemetry.cells import share, shared
from broker.telemetry.metrics import Metrics
from broker.testing import FakeClock
from broker.web.auth import FAILED_AUTH_LIMIT

EVERY_KEY = list(keys())


def settings_with(dotted: str, kind: Any) -> list[Settings]:
    """Settings that differ from the defaults in one key."""
    return [alone(dotted, value) for value in candidates(dotted, kind)[:2]]


@pytest.mark.parametrize(("dotted", "kind"), EVERY_KEY, ids=str)
class TestSettingsOfAWorker:
    def test_arrive_as_they_were_sent(self, dotted: str, kind: Any) -> None:
        """Every key, secrets revealed, through the message and back."""
        for settings in settings_with(dotted, kind):
            sent = msgspec.json.encode(Reload(packed(settings)))
            order = ORDERS.decode(sent)
            assert isinstance(order, Reload)
            assert schema.build(order.settings) == settings

    def test_are_those_in_force_and_not_those_of_the_file(self, dotted: str, kind: Any) -> None:
        """What needs a restart stays, and only that."""
        first = alone("server.docs", value=False)
        for changed in settings_with(dotted, kind):
            held = in_force(first, changed)
            assert needs_restart(first, held) == []
            if needs_restart(first, changed):
                assert held != changed
            else:
                assert held == changed


def test_another_kind_of_issuer_changes_nothing_about_the_issuer() -> None:
    """Its keys would be of no use to the one that runs."""
    first = config.from_tree({"issuer": {"kind": "local"}})
    changed = config.from_tree({"issuer": {"kind": "upstream"}, "log": {"level": "debug"}})
    assert needs_restart(first, changed) == ["issuer"]
    assert in_force(first, changed) == replace(first, log=changed.log)


class TestChannel:
    async def test_ends_with_the_other_one(self) -> None:
        """Whoever is killed says nothing more: that is how it is noticed."""
        ours, theirs = socket.socketpair()
        channel = await Channel.over(ours, REPORTS)
        theirs.sendall(msgspec.json.encode(Ready()) + b'\n{"type": "Followed')
        theirs.close()
        assert await channel.receive() == Ready()
        assert await channel.receive() is None
        channel.send(Stop())  # to nobody: lost, not an error
        channel.close()


class Orders:
    """Stands for a supervisor's end of the channel: says these, then nothing for ever."""

    def __init__(self, *orders: Order) -> None:
        self._orders = list(orders)
        self.heard: list[Report] = []

    async def receive(self) -> Order:
        """Return the next order."""
        if not self._orders:
            await asyncio.Event().wait()
        return self._orders.pop(0)

    def send(self, report: Report) -> None:
        """Take note of an answer."""
        self.heard.append(report)


class Reader:
    """Stands for an app whose files can be read only once it was told to stop."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self.in_force = 0

    @property
    def reloader(self) -> "Reader":
        return self

    def prepared(self, _settings: Settings) -> Callable[[], None]:
        """Wait for files as a mounted file system does."""
        self._stopped.wait()

        def put_in_force() -> None:
            self.in_force += 1

        return put_in_force

    def stop(self) -> None:
        """Begin to drain."""
        self._stopped.set()


async def test_a_worker_hears_that_it_is_to_end_while_it_reads() -> None:
    """A file system that takes its time does not hold up a drain."""
    orders, reader, following = Orders(Reload({}), Stop()), Reader(), TaskSet()
    stand_ins: tuple[Any, Any] = orders, reader
    obeying = asyncio.ensure_future(worker._obey(*stand_ins, following))
    await until(lambda: orders.heard != [])
    assert (orders.heard, reader.in_force) == ([Reloaded()], 1)
    obeying.cancel()
    await asyncio.gather(obeying, return_exceptions=True)
    await following.close()


class HungUp:
    """A channel on which a worker said that it is ready, and nothing more."""

    def __init__(self) -> None:
        self._reports: list[Report] = [Ready()]

    async def receive(self) -> Report | None:
        """Return what was said."""
        return self._reports.pop() if self._reports else None

    def close(self) -> None:
        """Nothing is open."""


async def test_a_worker_that_has_hung_up_serves_nobody() -> None:
    """Though the kernel still holds its process: nobody waits for it, or counts on it."""
    held: Any = None
    channel: Any = HungUp()
    child = worker_process.WorkerProcess(1, held, channel)
    await child._listening
    assert not child.serves
    assert not await child.met()


class TestRestarts:
    @given(st.lists(st.floats(0, restarts.WELL, exclude_max=True), max_size=12))
    def test_wait_longer_each_time(self, lives: list[float]) -> None:
        """0.1 s, doubled, at most 5 s, as long as it keeps dying young."""
        waits = [0.0]
        for lived in lives:
            waits.append(restarts.delay(waits[-1], lived))
        assert waits[1:] == [min(0.1 * 2**n, 5.0) for n in range(len(lives))]

    @given(st.floats(0, 5), st.floats(restarts.WELL, 1e9))
    def test_begin_anew_after_a_good_life(self, waited: float, lived: float) -> None:
        """A death a day is not a series."""
        assert restarts.delay(waited, lived) == restarts.FIRST


def test_usage_is_what_the_kernel_says() -> None:
    """CPU of user and system, and memory; nothing for one who is not there."""
    deadline = time.process_time() + 0.05
    while time.process_time() < deadline:
        os.getpid()
    found = usage(os.getpid())
    assert found is not None
    assert found.cpu_seconds == pytest.approx(time.process_time(), abs=0.1)
    assert 5e6 < found.resident_bytes < 5e9
    assert usage(2**22 + 1) is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [(0, "exit code 0"), (78, "exit code 78"), (-9, "SIGKILL"), (-40, "signal 40")],
)
def test_ends_have_a_name(code: int, reason: str) -> None:
    """As the event tells it."""
    assert reason_of(code) == reason


def worker_settings(folder: Path, count: int = 2, **changes: object) -> Settings:
    """Settings of several workers on the memory store."""
    tree = good(folder)
    for dotted, value in changes.items():
        tree = put(tree, dotted.replace("__", "."), value)
    settings = config.from_tree(tree)
    return replace(settings, server=replace(settings.server, workers=count))


@asynccontextmanager
async def supervised(
    settings: Settings, load: Callable[[], Settings] | None = None
) -> AsyncIterator[Supervisor]:
    """Run workers, and drain them."""
    supervisor = Supervisor(settings, load or (lambda: settings), {})
    with logging_to(io.StringIO(), settings):
        await supervisor.start()
        try:
            yield supervisor
        finally:
            supervisor.stop()
            await supervisor.run()
            assert supervisor._children == {}


async def _take(
    supervisor: Supervisor, taker: worker_process.WorkerProcess, seconds: float
) -> None:
    """Let the kernel say that a worker has taken so much CPU, and look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taker, "usage", lambda: Usage(cpu_seconds=seconds, resident_bytes=1))
        supervisor._publish()


class TestSeat:
    def test_knows_who_has_fewer_connections(self) -> None:
        """Somebody who is gone has none, and somebody who is hung would not take one."""
        width = Metrics("local").layout.width
        handle = share(3, width)
        shared_cells = shared(handle, width)
        os.close(handle)
        mine, other, third = (Metrics("local", cells=row) for row in shared_cells.rows)
        siblings = [PeerLoad(m.process.beat, m.process.connections) for m in (other, third)]
        context = WorkerContext(1, [], "", "", shared_cells, mine, siblings)
        mine.process.connections.set(5)
        other.process.connections.set(3)
        assert context.ahead() == 0  # both have never lived
        other.process.beat.set(time.monotonic())
        assert context.ahead() == 2
        third.process.beat.set(time.monotonic())
        assert context.ahead() == 5
        third.process.connections.set(9)
        assert context.ahead() == 2
        other.layout.drop_gauges(shared_cells.rows[1])
        assert context.ahead() == -4
        third.process.beat.set(time.monotonic() - 60)
        assert context.ahead() == 0


class TestSupervisor:
    async def test_ends_with_the_code_of_a_worker_that_cannot_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another try would end alike: the operator reads the worker's line, not a thousand."""
        settings = worker_settings(tmp_path)
        (tmp_path / "one").unlink()
        monkeypatch.setattr(factory, "check", lambda *_: None)  # it vanishes after the check
        supervisor = Supervisor(settings, lambda: settings, {})
        with pytest.raises(CannotStart) as caught:
            await supervisor.start()
        assert caught.value.code == 78
        assert supervisor._children == {}

    async def test_a_worker_of_another_version_does_not_count_in_wrong_cells(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The package was replaced under a running broker: its cells may mean something else."""
        monkeypatch.setattr("broker.telemetry.metrics.VERSION", "0.0.1")
        settings = worker_settings(tmp_path)
        supervisor = Supervisor(settings, lambda: settings, {})
        with pytest.raises(CannotStart) as caught:
            await supervisor.start()
        assert caught.value.code == 78

    async def test_a_worker_that_does_not_follow_in_time_is_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hung for whatever reason: its replacement begins with the new settings."""
        first = worker_settings(tmp_path)
        later = replace(first, limits=replace(first.limits, fingerprint_format="any"))
        monkeypatch.setattr(worker_process, "ANSWER_TIME", 0.3)
        async with supervised(first, lambda: later) as supervisor:
            hung = supervisor._children[1].pid
            os.kill(hung, signal.SIGSTOP)
            await supervisor.rolling_reload()
            await until(lambda: _pid(supervisor, 1) not in (hung, None))
            await until(lambda: supervisor._children[1].is_ready)
            process = supervisor.metrics.process
            counted = (process.reloads["failure"].value, process.restarts.value)
            assert counted == (1, 1)
            assert supervisor._settings == later

    async def test_a_worker_that_dies_while_it_is_led_is_not_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It will not answer, and has not refused: the reload goes on, its successor begins so."""
        first = worker_settings(tmp_path)
        later = replace(first, limits=replace(first.limits, fingerprint_format="any"))
        monkeypatch.setattr(worker_process, "ANSWER_TIME", 10 * TIMEOUT)
        async with supervised(first, lambda: later) as supervisor:
            dying = supervisor._children[1].pid
            os.kill(dying, signal.SIGSTOP)
            led = asyncio.ensure_future(supervisor.rolling_reload())
            await until(lambda: supervisor._settings == later)
            os.kill(dying, signal.SIGKILL)
            async with asyncio.timeout(TIMEOUT):
                await led
            await until(lambda: _pid(supervisor, 1) not in (dying, None))
            await until(lambda: supervisor._children[1].is_ready)
            process = supervisor.metrics.process
            assert (process.reloads["success"].value, process.hangs.value) == (1, 0)

    async def test_what_workers_take_of_the_machine_is_counted_once(self, tmp_path: Path) -> None:
        """However often it is looked at; a successor's comes on top of what the dead one took."""
        settings = worker_settings(tmp_path)
        async with supervised(settings) as supervisor:
            taken = supervisor.metrics.process.cpu["1"]
            first = supervisor._children[1]
            await _take(supervisor, first, 100.0)
            before = taken.value
            for seconds in (107.0, 107.0, 112.0):
                await _take(supervisor, first, seconds)
            assert taken.value == pytest.approx(before + 12.0)
            first.kill()
            await until(lambda: supervisor._children.get(1, first) is not first)
            before = taken.value
            second = supervisor._children[1]
            counted = second.counted_cpu  # by the supervisor's own rounds
            await _take(supervisor, second, counted + 103.0)
            await _take(supervisor, second, counted + 103.0)
            assert taken.value == pytest.approx(before + 103.0)

    async def test_files_of_new_settings_are_watched_after_a_reload(self, tmp_path: Path) -> None:
        """And those that no setting names any more are not."""
        first = worker_settings(tmp_path)
        other = secret_file(tmp_path / "other")
        later = replace(first, clients={"web": replace(first.clients["web"], secret_file=other)})
        async with supervised(first, lambda: later) as supervisor:
            reloads = supervisor.metrics.process.reloads
            supervisor.want_reload()
            await until(lambda: reloads["success"].value == 1)
            secret_file(tmp_path / "web")
            assert not supervisor._files.changed()
            secret_file(tmp_path / "other")
            await until(lambda: reloads["success"].value == 2)

    async def test_a_worker_that_cannot_follow_keeps_the_old_settings(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A secret that vanished between check and use: told, counted, and the worker goes on."""
        first = worker_settings(tmp_path)
        other = secret_file(tmp_path / "other")
        web = replace(first.clients["web"], secret_file=other)
        later = replace(first, clients={"web": web})
        async with supervised(first, lambda: later) as supervisor:
            pids = [_pid(supervisor, index) for index in (1, 2)]
            (tmp_path / "other").unlink()
            monkeypatch.setattr(factory, "check", lambda *_: None)
            await supervisor.rolling_reload()
            assert supervisor.metrics.process.reloads["failure"].value == 1
            assert [_pid(supervisor, index) for index in (1, 2)] == pids

    async def test_a_reload_reaches_a_worker_that_is_just_being_started(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was given the old settings, and was not there when the others were told."""
        first = worker_settings(tmp_path, 1)
        new = replace(first.clients["web"], secret_file=secret_file(tmp_path / "new"))
        later = replace(first, clients={"web": new})
        start = supervisor_module.WorkerProcess.start
        async with (
            supervised(first, lambda: later) as supervisor,
            aiohttp.ClientSession() as http,
        ):

            async def start_amid_a_reload(begin: Start) -> worker_process.WorkerProcess:
                started = await start(begin)
                await supervisor.rolling_reload()
                return started

            lead, led = supervisor._lead, list[str | None]()

            async def noted(*given: Any) -> str | None:
                led.append(await lead(*given))
                return led[-1]

            monkeypatch.setattr(supervisor, "_lead", noted)
            monkeypatch.setattr(supervisor_module.WorkerProcess, "start", start_amid_a_reload)
            supervisor._children[1].kill()
            await until(lambda: 1 not in supervisor._children)
            await until(lambda: 1 in supervisor._children and supervisor._children[1].is_ready)
            await until(lambda: led == [None])
            secret = {"api-secret": secret_in(str(tmp_path / "new"))}
            async with http.post(f"{supervisor.url}/v1/validate", headers=secret) as answer:
                assert await answer.json() == {"valid": True}

    async def test_O6_an_end_does_not_wait_for_a_worker_that_is_just_being_started(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was not there when all were ended, and it hangs: ended as soon as it is there."""
        settings = worker_settings(tmp_path, 1)
        start, pids = supervisor_module.WorkerProcess.start, list[int]()
        async with supervised(settings) as supervisor:

            async def start_amid_the_end(begin: Start) -> worker_process.WorkerProcess:
                started = await start(begin)
                os.kill(started.pid, signal.SIGSTOP)
                pids.append(started.pid)
                supervisor.stop()
                supervisor.abort()
                return started

            monkeypatch.setattr(supervisor_module.WorkerProcess, "start", start_amid_the_end)
            supervisor._children[1].kill()
            await until(lambda: pids != [])
            async with asyncio.timeout(5):
                await supervisor._keepers.wait(5)
            with pytest.raises(ProcessLookupError):
                os.kill(pids[0], 0)

    async def test_O6_an_end_has_an_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if somebody that was killed is not gone: the kernel may hold on to them."""
        settings = worker_settings(tmp_path, 1, server__drain="1s")
        monkeypatch.setattr(supervisor_module, "GRACE", 0.1)
        supervisor = Supervisor(settings, lambda: settings, {})
        with logging_to(io.StringIO(), settings):
            await supervisor.start()
            held = supervisor._children[1]
            kill = held.kill
            monkeypatch.setattr(held, "kill", lambda: None)
            monkeypatch.setattr(held, "stop", lambda: None)
            supervisor.stop()
            async with asyncio.timeout(settings.server.drain.seconds + 5):
                await supervisor.run()
        kill()
        await held.gone()

    async def test_is_ready_while_anybody_is(self, tmp_path: Path) -> None:
        """And says `no_worker` when nobody is."""
        async with (
            supervised(worker_settings(tmp_path)) as supervisor,
            aiohttp.ClientSession(supervisor.admin_url) as http,
        ):

            async def says(status: int, state: str) -> bool:
                async with http.get("/readyz") as answer:
                    return (answer.status, await answer.json()) == (status, {"status": state})

            assert await says(200, "ok")
            supervisor._children[1].kill()
            await until(lambda: 1 not in supervisor._children)
            gone, alive = (
                supervisor.metrics.process.workers.of(supervisor._shared_cells.rows[n])
                for n in (1, 2)
            )
            assert (gone.value, alive.value) == (0, 1)
            assert await says(200, "ok")
            supervisor._children[2].kill()
            await until_true(lambda: says(503, "no_worker"))
            await until_true(lambda: says(200, "ok"))

    async def test_one_worker_without_the_store_leaves_the_instance_ready(
        self, tmp_path: Path
    ) -> None:
        """It refuses by itself (`on_error` is "closed"); balancers look away when all of them do.

        Sees `all` becoming `any` where the workers' rows are put together.
        """
        async with supervised(worker_settings(tmp_path, 2, store__on_error="closed")) as supervisor:
            degraded = supervisor.metrics.store.degraded
            states = []
            for without in ((), (1,), (2,), (1, 2)):
                for index in (1, 2):
                    degraded.of(supervisor._shared_cells.rows[index]).set(index in without)
                supervisor._publish()
                states.append((supervisor._health.state, supervisor._health.ready))
            assert states == [
                ("ok", True),
                ("degraded", True),
                ("degraded", True),
                ("no_store", False),
            ]

    async def test_workers_run_this_broker_and_not_one_that_lies_about(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`python -m` would look in the present folder first."""
        (tmp_path / "broker").mkdir()
        (tmp_path / "broker" / "__init__.py").write_text("raise SystemExit(78)")
        monkeypatch.chdir(tmp_path)
        async with supervised(worker_settings(tmp_path, 1)) as supervisor:
            assert supervisor._children[1].is_ready

    async def test_a_machine_without_room_for_a_process_is_asked_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A failed start is a death like any other: counted, and tried again after a while."""
        async with supervised(worker_settings(tmp_path)) as supervisor:
            python = sys.executable
            monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
            running = supervisor._children[1]
            running.kill()
            await until(lambda: supervisor.metrics.process.restarts.value >= 2)
            monkeypatch.setattr(sys, "executable", python)
            await until(lambda: 1 in supervisor._children and supervisor._children[1].is_ready)


def _pid(supervisor: Supervisor, index: int) -> int | None:
    running = supervisor._children.get(index)
    return None if running is None else running.pid


async def test_M1_guesses_at_the_supervisor_are_forgotten_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who has not failed for a while takes no room."""
    clock = FakeClock()
    monkeypatch.setattr(session_admin, "SystemClock", lambda: clock)
    settings = config.from_tree(
        {
            "admin": {"secret": secrets.token_urlsafe(24)},
            "store": {"url": "valkey://127.0.0.1:1", "encryption_key": secrets.token_urlsafe(48)},
        }
    )
    api = session_admin.SessionAdminApi(settings, Metrics("local", shared_store=True))
    failures = api._authenticator.failures
    failures.take("192.0.2.1", FAILED_AUTH_LIMIT, clock.mono())
    assert len(failures) == 1
    clock.advance(120)
    api.tidy()
    assert len(failures) == 0
    await api.close()
