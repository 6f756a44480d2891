"""The line of a minted token is what structlog's chain would write, to the letter."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from web.edge import logging_to

from broker.config.settings import LogSettings, Settings
from broker.telemetry import mint_line
from broker.telemetry.mint_line import MintLine

TEXTS = st.one_of(
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12),
    st.text(max_size=12),
    st.sampled_from(['"', "\\", "\x7f", "\n", "\ud800", "é", "</script>", "'"]),
)

FIELDS = st.fixed_dictionaries(
    {
        **dict.fromkeys(("request_id", "client", "agent", "visitor", "session", "token"), TEXTS),
        "left_s": st.integers(-(2**60), 2**60),
        "duration_ms": st.floats(0, 10**9).map(lambda number: round(number, 3)),
    }
)

PLAIN: dict[str, Any] = {
    "request_id": "1f-a",
    "client": "web",
    "agent": "A1",
    "visitor": "ab",
    "session": "cd",
    "token": "ef",
    "left_s": 3594,
    "duration_ms": 0.123,
}


@contextmanager
def logging_as(settings: LogSettings) -> Iterator[io.StringIO]:
    """Have it written to a stream."""
    stream = io.StringIO()
    with logging_to(stream, Settings(log=settings)):
        yield stream


@given(FIELDS)
def test_it_is_what_structlog_writes(drawn: dict[str, Any]) -> None:
    """Whatever the values are: plain ones by the short way, all others by the long one."""
    fields = {name: drawn[name] for name in PLAIN}
    with logging_as(LogSettings(format="json")) as out:
        MintLine().write("minted", **fields)
        structlog.get_logger().info("broker.embed_token", outcome="minted", **fields)
    fast, ordinary = re.sub(r'"timestamp": "[^"]*Z"', "", out.getvalue()).splitlines(keepends=True)
    assert fast == ordinary


def test_plain_values_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the moment is written as in every other line."""
    with logging_as(LogSettings(format="json")) as out:
        line = MintLine()
        monkeypatch.setattr(line, "_log", None)
        line.write("minted", **PLAIN)
    assert re.search(r'"timestamp": "\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"\}\n$', out.getvalue())


@pytest.mark.parametrize(
    "settings", [LogSettings(format="json", level="warning"), LogSettings(format="console")]
)
def test_level_and_format_hold(settings: LogSettings) -> None:
    """Nothing at a higher level; a person's format is structlog's."""
    with logging_as(settings) as out:
        MintLine().write("minted", **PLAIN)
    assert ("A1" in out.getvalue()) == (settings.format == "console")
    assert "{" not in out.getvalue()


def test_who_captures_the_log_sees_it() -> None:
    """As tests of others do, with structlog's own means."""
    with logging_as(LogSettings(format="json")) as out:
        line = MintLine()
        with structlog.testing.capture_logs() as captured:
            line.write("minted", **PLAIN)
    assert captured == [
        {"event": "broker.embed_token", "log_level": "info", "outcome": "minted", **PLAIN}
    ]
    assert not out.getvalue()


def test_the_short_way_takes_what_json_writes_as_it_is() -> None:
    """No sign more: each of these stands for itself between quotes."""
    taken = {chr(code) for code in range(0x110000) if mint_line._is_plain(chr(code))}
    assert taken == {chr(code) for code in range(0x20, 0x7F)} - {'"', "\\"}
