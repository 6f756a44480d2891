"""The command line as a shell sees it: output, errors, exit codes."""

import html
import json
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jwt
import pytest
from processes import (
    AGENT,
    Broker,
    Tree,
    environment,
    good,
    merged,
    put,
    run,
    secret_file,
    secret_in,
    toml,
    write,
)

from broker.valkey.client.scripts import acl_line

VISITOR = "9f86d081884c7d65"
NOTHING = (
    b"broker: no configuration: make one by `broker init`, pass --config FILE, set BROKER_CONFIG,"
    b" set BITHUMAN_API_SECRET for a relay, or try `broker serve --dev`, which needs none\n"
)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A configuration that serves."""
    return good(tmp_path)


@pytest.fixture
def path(tmp_path: Path, tree: Tree) -> str:
    """The file it is in."""
    return write(tmp_path / "broker.toml", toml(tree))


IN_USE = {
    "server": "in use; stop the other process, or choose another with --listen or [server] listen",
    "admin": "in use; stop the other process, or choose another with --admin-listen or [admin]"
    " listen",
}
"""What is said of an address, by section."""

ALL_IN_ONE = """
import contextlib, io, json, sys
from broker.cli.main import main

told = []
for command, path in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*command, "--config", path])
    told.append([code, out.getvalue(), err.getvalue()])
json.dump(told, sys.stdout)
"""
"""Runs commands one after the other in one process: sixty starts would take half a minute."""


def run_each(*commands: tuple[list[str], str]) -> list[list[object]]:
    """Return exit code, output and errors of each command."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ALL_IN_ONE],
        input=json.dumps(commands).encode(),
        capture_output=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    told: list[list[object]] = json.loads(done.stdout)
    return told


def bad_files(folder: Path, tree: Tree) -> dict[str, str]:
    """Write a configuration of every bad kind; returns their paths by kind."""
    web = tree["clients"]["web"]["secret_file"]
    other = secret_file(folder / "other")
    short, same = write(folder / "short", "k" * 8), write(folder / "same", "k" * 64)
    closed = write(folder / "folder.toml", "")
    Path(closed).unlink()
    Path(closed).mkdir()
    trees = {
        "unknown section": put(tree, "limit", {}),
        "unknown key": put(tree, "server.lisen", "x"),
        "unknown key, deep": put(tree, "issuer.local.keys.one.secert", "x"),
        "unknown key, deepest": put(tree, "limits.agent.overrides.A1.brust", 1),
        "unknown key that breaks lines": put(tree, "server.a\n\x1b[31mb", 1),
        "unit": put(tree, "server.deadline", "12 parsecs"),
        "no unit": put(tree, "server.deadline", 12),
        "type": put(tree, "reuse.max_tokens", "many"),
        "choice": put(tree, "log.level", "loud"),
        "short client secret": put(tree, "clients.web.secret_file", short),
        "short key": put(tree, "issuer.local.keys.one.secret_file", short),
        "repeated key": put(tree, "issuer.local.keys.one.secret_file", same),
        "repeated sealing key": put(tree, "store.encryption_key_file", same),
        "secret file is a folder": put(tree, "clients.web.secret_file", str(folder)),
        "no clients": put(tree, "clients", {}),
        "no keys": put(tree, "issuer.local.keys", {}),
        "two keys": put(tree, "issuer.local.keys.two.secret_file", other),
        "shared secrets": put(tree, "clients.shop", {"secret_file": web, "agents": ["*"]}),
        "client without secret": put(tree, "clients.shop", {"agents": ["*"]}),
        "snapshot": put(tree, "store.snapshot_file", "/x"),
        "snapshot's age": put(tree, "store.snapshot_max_age", "1m"),
        "state file without a path": put(tree, "store.url", "sqlite://state.db"),
        "state file in no folder": put(tree, "store.url", f"sqlite://{folder}/nowhere/state.db"),
        "state file for workers": merged(
            tree, {"store.url": f"sqlite://{folder}/state.db", "server.workers": 2}
        ),
        "listen": put(tree, "server.listen", "8080"),
        "admin listen": put(tree, "admin.listen", "unix:relative"),
        "proxies": put(tree, "server.trusted_proxies", ["10.0.0.1/8"]),
        "rate 0": put(tree, "limits.agent.rate", 0),
        "rate NaN": put(tree, "limits.agent.rate", float("nan")),
        "rate negative": put(tree, "limits.agent.rate", -1),
        "burst 0": put(tree, "limits.agent.burst", 0),
        "burst 2^40": put(tree, "limits.agent.burst", 2**40),
        "override": put(tree, "limits.agent.overrides.A1.rate", 0),
        "budget": put(tree, "issuer.budget.rate", 0),
    }
    files = {name: write(folder / name, toml(bad)) for name, bad in trees.items()}
    return files | {
        "missing": f"{folder}/nowhere.toml",
        "folder": closed,
        "not TOML": write(folder / "not toml", "[server\n"),
        "no number": write(folder / "digits", "a = " + "9" * 5000),
    }


