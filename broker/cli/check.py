"""`broker check`: says all that is wrong with a configuration; tries what a start needs here."""

import argparse
import os

from broker.cli.base import Commands, examined, overridden
from broker.cli.finding import Finding, Level, as_json
from broker.config.schema import ConfigError
from broker.exit_codes import EX_CONFIG, EX_OK, EX_UNAVAILABLE
from broker.telemetry.streams import complain, tell


def add(commands: Commands) -> None:
    """Add the command."""
    text = "check a configuration and say what is wrong"
    example = "--config /etc/embed-token-broker/broker.toml"
    codes = {EX_UNAVAILABLE: "an address of it is in use, or not this machine's"}
    parser = commands.add("check", text, run, example=example, codes=codes)
    parser.add_argument("--json", action="store_true", help="print findings for machines")


def run(arguments: argparse.Namespace) -> int:
    """Print every finding; problems of the configuration are 78, an address that is taken is 69."""
    try:
        code, findings = examine(arguments)
    except ConfigError as error:
        if not arguments.json:
            raise
        code, findings = EX_CONFIG, [Finding.of(error)]
    if arguments.json:
        tell(as_json(findings))
        return code
    for finding in findings:
        complain(f"{'note' if finding.ok else 'broker'}: {finding.line}")
    if code == EX_OK:
        tell("configuration ok")
    return code


def examine(arguments: argparse.Namespace) -> tuple[int, list[Finding]]:
    """Return the exit code and every finding, problems first; raises ConfigError for the file.

    Where neither a secret file is here nor its folder the broker runs elsewhere: then secrets are
    made up, and nothing is tried on this machine but a write where its state file is to be, of
    which a failure is a note.
    """
    from broker.cli import preflight

    found = examined(arguments)
    settings = found.settings
    is_here = preflight.runs_here(settings, os.environ)
    findings = list(preflight.configuration(found, os.environ, is_here=is_here))
    for key, variable in overridden(arguments).items():
        findings.append(
            Finding(Level.NOTE, key, f"{variable} of the environment counts, not the file")
        )
    findings += preflight.shown_password(settings)
    folder = list(preflight.state_file(settings, os.environ))
    if not is_here:
        folder = [Finding(Level.NOTE, each.key, each.text) for each in folder]
    findings += folder
    code = EX_OK if all(finding.ok for finding in findings) else EX_CONFIG
    if is_here:
        taken = list(preflight.addresses(settings))
        code = EX_UNAVAILABLE if taken and code == EX_OK else code
        findings += [*taken, *preflight.open_files()]
    return code, sorted(findings, key=lambda finding: finding.ok)
