"""Reading replies: what is one is read in any pieces; what is none fails, and costs no memory."""

import tracemalloc
from contextlib import suppress
from itertools import pairwise

import pytest
from bad_replies import BAD
from hypothesis import example, given
from hypothesis import strategies as st

from broker.valkey.client.errors import NoScript, StoreFailed
from broker.valkey.client.resp import (
    DEEPEST,
    LONGEST_LINE,
    LONGEST_REPLY,
    MOST_ELEMENTS,
    Reader,
    Reply,
)

replies: st.SearchStrategy[Reply] = st.recursive(
    st.none() | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=12,
).filter(lambda reply: depth(reply) <= DEEPEST)

CUT = (b"$5\r\n", b"*3\r\n:1\r\n", b":12", b"$-", b"*", b"$3\r\nab", b"+O", b"*1\r\n*1\r\n", b"\r")


def depth(reply: Reply) -> int:
    """Count arrays within arrays."""
    return 1 + max(map(depth, reply), default=0) if isinstance(reply, list) else 0


def packed(reply: Reply) -> bytes:
    """Return the server's form of a reply."""
    match reply:
        case None:
            return b"$-1\r\n"
        case int():
            return b":%d\r\n" % reply
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case _:
            return b"*%d\r\n" % len(reply) + b"".join(map(packed, reply))


def read(*pieces: bytes) -> list[object]:
    """Feed a new reader; returns all that it says."""
    reader, told = Reader(), []
    for piece in pieces:
        reader.feed(piece)
        while (reply := reader.take()) is not False:
            told.append(reply)
    return told


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut into pieces."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[here:there] for here, there in pairwise(places)]


@given(told=st.lists(replies, max_size=4), cuts=st.lists(st.integers(0, 10_000), max_size=8))
def test_replies_are_read_in_any_pieces(told: list[Reply], cuts: list[int]) -> None:
    """All of them, in order, each as soon as its last byte is there."""
    data = b"".join(map(packed, told))
    assert read(*pieces_of(data, cuts)) == told
    assert read(*(data[place : place + 1] for place in range(len(data)))) == told


lines = st.from_regex(rb":[0-9 +_-]{0,25}", fullmatch=True) | st.integers().map(b":%d".__mod__)


@given(data=st.lists(lines, max_size=5).map(b"\r\n".join) | st.binary(), ended=st.booleans())
@example(data=b":1\r\n:22\r\n:-3", ended=True)
@example(data=b":" + b"0" * 20 + b"1", ended=True)
@example(data=b":1\r\n+2", ended=True)
@example(data=b":1\r\n", ended=True)
def test_numbers_are_what_is_read_one_by_one(data: bytes, ended: bool) -> None:
    """The same bytes in one step, or none of them; then they are still all to be read."""
    data += b"\r\n" * ended
    reader = Reader()
    numbers = reader.numbers(data)
    assert not reader.is_amid
    if numbers is not None:
        assert numbers == read(data)
    elif data and all(type(each) is int for each in outcome(data)):
        assert not data.endswith(b"\r\n")


@pytest.mark.parametrize("begun", [b":1", b"*2\r\n", b"*2\r\n:1\r\n", b"$5\r\nab"])
def test_numbers_amid_a_reply_are_part_of_it(begun: bytes) -> None:
    """They are read with what has begun."""
    reader = Reader()
    reader.feed(begun)
    assert reader.take() is False
    assert reader.numbers(b":1\r\n") is None


def outcome(data: bytes) -> list[object]:
    """Return what is read until the end, or until it is found to be no replies."""
    reader, told = Reader(), list[object]()
    reader.feed(data)
    try:
        while (reply := reader.take()) is not False:
            told.append(reply)
    except StoreFailed as failed:
        return [*told, failed.detail]
    return told