@pytest.mark.parametrize("command", ["serve", "check", "doctor"])
def test_certificates_that_nobody_writes_stop_no_start_for_ever(
    tmp_path: Path, path: str, command: str
) -> None:
    """A pipe in the place of a file: OpenSSL would wait for it, in the import of aiohttp."""
    pipe = tmp_path / "certificates"
    os.mkfifo(pipe)
    done = run(command, "--config", path, SSL_CERT_FILE=str(pipe))
    assert done.returncode == 78
    assert done.stderr == (
        f"broker: SSL_CERT_FILE: cannot read {pipe}: a pipe; name a regular file\n".encode()
    )
    absent = run("check", "--config", path, SSL_CERT_FILE=str(tmp_path / "absent"))
    assert absent.returncode == 0


class TestBadConfiguration:
    def test_of_every_kind_is_one_line_and_exit_78(self, tmp_path: Path, tree: Tree) -> None:
        """`check` and `serve` say the same, whole: no traceback, no second line, no output."""
        files = bad_files(tmp_path, tree)
        checks = run_each(*((["check"], path) for path in files.values()))
        serves = run_each(*((["serve"], path) for path in files.values()))
        for kind, (check, serve) in zip(files, zip(checks, serves, strict=True), strict=True):
            assert check == serve, kind
            code, out, err = check
            assert (code, out) == (78, ""), kind
            assert isinstance(err, str)
            assert err.startswith("broker: "), kind
            assert err.endswith("\n"), kind
            assert err[:-1].isprintable(), f"{kind}: {err!r}"

    def test_in_a_secret_file_is_found_by_the_start(self, tmp_path: Path, tree: Tree) -> None:
        """What `check` only notes, because it may be elsewhere, `serve` cannot do without."""
        bad = put(tree, "clients.web.secret_file", "/nowhere/web")
        path = write(tmp_path / "broker.toml", toml(bad))
        done = run("serve", "--config", path)
        assert (done.returncode, done.stdout) == (78, b"")
        assert done.stderr == (
            b"broker: clients.web.secret_file: cannot read /nowhere/web:"
            b" No such file or directory\n"
        )

    @pytest.mark.parametrize("command", ["serve", "check", "verify"])
    def test_that_is_none_names_the_mode_that_needs_none(self, command: str) -> None:
        """The first thing that a newcomer sees is what to do next."""
        done = run(command)
        assert (done.returncode, done.stdout, done.stderr) == (78, b"", NOTHING)

    def test_in_development_mode_is_told_the_same_way(self) -> None:
        """A client secret that is too short, from the environment."""
        done = run("serve", "--dev", BROKER_DEV_SECRET="short")
        assert (done.returncode, done.stdout) == (78, b"")
        assert done.stderr == (
            b"broker: clients.dev.secret: shorter than 16 characters; make one with `broker keys"
            b" generate`\n"
        )

    def test_of_an_address_in_use_is_one_line_and_exit_69(self, tmp_path: Path, tree: Tree) -> None:
        """Port and socket, data and admin listener: setting, address, remedy; and it ends."""
        unix = tmp_path / "s"
        with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as other:
            other.bind(str(unix))
            other.listen(1)
            port = f"127.0.0.1:{tcp.getsockname()[1]}"
            used = [
                ("server", port),
                ("server", f"unix:{unix}"),
                ("admin", port),
                ("admin", f"unix:{unix}"),
            ]
            quiet = put(tree, "log.level", "error")
            paths = [
                write(tmp_path / f"{n}.toml", toml(put(quiet, f"{section}.listen", address)))
                for n, (section, address) in enumerate(used)
            ]
            told = run_each(*((["serve"], path) for path in paths))
        assert told == [
            [
                69,
                "",
                f"broker: {section}.listen: cannot listen on {address}: {IN_USE[section]}\n",
            ]
            for section, address in used
        ]


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["serve", "--prot", "1"], "broker serve: does not take '--prot': there is -h, --help"),
            (["mint", AGENT], "broker mint: the following arguments are required: --fingerprint"),
        ],
    )
    def test_that_is_wrong_is_one_line_and_exit_64(self, arguments: list[str], told: str) -> None:
        """EX_USAGE of sysexits.h."""
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (64, b"")
        assert done.stderr.decode().startswith(told)
        assert done.stderr.count(b"\n") == 1

    def test_module_equals_the_installed_command(self) -> None:
        """`python -m broker` and `broker` give the same answers."""
        command = Path(sys.executable).with_name("broker")
        assert command.exists(), "the package is not installed beside this Python"
        for arguments in (["--version"], ["--help"], ["check"], ["keys"]):
            by_name = subprocess.run(
                [command, *arguments], capture_output=True, env=environment(), check=False
            )
            by_module = run(*arguments)
            assert by_name.returncode == by_module.returncode
            assert (by_name.stdout, by_name.stderr) == (by_module.stdout, by_module.stderr)

    def test_show_says_what_is_used_for_keys_that_are_left_out(self, path: str) -> None:
        """The key that signs, and the variable that holds the vendor's; never a value of it."""
        key = secrets.token_urlsafe(24)
        shown = run("config", "show", "--config", path, BITHUMAN_API_SECRET=key).stdout.decode()
        assert 'signing_key = ""  # the only key signs: one\n' in shown
        assert "BITHUMAN_API_SECRET" not in shown  # it signs by itself
        relay = {"BROKER_ISSUER__KIND": "upstream", "BITHUMAN_API_KEY": key}
        shown = run("config", "show", "--config", path, **relay).stdout.decode()
        assert "# api_secret is not set  # the key in BITHUMAN_API_KEY is used\n" in shown
        assert key not in shown
        given = {**relay, "BROKER_ISSUER__UPSTREAM__API_SECRET": key}
        shown = run("config", "show", "--config", path, **given).stdout.decode()
        assert 'api_secret = "**********"\n' in shown

    def test_reader_that_has_seen_enough_is_no_error(self, path: str) -> None:
        """`broker config show | head -1` ends without a word."""
        read, to_nobody = socket.socketpair()
        read.close()
        done = subprocess.run(
            [sys.executable, "-m", "broker", "config", "show", "--config", path],
            stdout=to_nobody,
            stderr=subprocess.PIPE,
            env=environment(),
            check=False,
        )
        to_nobody.close()
        assert (done.returncode, done.stderr) == (0, b"")


