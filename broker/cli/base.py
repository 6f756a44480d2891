"""What commands have in common: how they are added, where their settings come from.

A command is one file: `add` says what it is called and takes, and `run` does it and returns the
exit code.  What it works with is imported when it runs: `--help` waits for none of it, and `keys`
not for a server.
"""

import argparse
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from typing_extensions import override

from broker.config.schema import ConfigError, duration
from broker.config.settings import Duration, Settings
from broker.exit_codes import EX_CONFIG, EX_OK, EX_USAGE
from broker.telemetry.streams import complain, one_line

if TYPE_CHECKING:
    from broker.config import load as config

Run = Callable[[argparse.Namespace], int]
"""Does what a command is for; returns its exit code.  Raises ConfigError."""

NOTHING_CONFIGURED = (
    "no configuration: make one by `broker init`, pass --config FILE, set BROKER_CONFIG, set"
    " BITHUMAN_API_SECRET for a relay, or try `broker serve --dev`, which needs none"
)


ALL_ROUTES = ("/v1/*", "/v2/*")
"""What a relay without a configuration passes on: its callers have the vendor's key, and an SDK has
one base URL for all that it calls."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and what was probably meant."""

    @property
    def commands(self) -> "Mapping[str, Parser]":
        """The commands below this one, by name."""
        found = next((action.choices for action in self._actions if _is_below(action)), None)
        return cast("Mapping[str, Parser]", found or {})

    @property
    def options(self) -> list[argparse.Action]:
        """What this command takes, its help among it; not the commands below it."""
        return [action for action in self._actions if not _is_below(action)]

    @override
    def error(self, message: str) -> NoReturn:
        self.exit(EX_USAGE, f"{self.prog}: {one_line(message)}; see `{self.prog} --help`\n")

    @override
    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        named = "command" if _is_below(action) else action.metavar or action.dest
        known = list(action.choices)
        raise argparse.ArgumentError(None, f"no {named} {value!r}: {guessed(str(value), known)}")

    def refuse_unknown(self, rest: Sequence[str]) -> None:
        """End with the first word that nobody takes, if there is one."""
        if not rest:
            return
        known = [name for option in self.options for name in option.option_strings]
        word, _, _ = rest[0].partition("=")
        near = f": {guessed(word, known)}" if word.startswith("-") else ""
        self.error(f"does not take {word!r}{near}")


def _is_below(action: argparse.Action) -> bool:
    """Whether this is what holds the commands below a parser."""
    return isinstance(action, argparse._SubParsersAction)  # noqa: SLF001 - there is no other sign of it


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Leaves paths whole, and room for the longest command beside its text."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)
        self._action_max_length = len("    healthcheck")

    @override
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def guessed(word: str, known: Sequence[str]) -> str:
    """Name the nearest of those that exist, or all of them."""
    near = get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there is {', '.join(known)}"


def span(text: str) -> Duration:
    """Read a span of time that a flag is given, as the configuration reads it."""
    try:
        return duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def top_parser(description: str, epilog: str) -> Parser:
    """Return the parser that all commands are below."""
    return Parser(prog="broker", description=description, epilog=epilog, formatter_class=_Formatter)


