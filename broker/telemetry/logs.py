"""What operators read: one canonical event per request, escaped, and a flood of refusals counted.

Everything goes to standard error, by `streams`, which never waits for its reader; standard output
belongs to commands.  Secrets never get here:
a token is named by the start of its SHA-256, a fingerprint by a keyed hash that only this process
can repeat.
"""

import contextlib
import json
import logging
import re
import secrets
import sys
import threading
import time
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from datetime import UTC, datetime
from functools import partial
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import msgspec
import structlog
from structlog.typing import EventDict, Processor
from typing_extensions import override

from broker.config.settings import LogSettings
from broker.telemetry import log_console, traces
from broker.telemetry.streams import stderr

SUMMARY_INTERVAL = 60_000_000
"""Microseconds: how often refusals that were not written one by one are summed up."""


def configure(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Set format and level; can be called again to change them while running.

    Lines that wait to be written stay as they are.  `stream` is for tests.
    """
    out, looked_at = _destination(stream)
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    is_read = looked_at is not None and looked_at.isatty()
    is_json = settings.format == "json" or (settings.format == "auto" and not is_read)
    render = _Render(_JSON if is_json else log_console.processors(looked_at))
    stderr.notice = render.loss
    structlog.configure(
        processors=[structlog.processors.add_log_level, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: out,
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_Bridge()], level=logging.WARNING, force=True)


class JsonLines:
    """The way past structlog for lines that are JSON already, as the present configuration is.

    `tells_info` says whether lines of that level are written at all.
    """

    def __init__(
        self, write: Callable[[str], object], processors: Sequence[Processor], *, tells_info: bool
    ) -> None:
        self.write = write
        self.tells_info = tells_info
        self._processors = processors
        self._last = processors[-1]

    @property
    def is_in_use(self) -> bool:
        """Whether events still go through what was configured: who captures them changes that."""
        return bool(self._processors) and self._processors[-1] is self._last


def json_lines() -> JsonLines | None:
    """Return where ready lines go, with their line end; None where lines are no JSON."""
    config = structlog.get_config()
    processors = config["processors"]
    render = processors[-1] if processors else None
    if not isinstance(render, _Render) or not render.is_json:
        return None
    return JsonLines(
        config["logger_factory"]().write,
        processors,
        tells_info=structlog.get_logger().bind().is_enabled_for(logging.INFO),
    )


def take_over() -> None:
    """Make this process one that reports everything by its log, also what nobody has caught.

    Python's own hooks print messages, which may hold a token, and wait for standard error.
    """
    sys.excepthook = _uncaught
    sys.unraisablehook = _unraisable
    threading.excepthook = _unraisable
    warnings.showwarning = _warning


def _destination(stream: TextIO | None) -> "tuple[_Lines, TextIO | None]":
    """Return where lines go, and what a person may look at.

    Standard error is written by its thread, unless it is not this process' own (a test's capture).
    """
    if stream is None and sys.stderr is not sys.__stderr__:
        stream = sys.stderr
    if stream is None:
        return _Lines(stderr.write), sys.stderr
    return _Lines(partial(_write_now, stream)), stream


def _write_now(stream: TextIO, line: str) -> None:
    stream.write(line)
    stream.flush()


class _Lines:
    """What structlog calls a logger: writes lines that are ready."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write = write

    def msg(self, line: str) -> None:
        """Write one line."""
        self.write(f"{line}\n")

    debug = info = warning = error = critical = exception = msg


class _Render:
    """Makes a line of an event, and never fails: who logs must not have to think of it."""

    def __init__(self, processors: Sequence[Processor]) -> None:
        self._processors = processors
        self.is_json = processors is _JSON

    def __call__(self, logger: object, name: str, event: EventDict) -> str:
        of = str(event.get("event"))
        try:
            return self._line(logger, name, event)
        except Exception as error:  # noqa: BLE001 - a value may be anything, its repr may fail
            kind = type(error).__name__
        try:
            return self.warning("broker.unprintable", of=of, error=kind)
        except Exception:  # noqa: BLE001 - the stack or the memory is at its end
            return '{"event": "broker.unprintable"}'

    def loss(self, count: int) -> str:
        """Return the line that tells how many are missing before it."""
        return self.warning("broker.log_lines_dropped", count=count) + "\n"

    def warning(self, event: str, **fields: object) -> str:
        """Return the line of an event of the log's own, whatever its level is."""
        return self._line(None, "warning", {"event": event, "level": "warning", **fields})

    def _line(self, logger: object, name: str, event: EventDict) -> str:
        value: Any = event
        for process in self._processors:
            value = process(logger, name, value)
        line: str = value
        return line


def _as_json(_logger: object, _name: str, event: EventDict) -> str:
    """One line of ASCII: control, ANSI and bidi characters come out as escapes.

    msgspec writes what is of plain types and in ASCII, as nearly every line is, in a third of the
    time of `json`, and to the same letter but for some numbers: 1e16 for 1e+16, 0.00001 for 1e-05,
    null for what is not finite, which JSON has no number for.
    """
    ordered = {"event": event.pop("event"), **event}
    if _PLAIN.issuperset(map(type, ordered.values())):
        with contextlib.suppress(UnicodeEncodeError, OverflowError):  # surrogates, huge numbers
            line = msgspec.json.format(_encode(ordered), indent=0)
            if line.isascii() and _DELETE not in line:
                return line.decode("ascii")
    return json.dumps(ordered, default=repr)


_PLAIN = {str, int, float, bool, type(None)}
_DELETE = b"\x7f"
"""The only control character that JSON lets stand unescaped."""

_encode = msgspec.json.Encoder().encode


