"""What operators read: one canonical event per request, escaped, and a flood of refusals counted.

Everything goes to standard error; standard output belongs to commands.  Secrets never get here:
a token is named by the start of its SHA-256, a fingerprint by a keyed hash that only this process
can repeat.
"""

import json
import logging
import re
import secrets
import sys
from collections.abc import MutableMapping
from hashlib import blake2b
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor
from typing_extensions import override

from broker import console
from broker.settings import Log

SUMMARY_INTERVAL = 60_000_000
"""Microseconds: how often refusals that were not written one by one are summed up."""

_hash_key = bytearray(secrets.token_bytes(32))


def configure(settings: Log, stream: TextIO | None = None) -> None:
    """Set format and level; can be called again to change them while running."""
    out = stream if stream is not None else sys.stderr
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            *(_JSON if settings.format == "json" else console.processors(out)),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_Bridge()], level=logging.WARNING, force=True)


def _as_json(_logger: object, _name: str, event: EventDict) -> str:
    """One line of ASCII: control, ANSI and bidi characters come out as escapes."""
    return json.dumps({"event": event.pop("event"), **event}, default=repr)


def _drop_values(_logger: object, _name: str, event: EventDict) -> EventDict:
    """Messages and local variables may hold a token: keep types and lines, drop the values."""
    for trace in event.get("exception", ()):
        trace.pop("exc_value", None)
        trace.pop("exc_notes", None)
        for frame in trace.get("frames", ()):
            frame.pop("locals", None)
    return event


_JSON: list[Processor] = [
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.dict_tracebacks,
    _drop_values,
    _as_json,
]


class _Bridge(logging.Handler):
    """Brings warnings of libraries into our format; what they may quote stays out."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
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


def visitor_hash(fingerprint: str) -> str:
    """Name a visitor in the log of this broker without showing the fingerprint."""
    return blake2b(fingerprint.encode(), key=_hash_key, digest_size=6).hexdigest()


def share_key(key: bytes | None = None) -> bytes:
    """Return the key that names visitors; with one given, use that: all workers use the same."""
    if key is not None:
        _hash_key[:] = key
    return bytes(_hash_key)


class RefusalLog:
    """Writes the first refusal of each kind in a minute, and counts the others.

    A flood of refusals must not become a flood of lines: it is the logging that would fall over.
    """

    def __init__(self) -> None:
        self._seen: MutableMapping[str, int] = {}
        self._next = 0

    def first(self, kind: str, now: int) -> bool:
        """Count one refusal (`now` in us); True if this one is to be written."""
        self.flush(now)
        count = self._seen.get(kind, 0)
        self._seen[kind] = count + 1
        return count == 0

    def tell_of_leak(self, client: str, now: int, request_id: str = "") -> bool:
        """Write that a page sends this client's secret: somebody has to act.

        Returns whether it was written; once a minute is enough.
        """
        if not self.first(f"SECRET_IN_BROWSER {client}", now):
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
        for kind, count in self._seen.items():
            if count > 1:
                log.info("broker.refusals", kind=kind, unwritten=count - 1)
        self._seen.clear()
