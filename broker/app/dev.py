"""Development mode: everything needed, made at the start, gone at the end."""

import os
import secrets
from typing import Any

from msgspec.structs import replace

from broker.app import missing_secrets
from broker.config.addresses import MEMORY, StateFileAddress, parse_store_url
from broker.config.load import read_secret
from broker.config.settings import Settings
from broker.model import Secret

CLIENT = "dev"
"""Name of the client whose secret is printed, and of the key that signs."""


class DevSecrets:
    """The secrets of one development run: reloads find the same ones again."""

    def __init__(self) -> None:
        secret = os.environ.get("BROKER_DEV_SECRET") or secrets.token_urlsafe(24)
        self._secrets = {f"clients.{CLIENT}.secret": Secret(secret)}

    def secret(self, name: str) -> Secret:
        """Return the secret that was made for this setting."""
        return self._secrets.setdefault(name, Secret(secrets.token_urlsafe(48)))

    def defaults(self) -> dict[str, Any]:
        """Return the tree that `--dev` puts below file, environment and flags."""
        secret = self.secret(f"clients.{CLIENT}.secret").reveal()
        key = self.secret(f"issuer.local.keys.{CLIENT}.secret").reveal()
        return {
            "server": {"docs": True, "drain": "2s", "drain_lead": "0s"},
            "clients": {CLIENT: {"secret": secret, "agents": ["*"]}},
            "issuer": {"local": {"keys": {CLIENT: {"secret": key}}}},
        }

    def complete(self, settings: Settings) -> Settings:
        """Make a secret for every secret file that is not here, so that any configuration runs.

        State stays in memory: a file would be sealed with a key that is gone at the end, and one
        that is there is somebody else's.
        """
        if isinstance(parse_store_url(settings.store.url), StateFileAddress):
            settings = replace(settings, store=replace(settings.store, url=MEMORY))
        local = settings.issuer.local
        if not local.signing_key and local.keys_file is None:  # it may know of one key only
            local = replace(local, signing_key=CLIENT)
            settings = replace(settings, issuer=replace(settings.issuer, local=local))
        return missing_secrets.fill_missing_secrets(settings, self.secret)


def client_secret(settings: Settings) -> str:
    """Return the secret of the development client, "" if there is none."""
    client = settings.clients.get(CLIENT)
    if client is None:
        return ""
    secret = read_secret(f"clients.{CLIENT}.secret", client.secret, client.secret_file)
    return secret.reveal() if secret is not None else ""


def curl_line(url: str, secret: str) -> str:
    """Return the line to paste into a shell for a first token."""
    socket = f"--unix-socket {url.removeprefix('unix:')} " if url.startswith("unix:") else ""
    base = "http://localhost" if socket else url
    return (
        f"curl -s {socket}{base}/v1/embed-tokens/request -H 'api-secret: {secret}'"
        ' -d \'{"agent_id": "A78WKV4515", "fingerprint": "9f86d081884c7d65"}\''
    )
