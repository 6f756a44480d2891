"""Notices that a secret file was replaced or rewritten, by looking at it now and then.

Polling on purpose: mounted secrets are changed by swapping symbolic links, which file events miss.

What is compared is the contents, because nothing else tells for sure: a file that is rewritten in
place, or a link that is swapped, may have the size and the time of the one before (tools that keep
times, file systems that know whole seconds only).  Contents are small, so reading them costs about
ten microseconds a file; where there are thousands, each look reads some of them in turn and asks
the file system about all.  The time of a change of the inode (ctime) would cost less, but changes
with each backup by hard links.

All of it may block for as long as a mounted file system likes: not for the event loop.
"""

import os
from collections.abc import Iterable
from hashlib import blake2b
from itertools import cycle, islice

from broker.config.files import MAX_FILE, CannotRead, open_regular

MOST_READ = 64
"""Files that one look reads: a millisecond, twice a second."""

Signature = tuple[int, int, int, int]
"""Device, inode (a swapped link), size, time of change in ns."""


class SecretFiles:
    """The files whose change means a reload.  Looks at all of them at once when it is made."""

    def __init__(self, files: Iterable[str]) -> None:
        self._paths = list(dict.fromkeys(files))
        self._signatures = {path: _signature(path) for path in self._paths}
        self._digests = {path: _digest(path) for path in self._paths}
        self._turns = cycle(self._paths)

    def changed(self) -> bool:
        """Whether any file differs from when this was last asked; also if it cannot be read."""
        to_read = set(islice(self._turns, min(MOST_READ, len(self._paths))))
        changed = False
        for path in self._paths:
            signature = _signature(path)
            if signature != self._signatures[path]:
                self._signatures[path] = signature
                to_read.add(path)
                changed = True
        for path in to_read:
            digest = _digest(path)
            if digest != self._digests[path]:
                self._digests[path] = digest
                changed = True
        return changed


def _signature(path: str) -> Signature | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - thousands of paths, twice a second
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _digest(path: str) -> bytes | None:
    """Hash the contents; None if they cannot be read, or reading would consume them."""
    try:
        handle = open_regular(path)
    except CannotRead:
        return None
    try:
        size = min(max(os.fstat(handle).st_size, 4096), MAX_FILE)  # some file systems say 0
        return blake2b(os.read(handle, size), digest_size=16).digest()
    except OSError:
        return None
    finally:
        os.close(handle)
