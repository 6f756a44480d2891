"""Runs an `App`, or the supervisor of several: event loop, signals, exit code."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from types import FrameType

import structlog

from broker.app.app import App
from broker.config.settings import Duration, Settings
from broker.exit_codes import EX_OK, EX_UNAVAILABLE
from broker.process.supervisor import CannotStart, Supervisor
from broker.sqlite.location import StateFileInUse
from broker.telemetry import logs
from broker.telemetry.streams import complain, stderr, stdout
from broker.web.listener import CannotListen

log = structlog.get_logger()

LAST_WORDS = 0.2
"""Seconds that an end at once gives the log."""

ENDING = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask for the end."""

ONE_WISH = 1.0
"""Seconds in which another signal is the same one: `timeout` and service managers send it to the
process and to its group, a terminal to everybody in the foreground."""

TYPED_TWICE = 0.25
"""The same for Ctrl-C of somebody at a terminal, where only a process that passes signals on sends
one twice, and within milliseconds: who types it again wants the end at once."""

CLOSING = 10.0
"""Seconds beyond `drain` in which a process that was asked to stop has ended: it
closes connections, says farewell to the store, closes its state file.  Then it is ended, whatever
hangs."""

AT_ONCE = 1.0
"""Seconds in which a process that was asked twice ends by itself: it writes a last line."""


def serve(settings: Settings, load: Callable[[], Settings], *, dev: bool) -> int:
    """Serve until a signal; returns the exit code."""
    logs.take_over()
    _allow_connections()
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_serve(settings, load, dev=dev))
    finally:  # the end has begun, and its exit code is not to be changed by another signal: ...
        for number in ENDING:  # ... ignored, for blocked here it would go to another thread
            signal.signal(number, signal.SIG_IGN)


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
    # first: a signal that meets the start must not kill half a process
    Ending(app, settings.server.drain).obey()
    try:
        await app.start()
    except CannotListen as error:
        complain(f"broker: {error}")
        return EX_UNAVAILABLE
    except StateFileInUse as error:
        if error.stopped:
            return EX_OK
        complain(f"broker: {error}")
        return EX_UNAVAILABLE
    except CannotStart as error:
        return error.code
    if dev:
        _introduce(app, settings)
    await app.run()
    return EX_OK


class Ending:
    """Obeys signals: the first drains, a later one ends at once, and an alarm ends what hangs.

    These are Python's handlers and not the event loop's, so that a loop that stands can be told to
    end, too.  They run between any two lines of the main thread: nothing here may log or lock,
    because that line may be in the log.
    """

    def __init__(self, app: App | Supervisor, drain: Duration) -> None:
        self._app = app
        self._limit = drain.seconds + CLOSING
        self._hint = f"stopping, within {drain}; Ctrl-C again stops at once\n"
        self._is_watched = os.isatty(2)
        self._loop = asyncio.get_running_loop()
        self._asked_at: float | None = None
        self._number = 0

    def obey(self) -> None:
        """Take over from whatever was in force."""
        signal.signal(signal.SIGALRM, self._give_up)
        for number in ENDING:
            signal.signal(number, self._end)
        self._loop.add_signal_handler(signal.SIGHUP, self._app.want_reload)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def _end(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        is_typed = number == signal.SIGINT and self._is_watched
        if self._asked_at is None:
            self._asked_at, self._number = now, number
            signal.setitimer(signal.ITIMER_REAL, self._limit)
            self._tell(self._app.stop)
            if is_typed:
                stderr.write(self._hint)  # which takes no lock
        elif now - self._asked_at >= (TYPED_TWICE if is_typed else ONE_WISH):
            self._number = number
            signal.setitimer(signal.ITIMER_REAL, AT_ONCE)
            self._tell(self._abort)

    def _tell(self, what: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the end is near anyway
            self._loop.call_soon_threadsafe(what)

    def _abort(self) -> None:
        with contextlib.suppress(Exception):  # a log that fails must not delay the end
            log.warning("broker.aborted")  # what is under way is cut off
        self._kill_workers()
        stderr.flush(LAST_WORDS)
        self._give_up()

    def _give_up(self, *_: object) -> None:
        self._kill_workers()
        os._exit(128 + self._number)

    def _kill_workers(self) -> None:
        if isinstance(self._app, Supervisor):
            self._app.abort()


def _introduce(app: App | Supervisor, settings: Settings) -> None:
    """Tell programs (first line) and people (second) how to get a first token."""
    from broker.app import dev  # noqa: PLC0415 - development only

    shown = dev.client_secret(settings)
    said = {"url": app.url, "admin_url": app.admin_url, "api_secret": shown}
    stdout.write(f"{json.dumps(said)}\n{dev.curl_line(app.url, shown)}\n")
