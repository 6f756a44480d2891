"""The commands that look at signing keys and turn them; no secret is ever printed."""

import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from time import gmtime, strftime

from broker.app import factory
from broker.config import files
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.issuers import keyfile
from broker.issuers.keyring import NEVER, BadKey, Key, Keyring
from broker.units import SECOND


class CannotRotate(Exception):
    """The keys are as they were; the message says why and what to do."""


def rotate(settings: Settings, after: int, *, drop_old: bool) -> list[str]:
    """Add a key that signs `after` seconds from now; returns the lines that say so.

    `drop_old` is for a key that somebody has seen: the new one signs at once, and whatever the old
    ones signed is not good any more.
    """
    local = settings.issuer.local
    if local.keys_file is None:
        raise ConfigError(
            "issuer.local.keys_file: not set; `broker keys rotate` edits that file, keys of"
            " [issuer.local.keys] are yours to edit"
        )
    now, secret = int(time.time()), secrets.token_urlsafe(32)

    def change(entries: list[keyfile.Entry]) -> list[keyfile.Entry]:
        return keyfile.rotated([] if drop_old else entries, now, after, secret)

    try:
        entries = keyfile.edit(Path(local.keys_file), change)
    except files.CannotRead as error:
        raise CannotRotate(str(error)) from None
    except OSError as error:
        raise CannotRotate(f"cannot write {local.keys_file}: {error.strerror}") from None
    except (keyfile.BadKeyFile, BadKey) as error:
        raise CannotRotate(f"{local.keys_file}: {error}") from None
    return list(_table(Keyring(keyfile.schedule(entries)), now))


def listing(settings: Settings) -> list[str]:
    """Return a line for each key, whatever configures it."""
    return list(_table(factory.keyring(settings), int(time.time())))


def _table(ring: Keyring, now: int) -> Iterator[str]:
    signing = ring.signing(now * SECOND)
    for key in ring.keys:
        yield f"{key.kid:24}{_state(key, signing, now)}"


def _state(key: Key, signing: str, now: int) -> str:
    if key.kid == signing:
        return "signs" if key.verifies_until == NEVER else f"signs; {_until(key)}"
    if now * SECOND < key.signs_from < NEVER:
        return f"verifies; signs from {_date(key.signs_from)}"
    if now * SECOND >= key.verifies_until:
        return f"ended {_date(key.verifies_until)}"
    return "verifies" if key.verifies_until == NEVER else _until(key)


def _until(key: Key) -> str:
    return f"verifies until {_date(key.verifies_until)}"


def _date(us: int) -> str:
    return strftime("%Y-%m-%d %H:%M:%S UTC", gmtime(us // SECOND))