class Stamp:
    """Tells when; the date is written once a second."""

    def __init__(self) -> None:
        self._date = 0, ""

    def now(self) -> str:
        """Return this moment, as RFC 3339 has it."""
        second, rest = divmod(time.time_ns(), 1_000_000_000)
        known, date = self._date  # together: several threads log
        if second != known:
            date = f"{datetime.fromtimestamp(second, tz=UTC):%Y-%m-%dT%H:%M:%S}."
            self._date = second, date
        return f"{date}{str(1_000_000_000 + rest)[1:7]}Z"  # a third of the time of `:06`

    def __call__(self, _logger: object, _name: str, event: EventDict) -> EventDict:
        """Put it into an event."""
        event["timestamp"] = self.now()
        return event


def _trace(_logger: object, _name: str, event: EventDict) -> EventDict:
    """Tell where an error came from, and not what it says."""
    if "exc_info" not in event:
        return event
    error = traces.error_of(event.pop("exc_info", None))
    if error is not None:
        event["exception"] = traces.chain(error)
    return event


_JSON: list[Processor] = [
    Stamp(),
    _trace,
    _as_json,
]


def _uncaught(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    """Report what ends the process."""
    if issubclass(kind, KeyboardInterrupt):  # Python ends as it should: by the signal
        return
    structlog.get_logger().error("broker.defect", error=kind.__name__, exc_info=error)


def _unraisable(args: "sys.UnraisableHookArgs | threading.ExceptHookArgs") -> None:
    """Report what happened where nobody could be told: in a destructor, in a thread."""
    if sys.is_finalizing():  # half of what a line needs is gone, and nobody writes it
        return
    structlog.get_logger().error(
        "broker.defect", error=args.exc_type.__name__, exc_info=args.exc_value
    )


def _warning(
    message: Warning | str,  # noqa: ARG001 - the names are those of warnings.showwarning
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001 - as above
    line: str | None = None,  # noqa: ARG001 - as above
) -> None:
    """Report a warning by its place: what it says may hold values."""
    text = f"at {Path(filename).stem}:{lineno}"
    structlog.get_logger().warning(
        "broker.library", logger="warnings", text=text, error=category.__name__
    )


class _Bridge(logging.Handler):
    """Brings warnings of libraries into our format; what they may quote stays out."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._tell(record)
        except Exception as error:  # noqa: BLE001 - a __str__ may fail; `logging` would print it
            structlog.get_logger().warning(
                "broker.library", logger=record.name, text="", error=type(error).__name__
            )

    @staticmethod
    def _tell(record: logging.LogRecord) -> None:
        kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        log = structlog.get_logger()
        log.warning("broker.library", logger=record.name, text=_fixed(record)[:200], error=kind)


def _fixed(record: logging.LogRecord) -> str:
    """Return what does not depend on values: the text into which arguments were to be put.

    Without arguments values may be in it already.  The event loop puts errors, and what callbacks
    were called with, behind its first words ("Task exception was never retrieved"); of others it is
    the place in their code that is told.
    """
    if record.args:
        return str(record.msg)
    if record.name == "asyncio":
        return _WORDS.match(str(record.msg))[0]  # type: ignore[index]  # the empty text matches, too
    return f"at {record.module}:{record.lineno}"


_WORDS = re.compile(r"(?:[\w .]|\(\))*")
"""Words up to the first sign of a value: a bracket, a quote, the end of the line."""


class _VisitorNames:
    """Names of visitors: a hash that only those who have the key can repeat."""

    def __init__(self) -> None:
        self.use(secrets.token_bytes(32))

    def use(self, key: bytes) -> None:
        """Name them with this key from now on."""
        self.key = key
        self._begun = blake2b(key=key, digest_size=6)

    def hash_of(self, fingerprint: str) -> str:
        """Name a visitor in the log of this broker without showing the fingerprint."""
        begun = self._begun.copy()
        begun.update(fingerprint.encode())
        return begun.hexdigest()


_visitors = _VisitorNames()

visitor_hash = _visitors.hash_of


def share_key(key: bytes | None = None) -> bytes:
    """Return the key that names visitors; with one given, use that: all workers use the same."""
    if key is not None:
        _visitors.use(key)
    return _visitors.key


class RefusalLog:
    """Writes the first refusal of each kind in a minute, and counts the others.

    A flood of refusals must not become a flood of lines: it is the logging that would fall over.
    """

    def __init__(self) -> None:
        self._unwritten: MutableMapping[str, int] = {}
        self._next = 0

    def first(self, kind: str, now: int, *, anyway: bool = False) -> bool:
        """Count one refusal (`now` in us); True if this one is to be written.

        `anyway` tells that the caller writes it also if it is not the first, as at debug.
        """
        self.flush(now)
        if kind not in self._unwritten:
            self._unwritten[kind] = 0
            return True
        self._unwritten[kind] += not anyway
        return False

    def tell_of_leak(
        self, client: str, now: int, request_id: str = "", *, anyway: bool = False
    ) -> bool:
        """Write that a page sends this client's secret: somebody has to act.

        Returns whether it was written; once a minute is enough.  `anyway` as above.
        """
        if not self.first(f"SECRET_IN_BROWSER {client}", now, anyway=anyway):
            return False
        structlog.get_logger().error(
            "broker.secret_in_browser", client=client, request_id=request_id
        )
        return True

    def flush(self, now: int) -> None:
        """Once a minute, write how many were not written, and begin anew."""
        if now < self._next:
            return
        self._next = now + SUMMARY_INTERVAL
        self.sum_up()

    def sum_up(self) -> None:
        """Write how many were not written; the end of a process must not keep it to itself."""
        log = structlog.get_logger()
        for kind, count in self._unwritten.items():
            if count:
                log.info("broker.refusals", kind=kind, unwritten=count)
        self._unwritten.clear()
