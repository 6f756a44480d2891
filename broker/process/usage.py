"""What a process takes of the machine, as the kernel counts it (proc(5))."""

import os
from pathlib import Path

from msgspec import Struct

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Usage(Struct, frozen=True):
    """CPU time so far, user and system, and memory at this moment."""

    cpu_seconds: float
    resident_bytes: int


def usage(pid: int) -> Usage | None:
    """Return what this process takes, None if it is gone or the system has no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    user, system, pages = int(fields[11]), int(fields[12]), int(fields[21])
    return Usage((user + system) / _TICKS, pages * _PAGE)
