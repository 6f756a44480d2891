"""What `broker init` writes: a configuration, its secrets, a unit for systemd; and what comes next.

Knows texts and files; asks nobody.  Secrets are never written over: one that is lost cannot be had
again, and somebody may use it.
"""

import json
import os
import secrets
import shlex
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from broker.cli import probe
from broker.cli.example import UNIT, text_of
from broker.config.load import DEFAULT_PATH
from broker.config.validate import parse_address
from broker.model import Secret

SYSTEM_STATE = Path("/var/lib/embed-token-broker")
"""Where the unit keeps state; a configuration in its usual place keeps it there, too."""

OWN_SECRET = {"relay": "vendor", "signer": "signing"}
"""Name of the secret that only one kind has: what it gets tokens with."""

_VARIABLES = {
    "vendor": "BROKER_ISSUER__UPSTREAM__API_SECRET_FILES",
    "signing": "BROKER_ISSUER__LOCAL__KEYS__MAIN__SECRET_FILE",
    "web": "BROKER_CLIENTS__WEB__SECRET_FILE",
    "admin": "BROKER_ADMIN__SECRET_FILE",
}
"""Which variable names each secret to a service, for which the unit has made a copy: NAME of the
folder is secret_NAME of its credentials (%d)."""

EXAMPLE_AGENT = "A78WKV4515"
"""Agent of the first token, where all are permitted."""


class Answers(Struct, frozen=True):
    """What is to be made; `vendor_key` is None for a signer, or if it is there already."""

    kind: str
    folder: Path
    agent: str
    listen: str
    admin_listen: str
    base_url: str | None = None
    vendor_key: Secret | None = None

    @property
    def secrets(self) -> Path:
        """The folder of the secrets."""
        return self.folder / "secrets"

    @property
    def state(self) -> Path:
        """The folder of the state file."""
        return SYSTEM_STATE if self._is_usual else self.folder / "state"

    @property
    def file(self) -> Path:
        """The configuration."""
        return self.folder / DEFAULT_PATH.name

    @property
    def unit(self) -> Path:
        """The unit, to be copied."""
        return self.folder / UNIT

    @property
    def flag(self) -> list[str]:
        """What tells a command which configuration is meant."""
        return [] if self._is_usual else ["--config", str(self.file)]

    @property
    def _is_usual(self) -> bool:
        return self.file == DEFAULT_PATH

    def secret_files(self) -> dict[Path, str]:
        """Return each secret's file, and what it is for."""
        own = OWN_SECRET[self.kind]
        return {
            self.secrets / own: "the vendor's key" if own == "vendor" else "signs tokens",
            self.secrets / "web": "client secret of your backend",
            self.secrets / "admin": "lists and ends sessions",
        }

    def there(self) -> list[Path]:
        """Return what exists already of all that would be written."""
        files = [self.file, self.unit, *self.secret_files()]
        return [path for path in files if os.path.lexists(path)]


def configuration(answers: Answers) -> str:
    """Return the text of the configuration."""
    own = str(answers.secrets / OWN_SECRET[answers.kind])
    lines = [
        "# Made by `broker init`.  `broker config show` prints every setting that is in force;",
        "# `broker check` says what is wrong.",
        "",
        "[server]",
        f"listen = {_toml(answers.listen)}",
        "",
        "[admin]  # /metrics, /readyz; with the secret /v1/sessions",
        f"listen = {_toml(answers.admin_listen)}",
        f"secret_file = {_toml(str(answers.secrets / 'admin'))}",
        "",
        "[clients.web]  # your backend",
        f"secret_file = {_toml(str(answers.secrets / 'web'))}",
        f"agents = [{_toml(answers.agent)}]",
        "",
        "[issuer]",
        f"kind = {_toml('upstream' if answers.kind == 'relay' else 'local')}",
        "",
    ]
    if answers.kind == "relay":
        lines += ["[issuer.upstream]", f"api_secret_files = [{_toml(own)}]"]
        if answers.base_url:
            lines.append(f"base_url = {_toml(answers.base_url)}")
    else:
        lines += ["[issuer.local.keys.main]", f"secret_file = {_toml(own)}"]
    state = f"sqlite://{answers.state / 'state.db'}"
    return "\n".join([*lines, "", "[store]", f"url = {_toml(state)}", ""])


