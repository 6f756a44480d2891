"""Epochs of visitors: exact for who was ended, in memory that does not grow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.stores import epochs as module
from broker.stores.epochs import CELLS, Epochs, KnownEnds


@given(st.lists(st.text(max_size=5), max_size=50), st.text(max_size=5))
def test_G9_an_end_changes_the_epoch_for_good(others: list[str], visitor: str) -> None:
    """Whoever is ended before or after: no epoch of theirs comes back."""
    epochs, seen = Epochs(), set()
    for other in [*others, visitor, *others]:
        seen.add(epochs.of(visitor))
        epochs.end(other)
        assert epochs.of(other) > 0
    assert epochs.of(visitor) not in seen - {epochs.of(visitor)}
    assert len(seen) >= 1


def test_G6_a_hundred_thousand_ends_take_no_more_memory_than_one() -> None:
    """And most of those who were not ended keep their epoch."""
    epochs = Epochs()
    for number in range(100_000):
        epochs.end(f"{number}")
    assert epochs._cells is not None
    assert len(epochs._cells) == CELLS
    fresh = Epochs()
    fresh.end("one")
    untouched = sum(fresh.of(f"other-{number}") == 0 for number in range(1000))
    assert untouched >= 990


def test_G9_a_known_end_is_over_for_what_is_older() -> None:
    """By the server's number, which only grows; a stranger and a younger token are not touched."""
    ends = KnownEnds(str.encode, lambda: 0)
    assert ends.holds("one", 0)
    for epoch in (7, 5):
        ends.note(b"one", epoch)
    assert [ends.holds("one", epoch) for epoch in (0, 6, 7, 8)] == [False, False, True, True]
    assert ends.holds("other", 0)
    assert (ends.of("one"), ends.of("other")) == (7, 0)
    ends.note(b"one", module.LATEST_END + 1)
    assert ends.of("one") == 7, "N26: it would be told to every store that has forgotten it"


def test_G6_known_ends_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In number, the latest ones kept, and in time: longer than a token lives, not for ever."""
    now = 0
    monkeypatch.setattr(module, "ENDS_KNOWN", 10)
    ends = KnownEnds(str.encode, lambda: now)
    for number in range(100):
        ends.note(b"%d" % number, 1)
        known = [n for n in range(100) if ends.of(f"{n}")]
        assert known == list(range(max(number + 1 - len(known), 0), number + 1))
        assert min(number + 1, 5) <= len(known) <= 10
    now = module.ENDS_LAST - 1
    ends.note(b"late", 1)
    now = 2 * module.ENDS_LAST - 2
    assert ends.of("late") == 1, "as long as a token of before could be shown"
    now = 3 * module.ENDS_LAST
    assert ends.of("late") == 0
    assert not ends._young
    assert not ends._old


def test_T5_an_end_that_is_noted_again_lasts_from_then_on() -> None:
    """Its epoch is the later one, in whichever generation the earlier one stands."""
    now = 0
    ends = KnownEnds(str.encode, lambda: now)
    ends.note(b"one", 9)
    now = module.ENDS_LAST
    ends.note(b"one", 5)
    assert ends.of("one") == 9
    now = 2 * module.ENDS_LAST - 1
    assert ends.of("one") == 9
