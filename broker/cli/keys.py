"""`broker keys ...`: makes signing keys, looks at them and turns them.

No secret is ever printed but one that was just made.
"""

import argparse
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from broker.cli.base import Commands, signing_settings_of, span
from broker.config.schema import ConfigError
from broker.config.settings import Duration, Settings
from broker.exit_codes import EX_NO, EX_OK
from broker.telemetry.streams import complain, tell

if TYPE_CHECKING:
    from broker.issuers.keyfile import Entry


NO_KEYS = "there are no keys here"
"""Of a relay."""


class CannotRotate(Exception):
    """The keys are as they were; the message says why and what to do."""


def add(commands: Commands) -> None:
    """Add the commands."""
    keys = commands.below("keys", "make, list and rotate signing keys")
    generate = keys.add(
        "generate",
        "make a key, 32 random bytes as text",
        run_generate,
        example="--out signing_key",
        codes={EX_NO: "it cannot be written there, or something is there"},
        needs_config=False,
    )
    generate.add_argument(
        "--out",
        metavar="FILE",
        help="write it there (mode 0600, never over a file) instead of printing it",
    )
    text = "show which key signs, and until when others verify"
    keys.add("list", text, run_list, example="--config /etc/embed-token-broker/broker.toml")
    turn = keys.add(
        "rotate",
        "add a key to [issuer.local] keys_file, which will sign",
        run_rotate,
        example="--config /etc/embed-token-broker/broker.toml --after 1m",
        codes={EX_NO: "the file is not one of its own, or cannot be written; nothing has changed"},
    )
    turn.add_argument(
        "--after",
        metavar="SPAN",
        default="10s",
        type=span,
        help="when it signs: once every broker and viewer has the file (default %(default)s)",
    )
    turn.add_argument(
        "--drop-old",
        action="store_true",
        help="the old keys were seen: it signs at once, what they signed is not good any more",
    )


def run_generate(arguments: argparse.Namespace) -> int:
    """Print a new key, or write it into a file that is not there yet."""
    import secrets

    key = secrets.token_urlsafe(32)
    if not arguments.out:
        tell(key)
        return EX_OK
    try:
        handle = os.open(arguments.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(key + "\n")
        except OSError:  # half a key looks like a whole one
            Path(arguments.out).unlink(missing_ok=True)
            raise
    except FileExistsError:
        told = "something is there, and nothing is written over it: name another file"
        complain(f"broker: cannot write {arguments.out}: {told}")
        return EX_NO
    except OSError as error:
        complain(f"broker: cannot write {arguments.out}: {error.strerror}")
        return EX_NO
    return EX_OK


def run_list(arguments: argparse.Namespace) -> int:
    """Print a line for each key."""
    tell("\n".join(listing(signing_settings_of(arguments, NO_KEYS))))
    return EX_OK


def run_rotate(arguments: argparse.Namespace) -> int:
    """Add a key, and print all."""
    settings = signing_settings_of(arguments, NO_KEYS)
    try:
        lines = rotate(settings, arguments.after, drop_old=arguments.drop_old)
    except CannotRotate as error:
        complain(f"broker: {error}")
        return EX_NO
    tell("\n".join(lines))
    return EX_OK


def delay(span: Duration, moment: float) -> int:
    """Return how many seconds after that of `moment` (Unix) the span is over: never sooner.

    The file has whole seconds.
    """
    return math.ceil(moment + span.seconds) - int(moment) if span.us else 0


def rotate(settings: Settings, after: Duration, *, drop_old: bool) -> list[str]:
    """Add a key that signs `after` from now; returns the lines that say so.

    `drop_old` is for a key that somebody has seen: the new one signs at once, and whatever the old
    ones signed is not good any more.
    """
    import secrets

    from broker.cli.key_table import rows
    from broker.config.files import CannotRead
    from broker.issuers import keyfile
    from broker.issuers.keyring import BadKey, Keyring

    local = settings.issuer.local
    if local.keys_file is None:
        raise ConfigError(
            "issuer.local.keys_file: not set; `broker keys rotate` edits that file, keys of"
            " [issuer.local.keys] are yours to edit"
        )
    moment, secret = time.time(), secrets.token_urlsafe(32)
    now, seconds = int(moment), delay(after, moment)

    def change(entries: "list[Entry]") -> "list[Entry]":
        return keyfile.rotated([] if drop_old else entries, now, seconds, secret)

    try:
        entries = keyfile.edit(Path(local.keys_file), change)
    except CannotRead as error:
        raise CannotRotate(str(error)) from None
    except OSError as error:
        raise CannotRotate(f"cannot write {local.keys_file}: {error.strerror}") from None
    except (keyfile.BadKeyFile, BadKey) as error:
        raise CannotRotate(f"{local.keys_file}: {error}") from None
    return list(rows(Keyring(keyfile.schedule(entries)), now))


def listing(settings: Settings) -> list[str]:
    """Return a line for each key, whatever configures it."""
    from broker.app import credentials
    from broker.cli.key_table import rows

    return list(rows(credentials.keyring(settings), int(time.time())))
