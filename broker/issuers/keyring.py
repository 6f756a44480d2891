"""HS256 keys: one signs, several verify (RFC 7515, RFC 7518 section 3.2, RFC 8725).

Verification accepts one algorithm and three header names; everything else that a JOSE header
may carry (`jwk`, `jku`, `x5u`, `crit` and so on) has let somebody bring a key of their own in some
library, and we issue none of it.  The order is fixed: size, shape, header, signature, and only then
are the claims read.

A key may have a schedule: it signs from one moment on and verifies until another.  So a rotation is
a list of keys and a clock, and every process that has the list turns at the same moment.  Times
come in as microseconds since 1970; those inside a token are its own Unix seconds.
"""

import hashlib
import hmac
import re
from base64 import urlsafe_b64decode
from binascii import b2a_base64
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec import Struct
from typing_extensions import override

from broker.model import MIN_KEY_BYTES
from broker.rules.reuse import MAX_LIFETIME
from broker.units import NO_DATE, SECOND

ALGORITHM = "HS256"

MIN_DISTINCT_BYTES = 8
"""32 random bytes show fewer than 8 different values about once in 10^32 keys: such a key was
typed, not drawn."""

MAX_TOKEN_CHARS = 4096
"""Our tokens have about 500 characters; longer ones are not decoded at all."""

LIFETIME_SECONDS = 3600
"""The same hour as the vendor's tokens have, so a site can move between the issuers."""

LEEWAY = 60
"""Seconds by which the clocks of signer and verifier may differ."""

MAX_LIFE = MAX_LIFETIME // SECOND + LEEWAY
"""Seconds from `nbf` to `exp`, at most: an end is remembered for as long.  What lives longer, as
other makers who have the key could write it, would be good again after its session's end."""

NEVER = 2**62
"""The microsecond at which a key without a schedule ends: some 146,000 years from 1970."""

_HEADER_NAMES = frozenset({"alg", "typ", "kid"})

_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{43}")
"""Three parts in the alphabet of RFC 4648 section 5, without padding, and 32 bytes of signature."""

_REQUIRED = ("exp", "nbf", "iss", "aud", "sub")

_URLSAFE = bytes.maketrans(b"+/", b"-_")

_decode = msgspec.json.Decoder().decode


class BadKey(ValueError):
    """A key that must not sign; the message says why and what to do."""


class BadToken(ValueError):
    """A token that is not good; the message says why, without quoting it."""


class Key(Struct, frozen=True):
    """A key by its `kid`: signs from one moment on, verifies until another (Unix microseconds)."""

    kid: str
    secret: bytes
    signs_from: int = 0
    verifies_until: int = NEVER

    @override
    def __repr__(self) -> str:
        return f"Key({self.kid!r})"


class Proof(Struct, frozen=True):
    """The claims of a good token, and from when until when it is one (Unix microseconds)."""

    claims: Mapping[str, object]
    begins: int
    ends: int

    @override
    def __repr__(self) -> str:
        return f"Proof(begins={self.begins}, ends={self.ends})"


