"""`broker verify`: what the token on standard input proves, by the local keys."""

import argparse
import sys

from broker.cli.base import Commands, signing_settings_of
from broker.exit_codes import EX_NO, EX_OK
from broker.telemetry.streams import complain, tell


def add(commands: Commands) -> None:
    """Add the command."""
    text = "verify the token on standard input with the local keys, and print its claims"
    commands.add(
        "verify",
        text,
        run,
        example="--config /etc/embed-token-broker/broker.toml < token.txt",
        codes={EX_OK: "valid", EX_NO: "not valid; standard error says why"},
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the claims of a token that is good now."""
    import json

    from broker.app import credentials
    from broker.clock import SystemClock
    from broker.config.files import MAX_FILE
    from broker.issuers.keyring import BadToken

    instead = "ask the running broker at /v1/embed-tokens/verify"
    settings = signing_settings_of(arguments, instead)
    if sys.stdin.isatty():
        complain("paste the token, then Enter and Ctrl-D")
    local = settings.issuer.local
    try:
        proof = credentials.keyring(settings).verify(
            sys.stdin.buffer.read(MAX_FILE).decode("utf-8", "replace").strip(),
            local.issuer,
            local.audience,
            SystemClock().wall(),
        )
    except BadToken as error:
        complain(f"not valid: {error}")
        return EX_NO
    tell(json.dumps(dict(proof.claims), indent=2))
    return EX_OK
