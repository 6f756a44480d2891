"""The pages are held to the code: their blocks run or parse, their tables say what is there."""

import argparse
import ast
import asyncio
import html
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import pytest
from documents import (
    BLOCKS,
    PAGES,
    README,
    ROOT,
    TEXT,
    Block,
    anchors,
    code_in,
    commands,
    links,
    of,
    section,
    table,
    under,
    words_of,
)
from prometheus_client import Metric

from broker import errors, exit_codes
from broker.app import factory, missing_secrets
from broker.cli import mint
from broker.cli.main import _parser
from broker.config import load as config
from broker.config import schema, settings
from broker.issuers.vendor.faults import BY_CODE
from broker.issuers.vendor.replies import Scope
from broker.model import LimitName, Minted, Outcome, Session
from broker.pacing.pacer import MAX_PROMISE
from broker.pacing.slots import Budget
from broker.rules import bucket
from broker.rules.outstanding import PROBES
from broker.telemetry import exposition
from broker.telemetry.cells import SharedCells
from broker.telemetry.metrics import Metrics
from broker.testing import FakeVendor
from broker.valkey.client.scripts import acl_line
from broker.valkey.membership import ALONE_AFTER, UNSEEN_PARTS
from broker.web.token_status import session_headers
from broker.wire import request as wire
from broker.wire import responses

README_LINES = 250
"""More is a sign that a page is missing."""

FLAT = " ".join(TEXT.split())
"""All pages without line ends, for sentences."""

TIMEOUT = 60.0
"""Seconds after which a process is taken to hang, on a machine that is busy with other tests."""


# -- blocks


def test_every_block_has_a_language_that_is_tested() -> None:
    """A block of another kind would be one that nothing holds to the code."""
    assert {block.language for block in BLOCKS} == {
        "go",
        "html",
        "js",
        "json",
        "jsx",
        "php",
        "python",
        "sh",
        "text",
        "toml",
    }


def test_every_broker_command_is_understood() -> None:
    """What the pages tell people to type is accepted as it stands."""
    parser = _parser()
    seen = [words[1:] for words in commands() if Path(words[0]).name == "broker"]
    assert seen
    for arguments in seen:
        assert parser.parse_args(arguments).run


def test_every_other_command_is_a_known_one() -> None:
    """A new kind of command needs a test here."""
    others = {words[0] for words in commands() if Path(words[0]).name != "broker"}
    assert others == {
        ".cache/venv/bin/python",
        ".cache/dev/bin/pip",
        ".cache/dev/bin/pytest",
        ".venv/bin/flask",
        ".venv/bin/pex",
        ".venv/bin/pip",
        "/opt/embed-token-broker/bin/pip",
        "amtool",
        "cp",
        "curl",
        "echo",
        "install",
        "journalctl",
        "jq",
        "mv",
        "promtool",
        "python3",
        "sed",
        "systemctl",
        "tee",
        "tests/load/rolling",
        "tests/load/run",
        "tests/run",
    }


