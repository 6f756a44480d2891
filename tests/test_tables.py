"""Tables in parts: a dict in everything but its pauses; and what is given up, freed by and by."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from broker.tables import PART, Leftovers, PartedDict


@given(
    st.sampled_from([1, PART, 5 * PART, 70 * PART]),
    st.lists(st.tuples(st.booleans(), st.text(max_size=2), st.integers()), max_size=60),
)
def test_a_dict_in_parts_is_a_dict(most: int, steps: Sequence[tuple[bool, str, int]]) -> None:
    """Whatever is put in and taken out, with one part and with many."""
    parted: PartedDict[str, int] = PartedDict(most)
    whole: dict[str, int] = {}
    for puts, key, value in steps:
        if puts:
            parted[key] = whole[key] = value
        else:
            assert parted.pop(key) == whole.pop(key, None)
        assert parted.get(key) == whole.get(key)
        assert (key in parted) == (key in whole) == (key in parted.part(key))
        assert len(parted) == len(whole)
    assert dict(parted.items()) == whole


def test_parts_are_as_many_as_keep_each_small() -> None:
    """A table for a million has parts of some thousand entries; one for few is one dict."""
    assert [len(PartedDict[str, int](most).parts) for most in (0, 1, PART, 200_000, 1_000_000)] == [
        1,
        1,
        1,
        32,
        128,
    ]
    table: PartedDict[str, int] = PartedDict(40 * PART)
    for number in range(40 * PART):
        table[f"key{number}"] = number
    assert max(map(len, table.parts)) < 2 * PART


def test_what_is_given_up_is_freed_in_the_steps_that_are_asked_for() -> None:
    """So many entries a step, over the borders of dicts, until nothing is left."""
    left = Leftovers()
    left.add([dict.fromkeys(range(7)), {}, dict.fromkeys(range(5))])
    sizes = []
    while left:
        sizes.append(len(left))
        left.free(4)
    assert sizes == [12, 8, 4]
    left.free(4)
    assert (len(left), repr(left)) == (0, "Leftovers(entries=0)")
