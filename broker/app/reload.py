"""What a running process can take over from new settings, and what needs a restart.

A reload has two halves: files are read aside, where a mounted file system may take its time, and
what was read is put in force on the event loop, which reads nothing.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from msgspec.structs import replace

from broker.config.schema import ConfigError
from broker.config.settings import IssuerSettings, Settings
from broker.tasks import aside

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
    }
    if other_key:
        names.append("store.encryption_key")
    return names + [f"issuer.{name}" for name, differs in fixed_parts.items() if differs]


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
        upstream=replace(new.upstream, base_url=upstream.base_url, timeout=upstream.timeout),
    )