@pytest.mark.parametrize(
    "program",
    [
        "tests/load/run",
        "tests/load/fleet_soak.py",
        "tests/load/failing.py",
        "tests/load/stall.py",
        "tests/load/chaos.py",
        pytest.param("tests/load/refusals.py", marks=pytest.mark.parts),
        pytest.param("tests/load/rolling", marks=pytest.mark.parts),
        "tests/bench/cpu.py",
        "tests/bench/life.py",
        "tests/bench/logs.py",
        "tests/bench/memory.py",
        pytest.param("tests/bench/metrics.py", marks=pytest.mark.parts),
    ],
)
def test_every_flag_of_a_load_test_exists(program: str) -> None:
    """Its own help text lists each."""
    (words,) = [words for words in commands() if program in words]
    done = subprocess.run(
        [sys.executable, program, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    flags = [word for word in words if word.startswith("--")]
    assert flags
    assert set(flags) <= set(re.findall(r"--[a-z]+", done.stdout))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_mentioned_is_there(page: str) -> None:
    """Paths in prose and in commands lead somewhere, from the root."""
    folders = "broker|config|grafana|tests"
    path = rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w|pyproject\.toml)"
    named = set(re.findall(path, PAGES[page]))
    if page in {".github/CONTRIBUTING.md", "broker/WHAT_TO_OPEN.md"} and not MOVED:
        named = {name for name in named if not name.startswith("broker/")}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    """Within the page, to another page, to a file; and each page is reached from the README."""
    for path, fragment in links(page):
        assert (ROOT / path).exists(), path
        assert not fragment or fragment in anchors(path), f"{path}#{fragment}"


def test_the_readme_leads_to_every_page_and_fits_on_a_few_screens() -> None:
    """Each of the others has one purpose; the README says who reads which."""
    assert {path for path, _ in links("README.md")} >= PAGES.keys() - {"README.md"}
    assert len(README.splitlines()) <= README_LINES


def test_the_user_of_the_store_is_the_one_that_the_scripts_need() -> None:
    """The shown line is generated, and so is what a cluster needs beside it."""
    shown = acl_line("broker", ">PASSWORD")
    assert f"{shown}\n" in [block.text for block in of("text")]
    more = set(acl_line("broker", ">PASSWORD", cluster=True).split()) - set(shown.split())
    assert f"on a cluster add `{' '.join(sorted(more))}`" in FLAT
    more = set(acl_line("broker", ">PASSWORD", database=True).split()) - set(shown.split())
    assert f"for another database than 0 `{' '.join(sorted(more))}`" in FLAT


def test_extras_that_are_installed_exist() -> None:
    """`pip install '.[x]'` warns about an unknown extra, and installs nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = set(re.findall(r"\.\[(\w+)\]", TEXT))
    assert asked == {"dev", "docs"}
    assert asked <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("block", of("toml"), ids=lambda block: block.heading)
def test_every_toml_block_is_a_valid_configuration(block: Block) -> None:
    """Keys, units and values are accepted, and every part can be built from them."""
    tree = tomllib.loads(block.text)
    config.from_tree(tree)
    runnable = {
        "clients": {"any": {"secret": secrets.token_urlsafe(24), "agents": ["*"]}},
        "issuer": {"local": {"keys": {"any": {"secret": secrets.token_urlsafe(48)}}}},
    }
    if "clients" in tree:
        del runnable["clients"]
    if tree.get("issuer", {}).get("local"):
        del runnable["issuer"]
    config._merge(runnable, tree)
    built = missing_secrets.fill_missing_secrets(
        config.from_tree(runnable), lambda _name: settings.Secret(secrets.token_urlsafe(48))
    )
    factory.check(built, {"BITHUMAN_API_SECRET": secrets.token_urlsafe(24)})


def test_the_answer_has_exactly_the_fields_of_a_success() -> None:
    """Whoever reads the example reads the real thing."""
    shown = json.loads(under("A first token", "json").text)
    minted = Minted(token="t", session_id="s", expires_at=1, lifetime=1)
    real = json.loads(responses.success_body(minted))
    assert list(shown) == list(real)
    assert list(shown["data"]) == list(real["data"])
    assert msgspec.convert(shown, responses.TokenAnswer)
    assert shown["data"]["sid"] == shown["data"]["session_id"]


def test_the_error_is_the_one_that_is_sent() -> None:
    """Byte for byte, but for white space."""
    shown = json.loads(under("The wire", "json").text)
    limit = bucket.limit(1, 1_000_000, 1)
    _, verdict = bucket.spend(1_000_000, limit, 0)
    error = errors.RateLimited(LimitName.FINGERPRINT, verdict)
    assert shown == json.loads(responses.error_body_of(error))


def test_the_iframe_is_the_one_that_the_command_prints() -> None:
    """The snippet in the page and `broker mint --iframe` cannot drift apart."""
    block = under("The iframe", "html")
    assert " ".join(block.text.split()) == mint.iframe("A78WKV4515", "TOKEN")
    assert html.unescape(block.text).count("TOKEN") == 1


ROUTES = {block.text for block in BLOCKS if block.page == "broker/web/BACKENDS.md"}
"""Backends, which need their frameworks: tests/parts/test_snippets.py runs them."""

PROGRAMS = [block for block in of("python") if block.text not in ROUTES]


def test_the_route_of_the_readme_is_one_that_is_run() -> None:
    """Word for word the one for Flask."""
    assert under("The avatar on a page", "python").text == under("Flask", "python").text


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_every_python_block_runs(number: int) -> None:
    """As a program of its own, with warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAMS[number].text],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- tables


EMBED = (ROOT / "broker" / "web" / "embed" / "embed.js").read_text(encoding="utf-8")


def test_attributes_are_those_that_the_script_reads() -> None:
    """Each option of the types as `data-*`, and no other."""
    types = (ROOT / "broker" / "web" / "embed" / "embed.d.ts").read_text(encoding="utf-8")
    options = re.findall(r"interface (?:Token|Mount)Options [^{]*\{(.*?)\n    \}", types, re.DOTALL)
    names = {name for text in options for name in re.findall(r"(?m)^      (\w+)\??:", text)}
    documented = [name for row in table("attribute", "In the page") for name in code_in(row[0])]
    attributes = {"data-" + re.sub("[A-Z]", lambda m: f"-{m[0].lower()}", name) for name in names}
    assert set(documented) == attributes
    assert len(documented) == len(attributes) == 8


