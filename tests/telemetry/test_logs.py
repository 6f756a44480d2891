"""What operators read: whole records, one line each, and never what must stay secret."""

import asyncio
import gc
import hashlib
import io
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from web.edge import (
    AGENT,
    TOKEN_PATH,
    Edge,
    logging_to,
    raise_file_limit,
    request,
    serving,
    visitor,
)

from broker import errors
from broker.config import load as config
from broker.config.settings import LogSettings, Settings
from broker.model import LimitName
from broker.process.serve import loop_factory
from broker.telemetry import log_console
from broker.telemetry.logs import SUMMARY_INTERVAL, RefusalLog, Stamp, visitor_hash

FORMS = ["json", "console"]

CANONICAL = re.compile(
    r"broker\.embed_token|^\S+ \w+ +(?:minted|reused|limited|invalid|unauthorized|forbidden)\b",
    re.MULTILINE,
)
"""The one event of a request, in either form."""


@pytest.fixture(autouse=True, scope="module")
def _many_files() -> None:
    raise_file_limit()


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What is logged, as JSON, from debug on."""
    stream = io.StringIO()
    with logging_to(stream, Settings(log=LogSettings(level="debug"))):
        yield stream


def records(log: io.StringIO) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in log.getvalue().splitlines()]


class TestCanonicalEvents:
    """One event per request; whole records, so that a field that appears is noticed."""

    async def test_a_mint(self) -> None:
        """Token and visitor by name, life left, duration; written at `info`."""
        async with serving(level="info") as edge:
            fingerprint = visitor()
            reply = await edge.request_token(fingerprint, headers=[("X-Request-Id", "req-1")])
            (event,) = edge.events("broker.embed_token")
            assert event.pop("timestamp").endswith("Z")
            assert 0 <= event.pop("duration_ms") < 60_000
            assert event == {
                "event": "broker.embed_token",
                "level": "info",
                "outcome": "minted",
                "request_id": "req-1",
                "client": "web",
                "agent": AGENT,
                "visitor": visitor_hash(fingerprint),
                "session": reply.json["data"]["session_id"],
                "token": hashlib.sha256(reply.token.encode()).hexdigest()[:12],
                "left_s": 3595,
            }

    async def test_a_reuse_is_written_at_debug_only(self) -> None:
        """It is most of the traffic."""
        for level, outcomes in (("info", ["minted"]), ("debug", ["minted", "reused"])):
            async with serving(level=level) as edge:
                fingerprint = visitor()
                await edge.request_token(fingerprint)
                await edge.request_token(fingerprint)
                events = edge.events("broker.embed_token")
                assert [event["outcome"] for event in events] == outcomes
                assert {e["visitor"] for e in events} == {visitor_hash(fingerprint)}
                assert [event["level"] for event in events] == ["info", "debug"][: len(outcomes)]

    async def test_a_refusal_by_a_limit(self) -> None:
        """The code and the limit that refused."""
        limits = {"fingerprint": {"rate": 1, "per": "1h", "burst": 1}}
        async with serving({"limits": limits}, level="info") as edge:
            fingerprint = visitor()
            await edge.request_token(fingerprint)
            await edge.request_token(fingerprint, headers=[("X-Request-Id", "req-2")])
            event = edge.events("broker.embed_token")[-1]
            del event["timestamp"], event["duration_ms"]
            assert event == {
                "event": "broker.embed_token",
                "level": "warning",
                "outcome": "limited",
                "request_id": "req-2",
                "status": 429,
                "code": "RATE_LIMITED",
                "limit": "fingerprint",
                "client": "web",
                "agent": AGENT,
                "visitor": visitor_hash(fingerprint),
            }

    async def test_a_stranger(self) -> None:
        """Nothing is known of it, so nothing is said."""
        async with serving(level="info") as edge:
            await edge.fail_to_log_in()
            (event,) = edge.events("broker.embed_token")
            del event["timestamp"], event["duration_ms"], event["request_id"]
            assert event == {
                "event": "broker.embed_token",
                "level": "warning",
                "outcome": "unauthorized",
                "status": 401,
                "code": "UNAUTHORIZED",
            }

    async def test_failures_are_always_written(self) -> None:
        """Every one, not only the first of a minute."""
        async with serving(level="info") as edge:

            async def fail(*_args: object) -> Any:
                raise errors.UpstreamRefused(402, "NO_CREDIT", "the vendor says: pay")

            edge.mint_by(fail)
            for _ in range(5):
                await edge.request_token()
            events = edge.events("broker.embed_token")
            assert [(e["outcome"], e["status"], e["code"]) for e in events] == [
                ("failed", 402, "NO_CREDIT")
            ] * 5


class TestRefusals:
    async def test_a_flood_writes_one_line_a_minute_and_sums_up(self) -> None:
        """A thousand 429s: one line; the next minute says how many there were besides."""
        limits = {"fingerprint": {"rate": 1, "per": "1h", "burst": 1}}
        async with serving({"limits": limits}, level="info") as edge:
            fingerprint = visitor()
            await edge.request_token(fingerprint)
            before = len(edge.events())
            replies = await edge.all_at_once([edge.asking(fingerprint)] * 1000)
            assert {reply.status for reply in replies} == {429}
            assert len(edge.events()) == before + 1
            edge.time.advance(60)
            await edge.request_token(fingerprint)
            summary, first = edge.events()[before + 1 :]
            del summary["timestamp"]
            assert summary == {
                "event": "broker.refusals",
                "level": "info",
                "kind": "fingerprint",
                "unwritten": 999,
            }
            assert first["outcome"] == "limited"

    async def test_the_end_of_a_broker_sums_up(self) -> None:
        """What was counted since the last minute is written before the process is gone."""
        async with serving(level="info") as edge:
            for _ in range(7):
                await edge.post(b"")
        summary, stopped = edge.events()[-2:]
        assert (summary["event"], summary["kind"], summary["unwritten"]) == (
            "broker.refusals",
            "MISSING_PARAM",
            6,
        )
        assert stopped["event"] == "broker.stopped"

    async def test_each_kind_has_a_first_line_of_its_own(self) -> None:
        """A flood of one kind does not hide another."""
        async with serving(level="info") as edge:
            for _ in range(20):
                await edge.fail_to_log_in()
                await edge.post(b"{")
                await edge.post(b"")
            kinds = [event["code"] for event in edge.events("broker.embed_token")]
            assert sorted(kinds) == ["MISSING_PARAM", "UNAUTHORIZED", "VALIDATION_ERROR"]

    async def test_at_debug_every_refusal_is_written(self) -> None:
        """Whoever asks for debug gets it."""
        async with serving(level="debug") as edge:
            for _ in range(5):
                await edge.post(b"")
            assert len(edge.events("broker.embed_token")) == 5

    async def test_what_is_written_at_debug_is_not_told_to_be_unwritten(self) -> None:
        """Refusals, and requests that leak a secret: each has its line, so nothing is missing."""
        origin = [("Origin", "https://site.example")]
        async with serving(level="debug") as edge:
            for _ in range(4):
                await edge.post(b"")
                await edge.request_token(headers=origin)
            edge.time.advance(61)
            await edge.post(b"")
        codes = [event["code"] for event in edge.events("broker.embed_token")]
        assert codes.count("MISSING_PARAM") == 5
        assert codes.count("SECRET_IN_BROWSER") == 3  # the first has an event of its own
        assert len(edge.events("broker.secret_in_browser")) == 1
        assert edge.events("broker.refusals") == []

    async def test_leaks_that_have_no_line_are_summed_up_on_every_listener(self) -> None:
        """Other routes of the data listener write none, at debug either; nor does the admin's."""
        admin = secrets.token_urlsafe(36)
        origin = ("Origin", "https://site.example")
        async with serving({"admin": {"secret": admin}}, level="debug") as edge:
            for _ in range(3):
                await edge.post(b"", path="/v1/validate", headers=[origin])
                await edge.admin("/v1/sessions", **{"api-secret": admin, origin[0]: origin[1]})
        told = {e["kind"]: e["unwritten"] for e in edge.events("broker.refusals")}
        assert told == {"SECRET_IN_BROWSER web": 2, "SECRET_IN_BROWSER admin": 2}

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans())))
    def test_only_what_nobody_has_written_is_counted(self, steps: list[tuple[str, bool]]) -> None:
        """Whatever was written anyway, first or not."""
        stream = io.StringIO()
        unwritten = dict.fromkeys("abc", 0)
        with logging_to(stream, Settings(log=LogSettings(level="info"))):
            refusals = RefusalLog()
            for kind, anyway in steps:
                first = refusals.first(kind, 5, anyway=anyway)
                unwritten[kind] += not (first or anyway)
            refusals.sum_up()
        told = {event["kind"]: event["unwritten"] for event in records(stream)}
        assert told == {kind: count for kind, count in unwritten.items() if count}

    async def test_a_defect_in_a_renewal_that_nobody_waits_for_is_written(self) -> None:
        """The visitor gets the held token; whoever operates this is told of the bug."""
        async with serving(level="info") as edge:
            fingerprint = visitor()
            held = await edge.request_token(fingerprint)
            edge.time.advance(3595 - 360)

            async def fail(*_args: object) -> Any:
                raise RuntimeError("out of ideas")

            edge.mint_by(fail)
            edge.defects_expected = True
            assert (await edge.request_token(fingerprint)).token == held.token
            await edge.app.parts.token_service.flights.drained()
            (defect,) = edge.events("broker.defect")
        assert defect["level"] == "error"
        assert defect["exception"][0]["exc_type"] == "RuntimeError"

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, SUMMARY_INTERVAL))))
    def test_no_refusal_is_lost_or_counted_twice(self, steps: list[tuple[str, int]]) -> None:
        """Written lines and sums add up to what happened, for each kind."""
        stream = io.StringIO()
        with logging_to(stream, Settings(log=LogSettings(level="info"))):
            refusals, now, written = RefusalLog(), 5, dict.fromkeys("abc", 0)
            for kind, gap in steps:
                now += gap
                written[kind] += refusals.first(kind, now)
            refusals.flush(now + SUMMARY_INTERVAL)
            refusals.flush(now + 3 * SUMMARY_INTERVAL)
        for event in records(stream):
            written[event["kind"]] += event["unwritten"]
        assert written == {kind: [k for k, _ in steps].count(kind) for kind in "abc"}

    def test_a_quiet_minute_says_nothing(self, log: io.StringIO) -> None:
        """One refusal a minute is written as it comes; there is nothing to sum up."""
        refusals = RefusalLog()
        assert all(refusals.first("agent", n * SUMMARY_INTERVAL) for n in range(1, 10))
        refusals.flush(20 * SUMMARY_INTERVAL)
        assert log.getvalue() == ""


