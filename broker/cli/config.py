"""`broker config show`: the configuration in force, secrets masked."""

import argparse
import os

from broker.cli import example
from broker.cli.base import Commands, overridden, settings_of
from broker.config import schema
from broker.config.settings import Settings
from broker.exit_codes import EX_OK
from broker.telemetry.streams import one_line, tell


def add(commands: Commands) -> None:
    """Add the command."""
    below = commands.below("config", "show the configuration in force, its schema, or an example")
    text = "print the configuration in force, secrets masked"
    below.add("show", text, run, example="--config /etc/embed-token-broker/broker.toml")
    text = "print a JSON Schema of the file, for editors"
    below.add("schema", text, print_schema, example="", needs_config=False)
    example.add(below)


def print_schema(_arguments: argparse.Namespace) -> int:
    """Print the schema of a configuration file."""
    import json

    from broker.config.json_schema import json_schema

    tell(json.dumps(json_schema(), indent=1))
    return EX_OK


def run(arguments: argparse.Namespace) -> int:
    """Print the settings, and what is used for those that are left out."""
    settings = settings_of(arguments)
    found = overridden(arguments)
    notes = {key: one_line(f"{name} counts, not the file") for key, name in found.items()}
    tell(schema.show(settings, notes | _resolved(settings)).removesuffix("\n"))
    return EX_OK


def _resolved(settings: Settings) -> dict[str, str]:
    """Say of keys that are left out what is used in their place."""
    from broker.config.load import VENDOR_VARIABLES

    notes = {}
    local, upstream = settings.issuer.local, settings.issuer.upstream
    if settings.issuer.kind == "local" and not local.signing_key and len(local.keys) == 1:
        notes["issuer.local.signing_key"] = f"the only key signs: {next(iter(local.keys))}"
    variable = next((name for name in VENDOR_VARIABLES if os.environ.get(name)), None)
    given = upstream.api_secret or upstream.api_secret_files
    if settings.issuer.kind == "upstream" and variable and not given:
        notes["issuer.upstream.api_secret"] = f"the key in {variable} is used"
    if settings.issuer.kind == "upstream" and not (upstream.proxy or upstream.proxy_file):
        from broker.app import credentials

        proxy = credentials.vendor_proxy(settings, os.environ)
        if proxy is not None:
            notes["issuer.upstream.proxy"] = f"{proxy.source} is used"
    return notes
