"""Files that are named by a configuration: none of them holds up a start, whatever it is."""

import errno
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, get_args, get_origin

import pytest
from msgspec import Struct
from processes import AGENT, TIMEOUT, Tree, environment, good, merged, put, run, toml, write
from servers import write_certificates

from broker.app import factory
from broker.cli.healthcheck import where
from broker.config import files, schema
from broker.config import load as config
from broker.config.files import CannotRead
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.issuers import keyfile
from broker.sqlite import location

Maker = Callable[[Path], object]


def _socket(path: Path) -> None:
    """Leave the file of a socket behind."""
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def _unreadable(path: Path) -> None:
    path.touch(mode=0)


KINDS: dict[str, tuple[Maker, str]] = {
    "pipe": (os.mkfifo, "a pipe; name a regular file"),
    "folder": (Path.mkdir, "a directory; name a file in it"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "a device; name a regular file"),
    "terminal": (lambda path: path.symlink_to("/dev/ptmx"), "a device; name a regular file"),
    "socket": (_socket, "a socket; name a regular file"),
    "large": (
        lambda path: path.write_bytes(b"x" * 2 * files.MAX_FILE),
        "more than 1 MiB; name a file that holds nothing else",
    ),
    "absent": (lambda _path: None, "No such file or directory"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
    "circular": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "unreadable": (
        _unreadable,
        (
            "Permission denied; let the broker's user read it, or let the unit hand it over"
            " (LoadCredential)"
        ),
    ),
}
"""What may lie under a path, and what is said of it."""

SERVED = {
    "clients.web.secret_file": {},
    "clients.web.next_secret_file": {},
    "admin.secret_file": {},
    "issuer.local.keys.one.secret_file": {},
    "issuer.local.keys_file": {"issuer.local.keys": {}},
    "issuer.upstream.api_secret_files": {"issuer.kind": "upstream"},
    "issuer.upstream.proxy_file": {"issuer.kind": "upstream"},
    "store.encryption_key_file": {},
    "store.password_file": {"store.url": "valkeys://h"},
    "store.tls_ca_file": {"store.url": "valkeys://h"},
    "store.tls_cert_file": {"store.url": "valkeys://h"},
    "store.tls_key_file": {"store.url": "valkeys://h"},
}
"""Each setting that names a file to be read, and what it needs beside it."""


def naming(folder: Path, setting: str, file: str) -> Tree:
    """Return a configuration that is good but for this file."""
    tree = merged(good(folder), SERVED[setting])
    if "store.url" in SERVED[setting]:
        tree = put(tree, "store.encryption_key", secrets.token_urlsafe(32))
    if setting == "store.tls_key_file":
        write_certificates(folder)
        tree = put(tree, "store.tls_cert_file", str(folder / "server.crt"))
    if setting == "issuer.upstream.proxy_file":
        tree = put(tree, "issuer.upstream.api_secret", secrets.token_urlsafe(24))
    if setting == "issuer.upstream.api_secret_files":
        return put(tree, setting, [file])
    return put(tree, setting, file)


@contextmanager
def unprivileged(path: Path) -> Iterator[None]:
    """Keep root from reading one file, as the system keeps others."""
    really = os.open

    def refuse(name: str | Path, *arguments: Any) -> int:
        if Path(name) == path and not stat.S_IMODE(path.lstat().st_mode):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return really(name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", refuse)
        yield


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fail what waits for ever, as to open a pipe does."""

    def fail(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _settings_of_files(kind: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every setting that names a file."""
    kind = schema.bare(kind)
    if get_origin(kind) is not None and not isinstance(kind, type):
        kind = get_args(kind)[-1]
    for name, inner in schema.fields_of(kind).items():
        bare = schema.bare(inner)
        if name.endswith(("_file", "_files")):
            yield path + name
        elif isinstance(bare, type) and issubclass(bare, Struct):
            yield from _settings_of_files(bare, f"{path}{name}.")
        elif get_args(bare):
            entry = {"clients": "web", "keys": "one"}.get(name, "*")
            yield from _settings_of_files(get_args(bare)[-1], f"{path}{name}.{entry}.")


def test_every_setting_that_names_a_file_is_tried_here() -> None:
    """A new one joins the list; the state file, which a URL names, has its own test below."""
    assert set(_settings_of_files(Settings)) == {*SERVED}


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SERVED)
def test_G12_what_is_no_regular_file_is_refused_by_every_setting(
    tmp_path: Path, setting: str, kind: str
) -> None:
    """At once, in one line: the setting, the path, the rule and what to do."""
    make, told = KINDS[kind]
    path = tmp_path / "named"
    make(path)
    settings = config.from_tree(naming(tmp_path, setting, str(path)))
    with unprivileged(path), pytest.raises(ConfigError) as caught:
        factory.check(settings, {})
    expected = f"{setting}: cannot read {path}: {told}"
    if setting == "issuer.local.keys_file" and told.startswith("No such"):
        expected += "; make it with `broker keys rotate`"
    assert str(caught.value) == expected


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_refused_as_a_configuration(tmp_path: Path, kind: str) -> None:
    """The start says so; the health check, which may not end a broker for it, asks the usual."""
    make, told = KINDS[kind]
    path = tmp_path / "named"
    make(path)
    with unprivileged(path):
        with pytest.raises(ConfigError) as caught:
            config.load(path, {}, {})
        assert where(None, {}, path) == "127.0.0.1:9464"
    remedy = "; `broker init` makes one, --config names another"
    absent = remedy if kind in {"absent", "dangling"} else ""
    assert str(caught.value) == f"cannot read {path}: {told}{absent}"


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in {"large", "absent"}])
def test_D5_what_is_no_regular_file_is_no_state_file(tmp_path: Path, kind: str) -> None:
    """A link is none either: whoever may write the folder would choose what is opened."""
    make, _ = KINDS[kind]
    path = tmp_path / "named"
    make(path)
    with unprivileged(path), pytest.raises(ConfigError) as caught:
        location.require_usable(path)
    assert str(caught.value).startswith("store.url: ")
    assert os.path.lexists(path)


