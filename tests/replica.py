"""One broker's part of a shared store, put together as the application does, without HTTP.

Time on a real server cannot be moved.  Where a test says what time it is, the scripts get it as one
more argument: only `now_us` and `px` of the prelude are others then (keys must not vanish on the
server's clock while the test's stands still), all else is the text that ships.
"""

import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from hashlib import sha1

from msgspec import Struct

from broker.app.shared_backend import StoreConnection, StoreTarget
from broker.config.addresses import Access, StoreAddress
from broker.config.settings import (
    IssuerSettings,
    SessionSettings,
    Settings,
    StoreSettings,
    UpstreamSettings,
)
from broker.limits.policy import Limits
from broker.model import EmbedToken, Secret
from broker.pacing.slots import Budget
from broker.stores.token_cache import TokenCache
from broker.telemetry.metrics import STORE_ERRORS, Metrics
from broker.testing import FakeClock
from broker.valkey.client.connection import PipelinedConnection
from broker.valkey.client.guarded import Operation, Question
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script, command
from broker.valkey.client.shapes import Shape
from broker.valkey.fallback import SharedStore
from broker.valkey.slots import SharedSlots
from broker.valkey.store import ValkeyStore

SECOND = 1_000_000
HOUR = 3600 * SECOND

TIMEOUT = 10.0
"""Seconds for a call where a test is about outcomes, not about the timeout: machines are noisy."""

KEY = Secret(secrets.token_urlsafe(48))
"""Replicas of one test run share it."""

VENDOR = "https://vendor.example"

GIVEN_NOW = """local GIVEN = tonumber(table.remove(ARGV))
local function now_us()
  return GIVEN
end
"""

LASTING = """local function px(us)
  return '3600000'
end
"""


class TimedScript:
    """A script that is told what time it is, as its last argument."""

    def __init__(self, script: Script) -> None:
        self.source = at_given_time(script.source)
        self.shape = script.shape
        self._sha = sha1(self.source.encode(), usedforsecurity=False).hexdigest().encode()

    def by_name(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> bytes:
        """As `Script` does."""
        return command(b"EVALSHA", self._sha, b"%d" % len(keys), *keys, *arguments)

    def in_full(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> bytes:
        """As `Script` does."""
        return command(b"EVAL", self.source.encode(), b"%d" % len(keys), *keys, *arguments)


def at_given_time(source: str) -> str:
    """Put other clocks into a script."""
    for name, other in (("now_us", GIVEN_NOW), ("px", LASTING)):
        source, found = re.subn(
            rf"^local function {name}\(.*?^end\n", other, source, flags=re.MULTILINE | re.DOTALL
        )
        assert found == 1, name
    return source


@cache
def timed(script: Script) -> TimedScript:
    """Return the script that is told the time."""
    return TimedScript(script)


class Replica:
    """The shared store of one process; `clock` stands still unless it is moved.

    With `now` the server's scripts go by that microsecond, without it by the server's clock.
    """

    def __init__(
        self,
        address: StoreAddress,
        limits: Limits,
        *,
        access: Access | None = None,
        clock: FakeClock | None = None,
        now: Callable[[], int] | None = None,
        timeout: float = TIMEOUT,
        key: Secret = KEY,
        vendor: str = VENDOR,
        place: str = "",
        on_error: str = "local",
        replicas: int | str = "auto",
        origins: Sequence[str] = ("a key",),
        cache_size: int = 10_000,
        most_sessions: int = 1000,
        is_first: bool = True,
    ) -> None:
        self.clock = clock or FakeClock()
        self.metrics = Metrics("upstream", budget=True, shared_store=True)
        self.token_cache = TokenCache(cache_size, keep_until=_death, mono=self.clock.mono)
        connection = StoreConnection(
            Settings(
                issuer=IssuerSettings(kind="upstream", upstream=UpstreamSettings(base_url=vendor)),
                store=StoreSettings(url="valkey://elsewhere", on_error=on_error, replicas=replicas),
                sessions=SessionSettings(max_recorded=most_sessions),
            ),
            StoreTarget(address, access or Access(), key, timeout),
            self.clock,
            self.metrics,
            place or secrets.token_hex(4),
            is_first=is_first,
        )
        self.shared_backend = connection.backend(
            limits, self.token_cache, lambda: frozenset(origins)
        )
        self.server = self.shared_backend.server
        self.store: SharedStore = self.shared_backend.store
        self.remote: ValkeyStore = self.shared_backend._remote
        self.names = self.shared_backend.names
        self.fleet = self.shared_backend.fleet
        if now is not None:
            self._go_by(now)
            self.fleet.time.mono = self.clock.mono

    def slots(self, budget: Budget) -> SharedSlots:
        """Return the budget's slots."""
        return self.shared_backend.connection.slots(budget)

    @property
    def errors(self) -> dict[str, float]:
        """Calls that failed, by reason."""
        counted = {reason: self.metrics.store.errors[reason].value for reason in STORE_ERRORS}
        return {reason: count for reason, count in counted.items() if count}

    def moments(self) -> tuple[int, int]:
        """Return what both clocks say."""
        return self.clock.mono(), self.clock.wall()

    def use_limits(self, limits: Limits) -> None:
        """Put other limits in force."""
        self.store.use_limits(limits)

    async def settled(self) -> None:
        """Wait until all that is said in the background has been said."""
        while len(self.remote._tasks) or len(self.server._tasks):
            await self.remote._tasks.finish()
            await self.server._tasks.finish()

    def _go_by(self, now: Callable[[], int]) -> None:
        run, link = self.server.run, self.server.link

        def linked(key: bytes) -> TimedLink | None:
            to = link(key)
            return None if to is None else TimedLink(to, now)

        async def told(
            operation: Operation, script: Script, keys: Sequence[bytes], *arguments: bytes
        ) -> Reply:
            return await run(operation, timed(script), keys, *arguments, b"%d" % now())

        self.server.run = told
        self.server.link = linked


class TimedLink(Struct):
    """A connection whose visits go by a clock of ours."""

    link: PipelinedConnection
    now: Callable[[], int]

    def send_for(self, packed: bytes, shape: Shape, question: Question) -> None:
        """Send it, and the time."""
        name, _, *rest = packed.split(b"\r\n")[2::2]  # of a visit, in which there is no CRLF
        sha = timed(Script.VISIT)._sha
        self.link.send_for(command(name, sha, *rest, b"%d" % self.now()), shape, question)


@asynccontextmanager
async def opened(replica: Replica, *, beside: bool = False) -> AsyncIterator[Replica]:
    """Open a replica's connections; with `beside` also heartbeats, renewals and news."""
    if beside:
        await replica.shared_backend.open()
    else:
        await replica.server.nodes.open()
    try:
        yield replica
    finally:
        await replica.settled()
        await (replica.shared_backend.close() if beside else replica.server.close())


def counts(metrics: Mapping[str, object]) -> dict[str, object]:
    """Return what is not nothing."""
    return {name: value for name, value in metrics.items() if value}


def _death(token: EmbedToken) -> int:
    return token.dies_mono