def test_symptoms_name_codes_and_texts_that_exist() -> None:
    """What a visitor reads is in the script; what a developer reads there or on the wire."""
    classes = [errors.BrokerError]
    for kind in classes:  # grows while it is read: the whole tree
        classes += kind.__subclasses__()
    codes = (
        {kind.code for kind in classes} | BY_CODE.keys() | set(re.findall(r'"([A-Z_]+)"', EMBED))
    )
    rows = table("what one sees", "When it does not work")
    named = {code for row in rows for code in code_in(row[1]) if not code.startswith("HTTP_")}
    assert len(named) > 10
    assert named <= codes
    for text in re.findall(r'"([^"]+)"', " ".join(row[0] for row in rows)):
        assert text.rstrip(".") in EMBED


def test_error_codes_are_those_of_the_code() -> None:
    """Every class of `broker.errors` with its status, and nothing else."""
    documented = {(int(row[0]), code_in(row[1])[0]) for row in table("status", "The wire")}
    classes = [errors.BrokerError]
    for kind in classes:  # grows while it is read: the whole tree
        classes += kind.__subclasses__()
    assert documented == {
        (kind.status, kind.code) for kind in classes if kind is not errors.UpstreamRefused
    }


def test_statuses_of_the_vendor_are_those_that_pass() -> None:
    """The vendor's verdicts are listed by status: all that can reach a caller."""
    sentence = re.search(r"pass through with their own code and status \(([^)]*)\)", TEXT)
    assert sentence is not None
    listed = {int(number) for number in re.findall(r"\d{3}", sentence[1])}
    passing = {status for status, meaning in BY_CODE.values() if isinstance(meaning, Scope)}
    assert listed == passing | {410, 422}


def test_what_is_remembered_is_said() -> None:
    """The codes named for the account and for an agent are those that are remembered."""
    sentence = re.search(
        r"A refusal is remembered only where(.*?)for the agent and model", TEXT, re.DOTALL
    )
    assert sentence is not None
    remembered = {
        code
        for code, (_, meaning) in BY_CODE.items()
        if meaning in {Scope.ACCOUNT, Scope.AGENT_MODEL}
    }
    assert set(code_in(sentence[1])) == remembered - {"INSUFFICIENT_BALANCE"}  # said as 402


def test_fields_of_a_request_are_those_that_are_read() -> None:
    """No more, no fewer."""
    documented = [code_in(row[0])[0] for row in table("field", "The wire")]
    assert documented == list(wire.TokenRequestBody.__struct_fields__)


def test_answers_about_sessions_have_the_fields_of_the_code() -> None:
    """All of each, in the order in which they are sent."""
    shown = {row[0]: code_in(row[1]) for row in table("answer", "The life of a session")}
    kinds = {
        "`introspect`, the caller's good token": responses.ActiveToken,
        "`introspect`, any other": responses.InactiveToken,
        "one session": responses.SessionAnswer,
        "list of sessions": responses.SessionsAnswer,
        "`DELETE`": responses.EndedAnswer,
    }
    for row, kind in kinds.items():
        assert shown[row] == list(kind.__struct_fields__), row
    session = Session("s", "web", "A1", "f", "", 1, 2)
    sent = [line.partition(":")[0] for line in session_headers(session).splitlines()]
    assert shown["`verify`"] == sent


def test_commands_are_those_of_the_command_line() -> None:
    """Each command with every flag that it has."""
    documented = {}
    for row in table("command", "Commands"):
        (usage,) = code_in(row[0])
        words = re.findall(r"[\w-]+", usage)
        name = " ".join(usage.split(" [")[0].split()[1:])
        name = re.sub(r" (?:AGENT|NAME|SHELL|--).*", "", name)
        documented[name] = {f"--{word[2:]}" for word in words if word.startswith("--")}
    assert documented == dict(commands_of(_parser(), ()))


def commands_of(
    parser: argparse.ArgumentParser, path: tuple[str, ...]
) -> Iterator[tuple[str, set[str]]]:
    """Yield each command and its long flags."""
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not nested:
        flags = {flag for action in parser._actions for flag in action.option_strings}
        yield " ".join(path), {flag for flag in flags if flag.startswith("--")} - {"--help"}
    for action in nested:
        for name, child in action.choices.items():
            yield from commands_of(child, (*path, name))


def test_exit_codes_are_those_of_the_command_line() -> None:
    """And the one of a second signal."""
    documented = [row[0] for row in table("exit code", "Exit codes")]
    codes = sorted(code for name, code in vars(exit_codes).items() if name.startswith("EX_"))
    assert documented == [*map(str, codes), "128 + n"]


