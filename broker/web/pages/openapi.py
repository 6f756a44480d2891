"""The API document (OpenAPI 3.1), built from the types that the code answers with."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from broker.version import VERSION
from broker.web.pages import openapi_life
from broker.web.pages.openapi_parts import COMMON_HEADERS, errors, header, json
from broker.wire.request import HEX, TokenRequestBody
from broker.wire.responses import (
    ActiveToken,
    ErrorAnswer,
    HealthAnswer,
    InactiveToken,
    TokenAnswer,
    ValidAnswer,
)

_REF = "#/components/schemas/{name}"

_TOKEN_ERRORS: Mapping[int, str] = {
    400: "A field is absent or wrong; the message names field, rule, remedy. Or the vendor's 400",
    401: "No client secret, or an unknown one",
    403: "The client may not use this agent, the secret came from a browser, or the vendor refused",
    404: "The vendor knows no such agent",
    408: "The body did not arrive in time",
    409: "The vendor: the agent or its model is not ready",
    413: "The body is larger than 8 KiB",
    415: "The body has a content encoding",
    422: "The vendor could not process the request",
    429: "One of the broker's limits, named in the message, or the vendor's session limit",
    502: "The vendor failed, or refused the broker's own key",
    503: "No budget, a pause, a breaker or a drain; come back after Retry-After",
    504: "The vendor did not answer before the deadline",
}

_VALIDATE_ERRORS: Mapping[int, str] = {
    400: "The secret was sent twice",
    401: "No client secret",
    403: "The secret came from a browser",
    429: "Too many failed attempts from this address",
}


_EVERYWHERE: Mapping[int, str] = {
    431: "The request line or the headers are longer than the broker reads",
}


def document(server_url: str, *, any_fingerprint: bool = False) -> dict[str, Any]:
    """Return the document for a broker that answers at `server_url` and takes such fingerprints."""
    types = (
        TokenRequestBody,
        TokenAnswer,
        ErrorAnswer,
        ValidAnswer,
        HealthAnswer,
        ActiveToken,
        InactiveToken,
    )
    references, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    reference = {kind.__name__: ref for kind, ref in zip(types, references, strict=True)}
    _require(schemas["TokenRequestBody"], ("agent_id", "fingerprint"))
    if not any_fingerprint:
        schemas["TokenRequestBody"]["properties"]["fingerprint"]["pattern"] = f"^(?:{HEX})$"
    paths = {
        "/v1/embed-tokens/request": {"post": _token_operation(reference)},
        "/v1/embed-tokens/verify": {"get": openapi_life.verify(reference)},
        "/v1/introspect": {"post": openapi_life.introspect(reference)},
        "/v1/revoke": {"post": openapi_life.revoke(reference)},
        "/v1/validate": {"post": _validate_operation(reference)},
        "/livez": {"get": _health_operation(reference, "livez", "Is the process alive?")},
        "/readyz": {"get": _ready_operation(reference)},
    }
    for operations in paths.values():
        for operation in operations.values():
            operation["responses"].update(errors(reference, _EVERYWHERE))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "embed-token-broker",
            "version": VERSION,
            "summary": "Short-lived tokens for an embedded avatar, one per visitor",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": server_url}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "apiSecret": {"type": "apiKey", "in": "header", "name": "api-secret"},
                "bearer": {"type": "http", "scheme": "bearer"},
                "embedToken": {"type": "apiKey", "in": "header", "name": "X-Embed-Token"},
            },
        },
    }


def _require(schema: dict[str, Any], names: Sequence[str]) -> None:
    """Mark fields that the code asks for by name in its error, not by type."""
    schema["required"] = list(names)


def _token_operation(reference: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "operationId": "requestEmbedToken",
        "summary": "Get a token for one visitor",
        "description": "Called by a site's backend, never by a browser. The same visitor gets the"
        " same token until shortly before it expires; `fresh` asks for a new one.",
        "security": [{"apiSecret": []}, {"bearer": []}],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": reference["TokenRequestBody"], "example": _EXAMPLE}
            },
        },
        "responses": {
            "200": {
                "description": "A token, minted now or reused",
                "headers": {**COMMON_HEADERS, **_LIMIT_HEADERS, "Cache-Status": _CACHE_STATUS},
                "content": json(reference["TokenAnswer"]),
            },
            **errors(reference, _TOKEN_ERRORS),
        },
    }


def _validate_operation(reference: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "operationId": "validateSecret",
        "summary": "Is this client secret a known one?",
        "security": [{"apiSecret": []}, {"bearer": []}],
        "responses": {
            "200": {
                "description": "Whether it is",
                "headers": COMMON_HEADERS,
                "content": json(reference["ValidAnswer"]),
            },
            **errors(reference, _VALIDATE_ERRORS),
        },
    }


def _health_operation(reference: Mapping[str, Any], name: str, summary: str) -> dict[str, Any]:
    answer = {
        "description": "Yes",
        "headers": COMMON_HEADERS,
        "content": json(reference["HealthAnswer"]),
    }
    return {"operationId": name, "summary": summary, "security": [], "responses": {"200": answer}}


def _ready_operation(reference: Mapping[str, Any]) -> dict[str, Any]:
    operation = _health_operation(reference, "readyz", "Should a balancer send requests here?")
    operation["responses"]["503"] = {
        **operation["responses"]["200"],
        "description": "No: the process is about to end",
    }
    return operation


_EXAMPLE = {"agent_id": "A78WKV4515", "fingerprint": "9f86d081884c7d659a2feaa0c55ad015"}

_LIMIT_HEADERS = {
    "X-RateLimit-Limit": header("Burst of the visitor's limit", {"type": "integer"}),
    "X-RateLimit-Remaining": header("Requests left at this moment", {"type": "integer"}),
    "X-RateLimit-Reset": header("Unix seconds at which all are back", {"type": "integer"}),
    "RateLimit-Policy": header('"name";q=burst;w=seconds', {"type": "string"}),
    "RateLimit": header('"name";r=left;t=seconds to the next', {"type": "string"}),
}

_CACHE_STATUS = header("RFC 9211: hit, or fwd=miss", {"type": "string"})
