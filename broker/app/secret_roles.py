"""Finds one secret in two roles: whoever has it for the one has it for the other, too.

A client that knows the signing key makes its own tokens; one that knows the admin secret reads and
ends everybody's sessions.  Values are compared by their digests, and never shown.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import assert_never

from broker.app import credentials
from broker.app.secret_settings import Role, SecretSetting, secret_settings
from broker.config.load import read_secret
from broker.config.schema import ConfigError
from broker.config.settings import Settings
from broker.model import Secret

MAY_SHARE = {Role.CLIENT, Role.VENDOR}
"""Roles that may share a secret: the client could ask the vendor itself."""

Use = tuple[str, Role, Secret]
"""The key of a setting, the role of its secret, and the secret."""


def shared(settings: Settings, environ: Mapping[str, str]) -> Iterator[tuple[ConfigError, bool]]:
    """Yield each secret that has a second role, and whether that is no more than a client's right.

    What cannot be read is left out, as are clients among each other: a client is known by its
    secret, so two of them with one are refused where clients are made.
    """
    seen: dict[bytes, tuple[str, Role]] = {}
    for key, role, secret in _uses(settings, environ):
        first_key, first_role = seen.setdefault(secret.digest(), (key, role))
        if first_role == role:
            continue
        error = ConfigError(
            f"{key}: the same secret as that of {first_key}, and it is {role}, too: who has one"
            " has both; make another with `broker keys generate`"
        )
        yield error, {first_role, role} == MAY_SHARE


def _uses(settings: Settings, environ: Mapping[str, str]) -> Iterator[Use]:
    for setting in secret_settings(settings):
        match setting.role:
            case Role.CLIENT | Role.OPERATOR | Role.STORED | Role.STORE:
                yield from _one(setting)
            case Role.VENDOR | Role.SIGNING | Role.OTHER:  # the issuer's are read as it reads them
                pass
            case _:
                assert_never(setting.role)
    yield from _issuer_keys(settings, environ)


def _one(setting: SecretSetting) -> Iterator[Use]:
    with suppress(ConfigError):
        secret = read_secret(setting.key.removesuffix("_file"), setting.inline, setting.file)
        if secret is not None:
            yield setting.key, setting.role, secret


def _issuer_keys(settings: Settings, environ: Mapping[str, str]) -> Iterator[Use]:
    with suppress(ConfigError):
        if settings.issuer.kind == "upstream":
            if settings.clients:  # without them whoever has the vendor's key is the client
                for vendor_key in credentials.vendor_keys(settings, environ):
                    yield "issuer.upstream.api_secret", Role.VENDOR, vendor_key
            return
        for key in credentials.keyring(settings).keys:
            secret = Secret(key.secret.decode("utf-8", "surrogateescape"))
            where = "keys_file" if settings.issuer.local.keys_file else f"keys.{key.kid}"
            yield f"issuer.local.{where}", Role.SIGNING, secret
