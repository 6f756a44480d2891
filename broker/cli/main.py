"""The command line: start here.

Builds the parser from the commands, each a file of this folder, and runs one of them.
"""

import argparse
import os
from collections.abc import Mapping, Sequence

from broker.cli import (
    base,
    check,
    config,
    doctor,
    fake_vendor,
    healthcheck,
    keys,
    mint,
    serve,
    store,
    verify,
)
from broker.config import files
from broker.config.schema import ConfigError
from broker.exit_codes import EX_CONFIG
from broker.telemetry.streams import complain, open_missing
from broker.version import VERSION

CERTIFICATES = "SSL_CERT_FILE"
"""Environment variable of OpenSSL: whose certificates count, in place of the system's."""

COMMANDS = (
    serve,
    check,
    config,
    mint,
    verify,
    doctor,
    healthcheck,
    fake_vendor,
    store,
    keys,
)
"""In the order of --help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    open_missing()
    arguments = _parser().parse_args(argv)
    run: base.Run = arguments.run
    try:
        _look_at_certificates(os.environ)
        return run(arguments)
    except ConfigError as error:
        complain(f"broker: {base.one_line(error)}")
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


def _parser() -> argparse.ArgumentParser:
    parser = base.Parser(prog="broker", description="Mints, reuses and rate-limits embed tokens.")
    parser.add_argument("--version", action="version", version=f"embed-token-broker {VERSION}")
    commands = base.Commands(parser)
    for command in COMMANDS:
        command.add(commands)
    return parser
