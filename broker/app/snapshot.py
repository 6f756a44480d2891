"""A sealed snapshot: what a restart would otherwise forget.

Without it a deploy is an outage: at 106 mints a minute, the visitors of an hour need an hour to be
served again.  The file holds tokens, so it is encrypted and authenticated (ChaCha20-Poly1305,
RFC 8439; its key is derived from the configured one by HKDF-SHA256, RFC 5869), readable by its
owner only, and taken away when it is read: a crash later must not bring back what was spent or
ended in between.

Times in it are spans at the moment of writing; the wall clock says how long ago that was.  The
budget is not in it: a budget starts empty, which is right after any pause.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from secrets import token_bytes

import msgspec
import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from msgspec import Struct
from typing_extensions import override

from broker.config.files import CannotRead, read
from broker.issuers.base import Issuer
from broker.model import Clock, EmbedToken, LimitName, Secret, Session
from broker.sessions.memory import MemorySessions
from broker.stores.memory import MemoryStore

log = structlog.get_logger()

_MAGIC = b"embed-token-broker snapshot 4\n"
_NONCE = 12

MAX_SNAPSHOT = 2**31
"""Bytes of a file that may be one: more than the cipher seals at once."""

MAX_CLOCK_SKEW = 60_000_000
"""Microseconds by which a snapshot may seem to come from the future."""


class SnapshotIgnored(Exception):
    """A snapshot that is not used; the message says why."""


class Terms(Struct, frozen=True):
    """What a snapshot has to agree with.

    `origins` name those whose tokens are good: tokens of another issuer, or of a key that was taken
    out, must not come back.
    `max_age` is microseconds; `floor` gives the floor in force for a token of some lifetime, in
    case it was raised in between.
    """

    origins: frozenset[str]
    max_age: int
    floor: Callable[[int], int]


class SnapshotFile:
    """The snapshot of one process: read once at its start, written at its end.

    `issuer` tells whose tokens are good at either moment; `max_age` and `floor` as in `Terms`.
    """

    def __init__(
        self,
        path: Path,
        key: Secret,
        store: MemoryStore,
        book: MemorySessions,
        issuer: Issuer,
        clock: Clock,
        *,
        max_age: int,
        floor: Callable[[int], int],
    ) -> None:
        self._path = path
        self._key = key
        self._store = store
        self._book = book
        self._issuer = issuer
        self._clock = clock
        self._max_age = max_age
        self._floor = floor
        self.restored = False

    def restore(self) -> None:
        """Read the file and take it away; one that cannot be used is told of, and no more."""
        terms = Terms(self._issuer.signer_ids, self._max_age, self._floor)
        try:
            count = load(self._path, self._key, self._store, self._book, self._clock, terms)
        except SnapshotIgnored as reason:
            log.warning("broker.snapshot_ignored", reason=str(reason))
        else:
            self.restored = True
            log.info("broker.snapshot_loaded", tokens=count)

    def save(self) -> None:
        """Write the file; a failure is told of, and no more."""
        origins = self._issuer.signer_ids
        try:
            count = save(self._path, self._key, self._store, self._book, self._clock, origins)
        except OSError as error:
            log.error("broker.snapshot_failed", reason=error.strerror)
        else:
            log.info("broker.snapshot_saved", tokens=count)


class _HeldToken(Struct, frozen=True, array_like=True):
    key: str
    body: bytes
    left: int
    lifetime: int
    mark: int
    origin: int
    """Its place in the list of origins."""

    @override
    def __repr__(self) -> str:
        return f"_HeldToken(left={self.left})"


class _Content(Struct, frozen=True, array_like=True):
    written: int
    origins: list[str]
    tokens: list[_HeldToken]
    buckets: dict[str, dict[str, int]]
    sessions: list[Session]
    ended: dict[str, str]

    @override
    def __repr__(self) -> str:
        return f"_Content(tokens={len(self.tokens)})"


def save(
    path: Path,
    key: Secret,
    store: MemoryStore,
    book: MemorySessions,
    clock: Clock,
    origins: frozenset[str],
) -> int:
    """Seal the store's state into `path`, replacing it atomically; returns the tokens saved.

    `origins` name those whose tokens are good at this moment.
    """
    content = _collect(store, book, clock, sorted(origins))
    nonce = token_bytes(_NONCE)
    plain = msgspec.msgpack.encode(content)
    sealed = _cipher(key).encrypt(nonce, plain, _MAGIC)
    _write(path, _MAGIC + nonce + sealed)
    return len(content.tokens)


def load(
    path: Path, key: Secret, store: MemoryStore, book: MemorySessions, clock: Clock, terms: Terms
) -> int:
    """Restore the state in `path` and remove the file; returns the tokens restored.

    Tokens of a key that was taken out stay out, one by one; ends and buckets come back.  Raises
    SnapshotIgnored, with nothing restored, for a file that is absent, foreign, damaged, too old, or
    has no origin in common with the terms.
    """
    try:
        raw = read(path, MAX_SNAPSHOT, follow=False)
        if not raw.startswith(_MAGIC):
            raise SnapshotIgnored("not a snapshot of this version")
        path.unlink()
    except CannotRead as error:
        reason = "there is none" if error.is_absent else f"cannot be read: {error.reason}"
        raise SnapshotIgnored(reason) from None
    except OSError as error:
        raise SnapshotIgnored(f"cannot be taken away: {error.strerror}") from None
    content = _open(raw, key)
    age = clock.wall() - content.written
    if not -MAX_CLOCK_SKEW <= age <= terms.max_age:
        raise SnapshotIgnored(f"written {age // 1_000_000} s ago: store.snapshot_max_age")
    if terms.origins.isdisjoint(content.origins):
        raise SnapshotIgnored("of another issuer, or of a key that was taken out")
    book.restore(content.sessions, content.ended)
    return _restore(content, store, clock, max(age, 0), terms)


def _collect(
    store: MemoryStore, book: MemorySessions, clock: Clock, origins: list[str]
) -> _Content:
    mono, wall = clock.mono(), clock.wall()
    places = {origin: place for place, origin in enumerate(origins)}
    tokens = [
        _HeldToken(
            key,
            token.body,
            token.left(mono, wall),
            token.lifetime,
            token.mark,
            places[token.origin],
        )
        for key, token in store.tokens.items()
        if token.origin in places and not store.was_ended(key, token)
    ]
    buckets = {name.value: bucket.entries(mono) for name, bucket in store.buckets.items()}
    return _Content(
        written=wall,
        origins=origins,
        tokens=tokens,
        buckets=buckets,
        sessions=list(book.sessions),
        ended=dict(book.marks),
    )


def _restore(content: _Content, store: MemoryStore, clock: Clock, age: int, terms: Terms) -> int:
    mono, wall = clock.mono(), clock.wall()
    for held in content.tokens:
        left = min(held.left, held.lifetime) - age
        origin = content.origins[held.origin]
        if left > 0 and origin in terms.origins:
            store.tokens[held.key] = EmbedToken(
                body=held.body,
                dies_mono=mono + left,
                dies_wall=wall + left,
                lifetime=held.lifetime,
                mark=max(held.mark, terms.floor(held.lifetime)),
                origin=origin,
            )
    for name, entries in content.buckets.items():
        aged = {key: wait - age for key, wait in entries.items()}
        store.buckets[LimitName(name)].restore(aged, mono)
    return len(store.tokens)


def _open(raw: bytes, key: Secret) -> _Content:
    start = len(_MAGIC)
    nonce, sealed = raw[start : start + _NONCE], raw[start + _NONCE :]
    try:
        plain = _cipher(key).decrypt(nonce, sealed, _MAGIC)
        return msgspec.msgpack.decode(plain, type=_Content)
    except (InvalidTag, ValueError, msgspec.DecodeError):
        raise SnapshotIgnored("damaged, or sealed with another key") from None


def _cipher(key: Secret) -> ChaCha20Poly1305:
    derived = HKDF(SHA256(), 32, salt=None, info=_MAGIC).derive(key.reveal().encode())
    return ChaCha20Poly1305(derived)


def _write(path: Path, data: bytes) -> None:
    """Write for the owner only; a crash leaves the old file or the new one, never half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
