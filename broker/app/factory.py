"""From settings to parts: reads secret files, opens nothing else.

Each function turns one section into the value that its part works with, or raises ConfigError.
`app` uses them at the start and again at each reload, so a reload is checked by the very code that
checked the start.
"""

import ipaddress
import ssl
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from broker.app import credentials
from broker.app.secret_settings import secret_settings
from broker.config import files
from broker.config.addresses import Access, StateFileAddress, StoreAddress, parse_store_url
from broker.config.load import MIN_CLIENT_SECRET, found_in, read_secret
from broker.config.schema import ConfigError
from broker.config.settings import (
    AgentLimitSettings,
    AgentOverrideSettings,
    ClientSettings,
    FingerprintLimitSettings,
    FingerprintMintsLimitSettings,
    LimitSettings,
    Settings,
    StoreSettings,
)
from broker.config.validate import is_loopback, parse_address
from broker.limits.policy import LimitPolicy, LimitRule, Limits
from broker.model import LimitName, Secret
from broker.pacing.slots import Budget
from broker.rules import bucket
from broker.rules.reuse import ReusePolicy
from broker.telemetry.cells import Row
from broker.telemetry.metrics import Metrics
from broker.web.auth import Client, Network


def clients(settings: Settings, environ: Mapping[str, str]) -> list[Client]:
    """Return the known clients; raises ConfigError for none, a short secret, or a shared one.

    A relay without [clients] is a private one: whoever has the vendor's key may use it, because
    they could ask the vendor themselves.  That holds on this machine only.
    """
    if not settings.clients:
        return _holders_of_vendor_keys(settings, environ)
    known: dict[bytes, Client] = {}
    for name, client in settings.clients.items():
        agents = None if "*" in client.agents else frozenset(client.agents)
        for where, secret in _secrets_of(name, client):
            _check_header_secret(where, secret)
            digest = secret.digest()
            if digest in known and known[digest].name == name:
                raise ConfigError(f"{where}: the same as its secret; take one of the two out")
            if digest in known:
                raise ConfigError(
                    f"{where}: the same as that of {known[digest].name!r}; a client is known by its"
                    " secret: make another one with `broker keys generate`"
                )
            known[digest] = Client(
                name, digest, agents, client.allow_origin_header, client.pass_through
            )
    return list(known.values())


def _secrets_of(name: str, client: ClientSettings) -> Iterator[tuple[str, Secret]]:
    """Yield a client's secret, and its next one while it is being changed; raises ConfigError.

    With each where it was found, for an error.
    """
    path = f"clients.{name}.secret"
    secret = read_secret(path, client.secret, client.secret_file)
    if secret is None:
        raise ConfigError(f"{path}_file: required; a client is known by its secret")
    yield found_in(path, client.secret_file), secret
    path = f"clients.{name}.next_secret"
    following = read_secret(path, client.next_secret, client.next_secret_file)
    if following is not None:
        yield found_in(path, client.next_secret_file), following


def admin_clients(settings: Settings) -> list[Client]:
    """Return who may see and end sessions: the one who has the admin secret, or nobody."""
    section = settings.admin
    secret = read_secret("admin.secret", section.secret, section.secret_file)
    if secret is None:
        return []
    _check_header_secret(found_in("admin.secret", section.secret_file), secret)
    return [Client("admin", secret.digest(), None, allow_origin=False)]


def _check_header_secret(where: str, secret: Secret) -> None:
    """Raise ConfigError for a secret that no header can carry, or that is short."""
    text = secret.reveal()
    if not text.isprintable() or text.strip() != text:
        raise ConfigError(
            f"{where}: has a line break, a control character or blanks around it, which no"
            " header can carry; keep it on one line"
        )
    if len(text) < MIN_CLIENT_SECRET:
        raise ConfigError(
            f"{where}: shorter than {MIN_CLIENT_SECRET} characters;"
            " make one with `broker keys generate`"
        )


def _holders_of_vendor_keys(settings: Settings, environ: Mapping[str, str]) -> list[Client]:
    if settings.issuer.kind != "upstream":
        raise ConfigError(
            "clients: nobody may ask for tokens; add [clients.NAME] with secret_file and agents"
        )
    where = parse_address(settings.server.listen)
    if not isinstance(where, str) and not is_loopback(where[0]):
        raise ConfigError(
            "clients: required when server.listen is not on loopback; without them anybody with"
            " the vendor's key may use the broker, which must not leave this machine"
        )
    return [
        Client("vendor-key", key.digest(), None, allow_origin=False, pass_through=True)
        for key in credentials.vendor_keys(settings, environ)
    ]


