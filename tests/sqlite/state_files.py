"""A store with a file behind it, as tests open it: on a clock of theirs, with keys of theirs."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from broker.limits.policy import LimitPolicy, LimitRule, Limits
from broker.model import EmbedToken, LimitName, Secret, Session, TokenRequest
from broker.rules.bucket import Limit
from broker.sealing import Box
from broker.sqlite import data_key
from broker.sqlite.backend import DurableBackend, FileSettings
from broker.sqlite.location import WAL, require_usable
from broker.sqlite.opening import PURPOSE, Keys
from broker.sqlite.records import WrittenRecord, unseal
from broker.sqlite.state_file import StateFile
from broker.stores.base import Kept, Lease
from broker.stores.token_cache import TokenCache
from broker.telemetry.metrics import Metrics
from broker.testing import FakeClock
from broker.units import SECOND

HOUR = 3600 * SECOND
AGENT = "A78WKV4515"
SIGNER = "a key"
WIDE = Limit(burst=1_000_000, interval=1)


def wide_limits(fingerprint: Limit = WIDE) -> Limits:
    """Limits that no test meets, but for the first."""

    def policy(name: LimitName, limit: Limit) -> LimitPolicy:
        return LimitPolicy(name, LimitRule(limit), {})

    return Limits(
        fingerprint=policy(LimitName.FINGERPRINT, fingerprint),
        fingerprint_mints=policy(LimitName.FINGERPRINT_MINTS, WIDE),
        agent=policy(LimitName.AGENT, WIDE),
        client=None,
        max_tracked=1_000_000,
    )


def a_key() -> Secret:
    """A key that nobody knows."""
    return Secret(secrets.token_urlsafe(36))


class Broker:
    """What tests have in common: a path, a clock, keys; opened as often as they like."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = FakeClock()
        self.keys = (a_key(),)
        self.also: tuple[Secret, ...] = ()
        self.signers = frozenset({SIGNER})
        self.limits = wide_limits()
        self.waits = True
        self.most = 1000
        self.timeout = 0.0
        self.body = 300
        self.floor = 0
        self.metrics = Metrics("upstream", state_file=True)

    def made(self) -> DurableBackend:
        """A backend that has opened nothing yet."""
        self.metrics = Metrics("upstream", state_file=True)
        tokens = TokenCache(
            self.most, keep_until=lambda token: token.dies_mono, mono=self.clock.mono
        )
        settings = FileSettings(
            path=self.path,
            keys=Keys(self.keys, self.also),
            most_tokens=self.most,
            most_sessions=self.most,
            floor=lambda _lifetime: self.floor,
            waits=self.waits,
            timeout=self.timeout,
        )
        return DurableBackend(
            settings, self.limits, tokens, self.clock, self.metrics, lambda: self.signers
        )

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[DurableBackend]:
        """Open, and close as a drain does."""
        backend = self.made()
        await backend.open(asyncio.Event())
        try:
            yield backend
        finally:
            await backend.close()

    def new_request(self, fingerprint: str = "", **how: Any) -> TokenRequest:
        return TokenRequest("web", AGENT, fingerprint or secrets.token_hex(8), **how)

    def token(self, *, life: int = HOUR, origin: str = SIGNER) -> EmbedToken:
        return EmbedToken(
            body=secrets.token_hex(self.body // 2).encode(),
            dies_mono=self.clock.mono() + life,
            dies_wall=self.clock.wall() + life,
            lifetime=life,
            mark=life // 5,
            origin=origin,
        )

    def session(self, request: TokenRequest, *, life: int = HOUR) -> Session:
        now = self.clock.wall() // SECOND
        return Session(
            session_id=secrets.token_hex(16),
            client=request.client,
            agent=request.agent,
            fingerprint=request.fingerprint,
            model=request.model or "",
            issued=now,
            expires=now + life // SECOND,
            digest=secrets.token_bytes(32),
        )


async def mint(
    broker: Broker, backend: DurableBackend, request: TokenRequest, **how: Any
) -> tuple[EmbedToken, Session]:
    """Do what a minter does: session, then token; both are in the file when it returns."""
    lease = await backend.store.lead(request, request.key, lambda _: False)
    assert isinstance(lease, Lease)
    session = broker.session(request)
    token = replace(broker.token(**how), epoch=lease.epoch)
    await backend.sessions.record(session)
    assert await backend.store.keep(request, request.key, token, lease) is Kept.KEPT
    return token, session


async def end(backend: DurableBackend, session: Session) -> None:
    """Do what an introspector does."""
    await backend.sessions.mark(session, by_client=True)
    await backend.store.revoke_visitor(session.client, session.fingerprint, session.key)
    await backend.sessions.forget(session)


async def held(backend: DurableBackend, request: TokenRequest) -> bytes | None:
    """Return the answer that a visitor would get."""
    token = await backend.store.peek(request, request.key)
    return None if token is None else token.body


def looked(backend: DurableBackend) -> None:
    """Do what a round of housekeeping does."""
    while backend.tell_buckets():
        pass
    backend.publish()


def copied(path: Path, name: str = "crashed") -> Path:
    """Copy file and log as they are: what a kill would leave.

    Both of one moment: the writer may take the log into the file between two readings.
    """
    target, suffixes = path.with_name(f"{name}.db"), ("", WAL)

    def read() -> list[bytes]:
        return [path.with_name(path.name + suffix).read_bytes() for suffix in suffixes]

    while (content := read()) != read():
        pass
    for suffix, part in zip(suffixes, content, strict=True):
        target.with_name(target.name + suffix).write_bytes(part)
    return target


def records_in(path: Path, *keys: Secret) -> Iterator[WrittenRecord]:
    """Yield what is written, the newest row first; of a copy, where a process has the file."""
    file = StateFile.open(path, require_usable(path))
    try:
        key = data_key.unwrapped(file.keys(), keys)
        assert key is not None
        box = Box(key, PURPOSE)
        for place, kind, sealed in file.rows():
            batch = unseal(box, place, kind, sealed)
            assert batch is not None
            yield from batch.records
    finally:
        file.close()
