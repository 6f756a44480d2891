"""HS256 keys: one signs, several verify (RFC 7515, RFC 7518 section 3.2, RFC 8725).

Verification accepts one algorithm and three header names; everything else that a JOSE header
may carry (`jwk`, `jku`, `x5u`, `crit` and so on) has let somebody bring a key of their own in some
library, and we issue none of it.
"""

import hashlib
from collections.abc import Mapping

import jwt
import msgspec
from jwt.algorithms import HMACAlgorithm
from jwt.exceptions import InvalidTokenError
from jwt.utils import base64url_encode
from typing_extensions import override

ALGORITHM = "HS256"

MIN_KEY_BYTES = 32
"""RFC 7518 section 3.2: a key for HS256 has at least the size of the hash output."""

MIN_DISTINCT_BYTES = 8
"""32 random bytes show fewer than 8 different values about once in 10^32 keys: such a key was
typed, not drawn."""

MAX_TOKEN_CHARS = 4096
"""Our tokens have about 500 characters; longer ones are not decoded at all."""

LEEWAY = 60
"""Seconds by which the clocks of signer and verifier may differ."""

_HS256 = HMACAlgorithm(HMACAlgorithm.SHA256)

_HEADER_NAMES = frozenset({"alg", "typ", "kid"})


class BadKey(ValueError):
    """A key that must not sign; the message says why and what to do."""


class BadToken(ValueError):
    """A token that is not good; the message says why, without quoting it."""


class Keyring:
    """The keys by `kid`; `signing` names the one that signs.

    A single key signs without a `kid` header; as soon as there are more, tokens name theirs.
    A token without `kid` is tried against every key, so the first rotation has no gap.
    """

    def __init__(self, keys: Mapping[str, bytes], signing: str) -> None:
        if signing not in keys:
            raise BadKey(f"signing_key names {signing!r}, which is not among the keys")
        for kid, key in keys.items():
            check_key(kid, key)
        self._keys = dict(keys)
        header = {"alg": ALGORITHM, "typ": "JWT"} | ({"kid": signing} if len(keys) > 1 else {})
        self._header = base64url_encode(msgspec.json.encode(header)) + b"."
        self._signing_key = keys[signing]
        self.signing = signing

    @property
    def kids(self) -> frozenset[str]:
        """Every key by its id."""
        return frozenset(self._keys)

    def name_of(self, kid: str) -> str:
        """Name a key without showing it: ids can be given to another key, this cannot."""
        return hashlib.sha256(b"key name" + self._keys[kid]).hexdigest()[:16]

    def sign(self, claims: Mapping[str, object]) -> str:
        """Return the compact JWS of these claims.

        `jwt.encode` makes an equal token, but examines the key anew for every token, which takes
        three times as long as signing it.
        """
        signed = self._header + base64url_encode(msgspec.json.encode(claims))
        signature = _HS256.sign(signed, self._signing_key)
        return f"{signed.decode()}.{base64url_encode(signature).decode()}"

    def verify(self, token: str, issuer: str, audience: str) -> dict[str, object]:
        """Return the claims of a good token; raises BadToken for any other.

        `exp`, `nbf`, `iss`, `aud` and `sub` must be there and hold at this moment.
        """
        if len(token) > MAX_TOKEN_CHARS:
            raise BadToken(f"longer than {MAX_TOKEN_CHARS} characters")
        failure = "no key fits"
        for key in self._candidates(token):
            try:
                return jwt.decode(
                    token,
                    key,
                    algorithms=[ALGORITHM],
                    issuer=issuer,
                    audience=audience,
                    leeway=LEEWAY,
                    options={"require": ["exp", "nbf", "iss", "aud", "sub"]},
                )
            except jwt.InvalidSignatureError:
                continue
            except InvalidTokenError as error:
                failure = _reason(error)
                break
        raise BadToken(failure)

    def _candidates(self, token: str) -> list[bytes]:
        """Keys that may have signed this token, by its (untrusted) header."""
        try:
            header = jwt.get_unverified_header(token)
        except (InvalidTokenError, ValueError, RecursionError) as error:
            raise BadToken("not a JWT") from error
        if header.get("alg") != ALGORITHM:
            raise BadToken(f"signed with another algorithm than {ALGORITHM}")
        if not header.keys() <= _HEADER_NAMES:
            raise BadToken("header fields other than alg, typ, kid")
        kid = header.get("kid")
        if kid is None:
            return list(self._keys.values())
        if not isinstance(kid, str) or kid not in self._keys:
            raise BadToken("unknown kid")
        return [self._keys[kid]]

    @override
    def __repr__(self) -> str:
        return f"Keyring(kids={sorted(self._keys)}, signing={self.signing!r})"


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


def _reason(error: InvalidTokenError) -> str:
    """Name what is wrong in our own words: the library's may quote the token."""
    match error:
        case jwt.ExpiredSignatureError():
            return "expired"
        case jwt.ImmatureSignatureError():
            return "not valid yet"
        case jwt.InvalidAudienceError() | jwt.InvalidIssuerError():
            return "made by or for somebody else"
        case jwt.MissingRequiredClaimError():
            return "a required claim is missing"
        case _:
            return "malformed"
