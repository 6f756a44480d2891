"""SQLite, and the only place that knows it: one table of sealed rows, appended and dropped.

The log is written ahead (WAL) and the file is locked for this process (`locking_mode`), so no
memory is shared with another.  A commit of mints is in the hands of the system when it returns: it
outlives the process.  One of ends is on the disk (`synchronous=FULL`): it outlives the machine.

A file that is damaged is moved aside as a whole, be it one byte of it: a row that does not open
could have been an end, and without it the session would be good again.
"""

import contextlib
import errno
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from typing_extensions import override

from broker.rules.durable import APPLICATION, FileKind, says_who_may_write
from broker.sqlite.location import JOURNAL, NEW, WAL, head_of
from broker.telemetry.labels import FileError

SCHEMA = 1
"""Version of what is written; a file of a later one is refused, not guessed at."""

PAGE = 4096
"""Bytes of a page, SQLite's own default: with larger ones a mint costs as much."""

BUSY = 2.0
"""Seconds that another program may look at the file."""

_CREATE = (
    "CREATE TABLE embed_token_broker_log (id INTEGER PRIMARY KEY, kind INTEGER, sealed BLOB)",
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    f"PRAGMA user_version = {SCHEMA}",
    f"PRAGMA application_id = {APPLICATION}",
)
"""What a new file has; `rules.durable` knows the names by which one is told from others."""


_KINDS = {
    sqlite3.SQLITE_FULL: FileError.FULL,
    sqlite3.SQLITE_READONLY: FileError.READONLY,
    sqlite3.SQLITE_IOERR: FileError.IO,
    **dict.fromkeys(
        (
            sqlite3.SQLITE_BUSY,
            sqlite3.SQLITE_LOCKED,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_PERM,
            sqlite3.SQLITE_AUTH,
        ),
        FileError.OTHER,
    ),
}
"""All others are of statements that are right, and so of a file that is not."""


class StateFileFailed(Exception):
    """The file could not be read or written; `kind` says how."""

    def __init__(self, kind: FileError, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class NewerSchema(Exception):
    """A file that a later version wrote; the message names both."""


class StateFile:
    """A file that is open; for one thread at a time."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._is_full = False
        self.path = path
        self._identity = _identity(path)

    @classmethod
    def open(cls, path: Path, kind: FileKind) -> "StateFile":
        """Open the file, or make it; raises StateFileFailed (corrupt, too), NewerSchema."""
        if kind is FileKind.EMPTY:
            _create(path)
        if not says_who_may_write(head_of(path)):
            raise StateFileFailed(FileError.CORRUPT, "its header is none")
        with _translated():
            connection = _connect(path)
        file = cls(connection, path)
        try:
            with _translated():
                file._prepare()
        except BaseException:
            connection.close()
            raise
        return file

    def _prepare(self) -> None:
        execute = self._connection.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA wal_autocheckpoint = 0")  # at a moment of our choice: it waits for the disk
        execute("PRAGMA synchronous = NORMAL")
        said = execute("PRAGMA quick_check(1)").fetchone()
        if said != ("ok",):
            raise StateFileFailed(FileError.CORRUPT, "its check found damage")
        stamped, version = self._versions()
        if stamped == version and version > SCHEMA:
            raise NewerSchema(f"has the schema {version}, and this version knows {SCHEMA}")
        if (stamped, version) != (SCHEMA, SCHEMA):
            raise StateFileFailed(FileError.CORRUPT, "its version is said in two ways")

    def _versions(self) -> tuple[object, int]:
        found = self._connection.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
        version: int = self._connection.execute("PRAGMA user_version").fetchone()[0]
        return found[0] if found else None, version

    def rows(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield place, kind and content of every row, the newest first; raises StateFileFailed."""
        with _translated():
            for place, kind, sealed in self._connection.execute(
                "SELECT id, kind, sealed FROM embed_token_broker_log ORDER BY id DESC"
            ):
                if not isinstance(kind, int) or not isinstance(sealed, bytes):
                    raise StateFileFailed(FileError.CORRUPT, "a row has other types")
                yield place, kind, sealed

    def keys(self) -> list[bytes]:
        """Return the data key, as each of its wrappings."""
        with _translated():
            found = self._connection.execute("SELECT value FROM meta WHERE name GLOB 'key.*'")
            return [value for (value,) in found if isinstance(value, bytes)]

    def use_keys(self, wrapped: Sequence[bytes]) -> None:
        """Replace the wrappings of the data key, on the disk; raises StateFileFailed."""
        with self._transaction(full=True) as execute:
            execute("DELETE FROM meta WHERE name GLOB 'key.*'", ())
            for number, value in enumerate(wrapped):
                execute("INSERT INTO meta VALUES (?, ?)", (f"key.{number}", value))

    def append(
        self, rows: Sequence[tuple[int, int, bytes]], *, full: bool, instead: Sequence[int] = ()
    ) -> None:
        """Commit rows, `full`: onto the disk, `instead` of those; raises StateFileFailed."""
        with self._transaction(full=full) as execute:
            for place in instead:
                execute("DELETE FROM embed_token_broker_log WHERE id = ?", (place,))
            for row in rows:
                execute("INSERT INTO embed_token_broker_log VALUES (?, ?, ?)", row)

    def drop(self, places: Sequence[int]) -> None:
        """Take rows away; raises StateFileFailed."""
        self.append((), full=False, instead=places)

    def shrink(self, pages: int) -> int:
        """Give up to `pages` unused pages back; returns how many there were.

        Raises StateFileFailed.
        """
        with _translated():
            unused: int = self._connection.execute("PRAGMA freelist_count").fetchone()[0]
            if unused:
                # as a script: `execute` stops at its first step, which is one page
                self._connection.executescript(f"PRAGMA incremental_vacuum({pages})")
        return unused

    def checkpoint(self) -> None:
        """Put what the log has into the file, and it onto the disk; raises StateFileFailed."""
        with _translated():
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def size(self) -> int:
        """Bytes of the file and of its log."""
        total = 0
        for name in ("", WAL):
            with contextlib.suppress(OSError):
                total += self.path.with_name(self.path.name + name).stat().st_size
        return total

    def is_in_place(self) -> bool:
        """Whether the file that is open is the one that a restart would find."""
        return self._identity is not None and _identity(self.path) == self._identity

    def close(self) -> None:
        """Close it; what was committed is in the file or in its log."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    @contextlib.contextmanager
    def _transaction(self, *, full: bool) -> Iterator["_Execute"]:
        with _translated():
            if full is not self._is_full:
                self._connection.execute(f"PRAGMA synchronous = {'FULL' if full else 'NORMAL'}")
                self._is_full = full
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield _Execute(self._connection)
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    @override
    def __repr__(self) -> str:
        return f"StateFile({str(self.path)!r})"


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Execute:
    """Runs a statement of a transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._run = connection.execute

    def __call__(self, statement: str, values: Sequence[object]) -> None:
        self._run(statement, values)


def move_aside(path: Path, why: str) -> Path:
    """Give a file that cannot be used another name, with its log; returns the name.

    Raises OSError.
    """
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    target = path.with_name(f"{path.name}.{why}-{stamp}")
    for number in range(1, 1000):
        if not os.path.lexists(target):
            break
        target = path.with_name(f"{path.name}.{why}-{stamp}-{number}")
    for name in (WAL, JOURNAL):  # first: a log without its file is nothing, and would be taken
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + name).rename(target.with_name(target.name + name))
    path.rename(target)
    return target


