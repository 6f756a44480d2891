"""`broker help COMMAND ...`: what --help of that command says."""

import argparse

from broker.cli.base import Commands, Parser, guessed
from broker.exit_codes import EX_OK
from broker.telemetry.streams import tell


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "help", "explain a command", run, example="keys rotate", needs_config=False
    )
    parser.add_argument("words", metavar="COMMAND", nargs="*", help="none: what commands there are")
    parser.set_defaults(top=commands.parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the help of the command that the words lead to."""
    found: Parser = arguments.top
    for word in arguments.words:
        if word not in found.commands:
            known = list(found.commands)
            arguments.parser.error(
                f"no command {word!r}: {guessed(word, known)}"
                if known
                else f"{found.prog!r} has no commands below it"
            )
        found = found.commands[word]
    tell(found.format_help().removesuffix("\n"))
    return EX_OK
