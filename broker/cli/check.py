"""`broker check`: says what is wrong with a configuration; tries a write where state is kept."""

import argparse
import os

from broker.cli.base import Commands, one_line, overridden, settings_of
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.exit_codes import EX_OK
from broker.model import Secret
from broker.telemetry.streams import complain, tell


def add(commands: Commands) -> None:
    """Add the command."""
    text = "check a configuration and say what is wrong"
    commands.add("check", text, run, example="--config /etc/embed-token-broker/broker.toml")


def run(arguments: argparse.Namespace) -> int:
    """Build every part once, with made-up secrets for files that are not on this machine."""
    import secrets

    from broker.app import factory, missing_secrets

    settings = settings_of(arguments)
    missing = missing_secrets.missing_files(settings)
    made_up = missing_secrets.fill_missing_secrets(
        settings, lambda _name: Secret(secrets.token_urlsafe(48))
    )
    factory.check(made_up, os.environ)
    for name, file in missing:
        complain(f"note: {name}: {file} is not here; it must be where the broker runs")
    for key, variable in overridden(arguments).items():
        complain(one_line(f"note: {key}: {variable} of the environment counts, not the file"))
    note_unused_key(settings)
    _try_state_file(settings, is_elsewhere=bool(missing))
    if factory.shows_password(settings):
        complain(
            "note: store.password crosses the network in clear text: write valkeys:// where others"
            " can listen"
        )
    tell("configuration ok")
    return EX_OK


def _try_state_file(settings: Settings, *, is_elsewhere: bool) -> None:
    """Write where the state file is to be, or say that there is none.

    Raises ConfigError; only notes it where secrets are not here either: it runs elsewhere.
    """
    from broker.app import factory

    file = factory.state_file(settings)
    if file is None:
        if settings.issuer.kind == "upstream" and factory.store_address(settings) is None:
            complain(
                "note: store.url: state is in memory, and a crash mints anew for every visitor;"
                ' to keep it set store.url = "sqlite:///var/lib/embed-token-broker/state.db"'
            )
        return
    from broker.sqlite import location

    try:
        location.examine(file, os.environ)
    except ConfigError as error:
        if not is_elsewhere:
            raise
        complain(f"note: {error}")


def note_unused_key(settings: Settings) -> None:
    """Say so when there is a vendor key and tokens are signed here all the same.

    The vendor's viewer takes none of those.
    """
    from broker.config.load import VENDOR_VARIABLES

    upstream = settings.issuer.upstream
    given = upstream.api_secret or upstream.api_secret_files
    if settings.issuer.kind == "local" and (
        given or any(os.environ.get(name) for name in VENDOR_VARIABLES)
    ):
        complain(
            'note: a vendor key is given but not used, because issuer.kind is "local" and tokens'
            ' are signed here; set issuer.kind = "upstream" to relay the vendor\'s'
        )