def all_metrics() -> list[Metric]:
    """Metrics of a relay with all parts that can report: what Prometheus sees."""
    layout = Metrics(
        "upstream", budget=True, shared_store=True, state_file=True, pass_through=True, workers=2
    ).layout
    return list(
        exposition.registry(layout.families, SharedCells([layout.cells]), lambda: None).collect()
    )


def test_metrics_are_those_that_are_reported() -> None:
    """Name, type and labels of each, and none that is gone."""
    documented = {
        code_in(row[0])[0]: (row[1], set(code_in(row[2]))) for row in table("metric", "Metrics")
    }
    reported = {}
    for family in all_metrics():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels}
        if name.startswith("broker_"):
            reported[name] = (family.type, labels - {"le"})
    assert documented == reported


def test_outcomes_are_those_that_are_counted() -> None:
    """The row of `broker_requests_total` lists every value of its label."""
    row = next(row for row in table("metric", "Metrics") if "broker_requests_total" in row[0])
    assert set(code_in(row[3])) == {outcome.value for outcome in Outcome}


def test_metrics_that_are_named_elsewhere_exist() -> None:
    """Also in prose, such as the proposals for alerts."""
    reported = {sample.name for family in all_metrics() for sample in family.samples} | {
        family.name for family in all_metrics()
    }
    named = set(re.findall(r"\bbroker_[a-z_]+[a-z]\b", TEXT)) - {"broker_web"}  # a secret's file
    assert {name for name in named if not name.startswith("broker_web")} <= reported


