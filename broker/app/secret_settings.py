"""The one list of settings that hold a secret, and whose each is.

A file that a secret is in is watched, examined by `doctor` and asked for if it is missing; a secret
in two roles is found by `secret_roles`.  Both go through this list.
"""

from collections.abc import Iterator
from enum import StrEnum

from msgspec import Struct

from broker.config.settings import Settings
from broker.model import Secret


class Role(StrEnum):
    """What a secret is good for, in the words of a message."""

    CLIENT = "a client's"
    OPERATOR = "the operator's"
    STORED = "the key of what is stored"
    STORE = "the store's password"
    VENDOR = "the vendor's"
    SIGNING = "a signing key"
    OTHER = "of no use elsewhere"  # a key for TLS, a proxy's URL with what it needs


class SecretSetting(Struct, frozen=True):
    """A secret that the settings mention: inline, in a file, or not at all.

    `key` is the setting that was used for it.
    """

    key: str
    role: Role
    inline: Secret | None
    file: str | None


def secret_settings(settings: Settings) -> Iterator[SecretSetting]:
    """Yield every one of them, also those that are not set."""
    admin, store, upstream = settings.admin, settings.store, settings.issuer.upstream
    for name, client in settings.clients.items():
        where = f"clients.{name}"
        yield _one(f"{where}.secret", Role.CLIENT, client.secret, client.secret_file)
        yield _one(f"{where}.next_secret", Role.CLIENT, client.next_secret, client.next_secret_file)
    yield _one("admin.secret", Role.OPERATOR, admin.secret, admin.secret_file)
    for kid, key in settings.issuer.local.keys.items():
        yield _one(f"issuer.local.keys.{kid}.secret", Role.SIGNING, key.secret, key.secret_file)
    yield _one("issuer.local.keys", Role.SIGNING, None, settings.issuer.local.keys_file)
    yield _one("issuer.upstream.api_secret", Role.VENDOR, upstream.api_secret, None)
    for file in upstream.api_secret_files:
        yield SecretSetting("issuer.upstream.api_secret_files", Role.VENDOR, None, file)
    yield _one("issuer.upstream.proxy", Role.OTHER, upstream.proxy, upstream.proxy_file)
    yield _one("store.encryption_key", Role.STORED, store.encryption_key, store.encryption_key_file)
    yield _one("store.password", Role.STORE, store.password, store.password_file)
    yield _one("store.tls_key", Role.OTHER, None, store.tls_key_file)


def _one(key: str, role: Role, inline: Secret | None, file: str | None) -> SecretSetting:
    return SecretSetting(key if file is None else f"{key}_file", role, inline, file)