class TestCheck:
    def test_says_that_all_is_well(self, path: str) -> None:
        """One line on standard output, exit 0."""
        done = run("check", "--config", path)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"configuration ok\n", b"")

    def test_notes_secret_files_that_are_elsewhere(self, tmp_path: Path, tree: Tree) -> None:
        """A configuration is checked where it is written; its secrets are where it runs."""
        settings = ("clients.web.secret_file", "issuer.local.keys.one.secret_file")
        tree = merged(tree, dict.fromkeys(settings, "/nowhere/x"))
        done = run("check", "--config", write(tmp_path / "broker.toml", toml(tree)))
        assert (done.returncode, done.stdout) == (0, b"configuration ok\n")
        told = "/nowhere/x is not here; it must be where the broker runs"
        assert done.stderr.decode() == "".join(f"note: {key}: {told}\n" for key in settings)

    def test_notes_what_the_environment_overrides(self, path: str, tmp_path: Path) -> None:
        """Whoever edits the file sees no other sign that this key of it does not count."""
        other = secret_file(tmp_path / "other")
        name = "BROKER_CLIENTS__WEB__SECRET_FILE"
        done = run("check", "--config", path, **{name: other})
        assert (done.returncode, done.stdout) == (0, b"configuration ok\n")
        told = f"{name} of the environment counts, not the file"
        assert done.stderr.decode() == f"note: clients.web.secret_file: {told}\n"
        shown = run("config", "show", "--config", path, **{name: other}).stdout.decode()
        assert f'secret_file = "{other}"  # {name} counts, not the file\n' in shown

    def test_notes_a_vendor_key_that_is_not_used(self, tmp_path: Path, tree: Tree) -> None:
        """Tokens that are signed here show no avatar: whoever gave a key meant to relay."""
        tree = put(tree, "issuer.upstream.api_secret", secrets.token_urlsafe(20))
        done = run("check", "--config", write(tmp_path / "broker.toml", toml(tree)))
        assert (done.returncode, done.stdout) == (0, b"configuration ok\n")
        assert done.stderr.startswith(
            b"note: issuer.upstream.api_secret: a vendor key is given but not used"
        )
        assert b'issuer.kind = "upstream"' in done.stderr

    def test_notes_a_password_that_others_could_read(self, tmp_path: Path, tree: Tree) -> None:
        """Private networks are common, so it is no error; the doctor counts it as a problem."""
        store = {
            "url": "valkey://store.example",
            "password_file": secret_file(tmp_path / "password"),
            "encryption_key_file": secret_file(tmp_path / "sealing"),
        }
        path = write(tmp_path / "broker.toml", toml(put(tree, "store", store)))
        done = run("check", "--config", path)
        assert (done.returncode, done.stdout) == (0, b"configuration ok\n")
        assert done.stderr == (
            b"note: store.password: crosses the network in clear text: write valkeys://, or set"
            b" server.private_network = true where nobody else can listen\n"
        )

    def test_sees_other_errors_beside_a_missing_file(self, tmp_path: Path, tree: Tree) -> None:
        """A note must not hide that a key is weak or that nobody may ask."""
        files = ("clients.web.secret_file", "issuer.local.keys.one.secret_file")
        away = merged(tree, dict.fromkeys(files, "/nowhere/x"))
        done = run("check", "--config", write(tmp_path / "f", toml(put(away, "clients", {}))))
        assert (done.returncode, done.stdout) == (78, b"")
        assert done.stderr.startswith(b"broker: clients: nobody may ask for tokens")