class Keyring:
    """The keys by `kid`.

    The one that signs is the last whose `signs_from` has come; with none, the first of all.  A
    single key signs without a `kid` header; as soon as there are more, tokens name theirs.  A token
    without `kid` is tried against every key, so the first rotation has no gap.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self._schedule = sorted(keys, key=lambda key: key.signs_from)
        if not self._schedule:
            raise BadKey("there is no key: make one with `broker keys generate`")
        for key in self._schedule:
            check_key(key.kid, key.secret)
        self._keys = {key.kid: key for key in self._schedule}
        if len(self._keys) != len(self._schedule):
            raise BadKey("two keys have the same kid")
        named = len(self._keys) > 1
        self._headers = {key.kid: _header(key.kid if named else None) for key in self._schedule}
        self._issued = {
            _header(None).decode(): tuple(self._schedule),
            **{_header(key.kid).decode(): (key,) for key in self._schedule},
        }

    @classmethod
    def of(cls, keys: Mapping[str, bytes], signing: str) -> "Keyring":
        """Return keys without a schedule, of which `signing` signs."""
        if signing not in keys:
            raise BadKey(f"signing_key names {signing!r}, which is not among the keys")
        return cls(
            Key(kid, secret, signs_from=0 if kid == signing else NEVER)
            for kid, secret in keys.items()
        )

    @property
    def keys(self) -> Sequence[Key]:
        """Every key, by the moment from which it signs."""
        return self._schedule

    def name_of(self, kid: str) -> str:
        """Name a key without showing it: ids can be given to another key, this cannot."""
        return hashlib.sha256(b"key name" + self._keys[kid].secret).hexdigest()[:16]

    def signing(self, now: int) -> str:
        """Return the id of the key that signs at this moment."""
        return self.signer(now)[0].kid

    def signer(self, now: int) -> tuple[Key, int]:
        """Return the key that signs at this moment, and the moment until which it does."""
        until = NEVER
        for key in reversed(self._schedule):
            if key.signs_from <= now:
                return key, until
            until = key.signs_from
        return self._schedule[0], until

    def sign(self, claims: Mapping[str, object], now: int) -> str:
        """Return the compact JWS of these claims.

        `jwt.encode` makes an equal token, but examines the key anew for every token, which takes
        three times as long as signing it.
        """
        key, _ = self.signer(now)
        signed = self._headers[key.kid] + b"." + base64url(msgspec.json.encode(claims))
        return f"{signed.decode()}.{_signature(signed, key)}"

    def header_of(self, key: Key) -> bytes:
        """Return the encoded header of tokens that this key signs."""
        return self._headers[key.kid]

    def verify(self, token: str, issuer: str, audience: str, now: int) -> Proof:
        """Return what a token that is good at `now` proves; raises BadToken for any other.

        `exp`, `nbf`, `iss`, `aud` and `sub` must be there and hold.  `jwt.decode` comes to the
        same verdict (the tests hold the two together) in four times the time, and by the system's
        clock.
        """
        if len(token) > MAX_TOKEN_CHARS:
            raise BadToken(f"longer than {MAX_TOKEN_CHARS} characters")
        if _SHAPE.fullmatch(token) is None:
            raise BadToken("not a JWT")
        signed, _, signature = token.rpartition(".")
        header, _, payload = signed.partition(".")
        keys = self._issued.get(header) or self._candidates(header)
        key = self._signer_of(signed.encode(), signature, keys, now)
        claims = _claims(payload)
        begins, ends = _require(claims, issuer, audience, now)
        return Proof(claims, begins, min(ends, key.verifies_until))

    def _signer_of(self, signed: bytes, signature: str, keys: Iterable[Key], now: int) -> Key:
        """Return the key that signed this, if it still verifies.

        Signatures are compared as text: the last character has two bits that decoding would drop,
        and a token would have four spellings, of which a revocation by its digest knows one.
        """
        for key in keys:
            if hmac.compare_digest(_signature(signed, key), signature):
                if now < key.verifies_until:
                    return key
                break
        raise BadToken("no key fits")

    def _candidates(self, header: str) -> tuple[Key, ...]:
        """Keys that may have signed below this (untrusted) header, which is not one of ours."""
        fields = _json(header)
        if not isinstance(fields, dict):
            raise BadToken("not a JWT")
        if fields.get("alg") != ALGORITHM:
            raise BadToken(f"signed with another algorithm than {ALGORITHM}")
        if not fields.keys() <= _HEADER_NAMES:
            raise BadToken("header fields other than alg, typ, kid")
        kid = fields.get("kid")
        if kid is None:
            return tuple(self._schedule)
        if not isinstance(kid, str) or kid not in self._keys:
            raise BadToken("unknown kid")
        return (self._keys[kid],)

    @override
    def __repr__(self) -> str:
        return f"Keyring(kids={sorted(self._keys)})"


def check_key(kid: str, key: bytes) -> None:
    """Raise BadKey for a key that is too short or visibly not random."""
    if len(key) < MIN_KEY_BYTES:
        raise BadKey(
            f"key {kid!r} has {len(key)} bytes, at least {MIN_KEY_BYTES} random ones are needed:"
            " make one with `broker keys generate`"
        )
    if len(set(key)) < MIN_DISTINCT_BYTES:
        raise BadKey(
            f"key {kid!r} repeats the same few bytes and is not random:"
            " make one with `broker keys generate`"
        )


def _header(kid: str | None) -> bytes:
    fields = {"alg": ALGORITHM, "typ": "JWT"} | ({} if kid is None else {"kid": kid})
    return base64url(msgspec.json.encode(fields))


def _signature(signed: bytes, key: Key) -> str:
    return base64url(hmac.digest(key.secret, signed, "sha256")).decode()


def base64url(data: bytes) -> bytes:
    """Encode without padding (RFC 7515 section 2); two calls less than `base64`'s own function."""
    return b2a_base64(data, newline=False).translate(_URLSAFE).rstrip(b"=")


def _json(part: str) -> object:
    """Decode one part of a token; None for what is not JSON."""
    try:
        return _decode(urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (ValueError, msgspec.DecodeError, RecursionError):
        return None


def _claims(payload: str) -> dict[str, object]:
    claims = _json(payload)
    if not isinstance(claims, dict):
        raise BadToken("malformed")
    return claims


def _require(claims: Mapping[str, object], issuer: str, audience: str, now: int) -> tuple[int, int]:
    """Hold the claims of RFC 7519 section 4.1 to this moment and to whom the token is for.

    Returns from when until when they hold, the leeway included.
    """
    if any(claims.get(name) is None for name in _REQUIRED):
        raise BadToken("a required claim is missing")
    if claims["iss"] != issuer or claims["aud"] != audience:
        raise BadToken("made by or for somebody else")
    if not isinstance(claims["sub"], str):
        raise BadToken("malformed")
    ends = (_date(claims, "exp") + LEEWAY) * SECOND
    if now >= ends:
        raise BadToken("expired")
    begins = max(_date(claims, "nbf"), _date(claims, "iat") if "iat" in claims else 0)
    if _date(claims, "exp") - _date(claims, "nbf") > MAX_LIFE:
        raise BadToken("lives for too long")
    begins = (begins - LEEWAY) * SECOND
    if now < begins:
        raise BadToken("not valid yet")
    return begins, ends


def _date(claims: Mapping[str, object], name: str) -> int:
    """Read a NumericDate as we write it: whole seconds, in a year that can be a date."""
    value = claims[name]
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= NO_DATE:
        raise BadToken("malformed")
    return value
