"""One worker: an `App` that was given its sockets, and does what its supervisor says.

`python -m broker.process.worker FD` is started by the supervisor and by nobody else; FD is its end
of the channel (`ipc`).  A fresh process and not a fork: event loop, threads and random state are
its own, and a replacement starts like the first one did.

Signals: the supervisor's word comes over the channel, so a worker heeds SIGTERM only (service
managers send it to every process of a service), and as often as it comes: it never cuts off
requests by itself.
"""

import asyncio
import os
import signal
import socket
import sys

import structlog

from broker.app import factory
from broker.app.app import App
from broker.app.reload import read_aside
from broker.app.worker_context import PeerLoad, WorkerContext
from broker.config import schema
from broker.config.schema import ConfigError
from broker.exit_codes import EX_CONFIG, EX_OK
from broker.process.ipc import (
    ORDERS,
    Channel,
    Order,
    Ready,
    Reload,
    Reloaded,
    ReloadFailed,
    Start,
    Stop,
)
from broker.process.serve import loop_factory
from broker.tasks import Background, TaskSet
from broker.telemetry import logs
from broker.telemetry.cells import SharedCells, shared
from broker.telemetry.labels import BackgroundTask
from broker.telemetry.metrics import Metrics
from broker.telemetry.streams import complain

log = structlog.get_logger()


def main() -> int:
    """Work until told to stop; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logs.take_over()
    end = socket.socket(fileno=int(sys.argv[1]))
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_work(end))


async def _work(end: socket.socket) -> int:
    channel = await Channel.over(end, ORDERS)
    begin = await channel.receive()
    if not isinstance(begin, Start):
        return EX_OK  # the supervisor has gone
    try:
        app = _build(begin)
    except ConfigError as error:
        complain(f"broker: {error}")
        return EX_CONFIG
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, app.stop)
    await app.start()
    channel.send(Ready())
    background, following = Background(app.metrics.process.background), TaskSet()
    background.start(BackgroundTask.ORDERS, lambda: _obey(channel, app, following))
    await app.run()
    await background.close()
    await following.close()
    channel.close()
    return EX_OK


def _build(begin: Start) -> App:
    """Build the App; raises ConfigError."""
    settings = schema.build(begin.settings)
    logs.configure(settings.log)
    logs.share_key(begin.log_key)
    width = factory.metrics(settings).layout.width
    shared_cells = shared(begin.shared_cells, width)
    os.close(begin.shared_cells)  # the mapping stays
    metrics = factory.metrics(settings, shared_cells.rows[begin.worker])
    if metrics.layout_id != begin.layout:
        raise ConfigError("this is another version than the one that runs: restart the broker")
    sockets = [socket.socket(fileno=listener) for listener in begin.listeners]
    siblings = _siblings(begin.worker, shared_cells, metrics)
    context = WorkerContext(
        begin.worker, sockets, begin.url, begin.admin_url, shared_cells, metrics, siblings
    )
    return App(settings, lambda: settings, os.environ, dev=begin.dev, worker=context)


def _siblings(index: int, shared_cells: SharedCells, metrics: Metrics) -> list[PeerLoad]:
    """Return what can be seen of the other workers; the supervisor's row is none."""
    beat, connections = metrics.process.beat, metrics.process.connections
    return [
        PeerLoad(beat.of(row), connections.of(row))
        for number, row in enumerate(shared_cells.rows)
        if number not in (0, index)
    ]


async def _obey(channel: Channel[Order], app: App, following: TaskSet) -> None:
    """Do what the supervisor says, until it says no more.

    New settings take as long as their files do: an order to stop is heard meanwhile.
    """
    while (order := await channel.receive()) is not None:
        match order:
            case Reload(tree):
                following.start(_follow(channel, app, tree))
            case Stop():
                app.stop()
            case Start():
                raise AssertionError("told to begin twice")
    app.stop(at_once=True)  # nobody tells balancers any more, and a successor wants the address
    await asyncio.Event().wait()  # for the end: there is nobody left to obey


async def _follow(channel: Channel[Order], app: App, tree: dict[str, object]) -> None:
    channel.send(await _followed(app, tree))


async def _followed(app: App, tree: dict[str, object]) -> Reloaded | ReloadFailed:
    try:
        put_in_force = await read_aside(lambda: app.reloader.prepared(schema.build(tree)))
        put_in_force()
    except ConfigError as error:
        return ReloadFailed(str(error))
    except Exception as error:
        log.exception("broker.defect")
        return ReloadFailed(
            f"a defect: {type(error).__name__}"
        )  # a supervisor that waits would end us
    return Reloaded()


if __name__ == "__main__":
    sys.exit(main())