class Terminal(io.StringIO):
    """Something that a person looks at."""

    def isatty(self) -> bool:
        return True


def shown(out: io.StringIO, level: str, event: str, **fields: object) -> str:
    """Return the console's line for an event, without the time of day."""
    with logging_to(out, Settings(log=LogSettings(format="console", level="debug"))):
        getattr(structlog.get_logger(), level)(event, **fields)
    time_of_day, _, line = out.getvalue().rstrip("\n").partition(" ")
    assert re.fullmatch(r"(\x1b\[2m)?\d\d:\d\d:\d\d(\x1b\[0m)?", time_of_day)
    return line


class TestConsole:
    """For people: short, in the order in which one asks, and no wider than 100 columns."""

    ASKED: ClassVar[dict[str, object]] = {
        "request_id": "e78b7acf-1f",
        "client": "web",
        "agent": AGENT,
        "visitor": "20dd3fd455cc",
    }

    def test_a_mint(self) -> None:
        """For whom, which token and how long it lives, how long it took, where to look it up."""
        line = shown(
            io.StringIO(),
            "info",
            "broker.embed_token",
            outcome="minted",
            **self.ASKED,
            session="ca9c593a82ec36c4eff4cb8b0605c3bb",
            token="19124548d38c",
            left_s=3594,
            duration_ms=0.413,
        )
        assert line == (
            "info  minted     A78WKV4515 web visitor=20dd3fd4 token=19124548 left=59m "
            "0.41ms e78b7acf-1f"
        )
        assert len("00:00:00 " + line) <= 100

    @pytest.mark.parametrize("limit", [*(name.value for name in LimitName), "budget"])
    def test_a_refusal(self, limit: str) -> None:
        """The status and the limit say it all."""
        line = shown(
            io.StringIO(),
            "warning",
            "broker.embed_token",
            outcome="limited",
            **self.ASKED,
            status=429,
            code="RATE_LIMITED",
            limit=limit,
            duration_ms=12.3456,
        )
        assert line == (
            f"warn  limited    A78WKV4515 web visitor=20dd3fd4 429 {limit} 12ms e78b7acf-1f"
        )
        assert len("00:00:00 " + line) <= 100

    def test_a_failure(self) -> None:
        """The code, where there is no limit; what is not known is not there."""
        line = shown(
            io.StringIO(),
            "warning",
            "broker.embed_token",
            outcome="failed",
            request_id="e78b7acf-1f",
            status=502,
            code="UPSTREAM_UNAVAILABLE",
            duration_ms=1234.5,
        )
        assert line == "warn  failed     502 UPSTREAM_UNAVAILABLE 1234ms e78b7acf-1f"

    def test_any_other_event_keeps_its_name(self) -> None:
        """So that it is found in the table of OBSERVABILITY.md; what is empty is left out."""
        line = shown(io.StringIO(), "info", "broker.reloaded", needs_restart=[])
        assert line == "info  broker.reloaded"
        line = shown(io.StringIO(), "info", "broker.reloaded", needs_restart=["server"])
        assert line == "info  broker.reloaded needs_restart=['server']"

    def test_the_last_minutes_of_a_token_are_seconds(self) -> None:
        """Where a minute matters."""
        for left, told in ((3600, "60m"), (120, "2m"), (119, "119s"), (-1, "-1s")):
            line = shown(io.StringIO(), "info", "broker.example", left_s=left)
            assert line == f"info  broker.example left={told}"

    def test_colours_are_for_terminals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not for files, nor for whoever set NO_COLOR."""
        monkeypatch.delenv("NO_COLOR", raising=False)
        coloured = shown(Terminal(), "warning", "broker.example", code="X")
        assert coloured == "\x1b[33mwarn \x1b[0m broker.example X"
        assert "\x1b" not in shown(io.StringIO(), "warning", "broker.example", code="X")
        monkeypatch.setenv("NO_COLOR", "1")
        assert "\x1b" not in shown(Terminal(), "warning", "broker.example", code="X")

    def test_a_defect_shows_where_and_not_what(self) -> None:
        """Lines and the type of the error; its message may hold a token."""
        canary = secrets.token_hex(8)
        out = io.StringIO()
        with logging_to(out, Settings(log=LogSettings(format="console"))):
            try:
                int(f"{canary}!")
            except ValueError:
                structlog.get_logger().exception("broker.defect", request_id="r-1")
        first, *lines = out.getvalue().rstrip("\n").split("\n")
        assert first.endswith("error broker.defect r-1")
        assert lines[-1] == "ValueError"
        assert any("test_a_defect_shows_where_and_not_what" in line for line in lines)
        assert canary not in out.getvalue()

    def test_a_zero_is_shown_and_nothing_is_not(self) -> None:
        """0 s of lead is an answer; an empty list and None say what a field that is absent does."""
        line = shown(
            io.StringIO(), "info", "broker.draining", lead_s=0.0, count=0, to=[], reason=None
        )
        assert line == "info  broker.draining lead=0s count=0"


class TestEscaping:
    @pytest.mark.parametrize("form", FORMS)
    @given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    def test_O9_any_text_is_one_line_of_printable_ascii(self, form: Any, text: str) -> None:
        """In every field, whatever the characters."""
        stream = io.StringIO()
        with logging_to(stream, Settings(log=LogSettings(format=form))):
            structlog.get_logger().info("broker.example", field=text, other=text)
        line, end, rest = stream.getvalue().partition("\n")
        assert (end, rest) == ("\n", "")
        assert line.isascii()
        assert line.isprintable()

    @given(text=st.text(max_size=60))
    def test_json_loses_nothing(self, text: str) -> None:
        """Escaped, not replaced: a program reads what there was."""
        stream = io.StringIO()
        with logging_to(stream, Settings(log=LogSettings())):
            structlog.get_logger().info("broker.example", field=text)
        assert records(stream)[0]["field"] == text

    @given(
        values=st.dictionaries(
            st.sampled_from("abc"),
            st.one_of(
                st.text(st.characters(max_codepoint=300), max_size=9),
                st.integers(-(2**70), 2**70),
                st.decimals(0, 10**6, places=3).map(float),
                st.booleans(),
                st.none(),
                st.lists(st.integers()),
                st.just(LimitName.AGENT),
            ),
        )
    )
    def test_the_quick_way_and_the_library_write_the_same(self, values: dict[str, Any]) -> None:
        """Whatever is in a line, it looks as `json` writes it; who reads lines sees no change."""
        stream = io.StringIO()
        with logging_to(stream, Settings(log=LogSettings())):
            structlog.get_logger().info("broker.example", **values)
        line = stream.getvalue()
        (record,) = records(stream)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", record["timestamp"])
        expected = {"event": "broker.example", **values, "level": "info"}
        expected["timestamp"] = record["timestamp"]
        assert line == json.dumps(expected, default=repr) + "\n"

    @pytest.mark.parametrize("form", FORMS)
    def test_libraries_speak_our_format_and_their_arguments_stay_out(self, form: Any) -> None:
        """Both aiohttp and asyncio use `logging`; what they interpolate may be input."""
        stream = io.StringIO()
        canary = secrets.token_hex(8)
        with logging_to(stream, Settings(log=LogSettings(format=form))):
            logging.getLogger("aiohttp.server").error("request %s\nfailed", canary)
            logging.getLogger("aiohttp.server").info("not interesting")
        written = stream.getvalue()
        assert canary not in written
        assert written.count("\n") == 1
        assert "request %s" in written
        assert "aiohttp.server" in written

    @pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, loop_factory()])
    @pytest.mark.parametrize("form", FORMS)
    def test_G7_an_error_that_nobody_awaited_shows_its_kind_only(
        self, form: Any, loop_factory: Callable[[], asyncio.AbstractEventLoop]
    ) -> None:
        """Of a task, of a callback and of what it was called with; what happened is still told."""
        stream = io.StringIO()
        canary = secrets.token_hex(8)

        def fail(*_: object) -> None:
            raise ValueError(canary)

        async def main() -> None:
            async def task() -> None:
                fail()

            loop = asyncio.get_running_loop()
            loop.call_soon(fail, canary)
            loop.call_soon(partial(fail, canary))
            lost = loop.create_task(task())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            del lost
            gc.collect()

        with (
            logging_to(stream, Settings(log=LogSettings(format=form))),
            asyncio.Runner(loop_factory=loop_factory) as runner,
        ):
            runner.run(main())
        written = stream.getvalue()
        assert canary not in written
        assert written.count("ValueError") == written.count("\n") == 3
        assert "Task exception was never retrieved" in written
        assert written.count("Exception in callback ") == 2

    def test_G7_a_text_that_was_put_together_already_stays_out(self, log: io.StringIO) -> None:
        """Where a library does not tell the values apart, its line of code is told instead."""
        canary = secrets.token_hex(8)
        logging.getLogger("aiohttp.client").warning(f"odd answer {canary}")  # noqa: G004 - the case
        logging.getLogger("aiohttp.client").warning(ValueError(canary))
        assert canary not in log.getvalue()
        for record in records(log):
            assert re.fullmatch(r"at test_logs:\d+", record["text"])

    def test_levels(self, log: io.StringIO) -> None:
        """Below the level nothing is written."""
        stream = io.StringIO()
        with logging_to(stream, Settings(log=LogSettings(level="error"))):
            logger = structlog.get_logger()
            for write in (logger.debug, logger.info, logger.warning, logger.error):
                write("broker.example")
        assert [record["level"] for record in records(stream)] == ["error"]
        assert log.getvalue() == ""


def test_a_clock_that_is_set_back_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line tells the time at which it was written, though one before it was later."""
    stamp = Stamp()
    for moment, told in (
        (86_400.5, "1970-01-02T00:00:00.500000Z"),
        (3.25, "1970-01-01T00:00:03.250000Z"),
    ):
        told_by_clock = int(moment * 10**9)
        monkeypatch.setattr("broker.telemetry.logs.time.time_ns", lambda ns=told_by_clock: ns)
        assert stamp.now() == told


