"""What a vendor's token says about itself: its life, its expiry, its session.

The vendor's key is not ours, so claims are read without verification.  They are hints: they may
shorten the time for which a token is reused, never lengthen it beyond the documented hour, and
nothing is granted to anybody because of them.  A token that is no JWT, or whose claims cannot
be read, is a good token of which nothing is known.

Knows nothing of HTTP or of how an answer is laid out.  Invariants: nothing here raises, and
every lifetime lies in [0, `reuse.MAX_LIFETIME`].
"""

import binascii
import hashlib
import re
from base64 import urlsafe_b64decode
from collections.abc import Iterable, Mapping
from typing import TypeGuard

import msgspec

from broker.rules.reuse import DEFAULT_LIFETIME, lifetime_of
from broker.units import NO_DATE, SECOND

MAX_TOKEN = 8192
"""Characters.  Today's tokens have about 500; more than this fits into no iframe's URL."""

MAX_SESSION = 128
"""Characters of a session id: it becomes part of a URL and of a log line."""

_DATES = range(1, 253_402_300_800)
"""Unix seconds up to the end of year 9999: what callers' date types can hold."""

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""The `b64token` of RFC 6750 section 2.1; a JWT is one, and it needs no quoting anywhere."""

_SESSION = re.compile(rf"[!-~]{{1,{MAX_SESSION}}}")
"""Visible ASCII."""

_decode_claims = msgspec.json.Decoder(dict[str, object]).decode


def is_token(value: object) -> TypeGuard[str]:
    """Whether this can be a token at all."""
    return isinstance(value, str) and len(value) <= MAX_TOKEN and bool(_TOKEN.fullmatch(value))


def claims_of(token: str) -> dict[str, object]:
    """Return a JWT's claims (RFC 7519) unverified; empty for anything that is not one."""
    parts = token.split(".")
    if len(parts) != 3:  # noqa: PLR2004 - header, claims, signature: RFC 7515 section 3.1
        return {}
    payload = parts[1]
    try:
        return _decode_claims(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        return {}


def lifetime(claims: Mapping[str, object], date: int | None, now: int) -> int:
    """Return the microseconds that this token will live from now on.

    That is `exp - iat`, less the age that it already has by the vendor's own clock: a token
    that is handed out again was issued before the answer's `Date`.  `date` is that clock and
    `now` is ours, both Unix microseconds; ours counts only where the token has no `iat`.
    Without a usable `exp` it is the documented hour.
    """
    expires, issued = _number(claims.get("exp")), _number(claims.get("iat"))
    if expires is None:
        return DEFAULT_LIFETIME
    start = now / SECOND if issued is None else issued
    if date is not None:
        start = max(start, date / SECOND)
    return lifetime_of({"exp": expires, "iat": start})


def expires_at(claims: Mapping[str, object], lifetime: int, now: int) -> int:
    """Return the token's own `exp` in Unix seconds; our reckoning where it is not a date.

    `lifetime` and `now` are microseconds, the latter on the wall clock.
    """
    expires = _number(claims.get("exp"))
    if expires is not None and int(expires) in _DATES:
        return int(expires)
    return (now + lifetime) // SECOND


def session_of(named: Iterable[object], claims: Mapping[str, object], token: str) -> str:
    """Return the session id: the first usable one of the answer's, then of the token's claims.

    Where nothing names the session, the token does: the start of its SHA-256, which is the
    same each time that token comes back.
    """
    for value in (*named, claims.get("sid"), claims.get("jti")):
        if isinstance(value, str) and _SESSION.fullmatch(value):
            return value
    return hashlib.sha256(token.encode()).hexdigest()[:32]


def _number(value: object) -> int | float | None:
    """Return a claim that can be a NumericDate; None for strings, booleans, absurd numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < NO_DATE else None
