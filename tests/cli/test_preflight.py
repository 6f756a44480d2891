"""What `check` and `doctor` find before a start: each wrong file, and its one line."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from documents import ROOT
from processes import (
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

from broker.cli import probe
from broker.cli.main import main
from broker.config.environment import misspelt

Check = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A configuration that signs, in which nothing is to be found."""
    return good(tmp_path)


@pytest.fixture
def relay(tmp_path: Path) -> Tree:
    """A configuration that relays, in which nothing is to be found."""
    changes = {
        "issuer": {
            "kind": "upstream",
            "upstream": {"api_secret_files": [secret_file(tmp_path / "vendor")]},
        },
        "store.url": f"sqlite://{tmp_path}/state.db",
    }
    return merged(good(tmp_path), changes)


@pytest.fixture
def check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Check:
    """Run `check` on a tree, with variables; returns exit code and lines of standard error."""

    def checked(tree: Tree, **variables: str) -> tuple[int, list[str]]:
        path = write(tmp_path / "broker.toml", toml(tree))
        with monkeypatch.context() as patch:
            for name in list(os.environ):
                if name.startswith(("BROKER_", "BITHUMAN_", "CREDENTIALS_")):
                    patch.delenv(name)
            for name, value in variables.items():
                patch.setenv(name, value)
            code = main(["check", "--config", path])
        said = capsys.readouterr()
        assert said.out == ("configuration ok\n" if code == 0 else "")
        return code, said.err.splitlines()

    return checked


def test_nothing_is_found_in_what_is_good(check: Check, tree: Tree, relay: Tree) -> None:
    """A signer, a relay: not a word."""
    assert check(tree) == (0, [])
    assert check(relay) == (0, [])


class TestWindow:
    """The budget against what the vendor counts in a minute."""

    @pytest.mark.parametrize(
        ("budget", "most", "remedy"),
        [
            ({"rate": 118}, 126, "set rate to 112 or less"),
            ({"rate": 2, "per": "1s"}, 128, "set rate to 1 or less"),
            ({"burst": 15}, 121, "set rate to 105 or less"),
            ({"rate": 1, "burst": 120}, 121, "set burst below 120"),
            ({"rate": 112.5}, 121, "set rate to 112 or less"),
        ],
    )
    def test_is_not_to_be_exceeded(
        self, check: Check, relay: Tree, budget: Tree, most: int, remedy: str
    ) -> None:
        """78, with the figure that fits; the setting that says otherwise is named."""
        burst = budget.get("burst", 8)
        assert check(put(relay, "issuer.budget", budget)) == (
            78,
            [
                (
                    f"broker: issuer.budget.rate: a burst of {burst} and what refills in a minute"
                    f" are {most} calls, and the vendor takes 120: {remedy}, or window = {most} if"
                    " your plan"
                    " has that many"
                )
            ],
        )
        assert check(put(relay, "issuer.budget", {**budget, "window": most})) == (0, [])
        assert check(put(relay, "issuer.budget", {**budget, "window": most - 1}))[0] == 78

    def test_is_for_the_vendor_only(self, check: Check, tree: Tree) -> None:
        """Nobody counts what is signed here."""
        assert check(put(tree, "issuer.budget", {"rate": 6000, "burst": 100})) == (0, [])

    def test_keeps_a_relay_from_starting(self, tmp_path: Path, relay: Tree) -> None:
        """`serve` refuses what `check` refuses."""
        path = write(tmp_path / "broker.toml", toml(put(relay, "issuer.budget.rate", 118)))
        done = run("serve", "--config", path)
        assert (done.returncode, done.stdout) == (78, b"")
        assert done.stderr.startswith(b"broker: issuer.budget.rate: a burst of 8 and")


