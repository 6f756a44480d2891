"""The code's own words: what was renamed does not come back."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BROKER = ROOT / "broker"
TESTS = ROOT / "tests"

RETIRED = {
    "Ask",
    "Asker",
    "Askers",
    "Board",
    "Book",
    "BookFull",
    "CREW",
    "Carried",
    "Child",
    "Conversation",
    "Credentials",
    "Crew",
    "Denial",
    "Door",
    "Elsewhere",
    "EndsVisitors",
    "FINISH",
    "Flights",
    "Followed",
    "Forgotten",
    "Front",
    "HOPELESS",
    "Handout",
    "KnownClient",
    "LimitSet",
    "LocalRefusals",
    "Made",
    "MemoryBook",
    "PATIENCE",
    "PATIENT",
    "PROBING",
    "Paced",
    "Patience",
    "PauseKeeper",
    "Refusals",
    "Registrar",
    "Seat",
    "SessionBook",
    "SessionDesk",
    "SessionRegister",
    "SharedBook",
    "SharedRefusals",
    "Sharing",
    "Sheet",
    "Sibling",
    "StoreHealth",
    "Ticket",
    "TokenBucket",
    "TokenDesk",
    "Unpaced",
    "Urgency",
    "ValkeyBook",
    "_Asked",
    "_board",
    "_front",
    "_roll",
    "ask",
    "ask_of",
    "asker",
    "askers",
    "asks",
    "board",
    "book",
    "crew",
    "denial",
    "door",
    "end_visitor",
    "front",
    "handout",
    "hear",
    "heard_news",
    "make_up",
    "patience",
    "patient",
    "plenty",
    "seat",
    "sharing",
    "sheet",
    "take_if_plenty",
}
"""Names of what the field has another word for; the glossary of CONTRIBUTING has both."""


def names_in(source: str) -> set[str]:
    """Return the identifiers of a program."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


@pytest.mark.parametrize(
    "file",
    sorted([*BROKER.rglob("*.py"), *TESTS.rglob("*.py")]),
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_no_retired_word_is_an_identifier(file: Path) -> None:
    """Neither a class nor a variable, an argument or an attribute."""
    assert not names_in(file.read_text(encoding="utf-8")) & RETIRED


def test_the_check_sees_identifiers_and_nothing_else() -> None:
    """A word in a comment or in a text is no name."""
    assert names_in("def f(Ask): # Door\n    return 'Seat'\n") & RETIRED == {"Ask"}


def test_modules_are_small_enough_to_read() -> None:
    """400 lines at most, as `.github/CONTRIBUTING.md` says."""
    lines = {
        str(file.relative_to(BROKER)): len(re.findall("\n", file.read_text(encoding="utf-8")))
        for file in BROKER.rglob("*.py")
    }
    assert {name: count for name, count in lines.items() if count > 400} == {}