def logged_events() -> dict[str, tuple[set[str], set[str]]]:
    """Return levels and fields of every event that the source writes, by its name."""
    levels = {"debug", "info", "warning", "error", "exception"}
    found: defaultdict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for path in sorted((ROOT / "broker").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            event = node.args[0]
            if not isinstance(event, ast.Constant) or not str(event.value).startswith("broker."):
                continue
            seen_levels, fields = found[str(event.value)]
            fields |= {word.arg for word in node.keywords if word.arg} - {"exc_info"}
            name = node.func.attr if isinstance(node.func, ast.Attribute) else "write"
            if name in levels:
                seen_levels.add("error" if name == "exception" else name)
            else:
                seen_levels |= {"info", "debug"}
    return dict(found)


def test_log_events_are_those_of_the_source() -> None:
    """Event, levels and fields of each."""
    documented = {
        code_in(row[0])[0]: (set(row[1].split(", ")), set(code_in(row[2])))
        for row in table("event", "Log events")
    }
    found = logged_events()
    assert len(found) > 10
    assert documented.keys() == found.keys()
    for event, (levels, fields) in documented.items():
        if event == "broker.embed_token":
            # of a failure only: put into a dict first
            fields -= {"status", "code", "limit", "reason"}
        if event == "broker.pass_through":  # the same
            fields -= {"client", "method", "sent", "received", "vendor_request_id"}
        assert (levels, fields) == found[event], event


def test_limits_are_the_defaults() -> None:
    """The figures in the table are those that hold when nothing is configured."""
    limits = settings.LimitsSettings()
    shown = {code_in(row[0])[0]: row[3] for row in table("limit", "Limits")}
    assert set(shown) == {*(name.value for name in LimitName), "budget"}
    real = {name: getattr(limits, name) for name in ("fingerprint", "fingerprint_mints", "agent")}
    for name, limit in {**real, "budget": settings.BudgetSettings()}.items():
        assert limit.per.seconds == 60
        assert shown[name] == f"{limit.rate:,.0f} a minute, burst {limit.burst:,}"
    assert limits.client is None
    assert shown["client"] == "off"


def test_what_the_readme_says_at_a_glance_is_in_step() -> None:
    """Its figures are those of the table of limits, its commands those of the table of commands."""
    glance = " ".join(section("At a glance").text.split())
    shown = {
        code_in(row[0])[0]: re.findall(r"\d[\d,]*", row[3]) for row in table("limit", "Limits")
    }
    for name, sentence in {
        "fingerprint": "{} requests (burst {})",
        "fingerprint_mints": "and {} mints a minute for each visitor",
        "agent": "{} mints a minute for each agent (burst {})",
        "budget": "{} calls a minute to the vendor (burst {})",
    }.items():
        rate, burst = (figure.strip(",") for figure in shown[name])
        assert sentence.format(rate, burst) in glance, name
    named = {name for text in code_in(glance) for name in [text.removeprefix("broker ")]}
    assert named >= {name for name, _ in commands_of(_parser(), ())}


def test_the_budget_s_arithmetic_is_right() -> None:
    """Every figure of the chapter follows from the default budget and the default floors."""
    budget, reuse = settings.BudgetSettings(), settings.ReuseSettings()
    worst = budget.rate + budget.burst
    assert f"{budget.rate} refilled + {budget.burst} of the burst = {worst}" in TEXT
    assert worst + 3 * PROBES == 120
    gap = budget.per.seconds / budget.rate
    assert f"one every `per` / `rate` = 60 / {budget.rate} = {gap:.2f} s" in TEXT
    held = f"{budget.burst - 1} \N{MULTIPLICATION SIGN} {gap:.2f} s"
    assert f"= {held} = {(budget.burst - 1) * gap:.0f} s keeps" in TEXT
    assert f"| `burst` | {budget.burst} | slots" in TEXT
    assert MAX_PROMISE == 5 * 60, "five minutes after it was sent"
    waiting = int(budget.max_wait.seconds * budget.rate / budget.per.seconds)
    assert f"*At once*: {budget.burst + waiting} first visitors" in TEXT
    assert f"{budget.burst} of the burst, and {waiting} who" in TEXT
    for margin in (reuse.floor, reuse.refresh_ahead):
        minutes = 60 - int(margin.seconds / 60)
        assert (
            f"{budget.rate} \N{MULTIPLICATION SIGN} {minutes} = {budget.rate * minutes:,}" in TEXT
        )
    for row in table("new visitors an hour, evenly", "What a site needs"):
        visitors, mints = int(row[0].replace(",", "")), int(row[1])
        assert mints == visitors / 60
        share = f"{mints / budget.rate * 100:.0f} %" if mints <= budget.rate else None
        assert row[2] == (share or "two egress addresses")


def test_the_share_of_an_instance_that_has_seen_nobody_is_right() -> None:
    """A part in 32, from when, how often that is a call, and for how many the window holds."""
    told = " ".join(section("Started while the store is away").text.split())
    assert f"a part in {UNSEEN_PARTS}, the others none" in told
    assert f"only after {ALONE_AFTER:.0f} s" in told
    assert f"up to {UNSEEN_PARTS} such instances" in told
    whole = settings.BudgetSettings()
    budget = Budget(whole.rate, whole.per.seconds, whole.burst, whole.max_wait.seconds)
    share = budget.share(UNSEEN_PARTS)
    assert share is not None
    assert f"a first visitor every {share.interval:.0f} s" in told
    rate, parts = whole.rate, UNSEEN_PARTS
    assert share.rate == (rate - (parts - whole.burst)) / parts
    shown = f"({rate} - ({parts} - {whole.burst})) / {parts} = {share.rate:.1f} calls a minute"
    assert shown in told
    shares = [parts for parts in range(1, 500) if budget.share(parts) is not None]
    assert f"(with the default more than {max(shares)})" in FLAT


def test_default_reuse_marks_are_those_in_the_table() -> None:
    """The marks by name, with the value that holds when nothing is configured."""
    reuse = settings.ReuseSettings()
    for name in ("floor", "floor_in_outage", "refresh_ahead"):
        minutes = getattr(reuse, name).seconds / 60
        assert f"`{name}` ({minutes:.0f} min)" in TEXT


def test_tests_that_are_named_exist() -> None:
    """A failure's row names the file of its test, and the numbers that the test bears."""
    rows = table("what fails", "When something fails")
    rows += table("what fails", "When the shared store fails")
    for row in rows:
        for reference in row[-1].split("; "):
            if reference in {"", "-"}:
                continue
            *numbers, name = reference.split(" ")
            source = (ROOT / "tests" / code_in(name)[0]).read_text(encoding="utf-8")
            for number in numbers:
                assert re.search(rf"def test_(?:[A-Z]\d+_)*{number}_", source), (reference, row)
            assert numbers or "def test_" in source
    tested = [row for row in rows if row[-1] not in {"", "-"}]
    assert len(tested) > len(rows) / 2


def test_settings_that_are_named_exist() -> None:
    """`[section] key` in prose is a section and a key that can be configured."""
    found = re.findall(r"`\[([a-z._]+)\](?: ([a-z_]+))?(?: = [^`]*)?`", TEXT)
    assert len(found) > 10
    for name, key in found:
        if name == "section":  # in the rule for names of variables
            continue
        kind: Any = settings.Settings
        for part in name.split("."):
            kind = schema.bare(schema.fields_of(kind)[part])
        assert not key or key in schema.fields_of(kind), f"[{name}] {key}"


def test_variables_that_are_shown_are_understood() -> None:
    """Each override of the prose and of the commands, all of them at once."""
    shown = re.findall(r"\b(BROKER_\w+?__\w+)=([^\s`]+)", TEXT)
    assert len(shown) > 2
    read = config.load(None, dict(shown), {})
    assert read != settings.Settings()


def test_nothing_is_left_to_be_filled_in() -> None:
    """Capital letters on a line of their own were places for tables."""
    assert not re.search(r"(?m)^[A-Z]{4,}$", TEXT)
    assert "TODO" not in TEXT


# -- the floor plan

MOVED = (ROOT / "broker" / "process").is_dir()
"""Whether the files stand on their floors; the plan shows where they stand then."""


@pytest.mark.skipif(not MOVED, reason="the files have not been moved to their floors")
def test_the_floor_plan_is_the_tree() -> None:
    """Each room with its files, each file in one line, and none that is gone."""
    planned: defaultdict[str, list[str]] = defaultdict(list)
    for room, _, files in table("room", "The floor plan"):
        planned[code_in(room)[0]] += code_in(files)
    everywhere = {"__init__.py", "__main__.py", "py.typed"}
    there: defaultdict[str, list[str]] = defaultdict(list)
    for path in (ROOT / "broker").rglob("*.*"):
        if path.is_file() and path.name not in everywhere and path.suffix not in {".md", ".pyc"}:
            room = f"{path.parent.relative_to(ROOT).as_posix()}/"
            there[room].append(path.name.removesuffix(".py"))
    assert {room: sorted(files) for room, files in planned.items()} == {
        room: sorted(files) for room, files in there.items()
    }


# -- running


class Dev(NamedTuple):
    """A development broker, and what it printed."""

    url: str
    secret: str
    lines: list[str]


@contextmanager
def development_broker(folder: Path) -> Iterator[Dev]:
    """Run the README's command on free ports."""
    (command,) = [words for words in commands() if words[1:] == ["serve", "--dev"]]
    arguments = [*command[1:], "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BROKER_")}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "broker", *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline(), process.stdout.readline()]
            first = json.loads(lines[0])
            yield Dev(first["url"], first["api_secret"], lines)
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    """One broker for all tests that need one."""
    with development_broker(tmp_path_factory.mktemp("readme")) as dev:
        yield dev


