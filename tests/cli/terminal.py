"""A person at a terminal: types, waits for what is shown, presses Ctrl-C."""

import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path
from typing import Self

from processes import TIMEOUT, environment

CONTROL_C, CONTROL_D = b"\x03", b"\x04"


class Terminal:
    """A program on a terminal of its own; leaving the context ends it."""

    def __init__(self, *command: str, folder: Path, **variables: str) -> None:
        self.shown = ""
        self._code: int | None = None
        given = environment(TERM="dumb", NO_COLOR="1", **variables)
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(folder)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.execve(command[0], command, given)
            finally:
                os._exit(127)

    @classmethod
    def broker(cls, *arguments: str, folder: Path, **variables: str) -> Self:
        """Start a command of this package."""
        program = (sys.executable, "-W", "error", "-m", "broker")
        return cls(*program, *arguments, folder=folder, **variables)

    def type(self, keys: bytes | str) -> None:
        """Press keys."""
        os.write(self._terminal, keys.encode() if isinstance(keys, str) else keys)

    def wait_for(self, text: str) -> None:
        """Read until this is shown."""
        ends = time.monotonic() + TIMEOUT
        while text not in self.shown:
            assert self._read(ends), f"{text!r} is not in\n{self.shown}"

    def asks_unseen(self) -> bool:
        """Whether what is typed is not shown."""
        import termios

        return not termios.tcgetattr(self._terminal)[3] & termios.ECHO

    def wait(self) -> int:
        """Read to the end; returns the exit code, negative for a signal."""
        ends = time.monotonic() + TIMEOUT
        while self._read(ends):
            pass
        if self._code is None:
            _, status = os.waitpid(self.pid, 0)
            self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def _read(self, ends: float) -> bool:
        """Read what there is; False at the end."""
        left = ends - time.monotonic()
        assert left > 0, f"waited in vain:\n{self.shown}"
        if not select.select([self._terminal], [], [], left)[0]:
            return True
        try:
            some = os.read(self._terminal, 65536)
        except OSError:  # the other side is closed
            return False
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", some.decode("utf-8", "replace"))
        self.shown += plain.replace("\r\n", "\n")
        return bool(some)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._terminal)
