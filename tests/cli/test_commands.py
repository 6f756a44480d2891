"""What commands make of flags, variables and files, in this process: no shell, no listener."""

import argparse
import secrets
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Tree, good, merged, put, toml, write
from structlog.testing import capture_logs

from broker.cli import base, config, serve
from broker.config import state_folder
from broker.config.load import VENDOR_VARIABLES, Examined, from_tree
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.process import serve as serving_process

PROXIES = ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment that says nothing, and no packaged file."""
    for name in ("BROKER_CONFIG", *VENDOR_VARIABLES, *PROXIES, "STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("broker.config.load.DEFAULT_PATH", tmp_path / "packaged.toml")
    monkeypatch.setenv("HOME", str(tmp_path))


def of_serve(**given: Any) -> argparse.Namespace:
    """Make the arguments of `broker serve`."""
    flags = {"config": None, "dev": False, "listen": None, "admin_listen": None, "workers": None}
    return argparse.Namespace(**{**flags, **given})


class Served:
    """Stands in for the process that would serve."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.settings: list[Settings] = []
        self.load: Callable[[], Settings] | None = None
        self.dev: bool | None = None
        patch.setattr(serving_process, "serve", self._serve)
        patch.setattr("broker.telemetry.logs.configure", self._configure)
        patch.setattr(signal, "pthread_sigmask", self._mask)
        self.masks: list[object] = []
        self._configured = 0

    def _configure(self, _: object) -> None:
        self._configured += 1

    def _mask(self, how: int, numbers: object) -> None:
        self.masks.append((how, numbers, self._configured))

    def _serve(self, settings: Settings, load: Callable[[], Settings], *, dev: bool) -> int:
        self.settings.append(settings)
        self.load, self.dev = load, dev
        return 7

    def again(self) -> Settings:
        """Read the settings as a reload does."""
        assert self.load is not None
        return self.load()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """A process that is told to serve, and does not."""
    return Served(monkeypatch)


