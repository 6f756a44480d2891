"""What runs beside the requests of a whole broker: killed in each place, and back in each."""

import asyncio
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from processes import good, put, secret_file, secret_in, until, wait_for
from servers import StoreServer
from test_supervisor import supervised, worker_settings
from web.edge import Edge, request, serving

from broker.config.files import open_regular
from broker.process.supervisor import Supervisor
from broker.tasks import aside
from broker.telemetry.cells import Counter
from broker.telemetry.labels import BackgroundTask


class Odd(BaseException):
    """Not an Exception."""


FAILURES = [ValueError, BrokenPipeError, asyncio.CancelledError, Odd]


class Bomb:
    """Stands in for a function: fails once, and counts how often it is called afterwards."""

    def __init__(self, owner: Any, name: str, failure: type[BaseException]) -> None:
        self._real = getattr(owner, name)
        self._failure: type[BaseException] | None = failure
        self.calls = 0
        setattr(owner, name, self._call)

    def _call(self, *given: Any, **named: Any) -> Any:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        self.calls += 1
        return self._real(*given, **named)


PLACES: dict[BackgroundTask, Callable[[Edge], tuple[Any, str]]] = {
    BackgroundTask.HOUSEKEEPING: lambda edge: (edge.app.housekeeping, "do_round"),
    BackgroundTask.BEAT: lambda edge: (edge.app.metrics.process, "beat"),
    BackgroundTask.PACING: lambda edge: (edge.app.parts.pacer, "_serve_next"),
    BackgroundTask.SHARE: lambda edge: (edge.app.parts.pacer._slots, "_look"),
    BackgroundTask.HEARTBEATS: lambda edge: (_shared_backend(edge).fleet, "beat"),
    BackgroundTask.LEASES: lambda edge: (_shared_backend(edge)._remote.leases, "renew"),
    BackgroundTask.RECORDS: lambda edge: (_shared_backend(edge).sessions, "catch_up"),
    BackgroundTask.SUBSCRIPTION: lambda edge: (_shared_backend(edge)._remote, "on_message"),
    BackgroundTask.WATCHED_FILES: lambda edge: (edge.app.watch.files, "changed"),
    BackgroundTask.RELOADS: lambda edge: (edge.app.reloader, "reload"),
}
"""In which function each task of a process with a shared store and a budget is hit."""


def _shared_backend(edge: Edge) -> Any:
    assert edge.app.parts.shared_backend is not None
    return edge.app.parts.shared_backend


async def _cause(edge: Edge, name: BackgroundTask) -> None:
    """Bring about what a task waits for, over and over."""
    while True:
        if name is BackgroundTask.SUBSCRIPTION:
            channel = _shared_backend(edge).names.channel
            packed = b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%s\r\n$1\r\nx\r\n" % (len(channel), channel)
            await _shared_backend(edge).server.nodes.command(channel, packed)
        elif name is BackgroundTask.RELOADS:
            edge.app.want_reload()
        elif name is BackgroundTask.PACING:
            await edge.request_token(fresh=True)
        await asyncio.sleep(0.05)


class Heart:
    """Stands in for the gauge of a worker's beat."""

    def __init__(self, gauge: Any, failure: type[BaseException]) -> None:
        self._gauge = gauge
        self.bomb = Bomb(self, "_set", failure)

    def _set(self, value: float) -> None:
        self._gauge.set(value)

    def set(self, value: float) -> None:
        self._set(value)


