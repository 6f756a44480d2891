"""Processes whose wall clock is not this machine's: Debian's libfaketime, preloaded.

The monotonic clock is left alone: timers run as ever, the date is wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servers import StoreServer, store_server, valkey_binary

LIBRARIES = Path("/usr/lib")
"""Below it Debian has the library, in a folder named after the machine."""


def environment(offset: str) -> dict[str, str]:
    """Return the variables that shift a process' date, such as by "+5s"."""
    return {"LD_PRELOAD": _library(), "FAKETIME": offset, "DONT_FAKE_MONOTONIC": "1"}


@contextmanager
def store_with_clock(folder: Path) -> Iterator[tuple[StoreServer, "Clock"]]:
    """Run a store whose date a test moves."""
    clock = Clock(folder / "offset")
    clock.set("+0")
    wrapper = folder / "valkey-with-clock"
    wrapper.write_text(
        f"#!/bin/sh\nexport LD_PRELOAD={_library()} FAKETIME_TIMESTAMP_FILE={clock.file}"
        f' FAKETIME_NO_CACHE=1 DONT_FAKE_MONOTONIC=1\nexec {valkey_binary()} "$@"\n',
        encoding="utf-8",
    )
    wrapper.chmod(0o700)
    with store_server(str(wrapper)) as server:
        yield server, clock


class Clock:
    """The date of a process."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def set(self, offset: str) -> None:
        """Shift it, from now on, by an offset such as "+1d"; at once, or it reads half of it."""
        new = self.file.with_suffix(".new")
        new.write_text(f"{offset}\n", encoding="utf-8")
        new.replace(self.file)


def _library() -> str:
    found = sorted(LIBRARIES.glob("*/faketime/libfaketime.so.1"))
    assert found, "Debian's faketime is not installed"
    return str(found[0])
