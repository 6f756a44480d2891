"""What is wrong with a configuration, and with the machine it is on: everything at once.

For `broker check` and `broker doctor`.  A problem keeps the broker from starting, or gives somebody
what they must not have; a note is about what works, but perhaps not as it was meant.
"""

import resource
from collections.abc import Iterator, Mapping
from contextlib import suppress

from broker.cli.finding import Finding, Level
from broker.config.environment import misspelt
from broker.config.load import VENDOR_VARIABLES, Examined, follows_from
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.config.validate import is_loopback, parse_address

OWN_FILES = 64
"""Files of a process beside its callers' connections: code, log, listeners, state file, store, and
the calls to the vendor, of which a burst are out at once."""

CREDENTIALS = "CREDENTIALS_DIRECTORY"
"""Variable by which systemd tells a unit's processes where its secrets are (LoadCredential)."""


def configuration(
    found: Examined, environ: Mapping[str, str], *, is_here: bool
) -> Iterator[Finding]:
    """Yield what is wrong with the configuration itself.

    `is_here`: it is that of this machine, so files that are absent are a problem.
    """
    from broker.app import factory

    settings = found.settings
    for problem in found.problems:
        yield Finding.of(problem)
    parts = settings if is_here else _with_made_up_secrets(settings)
    for problem in factory.problems(parts, environ):
        if not follows_from(problem, found.left_out):
            yield Finding.of(problem)
    yield from _shared_secrets(settings, environ)
    for key, file in [] if is_here else missing_files(settings):
        yield _note(key, f"{file} is not here; it must be where the broker runs")
    yield from _variables(environ)
    if "issuer.kind" not in found.left_out:
        yield from unused_keys(settings, environ)
    yield from _idle_clients(settings)
    yield from _plain_http(settings)
    yield from _memory(settings)


def missing_files(settings: Settings) -> list[tuple[str, str]]:
    """Return key and path of secret files and certificates that are not on this machine."""
    from broker.app import missing_secrets

    return missing_secrets.missing_files(settings)


def runs_here(settings: Settings, environ: Mapping[str, str]) -> bool:
    """Whether the broker of this configuration runs here: its secrets are, or it is its unit."""
    from broker.app import missing_secrets

    return bool(environ.get(CREDENTIALS)) or not missing_secrets.are_elsewhere(settings)


def state_file(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Write where the state file is to be; yields why that cannot be done."""
    from broker.app import factory
    from broker.sqlite import location

    try:
        file = factory.state_file(settings)
    except ValueError:  # told with the configuration
        return
    if file is not None:
        try:
            location.examine(file, environ)
        except ConfigError as error:
            yield Finding.of(error)


def addresses(settings: Settings) -> Iterator[Finding]:
    """Take the addresses of the listeners for a moment; yields why one cannot be had.

    Where a broker answers, it is taken for the one that has this configuration.
    """
    import asyncio

    from broker.cli import probe
    from broker.web.listener import CannotListen, require_free

    places = {"server.listen": settings.server.listen, "admin.listen": settings.admin.listen}
    for key, address in places.items():
        try:
            asyncio.run(require_free(address, key))
        except CannotListen as error:
            if not (error.is_in_use and probe.is_broker(address)):
                yield Finding.of(ConfigError(str(error)))
        except ValueError:  # told with the configuration
            continue


def open_files() -> Iterator[Finding]:
    """Compare the limit on open files with the connections that may come at once."""
    from broker.web.server import BACKLOG

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < BACKLOG + OWN_FILES:
        yield _note(
            "open files",
            f"{most} at most, less than the {BACKLOG} connections that may come at once and"
            f" {OWN_FILES} of the broker's own; raise the hard limit (LimitNOFILE= of a unit,"
            " ulimit -Hn of a shell, ulimits of a container)",
        )


def shown_password(settings: Settings, level: Level = Level.NOTE) -> Iterator[Finding]:
    """Tell if the store's password can be read on its way: for the doctor, with the store."""
    from broker.app import factory

    with suppress(ValueError):
        if factory.shows_password(settings):
            yield Finding(
                level,
                "store.password",
                "crosses the network in clear text: write valkeys://, or set"
                " server.private_network = true where nobody else can listen",
            )


def unused_keys(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Tell which keys belong to the issuer that is not in use: perhaps it was meant to be.

    The vendor's viewer takes no token that is signed here.
    """
    local, upstream = settings.issuer.local, settings.issuer.upstream
    if settings.issuer.kind == "upstream":
        names = [name for name in ("keys", "keys_file") if getattr(local, name)]
        for name in names:
            yield _note(
                f"issuer.local.{name}",
                'not used, because issuer.kind is "upstream" and the vendor signs; take it out, or'
                ' set issuer.kind = "local"',
            )
        return
    names = [name for name in ("api_secret", "api_secret_files") if getattr(upstream, name)]
    keys = [f"issuer.upstream.{name}" for name in names]
    for key in keys or [name for name in VENDOR_VARIABLES if environ.get(name)]:
        yield _note(
            key,
            'a vendor key is given but not used, because issuer.kind is "local" and tokens are'
            ' signed here; set issuer.kind = "upstream" to relay the vendor\'s, or take it out',
        )


def _with_made_up_secrets(settings: Settings) -> Settings:
    import secrets

    from broker.app import missing_secrets
    from broker.model import Secret

    return missing_secrets.fill_missing_secrets(
        settings, lambda _name: Secret(secrets.token_urlsafe(48))
    )


def _shared_secrets(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    from broker.app import secret_roles

    for error, is_harmless in secret_roles.shared(settings, environ):
        yield Finding.of(error, Level.NOTE if is_harmless else Level.PROBLEM)


def _variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    for name, right in misspelt(environ):
        yield _note(name, f"not read: two underscores stand between names; write {right}")


def _idle_clients(settings: Settings) -> Iterator[Finding]:
    for name, client in settings.clients.items():
        if not client.agents:
            yield _note(
                f"clients.{name}.agents",
                'empty, so this client gets no token; name its agents, or write ["*"] for all',
            )


def _plain_http(settings: Settings) -> Iterator[Finding]:
    server, admin = settings.server, settings.admin
    if server.trusted_proxies or server.private_network:
        return
    places = {"server.listen": server.listen}
    if admin.secret or admin.secret_file:
        places["admin.listen"] = admin.listen
    for key, address in places.items():
        try:
            where = parse_address(address)
        except ValueError:
            continue
        if not isinstance(where, str) and not is_loopback(where[0]):
            yield _note(
                key,
                f"{address} is reached without TLS, and secrets cross the network in clear text;"
                " put a proxy that speaks TLS in front and name it in server.trusted_proxies, or"
                " set server.private_network = true where the network encrypts or nobody else is on"
                " it",
            )


def _memory(settings: Settings) -> Iterator[Finding]:
    from broker.config.addresses import MEMORY, USUAL_FILE

    if settings.issuer.kind == "upstream" and settings.store.url == MEMORY:
        yield _note(
            "store.url",
            "state is in memory, and a crash mints anew for every visitor; to keep it set"
            f' store.url = "{USUAL_FILE}"',
        )


def _note(key: str, text: str) -> Finding:
    return Finding(Level.NOTE, key, text)
