"""`python -m broker` equals `broker`: both begin here, with signals, before what takes long.

Until the server obeys signals itself, one that asks for the end just ends the process.  That is
what they do by default, with two exceptions: Python turns SIGINT into a traceback, and the kernel
keeps signals without a handler from process 1, the only one of a container, which could be told to
stop during its imports and would go on for ever.
"""

import os
import signal
import sys
from types import FrameType


def _end(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)


def main() -> int:
    """Run one command; returns its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end if os.getpid() == 1 else signal.SIG_DFL)
    from broker.cli import main as run  # noqa: PLC0415 - takes a while, in which signals are to be obeyed

    return run()


if __name__ == "__main__":
    sys.exit(main())
