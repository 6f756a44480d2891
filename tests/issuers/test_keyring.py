"""Keys that sign and verify: rotation, weak keys, and the corpus of hostile tokens, row O2."""

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.issuers.keyring import (
    MAX_LIFE,
    MAX_TOKEN_CHARS,
    BadKey,
    BadToken,
    Key,
    Keyring,
    check_key,
)
from broker.model import MIN_KEY_BYTES

ISSUER, AUDIENCE = "embed-token-broker", "embed"

KEY = secrets.token_bytes(32)
OTHER = secrets.token_bytes(32)
RING = Keyring.of({"2026-01": KEY}, "2026-01")
TWO = Keyring.of({"2026-01": KEY, "2026-02": OTHER}, "2026-02")


def now() -> int:
    """Return this moment in microseconds."""
    return time.time_ns() // 1000


@dataclass(frozen=True)
class FromNow:
    """A time, counted from the moment of the test: that may be long after the collection."""

    seconds: int


def claims(**changes: object) -> dict[str, object]:
    """Good claims, but for the changes; a claim changed to `...` is left out."""
    now = int(time.time())
    for name, value in changes.items():
        if isinstance(value, FromNow):
            changes[name] = now + value.seconds
    good: dict[str, object] = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "A78WKV4515",
        "iat": now - 5,
        "nbf": now - 5,
        "exp": now + 3600,
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not ...}


def encoded(part: object) -> str:
    """Encode a part of a JWS; bytes and text go in as they are."""
    if isinstance(part, str):
        part = part.encode()
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def forged(header: object, body: object = None, key: bytes = KEY, *, seal: bool = True) -> str:
    """Make a token with any header, sealed with the right key unless told otherwise.

    So whatever refuses it, it is not the signature.
    """
    signed = f"{encoded(header)}.{encoded(claims() if body is None else body)}"
    seal_bytes = hmac.new(key, signed.encode(), hashlib.sha256).digest() if seal else b""
    return f"{signed}.{encoded(seal_bytes)}"


def good_header(**more: object) -> dict[str, object]:
    """Return the header that we issue, with more in it."""
    return {"alg": "HS256", "typ": "JWT", **more}


def refused(token: str, ring: Keyring = RING) -> str:
    """See that the token is refused without being quoted, and return the reason."""
    with pytest.raises(BadToken) as refusal:
        ring.verify(token, ISSUER, AUDIENCE, now())
    reason = str(refusal.value)
    assert 0 < len(reason) < 60
    assert reason.isprintable()
    assert not any(part in reason for part in token.split(".") if len(part) > 8)
    return reason


def test_the_forger_of_these_tests_makes_good_tokens() -> None:
    """Or every refusal below would prove nothing."""
    assert RING.verify(forged(good_header()), ISSUER, AUDIENCE, now()).claims == claims()
    assert (
        RING.verify(forged(good_header(kid="2026-01")), ISSUER, AUDIENCE, now()).claims == claims()
    )
    assert RING.verify(forged({"alg": "HS256"}), ISSUER, AUDIENCE, now()).claims == claims()


def test_O2_a_foreign_algorithm_is_refused_whatever_seals_it() -> None:
    """`none` in every case, stronger HMACs, and public-key algorithms."""
    shy, strong = ["none", "None", "NONE", "nOnE"], ["HS384", "HS512", "hs256", "HS256 "]
    foreign = ["RS256", "ES256", "PS256", "EdDSA"]
    for alg in (*shy, *strong, *foreign, "", None, 256, ["HS256"], {"HS256": 1}, True):
        for seal in (True, False):
            refused(forged({"alg": alg, "typ": "JWT"}, seal=seal))
    refused(forged({"typ": "JWT"}))
    refused(jwt.encode(claims(), key="", algorithm="none"))
    for algorithm, size in (("HS384", 48), ("HS512", 64)):
        key = secrets.token_bytes(size)
        ring = Keyring.of({"only": key}, "only")
        refused(jwt.encode(claims(), key, algorithm), ring)


