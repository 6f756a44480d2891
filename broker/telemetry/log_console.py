"""The log for people: a line is read from left to right, and fits into 100 columns.

    12:03:44 info  minted     A78WKV4515 web visitor=20dd3fd4 token=19124548 left=59m 0.41ms 5f2c-1a
    12:03:45 warn  limited    A78WKV4515 web visitor=20dd3fd4 429 fingerprint 0.04ms 5f2c-1b

When, how bad, what; then for whom, what became of it, how long it took, and the request id to look
it up by.  Says no more than JSON does, and some of it shorter: the canonical event goes by its
outcome, hashes by their first eight digits, which tell the visitors of a laptop apart.  Other
events keep their name, so that it can be found in the table of OBSERVABILITY.md.
"""

import os
from collections.abc import Callable
from typing import TextIO

import structlog
from structlog.dev import Column, ColumnFormatter
from structlog.typing import EventDict, ExcInfo, Processor

from broker.telemetry import traces

FEW = 10
"""Milliseconds below which decimals say something: three digits are shown."""

SHORT = 120
"""Seconds below which minutes would say too little."""

CANONICAL = "broker.embed_token"

_LEVELS = {"debug": "2", "info": "32", "warning": "33", "error": "31;1"}
"""What a terminal calls the colour of each level (ECMA-48, SGR)."""

_DIM = "2"


def processors(out: TextIO | None) -> list[Processor]:
    """Return what makes a line of an event; colours only where somebody looks."""
    paint = _paint if out is not None and out.isatty() and "NO_COLOR" not in os.environ else _leave
    return [
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),  # as on the reader's clock
        _headline,
        _escape,
        structlog.dev.ConsoleRenderer(
            columns=_columns(paint),
            sort_keys=False,  # as they were bound
            exception_formatter=_lines_only,
        ),
    ]


def _headline(_logger: object, _name: str, event: EventDict) -> EventDict:
    """Let the canonical event go by its outcome; leave out what is empty.

    And the session, which would have to be there in full: a third of the line.
    """
    if event["event"] == CANONICAL and "outcome" in event:
        event["event"] = event.pop("outcome")
        event.pop("session", None)
    if "limit" in event:
        event.pop("code", None)  # RATE_LIMITED, as the status says
    return {key: value for key, value in event.items() if value not in ([], None)}


def _escape(_logger: object, _name: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if isinstance(value, str) and not (value.isascii() and value.isprintable()):
            event[key] = value.encode("unicode_escape").decode("ascii")
    return event


def _columns(paint: Callable[[str, str], str]) -> list[Column]:
    def level(value: object) -> str:
        name = str(value)
        return paint(f"{name.replace('warning', 'warn'):5}", _LEVELS.get(name, "0"))

    def dim(value: object) -> str:
        return paint(str(value), _DIM)

    def pair(key: str, value: object) -> str:
        if key.endswith("_s") and isinstance(value, int | float):
            key, value = key.removesuffix("_s"), f"{value:g}s"  # as spans are written elsewhere
        return f"{paint(f'{key}=', _DIM)}{value}"

    def short(key: str, value: object) -> str:
        return pair(key, str(value)[:8])

    shown: dict[str, ColumnFormatter] = {
        "timestamp": _bare(dim),
        "level": _bare(level),
        "event": _bare("{:10}".format),
        "agent": _bare(str),
        "client": _bare(str),
        "visitor": short,
        "status": _bare(str),
        "limit": _bare(str),
        "code": _bare(str),
        "token": short,
        "left_s": _bare(lambda value: pair("left", _duration(value))),
        "duration_ms": _bare(_milliseconds),
        "request_id": _bare(dim),
        "": pair,
    }
    return [Column(key, show) for key, show in shown.items()]


def _bare(show: Callable[[object], str]) -> ColumnFormatter:
    """Show a value that needs no name."""

    def column(key: str, value: object) -> str:  # noqa: ARG001 - the protocol has both
        return show(value)

    return column


def _milliseconds(value: object) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:.2f}ms" if value < FEW else f"{value:.0f}ms"


def _duration(value: object) -> str:
    """Seconds as minutes, where that is exact enough."""
    if not isinstance(value, int):
        return str(value)
    return f"{value}s" if value < SHORT else f"{value // 60}m"


def _paint(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m"


def _leave(text: str, _colour: str) -> str:
    return text


def _lines_only(out: TextIO, error: ExcInfo) -> None:
    """Print where a defect came from, and not what it says."""
    out.write("\n" + "\n".join(traces.lines(traces.chain(error[1]))))
