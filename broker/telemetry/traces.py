"""Where an error came from, and nothing of what it says.

Messages, notes, local variables and the source of a syntax error may hold a token.  So a trace is
not cleaned of them; it is put together from what is known to be harmless: types, files, lines and
functions, of the error, of its causes and contexts, and of the members of a group, at any depth.

Bounded: neither a recursion nor a group of thousands makes a line that nothing can carry.
"""

import sys
import traceback
from typing import NotRequired, TypedDict

MOST_ERRORS = 16
"""Errors of one event: with their causes, and the members of groups."""

MOST_FRAMES = 32
"""Frames of one event; of a longer stack the outer half and the inner half of what is left."""


class Frame(TypedDict):
    """A line that was being executed."""

    filename: str
    lineno: int
    name: str


class Trace(TypedDict):
    """One error; `exceptions` are the chains of a group's members."""

    exc_type: str
    is_cause: bool
    frames: list[Frame]
    exceptions: NotRequired[list[list["Trace"]]]


def chain(error: BaseException) -> list[Trace]:
    """Return the error, then what it came from, and so on; `is_cause` if it was raised `from`."""
    return _Budget().chain(error)


class _Budget:
    """What one event may still hold."""

    def __init__(self) -> None:
        self._errors = MOST_ERRORS
        self._frames = MOST_FRAMES
        self._seen: set[int] = set()

    def chain(self, error: BaseException | None) -> list[Trace]:
        traces: list[Trace] = []
        is_cause = False
        while error is not None and self._errors and id(error) not in self._seen:
            self._errors -= 1
            self._seen.add(id(error))
            trace = Trace(
                exc_type=type(error).__name__, is_cause=is_cause, frames=self._stack(error)
            )
            traces.append(trace)
            if isinstance(error, BaseExceptionGroup):
                members = [self.chain(member) for member in error.exceptions[:MOST_ERRORS]]
                trace["exceptions"] = [member for member in members if member]
            is_cause = error.__cause__ is not None
            hidden = error.__suppress_context__
            error = error.__cause__ or (None if hidden else error.__context__)
        return traces

    def _stack(self, error: BaseException) -> list[Frame]:
        frames = [
            Frame(filename=frame.f_code.co_filename, lineno=lineno, name=frame.f_code.co_name)
            for frame, lineno in traceback.walk_tb(error.__traceback__)
        ]
        if len(frames) > self._frames:
            outer = self._frames // 2
            inner = self._frames - outer
            frames = [*frames[:outer], *(frames[-inner:] if inner else [])]
        self._frames -= len(frames)
        return frames


def lines(traces: list[Trace], indent: str = "") -> list[str]:
    """Write a chain for people, with the lines of source that its frames stand on."""
    written: list[str] = []
    for number, trace in enumerate(traces):
        if number:
            written.append(f"{indent}{'caused by' if trace['is_cause'] else 'while handling'}:")
        frames = [(f["filename"], f["lineno"], f["name"], None) for f in trace["frames"]]
        for text in traceback.StackSummary.from_list(frames).format():
            written += [f"{indent}{line}" for line in text.splitlines()]
        written.append(f"{indent}{_printable(trace['exc_type'])}")
        for member in trace.get("exceptions", ()):
            written += [f"{indent}  together with:", *lines(member, f"{indent}    ")]
    return written


def _printable(name: str) -> str:
    return name.encode("unicode_escape").decode("ascii")


def error_of(exc_info: object) -> BaseException | None:
    """Return the error that an event's `exc_info` names, in any of the forms of `logging`."""
    if isinstance(exc_info, tuple) and len(exc_info) > 1:  # as of sys.exc_info
        exc_info = exc_info[1]
    elif exc_info and not isinstance(exc_info, BaseException):
        exc_info = sys.exc_info()[1]
    return exc_info if isinstance(exc_info, BaseException) else None
