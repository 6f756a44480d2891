"""From settings to what signs, seals and is shown to the vendor: reads secret files, opens no more.

Apart from `factory`, which knows every part: commands that need only a key must not wait for the
imports of a server.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from broker.config import files
from broker.config.load import VENDOR_VARIABLES, found_in, read_secret, secret_in
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
    keys = [
        (f"{name}_files: {file}", secret_in(f"{name}_files", file))
        for file in upstream.api_secret_files
    ]
    if upstream.api_secret:
        keys = [(name, upstream.api_secret)]
    if not keys:
        given = (name for name in VENDOR_VARIABLES if environ.get(name))
        keys = [(variable, Secret(environ[variable])) for variable in given][:1]
    if not keys:
        raise ConfigError(f"{name}_files: no vendor key; set it, or BITHUMAN_API_SECRET")
    for where, key in keys:
        _check_vendor_key(where, key.reveal())
    return list(dict.fromkeys(key for _, key in keys))


def _check_vendor_key(where: str, key: str) -> None:
    """Raise ConfigError for what no vendor made: above all a blank or a second line beside it."""
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{where}: not a key: it holds blanks, line breaks or other unprintable characters;"
            " keep the key alone, on one line"
        )


def vendor_proxy(settings: Settings, environ: Mapping[str, str]) -> "Proxy | None":
    """Return the proxy on the way to the vendor, None for none; raises ConfigError."""
    from broker.issuers.vendor.egress import check_proxy, proxy_for  # noqa: PLC0415 - as in validate

    upstream = settings.issuer.upstream
    name = "issuer.upstream.proxy"
    given = read_secret(name, upstream.proxy, upstream.proxy_file)
    try:
        if given is not None:
            check_proxy(given, found_in(name, upstream.proxy_file))
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
        _check_key(found_in(f"issuer.local.keys.{kid}.secret", key.secret_file), kid, secret)
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


def issuer_keys(settings: Settings, environ: Mapping[str, str]) -> Keyring | list[Secret]:
    """Return the keys of the issuer, of whichever kind; raises ConfigError."""
    if settings.issuer.kind == "upstream":
        return vendor_keys(settings, environ)
    return keyring(settings)


def state_file_keys(
    settings: Settings, issuer: Keyring | list[Secret]
) -> tuple[tuple[Secret, ...], tuple[Secret, ...]]:
    """Return the keys for which a state file is sealed, and others that may open it.

    The issuer's, as they were read for it, so there is no further secret to make; the sealing key
    alone, where one is set: then the issuer's still open what was sealed before.  Raises
    ConfigError.
    """
    keys = issuer if isinstance(issuer, list) else [Secret(k.secret.hex()) for k in issuer.keys]
    own = tuple(keys)
    sealing = sealing_key(settings)
    return (own, ()) if sealing is None else ((sealing,), own)


def sealing_key(settings: Settings) -> Secret | None:
    """Return the key that seals what is stored; raises ConfigError for a weak one."""
    store = settings.store
    secret = read_secret("store.encryption_key", store.encryption_key, store.encryption_key_file)
    if secret is not None:
        name = "store.encryption_key"
        _check_key(found_in(name, store.encryption_key_file), name, secret)
    return secret


def _check_key(where: str, name: str, secret: Secret) -> None:
    """Raise ConfigError for a weak key."""
    try:
        check_key(name, secret.reveal().encode())
    except BadKey as error:
        raise ConfigError(f"{where}: {error}") from None
