"""N25: an error reaches the log by its type and its place, whatever it carries and however deep."""

import io
import json
import secrets
from collections.abc import Callable
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from web.edge import logging_to

from broker.config.settings import LogSettings, Settings
from broker.telemetry import traces
from broker.telemetry.streams import LONGEST

FORMS = ["json", "console"]


class Canary(Exception):
    """An error of which everything that it has is a secret."""

    def __init__(self, secret: str) -> None:
        super().__init__(secret, {secret: secret})
        self.secret = secret
        self.add_note(f"note {secret}")

    def __repr__(self) -> str:
        return self.secret

    def __str__(self) -> str:
        return self.secret


def raised(error: BaseException, secret: str) -> BaseException:
    """Raise it in frames whose locals hold a secret."""

    def inner(argument: str) -> None:
        local = [argument, {argument: argument}]
        assert local
        raise error

    try:
        inner(secret)
    except BaseException as caught:  # noqa: BLE001 - whatever it is
        return caught
    raise AssertionError("it was raised")


def chained(error: BaseException, other: BaseException, *, cause: bool) -> BaseException:
    """Let one come from the other."""
    if cause:
        error.__cause__ = other
    else:
        error.__context__ = other
    return error


def syntax_error(secret: str) -> SyntaxError:
    """An error that carries a line of source."""
    error = SyntaxError(secret, (f"{secret}.py", 1, 1, f"token = {secret!r}", 1, 9))
    error.print_file_and_line = secret
    error.add_note(secret)
    return error


def failed_decoding(secret: str) -> UnicodeDecodeError:
    """An error that carries bytes."""
    return UnicodeDecodeError(secret, secret.encode(), 0, 1, secret)


LEAVES: list[Callable[[str], BaseException]] = [
    Canary,
    syntax_error,
    failed_decoding,
    KeyError,
    lambda secret: OSError(2, secret, secret, None, secret),
    lambda secret: AttributeError(secret, name=secret, obj=secret),
    lambda secret: ImportError(secret, name=secret, path=secret),
    StopIteration,
    SystemExit,
]

leaves = st.sampled_from(LEAVES).map(lambda make: ("leaf", make))
trees = st.recursive(
    leaves,
    lambda inner: (
        st.tuples(st.just("group"), st.lists(inner, min_size=1, max_size=3))
        | st.tuples(st.just("cause"), inner, inner)
        | st.tuples(st.just("context"), inner, inner)
    ),
    max_leaves=12,
)


def grown(tree: Any, secret: str) -> BaseException:
    """Make the error that a tree describes, with the secret wherever there is room for one."""
    match tree:
        case ("leaf", make):
            return raised(make(secret), secret)
        case ("group", members):
            group = BaseExceptionGroup(secret, [grown(member, secret) for member in members])
            group.add_note(secret)
            return raised(group, secret)
        case (kind, one, other):
            return chained(grown(one, secret), grown(other, secret), cause=kind == "cause")
    raise AssertionError(tree)


def logged(error: BaseException, form: Any) -> str:
    """Return what the log says of a defect."""
    stream = io.StringIO()
    with logging_to(stream, Settings(log=LogSettings(format=form))):
        structlog.get_logger().error("broker.defect", exc_info=error)
    return stream.getvalue()


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=120, deadline=None)
@given(tree=trees)
def test_N25_no_value_of_any_error_reaches_the_log(form: str, tree: Any) -> None:
    """Groups in groups, causes of contexts, notes everywhere: not one canary shows."""
    secret = secrets.token_hex(8)
    written = logged(grown(tree, secret), form)
    assert secret not in written
    assert "broker.defect" in written
    assert "raised" in written  # where it came from is told
    assert len(written) < LONGEST


