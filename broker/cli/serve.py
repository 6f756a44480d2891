"""`broker serve`: answers requests until stopped."""

import argparse
import os
import signal
from collections.abc import Callable
from typing import Any

from broker.cli.base import Commands, overridden, settings_of
from broker.config.environment import misspelt
from broker.config.settings import Settings
from broker.exit_codes import EX_OK, EX_UNAVAILABLE


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "serve",
        "answer requests until stopped",
        run,
        example="--config /etc/embed-token-broker/broker.toml",
        codes={
            EX_OK: "told to stop, and drained",
            EX_UNAVAILABLE: "an address or the state file is in use, or an address is not here",
        },
    )
    parser.add_argument(
        "--dev", action="store_true", help="no configuration needed: keys and secret are made"
    )
    parser.add_argument("--listen", metavar="H:P", help="instead of [server] listen")
    parser.add_argument("--admin-listen", metavar="H:P", help="instead of [admin] listen")
    parser.add_argument("--workers", metavar="N", help="instead of [server] workers")


def run(arguments: argparse.Namespace) -> int:
    """Serve with what file, environment and flags say, now and at each reload."""
    flags: dict[str, Any] = {}
    server = {"listen": arguments.listen, "workers": arguments.workers}
    flags["server"] = {name: value for name, value in server.items() if value}
    if arguments.admin_listen:
        flags["admin"] = {"listen": arguments.admin_listen}
    by_flags = {f"{section}.{key}" for section, table in flags.items() for key in table}

    def replaced() -> dict[str, str]:
        """Return keys of the file in whose place a variable counts, and no flag."""
        found = overridden(arguments)
        return {key: variable for key, variable in found.items() if key not in by_flags}

    if not arguments.dev:
        return _serve(lambda: settings_of(arguments, flags), replaced, dev=False)
    from broker.app import dev
    from broker.config import load as config

    made = dev.DevSecrets()
    path = config.find_file(arguments.config, os.environ) if _names_file(arguments) else None
    return _serve(
        lambda: made.complete(config.load(path, os.environ, flags, made.defaults())),
        dict[str, str],
        dev=True,
    )


def _names_file(arguments: argparse.Namespace) -> bool:
    """Development mode reads a file only if one is named, never the packaged one."""
    return bool(arguments.config or os.environ.get("BROKER_CONFIG"))


def _serve(
    load: Callable[[], Settings], replaced: Callable[[], dict[str, str]], *, dev: bool
) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # a reload waits for the start
    from broker.app import factory
    from broker.cli import preflight
    from broker.config.state_folder import make_folder
    from broker.process.serve import serve
    from broker.telemetry import logs

    def loaded_again() -> Settings:
        settings = load()
        _note_replaced(replaced())
        return settings

    settings = load()
    if (file := factory.state_file(settings)) is not None:
        make_folder(file, os.environ)
    logs.configure(settings.log)
    if not (dev and settings.issuer.kind == "upstream"):  # its signing key was made up, not given
        _note_unused({one.key: one.text for one in preflight.unused_keys(settings, os.environ)})
    _note_replaced(replaced())
    _note_misspelt()
    return serve(settings, loaded_again, dev=dev)


def _note_unused(keys: dict[str, str]) -> None:
    """Tell which keys belong to the issuer that is not in use, and why that may be a mistake."""
    import structlog

    for key, reason in keys.items():
        structlog.get_logger().warning("broker.key_unused", key=key, reason=reason)


def _note_misspelt() -> None:
    """Tell which variables are not read for want of an underscore."""
    import structlog

    for name, right in misspelt(os.environ):
        structlog.get_logger().warning("broker.variable_not_read", variable=name, write=right)


def _note_replaced(variables: dict[str, str]) -> None:
    """Tell which keys of the file do not count: whoever edits the file sees no other sign of it."""
    import structlog

    if variables:
        structlog.get_logger().info("broker.file_overridden", variables=variables)
