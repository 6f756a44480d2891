"""What a record is worth later, by clocks that may lie; and what a file is."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.rules.durable import (
    APPLICATION,
    HEAD,
    TABLE,
    FileKind,
    Moment,
    age,
    file_kind,
    left_of,
    says_who_may_write,
)
from broker.sqlite.state_file import StateFile

US = st.integers(0, 2**52)
SPANS = st.integers(0, 2**40)
STEPS = st.integers(-(2**40), 2**40)


@given(wall=US, mono=US, passed=SPANS, step=STEPS)
def test_D8_on_one_machine_no_step_of_the_wall_clock_lengthens_a_life(
    wall: int, mono: int, passed: int, step: int
) -> None:
    """The monotonic clock knows how much time has passed, at least."""
    then = Moment("a boot", mono, wall)
    now = Moment("a boot", mono + passed, wall + passed + step)
    assert age(then, now, then) == max(passed, passed + step)


@given(wall=US, later=SPANS, passed=SPANS, step=STEPS)
def test_D8_over_a_restart_of_the_machine_the_records_know_something(
    wall: int, later: int, passed: int, step: int
) -> None:
    """What was written last was written before now, whatever the clock says."""
    then, last = Moment("before", 5, wall), Moment("before", 9, wall + later)
    found = age(then, Moment("after", 0, wall + later + passed + step), last)
    assert found >= later
    assert found <= max(later, later + passed + step)


@given(then=st.builds(Moment, st.just(""), US, US), now=st.builds(Moment, st.just(""), US, US))
def test_a_machine_without_a_name_is_never_the_same(then: Moment, now: Moment) -> None:
    """By the wall clock alone, then; and never less than nothing."""
    assert age(then, now, then) == max(now.wall - then.wall, 0)


@given(left=STEPS, most=SPANS, passed=SPANS)
def test_T5_nothing_is_left_beyond_its_whole(left: int, most: int, passed: int) -> None:
    """Whatever was written down."""
    assert left_of(left, most, passed) <= most - passed


def test_a_state_file_is_known_by_two_of_three_signs(tmp_path: Path) -> None:
    """So that no damage of one place makes it a stranger's."""
    path = tmp_path / "state.db"
    StateFile.open(path, FileKind.EMPTY).close()
    head = path.read_bytes()[:HEAD]
    assert file_kind(head) is FileKind.OURS
    assert TABLE.encode() in head
    assert head[68:72] == APPLICATION.to_bytes(4, "big")
    for place in range(len(head)):
        flipped = bytearray(head)
        flipped[place] ^= 0xFF
        assert file_kind(bytes(flipped)) is FileKind.OURS
    assert says_who_may_write(head)
    assert not says_who_may_write(head[:18] + b"\x07" + head[19:])


@pytest.mark.parametrize("content", [b"x", b"SQLite format 3\x00", b"\x00" * HEAD])
def test_what_is_no_state_file_is_a_stranger_s(content: bytes) -> None:
    """Nothing at all is a new one."""
    assert file_kind(content) is FileKind.FOREIGN
    assert file_kind(b"") is FileKind.EMPTY


def test_another_database_is_a_stranger_s(tmp_path: Path) -> None:
    """It has one sign."""
    with closing(sqlite3.connect(tmp_path / "x.db")) as connection, connection:
        connection.execute("CREATE TABLE x (y)")
    assert file_kind((tmp_path / "x.db").read_bytes()[:HEAD]) is FileKind.FOREIGN
