"""A file of signing keys that `broker keys rotate` writes and brokers follow.

The file says when each key begins to sign; everything else follows from the clock.  A key ends when
the next one begins, and verifies until its last token has expired.  So a rotation is one edit:
whoever has the new file turns at the same second, and nothing has to be taken out in time.

    {"keys": [{"kid": "20261127-5f0c", "secret": "...", "signs_from": 1795780000}]}

Edits are safe: one at a time (a lock on the folder), atomic (a new file in place of the old one),
for the owner's eyes only.
"""

import fcntl
import json
import os
import secrets
import tempfile
import time
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from time import gmtime, strftime
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from typing_extensions import override

from broker.config import files
from broker.issuers.keyring import LEEWAY, LIFETIME_SECONDS, NEVER, BadKey, Key
from broker.units import NO_DATE, SECOND

MOST_KEYS = 16
"""A token without `kid` is tried against every key.  One a day leaves two; more are a mistake."""

LOCK_WAIT = 5.0
"""Seconds; an edit takes some milliseconds."""

LOCK_POLL = 0.05
"""Seconds between tries."""

AFTERLIFE = LIFETIME_SECONDS + LEEWAY
"""Seconds that a key verifies after its successor began to sign: the life of its last token, and
the minute by which an expiry is forgiven."""


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """A key as the file has it; `signs_from` is Unix seconds."""

    kid: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    secret: str
    signs_from: Annotated[int, Meta(ge=0, lt=NO_DATE)]

    @override
    def __repr__(self) -> str:
        return f"Entry({self.kid!r})"


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[Entry]


class BadKeyFile(ValueError):
    """A file of keys that cannot be used; the message says why, without quoting a key."""


def read(path: Path) -> list[Entry]:
    """Return the keys of a file, by the moment from which they sign.

    Raises BadKeyFile, files.CannotRead.
    """
    try:
        entries = msgspec.json.decode(files.read(path).removeprefix(BOM_UTF8), type=_File).keys
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        where = str(error).partition(" - at ")[2]
        raise BadKeyFile(f"not written by `broker keys rotate`{where and f' at {where}'}") from None
    if not entries:
        raise BadKeyFile("has no key: `broker keys rotate` makes one")
    return _ordered(entries)


def schedule(entries: Sequence[Entry]) -> list[Key]:
    """Return the keys with the moments at which each begins to sign and ends to verify."""
    return [
        Key(
            entry.kid,
            entry.secret.encode(),
            signs_from=entry.signs_from * SECOND,
            verifies_until=NEVER if later is None else (later.signs_from + AFTERLIFE) * SECOND,
        )
        for entry, later in zip_longest(entries, entries[1:])
    ]


def rotated(entries: Sequence[Entry], now: int, after: int, secret: str) -> list[Entry]:
    """Return the keys with a new one that signs `after` seconds from `now` (Unix seconds).

    Those whose last token has expired are gone.  The first key of all signs at once: there is
    nobody who would have to learn of it first.
    """
    alive = [
        entry
        for entry, key in zip(entries, schedule(entries), strict=True)
        if now * SECOND < key.verifies_until
    ]
    if len(alive) >= MOST_KEYS:
        raise BadKey(f"{MOST_KEYS} keys still verify: wait until the oldest have ended, in an hour")
    kid = f"{strftime('%Y%m%d', gmtime(now))}-{secrets.token_hex(2)}"
    if any(entry.kid == kid for entry in alive):
        return rotated(entries, now, after, secret)
    return _ordered([*alive, Entry(kid, secret, now + after if alive else now)])


def edit(path: Path, change: Callable[[list[Entry]], list[Entry]]) -> list[Entry]:
    """Replace the file by what `change` makes of it; an absent one is empty.  Returns the result.

    Raises BadKeyFile, BadKey, files.CannotRead and OSError with the file as it was.
    """
    if path.is_symlink() and not path.exists():
        raise BadKeyFile("is a link that leads nowhere: make what it leads to, or remove it")
    path = path.resolve()  # a link stays one: what it leads to is replaced
    with _locked(path.parent):
        entries = change(read(path) if path.exists() else [])
        _write(path, entries)
    return entries


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    """Wait for whoever edits at this moment, not for one who holds on: anybody who reads may."""
    ends = time.monotonic() + LOCK_WAIT
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= ends:
                raise BadKeyFile(
                    f"{folder} is locked by another process: see `lslocks`, and try again"
                ) from None
            time.sleep(LOCK_POLL)


def _write(path: Path, entries: Iterable[Entry]) -> None:
    """Write a new file beside the old one, of the same owner, and put it in its place."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(msgspec.to_builtins(_File(list(entries))), file, indent=2)
            file.write("\n")
            if path.exists() and os.geteuid() == 0:  # or the broker could no longer read it
                owner = path.stat()
                os.fchown(handle, owner.st_uid, owner.st_gid)
            file.flush()
            os.fsync(handle)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _ordered(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry.signs_from)
