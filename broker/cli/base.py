"""What commands have in common: how they are added, where their settings come from.

A command is one file: `add` says what it is called and takes, and `run` does it and returns the
exit code.  What it works with is imported when it runs: `--help` waits for none of it, and `keys`
not for a server.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from typing_extensions import override

from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.exit_codes import EX_USAGE

Run = Callable[[argparse.Namespace], int]
"""Does what a command is for; returns its exit code.  Raises ConfigError."""

NOTHING_CONFIGURED = (
    "no configuration: pass --config FILE, set BROKER_CONFIG, set BITHUMAN_API_SECRET for a relay,"
    " or try `broker serve --dev`, which needs none; `broker mint` needs none with --url"
)


ALL_ROUTES = ("/v1/*", "/v2/*")
"""What a relay without a configuration passes on: its callers have the vendor's key, and an SDK has
one base URL for all that it calls."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    @override
    def error(self, message: str) -> NoReturn:
        self.exit(EX_USAGE, f"{self.prog}: {message}\n")


class Commands:
    """The commands of one parser: `broker ...`, or those below a word such as `broker keys ...`."""

    def __init__(self, parser: argparse.ArgumentParser, metavar: str = "COMMAND") -> None:
        self._parsers = parser.add_subparsers(required=True, metavar=metavar, parser_class=Parser)

    def add(
        self, name: str, text: str, run: Run, *, needs_config: bool = True
    ) -> argparse.ArgumentParser:
        """Add a command; one that needs a configuration has --config."""
        parser = self._parsers.add_parser(name, help=text)
        parser.set_defaults(run=run)
        if needs_config:
            parser.add_argument(
                "--config",
                metavar="FILE",
                help="instead of BROKER_CONFIG or /etc/embed-token-broker/broker.toml",
            )
        return parser

    def below(self, name: str, text: str, metavar: str = "COMMAND") -> "Commands":
        """Add a word that has commands of its own."""
        return Commands(self._parsers.add_parser(name, help=text), metavar)


def settings_of(arguments: argparse.Namespace, flags: Mapping[str, Any] | None = None) -> Settings:
    """Load the settings of a command that needs a configuration; raises ConfigError."""
    from broker.config import load as config
    from broker.config.state_folder import default_path

    path = config.find_file(arguments.config, os.environ)
    if path is not None:
        return config.load(path, os.environ, flags or {})
    if any(os.environ.get(name) for name in config.VENDOR_VARIABLES):
        file = default_path(os.environ)
        relay: dict[str, Any] = {
            "issuer": {"kind": "upstream"},
            "store": {"url": f"sqlite://{file}"},
        }
        settings = config.load(None, os.environ, flags or {}, relay)
        if settings.issuer.kind != "upstream":
            return settings
        relay["issuer"]["upstream"] = {"pass_through": ALL_ROUTES}
        return config.load(None, os.environ, flags or {}, relay)
    if not any(name.startswith("BROKER_") and "__" in name for name in os.environ):
        raise ConfigError(NOTHING_CONFIGURED)
    return config.load(None, os.environ, flags or {})


def overridden(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the keys of the file in whose place a variable counts, each with that variable."""
    from broker.config import load as config

    return config.overridden(config.find_file(arguments.config, os.environ), os.environ)


def one_line(error: object) -> str:
    """Escape what would end the line or move the cursor: names in a file may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