class TestServe:
    def test_flags_go_before_variables_and_those_before_the_file(
        self, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At the start and at each reload; a variable that a flag beats is not told of."""
        tree = merged(good(tmp_path), {"server.deadline": "5s", "server.docs": False})
        path = write(tmp_path / "broker.toml", toml(tree))
        monkeypatch.setenv("BROKER_SERVER__LISTEN", "127.0.0.1:1")
        monkeypatch.setenv("BROKER_SERVER__DEADLINE", "6s")
        with capture_logs() as told:
            code = serve.run(of_serve(config=path, listen="127.0.0.1:2", admin_listen="unix:/a"))
            again = served.again()
        (settings,) = served.settings
        assert (code, served.dev) == (7, False)
        for each in (settings, again):
            assert (each.server.listen, each.admin.listen) == ("127.0.0.1:2", "unix:/a")
            assert each.server.deadline.seconds == 6
            assert each.server.workers == 1
        replaced = [event for event in told if event["event"] == "broker.file_overridden"]
        assert [event["variables"] for event in replaced] == [
            {"server.deadline": "BROKER_SERVER__DEADLINE"}
        ] * 2

    def test_a_hang_up_waits_for_the_start(self, served: Served, tmp_path: Path) -> None:
        """It is blocked first of all: its handler comes with the loop."""
        path = write(tmp_path / "broker.toml", toml(good(tmp_path)))
        serve.run(of_serve(config=path))
        assert served.masks == [(signal.SIG_BLOCK, {signal.SIGHUP}, 0)]

    def test_a_reload_reads_the_file_anew(self, served: Served, tmp_path: Path) -> None:
        """And raises what is wrong with it."""
        tree = good(tmp_path)
        path = write(tmp_path / "broker.toml", toml(tree))
        serve.run(of_serve(config=path))
        write(Path(path), toml(put(tree, "server.deadline", "9s")))
        assert served.again().server.deadline.seconds == 9
        write(Path(path), toml(put(tree, "server.deadline", "0s")))
        with pytest.raises(ConfigError):
            served.again()

    @pytest.mark.parametrize("how", ["flag", "variable", "packaged"])
    def test_development_mode_reads_a_file_that_is_named(
        self, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """And never the packaged one, which is for production."""
        name = "packaged.toml" if how == "packaged" else "other.toml"
        path = write(tmp_path / name, toml({"server": {"deadline": "9s"}}))
        if how == "variable":
            monkeypatch.setenv("BROKER_CONFIG", path)
        serve.run(of_serve(dev=True, config=path if how == "flag" else None))
        (settings,) = served.settings
        assert (settings.server.deadline.seconds == 9) is (how != "packaged")
        assert (served.dev, settings.server.docs) == (True, True)
        assert served.again().clients["dev"].secret == settings.clients["dev"].secret

    @pytest.mark.parametrize(
        ("kind", "dev", "unused"),
        [
            ("upstream", False, ["issuer.local.keys"]),
            ("upstream", True, []),
            ("local", False, ["issuer.upstream.api_secret_files"]),
            ("local", True, ["issuer.upstream.api_secret_files"]),
        ],
    )
    def test_keys_of_the_issuer_that_is_not_in_use_are_told(
        self, served: Served, tmp_path: Path, kind: str, *, dev: bool, unused: list[str]
    ) -> None:
        """Unless development mode made them."""
        tree: Tree = merged(
            good(tmp_path),
            {
                "issuer.kind": kind,
                "issuer.upstream.api_secret_files": [write(tmp_path / "vendor", "x" * 40)],
            },
        )
        path = write(tmp_path / "broker.toml", toml(tree))
        with capture_logs() as told:
            serve.run(of_serve(config=path, dev=dev))
        assert [event["key"] for event in told if event["event"] == "broker.key_unused"] == unused
        assert len(served.settings) == 1

    @pytest.mark.parametrize("dev", [False, True])
    def test_a_variable_that_is_not_read_is_told(
        self, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, dev: bool
    ) -> None:
        """With the name that would be: who sets a limit that is none sees no other sign."""
        monkeypatch.setenv("BROKER_SERVER_LISTEN", "127.0.0.1:1")
        with capture_logs() as told:
            serve.run(of_serve(config=write(tmp_path / "b.toml", toml(good(tmp_path))), dev=dev))
        event = {"event": "broker.variable_not_read", "log_level": "warning"}
        names = {"variable": "BROKER_SERVER_LISTEN", "write": "BROKER_SERVER__LISTEN"}
        assert told == [{**event, **names}]
        assert len(served.settings) == 1

    def test_the_folder_of_the_default_file_is_made(self, served: Served, tmp_path: Path) -> None:
        """For its owner only; no other folder is."""
        default = state_folder.default_path({"HOME": str(tmp_path)})
        other = tmp_path / "elsewhere" / "state.db"
        for file in (default, other):
            tree = put(good(tmp_path), "store.url", f"sqlite://{file}")
            serve.run(of_serve(config=write(tmp_path / "broker.toml", toml(tree))))
        assert stat.S_IMODE(default.parent.stat().st_mode) == 0o700
        assert not other.parent.exists()


class TestSettings:
    """What a command goes by where no file is named."""

    def found(self) -> Examined:
        return base.examined(argparse.Namespace(config=None))

    def test_without_anything_there_are_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A variable that is no setting of ours configures nothing."""
        monkeypatch.setenv("BROKER_PORT", "tcp://10.0.0.1:80")
        with pytest.raises(ConfigError, match="no configuration"):
            self.found()
        monkeypatch.setenv("BROKER_SERVER__DEADLINE", "9s")
        settings = self.found().settings
        assert (settings.server.deadline.seconds, settings.issuer.kind) == (9, "local")

    @pytest.mark.parametrize("variable", VENDOR_VARIABLES)
    def test_a_vendor_s_key_makes_a_relay(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
    ) -> None:
        """With a state file, and every route of the vendor; unless another issuer is chosen."""
        monkeypatch.setenv(variable, secrets.token_urlsafe(30))
        settings = self.found().settings
        file = tmp_path / ".local/state" / state_folder.NAME / state_folder.FILE
        assert settings.store.url == f"sqlite://{file}"
        assert settings.issuer.kind == "upstream"
        assert settings.issuer.upstream.pass_through == base.ALL_ROUTES
        monkeypatch.setenv("BROKER_ISSUER__KIND", "local")
        found = self.found()
        assert (found.settings.issuer.upstream.pass_through, found.problems) == ((), [])

    def test_the_packaged_file_goes_before_a_vendor_s_key(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """It says what the operator wants."""
        write(tmp_path / "packaged.toml", toml({"server": {"deadline": "9s"}}))
        monkeypatch.setenv(VENDOR_VARIABLES[0], secrets.token_urlsafe(30))
        settings = self.found().settings
        assert (settings.server.deadline.seconds, settings.issuer.kind) == (9, "local")


@pytest.mark.parametrize(
    ("tree", "environ", "notes"),
    [
        ({"issuer.local.keys.one.secret_file": "/one"}, {}, {"issuer.local.signing_key": "one"}),
        (
            {"issuer.local.keys.one.secret_file": "/one", "issuer.local.signing_key": "one"},
            {},
            {},
        ),
        (
            {
                "issuer.local.keys.one.secret_file": "/one",
                "issuer.local.keys.two.secret_file": "/two",
            },
            {},
            {},
        ),
        ({}, {VENDOR_VARIABLES[0]: "k"}, {}),
        (
            {"issuer.kind": "upstream"},
            {VENDOR_VARIABLES[1]: "k"},
            {"issuer.upstream.api_secret": VENDOR_VARIABLES[1]},
        ),
        (
            {"issuer.kind": "upstream"},
            dict.fromkeys(VENDOR_VARIABLES, "k"),
            {"issuer.upstream.api_secret": VENDOR_VARIABLES[0]},
        ),
        (
            {"issuer.kind": "upstream", "issuer.upstream.api_secret_files": ["/k"]},
            {VENDOR_VARIABLES[0]: "k"},
            {},
        ),
        (
            {"issuer.kind": "upstream", "issuer.upstream.api_secret": "k" * 20},
            {VENDOR_VARIABLES[0]: "k"},
            {},
        ),
        (
            {"issuer.kind": "upstream"},
            {"HTTPS_PROXY": "http://proxy:3128"},
            {"issuer.upstream.proxy": "HTTPS_PROXY"},
        ),
        ({}, {"HTTPS_PROXY": "http://proxy:3128"}, {}),
        (
            {"issuer.kind": "upstream", "issuer.upstream.proxy": "http://own:3128"},
            {"HTTPS_PROXY": "http://proxy:3128"},
            {},
        ),
    ],
)
def test_shown_is_what_is_used_for_keys_that_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
    tree: dict[str, object],
    environ: dict[str, str],
    notes: dict[str, str],
) -> None:
    """By key, what counts instead is named; nothing is said of a key that is there."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    said = config._resolved(from_tree(merged({}, tree)))
    assert said.keys() == notes.keys()
    assert [key for key, word in notes.items() if word not in said[key]] == []


class TestStateFolder:
    """Where the state file is if nobody says."""

    @pytest.mark.parametrize(
        ("environ", "folder"),
        [
            ({"STATE_DIRECTORY": "/s/one:/s/two", "XDG_STATE_HOME": "/x", "HOME": "/h"}, "/s/one"),
            ({"STATE_DIRECTORY": "one", "XDG_STATE_HOME": "/x"}, "/x/embed-token-broker"),
            ({"XDG_STATE_HOME": "x", "HOME": "/h"}, "/h/.local/state/embed-token-broker"),
            ({"HOME": "/h"}, "/h/.local/state/embed-token-broker"),
        ],
    )
    def test_is_the_service_s_or_the_user_s(self, environ: dict[str, str], folder: str) -> None:
        """A path that is relative counts as none."""
        assert state_folder.default_path(environ) == Path(folder) / state_folder.FILE

    def test_that_has_to_be_there_is_the_nearest_that_is(self, tmp_path: Path) -> None:
        """Of the default file; of any other it is the file's own."""
        environ = {"HOME": str(tmp_path)}
        default = state_folder.default_path(environ)
        assert state_folder.existing_folder(default, environ) == tmp_path
        (tmp_path / ".local").mkdir()
        assert state_folder.existing_folder(default, environ) == tmp_path / ".local"
        other = tmp_path / "nowhere" / "state.db"
        assert state_folder.existing_folder(other, environ) == other.parent

    def test_that_cannot_be_made_is_told_later(self, tmp_path: Path) -> None:
        """By whoever opens the file, with the path and the reason."""
        (tmp_path / ".local").write_text("a file")
        environ = {"HOME": str(tmp_path)}
        state_folder.make_folder(state_folder.default_path(environ), environ)
        assert (tmp_path / ".local").is_file()
