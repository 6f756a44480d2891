"""Puts a broker together, in one place and in a plain order: opens nothing.

The connection to a shared store comes first, then the pacer, whose slots may be there, then the
issuer, which takes turns, then the store, which goes by the issuer's keys; what answers comes last.
"""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from prometheus_client import CollectorRegistry

from broker.app import credentials, factory, other_routes
from broker.app.worker_context import WorkerContext
from broker.config.settings import Settings
from broker.issue import TokenService
from broker.issuers.keyring import Keyring
from broker.issuers.local import LocalIssuer
from broker.issuers.upstream import UpstreamIssuer
from broker.issuers.vendor.client import VendorClient
from broker.issuers.vendor.passing import PassThroughClient
from broker.local_minting import LocalMinter
from broker.minting import Minter, MintRules
from broker.model import Clock, LimitName, Secret
from broker.pacing.pacer import BudgetPacer, NoPacing
from broker.rules.reuse import ReusePolicy
from broker.sessions.admin import TokenIntrospector
from broker.sessions.memory import MemorySessions
from broker.stores.memory import MemoryStore
from broker.stores.token_cache import TokenCache
from broker.telemetry.logs import RefusalLog
from broker.telemetry.metrics import Metrics
from broker.telemetry.readiness import Readiness
from broker.web import token_status
from broker.web.auth import ClientAuthenticator
from broker.web.lane import Lane
from broker.web.pages import embed_script
from broker.web.router import Routes
from broker.web.server import DataServer

if TYPE_CHECKING:
    from broker.app.shared_backend import SharedBackend, StoreConnection
    from broker.sqlite.backend import DurableBackend
    from broker.valkey.fallback import SharedStore
    from broker.valkey.session_fallback import SharedSessions

MINT_GRACE = 6.0
"""Seconds that a mint may take beyond its turn and its call: the longest back-off of a key and the
pause before a retry.  A mint may outlive its callers, because its token is worth caching; but the
call has a timeout of its own, and must be the one to tell that it ran out."""


NO_LANE = "BROKER_NO_FAST_LANE"
"""Environment variable, for tests: where it is set, every request goes aiohttp's way."""

CLOSING_GRACE = 10.0
"""Seconds beyond its drain in which a process that was asked to stop has left its state file."""


class Parts(Struct, frozen=True):
    """What one broker process is made of."""

    clock: Clock
    metrics: Metrics
    readiness: Readiness
    sealing_key: Secret | None
    token_cache: TokenCache
    shared_backend: "SharedBackend | None"
    store: "MemoryStore | SharedStore"
    session_store: "MemorySessions | SharedSessions"
    durable: "DurableBackend | None"
    pacer: BudgetPacer | None
    issuer: LocalIssuer | UpstreamIssuer
    minter: Minter
    token_service: TokenService
    introspector: TokenIntrospector
    authenticator: ClientAuthenticator
    admin_authenticator: ClientAuthenticator | None
    routes: Routes
    server: DataServer
    embed: embed_script.Script
    pass_through: PassThroughClient | None
    admin_refusals: RefusalLog

    @property
    def refusal_logs(self) -> tuple[RefusalLog, ...]:
        """Every log of what was refused: to be flushed now and then, and summed up at the end."""
        return self.routes.refusals, self.minter.renewal_log, self.admin_refusals


class _Given(Struct, frozen=True):
    """What parts are built from."""

    settings: Settings
    environ: Mapping[str, str]
    clock: Clock
    worker: WorkerContext | None
    metrics: Metrics
    sealing_key: Secret | None
    policy: ReusePolicy


class _Stores(Struct, frozen=True):
    """What is kept, and what restores it."""

    store: "MemoryStore | SharedStore"
    sessions: "MemorySessions | SharedSessions"
    shared: "SharedBackend | None" = None
    durable: "DurableBackend | None" = None


