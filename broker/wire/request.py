"""From bytes to an `TokenRequest`, or to an error that names field, rule and remedy.

Error messages never quote the value: it may be a secret in the wrong place, or carry control
characters.
"""

import re
from codecs import BOM_UTF8
from functools import lru_cache
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from typing_extensions import override

from broker.errors import BrokerError, Invalid, MissingParam
from broker.model import AGENT_ID, AGENT_RULE, LONGEST_AGENT, TokenRequest

MAX_BODY = 8 * 1024
"""Bytes: a request has two short fields; whatever is longer is a mistake or an attack."""

FINGERPRINT_ANY_MAX = 256
"""Characters of a fingerprint where any format is accepted."""

MODEL_MAX = 64
"""Characters of a model name."""

TRACEPARENT = "(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
"""W3C Trace Context, section 3.2.2: version ff and ids of zeros are not valid."""

_TRACEPARENT = re.compile(TRACEPARENT)

HEX = "[0-9A-Fa-f]{4,128}|[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
"""A fingerprint as the vendor documents it, or a UUID; also a pattern of the API document."""

_HEX = re.compile(HEX)

_PRINTABLE = r"^(?:[^\p{C}\p{Z}]| )+$"
"""`str.isprintable` as a JSON Schema pattern (ECMA-262, Unicode)."""


class TokenRequestBody(Struct, frozen=True, gc=False):
    """What a backend sends for its visitor."""

    agent_id: (
        Annotated[
            str,
            Meta(
                description="The agent's code",
                examples=["A78WKV4515"],
                extra_json_schema={"pattern": "^[A-Za-z0-9_-]{1,64}$"},
            ),
        ]
        | UnsetType
    ) = UNSET
    fingerprint: (
        Annotated[
            str,
            Meta(
                description="Stable per-device hex string, made once and persisted. Opaque:"
                " passed on byte for byte, since the visitor's memory is kept under it",
                examples=["9f86d081884c7d659a2feaa0c55ad015"],
                extra_json_schema={
                    "minLength": 1,
                    "maxLength": FINGERPRINT_ANY_MAX,
                    "pattern": _PRINTABLE,
                },
            ),
        ]
        | UnsetType
    ) = UNSET
    model: (
        Annotated[
            str,
            Meta(
                description="The agent's model; part of the key under which a token is reused",
                extra_json_schema={"minLength": 1, "maxLength": MODEL_MAX, "pattern": _PRINTABLE},
            ),
        ]
        | UnsetType
        | None
    ) = UNSET
    fresh: Annotated[
        bool, Meta(description="Ask for a new token instead of the one held for reuse")
    ] = False

    @override
    def __repr__(self) -> str:
        return "TokenRequestBody(...)"  # nothing of it has been checked yet: it may be a secret


_decode = msgspec.json.Decoder(TokenRequestBody).decode


def parse(
    body: bytes,
    client: str,
    *,
    any_fingerprint: bool,
    request_id: str = "",
    traceparent: str = "",
) -> TokenRequest:
    """Read one request body; raises MissingParam or Invalid.

    `request_id` and `traceparent` accompany the request; a malformed traceparent is dropped, as W3C
    Trace Context asks.
    """
    body = body.removeprefix(BOM_UTF8)  # RFC 8259 section 8.1: a parser may ignore it
    try:
        request = _decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_type(error) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise _malformed(body) from None
    agent, fingerprint, model = request.agent_id, request.fingerprint, request.model
    if agent is UNSET:
        raise MissingParam("agent_id: required; send the agent's code")
    if fingerprint is UNSET:
        raise MissingParam("fingerprint: required; send a stable per-device hex string")
    if len(agent) > LONGEST_AGENT or not _is_agent(agent):
        raise Invalid(
            f"agent_id: must be {AGENT_RULE}; send the agent's code as the vendor shows it"
        )
    if _HEX.fullmatch(fingerprint) is None:
        _check_any_fingerprint(fingerprint, any_fingerprint=any_fingerprint)
    if model is UNSET:
        model = None
    elif model is not None:
        _check_model(model)
    trace = well_formed(traceparent)
    return TokenRequest(client, agent, fingerprint, model, request.fresh, request_id, trace)


@lru_cache(maxsize=1024)  # a site has few, and each new visitor comes to one of them
def _is_agent(agent: str) -> bool:
    return AGENT_ID.fullmatch(agent) is not None


def well_formed(traceparent: str) -> str:
    """Return a traceparent that is one; empty for any other, as W3C Trace Context asks."""
    return traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else ""


def _check_any_fingerprint(fingerprint: str, *, any_fingerprint: bool) -> None:
    if not any_fingerprint:
        raise Invalid(
            "fingerprint: must be 4 to 128 hex digits or a UUID, one stable value per device;"
            ' the broker\'s operator can set [limits] fingerprint_format = "any"'
        )
    if not 1 <= len(fingerprint) <= FINGERPRINT_ANY_MAX or not fingerprint.isprintable():
        raise Invalid(f"fingerprint: must be 1 to {FINGERPRINT_ANY_MAX} printable characters")


def _check_model(model: str) -> None:
    if not 1 <= len(model) <= MODEL_MAX or not model.isprintable():
        raise Invalid(
            f"model: must be 1 to {MODEL_MAX} printable characters; leave it out for the default"
        )


def _wrong_type(error: msgspec.ValidationError) -> BrokerError:
    text, _, where = str(error).partition(" - at ")
    field = where.strip("`").removeprefix("$.")
    if field in TokenRequestBody.__struct_fields__:
        return Invalid(f"{field}: {text[:1].lower()}{text[1:].replace('`', '')}")
    return Invalid("body: must be a JSON object with agent_id and fingerprint")


def _malformed(body: bytes) -> BrokerError:
    if not body.strip():
        return MissingParam("agent_id: required; the body is empty, send a JSON object")
    return Invalid("body: not valid JSON in UTF-8; send an object with agent_id and fingerprint")