def test_O2_an_rsa_public_key_cannot_be_taken_for_an_hmac_secret() -> None:
    """The classic: signed with the public key as HMAC secret, or really with RS256."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert refused(forged(good_header(), key=public)) == "no key fits"
    refused(jwt.encode(claims(), private, "RS256"))
    refused(forged({"alg": "RS256", "typ": "JWT"}, key=KEY))


HEADERS: list[dict[str, object]] = [
    {"jwk": {"kty": "oct", "k": encoded(KEY)}},
    {"jku": "https://attacker.example/keys.json"},
    {"x5u": "https://attacker.example/cert.pem"},
    {"x5c": ["MIIB"]},
    {"x5t": "abc"},
    {"x5t#S256": "abc"},
    {"crit": ["exp"]},
    {"crit": []},
    {"crit": ["b64"], "b64": False},
    {"b64": False},
    {"zip": "DEF"},
    {"cty": "JWT"},
    {"enc": "A128GCM"},
    {"KID": "2026-01"},
    {"x": 1},
]


@pytest.mark.parametrize("more", HEADERS, ids="+".join)
def test_O2_a_header_that_we_never_issue_is_refused_though_the_seal_is_good(
    more: dict[str, object],
) -> None:
    """No header can bring a key, name a place to fetch one, or ask for special treatment."""
    for ring in (RING, TWO):
        reason = refused(forged(good_header(**more)), ring)
        assert reason in {"header fields other than alg, typ, kid", "not a JWT"}  # crit, b64


KIDS: list[object] = [
    "../../../../dev/null",
    "/dev/null",
    "2026-01\x00",
    "\x00",
    "2026-01\n",
    "'; DROP TABLE keys; --",
    "x" * 2000,
    "x" * 10_240,
    "2026-0١",  # noqa: RUF001 - a digit that only looks like one
    "",
    " ",
    0,
    1,
    True,
    2026.01,
    ["2026-01"],
    {"2026-01": 1},
    "http://attacker.example/key",
]


@pytest.mark.parametrize("kid", KIDS, ids=lambda kid: ascii(kid)[:24])
def test_O2_a_kid_is_a_name_among_ours_or_nothing(kid: object) -> None:
    """Paths, NUL, 10 KiB, other types: never looked up anywhere but in the ring, never echoed."""
    for ring in (RING, TWO):
        for key in (KEY, b""):
            refused(forged(good_header(kid=kid), key=key), ring)


def test_O2_a_kid_chooses_its_key_and_no_other() -> None:
    """Sealed with one key under the other's name is a bad seal, though both keys are ours."""
    assert TWO.verify(forged(good_header(kid="2026-02"), key=OTHER), ISSUER, AUDIENCE, now())
    assert refused(forged(good_header(kid="2026-01"), key=OTHER), TWO) == "no key fits"
    assert refused(forged(good_header(kid="2026-03"), key=OTHER), TWO) == "unknown kid"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iss": "somebody-else"}, "made by or for somebody else"),
        ({"iss": ["embed-token-broker"]}, "made by or for somebody else"),
        ({"iss": "embed-token-broker "}, "made by or for somebody else"),
        ({"aud": "admin"}, "made by or for somebody else"),
        ({"aud": []}, "made by or for somebody else"),
        ({"aud": "embe"}, "made by or for somebody else"),
        ({"aud": {"embed": 1}}, "made by or for somebody else"),
        ({"exp": FromNow(-61)}, "expired"),
        ({"exp": 0}, "expired"),
        ({"exp": -1}, "expired"),
        ({"nbf": FromNow(600)}, "not valid yet"),
        ({"iat": FromNow(600)}, "not valid yet"),
        ({"exp": FromNow(36_000)}, "lives for too long"),
        ({"nbf": 0}, "lives for too long"),
        ({"exp": ...}, "a required claim is missing"),
        ({"nbf": ...}, "a required claim is missing"),
        ({"iss": ...}, "a required claim is missing"),
        ({"aud": ...}, "a required claim is missing"),
        ({"sub": ...}, "a required claim is missing"),
        ({"exp": None}, "a required claim is missing"),
        ({"sub": None}, "a required claim is missing"),
    ],
    ids=str,
)
def test_O2_a_claim_that_is_wrong_or_missing_is_refused(
    changes: dict[str, object], reason: str
) -> None:
    """Issuer, audience and time must be there and hold at this moment."""
    assert refused(forged(good_header(), claims(**changes))) == reason


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": "tomorrow"},
        {"exp": [2_000_000_000]},
        {"exp": {}},
        {"exp": float("nan")},
        {"exp": float("inf")},
        {"exp": 1e308},
        {"exp": 10**400},
        {"exp": True},
        {"nbf": "yesterday"},
        {"nbf": float("nan")},
        {"nbf": float("-inf")},
        {"iat": "now"},
        {"iat": float("inf")},
        {"iat": []},
        {"sub": 7},
        {"sub": {"a": 1}},
        {"jti": 7},
    ],
    ids=str,
)
def test_O2_a_claim_of_a_strange_type_is_refused_or_harmless(changes: dict[str, object]) -> None:
    """Whoever has the key may write nonsense; it ends in an answer or in BadToken."""
    token = forged(good_header(), claims(**changes))
    try:
        RING.verify(token, ISSUER, AUDIENCE, now())
    except BadToken:
        return
    assert changes == {"jti": 7}, "of all these it is the only one that nobody reads"


