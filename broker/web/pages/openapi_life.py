"""The API document's part on the life of a token: verify, introspect, revoke."""

from collections.abc import Mapping
from typing import Any

from broker.web.pages.openapi_parts import COMMON_HEADERS, errors, header, json

_VERIFY_ERRORS: Mapping[int, str] = {
    401: "No token, two that differ, or one that is not good; the message says why",
    403: "A good token, but of another agent than the one required",
    503: "Only the shared store could tell, which is away: let nobody in",
}

_FORM_ERRORS: Mapping[int, str] = {
    400: "No token, more than one, or no form; or the secret was sent twice",
    401: "No client secret, or an unknown one",
    403: "The secret came from a browser",
    408: "The body did not arrive in time",
    413: "The body is larger than 8 KiB",
    415: "The body has a content encoding",
    429: "Too many failed attempts from this address",
}

_INTROSPECT_ERRORS: Mapping[int, str] = {
    **_FORM_ERRORS,
    503: "Only the shared store could tell, which is away",
}

_REVOKE_ERRORS: Mapping[int, str] = {
    **_FORM_ERRORS,
    503: "Nothing was ended: the shared store is away, or more sessions were ended within an hour"
    " than can be remembered",
}


def verify(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Return the operation of /v1/embed-tokens/verify."""
    return {
        "operationId": "verifyToken",
        "summary": "Is this embed token good? For proxies in front of a viewer",
        "description": "Answers any method, without reading a body. The token comes as"
        " `Authorization: Bearer`, as `X-Embed-Token`, or from a trusted proxy as `token` in the"
        " query of `X-Original-URI`, `X-Forwarded-Uri` or `X-Original-URL`, or of what follows this"
        " path.",
        "security": [{"embedToken": []}, {"bearer": []}],
        "parameters": [
            {
                "name": "X-Embed-Require-Agent",
                "in": "header",
                "description": "The agent whose token it has to be",
                "schema": {"type": "string"},
            }
        ],
        "responses": {
            "200": {"description": "It is", "headers": {**COMMON_HEADERS, **_SESSION_HEADERS}},
            **errors(reference, _VERIFY_ERRORS),
        },
    }


def introspect(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Return the operation of /v1/introspect."""
    return {
        "operationId": "introspectToken",
        "summary": "What is this token? (RFC 7662)",
        "description": "Tells a client about its own tokens; of any other, and of one that is"
        " expired or revoked, only that it is not active.",
        "security": [{"apiSecret": []}, {"bearer": []}],
        "requestBody": _FORM,
        "responses": {
            "200": {
                "description": "Active or not",
                "headers": COMMON_HEADERS,
                "content": json({"anyOf": [reference["ActiveToken"], reference["InactiveToken"]]}),
            },
            **errors(reference, _INTROSPECT_ERRORS),
        },
    }


def revoke(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Return the operation of /v1/revoke."""
    return {
        "operationId": "revokeToken",
        "summary": "End the session of this token (RFC 7009)",
        "description": "From the answer on, the token is not good and its session is not handed"
        " out again. A token that is not this client's, or not good, changes nothing.",
        "security": [{"apiSecret": []}, {"bearer": []}],
        "requestBody": _FORM,
        "responses": {
            "200": {"description": "Done, or nothing to do", "headers": COMMON_HEADERS},
            **errors(reference, _REVOKE_ERRORS),
        },
    }


_FORM = {
    "required": True,
    "content": {
        "application/x-www-form-urlencoded": {
            "schema": {
                "type": "object",
                "properties": {
                    "token": {"type": "string", "minLength": 1},
                    "token_type_hint": {"type": "string"},
                },
                "required": ["token"],
            }
        }
    },
}

_SESSION_HEADERS = {
    "X-Embed-Session": header("The session", {"type": "string"}),
    "X-Embed-Agent": header("Its agent", {"type": "string"}),
    "X-Embed-Fingerprint": header("Its visitor, percent-encoded", {"type": "string"}),
    "X-Embed-Expires": header("The token's expiry in Unix seconds", {"type": "integer"}),
}