@given(line=st.text("0159-+_ x\t", max_size=24).map(str.encode))
@example(b"9" * 20)
@example(b"9" * 21)
@example(b"")
def test_a_number_that_stands_alone_is_read_as_within_an_array(line: bytes) -> None:
    """The one step takes what the reader takes, and no more."""
    alone, within = outcome(b":%b\r\n" % line), outcome(b"*1\r\n:%b\r\n" % line)
    assert within == ([alone] if isinstance(alone[0], int) else alone)


@given(told=replies)
def test_what_has_begun_is_known_until_it_has_ended(told: Reply) -> None:
    """Byte by byte."""
    reader, data = Reader(), packed(told)
    assert not reader.is_amid
    for place in range(len(data) - 1):
        reader.feed(data[place : place + 1])
        assert reader.take() is False
        assert reader.is_amid
    reader.feed(data[-1:])
    assert reader.take() == told
    assert reader.take() is False
    assert not reader.is_amid


@given(before=st.sampled_from([b"", *CUT]), data=st.binary(max_size=60))
@example(b"", b"%1\r\n*1\r\n:1\r\n:2\r\n")
@example(b"", b"*\xb2\r\n")
def test_whatever_arrives_is_read_or_fails(before: bytes, data: bytes) -> None:
    """As the store's failure, and in no other way."""
    with suppress(StoreFailed):
        read(before, data)


@pytest.mark.parametrize(
    "data",
    [
        b"*%d\r\n" % (MOST_ELEMENTS + 1),
        b"*2147483647\r\n",
        b"*-2\r\n",
        b"$-2\r\n",
        b"$%d\r\n" % (LONGEST_REPLY + 1),
        b"$99999999999999999999999999\r\n",
        b"*1\r\n" * (DEEPEST + 1),
        b"+" + b"x" * (LONGEST_LINE + 1),
        b":" + b"1" * 21 + b"\r\n",
        b":x\r\n",
        b":\r\n",
        b"$3\r\nabcd\r\n",
        b"$?\r\n",
        b"*1\r\n-ERR x\r\n",
        b"*2\r\n" + b"$600000\r\n" + b"x" * 600_000 + b"\r\n$600000\r\n",
        *(b"%b1\r\n" % bytes([kind]) for kind in b"%~|>,#_(=!X\r\n\0"),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_none_of_ours_fails_with_its_first_line(data: bytes) -> None:
    """In one piece and byte by byte; nobody waits for the rest of what is too large."""
    for pieces in ([data], [data[place : place + 1] for place in range(len(data))]):
        with pytest.raises(StoreFailed, match="other"):
            read(*pieces)


@pytest.mark.parametrize("name", BAD)
def test_what_is_said_instead_of_a_reply_costs_no_memory(name: str) -> None:
    """A thousand times the same, in pieces of a thousand bytes."""
    reader, data = Reader(), BAD[name].said * 1000
    tracemalloc.start()
    try:
        for place in range(0, min(len(data), 2**22), 1000):
            reader.feed(data[place : place + 1000])
            while reader.take() is not False:
                pass
    except StoreFailed:
        pass
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 8 * LONGEST_REPLY


def test_errors_are_what_they_mean() -> None:
    """Whatever bytes they have; between other replies."""
    first, second, third = read(b"+OK\r\n-NOSCRIPT x\r\n", b"-\xff\xfe\r\n")
    assert first == b"OK"
    assert isinstance(second, NoScript)
    assert isinstance(third, StoreFailed)


@pytest.mark.parametrize("line", [b"1_0", b" 5", b"5 ", b"5\n", b"+5", b"", b"--5", b"1" * 21])
def test_S1_what_only_python_takes_for_a_number_is_none(line: bytes) -> None:
    """Whoever writes so is no server: as a number, as a length, by itself or among others."""
    assert Reader().numbers(b":1\r\n:" + line + b"\r\n") is None
    for data in (b":" + line + b"\r\n", b"$" + line + b"\r\n12345\r\n", b"*" + line + b"\r\n"):
        reader = Reader()
        reader.feed(data)
        with pytest.raises(StoreFailed):
            reader.take()
