"""Finds one secret in two roles: whoever has it for the one has it for the other, too.

A client that knows the signing key makes its own tokens; one that knows the admin secret reads and
ends everybody's sessions.  Values are compared by their digests, and never shown.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress

from broker.app import credentials
from broker.config.load import read_secret
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.model import Secret

CLIENT, VENDOR = "a client's", "the vendor's"
"""Roles that may share a secret where the client could ask the vendor itself."""

Use = tuple[str, str, Secret]
"""The key of a setting, the role of its secret, and the secret."""


def shared(settings: Settings, environ: Mapping[str, str]) -> Iterator[tuple[ConfigError, bool]]:
    """Yield each secret that has a second role, and whether that is no more than a client's right.

    What cannot be read is left out, as are clients among each other: a client is known by its
    secret, so two of them with one are refused where clients are made.
    """
    seen: dict[bytes, tuple[str, str]] = {}
    for key, role, secret in _uses(settings, environ):
        first_key, first_role = seen.setdefault(secret.digest(), (key, role))
        if first_role == role:
            continue
        error = ConfigError(
            f"{key}: the same secret as that of {first_key}, and it is {role}, too: who has one"
            " has both; make another with `broker keys generate`"
        )
        yield error, {first_role, role} == {CLIENT, VENDOR}


def _uses(settings: Settings, environ: Mapping[str, str]) -> Iterator[Use]:
    for name, client in settings.clients.items():
        key = f"clients.{name}.secret"
        yield from _one(key, CLIENT, client.secret, client.secret_file)
        key = f"clients.{name}.next_secret"
        yield from _one(key, CLIENT, client.next_secret, client.next_secret_file)
    admin, store = settings.admin, settings.store
    yield from _one("admin.secret", "the operator's", admin.secret, admin.secret_file)
    yield from _one(
        "store.encryption_key",
        "the key of what is stored",
        store.encryption_key,
        store.encryption_key_file,
    )
    yield from _one("store.password", "the store's password", store.password, store.password_file)
    yield from _issuer_keys(settings, environ)


def _issuer_keys(settings: Settings, environ: Mapping[str, str]) -> Iterator[Use]:
    with suppress(ConfigError):
        if settings.issuer.kind == "upstream":
            if settings.clients:  # without them whoever has the vendor's key is the client
                for vendor_key in credentials.vendor_keys(settings, environ):
                    yield "issuer.upstream.api_secret", VENDOR, vendor_key
            return
        for key in credentials.keyring(settings).keys:
            secret = Secret(key.secret.decode("utf-8", "surrogateescape"))
            where = "keys_file" if settings.issuer.local.keys_file else f"keys.{key.kid}"
            yield f"issuer.local.{where}", "a signing key", secret


def _one(key: str, role: str, inline: Secret | None, file: str | None) -> Iterator[Use]:
    with suppress(ConfigError):
        secret = read_secret(key, inline, file)
        if secret is not None:
            yield key if file is None else f"{key}_file", role, secret
