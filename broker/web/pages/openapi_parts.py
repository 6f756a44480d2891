"""Pieces that operations of the API document share."""

from collections.abc import Mapping
from typing import Any


def errors(reference: Mapping[str, Any], texts: Mapping[int, str]) -> dict[str, Any]:
    """Return the responses for these statuses: one envelope, and when to come back."""
    return {
        str(status): {
            "description": text,
            "headers": {
                **COMMON_HEADERS,
                **({"Retry-After": RETRY_AFTER} if status in (429, 503) else {}),
            },
            "content": json(reference["ErrorAnswer"]),
        }
        for status, text in texts.items()
    }


def json(schema: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """Return the content of a JSON body."""
    return {"application/json": {"schema": schema}}


def header(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a header."""
    return {"description": text, "schema": dict(schema)}


COMMON_HEADERS = {
    "X-Request-Id": header("Names this request in the log", {"type": "string"}),
    "Cache-Control": header("Tokens are never stored by caches", {"const": "no-store"}),
}

RETRY_AFTER = header("Seconds to wait, at least 1", {"type": "integer", "minimum": 1})
