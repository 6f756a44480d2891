"""The command line: start here.

Builds the parser from the commands, each a file of this folder, and runs one of them.
"""

import os
from collections.abc import Mapping, Sequence

from broker.cli import (
    base,
    check,
    completion,
    config,
    doctor,
    fake_vendor,
    healthcheck,
    init,
    keys,
    mint,
    serve,
    store,
    verify,
    version,
)
from broker.cli import help as help_
from broker.config import files
from broker.config.schema import ConfigError
from broker.exit_codes import EX_CONFIG
from broker.telemetry.streams import complain, open_missing

CERTIFICATES = "SSL_CERT_FILE"
"""Environment variable of OpenSSL: whose certificates count, in place of the system's."""

COMMANDS = (
    serve,
    init,
    check,
    config,
    mint,
    verify,
    doctor,
    healthcheck,
    fake_vendor,
    store,
    keys,
    completion,
    help_,
    version,
)
"""In the order of --help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    open_missing()
    arguments, rest = _parser().parse_known_args(argv)
    arguments.parser.refuse_unknown(rest)
    run: base.Run = arguments.run
    try:
        _look_at_certificates(os.environ)
        return run(arguments)
    except ConfigError as error:
        complain(f"broker: {error}")
        return EX_CONFIG


def _look_at_certificates(environ: Mapping[str, str]) -> None:
    """Raise ConfigError for certificates that cannot be read: to import aiohttp reads them.

    OpenSSL would wait for ever for who writes into a pipe, and say nothing of what it may not read;
    it does without a file that is not there.
    """
    path = environ.get(CERTIFICATES)
    if path:
        try:
            os.close(files.open_regular(path))
        except files.CannotRead as error:
            if not error.is_absent:
                raise ConfigError(f"{CERTIFICATES}: {error}") from None


def _parser() -> base.Parser:
    """Return the parser of the whole command line."""
    top = base.top_parser(
        "Mints, reuses and rate-limits embed tokens.",
        f"example:\n  broker serve --dev\n\n{base.GROUP_CODES}\n\n"
        "`broker help COMMAND` explains a command, `broker init` makes a configuration.",
    )
    top.add_argument("--version", action="version", version=version.NAMED, help="print the version")
    commands = base.Commands(top)
    for command in COMMANDS:
        command.add(commands)
    return top
