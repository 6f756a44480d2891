"""`broker store acl`: the rule for the shared store's ACL file."""

import argparse
import os

from broker.cli.base import Commands
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.exit_codes import EX_OK
from broker.telemetry.streams import tell

NAME = "a name without blanks, as the server's ACL file has it"
"""What a user must be; anything more would be read as rules."""


def add(commands: Commands) -> None:
    """Add the command."""
    below = commands.below("store", "prepare the shared store")
    text = "print the rule for its ACL file: enough for a broker, and no more"
    parser = below.add("acl", text, run, example="--user broker")
    parser.add_argument("--user", metavar="NAME", help="instead of [store] username")


def run(arguments: argparse.Namespace) -> int:
    """Print the rule; without a configuration, the one of an ordinary store."""
    from broker.config import load as config
    from broker.config.addresses import StoreAddress, parse_store_url
    from broker.valkey.client.scripts import acl_line

    if arguments.user is not None and not _is_name(arguments.user):
        arguments.parser.error(f"argument --user: {NAME}")
    path = config.find_file(arguments.config, os.environ)
    settings = Settings() if path is None else config.load(path, os.environ, {})
    user = arguments.user or settings.store.username or "broker"
    if not _is_name(user):
        raise ConfigError(f"store.username: {NAME}")
    address = parse_store_url(settings.store.url)
    server = address if isinstance(address, StoreAddress) else StoreAddress()
    tell(acl_line(user, ">PASSWORD", cluster=server.cluster, database=server.db > 0))
    return EX_OK


def _is_name(user: str) -> bool:
    return user.isprintable() and bool(user) and " " not in user