@pytest.mark.parts
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", PLACES, ids=lambda name: name.value)
async def test_N2_a_task_that_is_killed_comes_back(
    valkey: StoreServer, name: BackgroundTask, failure: type[BaseException]
) -> None:
    """It does its work again, is counted once under its name, and the log names the error.

    A subscription whose connection fails is begun anew by itself, which is no defect.
    """
    known = name is BackgroundTask.SUBSCRIPTION and issubclass(failure, OSError)
    tree = {
        "store": {
            "url": valkey.url,
            "encryption_key": secrets.token_urlsafe(48),
            "timeout": "2s",  # or the cause itself fails on a busy machine
        },
        "issuer": {"budget": {"rate": 6000, "per": "60s", "burst": 10}},
    }
    async with serving(tree) as edge:
        edge.defects_expected = True
        owner, attribute = PLACES[name](edge)
        if name is BackgroundTask.BEAT:
            edge.app.metrics.process.beat = heart = Heart(owner.beat, failure)
            edge.app._background.start(name, edge.app.housekeeping.beat)
            bomb = heart.bomb
        else:
            bomb = Bomb(owner, attribute, failure)
        causing = asyncio.ensure_future(_cause(edge, name))
        await until(lambda: bomb.calls >= 2)
        causing.cancel()
        await asyncio.wait([causing])
        counts = {task: c.value for task, c in edge.app.metrics.process.background.items()}
        told = edge.events("broker.background_restarted")
    assert counts == {task: float(task is name and not known) for task in BackgroundTask}
    expected = [] if known else [(name.value, failure.__name__)]
    assert [(e["task"], e["error"]) for e in told] == expected


SUPERVISED: dict[BackgroundTask, str] = {
    BackgroundTask.HOUSEKEEPING: "_publish",
    BackgroundTask.WORKER_WATCH: "look",
    BackgroundTask.RELOADS: "rolling_reload",
    BackgroundTask.WORKERS: "_note_met",
}
"""In which method of the supervisor, or of its watch, each of its tasks is hit."""


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", SUPERVISED, ids=lambda name: name.value)
async def test_N2_the_supervisor_goes_on(
    tmp_path: Path, name: BackgroundTask, failure: type[BaseException]
) -> None:
    """Workers are replaced and watched, reloads are heard, whatever happened before."""
    async with supervised(worker_settings(tmp_path, 1)) as supervisor:
        hit = supervisor._watch if name is BackgroundTask.WORKER_WATCH else supervisor
        bomb = Bomb(hit, SUPERVISED[name], failure)
        if name is BackgroundTask.WORKERS:
            first = supervisor._children[1]
            first.kill()
            await until(lambda: _is_served(supervisor) and supervisor._children[1] is not first)
            await until(lambda: bomb.calls >= 1)
        else:
            while bomb.calls < 2:
                supervisor.want_reload()
                await asyncio.sleep(0.05)
        counts = {t: c.value for t, c in supervisor.metrics.process.background.items()}
        assert counts == {task: float(task is name) for task in BackgroundTask}
        assert _is_served(supervisor)


def _is_served(supervisor: Supervisor) -> bool:
    return 1 in supervisor._children and supervisor._children[1].is_ready


async def test_N2_a_worker_obeys_after_an_order_that_it_cannot_read(tmp_path: Path) -> None:
    """Counted in its row, and the next order is followed."""
    async with supervised(worker_settings(tmp_path, 1)) as supervisor:
        child = supervisor._children[1]
        orders = supervisor.metrics.process.background[BackgroundTask.ORDERS]
        mine = Counter(supervisor._shared_cells.rows[1], orders._index)
        child._channel._writer.write(b'{"type": "Nonsense"}\n')
        await until(lambda: mine.value == 1)
        await supervisor.rolling_reload()
        assert supervisor.metrics.process.reloads["success"].value == 1
        assert supervisor._children[1] is child


async def test_N2_a_worker_that_talks_nonsense_is_replaced(tmp_path: Path) -> None:
    """It cannot be led any more; nobody waits for its answers for ever."""
    async with supervised(worker_settings(tmp_path, 1)) as supervisor:
        child = supervisor._children[1]
        child._channel._reader.feed_data(b"nonsense\n")
        await until(lambda: 1 in supervisor._children and supervisor._children[1] is not child)
        await until(lambda: _is_served(supervisor))
        assert supervisor.metrics.process.restarts.value == 1


class Mount:
    """Stands in for a mounted file system, which stands once it has opened some files."""

    def __init__(self, passes: int) -> None:
        self._passes = passes
        self.read: list[str] = []
        self.on_loop: list[str] = []
        self.stands, self.released = threading.Event(), threading.Event()

    def open(self, path: str, *, follow: bool = True) -> int:
        """Open as the file system does, or not yet."""
        self.read.append(path)
        if threading.current_thread() is threading.main_thread():
            self.on_loop.append(path)  # and the loop would stand, and the test with it
        elif len(self.read) > self._passes:
            self.stands.set()
            self.released.wait()
        return open_regular(path, follow=follow)


