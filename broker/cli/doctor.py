"""`broker doctor`: examines the way to the vendor, the shared store and the state file.

So that an operator need not guess.  Costs the vendor one cheap call per key and no token, the store
some hundred calls under names of their own.  Each finding is one line: ok, or a problem with its
remedy.
"""

import argparse
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from broker.cli.base import Commands, settings_of
from broker.cli.finding import Finding
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.exit_codes import EX_NO, EX_OK
from broker.telemetry.streams import tell


def add(commands: Commands) -> None:
    """Add the command."""
    text = "examine the relay: keys, clock, TLS, egress proxy, shared store, state file, modes"
    example = "--config /etc/embed-token-broker/broker.toml"
    commands.add("doctor", text, run, example=example, codes={EX_NO: "it found a problem"})


def run(arguments: argparse.Namespace) -> int:
    """Print every finding; the answer is no if one is a problem."""
    import logging

    import structlog

    # what is rehearsed would be logged as if it were a broker's: the findings say it better
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    findings = examine(settings_of(arguments), os.environ)
    for finding in findings:
        tell(str(finding))
    return EX_OK if all(finding.ok for finding in findings) else EX_NO


def examine(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Return every finding; raises ConfigError for a configuration that cannot be used."""
    import asyncio

    from broker.app import credentials, factory

    factory.check(settings, environ)
    files = [(name, Path(file)) for name, file in factory.secret_files(settings)]
    findings = [_file(name, path) for name, path in files]
    findings += _handed_over([path for _, path in files])
    if settings.issuer.kind == "upstream":
        from broker.cli import doctor_vendor

        keys = credentials.vendor_keys(settings, environ)
        proxy = credentials.vendor_proxy(settings, environ)
        findings += asyncio.run(doctor_vendor.examine(settings, keys, proxy))
    if factory.store_address(settings) is not None:
        from broker.cli import doctor_store

        findings += asyncio.run(doctor_store.examine(settings))
    if (file := factory.state_file(settings)) is not None:
        findings.append(_state_file(file, environ))
    return findings or [
        Finding(ok=True, name="configuration", text="complete; nothing else to examine")
    ]


def _state_file(path: Path, environ: Mapping[str, str]) -> Finding:
    from broker.sqlite import location

    try:
        location.examine(path, environ)
    except ConfigError as error:
        return Finding(ok=False, name="store.url", text=str(error).removeprefix("store.url: "))
    owner = location.owner_of(path)
    user = "no broker uses it" if owner is None else f"process {owner} uses it"
    return Finding(ok=True, name="store.url", text=f"{path} can be written; {user}")


def _file(name: str, path: Path) -> Finding:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        text = f"{path} has mode {mode:04o}, others can read it: chmod 600 {path}"
        return Finding(ok=False, name=name, text=text)
    return Finding(ok=True, name=name, text=f"{path} is readable by its owner only")


def _handed_over(paths: list[Path]) -> list[Finding]:
    """Tell root, who can read everything, which files a service's own user cannot.

    Whether the service is handed them, nobody can know from here: units have any name.
    """
    roots = [str(path) for path in dict.fromkeys(paths) if _is_for_root_alone(path)]
    if os.geteuid() != 0 or not roots:
        return []
    text = (
        f"looked at as root, and only root can read {', '.join(roots)}: a service with a user of"
        " its own ends with 78, unless its unit hands over each (LoadCredential); a running one has"
        " copies of its last start"
    )
    return [Finding(ok=True, name="files", text=text)]


def _is_for_root_alone(path: Path) -> bool:
    """Whether the mode of the file, or of a folder above it, keeps all others out."""
    real = path.resolve()

    def closed(part: Path, bits: int) -> bool:
        status = part.stat()
        return status.st_uid == 0 and not status.st_mode & bits

    return closed(real, 0o044) or any(closed(folder, 0o011) for folder in real.parents)
