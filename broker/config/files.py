"""Reads files that a configuration or a command line names: regular ones, up to a bound, at once.

Whoever names a file may name anything.  To open a pipe or to read a terminal waits for somebody who
writes, a device may have no end, and some do something when they are opened.  So what a path leads
to is looked at before it is opened, and again when it is open, for it may be another by then.
Links are followed: mounted secrets are links to regular files.
"""

import os
import stat
from pathlib import Path

MAX_FILE = 2**20
"""Bytes of a configuration, secret, key or certificate file: a thousand clients take a tenth of it,
and so does a system's bundle of certificates."""

_PIECE = 2**16
"""Bytes that are read at once: what a file system says of a size is a hint."""

_KINDS = {
    stat.S_IFDIR: "a directory; name a file in it",
    stat.S_IFIFO: "a pipe; name a regular file",
    stat.S_IFSOCK: "a socket; name a regular file",
    stat.S_IFCHR: "a device; name a regular file",
    stat.S_IFBLK: "a device; name a regular file",
    stat.S_IFLNK: "a link; name the file itself",
}
"""What is not read, and what to do, by the type of the inode."""

_HAND_OVER = "let the broker's user read it, or let the unit hand it over (LoadCredential)"
"""What to do about a file of somebody else."""


class CannotRead(Exception):
    """A file that cannot be used; the message names it, the rule and, unless plain, the remedy.

    `reason` is the message without the path; `is_absent`: there is nothing under that path.
    """

    def __init__(self, path: str | Path, reason: str, *, is_absent: bool = False) -> None:
        super().__init__(f"cannot read {path}: {reason}")
        self.reason = reason
        self.is_absent = is_absent


def read(path: str | Path, most: int = MAX_FILE, *, follow: bool = True) -> bytes:
    """Return the contents of a file of up to `most` bytes; raises CannotRead.

    Without `follow` a link in its place is refused.  Waits for nothing but the file system.
    """
    raw = bytearray()
    handle = open_regular(path, follow=follow)
    try:
        while len(raw) <= most and (some := os.read(handle, _PIECE)):
            raw += some
    except OSError as error:
        raise CannotRead(path, error.strerror or "error") from None
    finally:
        os.close(handle)
    if len(raw) > most:
        raise CannotRead(path, f"more than {most >> 20} MiB; name a file that holds nothing else")
    return bytes(raw)


def read_text(path: str | Path) -> str:
    """Return the contents of a file as text, without a byte order mark; raises CannotRead."""
    try:
        return read(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CannotRead(path, "not UTF-8") from None


def open_regular(path: str | Path, *, follow: bool = True) -> int:
    """Return a descriptor of a regular file, opened for reading; raises CannotRead."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    if not follow:
        flags |= os.O_NOFOLLOW
    try:
        _require_regular(path, Path(path).stat(follow_symlinks=follow))
        handle = os.open(path, flags)
    except FileNotFoundError as error:
        raise CannotRead(path, error.strerror or "absent", is_absent=True) from None
    except PermissionError:
        raise CannotRead(path, f"Permission denied; {_HAND_OVER}") from None
    except OSError as error:
        raise CannotRead(path, error.strerror or "error") from None
    except ValueError:
        raise CannotRead(path, "not a path") from None
    try:
        _require_regular(path, os.fstat(handle))
    except BaseException:
        os.close(handle)
        raise
    return handle


def _require_regular(path: str | Path, status: os.stat_result) -> None:
    """Raise CannotRead for anything but a regular file; the null device is an empty one."""
    if stat.S_ISREG(status.st_mode) or _is_null(status):
        return
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")
    raise CannotRead(path, kind)


def _is_null(status: os.stat_result) -> bool:
    """Whether this is /dev/null: what programs are given that must not read a file."""
    return os.path.samestat(status, Path(os.devnull).stat())
