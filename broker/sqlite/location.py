"""Where the state file is: what may stand there, who may use it, and whether it can be written.

Whoever can write to its folder could put a link or a file of their own in its place.  So the file
is the broker's user's own, and no link, or it is not opened.  One process uses it: a lock beside
it says which one.  The lock is a file of its own, because to close another descriptor of the
database would drop the locks of SQLite (POSIX locks belong to a process, not to a descriptor).
"""

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from broker.config.schema import ConfigError
from broker.config.state_folder import existing_folder
from broker.rules.durable import HEAD, FileKind, file_kind

LOCK, WAL, JOURNAL, NEW = ".lock", "-wal", "-journal", ".new"
"""What stands beside the file: who uses it, what is not in it yet (two ways), one being made."""

_PROBE = 2**16
"""Bytes that are written to see whether there is room: more than a start needs."""

ELSEWHERE = 'or keep nothing: store.url = "memory://", after which a crash mints anew for everybody'


class StateFileInUse(Exception):
    """Another process has the file; the message names it.

    `stopped`: this one was asked to stop while it waited.
    """

    def __init__(self, path: Path, owner: str, *, stopped: bool) -> None:
        super().__init__(
            f"store.url: {path} is in use by process {owner}; stop it, or name another file: one"
            " process uses a file, several share a Valkey"
        )
        self.stopped = stopped


class Lock:
    """The right to use a state file, until `release` or the end of the process."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(path.name + LOCK)
        self._handle: int | None = None

    def take(self) -> bool:
        """Take it, if nobody has it; raises ConfigError where no lock can be made."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            handle = os.open(self._path, flags, 0o600)
        except OSError as error:  # one that is not there cannot be given to anybody
            at_fault = self._path if os.path.lexists(self._path) else self._path.parent
            raise ConfigError(_cannot(at_fault, error)) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise ConfigError(_cannot(self._path, error)) from None
        self._handle = handle
        with contextlib.suppress(OSError):  # of a full disk: the lock holds without a name
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        return True

    def release(self) -> None:
        """Give it back.  The file stays: another may be waiting for this very one."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    @property
    def owner(self) -> str:
        """The process that has it, as far as it says."""
        return _owner_in(self._path)


def _owner_in(lock: Path) -> str:
    try:
        text = lock.read_text("ascii").strip()
    except (OSError, ValueError):
        text = ""
    return text if text.isdigit() else "unknown"


def owner_of(path: Path) -> str | None:
    """Return the process that uses the file at this moment, None for nobody; changes nothing."""
    lock = path.with_name(path.name + LOCK)
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _owner_in(lock)
    finally:
        os.close(handle)
    return None


def require_usable(path: Path, *, for_another: bool = False) -> FileKind:
    """Return what stands at the path; raises ConfigError, with the remedy, for what is no place.

    `for_another` user: root examines the file of a service, which owns its folder, too.
    """
    folder = path.parent
    try:
        status = folder.stat()
    except OSError as error:
        raise ConfigError(_no_folder(folder, error)) from None
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"store.url: {folder} is not a folder; name a file in one")
    owner = status.st_uid if for_another else os.geteuid()
    for name in ("", WAL, JOURNAL, NEW, LOCK):
        _require_own(path.with_name(path.name + name), owner)
    kind = file_kind(head_of(path))
    if kind is FileKind.FOREIGN:
        raise ConfigError(
            f"store.url: {path} is not a state file of the broker, and is left alone; name another"
            " file, or take that one away"
        )
    return kind


def _require_own(path: Path, owner: int) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(_cannot(path, error)) from None
    if not stat.S_ISREG(status.st_mode):
        what = "a link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
        raise ConfigError(f"store.url: {path} is {what}; name a file, or take that one away")
    if status.st_nlink > 1:
        raise ConfigError(
            f"store.url: {path} has a second name, so it may be somebody else's file; name another"
            " file, or take that one away"
        )
    if status.st_uid != owner:
        raise ConfigError(
            f"store.url: {path} belongs to user {status.st_uid} and not to {owner}, who runs the"
            f" broker; give it to them (chown {owner} {path}), or name another file"
        )


def head_of(path: Path) -> bytes:
    """Return the first page, b"" where there is no file; raises ConfigError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ConfigError(_cannot(path, error)) from None
    try:
        return os.read(handle, HEAD)
    except OSError as error:
        raise ConfigError(_cannot(path, error)) from None
    finally:
        os.close(handle)


def examine(path: Path, environ: Mapping[str, str]) -> None:
    """Do what a start does, short of opening the file; raises ConfigError with the remedy.

    The default folder is made by the start: here the nearest that is there stands for it.
    """
    folder = existing_folder(path, environ)
    if folder == path.parent:
        try:
            owner = folder.stat().st_uid
        except OSError as error:
            raise ConfigError(_no_folder(folder, error)) from None
        _ = require_usable(path, for_another=os.geteuid() == 0 and owner != 0)
    try_to_write(folder / path.name)


def try_to_write(path: Path) -> None:
    """Write some bytes into the folder and take them away; raises ConfigError with the remedy."""
    try:
        with tempfile.TemporaryFile(dir=path.parent, prefix=f".{path.name}.") as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(_cannot(path.parent, error)) from None


def _no_folder(folder: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        user = os.geteuid()
        return (
            f"store.url: there is no folder {folder}; make it for the broker's user"
            f" (install -d -m 0700 -o {user} {folder}), name another one, {ELSEWHERE}"
        )
    return _cannot(folder, error)


def _cannot(path: Path, error: OSError) -> str:
    remedies = {
        errno.ENOSPC: "make room there",
        errno.EDQUOT: "make room there: the user's quota is used up",
        errno.EROFS: "mount it for writing",
        errno.EACCES: f"give it to the broker's user (chown {os.geteuid()}, chmod u+rwx)",
        errno.EPERM: f"give it to the broker's user (chown {os.geteuid()}, chmod u+rwx)",
        errno.ELOOP: "name the file itself, not a link",
    }
    remedy = remedies.get(error.errno or 0, "look at its file system")
    reason = error.strerror or "error"
    return f"store.url: cannot write to {path}: {reason}; {remedy}, name another file, {ELSEWHERE}"