class TestVisitorHash:
    def test_it_names_and_does_not_tell(self) -> None:
        """The same visitor, the same name; no plain hash that a table of fingerprints reverses."""
        fingerprint = visitor()
        name = visitor_hash(fingerprint)
        assert name == visitor_hash(fingerprint) != visitor_hash(visitor())
        assert name not in hashlib.blake2b(fingerprint.encode(), digest_size=6).hexdigest()
        assert name not in hashlib.sha256(fingerprint.encode()).hexdigest()


class _Canaries:
    """Everything that must not be seen, made at run time and collected on the way."""

    def __init__(self) -> None:
        self.secret = secrets.token_urlsafe(24)
        self.other_secret = secrets.token_urlsafe(24)
        self.key = secrets.token_urlsafe(48)
        self.sealing_key = secrets.token_urlsafe(48)
        self.wrong_secret = secrets.token_urlsafe(24)
        self.fingerprint = secrets.token_hex(32)
        self.tokens: set[str] = set()

    def tree(self, folder: Path, form: str) -> dict[str, Any]:
        """Settings that bring every kind of secret, inline and in files."""
        other = folder / "other"
        other.write_text(self.other_secret)
        return {
            "clients": {
                "canary": {"secret": self.secret, "agents": ["*"]},
                "other": {"secret_file": str(other), "agents": [AGENT]},
            },
            "issuer": {"local": {"keys": {"c": {"secret": self.key}}, "signing_key": "c"}},
            "store": {
                "url": f"sqlite://{folder / 'state.db'}",
                "encryption_key": self.sealing_key,
            },
            "limits": {"fingerprint": {"rate": 1, "per": "1h", "burst": 12}},
            "log": {"format": form, "level": "debug"},
        }

    def found_in(self, text: str) -> list[str]:
        """Name what is in a text: whole, or the half of a token that is its proof."""
        everything = {**vars(self)}
        for n, token in enumerate(everything.pop("tokens")):
            everything |= {f"token {n}": token, f"signature {n}": token.rpartition(".")[2]}
        return [name for name, value in everything.items() if value in text]


