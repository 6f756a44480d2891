"""`broker version`: which one this is."""

import argparse

from broker.cli.base import Commands
from broker.exit_codes import EX_OK
from broker.telemetry.streams import tell
from broker.version import VERSION

NAMED = f"embed-token-broker {VERSION}"


def add(commands: Commands) -> None:
    """Add the command."""
    commands.add("version", "print the version", run, needs_config=False)


def run(_arguments: argparse.Namespace) -> int:
    """Print it, as --version does."""
    tell(NAMED)
    return EX_OK
