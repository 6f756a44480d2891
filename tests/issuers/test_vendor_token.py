"""What a token says about itself: rows T2-T7 over every kind of claim, without any HTTP."""

import base64
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.issuers.vendor.token import claims_of, expires_at, is_token, lifetime, session_of
from broker.units import SECOND

NOW = 1_795_348_800
"""Seconds: our clock in every test, and the vendor's where nothing else is said."""

HOUR = 3600

_moments = (
    st.none()
    | st.booleans()
    | st.text(max_size=12)
    | st.floats()
    | st.integers()
    | st.integers(NOW - 10_000, NOW + 10_000)
    | st.floats(NOW - 10_000, NOW + 10_000)
    | st.lists(st.integers(), max_size=2)
)
_claims = st.fixed_dictionaries({}, optional={"exp": _moments, "iat": _moments})
_dates = st.integers(NOW - 2 * HOUR, NOW + 2 * HOUR)


def life(claims: dict[str, object], date: int | None = None) -> float:
    """Seconds that a token with these claims lives, in an answer with this `Date`."""
    theirs = None if date is None else date * SECOND
    return lifetime(claims, theirs, NOW * SECOND) / SECOND


def expiry(claims: dict[str, object]) -> int:
    """Return the `expires_at` that callers are told."""
    return expires_at(claims, lifetime(claims, None, NOW * SECOND), NOW * SECOND)


def token_of(payload: bytes) -> str:
    """Make a JWT around this payload, signed by nobody."""
    return f"e30.{base64.urlsafe_b64encode(payload).decode().rstrip('=')}.c2ln"


@given(_claims, st.none() | _dates)
def test_T4_no_token_is_kept_for_ever(claims: dict[str, object], date: int | None) -> None:
    """Whatever the claims hold, a life has between nothing and an hour, and a date is a date."""
    assert 0 <= life(claims, date) <= HOUR
    assert 0 < expiry(claims) < 253_402_300_800


@pytest.mark.parametrize(
    ("exp", "seconds", "expires_in"),
    [
        pytest.param(..., HOUR, HOUR, id="missing"),
        pytest.param(None, HOUR, HOUR, id="null"),
        pytest.param(NOW + 90.75, 90.75, 90, id="float"),
        pytest.param(f"{NOW + 90}", HOUR, HOUR, id="string"),
        pytest.param(253_402_300_799, HOUR, 253_402_300_799 - NOW, id="year-9999"),
        pytest.param(253_402_300_800, HOUR, HOUR, id="year-10000"),
        pytest.param(10**12, HOUR, HOUR, id="milliseconds"),
        pytest.param(10**300, HOUR, HOUR, id="huge"),
        pytest.param(-1, 0, 0, id="negative"),
        pytest.param(0, 0, 0, id="zero"),
        pytest.param(True, HOUR, HOUR, id="bool"),
        pytest.param(float("nan"), HOUR, HOUR, id="nan"),
        pytest.param(float("inf"), HOUR, HOUR, id="infinite"),
        pytest.param([NOW + 90], HOUR, HOUR, id="list"),
    ],
)
def test_T4_odd_expiry(exp: object, seconds: float, expires_in: int) -> None:
    """Each odd `exp` is either clamped or taken for the documented hour."""
    claims: dict[str, object] = {"iat": NOW}
    if exp is not ...:
        claims["exp"] = exp
    assert (life(claims), expiry(claims)) == (seconds, NOW + expires_in)


@pytest.mark.parametrize(("exp", "seconds"), [(NOW - 1, 0), (NOW, 0), (NOW + 1, 1)])
def test_T2_a_token_that_ends_when_it_begins_has_no_life(exp: int, seconds: int) -> None:
    """`exp` at or before `iat` gives nothing; a second later it gives that second."""
    assert life({"iat": NOW, "exp": exp}) == seconds


@pytest.mark.parametrize("iat", [None, "yesterday", True, float("nan"), 10**13])
def test_T4_a_token_without_iat_is_measured_on_our_clock(iat: object) -> None:
    """Then `exp` alone has to do: a token with ten minutes to go is not kept for an hour."""
    claims = {"exp": NOW + 600, "iat": iat}
    assert life(claims) == 600
    assert life(claims, NOW + 60) == 540
    assert life(claims, NOW - 60) == 600


