"""`broker fake-vendor`: a vendor for tests, with its limits and without real tokens."""

import argparse
import os
import signal
from typing import TYPE_CHECKING

from broker.cli.base import Commands, span
from broker.config.schema import ConfigError
from broker.exit_codes import EX_CONFIG, EX_OK, EX_UNAVAILABLE
from broker.telemetry.streams import complain, stdout

if TYPE_CHECKING:
    from broker.testing import FakeVendor


def add(commands: Commands) -> None:
    """Add the command."""
    text = "be a vendor for tests, with its limits and without real tokens"
    parser = commands.add(
        "fake-vendor",
        text,
        run,
        example="--listen 127.0.0.1:8091 --latency 300ms",
        codes={EX_UNAVAILABLE: "cannot listen there", EX_CONFIG: "--listen is no address"},
        needs_config=False,
    )
    parser.add_argument(
        "--listen", metavar="H:P", default="127.0.0.1:8090", help="default %(default)s"
    )
    parser.add_argument(
        "--latency",
        type=span,
        default="0ms",
        metavar="SPAN",
        help="how long an answer takes, such as 300ms (default %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C; the first line tells where, and the key that it accepts."""
    import asyncio
    import json
    import secrets

    from broker.config.validate import parse_address
    from broker.testing import VendorSettings, serve_forever

    try:
        where = parse_address(arguments.listen)
    except ValueError as error:
        raise ConfigError(f"--listen: {error}") from None
    if isinstance(where, str):
        raise ConfigError("--listen: the fake vendor needs HOST:PORT")
    secret = os.environ.get("BITHUMAN_API_SECRET") or secrets.token_urlsafe(24)

    def introduce(vendor: "FakeVendor") -> None:
        stdout.write(json.dumps({"url": vendor.url, "api_secret": secret}) + "\n")

    settings = VendorSettings(latency=arguments.latency.seconds)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is how it is stopped
        asyncio.run(serve_forever(*where, started=introduce, settings=settings, secrets=[secret]))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one ends it without a word, too
        return EX_OK
    except OSError as error:
        complain(f"broker: --listen: cannot listen on {arguments.listen}: {error.strerror}")
        return EX_UNAVAILABLE
    return EX_OK
