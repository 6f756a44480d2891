"""`broker config example NAME`: prints a file to begin with, for whoever has no clone.

They are those of config/ in the repository, by links in `examples/`; a wheel holds copies.
"""

import argparse
from pathlib import Path

from broker.cli.base import Commands
from broker.exit_codes import EX_NO, EX_OK
from broker.telemetry.streams import complain, tell

FILES = {
    "relay": "relay.toml",
    "signer": "signer.toml",
    "gateway": "gateway.toml",
}
"""Configurations by what the broker is to be: one backend's, of the vendor's tokens or of its own;
several backends'."""

UNIT = "embed-token-broker.service"
"""The systemd unit, for a broker beside one backend."""


def add(below: Commands) -> None:
    """Add the command below `config`."""
    parser = below.add(
        "example",
        "print a configuration to begin with: of a relay, a signer or a gateway",
        run,
        example="relay > broker.toml",
        codes={EX_NO: "this installation lacks the file"},
        needs_config=False,
    )
    parser.add_argument("name", metavar="NAME", choices=list(FILES), help=", ".join(FILES))
    parser.add_argument(
        "--unit", action="store_true", help="print the systemd unit that goes with it"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the file as it is."""
    if arguments.unit and arguments.name == "gateway":
        arguments.parser.error("a gateway has no unit of its own: take that of a relay")
    name = UNIT if arguments.unit else FILES[arguments.name]
    try:
        text = text_of(name)
    except FileNotFoundError:
        complain(f"broker: this installation has no {name}; it was packed without config/")
        return EX_NO
    tell(text.removesuffix("\n"))
    return EX_OK


def text_of(name: str) -> str:
    """Return an example; raises FileNotFoundError."""
    return (Path(__file__).with_name("examples") / name).read_text(encoding="utf-8")