def limits(settings: Settings) -> Limits:
    """Return all limits in the form that buckets work with."""
    section = settings.limits
    return Limits(
        fingerprint=_limit_set(LimitName.FINGERPRINT, section.fingerprint),
        fingerprint_mints=_limit_set(LimitName.FINGERPRINT_MINTS, section.fingerprint_mints),
        agent=_limit_set(LimitName.AGENT, section.agent),
        client=None if section.client is None else _client_limit(section.client),
        max_tracked=section.max_tracked,
    )


def reuse(settings: Settings) -> ReusePolicy:
    """Return when tokens are reused."""
    section = settings.reuse
    return ReusePolicy(
        enabled=section.enabled,
        ahead=section.refresh_ahead.us,
        floor=section.floor.us,
        outage=section.floor_in_outage.us,
    )


def budget(settings: Settings) -> Budget | None:
    """Return the budget, None for an issuer that needs no pace."""
    section = settings.issuer.budget
    if section is None:
        return None
    return Budget(section.rate, section.per.seconds, section.burst, section.max_wait.seconds)


def metrics(settings: Settings, cells: Row | None = None) -> Metrics:
    """Return the metrics of a process with these settings, in its row of shared cells."""
    workers, address = settings.server.workers, parse_store_url(settings.store.url)
    return Metrics(
        settings.issuer.kind,
        budget=settings.issuer.budget is not None,
        shared_store=isinstance(address, StoreAddress),
        state_file=isinstance(address, StateFileAddress),
        pass_through=bool(settings.issuer.upstream.pass_through),
        workers=workers if workers > 1 else 0,
        cells=cells,
    )


def store_address(settings: Settings) -> StoreAddress | None:
    """Return where the shared store is, None without one."""
    address = parse_store_url(settings.store.url)
    return address if isinstance(address, StoreAddress) else None


def state_file(settings: Settings) -> Path | None:
    """Return where the state file is, None without one."""
    address = parse_store_url(settings.store.url)
    return address.path if isinstance(address, StateFileAddress) else None


def store_access(settings: Settings) -> Access:
    """Return how the shared store lets the broker in; raises ConfigError."""
    store, address = settings.store, store_address(settings)
    password = read_secret("store.password", store.password, store.password_file)
    tls = _tls_of(store) if address is not None and address.tls else None
    return Access(store.username, password, tls)


def _tls_of(store: StoreSettings) -> ssl.SSLContext:
    """Read certificates once: at the first connection it would be too late to say what is wrong.

    TLS opens them by their paths and would wait for a pipe: so each is read before.
    """
    for name in ("tls_ca_file", "tls_cert_file", "tls_key_file"):
        if file := getattr(store, name):
            try:
                files.read(file)
            except files.CannotRead as error:
                raise ConfigError(f"store.{name}: {error}") from None
    name, file = "tls_ca_file", store.tls_ca_file
    try:
        context = ssl.create_default_context(cafile=file)
        if store.tls_cert_file is not None:
            name, file = "tls_cert_file", store.tls_cert_file
            context.load_cert_chain(file, store.tls_key_file, password=lambda: "")
    except OSError as error:  # of TLS, or of a file that went away a moment ago
        problem = getattr(error, "reason", error.strerror) or "no certificates"
        raise ConfigError(f"store.{name}: {file} cannot be used: {problem}") from None
    return context


def with_store_secrets(settings: Settings, sealing_key: Secret | None) -> Settings:
    """Return the settings with the store's secrets in place of their files; raises ConfigError.

    Workers get these: one that starts later has what its siblings have, whatever stands in the
    files by then.  Names of keys depend on the sealing key, which is that of the start.
    """
    store = replace(
        settings.store,
        password=store_access(settings).password,
        password_file=None,
        encryption_key=sealing_key,
        encryption_key_file=None,
    )
    return replace(settings, store=store)