def build(
    settings: Settings, environ: Mapping[str, str], clock: Clock, worker: WorkerContext | None
) -> Parts:
    """Build all parts, in the event loop's thread; raises ConfigError with nothing left open."""
    given = _Given(
        settings,
        environ,
        clock,
        worker,
        factory.metrics(settings) if worker is None else worker.metrics,
        credentials.sealing_key(settings),
        factory.reuse(settings),
    )
    cache = _token_cache(given)
    connection = _connection(given)
    pacer = _pacer(given, connection)
    authenticator, admin_authenticator = _authenticator(given), _admin_authenticator(given)
    keys = credentials.issuer_keys(settings, environ)  # once: for the issuer, and for a state file
    issuer = _issuer(given, keys, pacer, connection)
    stores = _stores(given, keys, cache, connection, issuer)
    minter = _minter(given, stores, issuer, pacer)
    token_service = TokenService(stores.store, minter, given.policy, clock)
    introspector = TokenIntrospector(issuer, stores.sessions, stores.store, given.metrics.sessions)
    readiness = Readiness()
    routes = _routes(given, authenticator, token_service, readiness)
    token_status.add(routes, authenticator, introspector, clock, stores.store.charge_client)
    return Parts(
        clock=clock,
        metrics=given.metrics,
        readiness=readiness,
        sealing_key=given.sealing_key,
        token_cache=cache,
        shared_backend=stores.shared,
        store=stores.store,
        session_store=stores.sessions,
        durable=stores.durable,
        pacer=pacer,
        issuer=issuer,
        minter=minter,
        token_service=token_service,
        introspector=introspector,
        authenticator=authenticator,
        admin_authenticator=admin_authenticator,
        routes=routes,
        server=_server(given, routes, authenticator),
        embed=embed_script.add(routes),
        pass_through=other_routes.add(
            settings, environ, routes, authenticator, issuer, given.metrics.pass_through, clock
        ),
        admin_refusals=RefusalLog(),
    )


def add_pages(
    parts: Parts, settings: Settings, registry: CollectorRegistry, url: str, *, dev: bool
) -> None:
    """Add pages for people, which name the URL; imported only where they are served."""
    if dev:
        from broker.app import dev as development  # noqa: PLC0415 - development only
        from broker.web.pages import demo  # noqa: PLC0415 - as above

        demo.add(parts.routes, parts.embed, url, development.client_secret(settings))
    if not settings.server.docs:
        return
    from broker.web.pages import docs  # noqa: PLC0415 - rare, and keeps the start short

    docs.add(parts.routes, url)
    if dev:
        docs.add_development(parts.routes, registry, url)
        parts.authenticator.trust_origins(docs.own_origins(url))


def _token_cache(given: _Given) -> TokenCache:
    marks = given.policy.marks
    outage = lru_cache(maxsize=64)(lambda lifetime: marks(lifetime).outage)  # spares two calls
    return TokenCache(
        given.settings.reuse.max_tokens,
        keep_until=lambda token: token.dies_mono - outage(token.lifetime),
        mono=given.clock.mono,
        counts=given.metrics.tokens.counts,
    )


def _connection(given: _Given) -> "StoreConnection | None":
    """Put what the shared store's server is for together, if there is one."""
    settings, worker = given.settings, given.worker
    address = factory.store_address(settings)
    if address is None or given.sealing_key is None:
        return None
    from broker.app.shared_backend import (  # noqa: PLC0415 - its client is slow to import
        StoreConnection,
        StoreTarget,
    )

    return StoreConnection(
        settings,
        StoreTarget(
            address,
            factory.store_access(settings),
            given.sealing_key,
            settings.store.timeout.seconds,
        ),
        given.clock,
        given.metrics,
        _place(settings.server.listen, worker),
        is_first=worker is None or worker.worker == 1,
    )


def _place(listen: str, worker: WorkerContext | None) -> str:
    """Name this process among those of its host: the same after a restart, if it can be."""
    if worker is not None:
        return f"{listen} worker {worker.worker}"
    return listen if not listen.endswith(":0") else f"{listen} {os.getpid()}"


def _pacer(given: _Given, connection: "StoreConnection | None") -> BudgetPacer | None:
    budget = factory.budget(given.settings)
    if budget is None:
        return None
    return BudgetPacer(
        budget,
        given.metrics.budget.queue_wait.observe,
        None if connection is None else connection.slots(budget),
        given.metrics.process.background,
    )


def _authenticator(given: _Given) -> ClientAuthenticator:
    return ClientAuthenticator(
        factory.clients(given.settings, given.environ),
        factory.trusted_proxies(given.settings),
        given.clock.mono(),
        given.metrics.limits.counts[LimitName.AUTH],
    )


def _admin_authenticator(given: _Given) -> ClientAuthenticator | None:
    admins = factory.admin_clients(given.settings)
    if not admins:
        return None
    return ClientAuthenticator(
        admins,
        factory.trusted_proxies(given.settings),
        given.clock.mono(),
        given.metrics.limits.counts[LimitName.AUTH],
        section="[admin]",
        wanted="admin secret",
    )