class TestKeys:
    def test_a_client_without_agents(self, check: Check, tree: Tree) -> None:
        """It may still verify, so it is a note."""
        assert check(put(tree, "clients.web.agents", [])) == (
            0,
            [
                (
                    "note: clients.web.agents: empty, so this client gets no token; name its"
                    ' agents, or write ["*"] for all'
                )
            ],
        )

    def test_a_vendor_key_where_tokens_are_signed(
        self, check: Check, tree: Tree, tmp_path: Path
    ) -> None:
        """In the file, or in the vendor's own variable."""
        told = (
            'a vendor key is given but not used, because issuer.kind is "local" and tokens are'
            ' signed here; set issuer.kind = "upstream" to relay the vendor\'s, or take it out'
        )
        key = secret_file(tmp_path / "vendor")
        given = put(tree, "issuer.upstream.api_secret_files", [key])
        assert check(given) == (0, [f"note: issuer.upstream.api_secret_files: {told}"])
        variable = {"BITHUMAN_API_SECRET": secrets.token_urlsafe(24)}
        assert check(tree, **variable) == (0, [f"note: BITHUMAN_API_SECRET: {told}"])

    def test_a_kind_that_is_none_is_one_problem(self, check: Check, relay: Tree) -> None:
        """What the issuer needs, nobody knows before its kind is mended."""
        code, lines = check(put(relay, "issuer.kind", "upstrem"))
        assert (code, lines) == (78, ["broker: issuer.kind: must be local or upstream"])

    def test_the_start_tells_of_unused_keys_too(self, tmp_path: Path, tree: Tree) -> None:
        """Whoever meant to relay sees it where they started it."""
        with Broker.configured(
            tmp_path, tree, BITHUMAN_API_SECRET=secrets.token_urlsafe(24)
        ) as broker:
            (told,) = broker.wait_for(lambda: broker.events("broker.key_unused"))
        assert told["key"] == "BITHUMAN_API_SECRET"
        assert told["reason"].startswith("a vendor key is given but not used, ")

    @pytest.mark.parametrize("name", ["keys", "keys_file"])
    def test_signing_keys_where_the_vendor_signs(
        self, check: Check, relay: Tree, tree: Tree, name: str
    ) -> None:
        """Whoever made them may have meant to sign."""
        keys = tree["issuer"]["local"]["keys"] if name == "keys" else "/nowhere/keys.json"
        code, lines = check(put(relay, "issuer.local", {name: keys}))
        assert code == 0
        assert (
            f'note: issuer.local.{name}: not used, because issuer.kind is "upstream" and the vendor'
            ' signs; take it out, or set issuer.kind = "local"' in lines
        )

    @pytest.mark.parametrize(
        ("setting", "role"),
        [
            ("admin.secret", "it is the operator's"),
            ("store.encryption_key", "it is the key of what is stored"),
            ("store.password", "it is the store's password"),
            ("issuer.local.keys.one.secret", "it is a signing key"),
        ],
    )
    def test_one_secret_in_two_roles(
        self, check: Check, tree: Tree, setting: str, role: str
    ) -> None:
        """By its value, wherever it is written; the value is not shown (G7)."""
        web = tree["clients"]["web"]["secret_file"]
        value = secret_in(web)
        named = setting.removesuffix(".secret") if "keys" in setting else setting
        for key, same in ((f"{setting}_file", web), (setting, value)):
            table, _, name = setting.rpartition(".")
            above: Any = tree
            for part in table.split("."):
                above = above.get(part, {})
            without = put(tree, table, {k: v for k, v in above.items() if not k.startswith(name)})
            shown = named if "keys" in setting else key
            assert check(put(without, key, same)) == (
                78,
                [
                    (
                        f"broker: {shown}: the same secret as that of clients.web.secret_file, and"
                        f" {role}, too: who has one has both; make another with `broker keys"
                        " generate`"
                    )
                ],
            )

    def test_the_next_secret_of_a_client_is_looked_at_too(self, check: Check, tree: Tree) -> None:
        """It is good from the moment at which it is written."""
        signing = tree["issuer"]["local"]["keys"]["one"]["secret_file"]
        code, (line,) = check(put(tree, "clients.web.next_secret_file", signing))
        assert code == 78
        assert " the same secret as that of clients.web.next_secret_file, and " in line

    def test_a_client_that_has_the_vendor_key(self, check: Check, relay: Tree) -> None:
        """It could ask the vendor itself: a note."""
        vendor = relay["issuer"]["upstream"]["api_secret_files"][0]
        code, (line,) = check(put(relay, "clients.web.secret_file", vendor))
        assert code == 0
        assert line == (
            "note: issuer.upstream.api_secret: the same secret as that of clients.web.secret_file,"
            " and it is the vendor's, too: who has one has both; make another with `broker keys"
            " generate`"
        )
        alone = {name: value for name, value in relay.items() if name != "clients"}
        assert check(alone) == (0, [])  # whoever has the vendor's key is the client


