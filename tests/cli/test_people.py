"""The command line for people: help, typos, Ctrl-C, what is said on a terminal."""

import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from documents import table
from processes import TIMEOUT, Broker, environment, good, merged, run, toml, write
from terminal import CONTROL_C, CONTROL_D, Terminal

from broker.cli.base import Parser
from broker.cli.main import _parser
from broker.process.serve import TYPED_TWICE
from broker.version import VERSION

TOP = _parser()


def places(parser: Parser) -> Iterator[Parser]:
    """Yield every command, and every word that has commands below it."""
    yield parser
    for below in parser.commands.values():
        yield from places(below)


PLACES = list(places(TOP))
LEAVES = [place for place in PLACES if not place.commands]


class TestHelp:
    @pytest.mark.parametrize("place", PLACES, ids=lambda place: place.prog)
    def test_has_a_sentence_an_example_and_exit_codes(self, place: Parser) -> None:
        """The example is understood as it stands; the codes are documented ones, with a meaning."""
        told = place.format_help()
        assert re.search(r"\n\n[A-Z][^\n]+(\n[^\n]+)*\.\n\n", told), told
        example = told.partition("\nexample:\n  ")[2].partition("\n")[0]
        words = shlex.split(re.split(" [<>] ", example)[0])
        assert words[: len(place.prog.split())] == place.prog.split()
        if not place.commands:
            assert _parser().parse_args(words[1:]).parser.prog == place.prog
        codes = re.findall(r"^ +(\d+)  \S", told.partition("exit codes:\n")[2], re.MULTILINE)
        assert {"0", "64"} <= set(codes) <= {row[0] for row in table("exit code", "Exit codes")}
        assert codes == sorted(codes, key=int)
        for action in place.options:
            assert action.help, action.option_strings

    @pytest.mark.parametrize("words", [[], ["serve"], ["keys"], ["keys", "rotate"]], ids=" ".join)
    def test_of_a_word_is_what_its_flag_says(self, words: list[str]) -> None:
        """`broker help keys rotate` and `broker keys rotate --help`: exit 0."""
        by_word, by_flag = run("help", *words), run(*words, "--help")
        assert (by_word.returncode, by_word.stderr) == (0, b"")
        assert by_word.stdout == by_flag.stdout != b""

    def test_is_what_a_command_without_a_command_says(self) -> None:
        """On standard error, exit 64: a script with an empty variable has done nothing."""
        for words in ([], ["keys"], ["config"], ["store"]):
            done = run(*words)
            assert (done.returncode, done.stdout) == (64, b"")
            assert done.stderr == run(*words, "--help").stdout

    def test_version_is_said_by_word_and_flag(self) -> None:
        """One line."""
        by_word, by_flag = run("version"), run("--version")
        assert by_word.stdout == by_flag.stdout == f"embed-token-broker {VERSION}\n".encode()
        assert by_word.returncode == by_flag.returncode == 0


class TestTypos:
    @pytest.mark.parametrize(
        ("typed", "told"),
        [
            ("serv", "broker: no command 'serv': did you mean serve?; see `broker --help`"),
            ("help srve", "broker help: no command 'srve': did you mean serve?; see `broker help"),
            ("help serve x", "broker help: 'broker serve' has no commands below it; see"),
            ("keys rotat", "broker keys: no command 'rotat': did you mean rotate?; see `broker k"),
            ("xyz", "broker: no command 'xyz': there is serve, init, check, "),
            ("serve --lisen=x", "broker serve: does not take '--lisen': did you mean --listen?; "),
            ("check now", "broker check: does not take 'now'; see `broker check --help`"),
            ("completion bsh", "broker completion: no SHELL 'bsh': did you mean bash?; see"),
            ("config example gatewy", "broker config example: no NAME 'gatewy': did you mean ga"),
            ("keys rotate --after 10", "broker keys rotate: argument --after: a duration needs a"),
            ("fake-vendor --fault slo", "broker fake-vendor: argument --fault: no fault is called"),
            ("fake-vendor --listen 8091", "broker fake-vendor: argument --listen: expected"),
            ("fake-vendor --listen unix:/s", "broker fake-vendor: argument --listen: the fake v"),
            ("store acl --user a\tb", "broker store acl: argument --user: a name without blanks"),
            ("fake-vendor --latency 0.3", "broker fake-vendor: argument --latency: a duration ne"),
            ("mint \x1b[31m", "broker mint: the following arguments are required: --fingerprint"),
            ("\x1b[31m", "broker: no command '\\x1b[31m': there is serve, "),
        ],
    )
    def test_are_answered_by_what_was_meant(self, typed: str, told: str) -> None:
        """One line, exit 64."""
        done = run(*typed.split(" "))
        assert (done.returncode, done.stdout) == (64, b"")
        assert done.stderr.decode().startswith(told)
        assert done.stderr.count(b"\n") == 1