def _create(path: Path) -> None:
    """Make an empty file and put it in its place, whole: a kill leaves none, or all of it."""
    new = path.with_name(path.name + NEW)
    try:
        for name in ("", JOURNAL, WAL):
            new.with_name(new.name + name).unlink(missing_ok=True)
        for name in (JOURNAL, WAL):
            path.with_name(path.name + name).unlink(missing_ok=True)
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        with _translated(), contextlib.closing(_connect(new)) as connection:
            connection.execute(f"PRAGMA page_size = {PAGE}")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("BEGIN")
            for statement in _CREATE:
                connection.execute(statement)
            connection.execute("INSERT INTO meta VALUES ('schema', ?)", (SCHEMA,))
            connection.execute("COMMIT")
        new.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        kind = _OF_THE_SYSTEM.get(error.errno or 0, FileError.IO)
        raise StateFileFailed(kind, error.strerror or "error") from None


_OF_THE_SYSTEM: Mapping[int, FileError] = {
    errno.ENOSPC: FileError.FULL,
    errno.EDQUOT: FileError.FULL,
    errno.EROFS: FileError.READONLY,
    errno.EACCES: FileError.READONLY,
    errno.EPERM: FileError.READONLY,
}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _connect(path: Path) -> sqlite3.Connection:
    """Connect, with transactions of our own making; opened in one thread, used in another.

    Nothing is put aside elsewhere: the state's folder may be all that can be written to.
    """
    connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA temp_store = MEMORY")
    return connection


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Translate what SQLite says."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        raise StateFileFailed(_KINDS.get(code, FileError.CORRUPT), str(error)) from error
    except MemoryError as error:  # of the process: the file is as good as it was
        raise StateFileFailed(FileError.OTHER, "out of memory") from error
    except (UnicodeDecodeError, OverflowError) as error:  # of a value that is damaged
        raise StateFileFailed(FileError.CORRUPT, "a value cannot be read") from error
