"""Development mode: everything needed, made at the start, gone at the end."""

import os
import secrets
from typing import Any


def defaults() -> dict[str, Any]:
    """Return the tree that `--dev` puts below file, environment and flags."""
    return {
        "server": {"docs": True, "drain": "2s", "drain_lead": "0s"},
        "clients": {
            "dev": {
                "secret": os.environ.get("BROKER_DEV_SECRET") or secrets.token_urlsafe(24),
                "agents": ["*"],
            }
        },
        "issuer": {"local": {"keys": {"dev": {"secret": secrets.token_urlsafe(48)}}}},
        "log": {"format": "console"},
    }


def curl_line(url: str, secret: str) -> str:
    """Return the line to paste into a shell for a first token."""
    socket = f"--unix-socket {url.removeprefix('unix:')} " if url.startswith("unix:") else ""
    base = "http://localhost" if socket else url
    return (
        f"curl -s {socket}{base}/v1/embed-tokens/request -H 'api-secret: {secret}'"
        ' -d \'{"agent_id": "A78WKV4515", "fingerprint": "9f86d081884c7d65"}\''
    )
