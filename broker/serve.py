"""Runs an `App`, or the supervisor of several: event loop, signals, exit code."""

import asyncio
import contextlib
import json
import os
import resource
import signal
from collections.abc import Callable

import structlog

from broker import logs
from broker.app import App
from broker.listen import CannotListen
from broker.settings import Settings
from broker.streams import complain, stderr, stdout
from broker.supervisor import CannotStart, Supervisor

log = structlog.get_logger()

EX_UNAVAILABLE, EX_CONFIG = 69, 78

LAST_WORDS = 0.2
"""Seconds that an end at once gives the log."""


def serve(settings: Settings, load: Callable[[], Settings], *, dev: bool) -> int:
    """Serve until a signal; returns the exit code."""
    logs.take_over()
    _allow_connections()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_serve(settings, load, dev=dev))


def _allow_connections() -> None:
    """Raise the soft limit on open files to the hard one.

    Each connection is one, and the usual soft limit of 1,024 is reached by a thousand idle ones.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # where the system knows better
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Uvloop where there is one; asyncio's own loop elsewhere."""
    try:
        import uvloop  # noqa: PLC0415 - optional by platform
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _serve(settings: Settings, load: Callable[[], Settings], *, dev: bool) -> int:
    kind = Supervisor if settings.server.workers > 1 else App
    app = kind(settings, load, os.environ, dev=dev)
    _obey_signals(app)  # first: a signal that meets the start must not kill half a process
    try:
        await app.start()
    except CannotListen as error:
        complain(f"broker: {error}")
        return EX_UNAVAILABLE
    except CannotStart as error:
        return error.code
    if dev:
        _introduce(app, settings)
    await app.run()
    return 0


def _obey_signals(app: App | Supervisor) -> None:
    loop = asyncio.get_running_loop()
    asked: list[int] = []

    def stop(number: int) -> None:
        if asked:
            log.warning("broker.aborted")  # what is under way is cut off, no snapshot is written
            app.abort()
            stderr.flush(LAST_WORDS)
            os._exit(128 + number)
        asked.append(number)
        app.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    loop.add_signal_handler(signal.SIGHUP, app.reload)


def _introduce(app: App | Supervisor, settings: Settings) -> None:
    """Tell programs (first line) and people (second) how to get a first token."""
    from broker import dev  # noqa: PLC0415 - development only

    shown = dev.client_secret(settings)
    said = {"url": app.url, "admin_url": app.admin_url, "api_secret": shown}
    stdout.write(f"{json.dumps(said)}\n{dev.curl_line(app.url, shown)}\n")
