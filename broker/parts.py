"""From settings to parts: reads secret files, opens nothing else.

Each function turns one section into the value that its part works with, or raises ConfigError.
`app` uses them at the start and again at each reload, so a reload is checked by the very code that
checked the start.
"""

import ipaddress
from collections.abc import Mapping
from pathlib import Path

from broker.config import MIN_CLIENT_SECRET, ConfigError, read_secret
from broker.issue import ReusePolicy
from broker.issuers.keyring import BadKey, Keyring, check_key
from broker.limits import Limits, LimitSet, Rule
from broker.model import LimitName, Secret
from broker.pacer import Budget
from broker.rules import bucket
from broker.settings import (
    AgentLimit,
    AgentOverride,
    FingerprintLimit,
    FingerprintMintsLimit,
    Limit,
    Settings,
)
from broker.web.door import KnownClient, Network


def clients(settings: Settings) -> list[KnownClient]:
    """Return the known clients; raises ConfigError for none, a short secret, or a shared one."""
    if not settings.clients:
        raise ConfigError(
            "clients: nobody may ask for tokens; add [clients.NAME] with secret_file and agents"
        )
    known: dict[bytes, KnownClient] = {}
    for name, client in settings.clients.items():
        path = f"clients.{name}.secret"
        secret = read_secret(path, client.secret, client.secret_file)
        if secret is None:
            raise ConfigError(f"{path}_file: required; a client is known by its secret")
        if len(secret.reveal()) < MIN_CLIENT_SECRET:
            raise ConfigError(
                f"{path}: shorter than {MIN_CLIENT_SECRET} characters;"
                " make one with `broker keys generate`"
            )
        digest = secret.digest()
        if digest in known:
            raise ConfigError(
                f"{path}: the same as that of {known[digest].name!r}; secrets name clients"
            )
        agents = None if "*" in client.agents else frozenset(client.agents)
        known[digest] = KnownClient(name, digest, agents, client.allow_origin_header)
    return list(known.values())


def keyring(settings: Settings) -> Keyring:
    """Return the keys of the local issuer; raises ConfigError for none or a weak one."""
    local = settings.issuer.local
    keys: dict[str, bytes] = {}
    for kid, key in local.keys.items():
        secret = read_secret(f"issuer.local.keys.{kid}.secret", key.secret, key.secret_file)
        if secret is None:
            raise ConfigError(f"issuer.local.keys.{kid}: needs secret_file")
        keys[kid] = secret.reveal().encode()
    if not keys:
        raise ConfigError(
            "issuer.local.keys: no key to sign with; make one with `broker keys generate`,"
            " or try `broker serve --dev`"
        )
    if not local.signing_key and len(keys) > 1:
        raise ConfigError("issuer.local.signing_key: required with more than one key")
    try:
        return Keyring(keys, local.signing_key or next(iter(keys)))
    except BadKey as error:
        raise ConfigError(f"issuer.local.keys: {error}") from None


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


def sealing_key(settings: Settings) -> Secret | None:
    """Return the key that seals what is stored; raises ConfigError for a weak one."""
    store = settings.store
    secret = read_secret("store.encryption_key", store.encryption_key, store.encryption_key_file)
    if secret is not None:
        try:
            check_key("store.encryption_key", secret.reveal().encode())
        except BadKey as error:
            raise ConfigError(f"store.encryption_key_file: {error}") from None
    return secret


def trusted_proxies(settings: Settings) -> list[Network]:
    """Return the networks whose word on client addresses counts."""
    return [ipaddress.ip_network(text) for text in settings.server.trusted_proxies]


def check(settings: Settings) -> None:
    """Build every part once; raises ConfigError for the first that cannot be built."""
    clients(settings)
    keyring(settings)
    sealing_key(settings)
    limits(settings)


def secret_files(settings: Settings) -> list[tuple[str, str]]:
    """Return name and path of every secret file that the settings mention."""
    files = [
        *((f"clients.{name}.secret_file", c.secret_file) for name, c in settings.clients.items()),
        *(
            (f"issuer.local.keys.{kid}.secret_file", key.secret_file)
            for kid, key in settings.issuer.local.keys.items()
        ),
        ("store.encryption_key_file", settings.store.encryption_key_file),
    ]
    return [(name, file) for name, file in files if file]


def missing_files(settings: Settings) -> list[tuple[str, str]]:
    """Return the secret files that are not on this machine."""
    return [(name, file) for name, file in secret_files(settings) if not Path(file).exists()]


def _limit_set(
    name: LimitName, section: FingerprintLimit | FingerprintMintsLimit | AgentLimit
) -> LimitSet:
    rule = Rule(bucket.limit(section.rate, section.per.us, section.burst), section.dry_run)
    overrides: Mapping[str, Rule] = {
        agent: _override(section, override) for agent, override in section.overrides.items()
    }
    return LimitSet(name, rule, overrides)


def _override(
    section: FingerprintLimit | FingerprintMintsLimit | AgentLimit, override: AgentOverride
) -> Rule:
    rate = section.rate if override.rate is None else override.rate
    per = section.per if override.per is None else override.per
    burst = section.burst if override.burst is None else override.burst
    dry_run = section.dry_run if override.dry_run is None else override.dry_run
    return Rule(bucket.limit(rate, per.us, burst), dry_run)


def _client_limit(section: Limit) -> LimitSet:
    rule = Rule(bucket.limit(section.rate, section.per.us, section.burst), section.dry_run)
    return LimitSet(LimitName.CLIENT, rule, {})