async def _exercise(edge: Edge, canaries: _Canaries) -> str:
    """Bring the canaries to every place that a caller can reach; return the errors' text."""
    own: dict[str, Any] = {"secret": canaries.secret}
    fingerprint = canaries.fingerprint
    replies = []
    for fields in ({}, {}, {"fresh": True}, {"model": "essence"}):
        reply = await edge.request_token(fingerprint, **own, **fields)
        canaries.tokens.add(reply.token)
    canaries.tokens.add((await edge.request_token(fingerprint, secret=canaries.other_secret)).token)
    known = [*canaries.tokens, canaries.secret, canaries.key, fingerprint]
    for value in known:
        field = value[:200]
        replies += [
            await edge.request_token(fingerprint, secret=canaries.wrong_secret),
            await edge.request_token(fingerprint, agent=f"{field}/", **own),
            await edge.request_token(f"{field}-", **own),
            await edge.request_token(fingerprint, fresh=value, **own),
            await edge.request_token(model=f"{field}\n", **own),
            await edge.post(f'{{"agent_id":"{value}'.encode(), **own),
            await edge.get(f"/{value}"),
            await edge.get(f"/livez?{value}", "POST"),
            await edge.request_token(fingerprint, secret=value[:-1]),
            await edge.request_token(fingerprint, headers=[("Origin", value)], **own),
            await edge.request_token(fingerprint, headers=[("api-secret", value)], **own),
            await edge.request_token(fingerprint, headers=[("X-Request-Id", f"{value}!")], **own),
            await edge.raw(b"GET /\x1b" + value.encode() + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
            await edge.raw(request("GET", "/livez", [("X-\x1b", value)])),
            await edge.admin(f"/{value}"),
        ]
    for _ in range(12):
        reply = await edge.request_token(fingerprint, **own)
        replies += [reply] if reply.status == 429 else []
    replies += [await edge.post(b"", path="/v1/validate", secret=v[:-1]) for v in known]
    replies += [await edge.request_token(agent="other", secret=canaries.other_secret)]
    await _cause_a_defect(edge, own)
    assert await edge.app.reloader.reload() is True
    assert {reply.status for reply in replies} >= {400, 401, 403, 404, 405, 429}
    return "\n".join(reply.text for reply in replies if reply.status != 200)


async def _cause_a_defect(edge: Edge, own: dict[str, Any]) -> None:
    """Let a mint fail in a way that nobody foresaw, with secrets in its local variables."""

    async def fail(request: object, *_args: object) -> Any:
        local = {"request": request, "own": own, "key": edge.key}
        raise RuntimeError(f"out of {len(local)} ideas")

    edge.defects_expected = True
    kept = edge.app.parts.issuer.mint
    edge.mint_by(fail)
    assert (await edge.request_token(**own)).status == 500
    edge.mint_by(kept)


@pytest.mark.parametrize("form", FORMS)
async def test_O1_G7_no_canary_is_seen_anywhere(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not one canary shows, whatever was done with it.

    Secrets, keys, tokens and fingerprints go through a whole broker at debug level, a defect, a
    reload, a drain and the start after it: nothing of them in logs, metrics, the state file,
    error answers, the repr of any object of ours, or the process list.
    """
    canaries = _Canaries()
    tree = canaries.tree(tmp_path, form)
    async with serving(tree, form=form) as edge:
        errors_seen = await _exercise(edge, canaries)
        scrapes = [
            (await edge.admin("/metrics", Accept=accept)).text
            for accept in ("text/plain", "application/openmetrics-text")
        ]
        reprs = list(_reprs_of_ours(edge.app))
    async with serving(tree, form=form) as again:
        reused = await again.request_token(canaries.fingerprint, secret=canaries.other_secret)
        assert reused.token in canaries.tokens
    after_reload = capsys.readouterr()
    written = edge.log.getvalue() + after_reload.err + after_reload.out + again.log.getvalue()
    assert len(CANONICAL.findall(written)) > 50
    assert "broker.defect" in written
    assert "RuntimeError" in written
    assert "broker.state_file_opened" in written
    assert len(reprs) > 50
    assert canaries.found_in(written) == []
    assert canaries.found_in("\n".join(scrapes)) == []
    assert canaries.found_in(errors_seen) == []
    assert canaries.found_in("\n".join(reprs)) == []
    assert canaries.found_in(_read("/proc/self/cmdline")) == []
    assert canaries.found_in(_read(tmp_path / "state.db")) == []


def _read(path: Path | str) -> str:
    return Path(path).read_bytes().decode("latin-1")


def _reprs_of_ours(root: object) -> Iterator[str]:
    """Yield the repr of every object of our own types that can be reached from here."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        one = stack.pop()
        if id(one) in seen or isinstance(one, type) or type(one).__name__ == "module":
            continue
        seen.add(id(one))
        if type(one).__module__.startswith("broker."):
            yield repr(one)
            stack += [getattr(one, name, None) for name in getattr(one, "__struct_fields__", ())]
        stack += gc.get_referents(one)


async def test_G7_reprs_of_what_passes_through(tmp_path: Path) -> None:
    """Values that live for one request mask themselves too: tracebacks may show them."""
    from broker.model import Minted, Secret, TokenRequest
    from broker.wire.request import TokenRequestBody

    canary = secrets.token_hex(16)
    values = [
        TokenRequest("web", AGENT, canary),
        Minted(canary, "session", 1, 1),
        Secret(canary),
        TokenRequestBody(agent_id=AGENT, fingerprint=canary),
        errors.Invalid("field: rule"),
    ]
    assert [value for value in values if canary in repr(value)] == []


def test_the_route_of_this_file_is_the_real_one() -> None:
    """Guards the helpers: a renamed route would make every canary a 404."""
    from broker.web.router import TOKEN_PATH as REAL

    assert REAL == TOKEN_PATH


def test_a_line_is_there_once_it_is_written() -> None:
    """To a stream that is given, as a test's or a tool's: it is flushed line by line."""

    class Stream(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    stream = Stream()
    with logging_to(stream, settings := config.from_tree({"issuer": {"kind": "local"}})):
        structlog.get_logger().warning("broker.store_back")
        assert "broker.store_back" in stream.flushed
    assert settings.log.level == "info"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.254, "0.25ms"), (9.994, "9.99ms"), (10, "10ms"), (12.6, "13ms"), ("x", "x")],
)
def test_a_person_reads_short_times_to_the_hundredth(value: object, shown: str) -> None:
    """From ten milliseconds on they are whole ones."""
    assert log_console._milliseconds(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(119, "119s"), (120, "2m"), (150, "2m"), ("x", "x")])
def test_a_person_reads_long_times_in_minutes(value: object, shown: str) -> None:
    """From two of them on."""
    assert log_console._duration(value) == shown
