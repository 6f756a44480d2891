"""Epochs of visitors: exact for who was ended, in memory that does not grow."""

from hypothesis import given
from hypothesis import strategies as st

from broker.stores.epochs import CELLS, Epochs


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
