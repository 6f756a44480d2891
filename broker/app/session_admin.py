"""/v1/sessions where a supervisor has the admin listener: a line of its own to the shared store.

It reads records and ends sessions, and is no member of the fleet: it takes no share of any limit.
"""

from collections.abc import Callable

from aiohttp import web
from typing_extensions import override

from broker.app import credentials, factory
from broker.app.shared_backend import names_of
from broker.clock import SystemClock
from broker.config.settings import Settings
from broker.errors import StoreAway
from broker.model import LimitName
from broker.sealing import Box
from broker.sessions.admin import RevokesVisitors, SessionAdmin
from broker.sessions.memory import MemorySessions
from broker.telemetry.logs import RefusalLog
from broker.telemetry.metrics import Metrics
from broker.valkey.client.errors import StoreFailed
from broker.valkey.client.guarded import StoreClient
from broker.valkey.client.topology import nodes_at
from broker.valkey.key_names import Names
from broker.valkey.session_fallback import SharedSessions
from broker.valkey.sessions import ValkeySessions
from broker.valkey.store import revoke_visitor
from broker.web import admin_sessions
from broker.web.auth import ClientAuthenticator

TIMEOUT = 1.0
"""Seconds for one call: an operator waits for it, a visitor does not (see `[store] timeout`)."""


class SessionAdminApi:
    """Serves the routes, if the settings have a secret for them; several workers share a store."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        address, key = factory.store_address(settings), credentials.sealing_key(settings)
        assert address is not None  # both are checked with the settings
        assert key is not None
        self._clock = SystemClock()
        nodes = nodes_at(address, factory.store_access(settings), TIMEOUT)
        self._server = StoreClient(nodes, self._clock, metrics.store)
        names = names_of(settings, key)
        most = settings.sessions.max_recorded
        remote = ValkeySessions(
            self._server, names, Box(key, "sessions in a shared store"), most, self._clock
        )
        store = _Store(self._server, names)
        session_store = SharedSessions(remote, MemorySessions(1, self._clock), store, closed=True)
        self._session_admin = SessionAdmin(session_store, store, metrics.sessions)
        self._authenticator = ClientAuthenticator(
            [],
            factory.trusted_proxies(settings),
            self._clock.mono(),
            metrics.limits.counts[LimitName.AUTH],
            section="[admin]",
            wanted="admin secret",
        )
        self._refusals = RefusalLog()
        self._throttled = metrics.rejections[LimitName.AUTH.value]
        self.prepared(settings)()

    def prepared(self, settings: Settings) -> Callable[[], None]:
        """Read the admin secret, and how the store lets it in; raises ConfigError.

        Returns what puts them in force, as `Reloader.prepared` does.
        """
        admins, access = factory.admin_clients(settings), factory.store_access(settings)

        def put_in_force() -> None:
            self._authenticator.use_clients(admins)
            self._server.nodes.use_access(access)

        return put_in_force

    def serve_on(self, application: web.Application) -> None:
        """Add the routes."""
        admin_sessions.add(
            application,
            self._authenticator,
            self._session_admin,
            self._clock,
            self._throttled,
            self._refusals,
        )

    async def open(self) -> None:
        """Begin; a store that is not there is told to whoever asks."""
        await self._server.nodes.open()

    async def close(self) -> None:
        """Close every connection."""
        await self._server.close()
        self._refusals.sum_up()

    def tidy(self) -> None:
        """Tally calls, forget failures: call it about twice a second."""
        self._server.tidy()
        now = self._clock.mono()
        self._authenticator.failures.purge_expired(now)
        self._refusals.flush(now)


class _Store(RevokesVisitors):
    def __init__(self, server: StoreClient, names: Names) -> None:
        self._server = server
        self._names = names

    @override
    async def revoke_visitor(self, client: str, fingerprint: str, *keys: str) -> None:
        try:
            _ = await revoke_visitor(self._server, self._names, client, fingerprint, keys)
        except StoreFailed as failed:
            raise StoreAway from failed