class TestMountThatHangs:
    """A FIFO stands for it: whoever opens it to read waits, as at a mount that does not answer."""

    async def test_N2_a_look_that_hangs_delays_nothing(self) -> None:
        """Housekeeping goes on, requests are answered, and the end comes all the same."""
        async with serving() as edge:
            held = threading.Event()
            edge.app.watch.files.changed = held.wait  # type: ignore[method-assign]
            rounds = Bomb(edge.app.housekeeping, "do_round", ValueError)
            edge.defects_expected = True
            await until(lambda: rounds.calls >= 3)
            assert (await edge.request_token()).status == 200
        held.set()

    async def test_N2_a_reload_that_hangs_is_a_failed_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Told and counted; the next is heard."""
        monkeypatch.setattr("broker.app.reload.READING", 0.2)
        async with serving() as edge:
            held, load = threading.Event(), edge.app.reloader._load

            def hang() -> Any:
                held.wait()
                return load()

            edge.app.reloader._load = hang
            edge.app.want_reload()
            reloads = edge.app.metrics.process.reloads
            await until(lambda: reloads["failure"].value == 1)
            held.set()
            edge.app.want_reload()
            await until(lambda: reloads["success"].value == 1)
            assert (await edge.request_token()).status == 200

    @pytest.mark.parametrize("passes", range(4))
    async def test_N2_whichever_read_of_a_reload_hangs_the_loop_serves(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int
    ) -> None:
        """The mount stands after some files were read: probes and requests are answered meanwhile.

        No file is read twice, or on the loop: the second time it might hang.
        """
        tree = put(good(tmp_path), "admin.secret_file", secret_file(tmp_path / "admin"))
        async with serving({name: tree[name] for name in ("admin", "clients")}) as edge:
            mount = Mount(passes)
            monkeypatch.setattr("broker.config.files.open_regular", mount.open)
            edge.app.want_reload()
            reloads = edge.app.metrics.process.reloads
            await until(lambda: mount.stands.is_set() or reloads["success"].value == 1)
            assert (await edge.raw(request("GET", "/livez"))).status == 200
            assert (await edge.request_token(secret=secret_in(str(tmp_path / "web")))).status == 200
            mount.released.set()
            await until(lambda: reloads["success"].value == 1)
            assert mount.on_loop == []
            assert sorted(Path(path).name for path in mount.read) == ["admin", "web"]

    async def test_N12_files_of_new_settings_are_watched_after_a_reload(
        self, tmp_path: Path
    ) -> None:
        """A client that comes with a reload may have its secret rotated as the others may."""
        files = {name: secret_file(tmp_path / name) for name in ("old", "new")}
        tree = {"clients": {"web": {"secret_file": files["old"], "agents": ["*"]}}}
        async with serving(tree) as edge:
            before = edge.app.reloader._load()
            web = replace(before.clients["web"], secret_file=files["new"])
            edge.app.reloader._load = lambda: replace(before, clients={"web": web})
            reloads = edge.app.metrics.process.reloads
            edge.app.want_reload()
            await until(lambda: reloads["success"].value == 1)
            secret_file(tmp_path / "old")
            assert not edge.app.watch.files.changed()
            secret_file(tmp_path / "new")
            await until(lambda: reloads["success"].value == 2)
            assert (await edge.request_token(secret=secret_in(files["new"]))).status == 200

    async def test_N2_what_is_done_aside_tells_how_it_went(self, tmp_path: Path) -> None:
        """A value, an error, or nothing at all to somebody who has gone."""

        def fail() -> None:
            raise LookupError

        assert await aside(lambda: 7) == 7
        with pytest.raises(LookupError):
            await aside(fail)
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await aside(lambda: pipe.open("rb").close())
        pipe.open("wb").close()
        await asyncio.to_thread(
            wait_for, lambda: not any(t.name == "aside" for t in threading.enumerate())
        )
