"""Tokens signed here: every claim, and row T6 (a verifier whose clock is behind)."""

import base64
import json
import secrets
import time

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from broker.issuers.keyring import LEEWAY, MAX_LIFE, BadToken, Key, Keyring
from broker.issuers.local import DRAWN, MOST_ALIKE, MOST_PROVEN, SESSION_BYTES, LocalIssuer
from broker.model import TokenRequest
from broker.pacing.slots import UNCOUNTED, Slot
from broker.sessions.base import MARK_LIFE
from broker.testing import FakeClock
from broker.units import SECOND
from broker.wire.responses import success_body

ISSUER, AUDIENCE = "embed-token-broker", "embed"
AGENT, VISITOR = "A78WKV4515", "D3adBeef-0001"


def new_ring() -> Keyring:
    """Return a ring of one new key."""
    return Keyring.of({"2026-01": secrets.token_bytes(32)}, "2026-01")


def local(clock: FakeClock, ring: Keyring | None = None) -> LocalIssuer:
    """Return an issuer with a key of its own, unless one is given."""
    return LocalIssuer(ring or new_ring(), ISSUER, AUDIENCE, clock)


async def no_budget() -> None:
    """Be a turn that comes at once."""


def part(token: str, number: int) -> dict[str, object]:
    """Read the header (0) or the claims (1) with no library's help."""
    text = token.split(".")[number]
    return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))


@pytest.mark.parametrize("model", [None, "essence"])
async def test_every_claim_of_a_token(model: str | None) -> None:
    """The header and the claims, whole; the visitor's own bytes; the answer agrees with them."""
    clock = FakeClock(wall=1_800_000_000_900_000)
    minted = await local(clock).mint(TokenRequest("web", AGENT, VISITOR, model), no_budget)
    assert part(minted.token, 0) == {"alg": "HS256", "typ": "JWT"}
    issued = 1_800_000_000 - 5
    assert part(minted.token, 1) == {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": AGENT,
        "agent_id": AGENT,
        "fingerprint": VISITOR,
        "sid": minted.session_id,
        "jti": minted.session_id,
        "client_id": "web",
        "iat": issued,
        "nbf": issued,
        "exp": issued + 3600,
        **({} if model is None else {"model": model}),
    }
    assert len(minted.session_id) == 32
    assert int(minted.session_id, 16) >= 0
    assert minted.expires_at == issued + 3600
    assert dict(minted.extra) == ({} if model is None else {"model": model})


async def test_session_ids_that_are_drawn_together_are_given_once() -> None:
    """Also when more are asked for than are drawn at once, by two issuers."""
    issuers = [local(FakeClock()) for _ in range(2)]
    visitor = TokenRequest("web", AGENT, VISITOR)
    drawn = [
        issuer.sign(visitor, SECOND).session_id for issuer in issuers for _ in range(3 * DRAWN)
    ]
    assert len(set(drawn)) == len(drawn)
    assert {len(bytes.fromhex(one)) for one in drawn} == {SESSION_BYTES}


_MOMENTS = st.lists(st.integers(-3 * SECOND, 3 * SECOND), min_size=1, max_size=12)

_REQUESTS = st.builds(
    TokenRequest,
    st.sampled_from(["web", "app"]),
    st.sampled_from([AGENT, "B2"]),
    st.sampled_from(["d3adbeef", "0badcafe", 'a "quoted" one', "\\", "é", "x" * 256]),
    st.sampled_from([None, "essence", '"token":"', "a\\", "é"]),
)


