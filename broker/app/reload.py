"""What a running process can take over from new settings, and what needs a restart.

A reload has two halves: files are read aside, where a mounted file system may take its time, and
what was read is put in force on the event loop, which reads nothing.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

import structlog
from msgspec.structs import replace

from broker.app import credentials, factory
from broker.app.housekeeping import FileWatch
from broker.app.wiring import Parts
from broker.config.schema import ConfigError
from broker.config.secret_files import SecretFiles
from broker.config.settings import IssuerSettings, Settings
from broker.issuers.keyring import Keyring
from broker.issuers.upstream import UpstreamIssuer
from broker.model import Secret
from broker.tasks import aside
from broker.telemetry import logs

log = structlog.get_logger()

T = TypeVar("T")

READING = 10.0
"""Seconds in which all files of a configuration must have been read: it takes milliseconds, unless
a mounted file system hangs."""

UNREADABLE = f"files could not be read in {READING:.0f} s: a mounted file system may hang"


async def read_aside(read: Callable[[], T]) -> T:
    """Read files in a thread of their own; raises what that raises, ConfigError if they hang."""
    try:
        async with asyncio.timeout(READING):
            return await aside(read)
    except TimeoutError:
        raise ConfigError(UNREADABLE) from None


def needs_restart(old: Settings, new: Settings, *, other_key: bool = False) -> list[str]:
    """Sections that differ and are not taken over by a reload.

    `other_key`: the file of the key that seals what is stored has another one in it.
    """
    fixed = ("server", "admin", "reuse", "sessions", "store")
    names = [name for name in fixed if getattr(old, name) != getattr(new, name)]
    if old.issuer.budget != new.issuer.budget or old.issuer.kind != new.issuer.kind:
        names.append("issuer")
    before, after = old.issuer, new.issuer
    fixed_parts = {
        "local.issuer": before.local.issuer != after.local.issuer,
        "local.audience": before.local.audience != after.local.audience,
        "upstream.base_url": before.upstream.base_url != after.upstream.base_url,
        "upstream.timeout": before.upstream.timeout != after.upstream.timeout,
        "upstream.pass_through": before.upstream.pass_through != after.upstream.pass_through,
    }
    if other_key:
        names.append("store.encryption_key")
    return names + [f"issuer.{name}" for name, differs in fixed_parts.items() if differs]


def check_restart(old: Settings, new: Settings, environ: Mapping[str, str]) -> None:
    """Read the files of what waits for a restart, too; raises ConfigError where it would fail.

    Only if something does: a reload reads all others by itself, and each of them once.
    """
    if needs_restart(old, new):
        factory.check(new, environ)


def in_force(old: Settings, new: Settings) -> Settings:
    """Return what holds after a reload: `new`, but for what needs a restart.

    A worker that is started later follows these, as those that were there do.
    """
    return replace(
        new,
        server=old.server,
        admin=old.admin,
        reuse=old.reuse,
        sessions=old.sessions,
        store=old.store,
        issuer=_issuer_in_force(old.issuer, new.issuer),
    )


def _issuer_in_force(old: IssuerSettings, new: IssuerSettings) -> IssuerSettings:
    if old.kind != new.kind:
        return old  # its keys are left alone, too
    local, upstream = old.local, old.upstream
    return replace(
        new,
        budget=old.budget,
        local=replace(new.local, issuer=local.issuer, audience=local.audience),
        upstream=replace(
            new.upstream,
            base_url=upstream.base_url,
            timeout=upstream.timeout,
            pass_through=upstream.pass_through,
        ),
    )


class Reloader:
    """Puts new settings in force in one process; all of them take effect, or none do.

    `load` reads the settings anew; it raises ConfigError.  `watch` is given the files that the new
    ones name.
    """

    def __init__(
        self,
        parts: Parts,
        settings: Settings,
        environ: Mapping[str, str],
        load: Callable[[], Settings],
        watch: FileWatch,
    ) -> None:
        self._parts = parts
        self._settings = settings
        self._environ = environ
        self._load = load
        self._watch = watch

    async def run(self, wanted: asyncio.Event) -> None:
        """Reload whenever it is wanted, for ever."""
        while True:
            await wanted.wait()
            wanted.clear()
            await self.reload()

    async def reload(self) -> bool:
        """Read the settings again; returns whether they are in force."""
        try:
            loaded, other_key, put_in_force = await read_aside(self._read)
            put_in_force()
        except ConfigError as error:
            self._note(failed=True)
            log.error("broker.reload_failed", error=str(error))
            return False
        except Exception:
            self._note(failed=True)
            log.exception("broker.defect")
            return False
        self._note(failed=False)
        changed = needs_restart(self._settings, loaded, other_key=other_key)
        log.info("broker.reloaded", needs_restart=changed)
        return True

    def prepared(self, settings: Settings) -> Callable[[], None]:
        """Read all that a running process can take over; raises ConfigError.

        Reading may take its time: in a thread of its own.  Returns what puts it in force, on the
        event loop; until then nothing has changed.
        """
        files = SecretFiles(
            file for _, file in factory.watched_files(settings)
        )  # before they are read: a change in between is noticed
        clients, limits = factory.clients(settings, self._environ), factory.limits(settings)
        admins = factory.admin_clients(settings)
        issuer_keys = credentials.issuer_keys(settings, self._environ)
        use_keys = self._new_keys(settings, issuer_keys)
        access = factory.store_access(settings)
        durable = self._parts.durable
        file_keys, _ = (
            ((), ()) if durable is None else credentials.state_file_keys(settings, issuer_keys)
        )

        def put_in_force() -> None:
            parts = self._parts
            if parts.shared_backend is not None:
                parts.shared_backend.use_access(access)
            parts.authenticator.use_clients(clients)
            if parts.admin_authenticator is not None:
                parts.admin_authenticator.use_clients(admins)
            parts.store.use_limits(limits)
            use_keys()
            if durable is not None:
                durable.use_keys(file_keys)
            logs.configure(settings.log)
            parts.routes.tokens.use_log(debug=settings.log.level == "debug")
            parts.routes.tokens.any_fingerprint = settings.limits.fingerprint_format == "any"
            self._watch.files = files

        return put_in_force

    def _read(self) -> tuple[Settings, bool, Callable[[], None]]:
        """Read all files anew; raises ConfigError.

        Returns what they say, whether there is another sealing key, and what puts them in force.
        """
        loaded = self._load()
        check_restart(self._settings, loaded, self._environ)
        settings = in_force(self._settings, loaded)
        other_key = (
            self._parts.shared_backend is not None
            and credentials.sealing_key(settings) != self._parts.sealing_key
        )
        return loaded, other_key, self.prepared(settings)

    def _new_keys(self, settings: Settings, keys: Keyring | list[Secret]) -> Callable[[], None]:
        """Return what puts the issuer's keys in force."""
        issuer = self._parts.issuer
        if settings.issuer.kind != issuer.name:
            return lambda: None  # told as needing a restart
        if isinstance(issuer, UpstreamIssuer):
            assert isinstance(keys, list)
            proxy = credentials.vendor_proxy(settings, self._environ)

            def replace_keys() -> None:
                issuer.use_keys(keys)
                issuer.use_proxy(proxy)
                if self._parts.pass_through is not None:
                    self._parts.pass_through.proxy = proxy

            return replace_keys
        assert isinstance(keys, Keyring)

        def turn() -> None:
            before = issuer.signer_ids
            issuer.use_keyring(keys)
            if not before <= issuer.signer_ids:  # what a key that is gone signed opens nothing
                self._parts.token_cache.clear()

        return turn

    def _note(self, *, failed: bool) -> None:
        process = self._parts.metrics.process
        process.reloads["failure" if failed else "success"].inc()
        process.reload_failed.set(failed)
