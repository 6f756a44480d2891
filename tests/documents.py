"""The pages of the documentation, as tests read them: by heading, whichever page it stands on.

A heading that a test asks for stands on one page only; a second one is an error, because the test
would otherwise read the wrong table without a word.
"""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

FOLDERS = ("*.md", "broker/**/*.md", "config/**/*.md", "grafana/*.md", "tests/*.md", ".github/*.md")
"""Where pages may stand; not below: packages of Node bring pages of their own."""

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for pattern in FOLDERS
    for path in sorted(ROOT.glob(pattern))
}
"""The text of each page by its path from the root, the README first."""

README = PAGES["README.md"]

TEXT = "\n".join(PAGES.values())
"""All pages: for what has to be said somewhere."""


class Section(NamedTuple):
    """What stands between a heading and the next one, of whatever level."""

    page: str
    level: int
    heading: str
    text: str


class Block(NamedTuple):
    """A fenced block: its language, its text, and the heading and page on which it stands."""

    language: str
    text: str
    heading: str
    page: str


def _read(page: str) -> tuple[list[Section], list[Block]]:
    """Return sections and blocks of a page, in order."""
    sections, blocks = [], []
    level, heading, prose = 0, "", list[str]()
    language, code = None, list[str]()
    for line in PAGES[page].splitlines():
        title = None if language is not None else re.fullmatch(r"(#+) (.+)", line)
        if title:
            sections.append(Section(page, level, heading, "\n".join(prose)))
            level, heading, prose = len(title[1]), title[2], []
            continue
        prose.append(line)
        if language is None and line.startswith("```"):
            language, code = line[3:], []
        elif language is not None and line == "```":
            blocks.append(Block(language, "\n".join(code) + "\n", heading, page))
            language = None
        elif language is not None:
            code.append(line)
    assert language is None, f"{page}: a block under {heading!r} does not end"
    sections.append(Section(page, level, heading, "\n".join(prose)))
    return [section for section in sections if section.level], blocks


SECTIONS = [section for page in PAGES for section in _read(page)[0]]

BLOCKS = [block for page in PAGES for block in _read(page)[1]]


def section(heading: str) -> Section:
    """Return the one section that is called so."""
    found = [section for section in SECTIONS if section.heading == heading]
    assert len(found) == 1, (heading, [section.page for section in found])
    return found[0]


def below(heading: str) -> list[Section]:
    """Return the sections of a page that belong to this one: up to its equal or better."""
    top = section(heading)
    found = []
    for other in SECTIONS[SECTIONS.index(top) + 1 :]:
        if other.page != top.page or other.level <= top.level:
            break
        found.append(other)
    return found


def of(language: str) -> list[Block]:
    """Return the blocks of one language; there must be some, or a test would prove nothing."""
    found = [block for block in BLOCKS if block.language == language]
    assert found
    return found


def under(heading: str, language: str) -> Block:
    """Return the one block of a language under a heading."""
    (found,) = [block for block in of(language) if block.heading == heading]
    return found


def table(first_column: str, heading: str) -> list[list[str]]:
    """Return the rows of the one table under `heading` whose first column is called so."""
    lines = [line for line in section(heading).text.splitlines() if line.startswith("|")]
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[start + 2 :]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if set(cells[0]) <= {"-", ":"}:  # the rule below the head of the next table
            rows.pop()
            break
        rows.append(cells)
    assert rows
    return rows


def code_in(cell: str) -> list[str]:
    """Return what a cell shows as code."""
    return re.findall(r"`([^`]+)`", cell)


def words_of(line: str) -> Iterator[list[str]]:
    """Yield the commands of a line as words: without `sudo`, and without variables before them."""
    for command in re.split(r" (?:&&|\|) ", line):
        words = shlex.split(command, comments=True)
        while words and (words[0] == "sudo" or re.fullmatch(r"[A-Z_]+=.*", words[0])):
            words = words[1:]
        if words:
            yield words


def commands() -> Iterator[list[str]]:
    """Yield every command of every shell block of every page as words."""
    for block in of("sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            yield from words_of(line)


def anchor(heading: str) -> str:
    """Return the anchor of a heading as GitHub makes it: lower case, hyphens for blanks."""
    return re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")


def anchors(page: str) -> set[str]:
    """Return the anchors of a page."""
    return {anchor(section.heading) for section in SECTIONS if section.page == page}


def links(page: str) -> Iterator[tuple[str, str]]:
    """Yield every link that stays in the repository: its path from the root, and its anchor."""
    prose = re.sub(r"(?ms)^```.*?^```$", "", PAGES[page])
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose):
        path, _, fragment = target.partition("#")
        yield os.path.normpath(Path(page).parent / path) if path else page, fragment