def nested(depth: int) -> str:
    """Return lists in lists."""
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "...",
        "a.b.c",
        "\x00",
        "é.é.é",
        "\ud800.a.b",
        forged(good_header()) + ".",
        forged(good_header()) + "." + forged(good_header()),
        forged(good_header()).rsplit(".", 1)[0],
        forged(good_header()).rsplit(".", 1)[0] + ".",
        forged("not json"),
        forged([]),
        forged("null"),
        forged('"HS256"'),
        forged(nested(900)),
        forged('{"alg":' + nested(900) + "}"),
        forged(good_header(), nested(900)),
        forged(good_header(), []),
        forged(good_header(), "null"),
        forged(good_header(), b"\xff\xfe"),
        forged(b"\xff\xfe"),
        forged(good_header(), forged(good_header())),
        forged({**good_header(), "typ": "JWE"}, "x"),
        "eyJhbGciOiJIUzI1NiJ9" * 3,
    ],
    ids=lambda token: ascii(token)[:20],
)
def test_O2_what_is_no_token_is_refused(token: str) -> None:
    """Empty, cut short, doubled, nested in itself or nested deep, not JSON, not text."""
    with pytest.raises(BadToken):
        RING.verify(token, ISSUER, AUDIENCE, now())


def test_O2_an_oversized_token_is_not_even_decoded() -> None:
    """Just at the bound it counts, one character over it does not, and neither do 10 MB."""
    fits = RING.sign(claims(padding="x" * (MAX_TOKEN_CHARS * 3 // 4 - 400)), now())
    assert len(fits) <= MAX_TOKEN_CHARS
    RING.verify(fits, ISSUER, AUDIENCE, now())
    too_long = RING.sign(claims(padding="x" * MAX_TOKEN_CHARS), now())
    assert refused(too_long) == f"longer than {MAX_TOKEN_CHARS} characters"
    assert refused("x" * 10_000_000) == f"longer than {MAX_TOKEN_CHARS} characters"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_O2_no_change_of_a_good_token_goes_unnoticed(data: st.DataObject) -> None:
    """Any one character changed, dropped or added: refused, even where it decodes to the same."""
    good = RING.sign(claims(), now())
    at = data.draw(st.integers(0, len(good) - 1))
    middle = data.draw(st.text(max_size=2))
    changed = good[:at] + middle + good[at + 1 :]
    try:
        RING.verify(changed, ISSUER, AUDIENCE, now())
    except BadToken:
        return
    assert changed == good


def test_O2_a_token_has_one_spelling() -> None:
    """The two unused bits of its last character are not a way around a revocation."""
    good = RING.sign(claims(), now())
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    others = {good[:-1] + last for last in alphabet} - {good}
    same = {other for other in others if _seal_of(other) == _seal_of(good)}
    assert len(same) == 3
    for other in others:
        assert refused(other) == "no key fits"


def _seal_of(token: str) -> bytes:
    return base64.urlsafe_b64decode(token.rpartition(".")[2] + "=")


def _by_the_library(token: str, ring: Keyring, moment: int) -> bool:
    """Whether PyJWT accepts it at this moment, which it can only be told by moving the claims."""
    keys = [key.secret for key in ring._schedule if moment < key.verifies_until]
    for key in keys:
        try:
            jwt.decode(
                token,
                key,
                ["HS256"],
                issuer=ISSUER,
                audience=AUDIENCE,
                leeway=60,
                options={"require": ["exp", "nbf", "iss", "aud", "sub"]},
            )
        except jwt.InvalidTokenError:
            continue
        return True
    return False


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    changes=st.dictionaries(
        st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat"]),
        st.sampled_from(["embed", ISSUER, "x", "", None, ...])
        | st.integers(-200, 200).map(lambda away: int(time.time()) + (away or 1) * 7),
        max_size=3,
    ),
    kid=st.sampled_from([None, "2026-01", "2026-02", "2026-03"]),
    key=st.sampled_from([KEY, OTHER, b"x" * 32]),
)
def test_O2_the_verdict_is_the_library_s(
    changes: dict[str, object], kid: str | None, key: bytes
) -> None:
    """Whatever PyJWT refuses is refused here; what it accepts is, if we could have made it."""
    made = claims(**changes)
    token = forged(good_header() if kid is None else good_header(kid=kid), made, key)
    try:
        TWO.verify(token, ISSUER, AUDIENCE, now())
        accepted = True
    except BadToken:
        accepted = False
    by_its_own_key = kid is None or {"2026-01": KEY, "2026-02": OTHER}.get(kid) == key
    ours = by_its_own_key and _by_the_library(token, TWO, now())
    if ours:  # then both are numbers
        ours = int(str(made["exp"])) - int(str(made["nbf"])) <= MAX_LIFE
    assert accepted == ours


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    header=st.dictionaries(
        st.sampled_from(["alg", "typ", "kid", "crit", "jwk", "b64", "zip"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=2),
            max_leaves=3,
        ),
    ),
    alg=st.sampled_from(["HS256", "none", "RS256", None]),
)
def test_O2_any_header_ends_in_claims_or_in_bad_token(
    header: dict[str, object], alg: str | None
) -> None:
    """Sealed with the right key, whatever the header: accepted only if it is one we could issue."""
    header = header if alg is None else {**header, "alg": alg}
    try:
        RING.verify(forged(header), ISSUER, AUDIENCE, now())
    except BadToken:
        return
    assert header.keys() <= {"alg", "typ", "kid"}
    assert header["alg"] == "HS256"
    assert header.get("kid") in (None, "2026-01")


# --- keys -----------------------------------------------------------------------------------------


WEAK: list[Callable[[], bytes]] = [
    lambda: b"",
    lambda: secrets.token_bytes(MIN_KEY_BYTES - 1),
    lambda: b"a" * 32,
    lambda: b"\x00" * 64,
    lambda: b"changeme" * 3,
    lambda: b"abcabc1" * 10,
    lambda: bytes(range(7)) * 5,
]


@pytest.mark.parametrize("key", [make() for make in WEAK], ids=lambda key: f"{len(key)} bytes")
def test_O2_a_weak_key_is_refused_with_a_remedy(key: bytes) -> None:
    """Too short, or of a few repeated bytes: named, not shown, also as a key that only verifies."""
    strong = secrets.token_bytes(32)
    makers: list[Callable[[], object]] = [
        lambda: check_key("weak", key),
        lambda: Keyring.of({"weak": key}, "weak"),
        lambda: Keyring.of({"strong": strong, "weak": key}, "strong"),
    ]
    for make in makers:
        with pytest.raises(BadKey, match=r"'weak'.*broker keys generate") as refusal:
            make()
        assert not key or key.decode("latin-1") not in str(refusal.value)


def test_a_strong_key_is_accepted() -> None:
    """32 random bytes, raw or as the hex that `keys generate` could print."""
    for key in (secrets.token_bytes(32), secrets.token_hex(32).encode(), bytes(range(32))):
        check_key("strong", key)


def test_the_signing_key_must_be_among_the_keys() -> None:
    """A typing error there is found at the start."""
    with pytest.raises(BadKey, match="'2026-03'"):
        Keyring.of({"2026-01": KEY}, "2026-03")
    with pytest.raises(BadKey):
        Keyring.of({}, "")


def test_rotation_has_no_gap() -> None:
    """A single key names no `kid`; tokens made before, during and after a change stay good."""
    old = Keyring.of({"2026-01": KEY}, "2026-01")
    adding = Keyring.of({"2026-01": KEY, "2026-02": OTHER}, "2026-01")
    turning = Keyring.of({"2026-01": KEY, "2026-02": OTHER}, "2026-02")
    new = Keyring.of({"2026-02": OTHER}, "2026-02")
    made: Mapping[str, str] = {
        "old": old.sign(claims(), now()),
        "adding": adding.sign(claims(), now()),
        "turning": turning.sign(claims(), now()),
        "new": new.sign(claims(), now()),
    }
    assert {name: jwt.get_unverified_header(token) for name, token in made.items()} == {
        "old": {"alg": "HS256", "typ": "JWT"},
        "adding": {"alg": "HS256", "typ": "JWT", "kid": "2026-01"},
        "turning": {"alg": "HS256", "typ": "JWT", "kid": "2026-02"},
        "new": {"alg": "HS256", "typ": "JWT"},
    }
    for name, token in made.items():
        for ring in (adding, turning):
            assert ring.verify(token, ISSUER, AUDIENCE, now()).claims["sub"] == "A78WKV4515", name
    assert refused(made["old"], new) == "no key fits"
    assert refused(made["adding"], new) == "unknown kid"
    assert new.verify(made["turning"], ISSUER, AUDIENCE, now())


def test_G7_a_ring_shows_names_never_keys() -> None:
    """Neither as repr nor as text."""
    assert repr(TWO) == "Keyring(kids=['2026-01', '2026-02'])"
    assert repr(Key("a", KEY)) == "Key('a')"
    assert f"{TWO}" == repr(TWO)