@pytest.mark.usefixtures("in_time")
def test_keys_are_not_turned_in_what_is_no_regular_file(tmp_path: Path) -> None:
    """It stays what it is."""
    path = tmp_path / "keys"
    os.mkfifo(path)
    with pytest.raises(CannotRead, match="a pipe"):
        keyfile.edit(path, lambda entries: entries)
    assert path.is_fifo()


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.usefixtures("in_time")
def test_what_becomes_a_pipe_after_the_look_is_refused_when_it_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mounts are swapped at any moment; no descriptor is left behind."""
    path = tmp_path / "named"
    path.touch()
    really = os.open

    def swap(*arguments: Any) -> int:
        path.unlink()
        os.mkfifo(path)
        return really(*arguments)

    monkeypatch.setattr(os, "open", swap)
    before = _descriptors()
    with pytest.raises(CannotRead, match="a pipe; name a regular file"):
        files.read(path)
    assert _descriptors() == before


def test_the_bound_is_the_last_size_that_is_read(tmp_path: Path) -> None:
    """Exactly so many bytes are read whole, whatever the size that the system tells."""
    path = tmp_path / "named"
    path.write_bytes(b"x" * files.MAX_FILE)
    assert files.read(path) == path.read_bytes()
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(CannotRead, match="more than 1 MiB"):
        files.read(path)
    assert files.read(Path("/proc/self/cmdline")) == Path("/proc/self/cmdline").read_bytes()


def test_links_are_followed_as_mounted_secrets_need(tmp_path: Path) -> None:
    """`..data` and the name are links, the file is regular."""
    (tmp_path / "..1").mkdir()
    (tmp_path / "..1" / "web").write_text("secret", encoding="utf-8")
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "web").symlink_to("..data/web")
    assert files.read(tmp_path / "web") == b"secret"


def test_the_null_device_is_an_empty_file() -> None:
    """As a configuration it says that there is none, not even the packaged one."""
    assert files.read(os.devnull) == b""


COMMANDS = [
    (["serve"], 78),
    (["check"], 78),
    (["doctor"], 78),
    (["config", "show"], 78),
    (["keys", "list"], 78),
    (["keys", "rotate"], 78),
    (["store", "acl"], 78),
    (["verify"], 78),
    (["mint", AGENT, "--fingerprint", "ab" * 16], 78),
    (["healthcheck"], 1),
]
"""Every command that reads a configuration, and its exit code for one that cannot be used."""


@pytest.mark.parametrize(
    ("command", "code"), COMMANDS, ids=[" ".join(words[:2]) for words, _ in COMMANDS]
)
def test_every_command_ends_in_time_where_the_configuration_is_a_pipe(
    tmp_path: Path, command: list[str], code: int
) -> None:
    """With its exit code and one line."""
    path = tmp_path / "broker.toml"
    os.mkfifo(path)
    done = run(*command, "--config", str(path))
    assert (done.returncode, done.stdout) == (code, b"")
    told = f"broker: cannot read {path}: a pipe; name a regular file\n".encode()
    assert done.stderr == told or code == 1


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("serve", 78),
        ("serve --workers 2", 78),
        ("check", 78),
        ("doctor", 78),
        ("keys list", 78),
        ("keys rotate", 1),
        ("verify", 78),
    ],
)
def test_every_command_ends_in_time_where_a_key_file_is_a_pipe(
    tmp_path: Path, command: str, code: int
) -> None:
    """With its exit code and one line."""
    keys = tmp_path / "keys"
    os.mkfifo(keys)
    store = {"url": "valkey://127.0.0.1:1", "encryption_key": secrets.token_urlsafe(32)}
    tree = put(naming(tmp_path, "issuer.local.keys_file", str(keys)), "store", store)
    path = write(tmp_path / "broker.toml", toml(tree))
    done = run(*command.split(), "--config", path)
    setting = b"" if code == 1 else b"issuer.local.keys_file: "
    told = b"%scannot read %s: a pipe; name a regular file\n" % (setting, str(keys).encode())
    if command == "doctor":  # it goes on: its findings are its output
        assert (done.returncode, done.stderr) == (code, b"")
        assert done.stdout.startswith(b"problem  " + told)
    else:
        assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"broker: " + told)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unreadable"])
def test_G12_the_start_ends_in_time_whatever_a_secret_file_is(tmp_path: Path, kind: str) -> None:
    """Exit code 78: who restarts the broker need not kill it before."""
    make, told = KINDS[kind]
    make(tmp_path / "named")
    tree = naming(tmp_path, "clients.web.secret_file", str(tmp_path / "named"))
    done = run("serve", "--config", write(tmp_path / "broker.toml", toml(tree)))
    line = f"broker: clients.web.secret_file: cannot read {tmp_path / 'named'}: {told}\n"
    assert (done.returncode, done.stdout, done.stderr) == (78, b"", line.encode())


def test_the_start_ends_in_time_where_a_secret_file_is_unreadable(tmp_path: Path) -> None:
    """Also as root, who may read everything but what the kernel does not give."""
    tree = naming(tmp_path, "clients.web.secret_file", "/proc/self/mem")
    done = run("serve", "--config", write(tmp_path / "broker.toml", toml(tree)))
    told = b"broker: clients.web.secret_file: cannot read /proc/self/mem: Input/output error\n"
    assert (done.returncode, done.stdout, done.stderr) == (78, b"", told)


def test_a_token_without_an_end_is_none(tmp_path: Path) -> None:
    """`verify` reads as much of standard input as may be a token."""
    path = write(tmp_path / "broker.toml", toml(good(tmp_path)))
    with Path("/dev/zero").open("rb") as endless:
        done = subprocess.run(
            [sys.executable, "-m", "broker", "verify", "--config", path],
            stdin=endless,
            capture_output=True,
            env=environment(),
            timeout=TIMEOUT,
            check=False,
        )
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"not valid: ")
