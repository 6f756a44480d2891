"""The table of heads that came before: what is kept, for how long, and what never is."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.web.known_heads import (
    LONGEST,
    MAX_KNOWN,
    MAX_ONCE,
    TRACE,
    KnownHead,
    KnownHeads,
    split,
)

TRACED = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"
OTHER_TRACE = b"00-" + b"c" * 32 + b"-" + b"b" * 16 + b"-01"


def known_of(data: bytes, **headers: str) -> KnownHead:
    """Read a head, as far as the table wants to know."""
    message: Any = SimpleNamespace(headers=headers)
    handler: Any = None
    return KnownHead(split(data), len(data), message, handler, "", None)


def head_with(*lines: bytes) -> bytes:
    """Write a head."""
    return b"\r\n".join([b"GET /x HTTP/1.1", *lines, b"", b""])


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        *(
            (name, "x", False)
            for name in (
                *("Connection", "Content-Encoding", "Expect", "Origin", "TE", "Trailer"),
                *("Transfer-Encoding", "Upgrade"),
            )
        ),
        ("Connection", "close", False),
        ("Connection", "Keep-Alive", True),
        ("connection", "keep-alive, x", False),
        ("Cookie", "close", True),
        ("X-Origin", "x", True),
    ],
)
def test_a_head_that_says_how_to_go_on_is_read_each_time(
    name: str, value: str, *, kept: bool
) -> None:
    """Or who may ask; all others are kept, in whatever case they are written."""
    heads, data = KnownHeads(), head_with(f"{name}: {value}".encode())
    known = known_of(data, **{"Host": "h", name: value})
    heads.keep(known.head.compared, known)
    assert heads.known_in(data) == (known if kept else None)


def test_a_long_head_is_not_kept() -> None:
    """It has cookies or tokens, and seldom comes again; one of just that length is."""
    heads = KnownHeads()
    for more, kept in ((0, True), (1, False)):
        bare = len(head_with(b"A: "))
        data = head_with(b"A: " + b"a" * (LONGEST - bare + more))
        assert len(data) == LONGEST + more
        known = known_of(data)
        heads.keep(known.head.compared, known)
        assert (heads.known_in(data) is not None) is kept


def test_what_came_once_is_a_number_until_it_is_kept() -> None:
    """The first time it is new; once it is kept its number is given back."""
    heads = KnownHeads()
    data = head_with(b"A: b")
    head = split(data).compared
    assert [heads.came_before(head) for _ in range(3)] == [False, True, True]
    heads.keep(head, known_of(data))
    assert not heads._once
    heads.came_before(b"another")
    heads.clear()
    assert not heads._once
    assert heads.known_in(data) is None
    assert not heads.came_before(head)


def test_M1_heads_that_come_once_and_heads_that_are_kept_are_bounded() -> None:
    """Whatever is sent: numbers are dropped all at once, heads by their age."""
    heads = KnownHeads()
    for number in range(2 * MAX_ONCE):
        heads.came_before(b"%d" % number)
        assert len(heads._once) <= MAX_ONCE
    for number in range(3 * MAX_KNOWN):
        data = head_with(b"A: %d" % number)
        heads.keep(split(data).compared, known_of(data))
        assert len(heads) <= 2 * MAX_KNOWN
        assert heads.known_in(data) is not None


@given(
    opening=st.sampled_from([b"A: b", b"A: c"]),
    closing=st.sampled_from([b"", b"D: e", b"D: f"]),
    body=st.sampled_from([b"", b"x", b"xy"]),
    trace=st.sampled_from(
        [b"", TRACED, TRACED.replace(b"a", b"c"), TRACED.replace(b"-01", b"-0g")]
    ),
)
def test_a_head_is_known_by_all_of_its_bytes_but_its_trace(
    opening: bytes, closing: bytes, body: bytes, trace: bytes
) -> None:
    """And by the length of what comes with it; also if it was the last that was asked about."""
    heads = KnownHeads()

    def written(begin: bytes, told: bytes, end: bytes, rest: bytes) -> bytes:
        lines = [begin, *([b"traceparent: " + told] * bool(told)), *([end] * bool(end))]
        return head_with(*lines) + rest

    first = written(b"A: b", TRACED, b"D: e", b"x")
    known = known_of(first)
    assert known.head.trace_in(first) == TRACED.decode()
    assert len(known.head.trace_in(first)) == TRACE
    heads.keep(known.head.compared, known)
    data = written(opening, trace, closing, body)
    is_it = (
        (opening, closing, len(body)) == (b"A: b", b"D: e", 1)
        and bool(trace)
        and not trace.endswith(b"g")
    )
    for asked_before in (False, True):
        assert (heads.known_in(data) is not None) is is_it
        if not asked_before:
            assert heads.known_in(first) is known


def test_a_trace_in_a_body_is_none_of_the_head() -> None:
    """It is the caller's data, and may be anything."""
    body = b"\r\ntraceparent: " + TRACED + b"\r\n"
    head = split(head_with(b"A: b") + body)
    assert (head.at, head.trace_in(head_with(b"A: b") + body)) == (0, "")
    assert head.compared == head_with(b"A: b")
