"""`broker doctor`: examines the way to the vendor, the shared store and the state file.

So that an operator need not guess.  Costs the vendor one cheap call per key and no token, the store
some hundred calls under names of their own.  Each finding is one line: ok, or a problem with its
remedy.
"""

import argparse
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from broker.cli.base import Commands, examined
from broker.cli.finding import Finding, Level, as_json
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.exit_codes import EX_CONFIG, EX_NO, EX_OK
from broker.telemetry.streams import tell


def add(commands: Commands) -> None:
    """Add the command."""
    text = "examine the relay: keys, clock, TLS, egress proxy, shared store, state file, modes"
    example = "--config /etc/embed-token-broker/broker.toml"
    parser = commands.add("doctor", text, run, example=example, codes={EX_NO: "it found a problem"})
    parser.add_argument("--json", action="store_true", help="print findings for machines")


def run(arguments: argparse.Namespace) -> int:
    """Print every finding: a problem of the configuration is 78, any other one 1."""
    import logging

    import structlog

    # what is tried would be logged as if it were a broker's: the findings say it better
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        code, findings = _examine(arguments)
    except ConfigError as error:
        if not arguments.json:
            raise
        code, findings = EX_CONFIG, [Finding.of(error)]
    tell(as_json(findings) if arguments.json else "\n".join(str(finding) for finding in findings))
    return code


def _examine(arguments: argparse.Namespace) -> tuple[int, list[Finding]]:
    """Return the exit code and every finding; raises ConfigError for a file that is none."""
    from broker.cli import preflight

    found = examined(arguments)
    settings = found.settings
    findings = list(preflight.configuration(found, os.environ, is_here=True))
    usable = all(finding.ok for finding in findings)
    findings += [*preflight.addresses(settings), *preflight.open_files()]
    # settings without what is wrong in them are not those that were meant: a key could be shown to
    # another host than its own
    findings += _files(settings) if found.problems else examine(settings, os.environ)
    if not findings:
        complete = "complete; nothing else to examine"
        findings.append(Finding(Level.OK, "configuration", complete))
    if not usable:
        return EX_CONFIG, findings
    return EX_OK if all(finding.ok for finding in findings) else EX_NO, findings


def examine(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Look at files, vendor and store; what a configuration lacks for one is told with it."""
    findings = _files(settings)
    for look in (_vendor, _shared_store, _state_file):
        with suppress(ConfigError, ValueError):
            findings += look(settings, environ)
    return findings


def _files(settings: Settings) -> list[Finding]:
    from broker.app import factory
    from broker.app.missing_secrets import is_missing

    files = [(name, Path(file)) for name, file in factory.secret_files(settings)]
    there = [(name, path) for name, path in files if not is_missing(str(path))]
    return [_file(name, path) for name, path in there] + _handed_over([path for _, path in there])


def _vendor(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    import asyncio

    from broker.app import credentials
    from broker.cli import doctor_vendor

    if settings.issuer.kind != "upstream":
        return []
    keys = credentials.vendor_keys(settings, environ)
    proxy = credentials.vendor_proxy(settings, environ)
    return asyncio.run(doctor_vendor.examine(settings, keys, proxy))


def _shared_store(settings: Settings, _environ: Mapping[str, str]) -> list[Finding]:
    import asyncio

    from broker.app import factory
    from broker.cli import doctor_store

    if factory.store_address(settings) is None:
        return []
    return asyncio.run(doctor_store.examine(settings))


def _state_file(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    from broker.app import factory
    from broker.cli import preflight
    from broker.sqlite import location

    path = factory.state_file(settings)
    if path is None:
        return []
    if problems := list(preflight.state_file(settings, environ)):
        return problems
    owner = location.owner_of(path)
    user = "no broker uses it" if owner is None else f"process {owner} uses it"
    return [Finding(Level.OK, "store.url", f"{path} can be written; {user}")]


def _file(name: str, path: Path) -> Finding:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        text = f"{path} has mode {mode:04o}, others can read it: chmod 600 {path}"
        return Finding(Level.PROBLEM, name, text)
    return Finding(Level.OK, name, f"{path} is readable by its owner only")


def _handed_over(paths: list[Path]) -> list[Finding]:
    """Tell root, who can read everything, which files a service's own user cannot.

    Whether the service is handed them, nobody can know from here: units have any name.
    """
    roots = [str(path) for path in dict.fromkeys(paths) if _is_for_root_alone(path)]
    if os.geteuid() != 0 or not roots:
        return []
    text = (
        f"only root can read {', '.join(roots)}: a service with a user of its own needs a unit"
        " that hands over each (LoadCredential), or it ends with 78; a running one has the copies"
        " that were made when it started"
    )
    return [Finding(Level.OK, "files", text)]


def _is_for_root_alone(path: Path) -> bool:
    """Whether the mode of the file, or of a folder above it, keeps all others out."""
    real = path.resolve()

    def closed(part: Path, bits: int) -> bool:
        status = part.stat()
        return status.st_uid == 0 and not status.st_mode & bits

    return closed(real, 0o044) or any(closed(folder, 0o011) for folder in real.parents)