@given(_MOMENTS, st.lists(_REQUESTS, min_size=1, max_size=4), st.booleans())
def test_tokens_of_one_second_share_what_they_have_in_common_and_no_more(
    moments: list[int], requests: list[TokenRequest], turns: bool
) -> None:
    """Whoever asks, in whatever order, when the clock steps, and to the moment of a key's turn."""
    turn = 1_800_000_000 * SECOND + 400_000
    keys = [Key("old", secrets.token_bytes(32))]
    if turns:
        keys.append(Key("new", secrets.token_bytes(32), signs_from=turn))
    issuer = LocalIssuer(Keyring(keys), ISSUER, AUDIENCE, FakeClock())
    for number, away in enumerate(moments):
        now, request = turn + away, requests[number % len(requests)]
        minted = issuer.sign(request, now)
        signer = keys[-1] if now >= turn else keys[0]
        jwt.api_jws.decode_complete(minted.token, signer.secret, ["HS256"])
        assert part(minted.token, 0).get("kid") == (signer.kid if turns else None)
        claims, issued = part(minted.token, 1), now // SECOND - 5
        assert (claims["iat"], claims["nbf"], claims["exp"]) == (issued, issued, issued + 3600)
        assert (claims["sub"], claims["agent_id"]) == (request.agent, request.agent)
        assert (claims["client_id"], claims["fingerprint"]) == (request.client, request.fingerprint)
        assert claims["sid"] == claims["jti"] == minted.session_id
        assert claims.get("model") == request.model
        assert minted.origin.endswith(Keyring(keys).name_of(signer.kid))
        assert minted.body == success_body(replace(minted, body=b""))


def test_G6_what_tokens_have_in_common_is_kept_for_so_many() -> None:
    """A visitor can make models up."""
    issuer = local(FakeClock())
    for number in range(MOST_ALIKE + 10):
        issuer.sign(TokenRequest("web", AGENT, VISITOR, f"m{number}"), 1_800_000_000 * SECOND)
        assert len(issuer._alike) <= MOST_ALIKE


async def test_the_life_told_never_ends_after_the_token_s_own() -> None:
    """Counted from the start of the mint, also late in a second, it is over by `exp`."""
    for fraction in (0, 1, 500_000, 999_999):
        clock = FakeClock(wall=1_800_000_000 * SECOND + fraction)
        minted = await local(clock).mint(TokenRequest("web", AGENT, VISITOR), no_budget)
        ends = clock.wall() + minted.lifetime
        assert minted.expires_at * SECOND <= ends < (minted.expires_at + 1) * SECOND


async def test_every_mint_opens_a_session_of_its_own() -> None:
    """Also for one visitor in one moment."""
    issuer = local(FakeClock())
    minted = [await issuer.mint(TokenRequest("web", AGENT, VISITOR), no_budget) for _ in range(100)]
    assert len({one.session_id for one in minted}) == 100
    assert len({one.token for one in minted}) == 100


async def test_it_takes_one_turn_of_the_budget_before_it_signs() -> None:
    """The pace holds for this issuer, too, and the token is dated after the wait."""
    clock = FakeClock()
    turns = []

    async def turn() -> Slot:
        turns.append(clock.wall())
        clock.advance(8)
        return UNCOUNTED

    minted = await local(clock).mint(TokenRequest("web", AGENT, VISITOR), turn)
    assert len(turns) == 1
    assert minted.expires_at == clock.wall() // SECOND - 5 + 3600


