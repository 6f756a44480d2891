"""`broker store acl`: the rule for the shared store's ACL file."""

import argparse
import os

from broker.cli.base import Commands
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.exit_codes import EX_OK
from broker.telemetry.streams import tell


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

    path = config.find_file(arguments.config, os.environ)
    settings = Settings() if path is None else config.load(path, os.environ, {})
    user = arguments.user or settings.store.username or "broker"
    if not user.isprintable() or " " in user:
        raise ConfigError("--user: a name without blanks, as the server's ACL file has it")
    address = parse_store_url(settings.store.url)
    server = address if isinstance(address, StoreAddress) else StoreAddress()
    tell(acl_line(user, ">PASSWORD", cluster=server.cluster, database=server.db > 0))
    return EX_OK
