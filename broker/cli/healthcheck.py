"""`broker healthcheck`: asks the broker beside it whether it is ready, for a container's engine.

It needs no good configuration, only to know where to ask: a file on the disk may already be the
next one, and a broker that is configured by flags has none.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from broker.cli.base import Commands
from broker.config.settings import AdminSettings
from broker.exit_codes import EX_NO, EX_OK
from broker.telemetry.streams import complain, tell

VARIABLE = "BROKER_ADMIN__LISTEN"
"""What overrides the file's `[admin] listen`."""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "healthcheck",
        "ask the broker of this host if it is ready",
        run,
        example="--admin-listen 127.0.0.1:9464",
        codes={EX_OK: "ready", EX_NO: "not ready, or no answer; standard error says why"},
    )
    parser.add_argument("--admin-listen", metavar="H:P", help="instead of [admin] listen")


def run(arguments: argparse.Namespace) -> int:
    """Say nothing if it is ready, but to somebody at a terminal."""
    from broker.cli import probe
    from broker.config import load as config

    file = config.find_file(arguments.config, os.environ)
    problem = probe.check(where(arguments.admin_listen, os.environ, file))
    if problem:
        complain(f"broker: {problem}")
        return EX_NO
    if sys.stdout.isatty():  # an engine asks every few seconds, and keeps what it is told
        tell("ready")
    return EX_OK


def where(flag: str | None, environ: Mapping[str, str], file: Path | None) -> str:
    """Choose the admin listener: flag, environment, file, default, whatever else is wrong."""
    given = {name.upper(): value for name, value in environ.items()}
    return flag or given.get(VARIABLE) or _of_file(file) or AdminSettings().listen


def _of_file(file: Path | None) -> str | None:
    import tomllib

    from broker.config import files

    try:
        listen = tomllib.loads(files.read_text(file))["admin"]["listen"] if file else None
    except (files.CannotRead, ValueError, RecursionError, LookupError, TypeError):
        return None
    return listen if isinstance(listen, str) else None