def shows_password(settings: Settings) -> bool:
    """Whether the store's password crosses a network in clear text."""
    store, address = settings.store, store_address(settings)
    has_password = store.password is not None or store.password_file is not None
    if address is None or address.tls or not has_password or settings.server.private_network:
        return False
    return not all(is_loopback(host) for host, _ in address.hosts)


def trusted_proxies(settings: Settings) -> list[Network]:
    """Return the networks whose word on client addresses counts."""
    return [ipaddress.ip_network(text) for text in settings.server.trusted_proxies]


def check(settings: Settings, environ: Mapping[str, str]) -> None:
    """Build every part once; raises ConfigError for the first that cannot be built."""
    for problem in problems(settings, environ):
        raise problem


def problems(settings: Settings, environ: Mapping[str, str]) -> Iterator[ConfigError]:
    """Build every part once, and yield what is wrong with each that cannot be built."""
    told = set()
    for build in _builds(settings, environ):
        try:
            build()
        except ConfigError as error:
            if str(error) not in told:
                yield error
            told.add(str(error))
        except ValueError:  # of an address or a rate: `config.validate` has told it
            continue


def _builds(settings: Settings, environ: Mapping[str, str]) -> Iterator[Callable[[], object]]:
    """Yield what builds each part: of several clients or keys each alone, then all of them."""
    for name, client in settings.clients.items():
        alone = replace(settings, clients={name: client})
        yield partial(clients, alone, environ)
    yield partial(clients, settings, environ)
    yield partial(admin_clients, settings)
    for alone in _each_key(settings):
        yield partial(credentials.issuer_keys, alone, environ)
    yield partial(credentials.issuer_keys, settings, environ)
    if settings.issuer.kind == "upstream":
        yield partial(credentials.vendor_proxy, settings, environ)
    yield partial(credentials.sealing_key, settings)
    yield partial(store_access, settings)
    yield partial(limits, settings)


def _each_key(settings: Settings) -> Iterator[Settings]:
    """Yield the settings with each of the issuer's keys alone, if there are several."""
    local, upstream = settings.issuer.local, settings.issuer.upstream
    if settings.issuer.kind == "local":
        for kid, key in local.keys.items() if len(local.keys) > 1 else ():
            alone = replace(local, keys={kid: key}, keys_file=None, signing_key="")
            yield replace(settings, issuer=replace(settings.issuer, local=alone))
    else:
        for file in upstream.api_secret_files:
            one = replace(upstream, api_secret=None, api_secret_files=(file,))
            yield replace(settings, issuer=replace(settings.issuer, upstream=one))


def secret_files(settings: Settings) -> list[tuple[str, str]]:
    """Return name and path of every secret file that the settings mention."""
    found = secret_settings(settings)
    return [(setting.key, setting.file) for setting in found if setting.file]


def watched_files(settings: Settings) -> list[tuple[str, str]]:
    """Return name and path of every file that is read again when it changes."""
    store = settings.store
    certificates = [("tls_ca_file", store.tls_ca_file), ("tls_cert_file", store.tls_cert_file)]
    public = [(f"store.{name}", file) for name, file in certificates if file]
    return secret_files(settings) + public


def _limit_set(
    name: LimitName,
    section: FingerprintLimitSettings | FingerprintMintsLimitSettings | AgentLimitSettings,
) -> LimitPolicy:
    rule = LimitRule(bucket.limit(section.rate, section.per.us, section.burst), section.dry_run)
    overrides: Mapping[str, LimitRule] = {
        agent: _override(section, override) for agent, override in section.overrides.items()
    }
    return LimitPolicy(name, rule, overrides)


def _override(
    section: FingerprintLimitSettings | FingerprintMintsLimitSettings | AgentLimitSettings,
    override: AgentOverrideSettings,
) -> LimitRule:
    rate = section.rate if override.rate is None else override.rate
    per = section.per if override.per is None else override.per
    burst = section.burst if override.burst is None else override.burst
    dry_run = section.dry_run if override.dry_run is None else override.dry_run
    return LimitRule(bucket.limit(rate, per.us, burst), dry_run)


def _client_limit(section: LimitSettings) -> LimitPolicy:
    rule = LimitRule(bucket.limit(section.rate, section.per.us, section.burst), section.dry_run)
    return LimitPolicy(LimitName.CLIENT, rule, {})
