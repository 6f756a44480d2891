"""Secret files that are not on this machine, and settings that do without them.

For `--dev`, and for checking a configuration away from where it runs.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from broker.app import factory
from broker.config.settings import KeySettings, Settings, StoreSettings
from broker.model import Secret

_UNUSED = {"local": "issuer.upstream.", "upstream": "issuer.local."}
"""What no start reads, by the kind of the issuer."""


def missing_files(settings: Settings) -> list[tuple[str, str]]:
    """Return the files of secrets and certificates that a start reads and that are not here."""
    used = _used(settings, factory.watched_files(settings))
    return [(name, file) for name, file in used if is_missing(file)]


def are_elsewhere(settings: Settings) -> bool:
    """Whether files are missing because the broker runs on another machine.

    There is no folder of any secret then.  Where there is one, a file that is not in it was
    forgotten or is misspelt.  Certificates say nothing: `/etc/ssl` is everywhere.
    """
    folders = {Path(file).parent for _, file in _used(settings, factory.secret_files(settings))}
    return all(is_missing(str(folder)) for folder in folders) and bool(missing_files(settings))


def _used(settings: Settings, files: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    unused = _UNUSED[settings.issuer.kind]
    return [(name, file) for name, file in files if not name.startswith(unused)]


def is_missing(file: str) -> bool:
    """Whether there is no such file; one that may not be read is there."""
    try:
        Path(file).stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def fill_missing_secrets(settings: Settings, make: Callable[[str], Secret]) -> Settings:
    """Return the settings with a secret from `make` for each file that is not on this machine.

    `make` is given the name of the setting, such as "clients.web.secret".  Certificates that are
    not here are left out.
    """
    settings = replace(settings, store=_without_missing_certificates(settings.store))
    local = settings.issuer.local
    if local.keys_file is not None and is_missing(local.keys_file):  # has more than a secret in it
        keys = {"made-up": KeySettings(secret=make("issuer.local.keys.made-up.secret"))}
        local = replace(local, keys=keys, keys_file=None)
        settings = replace(settings, issuer=replace(settings.issuer, local=local))
    made: Settings = _fill(settings, make, "")
    upstream = made.issuer.upstream
    if any(is_missing(file) for file in upstream.api_secret_files):
        secret = make("issuer.upstream.api_secret")
        upstream = replace(upstream, api_secret=secret, api_secret_files=())
    return replace(made, issuer=replace(made.issuer, upstream=upstream))


def _without_missing_certificates(store: StoreSettings) -> StoreSettings:
    if store.tls_ca_file is not None and is_missing(store.tls_ca_file):
        store = replace(store, tls_ca_file=None)
    if any(file and is_missing(file) for file in (store.tls_cert_file, store.tls_key_file)):
        store = replace(store, tls_cert_file=None, tls_key_file=None)
    return store


def _fill(node: Any, make: Callable[[str], Secret], path: str) -> Any:  # noqa: ANN401 - any node
    if isinstance(node, Mapping):
        return {name: _fill(entry, make, f"{path}{name}.") for name, entry in node.items()}
    if not isinstance(node, Struct):
        return node
    fields = {
        name: _fill(getattr(node, name), make, f"{path}{name}.") for name in node.__struct_fields__
    }
    for name in node.__struct_fields__:
        file = fields.get(f"{name}_file")
        if file is not None and is_missing(file):
            fields |= {name: make(path + name), f"{name}_file": None}
    return replace(node, **fields)
