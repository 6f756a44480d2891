"""`broker init`: from nothing to a first token, on a terminal and by a script."""

import asyncio
import io
import os
import re
import secrets
import shlex
import signal
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import PAGES
from processes import AGENT, TIMEOUT, Broker, environment, run
from terminal import CONTROL_C, CONTROL_D, Terminal

from broker.cli import first_files
from broker.cli.example import UNIT, text_of
from broker.config.environment import read
from broker.testing import FakeVendor

ROOT = Path(__file__).parents[2]
SIGNER = ("--kind", "signer", "--agent", AGENT)


def mode(path: Path) -> int:
    """Return who may do what with a file."""
    return stat.S_IMODE(path.stat().st_mode)


def files(folder: Path) -> set[str]:
    """Return what is below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def next_commands(told: str) -> list[str]:
    """Return the commands that are printed for what is next."""
    return re.findall(r"^  (\S.*)$", told.partition("next:\n")[2], re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where it writes; not there yet."""
    return tmp_path / "made"


class TestFirstToken:
    @pytest.mark.parametrize("how", ["file", "stdin"])
    async def test_of_a_relay_comes_with_the_commands_that_are_printed(
        self, folder: Path, tmp_path: Path, how: str
    ) -> None:
        """Check, serve, mint, as they stand; only the fake vendor and free ports are added."""
        key = secrets.token_urlsafe(24)
        (tmp_path / "vendor.key").write_text(f"{key}\n", encoding="utf-8")
        given = "-" if how == "stdin" else str(tmp_path / "vendor.key")
        socket, admin = f"unix:{tmp_path}/s", f"unix:{tmp_path}/a"
        async with FakeVendor(secrets=[key]) as vendor:
            done = await asyncio.to_thread(
                run,
                "init",
                *("--kind", "relay", "--agent", AGENT, "--vendor-key-file", given),
                *("--folder", str(folder), "--base-url", vendor.url),
                *("--listen", socket, "--admin-listen", admin),
                stdin=key.encode() if how == "stdin" else b"",
            )
            assert (done.returncode, b"cannot" in done.stderr) == (0, False)
            assert key.encode() not in done.stdout + done.stderr
            check, serve, mint, *_ = next_commands(done.stdout.decode())
            checked = await asyncio.to_thread(self.said, check)
            assert (checked.returncode, checked.stdout) == (0, "configuration ok\n")
            assert checked.stderr == ""
            token = await asyncio.to_thread(self.first_token, serve, mint, tmp_path)
        assert token.count(".") == 2
        assert [call.is_mint for call in vendor.journal.calls] == [True]

    def said(self, command: str) -> subprocess.CompletedProcess[str]:
        """Type a command into a shell."""
        return subprocess.run(
            ["sh", "-c", command],
            capture_output=True,
            env=environment(),
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    def first_token(self, serve: str, mint: str, folder: Path) -> str:
        """Start what is printed, ask as is printed."""
        words = shlex.split(serve)
        assert words[:4] == [sys.executable, "-m", "broker", "serve"]
        with Broker(*words[4:], logs=folder) as broker:
            done = self.said(mint)
            assert (done.returncode, done.stderr) == (0, "")
            assert broker.end() == 0
        return done.stdout.strip()

    def test_of_a_signer_needs_no_vendor(self, folder: Path, tmp_path: Path) -> None:
        """Its token is verified by the same configuration."""
        socket = f"unix:{tmp_path}/s"
        listens = ("--listen", socket, "--admin-listen", f"unix:{tmp_path}/a")
        done = run("init", *SIGNER, "--folder", str(folder), *listens)
        assert done.returncode == 0
        check, serve, mint, *_ = next_commands(done.stdout.decode())
        assert self.said(check).stdout == "configuration ok\n"
        token = self.first_token(serve, mint, tmp_path)
        path = str(folder / "broker.toml")
        assert run("verify", "--config", path, stdin=token.encode()).returncode == 0


class TestFiles:
    def test_have_the_modes_that_secrets_need(self, folder: Path) -> None:
        """Whatever the umask is: secrets for their owner, the configuration for the service."""
        for umask in ("0", "077"):
            place = folder / umask
            command = f"umask {umask}; {sys.executable} -m broker init {' '.join(SIGNER)}"
            subprocess.run(
                f"{command} --folder {place}",
                shell=True,
                capture_output=True,
                env=environment(),
                check=True,
            )
            assert mode(place) == 0o755
            assert mode(place / "secrets") == mode(place / "state") == 0o700
            assert {mode(path) for path in (place / "secrets").iterdir()} == {0o600}
            assert {mode(place / name) for name in ("broker.toml", UNIT)} == {0o644}
            made = {(place / "secrets" / name).read_bytes() for name in ("web", "admin")}
            assert len(made) == 2

    def test_that_are_there_are_not_written_over(self, folder: Path) -> None:
        """--force replaces configuration and unit, and keeps every secret."""
        run("init", *SIGNER, "--folder", str(folder))
        kept = {path: path.read_bytes() for path in (folder / "secrets").iterdir()}
        (folder / "broker.toml").write_text("mine", encoding="utf-8")
        done = run("init", *SIGNER, "--folder", str(folder))
        assert (done.returncode, done.stdout) == (1, b"")
        told = f"broker init: {folder}/broker.toml is there already; --force writes configuration"
        assert done.stderr.decode().startswith(told)
        assert (folder / "broker.toml").read_text(encoding="utf-8") == "mine"
        done = run("init", *SIGNER, "--folder", str(folder), "--force")
        assert done.returncode == 0
        assert done.stdout.count(b"kept ") == 3
        assert "[clients.web]" in (folder / "broker.toml").read_text(encoding="utf-8")
        assert {path: path.read_bytes() for path in (folder / "secrets").iterdir()} == kept

    def test_of_others_are_not_followed(self, folder: Path, tmp_path: Path) -> None:
        """A link in the place of a secret is not written through, nor a link to nowhere."""
        (folder / "secrets").mkdir(parents=True)
        (folder / "secrets" / "web").symlink_to(tmp_path / "elsewhere")
        done = run("init", *SIGNER, "--folder", str(folder), "--force")
        assert (done.returncode, (tmp_path / "elsewhere").exists()) == (1, False)
        assert done.stderr.startswith(b"broker init: cannot write ")
        assert done.stderr.count(b"\n") == 1

    def test_a_link_where_a_new_file_is_made_is_not_written_through(
        self, folder: Path, tmp_path: Path
    ) -> None:
        """Root may be told a folder that others can write to: no file of root's is lost to them."""
        precious = tmp_path / "precious"
        precious.write_text("mine", encoding="utf-8")
        precious.chmod(0o600)
        folder.mkdir()
        for name in ("broker.toml", UNIT):
            (folder / f".{name}.new").symlink_to(precious)
        assert run("init", *SIGNER, "--folder", str(folder)).returncode == 0
        assert (precious.read_text(encoding="utf-8"), mode(precious)) == ("mine", 0o600)
        assert mode(folder / "broker.toml") == 0o644

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is full")
    def test_a_secret_that_could_not_be_written_whole_is_not_left(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It would be kept the next time, as if it were somebody's."""
        answers = first_files.Answers("signer", folder, "*", "127.0.0.1:0", "127.0.0.1:0")

        def full(handle: int, *_: object, **__: object) -> io.TextIOWrapper:
            os.close(handle)
            return io.TextIOWrapper(io.BufferedWriter(io.FileIO("/dev/full", "w")))

        with monkeypatch.context() as patched:
            patched.setattr("os.fdopen", full)
            with pytest.raises(OSError, match="No space"):
                list(first_files.write(answers))
        assert files(folder) == set()
        assert all(line.startswith("wrote") for line in first_files.write(answers))

    @pytest.mark.parametrize("kind", ["relay", "signer"])
    def test_the_unit_is_the_shipped_one_with_variables_and_paths_of_its_own(
        self, folder: Path, kind: str
    ) -> None:
        """Line by line: nothing is missing, and each variable names a copy of a file that is."""
        answers = first_files.Answers(kind, folder, "*", "127.0.0.1:0", "127.0.0.1:0")
        list(first_files.write(answers))
        made = (folder / UNIT).read_text(encoding="utf-8")
        shipped = (ROOT / "config" / "systemd" / UNIT).read_text(encoding="utf-8")
        program = shlex.join(first_files.program())
        expected = (
            shipped[shipped.index("[Unit]") :]
            .replace("/opt/embed-token-broker/bin/broker", program)
            .replace("/etc/embed-token-broker", str(folder))
            .splitlines()
        )
        lines = made.splitlines()[1:]
        more = [line for line in lines if line not in expected]
        assert [line for line in lines if line not in more] == expected
        state = "Environment=BROKER_STORE__URL=sqlite:///var/lib/embed-token-broker/state.db"
        assert more.pop() == state
        copies = [line.partition("=%d/secret_")[2] for line in more]
        assert [folder / "secrets" / name for name in copies] == list(answers.secret_files())
        assert f"LoadCredential=secret:{folder}/secrets" in lines

    def test_the_page_on_rotation_adds_to_the_unit_what_it_reads(self) -> None:
        """A second secret by a line of the form that `init` writes, and of a setting that is."""
        page = PAGES["config/ROTATION.md"]
        (name,) = re.findall(r"`Environment=(\w+)=%d/secret_web_next`", page)
        usual = first_files.Answers("signer", Path("/etc/embed-token-broker"), "*", "a:1", "a:2")
        lines = first_files.service(usual, text_of(UNIT)).splitlines()
        added = f"Environment={name}=%d/secret_web_next"
        assert added.replace("web_next", "web").replace("NEXT_", "") in lines
        (given,), problems = read({"clients": {"web": {}}}, {name: "/run/web_next"})
        assert (given.key, problems) == ("clients.web.next_secret_file", [])

    def test_in_their_usual_place_need_no_flag(self) -> None:
        """Commands find /etc/embed-token-broker; state is where the unit keeps it."""
        usual = first_files.Answers(
            "signer", Path("/etc/embed-token-broker"), "*", "[::]:8080", "127.0.0.1:9464"
        )
        told = first_files.next_steps(usual)
        assert "--config" not in told
        assert "--url http://127.0.0.1:8080 " in told
        assert "mint A78WKV4515" in told
        store = tomllib.loads(first_files.configuration(usual))["store"]
        assert store == {"url": "sqlite:///var/lib/embed-token-broker/state.db"}
        assert "BROKER_STORE__URL" not in first_files.service(usual, text_of(UNIT))


class TestAnswers:
    @pytest.mark.parametrize(
        ("arguments", "stdin", "told"),
        [
            ([], b"", "broker init: --kind is missing; on a terminal it would be asked for"),
            (["--kind", "relay"], b"", "broker init: --agent is missing; on a terminal it"),
            (["--kind", "signer", "--agent", "a b"], b"", "broker init: 'a b' is no agent: 1 to"),
            ([*SIGNER, "--vendor-key-file", "x"], b"", "broker init: --vendor-key-file and --b"),
            ([*SIGNER, "--folder", "a b"], b"", "broker init: --folder: "),
            ([*SIGNER, "--listen", "8080"], b"", "broker: server.listen: "),
            ([*SIGNER, "--listen", 'x"\n[a]'], b"", "broker: server.listen: "),
            ([*SIGNER, "--listen", "127.0.0.1:80\x7f"], b"", "broker: server.listen: "),
            (["--kind", "relay", "--agent", "*"], b"", "broker init: --vendor-key-file is missing"),
            (
                ["--kind", "relay", "--agent", "*", "--vendor-key-file", "-"],
                b"two words",
                "broker init: the vendor's key must be one word",
            ),
            (
                ["--kind", "relay", "--agent", "*", "--vendor-key-file", "-"],
                b"\n",
                "broker init: the vendor's key must be one word",
            ),
            (
                ["--kind", "relay", "--agent", "*", "--vendor-key-file", "/nowhere"],
                b"",
                "broker: --vendor-key-file: cannot read /nowhere: No such file",
            ),
            (
                ["--kind", "relay", "--agent", "*", "--base-url", "http://vendor.example"],
                b"",
                "broker: issuer.upstream.base_url: ",
            ),
        ],
    )
    def test_that_cannot_be_leave_nothing_behind(
        self, folder: Path, arguments: list[str], stdin: bytes, told: str
    ) -> None:
        """One line, 64 or 78, and no file."""
        done = run("init", "--folder", str(folder), *arguments, stdin=stdin)
        assert done.returncode in (64, 78)
        assert done.stdout == b""
        assert done.stderr.decode().startswith(told), done.stderr
        assert done.stderr.count(b"\n") == 1
        assert not folder.exists()

    def test_no_flag_takes_a_secret(self) -> None:
        """What is an argument can be read by everybody on the machine."""
        told = run("init", "--help").stdout.decode()
        assert re.findall(r"--\S*(?:key|secret)\S* ?\S*", told.partition("example")[0]) == [
            "--vendor-key-file FILE]",
            "--vendor-key-file FILE",
        ]

    def test_a_folder_of_somebody_else_is_named_with_the_remedy(self, tmp_path: Path) -> None:
        """A path that cannot be made: exit 1 and one line."""
        (tmp_path / "file").touch()
        done = run("init", *SIGNER, "--folder", str(tmp_path / "file" / "x"))
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode().startswith("broker init: cannot write ")
        assert b"--folder writes elsewhere" in done.stderr


@pytest.fixture
def terminal(folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    """A person who has typed `broker init`."""
    with Terminal.broker("init", "--folder", str(folder), folder=tmp_path) as started:
        yield started


class TestOnATerminal:
    def test_it_asks_for_what_no_flag_says(self, terminal: Terminal, folder: Path) -> None:
        """Kind, agent, the vendor's key unseen; then it writes."""
        key = secrets.token_urlsafe(24)
        terminal.wait_for("relay or signer? [relay] ")
        terminal.type("\n")
        terminal.wait_for("agent your backend may ask for (* for all)? ")
        terminal.type(f"{AGENT}\n")
        terminal.wait_for("the vendor's key (it is not shown): ")
        assert terminal.asks_unseen()
        terminal.type(f"{key}\n")
        assert terminal.wait() == 0
        assert key not in terminal.shown
        assert (folder / "secrets" / "vendor").read_text(encoding="utf-8") == f"{key}\n"
        settings = tomllib.loads((folder / "broker.toml").read_text(encoding="utf-8"))
        assert settings["clients"]["web"]["agents"] == [AGENT]
        assert run("check", "--config", str(folder / "broker.toml")).returncode == 0

    def test_it_asks_again_after_an_answer_that_cannot_be(
        self, terminal: Terminal, folder: Path
    ) -> None:
        """And says why; what was right is kept."""
        key = secrets.token_urlsafe(24)
        kind, agent = "relay or signer? [relay] ", "agent your backend may ask for (* for all)? "
        unseen = "the vendor's key (it is not shown): "
        for question, answer, told in (
            (kind, "relai", f"'relai' is no kind: say relay or signer\n{kind}"),
            (kind, "relay", agent),
            (agent, "", f"'' is no agent: 1 to 64 letters, digits, _ and -; or * for all\n{agent}"),
            (agent, "*", unseen),
            (
                unseen,
                "two words",
                f"the vendor's key must be one word of printable ASCII\n{unseen}",
            ),
        ):
            terminal.wait_for(question)
            terminal.type(f"{answer}\n")
            terminal.wait_for(told)
        terminal.type(f"{key}\n")
        assert terminal.wait() == 0
        assert (folder / "secrets" / "vendor").read_text(encoding="utf-8") == f"{key}\n"

    @pytest.mark.parametrize("answered", [0, 1, 2])
    @pytest.mark.parametrize("key", [CONTROL_C, CONTROL_D])
    def test_whoever_gives_up_leaves_nothing_behind(
        self, terminal: Terminal, folder: Path, answered: int, key: bytes
    ) -> None:
        """No file, no traceback, and a terminal that shows what is typed."""
        questions = ["[relay] ", "(* for all)? ", "(it is not shown): "]
        for question, answer in zip(questions, ["relay\n", "*\n"][:answered], strict=False):
            terminal.wait_for(question)
            terminal.type(answer)
        terminal.wait_for(questions[answered])
        terminal.type(key)
        code = terminal.wait()
        assert code == (-signal.SIGINT if key == CONTROL_C else 64)
        assert "Traceback" not in terminal.shown
        assert not folder.exists()
        told = "interrupted; nothing was written" if key == CONTROL_C else "broker init: no "
        assert told in terminal.shown


def test_the_program_is_named_as_it_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder, whichever way it was called."""
    monkeypatch.setattr(sys, "argv", [str(Path(first_files.__file__).parents[1] / "__main__.py")])
    assert first_files.program() == [sys.executable, "-m", "broker"]
    monkeypatch.setattr(sys, "argv", [".venv/bin/broker"])
    assert first_files.program() == [f"{Path.cwd()}/.venv/bin/broker"]


def test_what_a_service_does_not_see_is_said() -> None:
    """ProtectHome hides these folders from it."""
    at_home = first_files.Answers("signer", Path("/home/x/b"), "*", "127.0.0.1:1", "127.0.0.1:2")
    notes = first_files.hidden(at_home)
    assert any("does not see /home, where its configuration is" in note for note in notes)


@pytest.mark.parametrize("name", ["relay", "signer", "gateway"])
def test_each_example_passes_the_check(name: str, tmp_path: Path) -> None:
    """As it is printed: its secrets are elsewhere, and that is all that is noted."""
    done = run("config", "example", name)
    assert (done.returncode, done.stderr) == (0, b"")
    (tmp_path / "broker.toml").write_bytes(done.stdout)
    tree = tomllib.loads(done.stdout.decode())
    given = {}
    if "secret_file" not in next(iter(tree["clients"].values())):
        given["BROKER_CLIENTS__WEB__SECRET_FILE"] = "/nowhere/web"  # by the unit
        is_relay = tree.get("issuer", {}).get("kind") == "upstream"
        own = "UPSTREAM__API_SECRET_FILES" if is_relay else "LOCAL__KEYS__MAIN__SECRET_FILE"
        given[f"BROKER_ISSUER__{own}"] = "/nowhere/key"
    checked = run("check", "--config", str(tmp_path / "broker.toml"), **given)
    assert (checked.returncode, checked.stdout) == (0, b"configuration ok\n")
    elsewhere = re.compile(r"note: .*(is not here; |there is no folder /var/lib/)")
    notes = checked.stderr.decode().splitlines()
    assert [note for note in notes if not elsewhere.match(note)] == []


def test_the_unit_of_an_example_is_the_shipped_one() -> None:
    """For relay and signer the same; a gateway has none of its own."""
    shipped = (ROOT / "config" / "systemd" / UNIT).read_bytes()
    assert run("config", "example", "relay", "--unit").stdout == shipped
    assert run("config", "example", "signer", "--unit").stdout == shipped
    done = run("config", "example", "gateway", "--unit")
    assert (done.returncode, done.stdout) == (64, b"")


@pytest.mark.parts
@pytest.mark.parametrize("kind", ["relay", "signer"])
def test_the_unit_is_one_that_systemd_reads(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word: no unknown key, a program that is there."""
    monkeypatch.setattr(sys, "argv", [str(Path(sys.executable).with_name("broker"))])
    answers = first_files.Answers(kind, folder, "*", "127.0.0.1:0", "127.0.0.1:0")
    list(first_files.write(answers))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(folder / UNIT)], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