def _now() -> FakeClock:
    """A clock at today's date: verification asks the system's."""
    return FakeClock(wall=time.time_ns() // 1000)


async def test_T6_a_token_is_good_at_once_and_for_verifiers_that_are_behind() -> None:
    """`nbf` lies 5 s in the past: a verifier without any leeway, its clock behind, accepts it."""
    ring = new_ring()
    clock = _now()
    clock.step_wall(4)  # the signer is ahead, that is, the verifier is behind
    minted = await local(clock, ring).mint(TokenRequest("web", AGENT, VISITOR), no_budget)
    jwt.decode(
        minted.token, ring.keys[0].secret, algorithms=["HS256"], audience=AUDIENCE, issuer=ISSUER
    )


async def test_T6_our_own_verifier_takes_a_minute_of_difference_either_way() -> None:
    """Within the leeway a token counts; beyond it, it is not valid yet, or expired."""
    for step, good in (
        (LEEWAY, True),
        (LEEWAY + 20, False),
        (-3590, True),
        (-3600 - LEEWAY, False),
    ):
        signer, verifier = FakeClock(), FakeClock()
        signer.step_wall(step)
        ring = new_ring()
        minted = await local(signer, ring).mint(TokenRequest("web", AGENT, VISITOR), no_budget)
        issuer = local(verifier, ring)
        if good:
            assert issuer.prove(minted.token).session_id == minted.session_id
        else:
            with pytest.raises(BadToken, match=r"^(not valid yet|expired)$"):
                issuer.prove(minted.token)


async def test_nothing_stops_a_signature() -> None:
    """There is no reason to refuse before the limits are charged."""
    await local(FakeClock()).check(TokenRequest("web", AGENT, VISITOR))


async def test_O7_a_token_that_was_proven_is_not_good_for_longer_than_its_key() -> None:
    """Other keys, or the end of its key's schedule: what was remembered of it does not count."""
    clock, old, new = _now(), secrets.token_bytes(32), secrets.token_bytes(32)
    issuer = local(clock, Keyring.of({"old": old}, "old"))
    token = (await issuer.mint(TokenRequest("web", AGENT, VISITOR), no_budget)).token
    session = issuer.prove(token)
    assert issuer.prove(token) is session, "the second time it is remembered"
    issuer.use_keyring(Keyring.of({"new": new}, "new"))
    with pytest.raises(BadToken, match="no key fits"):
        issuer.prove(token)
    ends = clock.wall() + 30 * SECOND
    issuer.use_keyring(Keyring([Key("old", old, verifies_until=ends), Key("new", new)]))
    assert issuer.prove(token) == session
    clock.advance(30)
    with pytest.raises(BadToken, match="no key fits"):
        issuer.prove(token)


def signed(ring: Keyring, now: int, **changes: object) -> str:
    """Sign what another maker who has the key might write; good but for the changes."""
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": AGENT, "fingerprint": "beef", "sid": "s"}
    return ring.sign({**good, "iat": now, "nbf": now, "exp": now + 60, **changes}, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"sub": "A1\r\nX-Embed-Session: forged"},
        {"sub": ""},
        {"sub": "A" * 65},
        {"sub": "A1\n"},
        {"agent_id": "B2"},
        {"agent_id": None},
    ],
    ids=str,
)
def test_O2_a_token_names_one_agent_that_can_be(changes: dict[str, object]) -> None:
    """It goes into a header as it is; another maker who has the key may have written anything."""
    clock, ring = _now(), new_ring()
    issuer, now = local(clock, ring), clock.wall() // SECOND
    for good in (signed(ring, now), signed(ring, now, agent_id=AGENT)):
        assert issuer.prove(good).agent == AGENT
    with pytest.raises(BadToken, match="no agent"):
        issuer.prove(signed(ring, now, **changes))


def test_G9_an_end_is_remembered_for_as_long_as_any_token_can_be_good() -> None:
    """From the first moment at which the one that lives longest opens anything to the last."""
    clock, ring = _now(), new_ring()
    now = clock.wall() // SECOND
    longest = signed(ring, now, exp=now + MAX_LIFE)
    proof = ring.verify(longest, ISSUER, AUDIENCE, clock.wall())
    assert proof.ends - proof.begins <= MARK_LIFE
    with pytest.raises(BadToken, match="lives for too long"):
        ring.verify(signed(ring, now, exp=now + MAX_LIFE + 1), ISSUER, AUDIENCE, clock.wall())


async def test_G6_what_is_remembered_of_proven_tokens_is_bounded() -> None:
    """Two generations at most, whatever is shown; nothing of a token that is not good."""
    clock = _now()
    issuer = local(clock)
    tokens = [
        (await issuer.mint(TokenRequest("web", AGENT, VISITOR), no_budget)).token
        for _ in range(2 * MOST_PROVEN + 100)
    ]
    for token in tokens:
        issuer.prove(token)
    assert len(issuer._proven._young) + len(issuer._proven._old) <= 2 * MOST_PROVEN
    kept = len(issuer._proven._young), len(issuer._proven._old)
    for token in tokens[:50]:
        with pytest.raises(BadToken):
            issuer.prove(token[:-2] + "zz")
    assert (len(issuer._proven._young), len(issuer._proven._old)) == kept
