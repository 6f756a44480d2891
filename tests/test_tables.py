"""Tables in parts: a dict in everything but its pauses; and what is given up, freed by and by."""

import gc
import secrets
import sys
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from broker.limits.policy import LimitRule
from broker.rules.bucket import Limit
from broker.tables import PART, SPARSE, BySecond, Generations, Leftovers, PartedDict, Recent
from broker.valkey.key_names import Names, ReadyCall


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


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "add", "remove", "pop"]), st.text(max_size=1)),
        max_size=60,
    )
)
def test_keys_by_second_are_an_ordered_list(steps: Sequence[tuple[str, str]]) -> None:
    """The first is the one of the earliest second that came first; what was taken out is gone."""
    noted, model = BySecond[str](), dict[str, int]()
    for step, key in steps:
        second = len(key.encode()) + len(model) % 3
        if step == "pop":
            popped = noted.pop_until(second)
            first = min(model.values(), default=second + 1)
            assert (popped is None) == (first > second)
            if popped is not None:
                assert model.pop(popped) == first
        elif key in model:
            noted.remove(key, model.pop(key))
        elif step == "add":
            noted.add(key, second)
            model[key] = second
        assert noted.first() == min(model, key=lambda key: model[key], default=None)
        assert len(noted) == sum(map(len, noted.parts)) == len(model)
        assert len(noted._seconds) == len(set(noted._seconds)) == len(noted._slots)


def test_keys_by_second_take_no_memory_when_most_are_gone() -> None:
    """A dict does not shrink when keys leave it: one that is nearly empty is built anew."""
    noted = BySecond[int]()
    for number in range(3 * PART):
        noted.add(number, 7)
    assert len(list(noted.parts)) == 3
    for number in range(3 * PART):
        if number % 1000:
            noted.remove(number, 7)
    assert len(noted) == 13
    assert sum(map(sys.getsizeof, noted.parts)) <= SPARSE * (13 + 3)
    assert [noted.pop_until(7) for _ in range(14)][-2:] == [0, None]


@given(st.lists(st.integers(0, 20), max_size=100))
def test_generations_keep_what_was_asked_for_lately(asked: Sequence[int]) -> None:
    """At least the last `most` keys, never more than twice as many, and nothing once cleared."""
    kept, most = Generations[int, str](4), 4
    lately: list[int] = []
    for key in asked:
        found = kept.find(key)
        assert found in (None, str(key))
        if key in lately[-most:]:
            assert found is not None
        if found is None:
            kept[key] = str(key)
        lately = [each for each in lately if each != key] + [key]
        assert len(kept) <= 2 * most
    kept.clear()
    assert [kept.find(key) for key in asked] == [None] * len(asked)


def test_the_generation_before_is_whole_until_the_next_one() -> None:
    """What is freed meanwhile is of the one that was given up."""
    kept = Generations[int, str](100)
    for key in range(250):
        kept[key] = str(key)
        assert len(kept) == min(key + 1, 100 + key % 100 + 1)


def test_a_generation_is_given_up_a_few_values_at_a_time() -> None:
    """No step frees a whole one, and what waits to be freed is never more than one."""
    kept, most, alive = Generations[int, str](1000), 1000, list[int]()
    for key in range(3500):
        before = len(kept._leftovers)
        kept[key] = str(key)
        alive.append(len(kept._leftovers))
        assert before - len(kept._leftovers) <= 2
    assert max(alive) == most
    assert alive[2999] == 0
    kept.clear()
    assert len(kept._leftovers) == 0


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


@given(st.lists(st.integers(0, 30), max_size=200), st.integers(1, 20))
def test_what_was_made_lately_is_not_made_again(asked: Sequence[int], most: int) -> None:
    """Half as many as are held at most are sure to be there; never more, and never another's."""
    made: list[int] = []

    def make(key: int) -> str:
        made.append(key)
        return f"of {key}"

    recent = Recent(make, most)
    for place, key in enumerate(asked):
        before = len(made)
        assert recent(key) == f"of {key}"
        lately = list(dict.fromkeys(reversed(asked[:place])))[: most // 2]
        assert key not in lately or len(made) == before
        assert len(recent) <= max(most, 2)
        assert len(recent._leftovers) <= most


def test_names_of_many_visitors_are_nothing_that_the_collector_visits() -> None:
    """Of tens of thousands, keys in the protocol's form among them."""
    names = Names(secrets.token_bytes(32), "fleet")
    rule = LimitRule(Limit(1, 1))
    gc.collect()
    before = len(gc.get_objects())
    for number in range(3000):
        visitor = names.visitor(f"web\x1f{number:08x}")
        packed = visitor.token(names.token_name(f"key{number}"))
        visitor.last_call = ReadyCall(f"key{number}", rule, number, number, packed)
    gc.collect()
    assert len(gc.get_objects()) < before + 100