class TestListeners:
    CLEAR = (
        "is reached without TLS, and secrets cross the network in clear text; put a proxy that"
        " speaks TLS in front and name it in server.trusted_proxies, or set"
        " server.private_network = true where the network encrypts or nobody else is on it"
    )

    @pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
    def test_plain_http_beyond_loopback(
        self, check: Check, tree: Tree, tmp_path: Path, listen: str
    ) -> None:
        """A proxy in front, or a word that it is meant, ends the note."""
        beyond = put(tree, "server.listen", listen)
        assert check(beyond) == (0, [f"note: server.listen: {listen} {self.CLEAR}"])
        assert check(put(beyond, "server.trusted_proxies", ["10.0.0.1"])) == (0, [])
        assert check(put(beyond, "server.private_network", True)) == (0, [])
        metrics = put(tree, "admin.listen", listen)
        assert check(metrics) == (0, [])
        admin = put(metrics, "admin.secret_file", secret_file(tmp_path / "admin"))
        assert check(admin) == (0, [f"note: admin.listen: {listen} {self.CLEAR}"])

    @pytest.mark.parametrize("section", ["server", "admin"])
    @pytest.mark.parametrize("family", ["tcp", "unix"])
    def test_an_address_that_is_taken(
        self, check: Check, tree: Tree, tmp_path: Path, section: str, family: str
    ) -> None:
        """69, as the start would end; nothing is left behind, and nobody is connected to."""
        flag = "--listen" if section == "server" else "--admin-listen"
        if family == "tcp":
            other = socket.create_server(("127.0.0.1", 0))
            address = f"127.0.0.1:{other.getsockname()[1]}"
        else:
            other = socket.socket(socket.AF_UNIX)
            other.bind(str(tmp_path / "s"))
            other.listen(1)
            address = f"unix:{tmp_path / 's'}"
        with other:
            other.settimeout(0.2)
            assert check(put(tree, f"{section}.listen", address)) == (
                69,
                [
                    (
                        f"broker: {section}.listen: cannot listen on {address}: in use; stop the"
                        f" other process, or choose another with {flag} or [{section}] listen"
                    )
                ],
            )

    def test_a_taken_address_does_not_hide_what_is_wrong_anywhere(
        self, check: Check, tree: Tree
    ) -> None:
        """78: the same command later would not do; both are told."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = put(tree, "server.listen", f"127.0.0.1:{other.getsockname()[1]}")
            code, lines = check(put(taken, "server.deadline", "0s"))
        assert code == 78
        assert [line.split(": ")[1] for line in lines] == ["server.deadline", "server.listen"]

    def test_the_broker_that_runs_already(self, check: Check, tree: Tree, tmp_path: Path) -> None:
        """It can be run beside the broker whose configuration it checks."""
        with Broker.configured(tmp_path, tree) as broker:
            for section, url in (("server", broker.url), ("admin", broker.admin_url)):
                taken = put(tree, f"{section}.listen", url.removeprefix("http://"))
                assert check(taken) == (0, [])

    def test_another_server_that_says_it_is_well_is_no_broker(
        self, check: Check, tree: Tree
    ) -> None:
        """69: many a server has the same words at /livez, but its answers have no request id."""

        class Other(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(probe.ALIVE)))
                self.end_headers()
                self.wfile.write(probe.ALIVE)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        with HTTPServer(("127.0.0.1", 0), Other) as server:
            threading.Thread(target=server.handle_request, daemon=True).start()
            code, (line,) = check(put(tree, "server.listen", f"127.0.0.1:{server.server_port}"))
        assert (code, "in use; stop the other process" in line) == (69, True)

    def test_both_listeners_at_one_address(self, check: Check, tree: Tree) -> None:
        """Also if one of them is everywhere."""
        both = merged(tree, {"server.listen": "[::]:7999", "server.private_network": True})
        code, lines = check(put(both, "admin.listen", "127.0.0.1:7999"))
        assert (code, lines[0]) == (
            78,
            (
                "broker: admin.listen: 127.0.0.1:7999 is taken by server.listen ([::]:7999); choose"
                " another port"
            ),
        )

    def test_a_folder_that_may_not_be_written(
        self, check: Check, tree: Tree, tmp_path: Path
    ) -> None:
        """Of a socket, and of the state file: the remedy of each."""
        nowhere = f"unix:{tmp_path}/nowhere/s"
        told = f"broker: server.listen: cannot listen on {nowhere}: no such folder"
        assert check(put(tree, "server.listen", nowhere)) == (69, [told])
        code, (line,) = check(put(tree, "store.url", f"sqlite://{tmp_path}/nowhere/state.db"))
        assert (code, line.partition("; ")[0]) == (
            78,
            f"broker: store.url: there is no folder {tmp_path}/nowhere",
        )
        with closed_folder(tmp_path) as folder:
            address = f"unix:{folder}/s"
            told = (
                f"broker: server.listen: cannot listen on {address}: permission denied; choose a"
                " port above 1023 or a folder of the broker's own"
            )
            assert check(put(tree, "server.listen", address)) == (69, [told])
            code, (line,) = check(put(tree, "store.url", f"sqlite://{folder}/state.db"))
            assert code == 78
            assert line.startswith(
                f"broker: store.url: cannot write to {folder}: Permission denied"
            )


@contextmanager
def closed_folder(tmp_path: Path) -> Iterator[str]:
    """Make a folder that may be looked into and not written, also by those who run as root."""
    with TemporaryDirectory(dir="/tmp") as name:
        if os.geteuid() != 0:
            Path(name).chmod(0o500)
            yield name
            Path(name).chmod(0o700)
            return
        Path(name).chmod(0o755)
        path = tmp_path
        opened = []
        while path != Path("/tmp") and path != path.parent:
            opened.append((path, path.stat().st_mode))
            path.chmod(0o777)
            path = path.parent
        for file in tmp_path.iterdir():
            file.chmod(0o666)
        os.seteuid(65534)
        try:
            yield name
        finally:
            os.seteuid(0)
            for each, mode in opened:
                each.chmod(mode)


def test_a_limit_on_open_files_below_the_connections(tmp_path: Path, tree: Tree) -> None:
    """The hard one: the start raises the soft one to it."""
    path = write(tmp_path / "broker.toml", toml(tree))
    shell = 'ulimit -n 1087 && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-m", "broker", "check", "--config", path],
        capture_output=True,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"configuration ok\n")
    assert done.stderr == (
        b"note: open files: 1087 at most, less than the 1024 connections that may come at once and"
        b" 64 of the broker's own; raise the hard limit (LimitNOFILE= of a unit, ulimit -Hn of a"
        b" shell, ulimits of a container)\n"
    )


class TestVariables:
    @pytest.mark.parametrize(
        ("name", "right"),
        [
            ("BROKER_SERVER_LISTEN", "BROKER_SERVER__LISTEN"),
            ("BROKER_LIMITS_AGENT_RATE", "BROKER_LIMITS__AGENT__RATE"),
            ("BROKER_LIMITS_FINGERPRINT_MINTS_RATE", "BROKER_LIMITS__FINGERPRINT_MINTS__RATE"),
            ("BROKER_CLIENTS_WEB_SECRET_FILE", "BROKER_CLIENTS__WEB__SECRET_FILE"),
            (
                "BROKER_ISSUER_UPSTREAM_API_SECRET_FILES",
                "BROKER_ISSUER__UPSTREAM__API_SECRET_FILES",
            ),
        ],
    )
    def test_with_one_underscore_are_not_read(
        self, check: Check, tree: Tree, name: str, right: str
    ) -> None:
        """A limit that is misspelt is no limit; so it is said."""
        told = f"note: {name}: not read: two underscores stand between names; write {right}"
        assert check(tree, **{name: "1"}) == (0, [told])

    def test_that_are_none_of_ours_are_left_alone(self) -> None:
        """Its own, and what a container platform adds for services called broker-..."""
        platform = ["HOST", "PORT", "SERVER_SERVICE_HOST", "SERVER_PORT", "LOG_PORT_80_TCP"]
        others = ["CONFIG", "DEV_SECRET", "API_SECRET", "SERVER", "", "STORE_SERVICE_PORT"]
        assert list(misspelt({f"BROKER_{name}": "1" for name in platform + others})) == []

    @pytest.mark.parametrize(
        ("name", "value", "told"),
        [
            ("BROKER_SERVER__WORKERS", "many", "server.workers: expected int, got str"),
            ("BROKER_SERVER__WORKERS", "65", "server.workers: expected int <= 64"),
            ("BROKER_SERVER__DOCS", "maybe", "server.docs: expected bool, got str"),
            (
                "BROKER_LOG__LEVEL",
                "loud",
                "log.level: must be debug or info or warning or error",
            ),
            ("BROKER_SERVER__DEADLINE", "0s", "server.deadline: must be longer than 0"),
            (
                "BROKER_LIMITS__AGENT__BURST",
                "0",
                (
                    "limits.agent: burst must be between 1 and 2147483647; no number switches a"
                    " limit off: raise it, or set dry_run = true"
                ),
            ),
            (
                "BROKER_ISSUER__UPSTREAM_TIMEOUT",
                "1s",
                "no such key; write BROKER_ISSUER__UPSTREAM__TIMEOUT",
            ),
            ("BROKER__SERVER__LISTEN", "x", "no such key; write BROKER_SERVER__LISTEN"),
        ],
    )
    def test_are_named_when_their_value_is_wrong(
        self, check: Check, tree: Tree, name: str, value: str, told: str
    ) -> None:
        """The operator looks for the variable, not in the file."""
        assert check(tree, **{name: value}) == (78, [f"broker: {name}: {told}"])


class TestAbsentFiles:
    """Which of them say that the broker runs elsewhere, and which that something is wrong here."""

    @pytest.mark.parametrize("kind", ["local", "upstream"])
    def test_of_the_issuer_that_is_not_in_use_do_not_matter(
        self, check: Check, tree: Tree, relay: Tree, tmp_path: Path, kind: str
    ) -> None:
        """Nobody reads them: all is tried as on any machine, and there is one note of each."""
        absent = {
            "local": put(tree, "issuer.upstream.api_secret_files", ["/nowhere/vendor"]),
            "upstream": put(relay, "issuer.local.keys_file", "/nowhere/keys.json"),
        }[kind]
        code, (line,) = check(absent)
        assert (code, "not used, because issuer.kind is" in line) == (0, True)
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = put(absent, "server.listen", f"127.0.0.1:{other.getsockname()[1]}")
            code, (first, _) = check(taken)
        assert (code, first.split(": ")[1]) == (69, "server.listen")
        code, (first, _) = check(put(absent, "store.url", f"sqlite://{tmp_path}/no/state.db"))
        assert (code, first.split(": ")[1]) == (78, "store.url")

    @pytest.mark.parametrize(
        "file",
        ["{folder}/adminn", "{folder}/secret/admin", "/nowhere/admin"],
        ids=["file", "folder", "root"],
    )
    def test_beside_one_that_is_here_are_problems(
        self, check: Check, tree: Tree, tmp_path: Path, file: str
    ) -> None:
        """A typo: the start would end with 78."""
        path = file.format(folder=tmp_path)
        told = f"broker: admin.secret_file: cannot read {path}: No such file or directory"
        assert check(put(tree, "admin.secret_file", path)) == (78, [told])

    def test_in_a_folder_that_is_here_are_problems(
        self, check: Check, tree: Tree, tmp_path: Path
    ) -> None:
        """All of them were forgotten; what is public says nothing, and any machine has it."""
        folder = tmp_path / "secrets"
        away = merged(
            tree,
            {
                "clients.web.secret_file": f"{folder}/web",
                "issuer.local.keys.one.secret_file": f"{folder}/one",
                "store": {
                    "url": "valkeys://h",
                    "encryption_key_file": f"{folder}/key",
                    "tls_ca_file": f"{tmp_path}/ca.pem",
                },
            },
        )
        code, lines = check(away)
        assert (code, len(lines)) == (0, 4)
        assert all(line.endswith("is not here; it must be where the broker runs") for line in lines)
        folder.mkdir()
        code, lines = check(away)
        assert (code, {line.partition(":")[0] for line in lines}) == (78, {"broker"})


class TestCredentials:
    """Secrets that a unit hands over: `ExecStartPre=broker check` sees what the start will see."""

    @pytest.fixture
    def handed(self, tmp_path: Path) -> dict[str, str]:
        """What systemd sets for LoadCredential=web and key, with `%d` in their variables."""
        folder = tmp_path / "credentials"
        folder.mkdir()
        for name in ("web", "key"):
            Path(secret_file(folder / name)).chmod(0o400)
        return {
            "CREDENTIALS_DIRECTORY": str(folder),
            "BROKER_CLIENTS__WEB__SECRET_FILE": f"{folder}/web",
            "BROKER_ISSUER__LOCAL__KEYS__MAIN__SECRET_FILE": f"{folder}/key",
        }

    @pytest.fixture
    def plain(self, tree: Tree) -> Tree:
        """The file beside such a unit: no secret in it."""
        return {
            "server": tree["server"],
            "admin": tree["admin"],
            "clients": {"web": {"agents": ["*"]}},
        }

    def test_are_checked_in_the_unit(
        self, check: Check, plain: Tree, handed: dict[str, str]
    ) -> None:
        """All of them there: not a word; one that is absent or weak: 78, not a note."""
        assert check(plain, **handed) == (0, [])
        key = Path(handed["BROKER_ISSUER__LOCAL__KEYS__MAIN__SECRET_FILE"])
        key.chmod(0o600)
        key.write_text("short\n", encoding="utf-8")
        code, (line,) = check(plain, **handed)
        assert (
            code,
            line.partition(": ")[2].startswith("issuer.local.keys.MAIN.secret_file: "),
        ) == (
            78,
            True,
        )
        key.unlink()
        told = f"broker: issuer.local.keys.MAIN.secret_file: cannot read {key}: No such file"
        told += " or directory"
        assert check(plain, **handed) == (78, [told])

    def test_outside_of_the_unit_absent_files_are_notes(
        self, check: Check, plain: Tree, handed: dict[str, str]
    ) -> None:
        """A configuration is checked where it is written; its secrets are where it runs."""
        away = {name: "/nowhere/x" for name in handed if name.startswith("BROKER_")}
        code, lines = check(plain, **away)
        assert (code, len(lines)) == (0, 2)
        assert all(
            line.endswith(" is not here; it must be where the broker runs") for line in lines
        )


WRONG = {
    "server.lisen": "x",
    "server.deadline": 12,
    "server.drain_lead": "20s",
    "clients.shop": {"secret": "short", "agents": ["a b"]},
    "clients.kiosk": {"agents": ["*"]},
    "issuer.budget": {"rate": 118},
    "issuer.upstream.base_url": "http://vendor.example",
    "reuse.floor": "5 minutes",
    "reuse.floor_in_outage": "6m",
}
"""Wrong in every way at once; the last is judged by the one before it, which is not to be read."""

FOUND = [
    ("problem", "server.lisen"),
    ("problem", "server.deadline"),
    ("problem", "reuse.floor"),
    ("problem", "issuer.budget.rate"),
    ("problem", "clients.shop.agents"),
    ("problem", "issuer.upstream.base_url"),
    ("problem", "server.drain_lead"),
    ("problem", "clients.shop.secret"),
    ("problem", "clients.kiosk.secret_file"),
]


class TestAllAtOnce:
    def test_every_problem_is_told_and_no_consequence_of_one(
        self, check: Check, relay: Tree
    ) -> None:
        """Each with its key, in one line; what follows from a wrong value is not told."""
        code, lines = check(merged(relay, WRONG))
        assert code == 78
        keys = [line.removeprefix("broker: ").removeprefix("unknown key ") for line in lines]
        assert [line.partition(":")[0] for line in keys] == [key for _, key in FOUND]

    @pytest.mark.parametrize(
        ("wrong", "told"),
        [
            ({"clients.web.secret_file": 5}, ["clients.web.secret_file"]),
            ({"clients.web.secert": "x", "clients.web.secret_file": 5}, None),
            ({"clients": []}, ["clients"]),
            ({"limits.client": {"rate": "x", "burst": 1}}, ["limits.client.rate"]),
            ({"issuer.local.keys.one": 5}, ["issuer.local.keys.one"]),
            ({"store.url": 5, "server.workers": 2}, ["store.url"]),
        ],
    )
    def test_what_is_left_out_is_told_once(
        self, check: Check, tree: Tree, wrong: Mapping[str, object], told: list[str] | None
    ) -> None:
        """No second line says that the same value is required."""
        code, lines = check(merged(tree, wrong))
        assert code == 78
        assert told is None or [line.split(": ")[1] for line in lines] == told
        assert not [line for line in lines if "required" in line]

    def test_problems_come_before_notes(self, check: Check, tree: Tree) -> None:
        """The last line on a terminal is not the one that matters most, but the first is."""
        _, lines = check(merged(tree, {"clients.web.agents": [], "server.deadline": "0s"}))
        assert [line.partition(":")[0] for line in lines] == ["broker", "note"]

    def test_for_machines(self, tmp_path: Path, relay: Tree) -> None:
        """`--json`: the same findings, exit code and order; nothing on standard error."""
        path = write(tmp_path / "broker.toml", toml(merged(relay, WRONG)))
        for command in ("check", "doctor"):
            done = run(command, "--json", "--config", path)
            assert (done.returncode, done.stderr) == (78, b"")
            told = json.loads(done.stdout)
            assert told["ok"] is False
            assert [
                (each["level"], each["key"])
                for each in told["findings"]
                if each["level"] == "problem"
            ][: len(FOUND)] == FOUND
            assert all(each["text"] for each in told["findings"])
        well = write(tmp_path / "well.toml", toml(relay))
        done = run("check", "--json", "--config", well)
        assert (done.returncode, json.loads(done.stdout)) == (0, {"ok": True, "findings": []})

    @pytest.mark.parametrize("command", ["check", "doctor"])
    def test_for_machines_there_is_always_a_document(self, tmp_path: Path, command: str) -> None:
        """Also of a file that cannot be read, or is no TOML."""
        done = run(command, "--json", "--config", f"{tmp_path}/nowhere.toml")
        assert (done.returncode, done.stderr) == (78, b"")
        (told,) = json.loads(done.stdout)["findings"]
        assert told["text"] == (
            f"cannot read {tmp_path}/nowhere.toml: No such file or directory; `broker init` makes"
            " one, --config names another"
        )

    def test_the_doctor_tells_them_too(self, tmp_path: Path, tree: Tree) -> None:
        """1 for what is wrong here, 78 for a configuration that is wrong anywhere."""
        for path in tmp_path.iterdir():
            path.chmod(0o600)
        noted = put(tree, "clients.web.agents", [])
        path = write(tmp_path / "noted.toml", toml(noted))
        done = run("doctor", "--config", path)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.startswith(b"note     clients.web.agents: empty, so this client gets no")
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = put(tree, "server.listen", f"127.0.0.1:{other.getsockname()[1]}")
            done = run("doctor", "--config", write(tmp_path / "taken.toml", toml(taken)))
        assert (done.returncode, done.stderr) == (1, b"")
        assert done.stdout.startswith(b"problem  server.listen: cannot listen on 127.0.0.1:")
        wrong = write(tmp_path / "wrong.toml", toml(put(tree, "server.deadline", "0s")))
        done = run("doctor", "--config", wrong)
        assert done.returncode == 78
        assert done.stdout.startswith(b"problem  server.deadline: must be longer than 0\n")
        assert b"\nok       clients.web.secret_file: " in done.stdout  # it goes on


EXPECTED = re.compile(
    r"note: .*( is not here; it must be where the broker runs| of the environment counts, not the"
    r" file|there is no folder /var/lib/embed-token-broker; .*)"
)
"""What is said of any good file that was checked elsewhere than it is to run."""

NOWHERE = {"BROKER_SERVER__LISTEN": "127.0.0.1:0", "BROKER_ADMIN__LISTEN": "127.0.0.1:0"}
"""So that whoever listens on this machine is not found."""


def unexpected(text: str, folder: Path, variables: Mapping[str, str]) -> list[str]:
    """Return what `check` says of a configuration that nobody should have to read."""
    path = write(folder / "shipped.toml", text)
    done = run("check", "--config", path, **variables)
    lines = [line for line in done.stderr.decode().splitlines() if not EXPECTED.fullmatch(line)]
    return lines if done.returncode == 0 else [f"exit {done.returncode}", *lines]


class TestShippedFiles:
    """`check` has nothing to say of any of them but what an example is meant to do."""

    @pytest.mark.parametrize(
        "path",
        sorted((ROOT / "config").rglob("*.toml")),
        ids=lambda path: str(path.relative_to(ROOT / "config")),
    )
    def test_are_clean(self, path: Path, tmp_path: Path) -> None:
        """As it is; beside a unit with what one of the units hands over."""
        text = re.sub(r"sqlite:///\S+(?=/state\.db)", f"sqlite://{tmp_path}", path.read_text())
        handed = "/run/credentials/embed-token-broker.service"
        given = handed_over(text, handed, tmp_path) if handed in text else {}
        notes = unexpected(text.replace(handed, str(tmp_path)), tmp_path, given)
        meant = ["note: store.url: state is in memory"] if path.parent.name == "example" else []
        assert [note.partition(",")[0] for note in notes] == meant

    def test_are_clean_in_manifests(self, tmp_path: Path) -> None:
        """Of Kubernetes: configuration files, and what variables configure."""
        resources = [
            resource
            for path in sorted((ROOT / "config" / "kubernetes").rglob("*.yaml"))
            for resource in yaml.safe_load_all(path.read_text(encoding="utf-8"))
            if resource
        ]
        files = [
            text
            for resource in resources
            if resource["kind"] == "ConfigMap"
            for name, text in resource["data"].items()
            if name.endswith(".toml")
        ]
        assert files
        for text in files:
            assert unexpected(text, tmp_path, {}) == []
        variables = [dict(found) for resource in resources if (found := list(given_in(resource)))]
        for each in variables:
            if any(name.endswith("__SECRET_FILES") or "__KIND" in name for name in each):
                assert unexpected("", tmp_path, each) == []


def handed_over(text: str, handed: str, folder: Path) -> dict[str, str]:
    """Make what a unit hands over; returns the variables of its processes."""
    for name in re.findall(rf'"{handed}/(\w+)"', text):
        secret_file(folder / name)
    return {**NOWHERE, "CREDENTIALS_DIRECTORY": str(folder)}


def given_in(node: Any) -> Iterator[tuple[str, str]]:
    """Yield the broker's variables of the containers in a resource."""
    if isinstance(node, list):
        for each in node:
            yield from given_in(each)
    elif isinstance(node, dict):
        if str(node.get("name", "")).startswith("BROKER_") and "value" in node:
            yield node["name"], node["value"]
        for each in node.values():
            yield from given_in(each)
