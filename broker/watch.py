"""Notices that a secret file was replaced or rewritten, by asking the file system now and then.

Polling on purpose: mounted secrets are changed by swapping symbolic links, which file events miss.
"""

from collections.abc import Iterable
from pathlib import Path


class SecretFiles:
    """The files whose change means a reload."""

    def __init__(self, files: Iterable[str]) -> None:
        self._paths = [Path(file) for file in files]
        self._seen = self._look()

    def changed(self) -> bool:
        """Whether any file differs from when this was last asked."""
        seen = self._look()
        changed, self._seen = seen != self._seen, seen
        return changed

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_signature(path) for path in self._paths]


def _signature(path: Path) -> tuple[int, int, int] | None:
    """What differs after a change: time of change, inode (a swapped link), size."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