def post(running: Dev, body: bytes) -> tuple[str, dict[str, Any]]:
    """Ask for a token; returns `Cache-Status` and the answer."""
    connection = HTTPConnection(urlsplit(running.url).netloc, timeout=TIMEOUT)
    try:
        connection.request("POST", "/v1/embed-tokens/request", body, {"api-secret": running.secret})
        answer = connection.getresponse()
        return answer.getheader("Cache-Status", ""), json.load(answer)
    finally:
        connection.close()


def test_the_printed_lines_are_those_in_the_page(running: Dev) -> None:
    """Word for word, but for ports and secret."""
    block = next(block for block in of("text") if "api_secret" in block.text)

    def bare(text: str) -> str:
        return re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", text)

    assert bare(block.text) == bare("".join(running.lines)).replace(running.secret, "CLIENT_SECRET")


def test_the_first_token_is_as_shown_and_then_reused(running: Dev) -> None:
    """The curl line's body gets the shown answer; again it is the same, and a hit."""
    line = shlex.split(running.lines[1])
    body = line[line.index("-d") + 1].encode()
    before, first = post(running, body)
    after, second = post(running, body)
    shown = json.loads(under("A first token", "json").text)
    assert list(first["data"]) == list(shown["data"])
    assert first["data"]["token"].startswith(shown["data"]["token"].removesuffix("..."))
    assert (before, after) == (
        "embed-token-broker; fwd=miss",
        "embed-token-broker; hit",
    )
    assert "Cache-Status: embed-token-broker; hit" in PAGES["README.md"]
    assert second == first