class TestConfigShow:
    def test_G7_masks_what_is_secret(self, path: str) -> None:
        """Canaries in the environment are in force, and not in the output."""
        canaries = [secrets.token_urlsafe(32) for _ in range(3)]
        done = run(
            "config",
            "show",
            "--config",
            path,
            BROKER_CLIENTS__WEB__SECRET=canaries[0],
            BROKER_ISSUER__LOCAL__KEYS__one__SECRET=canaries[1],
            BROKER_STORE__ENCRYPTION_KEY=canaries[2],
            BROKER_SERVER__DEADLINE="7s",
        )
        shown = done.stdout.decode()
        assert (done.returncode, done.stderr) == (0, b"")
        assert [canary for canary in canaries if canary in shown] == []
        assert shown.count('= "**********"') == len(canaries)
        assert 'deadline = "7s"' in shown


class TestKeysGenerate:
    def test_prints_a_new_key_each_time(self) -> None:
        """32 random bytes as text, on one line."""
        first, second = run("keys", "generate"), run("keys", "generate")
        assert first.stdout != second.stdout
        for done in (first, second):
            assert (done.returncode, done.stderr) == (0, b"")
            assert len(done.stdout.strip()) == 43
            assert done.stdout.endswith(b"\n")

    def test_writes_it_for_the_owner_only(self, tmp_path: Path, tree: Tree) -> None:
        """Mode 0600 whatever the umask; the file is good for signing."""
        path = tmp_path / "key"
        done = subprocess.run(
            f"umask 0; {sys.executable} -m broker keys generate --out {path}",
            shell=True,
            capture_output=True,
            env=environment(),
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        tree = put(tree, "issuer.local.keys.one.secret_file", str(path))
        assert run("check", "--config", write(tmp_path / "f", toml(tree))).returncode == 0

    @pytest.mark.parametrize("kind", ["file", "link", "folder"])
    def test_never_writes_over_anything(self, tmp_path: Path, kind: str) -> None:
        """A key that is lost cannot be had again."""
        path = tmp_path / "key"
        kept = tmp_path / "kept"
        kept.write_text("mine", encoding="utf-8")
        if kind == "file":
            shutil.copy(kept, path)
        elif kind == "link":
            path.symlink_to(kept)
        else:
            path.mkdir()
        done = run("keys", "generate", "--out", str(path))
        assert (done.returncode, done.stdout) == (1, b"")
        told = "something is there, and nothing is written over it: name another file"
        assert done.stderr == f"broker: cannot write {path}: {told}\n".encode()
        assert kept.read_text(encoding="utf-8") == "mine"
        assert kind == "folder" or path.read_text(encoding="utf-8") == "mine"

    def test_that_cannot_be_written_whole_is_not_left(self, tmp_path: Path) -> None:
        """One line; an empty file would be in the way of the next try, half a key a bad one."""
        path = tmp_path / "key"
        done = subprocess.run(
            f"ulimit -f 0; {sys.executable} -m broker keys generate --out {path}",
            shell=True,
            capture_output=True,
            env=environment(),
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr == f"broker: cannot write {path}: File too large\n".encode()
        assert not path.exists()


class TestStoreAcl:
    def test_prints_the_line_that_the_scripts_need(self) -> None:
        """Without any configuration, for the user that STORE.md names; no password in it."""
        done = run("store", "acl")
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode() == f"{acl_line('broker', '>PASSWORD')}\n"

    @pytest.mark.parametrize(
        ("url", "cluster", "database"),
        [
            ("memory://", False, False),
            ("valkey://store.internal:6379/2", False, True),
            ("valkey+cluster://a:1,b:2", True, False),
        ],
    )
    def test_goes_by_the_configuration(
        self, tmp_path: Path, tree: Tree, url: str, cluster: bool, database: bool
    ) -> None:
        """User, cluster and database are its own; no server is asked, no key file is read."""
        tree = merged(
            tree,
            {
                "store.url": url,
                "store.username": "someone",
                "store.encryption_key_file": "/nowhere/store_key",
                "store.password_file": "/nowhere/store_password",
            },
        )
        path = write(tmp_path / "broker.toml", toml(tree))
        expected = acl_line("someone", ">PASSWORD", cluster=cluster, database=database)
        assert run("store", "acl", "--config", path).stdout.decode() == f"{expected}\n"
        done = run("store", "acl", "--config", path, "--user", "other")
        assert done.stdout.decode().split()[1] == "other"

    @pytest.mark.parametrize("user", ["two words", "tab\tbed", "on +@all"])
    def test_a_name_that_would_be_more_than_a_name_is_refused(self, user: str) -> None:
        """It would be read as rules."""
        done = run("store", "acl", "--user", user)
        assert (done.returncode, done.stdout) == (64, b"")
        assert b"--user" in done.stderr


class TestMintAndVerify:
    def test_signed_here_is_verified_here(self, path: str) -> None:
        """The token alone on standard output; `verify` prints its claims."""
        minted = run("mint", AGENT, "--fingerprint", VISITOR, "--config", path)
        assert (minted.returncode, minted.stderr) == (0, b"")
        assert minted.stdout.count(b"\n") == 1
        done = run("verify", "--config", path, stdin=minted.stdout)
        assert (done.returncode, done.stderr) == (0, b"")
        claims = json.loads(done.stdout)
        assert (claims["sub"], claims["fingerprint"]) == (AGENT, VISITOR)
        assert claims["exp"] - claims["iat"] == 3600

    def test_says_no_to_what_is_not_good(self, tmp_path: Path, path: str, tree: Tree) -> None:
        """Tampered, expired, for somebody else, no token: exit 1 and the reason."""
        key = secret_in(tree["issuer"]["local"]["keys"]["one"]["secret_file"])
        now = int(time.time())
        claims = {
            "iss": "embed-token-broker",
            "aud": "embed",
            "sub": AGENT,
            "nbf": now - 10,
            "exp": now + 600,
        }

        def sign(changes: Tree) -> str:
            return jwt.encode(claims | changes, key, "HS256")

        good_token = sign({})
        head, _, signature = good_token.split(".")
        other = jwt.encode({**claims, "sub": "B2"}, key, "HS256").split(".")[1]
        told = {
            good_token: (0, ""),
            f"{head}.{other}.{signature}": (1, "not valid: no key fits\n"),
            sign({"exp": now - 61}): (1, "not valid: expired\n"),
            sign({"aud": "others"}): (1, "not valid: made by or for somebody else\n"),
            "": (1, "not valid: not a JWT\n"),
        }
        found = {}
        for token in told:
            done = run("verify", "--config", path, stdin=f"{token}\n".encode())
            found[token] = (done.returncode, done.stderr.decode())
            assert bool(done.stdout) == (done.returncode == 0)
        assert found == told

    @pytest.mark.parametrize(
        ("command", "remedy"),
        [
            (f"mint {AGENT} --fingerprint {VISITOR}", "ask the running broker with --url"),
            ("verify", "ask the running broker at /v1/embed-tokens/verify"),
            ("keys list", "there are no keys here"),
            ("keys rotate", "there are no keys here"),
        ],
    )
    @pytest.mark.parametrize("how", ["file", "variable", "keys"])
    def test_a_relay_has_no_key_for_it(
        self, tmp_path: Path, tree: Tree, command: str, remedy: str, how: str
    ) -> None:
        """Whatever keys are in its file: the vendor's viewer takes no token of theirs."""
        relay = put(tree, "issuer.kind", "upstream")
        if how == "file":
            relay = put(relay, "issuer.local", {})
        key = {"BITHUMAN_API_SECRET": secrets.token_urlsafe(24), "HOME": str(tmp_path)}
        config = ["--config", write(tmp_path / "relay.toml", toml(relay))]
        done = run(*command.split(), *(config if how != "variable" else ()), **key)
        assert (done.returncode, done.stdout) == (78, b"")
        told = 'issuer.kind: is "upstream", so this configuration relays, and the vendor signs'
        assert done.stderr.decode() == f"broker: {told}; {remedy}\n"

    def test_reads_bytes_that_are_no_text(self, path: str) -> None:
        """Whatever comes in on standard input is at worst no token."""
        done = run("verify", "--config", path, stdin=b"\xff\xfe\x00\n")
        assert (done.returncode, done.stderr) == (1, b"not valid: not a JWT\n")

    @pytest.mark.parametrize(
        ("agent", "fingerprint", "field"),
        [("a b", VISITOR, "agent_id: must be"), (AGENT, "xyz", "fingerprint: must be")],
    )
    def test_holds_to_the_rules_of_the_wire(
        self, path: str, agent: str, fingerprint: str, field: str
    ) -> None:
        """No token is signed that the broker itself would have refused."""
        done = run("mint", agent, "--fingerprint", fingerprint, "--config", path)
        assert (done.returncode, done.stdout) == (64, b"")
        assert done.stderr.decode().startswith(f"broker: {field}")

    def test_prints_an_iframe(self, path: str) -> None:
        """What a page needs to show the avatar, with the permissions that its viewer needs."""
        done = run("mint", AGENT, "--fingerprint", VISITOR, "--iframe", "--config", path)
        text = done.stdout.decode()
        assert text.startswith('<iframe src="https://')
        assert 'allow="microphone *; camera *; autoplay *"' in text
        source = urlsplit(html.unescape(text.split('"')[1]))
        assert source.path == f"/embed/{AGENT}"
        token = parse_qs(source.query)["token"][0]
        assert run("verify", "--config", path, stdin=token.encode()).returncode == 0

    def test_a_broker_that_cannot_now_is_not_one_that_refuses(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """503 is 69: the same command may do later."""
        budget = {"rate": 1, "per": "60s", "burst": 1, "max_wait": "1s"}
        secret = secret_in(tree["clients"]["web"]["secret_file"])
        with Broker.configured(tmp_path, merged(tree, {"issuer.budget": budget})) as broker:
            command_line = ["mint", AGENT, "--fingerprint", VISITOR, "--url", broker.url]
            done = run(*command_line, BROKER_API_SECRET=secret)
        assert (done.returncode, done.stdout) == (69, b"")
        assert b"the vendor's budget is used up" in done.stderr

    def test_asks_a_running_broker(self, tmp_path: Path, tree: Tree, path: str) -> None:
        """`--url`: its token is the one that the broker then reuses; errors are its words.

        1 is the broker's no, 64 an address that is none, 78 a secret that is not there.
        """
        secret = secret_in(tree["clients"]["web"]["secret_file"])
        limited = merged(tree, {"limits.fingerprint": {"rate": 1, "per": "1h", "burst": 2}})
        with Broker.configured(tmp_path, limited) as broker:
            command_line = ["mint", AGENT, "--fingerprint", VISITOR, "--url"]
            first, second, third = (
                run(*command_line, broker.url, BROKER_API_SECRET=secret) for _ in range(3)
            )
            stranger = run(*command_line, broker.url, BROKER_API_SECRET=secrets.token_urlsafe(24))
            nobody = run(*command_line, broker.url)
            elsewhere = run(*command_line, broker.admin_url, BROKER_API_SECRET=secret)
            nowhere = run(*command_line, "localhost:8080", BROKER_API_SECRET=secret)
        assert (first.returncode, first.stderr, second.stdout) == (0, b"", first.stdout)
        assert run("verify", "--config", path, stdin=first.stdout).returncode == 0
        assert third.returncode == stranger.returncode == elsewhere.returncode == 1
        assert (nobody.returncode, nowhere.returncode) == (78, 64)
        assert nowhere.stderr == (
            b"broker: --url must start with http:// or https://, or be unix:/path/of/a/socket\n"
        )
        assert b"fingerprint" in third.stderr
        assert b"unknown client secret" in stranger.stderr
        assert nobody.stderr == (
            b"broker: BROKER_API_SECRET is not set: it must hold the client secret\n"
        )
        assert (
            elsewhere.stderr
            == (
                f"broker: {broker.admin_url} refused: admin listener: /metrics, /livez, /readyz;"
                " /v1/sessions with admin.secret_file\n"
            ).encode()
        )
        gone = run(*command_line, broker.url, BROKER_API_SECRET=secret)
        assert (gone.returncode, gone.stdout) == (69, b"")
        assert gone.stderr.startswith(f"broker: nobody listens at {broker.url}: ".encode())

    def test_rotated_key_still_verifies(self, tmp_path: Path, path: str, tree: Tree) -> None:
        """A token from before the rotation is good while its key is kept, and not after."""
        old = run("mint", AGENT, "--fingerprint", VISITOR, "--config", path).stdout
        keys = {**tree["issuer"]["local"]["keys"]}
        keys["two"] = {"secret_file": secret_file(tmp_path / "two")}
        both = merged(tree, {"issuer.local.keys": keys, "issuer.local.signing_key": "two"})
        rotated = write(tmp_path / "rotated.toml", toml(both))
        assert run("verify", "--config", rotated, stdin=old).returncode == 0
        new = run("mint", AGENT, "--fingerprint", VISITOR, "--config", rotated).stdout
        assert run("verify", "--config", path, stdin=new).returncode == 1
        assert run("verify", "--config", rotated, stdin=new).returncode == 0