def _issuer(
    given: _Given,
    keys: Keyring | list[Secret],
    pacer: BudgetPacer | None,
    connection: "StoreConnection | None",
) -> LocalIssuer | UpstreamIssuer:
    settings = given.settings
    if isinstance(keys, Keyring):
        local = settings.issuer.local
        return LocalIssuer(keys, local.issuer, local.audience, given.clock)
    assert pacer is not None  # the relay always has a budget
    upstream = settings.issuer.upstream
    proxy = credentials.vendor_proxy(settings, given.environ)
    return UpstreamIssuer(
        VendorClient(upstream.base_url, upstream.timeout.seconds, proxy),
        keys,
        pacer,
        given.clock,
        given.metrics.upstream,
        refusals=None if connection is None else connection.refusals,
    )


def _stores(
    given: _Given,
    keys: Keyring | list[Secret],
    cache: TokenCache,
    connection: "StoreConnection | None",
    issuer: LocalIssuer | UpstreamIssuer,
) -> _Stores:
    settings, clock, limits = given.settings, given.clock, factory.limits(given.settings)
    if connection is not None:
        shared = connection.backend(limits, cache, lambda: issuer.signer_ids)
        return _Stores(shared.store, shared.sessions, shared)
    file = factory.state_file(settings)
    if file is not None:
        durable = _durable(given, credentials.state_file_keys(settings, keys), file, cache, issuer)
        return _Stores(durable.store, durable.sessions, durable=durable)
    store = MemoryStore(limits, cache, clock, given.metrics.limits.counts)
    return _Stores(store, MemorySessions(settings.sessions.max_recorded, clock))


def _durable(
    given: _Given,
    keys: tuple[tuple[Secret, ...], tuple[Secret, ...]],
    file: Path,
    cache: TokenCache,
    issuer: LocalIssuer | UpstreamIssuer,
) -> "DurableBackend":
    """Put the store with a file behind it together; a vendor's tokens are in it before answers."""
    from broker.sqlite.backend import (  # noqa: PLC0415 - only where there is a file
        DurableBackend,
        FileSettings,
    )
    from broker.sqlite.opening import Keys  # noqa: PLC0415 - as above

    settings, marks = given.settings, given.policy.marks
    return DurableBackend(
        FileSettings(
            path=file,
            keys=Keys(*keys),
            most_tokens=settings.reuse.max_tokens,
            most_sessions=settings.sessions.max_recorded,
            floor=lambda lifetime: marks(lifetime).floor,
            waits=isinstance(issuer, UpstreamIssuer),
            timeout=settings.server.drain.seconds + CLOSING_GRACE,
        ),
        factory.limits(settings),
        cache,
        given.clock,
        given.metrics,
        lambda: issuer.signer_ids,
    )


def _minter(
    given: _Given,
    stores: _Stores,
    issuer: LocalIssuer | UpstreamIssuer,
    pacer: BudgetPacer | None,
) -> Minter:
    store, sessions = stores.store, stores.sessions
    budget = given.settings.issuer.budget
    longest = MINT_GRACE + given.settings.issuer.upstream.timeout.seconds
    longest += budget.max_wait.seconds if budget else 0.0
    rules, metrics = MintRules(given.policy, longest), given.metrics.mints
    if (
        isinstance(store, MemoryStore)
        and isinstance(sessions, MemorySessions)
        and isinstance(issuer, LocalIssuer)
        and pacer is None
    ):
        return LocalMinter(store, sessions, issuer, rules, given.clock, metrics)
    return Minter(store, sessions, issuer, pacer or NoPacing(), rules, given.clock, metrics)


def _routes(
    given: _Given,
    authenticator: ClientAuthenticator,
    token_service: TokenService,
    readiness: Readiness,
) -> Routes:
    settings = given.settings
    routes = Routes(
        authenticator,
        token_service,
        given.metrics,
        given.clock,
        readiness,
        deadline=settings.server.deadline.seconds,
        any_fingerprint=settings.limits.fingerprint_format == "any",
    )
    routes.tokens.use_log(debug=settings.log.level == "debug")
    return routes


def _server(given: _Given, routes: Routes, authenticator: ClientAuthenticator) -> DataServer:
    lane = None
    if not given.environ.get(NO_LANE):
        lane = Lane(routes.lane, routes)
        authenticator.when_changed(lane.forget)
    return DataServer(
        routes,
        routes.error_head,
        given.metrics.process.connections,
        keep_alive=given.settings.server.keep_alive.seconds,
        lane=lane,
        lane_off=given.metrics.process.fast_lane_off,
    )