@given(st.integers(-HOUR, HOUR), st.integers(0, 2 * HOUR))
def test_T3_age_is_taken_off_whatever_the_vendors_clock_says(skew: int, age: int) -> None:
    """Issued `age` seconds before the answer's date: that much less is left."""
    issued = NOW + skew - age
    claims: dict[str, object] = {"iat": issued, "exp": issued + HOUR}
    assert life(claims, NOW + skew) == max(HOUR - age, 0)


def test_T3_age_counts_from_the_real_expiry_not_from_the_cut_one() -> None:
    """A day's token that is two hours old has far more than the hour that we ever believe."""
    claims: dict[str, object] = {"iat": NOW - 2 * HOUR, "exp": NOW + 22 * HOUR}
    assert life(claims, NOW) == HOUR


@given(_claims, _dates)
def test_T6_the_date_of_an_answer_never_makes_a_life_longer(
    claims: dict[str, object], date: int
) -> None:
    """It can only show that a token is older than it looks."""
    assert life(claims, date) <= life(claims)


@given(st.integers(-10 * HOUR, 10 * HOUR))
def test_T6_life_does_not_depend_on_the_vendors_clock(skew: int) -> None:
    """A clock that is off shifts `iat`, `exp` and `Date` alike, and the hour stays an hour."""
    claims: dict[str, object] = {"iat": NOW + skew, "exp": NOW + skew + HOUR}
    assert life(claims) == life(claims, NOW + skew) == HOUR


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4))
def test_claims_are_read_as_they_are(claims: dict[str, object]) -> None:
    """Whatever length the payload has, its missing padding is no obstacle."""
    small = {name: value for name, value in claims.items() if not _big(value)}
    assert claims_of(token_of(json.dumps(small).encode())) == small


@pytest.mark.parametrize(
    "token",
    [
        "opaque",
        "a.b",
        "e30.!.e30",
        "e30.A.e30",
        "....",
        token_of(b""),
        token_of(b"[]"),
        token_of(b"17"),
        token_of(b'{"exp":'),
        token_of(b'{"exp":1e999}'),
        token_of(b'{"exp":NaN}'),
        token_of(b"\xff\xfe"),
        token_of(b'{"a":' * 1500),
    ],
)
def test_T4_a_token_whose_claims_cannot_be_read_has_none(token: str) -> None:
    """It is a token all the same, of which nothing is known."""
    assert claims_of(token) == {}


@given(st.text(max_size=60), st.binary(max_size=60))
def test_reading_claims_never_raises(text: str, payload: bytes) -> None:
    """Neither text nor a JWT in looks only gets further than "no claims"."""
    assert isinstance(claims_of(text), dict)
    assert isinstance(claims_of(token_of(payload)), dict)


@pytest.mark.parametrize(
    "value",
    [None, 17, b"abc", ["abc"], "", " ", "a b", "abc\n", "abc\r", "ab\u00e9", "a\x00", "a" * 8193],
)
def test_what_no_url_can_carry_is_no_token(value: object) -> None:
    """A token goes into the query of an iframe's address."""
    assert not is_token(value)


def test_the_longest_token_is_one() -> None:
    """The bound belongs to what is allowed."""
    assert is_token("a" * 8192)
    assert is_token("a.b-c_d~e+f/g==")


@pytest.mark.parametrize(
    "unusable", [None, "", 17, True, "two words", "\u202eabc", "abc\n", "\u00e9", "a" * 129, ["a"]]
)
def test_a_session_is_named_by_the_first_that_can(unusable: object) -> None:
    """The answer, then `sid`, then `jti`, then the token itself; unusable names are passed over."""
    derived = hashlib.sha256(b"token").hexdigest()[:32]
    claims = {"sid": "from-sid", "jti": "from-jti"}
    assert session_of((unusable, "named"), claims, "token") == "named"
    assert session_of((unusable, unusable), claims, "token") == "from-sid"
    assert session_of((unusable,), {"sid": unusable, "jti": "from-jti"}, "token") == "from-jti"
    assert session_of((unusable,), {"sid": unusable, "jti": unusable}, "token") == derived
    assert session_of(("a" * 128,), claims, "token") == "a" * 128


def _big(value: object) -> bool:
    """Whether this is an integer beyond 64 bits, which JSON readers treat as they like."""
    return isinstance(value, int) and not -(2**63) <= value < 2**63