class Commands:
    """The commands of one parser: `broker ...`, or those below a word such as `broker keys ...`."""

    def __init__(self, parser: Parser, metavar: str = "COMMAND") -> None:
        self.parser = parser
        self._parsers = parser.add_subparsers(
            metavar=metavar, parser_class=Parser, title="commands"
        )
        parser.set_defaults(run=partial(_overview, parser), parser=parser)

    def add(
        self,
        name: str,
        text: str,
        run: Run,
        *,
        example: str = "",
        codes: Mapping[int, str] = MappingProxyType({}),
        needs_config: bool = True,
    ) -> Parser:
        """Add a command; one that needs a configuration has --config.

        `text` is a sentence without its full stop; `example` is what one types behind the command's
        name, if anything; `codes` are exit codes that mean more here than everywhere.
        """
        parser = self._below(name, text)
        parser.set_defaults(run=run, parser=parser)
        shown = f"{parser.prog} {example}".rstrip()
        meanings = {EX_OK: "done"} | dict(codes) | {EX_USAGE: "wrong usage"}
        if needs_config:
            meanings = {EX_CONFIG: "the configuration cannot be used"} | meanings
            parser.add_argument(
                "--config",
                metavar="FILE",
                help="instead of BROKER_CONFIG or /etc/embed-token-broker/broker.toml",
            )
        told = "\n".join(f"  {code:>2}  {what}" for code, what in sorted(meanings.items()))
        parser.epilog = f"example:\n  {shown}\n\nexit codes:\n{told}"
        return parser

    def below(self, name: str, text: str, metavar: str = "COMMAND") -> "Commands":
        """Add a word that has commands of its own."""
        parser = self._below(name, text)
        parser.epilog = f"example:\n  {parser.prog} {metavar} --help\n\n{GROUP_CODES}"
        return Commands(parser)

    def _below(self, name: str, text: str) -> Parser:
        sentence = f"{text[0].upper()}{text[1:]}."
        return self._parsers.add_parser(
            name, help=text, description=sentence, formatter_class=_Formatter
        )


GROUP_CODES = f"exit codes:\n  {EX_OK:>2}  done\n  {EX_USAGE:>2}  wrong usage, or no command"
"""Of a word that has commands below it."""


def _overview(parser: Parser, _arguments: argparse.Namespace) -> int:
    """Print what there is.

    On standard error, and no success: a script that runs `broker $COMMAND` with nothing in it has
    not done what it was for.
    """
    for line in parser.format_help().splitlines():
        complain(line)
    return EX_USAGE


def settings_of(arguments: argparse.Namespace, flags: Mapping[str, Any] | None = None) -> Settings:
    """Load the settings of a command that needs a configuration; raises ConfigError."""
    from broker.config import load as config

    return config.sound(examined(arguments, flags))


def signing_settings_of(arguments: argparse.Namespace, instead: str) -> Settings:
    """Load those of a command that works with keys of one's own; raises ConfigError.

    `instead` is what to do where the vendor signs.  Keys that a relay's file has all the same do
    not count: the vendor's viewer takes no token of theirs.
    """
    settings = settings_of(arguments)
    if settings.issuer.kind == "upstream":
        raise ConfigError(
            'issuer.kind: is "upstream", so this configuration relays, and the vendor signs;'
            f" {instead}"
        )
    return settings


def examined(
    arguments: argparse.Namespace, flags: Mapping[str, Any] | None = None
) -> "config.Examined":
    """Load them with all that is wrong; raises ConfigError where there is nothing to be read."""
    from broker.config import load as config
    from broker.config.state_folder import default_path

    path = config.find_file(arguments.config, os.environ)
    if path is not None:
        return config.examine(path, os.environ, flags or {})
    if any(os.environ.get(name) for name in config.VENDOR_VARIABLES):
        file = default_path(os.environ)
        relay: dict[str, Any] = {
            "issuer": {"kind": "upstream"},
            "store": {"url": f"sqlite://{file}"},
        }
        found = config.examine(None, os.environ, flags or {}, relay)
        if found.settings.issuer.kind != "upstream":
            return found
        relay["issuer"]["upstream"] = {"pass_through": ALL_ROUTES}
        return config.examine(None, os.environ, flags or {}, relay)
    if not any(name.startswith("BROKER_") and "__" in name for name in os.environ):
        raise ConfigError(NOTHING_CONFIGURED)
    return config.examine(None, os.environ, flags or {})


def overridden(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the keys of the file in whose place a variable counts, each with that variable."""
    from broker.config import load as config

    return config.overridden(config.find_file(arguments.config, os.environ), os.environ)
