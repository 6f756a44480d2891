"""Opens a state file, or makes one, and reads what is true now.

    what stands there? -> open, check -> the data key, by one of the issuer's keys
        -> every row in order -> the data key is wrapped for the keys of today, which is a write

A file that is damaged, or that none of the keys opens, is moved aside, and an empty one takes its
place: a broker that starts without its memory is better than none.
"""

from collections.abc import Callable
from pathlib import Path

from msgspec import Struct
from typing_extensions import override

from broker.config.schema import ConfigError
from broker.model import Secret
from broker.rules.durable import Moment
from broker.sealing import Box
from broker.sessions.memory import MOST_ENDED
from broker.sqlite import data_key, location, state_file
from broker.sqlite.ledger import Ledger, Row
from broker.sqlite.records import Batch, unseal
from broker.sqlite.restored import Fold, State, Terms, Worth
from broker.sqlite.state_file import NewerSchema, StateFile, StateFileFailed
from broker.telemetry.labels import FileError

PURPOSE = "rows of a state file"
"""What the data key is for."""

MOST_ENDS = 2 * MOST_ENDED
"""Ends in the file: twice those that are remembered, for one may be asked for again."""


class Keys(Struct, frozen=True):
    """The keys for which the data key is wrapped, and those that may open it beside them."""

    now: tuple[Secret, ...]
    also: tuple[Secret, ...] = ()


class Opened(Struct):
    """A file that is open, the box for its rows, what is in it, and what was moved aside."""

    file: StateFile
    box: Box
    data_key: Secret
    ledger: Ledger
    state: State
    moved: tuple[str, Path] | None = None
    """Why, and to which name."""

    @override
    def __repr__(self) -> str:
        return f"Opened({self.file!r}, {self.state!r})"


def open_state(
    path: Path, keys: Keys, terms: Terms, moment: Callable[[], Moment], most: int
) -> Opened:
    """Open it; raises ConfigError with the remedy where nothing can be kept.

    `most` bounds the mints in the file.
    """
    try:
        kind = location.require_usable(path)
        try:
            return _read(StateFile.open(path, kind), keys, terms, moment, most)
        except _Useless as useless:
            why, text = useless.why, str(useless)
        except StateFileFailed as failed:
            if failed.kind is not FileError.CORRUPT:
                raise
            why, text = "corrupt", f"it is damaged: {failed}"
        target = state_file.move_aside(path, why)
        kind = location.require_usable(path)
        opened = _read(StateFile.open(path, kind), keys, terms, moment, most)
    except NewerSchema as newer:
        raise ConfigError(
            f"store.url: {path} {newer}: run the version that wrote it, or name another file"
        ) from None
    except StateFileFailed as failed:
        raise ConfigError(_refusal(path, failed)) from None
    except OSError as error:
        raise ConfigError(f"store.url: cannot move {path} aside: {error.strerror}") from None
    opened.moved = text, target
    return opened


class _Useless(Exception):
    """A file that cannot be used; `why` becomes a part of the name under which it is kept."""

    def __init__(self, why: str, text: str) -> None:
        super().__init__(text)
        self.why = why


def _read(
    file: StateFile, keys: Keys, terms: Terms, moment: Callable[[], Moment], most: int
) -> Opened:
    try:
        key = _key_of(file, keys)
        box = Box(key, PURPOSE)
        state, ledger = _restored(file, box, terms, moment(), Ledger(most, MOST_ENDS))
        file.use_keys(data_key.wrapped(key, keys.now))  # shows that the file can be written
        return Opened(file, box, key, ledger, state)
    except BaseException:
        file.close()
        raise


def _restored(
    file: StateFile, box: Box, terms: Terms, now: Moment, ledger: Ledger
) -> tuple[State, Ledger]:
    """Return what is true, and the rows that say so.

    The newest row tells the latest moment on record.  Where an older one is later, a wall clock was
    set back in between: then all rows are read once more.
    """
    fold = Fold(terms, now)
    rows = _folded(file, box, fold)
    if fold.latest.wall > fold.last.wall:
        fold = Fold(terms, now, fold.latest)
        rows = _folded(file, box, fold)
    for place, kind, count, worth in reversed(rows):
        ledger.note(kind, Row(place, now.mono + worth.still(now, fold.last), count))
    return fold.state(), ledger


def _folded(file: StateFile, box: Box, fold: Fold) -> list[tuple[int, int, int, Worth]]:
    """Apply all rows; returns place, kind, number of records and worth of each."""
    rows: list[tuple[int, int, int, Worth]] = []
    for place, kind, sealed in file.rows():
        batch = _opened(box, place, kind, sealed)
        rows.append((place, kind, len(batch.records), fold.apply(batch)))
    return rows


def _opened(box: Box, place: int, kind: int, sealed: bytes) -> Batch:
    batch = unseal(box, place, kind, sealed)
    if batch is None:
        raise _Useless("corrupt", "it is damaged: a row does not open")
    return batch


def _key_of(file: StateFile, keys: Keys) -> Secret:
    wrappings = file.keys()
    if not wrappings:
        return data_key.new_key()  # it is new: rows without a key would not open
    key = data_key.unwrapped(wrappings, (*keys.now, *keys.also))
    if key is None:
        raise _Useless("unreadable", "it opens with none of the keys that are configured")
    return key


def _refusal(path: Path, failed: StateFileFailed) -> str:
    remedies = {
        FileError.FULL: "make room there",
        FileError.READONLY: "let the broker's user write there",
        FileError.IO: "look at its disk",
        FileError.CORRUPT: "take it away",
        FileError.OTHER: "end the other program that has it open, or make memory free",
    }
    remedy = remedies[failed.kind]
    return (
        f"store.url: cannot write to {path}: {failed}; {remedy}, name another file,"
        f" {location.ELSEWHERE}"
    )