def test_N25_a_group_is_told_by_its_members() -> None:
    """Types and lines of all of them, in the shape that a program reads."""
    secret = secrets.token_hex(8)
    first = chained(raised(Canary(secret), secret), KeyError(secret), cause=True)
    group = raised(ExceptionGroup(secret, [first, ValueError(secret)]), secret)
    (record,) = map(json.loads, logged(group, "json").splitlines())
    (outer,) = record["exception"]
    assert set(outer) == {"exc_type", "is_cause", "frames", "exceptions"}
    assert [frame["name"] for frame in outer["frames"]] == ["raised", "inner"]
    assert set(outer["frames"][0]) == {"filename", "lineno", "name"}
    told = [
        [(error["exc_type"], error["is_cause"]) for error in member]
        for member in outer["exceptions"]
    ]
    assert told == [[("Canary", False), ("KeyError", True)], [("ValueError", False)]]


def test_N25_people_read_the_same() -> None:
    """Causes and members by their types, indented."""
    secret = secrets.token_hex(8)
    first = chained(Canary(secret), KeyError(secret), cause=True)
    second = chained(ValueError(secret), OSError(secret), cause=False)
    lines = traces.lines(traces.chain(ExceptionGroup(secret, [first, second])))
    assert lines == [
        "ExceptionGroup",
        "  together with:",
        "    Canary",
        "    caused by:",
        "    KeyError",
        "  together with:",
        "    ValueError",
        "    while handling:",
        "    OSError",
    ]


def test_N25_a_circle_and_a_crowd_and_a_recursion_are_bounded() -> None:
    """Whatever it is, a line can carry it, and it ends."""
    one, other = ValueError(), KeyError()
    chained(one, other, cause=True)
    chained(other, one, cause=False)
    assert [trace["exc_type"] for trace in traces.chain(one)] == ["ValueError", "KeyError"]

    def deeper(depth: int) -> None:
        if depth:
            deeper(depth - 1)
        raise ValueError

    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its type is all it has
        deeper(500)
    crowd = ExceptionGroup(
        "", [raised(caught.value, "")] * 3 + [ValueError(n) for n in range(5000)]
    )
    for form in FORMS:
        assert len(logged(crowd, form)) < LONGEST
    assert sum(len(trace["frames"]) for trace in traces.chain(caught.value)) == traces.MOST_FRAMES


def test_N25_a_cause_of_a_deep_error_takes_no_more_room() -> None:
    """The frames of one event are bounded, not those of each error; its type is told still."""

    def deeper(depth: int) -> None:
        if depth:
            deeper(depth - 1)
        raise ValueError

    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its type is all it has
        deeper(500)
    told = traces.chain(chained(caught.value, raised(KeyError(), ""), cause=True))
    assert [trace["exc_type"] for trace in told] == ["ValueError", "KeyError"]
    assert sum(len(trace["frames"]) for trace in told) == traces.MOST_FRAMES


def test_N25_a_hidden_context_stays_hidden() -> None:
    """`raise ... from None` means it."""
    error = chained(ValueError(), KeyError(), cause=False)
    error.__suppress_context__ = True
    assert [trace["exc_type"] for trace in traces.chain(error)] == ["ValueError"]


@pytest.mark.parametrize("form", FORMS)
def test_N25_what_cannot_be_written_is_told_and_not_raised(form: Any) -> None:
    """Values without a repr, circles, a stack at its end; nothing of them shows."""
    secret = secrets.token_hex(8)

    class Odd:
        def __repr__(self) -> str:
            raise Canary(secret)

        __str__ = __repr__

    circle: list[Any] = [secret]
    circle.append(circle)
    stream = io.StringIO()
    with logging_to(stream, Settings(log=LogSettings(format=form))):
        log = structlog.get_logger()
        log.info("broker.example", value=Odd())
        log.info("broker.example", value={(secret,): 1})
        log.info("broker.example", value=circle)
    written = stream.getvalue()
    assert written.count("broker.unprintable") >= 1
    assert len(written.splitlines()) == 3
    if form == "json":
        assert secret not in written
