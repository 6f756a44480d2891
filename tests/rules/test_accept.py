"""What an Accept header prefers."""

from hypothesis import given
from hypothesis import strategies as st

from broker.rules.accept import ranges


def test_quality_comes_first_then_the_order() -> None:
    """Parameters stay, but for `q`; what is broken is dropped; 0 stays, as a word of refusal."""
    found = ranges("a/b;q=0.5;v=1, c/d, E/F;q=0, g/h;q=1.5, i/j;q=x, ,k/l; q = 0.5")
    assert [tuple(one) for one in found] == [
        ("c/d", {}, 1.0),
        ("a/b", {"v": "1"}, 0.5),
        ("k/l", {}, 0.5),
        ("e/f", {}, 0.0),
    ]


@given(st.text(alphabet=' ,;=/*q.0195"nait-', max_size=60) | st.text(max_size=60))
def test_no_header_is_an_exception_and_the_order_is_by_quality(accept: str) -> None:
    """Whatever is sent."""
    qualities = [one.quality for one in ranges(accept)]
    assert qualities == sorted(qualities, reverse=True)
    assert all(0 <= quality <= 1 for quality in qualities)
