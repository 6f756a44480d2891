"""`broker fake-vendor`: a vendor for tests, with its limits and without real tokens."""

import argparse
import os
import signal
from typing import TYPE_CHECKING

from broker.cli.base import Commands, Parser, span
from broker.exit_codes import EX_OK, EX_UNAVAILABLE
from broker.telemetry.streams import complain, one_line, stderr, stdout

if TYPE_CHECKING:
    from broker.testing import FakeVendor
    from broker.testing.vendor.journal import Call

DEFAULT_LISTEN = "127.0.0.1:8091"
"""Neither the broker's port (8080) nor that of the gateways in config/ (8090)."""


def add(commands: Commands) -> None:
    """Add the command."""
    text = "be a vendor for tests: its limits, no real tokens, failures on demand"
    parser = commands.add(
        "fake-vendor",
        text,
        run,
        example="--latency 300ms --fault slow=2s",
        codes={EX_UNAVAILABLE: "cannot listen there"},
        needs_config=False,
    )
    parser.add_argument(
        "--listen", metavar="H:P", default=DEFAULT_LISTEN, help="default %(default)s"
    )
    parser.add_argument(
        "--latency",
        type=span,
        default="0ms",
        metavar="SPAN",
        help="how long an answer takes, such as 300ms (default %(default)s)",
    )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="NAME[=ARG]",
        help="fail every mint like this, such as slow=2s, hang, reset, refuse=PLAN_REQUIRED; may be"
        " given again, and all of them act together; `--fault help` lists them",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C; the first line tells where, and the key that it accepts."""
    import asyncio
    import json
    import secrets

    from broker.config.validate import parse_address
    from broker.testing import VendorSettings, faults, serve_forever
    from broker.testing.vendor.named import NAMED, BadFault, fault_named

    parser: Parser = arguments.parser
    if "help" in arguments.fault:
        for name, (form, text, _) in NAMED.items():
            stdout.write(f"{name + form:22} {text}\n")
        return EX_OK
    try:
        where = parse_address(arguments.listen)
    except ValueError as error:
        parser.error(f"argument --listen: {error}")
    if isinstance(where, str):
        parser.error("argument --listen: the fake vendor needs HOST:PORT")
    try:
        set_first = [fault_named(text) for text in arguments.fault]
    except BadFault as error:
        parser.error(f"argument --fault: {error}")
    secret = os.environ.get("BITHUMAN_API_SECRET") or secrets.token_urlsafe(24)

    def introduce(vendor: "FakeVendor") -> None:
        if set_first:
            vendor.fail(faults.combined(*set_first))
        stdout.write(json.dumps({"url": vendor.url, "api_secret": secret}) + "\n")

    settings = VendorSettings(latency=arguments.latency.seconds)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is how it is stopped
    serving = serve_forever(
        *where, started=introduce, settings=settings, secrets=[secret], told=_tell
    )
    try:
        asyncio.run(serving)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one ends it without a word, too
        return EX_OK
    except OSError as error:
        complain(
            f"broker: --listen: cannot listen on {arguments.listen}: {error.strerror};"
            " choose another address with --listen"
        )
        return EX_UNAVAILABLE
    return EX_OK


def _tell(call: "Call", seconds: float) -> None:
    """Write one line for a request: no key, no query, nothing of a body."""
    status = call.status or "---"
    fault = f"  {call.fault}" if call.fault else ""
    line = one_line(f"{call.method:6} {call.path}  {status}  {seconds * 1000:.1f} ms{fault}")
    stderr.write(f"{line}\n")
