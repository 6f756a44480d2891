"""From settings to what signs, seals and is shown to the vendor: reads secret files, opens no more.

Apart from `factory`, which knows every part: commands that need only a key must not wait for the
imports of a server.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from broker.config import files
from broker.config.load import VENDOR_VARIABLES, read_secret, secret_in
from broker.config.schema import ConfigError
from broker.config.settings import LocalIssuerSettings, Settings
from broker.issuers import keyfile
from broker.issuers.keyring import BadKey, Keyring, check_key
from broker.model import Secret

if TYPE_CHECKING:
    from broker.issuers.vendor.egress import Proxy


def vendor_keys(settings: Settings, environ: Mapping[str, str]) -> list[Secret]:
    """Return the vendor's keys in order; raises ConfigError for none, or an unusable one."""
    upstream = settings.issuer.upstream
    name = "issuer.upstream.api_secret"
    if upstream.api_secret is not None and upstream.api_secret_files:
        raise ConfigError(f"{name} and {name}_files are both set: keep one")
    found = [secret_in(f"{name}_files", file) for file in upstream.api_secret_files]
    keys: list[Secret | None] = [upstream.api_secret, *found]
    if not any(keys):
        given = next((environ[name] for name in VENDOR_VARIABLES if environ.get(name)), None)
        keys = [Secret(given) if given else None]
    usable = [key for key in keys if key is not None]
    if not usable:
        raise ConfigError(f"{name}_files: no vendor key; set it, or BITHUMAN_API_SECRET")
    for key in usable:
        if not key.reveal().isascii() or not key.reveal().isprintable() or " " in key.reveal():
            raise ConfigError(f"{name}: not a key: it holds blanks or unprintable characters")
    return list(dict.fromkeys(usable))


def vendor_proxy(settings: Settings, environ: Mapping[str, str]) -> "Proxy | None":
    """Return the proxy on the way to the vendor, None for none; raises ConfigError."""
    from broker.issuers.vendor.egress import check_proxy, proxy_for  # noqa: PLC0415 - as in validate

    upstream = settings.issuer.upstream
    given = read_secret("issuer.upstream.proxy", upstream.proxy, upstream.proxy_file)
    try:
        if given is not None:
            check_proxy(given)
        return proxy_for(upstream.base_url, given, environ)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def keyring(settings: Settings) -> Keyring:
    """Return the keys of the local issuer; raises ConfigError for none or a weak one."""
    local = settings.issuer.local
    if local.keys_file is not None:
        return _keyring_in(local.keys_file, local)
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
        return Keyring.of(keys, local.signing_key or next(iter(keys)))
    except BadKey as error:
        raise ConfigError(f"issuer.local.keys: {error}") from None


def _keyring_in(file: str, local: LocalIssuerSettings) -> Keyring:
    """Return the keys of a file that `broker keys rotate` wrote."""
    if local.keys or local.signing_key:
        other = "keys" if local.keys else "signing_key"
        raise ConfigError(f"issuer.local.keys_file and issuer.local.{other} are both set: keep one")
    try:
        return Keyring(keyfile.schedule(keyfile.read(Path(file))))
    except files.CannotRead as error:
        remedy = "; make it with `broker keys rotate`" if error.is_absent else ""
        raise ConfigError(f"issuer.local.keys_file: {error}{remedy}") from None
    except (keyfile.BadKeyFile, BadKey) as error:
        raise ConfigError(f"issuer.local.keys_file: {file}: {error}") from None


def state_file_keys(
    settings: Settings, environ: Mapping[str, str]
) -> tuple[tuple[Secret, ...], tuple[Secret, ...]]:
    """Return the keys for which a state file is sealed, and others that may open it.

    The issuer's, so there is no further secret to make; the sealing key alone, where one is set:
    then the issuer's still open what was sealed before.  Raises ConfigError.
    """
    if settings.issuer.kind == "upstream":
        own = tuple(vendor_keys(settings, environ))
    else:
        own = tuple(Secret(key.secret.hex()) for key in keyring(settings).keys)
    sealing = sealing_key(settings)
    return (own, ()) if sealing is None else ((sealing,), own)


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