RED = "\x1b[31m"


@pytest.mark.parametrize(
    ("typed", "code"),
    [
        (["mint", "A1", "--fingerprint", "9f86d081", "--url", f"http://127.0.0.1:1/{RED}"], 69),
        (["mint", "A1", "--fingerprint", "9f86d081", "--url", f"unix:/nowhere/{RED}"], 69),
        (["keys", "generate", "--out", f"/nowhere/{RED}\nx"], 1),
        (["healthcheck", "--admin-listen", f"unix:/nowhere/{RED}"], 1),
        (["check", "--config", f"/nowhere/{RED}"], 78),
    ],
    ids=lambda typed: " ".join(typed[:2]) if isinstance(typed, list) else "",
)
def test_no_message_moves_the_cursor(typed: list[str], code: int) -> None:
    """Whatever a name holds: it is escaped, in one line."""
    done = run(*typed, BROKER_API_SECRET=secrets.token_urlsafe(24))
    assert (done.returncode, done.stderr.count(b"\n")) == (code, 1)
    assert b"\x1b" not in done.stderr
    assert rb"\x1b[31m" in done.stderr


class Silent(NamedTuple):
    """A server that takes connections and says nothing; `asked` once there was one."""

    address: str
    asked: threading.Event


@pytest.fixture
def silent() -> Iterator[Silent]:
    """One that runs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept, asked = [], threading.Event()

        def take() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return
                asked.set()

        thread = threading.Thread(target=take)
        thread.start()
        yield Silent(f"127.0.0.1:{server.getsockname()[1]}", asked)
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in kept:
            connection.close()


WAITING = {
    "serve": ([], "broker.started", 0),
    "fake-vendor": (["--listen", "127.0.0.1:0"], "api_secret", 0),
    "verify": ([], "Ctrl-D", -signal.SIGINT),
    "init": ([], "relay or signer?", -signal.SIGINT),
}
"""Commands that wait for somebody, with what they show then, and how they end."""


class TestControlC:
    @pytest.mark.parametrize("command", WAITING)
    def test_ends_what_waits_without_a_traceback(self, tmp_path: Path, command: str) -> None:
        """By the signal, or with 0 for what is stopped in this way."""
        path = write(tmp_path / "broker.toml", toml(good(tmp_path)))
        words, shown, code = WAITING[command]
        with Terminal.broker(command, *words, folder=tmp_path, BROKER_CONFIG=path) as terminal:
            terminal.wait_for(shown)
            terminal.type(CONTROL_C)
            assert terminal.wait() == code
        assert "Traceback" not in terminal.shown

    @pytest.mark.parametrize("command", ["mint", "healthcheck", "doctor"])
    def test_ends_what_waits_for_an_answer(
        self, tmp_path: Path, silent: Silent, command: str
    ) -> None:
        """Somebody who has waited long enough sees his prompt again, and nothing else."""
        url = f"http://{silent.address}"
        tree = merged(
            good(tmp_path),
            {
                "admin.listen": silent.address,
                "issuer.kind": "upstream",
                "issuer.upstream": {"base_url": url, "api_secret": secrets.token_urlsafe(24)},
            },
        )
        path = write(tmp_path / "broker.toml", toml(tree))
        words = {"mint": ["A1", "--fingerprint", "9f86d081", "--url", url]}
        with Terminal.broker(
            command,
            *words.get(command, ["--config", path]),
            folder=tmp_path,
            BROKER_API_SECRET=secrets.token_urlsafe(24),
        ) as terminal:
            assert silent.asked.wait(TIMEOUT)
            terminal.type(CONTROL_C)
            assert terminal.wait() == -signal.SIGINT
        assert terminal.shown == "^C"

    @pytest.mark.parametrize("place", LEAVES, ids=lambda place: place.prog)
    def test_during_the_imports_of_any_command_is_an_end(
        self, tmp_path: Path, place: Parser
    ) -> None:
        """Whatever it loads first: no traceback, but the signal."""
        words = place.prog.split()[1:]
        code = (
            "import os, signal, sys\n"
            "class Meet:\n"
            "    seen = 0\n"
            "    def find_spec(self, name, *_):\n"
            "        Meet.seen += name.startswith('broker.')\n"
            "        if Meet.seen == 12: os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Meet())\n"
            f"sys.argv[1:] = {words!r}\n"
            "from broker.__main__ import main\n"
            "main()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            cwd=tmp_path,
            env=environment(),
            timeout=TIMEOUT,
            check=False,
        )
        assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


class TestServeOnATerminal:
    def test_logs_for_people_and_elsewhere_as_json(self, tmp_path: Path) -> None:
        """`[log] format` decides otherwise."""
        path = write(tmp_path / "broker.toml", toml(good(tmp_path)))
        for form, told in (("", "broker.started"), ("json", '"event": "broker.started"')):
            variables = {"BROKER_LOG__FORMAT": form} if form else {}
            words = ("serve", "--config", path)
            with Terminal.broker(*words, folder=tmp_path, **variables) as terminal:
                terminal.wait_for(told)
                assert ("{" in terminal.shown) == bool(form)
                terminal.type(CONTROL_C)
                assert terminal.wait() == 0

    def test_says_how_to_stop_at_once_and_does(self, tmp_path: Path) -> None:
        """The first Ctrl-C drains, a second one soon after it ends: 130 for a shell."""
        tree = merged(good(tmp_path), {"server.drain_lead": "10m", "server.drain": "10m"})
        path = write(tmp_path / "broker.toml", toml(tree))
        with Terminal.broker("serve", "--config", path, folder=tmp_path) as terminal:
            terminal.wait_for("broker.started")
            terminal.type(CONTROL_C)
            terminal.wait_for("stopping, within 10m; Ctrl-C again stops at once\n")
            terminal.wait_for("broker.draining")
            time.sleep(TYPED_TWICE)  # what comes earlier is the same wish
            terminal.type(CONTROL_C)
            assert terminal.wait() == 128 + signal.SIGINT
        assert "broker.aborted" in terminal.shown
        assert "Traceback" not in terminal.shown

    def test_takes_two_signals_at_once_for_one(self, tmp_path: Path) -> None:
        """A wrapper passes Ctrl-C on to a process that the terminal has told already."""
        path = write(tmp_path / "broker.toml", toml(good(tmp_path)))
        with Terminal.broker("serve", "--config", path, folder=tmp_path) as terminal:
            terminal.wait_for("broker.started")
            os.kill(terminal.pid, signal.SIGINT)
            os.kill(terminal.pid, signal.SIGINT)
            assert terminal.wait() == 0
        assert terminal.shown.count("Ctrl-C again") == 1
        assert "broker.aborted" not in terminal.shown


def test_healthcheck_answers_somebody_who_looks(tmp_path: Path) -> None:
    """A terminal is told that it is ready; an engine, which looks at the exit code, is not."""
    with Broker.configured(tmp_path, good(tmp_path)) as broker:
        words = ("healthcheck", "--admin-listen", broker.admin_url.removeprefix("http://"))
        with Terminal.broker(*words, folder=tmp_path) as terminal:
            assert terminal.wait() == 0
        assert terminal.shown == "ready\n"
        assert run(*words).stdout == b""


def test_verify_says_what_it_waits_for(tmp_path: Path) -> None:
    """A token is pasted, Ctrl-D ends it."""
    path = write(tmp_path / "broker.toml", toml(good(tmp_path)))
    minted = run("mint", "A1", "--fingerprint", "9f86d081", "--config", path).stdout
    with Terminal.broker("verify", "--config", path, folder=tmp_path) as terminal:
        terminal.wait_for("paste the token, then Enter and Ctrl-D\n")
        terminal.type(minted)
        terminal.type(CONTROL_D)
        assert terminal.wait() == 0
    assert '"sub": "A1"' in terminal.shown