def _toml(text: str) -> str:
    """A string of JSON is one of TOML, too, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def service(answers: Answers, shipped: str) -> str:
    """Return the unit of this configuration: the one that is shipped, with paths of this one.

    All that it has more is variables, which count before the configuration: the service reads
    copies of the secrets, and keeps its state where systemd lets it.
    """
    text = shipped[shipped.index("[Unit]") :]
    text = text.replace("/opt/embed-token-broker/bin/broker", shlex.join(program()))
    text = text.replace(str(DEFAULT_PATH.parent), str(answers.folder))
    named = f"Environment=BROKER_CONFIG={answers.file}\n"
    more = [
        f"Environment={_VARIABLES[path.name]}=%d/secret_{path.name}"
        for path in answers.secret_files()
    ]
    if answers.state != SYSTEM_STATE:
        more.append(f"Environment=BROKER_STORE__URL=sqlite://{SYSTEM_STATE}/state.db")
    text = text.replace(named, "\n".join([named.rstrip("\n"), *more, ""]))
    return f"# Made by `broker init` of the unit that `broker config example` prints.\n{text}"


def program() -> list[str]:
    """Return the words by which this program can be called from anywhere."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return [sys.executable, "-m", "broker"]
    return [str(called.absolute())]


def write(answers: Answers) -> Iterator[str]:
    """Write everything; yields a line for each file.  Raises OSError.

    Configuration and unit are replaced, secrets that are there are kept.
    """
    _make(answers.folder, 0o755)
    _make(answers.secrets, 0o700)
    _make(answers.state, 0o700)
    width = len(str(answers.unit))
    for path, use in answers.secret_files().items():
        given = answers.vendor_key if path.name == "vendor" else None
        secret = given.reveal() if given else secrets.token_urlsafe(32)
        verb = "wrote" if _create(path, secret) else "kept "
        yield f"{verb}  {path!s:{width}}  {use}"
    _replace(answers.file, configuration(answers))
    yield f"wrote  {answers.file!s:{width}}  configuration"
    _replace(answers.unit, service(answers, text_of(UNIT)))
    yield f"wrote  {answers.unit}  unit for systemd"


def _make(folder: Path, mode: int) -> None:
    """Make a folder with this mode, whatever the umask; one that is there stays as it is."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True)
    folder.chmod(mode)


def _create(path: Path, secret: str) -> bool:
    """Write a secret for its owner only; False if there is one."""
    with suppress(FileExistsError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(f"{secret}\n")
        except OSError:  # half a secret would be kept the next time
            path.unlink(missing_ok=True)
            raise
        return True
    if not stat.S_ISREG(path.stat().st_mode):
        raise FileExistsError(0, "not a regular file", str(path))
    return False


def _replace(path: Path, text: str) -> None:
    """Put a file in place at once; the broker's user, who is not its owner, reads it.

    Made under a name that nobody has: a link that somebody put there would be written through.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    new = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(handle, 0o644)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def next_steps(answers: Answers) -> str:
    """Return the commands that lead to a first token."""
    broker = program()
    agent = EXAMPLE_AGENT if answers.agent == "*" else answers.agent
    url = f"--url {shlex.quote(_url(answers.listen))} --fingerprint 9f86d081884c7d65"
    secret = shlex.quote(str(answers.secrets / "web"))
    unit = shlex.quote(str(answers.unit))
    return f"""\
next:
  {shlex.join([*broker, "check", *answers.flag])}
  {shlex.join([*broker, "serve", *answers.flag])}
and in another terminal, for a first token:
  BROKER_API_SECRET=$(cat {secret}) {shlex.join([*broker, "mint", agent])} {url}
as a service, instead of `serve`:
  sudo cp {unit} /etc/systemd/system/
  sudo systemctl daemon-reload && sudo systemctl enable --now embed-token-broker"""


def _url(listen: str) -> str:
    """Return where a broker that listens so is asked from its own host."""
    where = parse_address(listen)
    if isinstance(where, str):
        return f"unix:{where}"
    host, *_ = probe.ASKED_AT.get(where[0], (where[0],))
    return f"http://[{host}]:{where[1]}" if ":" in host else f"http://{host}:{where[1]}"


def hidden(answers: Answers) -> list[str]:
    """Return what a service that sees no home directories would look for in one."""
    used = {"program": Path(program()[0]), "configuration": answers.file}
    return [
        f"note: the service does not see {folder}, where its {name} is: put it elsewhere for that"
        for name, path in used.items()
        for folder in (f"/{name}" for name in ("home", "root", "tmp", "var/tmp"))
        if path.is_relative_to(folder)
    ]
