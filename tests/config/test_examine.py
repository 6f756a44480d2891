"""All that is wrong with a tree at once: every finding is true, and none stops the search."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from processes import Tree, merged
from test_config import WRONG, keys

from broker.config import load as config
from broker.config.schema import ConfigError, without

NAMES = [name for name, _ in keys()]

VALUES: st.SearchStrategy[Any] = st.one_of(
    st.booleans(),
    st.integers(-1, 10**7),
    st.floats(),
    st.sampled_from(["", "x", "5s", "0s", "127.0.0.1:1", "[::]:1", "upstream", "memory://", "/x"]),
    st.sampled_from([value for _, value, _ in WRONG]),
    st.lists(st.sampled_from(["", "*", "10.0.0.1", "/x"]), max_size=2),
    st.dictionaries(st.sampled_from(["rate", "burst", "x"]), st.integers(-1, 5), max_size=2),
)

changes = st.dictionaries(
    st.sampled_from([*NAMES, "server.lisen", "clients", "limits.client", "issuer.budget", "x"]),
    VALUES,
    max_size=6,
)


@profile(max_examples=300, deadline=None)
@given(changes=changes)
@example(changes={"issuer.upstream.pass_through": ["", ""]})
def test_any_tree_is_examined_to_its_end(changes: Tree) -> None:
    """Settings come of it whatever is in it, and the loader raises the first problem, if any."""
    tree = merged({}, changes)
    found = config.examine_tree(tree)
    assert all(str(problem).isprintable() for problem in found.problems if problem.key in NAMES)
    texts = [str(problem) for problem in found.problems]
    assert len(set(texts)) == len(texts)
    if not texts:
        assert config.from_tree(tree) == found.settings
        return
    with pytest.raises(ConfigError) as caught:
        config.from_tree(tree)
    assert str(caught.value) == texts[0]


@profile(max_examples=200, deadline=None)
@given(changes=changes)
def test_what_is_mended_is_told_no_more(changes: Tree) -> None:
    """Without what does not fit, and tables that lack it, the same rules are broken as before."""
    tree = merged({}, changes)
    first = again = config.examine_tree(tree)
    for _ in range(3):
        for key in again.left_out:
            tree = without(tree, tuple(key.split(".")))
        again = config.examine_tree(tree)
    assert again.left_out == []
    rules = {str(problem) for problem in first.problems if problem.key not in first.left_out}
    assert rules <= {str(problem) for problem in again.problems}