def test_the_iframe_command_prints_the_shown_iframe(running: Dev) -> None:
    """The two lines under the answer, with this broker's address and secret."""
    (words,) = [words for words in commands() if "--iframe" in words]
    arguments = [word.replace("http://127.0.0.1:8080", running.url) for word in words[1:]]
    done = subprocess.run(
        [sys.executable, "-m", "broker", *arguments],
        env={**os.environ, "BROKER_API_SECRET": running.secret},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    block = under("The iframe", "html")
    shown = re.sub(r"token=[^\"]+", "token=TOKEN", done.stdout)
    assert shown.split() == block.text.split()


@pytest.mark.parts
class TestJavaScript:
    """Run by Node, for which a browser's `localStorage` is made up."""

    STORAGE = """
    globalThis.crypto ??= require("node:crypto").webcrypto;
    const stored = new Map();
    globalThis.localStorage = {
      getItem: (key) => stored.has(key) ? stored.get(key) : null,
      setItem: (key, value) => stored.set(key, String(value)),
    };
    """

    def test_a_device_keeps_its_fingerprint_and_no_two_share_one(self) -> None:
        """32 hex digits, the same on the next page view, others on another device."""
        (block,) = [block for block in of("js") if "localStorage" in block.text]
        assert len(block.text.splitlines()) == 5
        view = f"(() => {{ {block.text}; return fingerprint; }})()"
        script = f"{self.STORAGE} const views = [{view}, {view}]; stored.clear();"
        first, again, other = json.loads(
            self.node(f"{script} console.log(JSON.stringify([...views, {view}]));")
        )
        assert first == again != other
        for fingerprint in (first, other):
            assert re.fullmatch(r"[0-9a-f]{32}", fingerprint)
            body = json.dumps({"agent_id": "A78WKV4515", "fingerprint": fingerprint}).encode()
            assert wire.parse(body, "web", any_fingerprint=False).fingerprint == fingerprint

    def node(self, script: str) -> str:
        return subprocess.run(
            ["node", "-e", script], capture_output=True, text=True, timeout=TIMEOUT, check=True
        ).stdout


@pytest.mark.parts
def test_the_printed_curl_line_works_in_a_shell(running: Dev) -> None:
    """Pasted as it was printed."""
    done = subprocess.run(
        ["bash", "-c", running.lines[1]],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    assert json.loads(done.stdout)["success"] is True


@pytest.mark.parts
def test_the_log_s_commands_read_what_a_broker_writes(tmp_path: Path) -> None:
    """JSON is read, the plain line of a start that failed is passed over; sessions are found."""
    lines = [{"event": "broker.started"}, {"event": "broker.embed_token", "session": "s"}]
    journal = tmp_path / "journal"
    journal.write_text("broker: no\n" + "".join(f"{json.dumps(line)}\n" for line in lines))
    (block,) = [block for block in of("sh") if "journalctl" in block.text]
    said = [
        subprocess.run(
            ["bash", "-c", f"journalctl() {{ cat {journal}; }}; {line} -c"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=True,
        ).stdout
        for line in block.text.splitlines()
    ]
    assert [[json.loads(line) for line in text.splitlines()] for text in said] == [lines, lines[1:]]


@pytest.mark.parts
def test_the_curl_lines_of_a_session_s_life_work_in_a_shell(running: Dev) -> None:
    """A token is good and the caller's, and after the third line it is not good any more."""
    _, answer = post(running, b'{"agent_id": "A1", "fingerprint": "00ff00ff"}')
    block = under("The life of a session", "sh")
    lines = [line for line in block.text.splitlines() if "127.0.0.1:8080" in line]
    verify, introspect, revoke = (
        line.replace("http://127.0.0.1:8080", running.url)
        .replace("CLIENT_SECRET", running.secret)
        .replace("TOKEN", answer["data"]["token"])
        for line in lines
    )

    def said(line: str) -> str:
        return subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=TIMEOUT, check=True
        ).stdout

    assert said(verify).startswith("HTTP/1.1 200 ")
    assert json.loads(said(introspect))["sid"] == answer["data"]["sid"]
    assert said(revoke).startswith("HTTP/1.1 200 ")
    assert json.loads(said(introspect)) == {"active": False}
    assert said(verify).startswith("HTTP/1.1 401 ")


def test_the_relay_s_commands_relay(tmp_path: Path) -> None:
    """A fake vendor and a broker in front of it, started as the page says."""
    key = secrets.token_urlsafe(24)
    fake = next(words for words in commands() if "fake-vendor" in words)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BROKER_")}
    environment |= {"BITHUMAN_API_SECRET": key, "STATE_DIRECTORY": str(tmp_path)}

    async def scenario() -> None:
        arguments = [*fake[1:], "--listen", "127.0.0.1:0"]  # the last one counts
        vendor = await start(*arguments, environment=environment)
        try:
            line = await asyncio.wait_for(vendor.stdout.readline(), TIMEOUT)
            url = json.loads(line)["url"]
            environment["BROKER_ISSUER__UPSTREAM__BASE_URL"] = url
            socket = tmp_path / "s"
            broker = await start(
                "serve",
                "--listen",
                f"unix:{socket}",
                "--admin-listen",
                "127.0.0.1:0",
                environment=environment,
            )
            try:
                line = await asyncio.wait_for(broker.stderr.readline(), TIMEOUT)
                opened = json.loads(line)
                assert opened["event"] == "broker.state_file_opened"
                assert opened["path"] == str(tmp_path / "state.db")
                line = await asyncio.wait_for(broker.stderr.readline(), TIMEOUT)
                assert json.loads(line)["event"] == "broker.started"
                status, answer = await over_socket(socket, key)
                assert status == b"200"
                assert answer["data"]["supported_models"] == ["fake-model"]
            finally:
                broker.kill()
                await broker.communicate()
        finally:
            vendor.kill()
            await vendor.communicate()

    asyncio.run(scenario())


def below(folder: Path, text: str) -> str:
    """Return a line of the page as it is typed below a folder, and not on this machine."""
    text = text.replace("/opt/embed-token-broker/bin/broker", f"{sys.executable} -m broker")
    copies = "/run/credentials/embed-token-broker.service/secret_"
    text = text.replace(copies, f"{folder}/etc/embed-token-broker/secrets/")
    return re.sub(r"(?<![\w.])/(etc|var)/", rf"{folder}/\1/", text.replace("sudo ", ""))


def typed(folder: Path) -> Path:
    """Type the production steps; returns the configuration.

    Only what installs packages and starts services is left out.
    """
    (folder / "vendor.key").write_text(secrets.token_urlsafe(24), encoding="utf-8")
    (folder / "config").symlink_to(ROOT / "config")
    for name in ("etc/systemd/system", "var/lib"):
        (folder / name).mkdir(parents=True)
    for block in of("sh"):
        if block.heading == "Production in ten steps":
            for line in block.text.splitlines():
                if Path(next(words_of(line))[0]).name in {"cp", "install"} or "generate" in line:
                    subprocess.run(["bash", "-ec", below(folder, line)], cwd=folder, check=True)
    file = folder / "etc" / "embed-token-broker" / "broker.toml"
    lines = under("Production in ten steps", "toml").text
    file.write_text(below(folder, lines), encoding="utf-8")
    return file


def test_G11_the_production_steps_survive_a_kill(tmp_path: Path) -> None:
    """What they made serves; after `kill -9` the next start is a hit, as step 10 says."""
    file = typed(tmp_path)
    key = (tmp_path / "vendor.key").read_text(encoding="utf-8")
    web = (tmp_path / "etc/embed-token-broker/secrets/web").read_text(encoding="utf-8").strip()

    async def scenario() -> None:
        async with FakeVendor(secrets=[key]) as vendor:
            environment = {
                **{k: v for k, v in os.environ.items() if not k.startswith("BROKER_")},
                "BROKER_ISSUER__UPSTREAM__BASE_URL": vendor.url,
                "BROKER_SERVER__LISTEN": f"unix:{tmp_path}/s",
                "BROKER_ADMIN__LISTEN": "127.0.0.1:0",
            }
            tokens = []
            for _ in range(2):
                broker = await start("serve", "--config", str(file), environment=environment)
                try:
                    for event in ("broker.state_file_opened", "broker.started"):
                        line = await asyncio.wait_for(broker.stderr.readline(), TIMEOUT)
                        assert json.loads(line)["event"] == event
                    status, answer = await over_socket(tmp_path / "s", web)
                    assert status == b"200"
                    tokens.append(answer["data"]["token"])
                finally:
                    broker.kill()
                    await broker.communicate()
            assert tokens[0] == tokens[1]
            assert sum(call.is_mint for call in vendor.journal.calls) == 1

    asyncio.run(scenario())
    state = tmp_path / "var/lib/embed-token-broker"
    assert state.stat().st_mode & 0o777 == 0o700
    assert (state / "state.db").stat().st_mode & 0o777 == 0o600


def test_the_production_steps_make_a_configuration_that_passes(tmp_path: Path) -> None:
    """With the secrets that the unit hands over, each under the name that the file has for it."""
    file = typed(tmp_path)
    unit = tmp_path / "etc" / "systemd" / "system" / "embed-token-broker.service"
    lines = unit.read_text(encoding="utf-8").splitlines()
    assert "LoadCredential=secret:/etc/embed-token-broker/secrets" in lines
    assert "Environment=BROKER_CONFIG=/etc/embed-token-broker/broker.toml" in lines
    assert "StateDirectory=embed-token-broker" in lines
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("BROKER_", "BITHUMAN_"))}
    listeners = ("BROKER_SERVER__LISTEN", "BROKER_ADMIN__LISTEN")
    at_free_ports = dict.fromkeys(listeners, "127.0.0.1:0")  # whoever has the usual ones
    done = subprocess.run(
        [sys.executable, "-m", "broker", "check", "--config", str(file)],
        env={**kept, **at_free_ports},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "configuration ok\n"), done.stderr
    assert done.stderr == ""


async def start(*arguments: str, environment: dict[str, str]) -> Any:
    """Start a command of the broker."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "broker",
        *arguments,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def over_socket(path: Path, secret: str) -> tuple[bytes, dict[str, Any]]:
    """Ask for a token over a Unix socket; returns status and answer."""
    body = b'{"agent_id": "A78WKV4515", "fingerprint": "9f86d081884c7d65"}'
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        writer.write(
            b"POST /v1/embed-tokens/request HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"api-secret: %b\r\nContent-Length: %d\r\n\r\n%b" % (secret.encode(), len(body), body)
        )
        head, _, text = (await asyncio.wait_for(reader.read(), TIMEOUT)).partition(b"\r\n\r\n")
        return head.split()[1], json.loads(text)
    finally:
        writer.close()
        await writer.wait_closed()
