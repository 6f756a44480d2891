"""`broker completion SHELL`: a script that makes a shell complete this command line.

Written from the parser, so it knows every command and flag, and needs neither Python nor this
package while one types.  (shtab writes such scripts, too, and would be loaded by everybody who
installs the broker, for a command that is typed once.)
"""

import argparse
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from broker.cli.base import Commands, Parser
from broker.exit_codes import EX_OK
from broker.telemetry.streams import tell

HELP = "broker help"
"""Left out of the scripts: what follows it is what follows `broker`."""


class Word(NamedTuple):
    """What can be typed: a command, a flag or one of a few values; `takes` is FILE, DIR or else."""

    text: str
    about: str
    takes: str = ""


class Place(NamedTuple):
    """Words typed so far, and those that may follow."""

    path: str
    commands: list[Word]
    options: list[Word]
    values: list[Word]

    @property
    def words(self) -> list[Word]:
        """Everything that may follow."""
        return [*self.commands, *self.values, *self.options]


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "completion",
        "print a script by which a shell completes commands and flags",
        run,
        example="bash > ~/.local/share/bash-completion/completions/broker",
        needs_config=False,
    )
    parser.add_argument("shell", metavar="SHELL", choices=list(SCRIPTS), help=", ".join(SCRIPTS))
    parser.set_defaults(top=commands.parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    found = [place for place in places(arguments.top) if place.path != HELP]
    tell(SCRIPTS[arguments.shell](found).removesuffix("\n"))
    return EX_OK


def places(parser: Parser) -> Iterator[Place]:
    """Yield each command, from the top."""
    options, values = [], []
    for action in parser.options:
        about = (action.help or "") % {"default": action.default}
        takes = "" if action.nargs == 0 else str(action.metavar or "VALUE")
        options += [Word(name, about, takes) for name in action.option_strings]
        if not action.option_strings and action.choices:
            values += [Word(str(choice), "") for choice in action.choices]
    commands = [Word(name, below.description or "") for name, below in parser.commands.items()]
    yield Place(parser.prog, commands, options, values)
    for below in parser.commands.values():
        yield from places(below)


def _paths(found: list[Place]) -> str:
    """Write the places below the top as a pattern of a shell's `case`."""
    return "|".join(f'"{place.path}"' for place in found[1:])


def _taking(found: list[Place], *kinds: str) -> str:
    """Write the flags that take a value of these kinds, behind their place, as such a pattern."""
    return "|".join(
        f'"{place.path} {word.text}"'
        for place in found
        for word in place.options
        if word.takes in kinds
    )


def _others(found: list[Place]) -> list[str]:
    """Return the kinds of values of which a shell knows nothing."""
    kinds = {word.takes for place in found for word in place.options}
    return sorted(kinds - {"", "FILE", "DIR"})


def bash(found: list[Place]) -> str:
    """Write the script for bash 4 or later; needs nothing beside it."""
    cases = "\n".join(
        f'    "{place.path}") words="{" ".join(word.text for word in place.words)}" ;;'
        for place in found
    )
    return f"""\
# bash completion for broker, by `broker completion bash`
_broker() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
  local at=broker word words=
  COMPREPLY=()
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "$at $word" in {_paths(found)}) at+=" $word" ;; esac
  done
  case "$at $before" in
    {_taking(found, "FILE")}) compopt -o filenames
      mapfile -t COMPREPLY < <(compgen -f -- "$current"); return ;;
    {_taking(found, "DIR")}) compopt -o filenames
      mapfile -t COMPREPLY < <(compgen -d -- "$current"); return ;;
    {_taking(found, *_others(found))}) return ;;
  esac
  case "$at" in
{cases}
  esac
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}}
complete -F _broker broker
"""


def zsh(found: list[Place]) -> str:
    """Write the script for zsh: in a folder of $fpath as `_broker`, or read by `source`."""
    cases = "\n".join(
        f'    "{place.path}") may=({" ".join(_described(word) for word in place.words)}) ;;'
        for place in found
    )
    return f"""\
#compdef broker
# zsh completion for broker, by `broker completion zsh`
_broker() {{
  local at=broker word before=${{words[CURRENT-1]}}
  local -a may
  for word in "${{(@)words[2,CURRENT-1]}}"; do
    case "$at $word" in ({_paths(found)}) at+=" $word" ;; esac
  done
  case "$at $before" in
    ({_taking(found, "FILE")}) _files; return ;;
    ({_taking(found, "DIR")}) _files -/; return ;;
    ({_taking(found, *_others(found))}) return ;;
  esac
  case "$at" in
{cases}
  esac
  _describe -t commands broker may
}}
if [ "${{funcstack[1]}}" = _broker ]; then _broker "$@"; else compdef _broker broker; fi
"""


def _described(word: Word) -> str:
    return shlex.quote(f"{word.text}:{word.about}" if word.about else word.text)


def fish(found: list[Place]) -> str:
    """Write the script for fish."""
    lines = [
        f"complete -c broker -n '__broker_at \"{place.path}\"' {_fish_word(word)}"
        for place in found
        for word in place.words
    ]
    patterns = _paths(found).replace("|", " ")
    return f"""\
# fish completion for broker, by `broker completion fish`
function __broker_at
  set -l at broker
  for word in (commandline -opc)[2..-1]
    switch "$at $word"
      case {patterns}
        set at "$at $word"
    end
  end
  test "$at" = "$argv"
end
complete -c broker -f
{chr(10).join(lines)}
"""


def _fish_word(word: Word) -> str:
    about = f" -d {_fish_quoted(word.about)}" if word.about else ""
    if not word.text.startswith("-"):
        return f"-a {word.text}{about}"
    name = f"-l {word.text[2:]}" if word.text.startswith("--") else f"-s {word.text[1:]}"
    value = {"": "", "FILE": " -r -F", "DIR": " -x -a '(__fish_complete_directories)'"}
    return f"{name}{value.get(word.takes, ' -x')}{about}"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}
"""How each is written, by the shell's name."""
