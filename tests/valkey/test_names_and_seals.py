"""What a reader of the store learns (nothing), and what a writer can forge (nothing)."""

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from broker import errors
from broker.app.shared_backend import names_of
from broker.config.settings import IssuerSettings, Settings, UpstreamSettings
from broker.config.validate import normal_base_url
from broker.model import LimitName, Secret, TokenRequest
from broker.rules.bucket import Limit, verdict_from_wait
from broker.sealing import KEY_ID, NONCE, Seal, Sealed, derive
from broker.stores.base import Rejection
from broker.valkey import mint_errors
from broker.valkey.key_names import PREFIX, Names

KEY = secrets.token_bytes(32)
SECRET = Secret(secrets.token_urlsafe(48))
NAMES = Names(KEY, "https://vendor.example")

hostile = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "{}",
            "{",
            "}",
            "}{",
            "{a}b",
            ":",
            "::",
            "\x00",
            "\u202e",
            "*",
            "?",
            "\ud800",
            "a",
        ]
    ),
    st.text(max_size=20),
    st.text(alphabet="{}:ab|", max_size=6),
)
requests = st.builds(TokenRequest, hostile, hostile, hostile, st.none() | hostile)


def every_name(names: Names, request: TokenRequest) -> list[bytes]:
    """Return each name that a request leads to."""
    visitor, token = names.visitor(request.visitor), names.token_name(request.key)
    return [
        visitor.bucket("requests"),
        visitor.bucket("mints", request.agent),
        visitor.epoch,
        visitor.token(token),
        visitor.lease(token),
    ]


@given(request=requests)
def test_L13_hostile_names_never_change_slot(request: TokenRequest) -> None:
    """All of a visitor's keys lie in one slot, whatever agent, model or fingerprint are called."""
    names = every_name(NAMES, request)
    assert len({key_slot(name) for name in names}) == 1
    assert len(set(names)) == len(names)
    assert all(name.startswith(PREFIX.encode()) for name in names)


@given(request=requests)
def test_L13_agents_and_clients_stay_within_their_braces(request: TokenRequest) -> None:
    """The bucket of an agent and what the vendor said of it share a slot: its own."""
    agent, refused = NAMES.agent(request.agent), NAMES.refused(request)
    assert key_slot(agent) == key_slot(refused)
    for name in (agent, refused, NAMES.client(request.client)):
        assert name.startswith(PREFIX.encode())
        assert name.count(b"{") == name.count(b"}") == 1


@given(one=requests, other=requests)
def test_G8_two_names_are_equal_only_for_one_key(one: TokenRequest, other: TokenRequest) -> None:
    """F7: boundaries, case, Unicode forms, model set or not."""
    same_visitor = (one.client, one.fingerprint) == (other.client, other.fingerprint)
    assert (NAMES.visitor(one.visitor).epoch == NAMES.visitor(other.visitor).epoch) == same_visitor
    same_key = same_visitor and one.agent == other.agent and one.key == other.key
    assert (every_name(NAMES, one) == every_name(NAMES, other)) == same_key
    assert (NAMES.agent(one.agent) == NAMES.agent(other.agent)) == (one.agent == other.agent)
    assert (NAMES.client(one.client) == NAMES.client(other.client)) == (one.client == other.client)
    same_model = one.agent == other.agent and one.model == other.model
    assert (NAMES.refused(one) == NAMES.refused(other)) == same_model


@given(fingerprint=st.text(alphabet="0123456789abcdef", min_size=6, max_size=32))
def test_G7_a_name_holds_no_fingerprint(fingerprint: str) -> None:
    """Neither as it is nor as a hash without the key."""
    request = TokenRequest("web", "A", fingerprint)
    others = every_name(Names(secrets.token_bytes(32), "https://vendor.example"), request)
    for name, other in zip(every_name(NAMES, request), others, strict=True):
        assert name != other
        assert fingerprint.encode() not in name


def test_the_budget_is_the_vendors_whatever_the_key() -> None:
    """Two replicas in the middle of a rotation share it; two vendors do not."""
    rotated = Names(secrets.token_bytes(32), "https://vendor.example")
    other = Names(KEY, "https://other.example")
    for part in ("budget", "queues", "members", "channel"):
        assert getattr(rotated, part) == getattr(NAMES, part) != getattr(other, part)


def test_all_else_is_of_one_vendor_and_one_key() -> None:
    """So two deployments on one server do not refuse for each other, nor count together."""
    rotated = Names(secrets.token_bytes(32), "https://vendor.example")
    other = Names(KEY, "https://other.example")
    request, keys = TokenRequest("web", "A", "abcd", "m"), [Secret("one"), Secret("two")]
    made = [
        {
            *every_name(names, request),
            *(names.agent("A"), names.client("web"), names.refused(request), names.account(keys)),
            *(names.of_agent("A"), names.of_visitor("abcd"), names.session("s"), names.ended("s")),
            names.handed_out(b"digest"),
        }
        for names in (NAMES, rotated, other)
    ]
    assert [len(each) for each in made] == [14, 14, 14]
    assert len(set.union(*made)) == 42


def test_an_account_is_known_by_its_keys() -> None:
    """In their order, none of which can be read from the name."""
    one, two = Secret("one" * 9), Secret("two" * 9)
    names = [NAMES.account(keys) for keys in ((), (one,), (two,), (one, two), (two, one))]
    assert len(set(names)) == 5
    assert NAMES.account([one]) == NAMES.account([one])
    for name in names:
        assert b"one" not in name
        assert one.digest().hex().encode() not in name


# --- seals

contents = st.builds(
    Sealed,
    body=st.binary(max_size=2000),
    dies_wall=st.integers(0, 2**62),
    lifetime=st.integers(0, 2**62),
    mark=st.integers(0, 2**62),
    origin=st.text(max_size=40),
    version=st.integers(0, 2**62),
    epoch=st.integers(0, 2**62),
)
SEAL = Seal(Secret(secrets.token_urlsafe(48)))


@given(key=hostile, content=contents)
def test_what_is_sealed_opens_with_its_key_only(key: str, content: Sealed) -> None:
    """Unchanged under its own key; under any other, or with another secret, nothing."""
    sealed = SEAL.close(key, content)
    assert SEAL.open(key, sealed) == content
    assert SEAL.open(key + "x", sealed) is None
    assert Seal(Secret(secrets.token_urlsafe(48))).open(key, sealed) is None


@given(content=contents, data=st.data())
def test_damage_is_noticed(content: Sealed, data: st.DataObject) -> None:
    """Any byte changed, cut off or added: nothing is opened, nothing is raised."""
    sealed = bytearray(SEAL.close("key", content))
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= data.draw(st.integers(1, 255))
    assert SEAL.open("key", bytes(sealed)) is None
    sealed = bytearray(SEAL.close("key", content))
    assert SEAL.open("key", bytes(sealed[:place])) is None
    assert SEAL.open("key", bytes(sealed) + b"x") is None


@given(noise=st.binary(max_size=60))
def test_noise_is_not_opened(noise: bytes) -> None:
    """Also behind the right key id."""
    assert SEAL.open("key", noise) is None
    assert SEAL.open("key", SEAL.close("key", _EMPTY)[:KEY_ID] + noise) is None


_EMPTY = Sealed(b"", 0, 0, 0, "", 0, 0)


def test_no_nonce_comes_twice_and_purposes_have_keys_of_their_own() -> None:
    """The same token sealed twice shares the key's id, and nothing else."""
    sealed = {SEAL.close("key", _EMPTY) for _ in range(200)}
    assert len({each[KEY_ID : KEY_ID + NONCE] for each in sealed}) == 200
    assert len({each[:KEY_ID] for each in sealed}) == 1
    secret = Secret(secrets.token_urlsafe(48))
    assert len({derive(secret, "a"), derive(secret, "b"), derive(Secret("other"), "a")}) == 3
    assert derive(secret, "a") == derive(secret, "a")
    assert len(derive(secret, "a")) == 32


def test_G7_a_seals_content_does_not_show_itself() -> None:
    """In a log or a traceback."""
    assert "secret" not in repr(Sealed(b"secret", 1, 2, 3, "origin", 4, 5))


# --- outcomes

verdicts = st.builds(
    lambda limit, left: verdict_from_wait(
        limit.depth - left % limit.interval, limit, allowed=False
    ),
    limit=st.builds(Limit, st.integers(1, 2**30), st.integers(1, 2**31)),
    left=st.integers(0, 2**31),
)
texts = st.text(max_size=1024).filter(str.isprintable)
waits = st.integers(0, mint_errors.LONGEST_WAIT)
failures = st.one_of(
    st.builds(errors.RateLimited, st.sampled_from(LimitName), verdicts),
    st.builds(
        errors.UpstreamRefused,
        st.sampled_from([400, 402, 403, 404, 409, 410, 422, 429]),
        st.from_regex(r"[A-Z][A-Z0-9_]{0,63}", fullmatch=True),
        texts,
    ),
    st.builds(errors.UpstreamTimeout, texts),
    st.builds(errors.UpstreamUnavailable, texts),
    st.builds(errors.BudgetExhausted, texts, waits),
    st.builds(errors.ServiceUnavailable, texts, waits),
)


@given(error=failures)
def test_F4_an_error_is_told_as_it_was(error: errors.BrokerError) -> None:
    """Type, status, code, message, wait, and for a limit the whole verdict."""
    told = mint_errors.decode(mint_errors.encode(error))
    assert type(told) is type(error)
    assert (told.status, told.code, told.message) == (error.status, error.code, error.message)
    assert told.retry_after == error.retry_after
    if isinstance(error, errors.RateLimited):
        assert isinstance(told, errors.RateLimited)
        assert (told.limit, told.verdict) == (error.limit, error.verdict)


@pytest.mark.parametrize(
    "error",
    [
        *(None, errors.SessionEnded(), errors.StoreAway(), KeyError("x"), errors.Internal()),
        errors.Invalid("x"),
    ],
)
def test_what_tells_others_nothing_is_not_told(error: BaseException | None) -> None:
    """The next one tries by itself."""
    assert mint_errors.encode(error) == b""


@given(noise=st.binary())
def test_noise_is_a_fault_of_the_vendors_at_most(noise: bytes) -> None:
    """A message of another version, or of nobody."""
    assert isinstance(mint_errors.decode(noise), errors.BrokerError)
    assert isinstance(mint_errors.decode(b'["new kind",400,"A","b",0]'), errors.UpstreamUnavailable)


FORGED = [
    *(b'["refused",%d,"NOT_FOUND","x"]' % status for status in (200, 302, 401, 500, 503, 999, -1)),
    *(b'["refused",404,"%b","x"]' % code for code in (b"", b"not", b"A\\n", b"A" * 65)),
    b'["refused",404,"NOT_FOUND","%b"]' % (b"x" * 1025),
    *(b'["timeout","%b"]' % text for text in (b"a\\nb", b"\\u202e", b"\\u001b[31m")),
    *(b'["%b","x",%d]' % (k, w) for k in (b"busy", b"budget") for w in (-1, 10**20, 300_000_001)),
    *(b'["limited","%b",1,1,1]' % name for name in (b"unknown", b"")),
    *(b'["limited","agent",%d,%d,%d]' % n for n in [(0, 1, 1), (1, 0, 1), (1, 1, 0), (2, 9, 9)]),
    b'["limited","agent",1,1,%d]' % 10**20,
]


@pytest.mark.parametrize("forged", FORGED)
def test_what_no_broker_would_tell_is_not_answered(forged: bytes) -> None:
    """A status that is none, a code, a text or a number out of bounds: one 502, told by us."""
    told = mint_errors.decode(forged)
    assert isinstance(told, errors.UpstreamUnavailable)
    assert told.message == "another replica's mint failed"


def test_a_wait_beyond_a_pause_is_cut_to_it() -> None:
    """And told all the same."""
    told = mint_errors.decode(mint_errors.encode(errors.BudgetExhausted("x", 2**40)))
    assert isinstance(told, errors.BudgetExhausted)
    assert told.wait == mint_errors.LONGEST_WAIT


def test_a_limit_is_told_as_its_refusal() -> None:
    """The agent's limit, met after the lease was given."""
    verdict = verdict_from_wait(3, Limit(1, 5), allowed=False)
    told = mint_errors.decode(mint_errors.encode(Rejection(LimitName.AGENT, verdict).error()))
    assert isinstance(told, errors.RateLimited)
    assert (told.limit, told.verdict) == (LimitName.AGENT, verdict)


@pytest.mark.parametrize(
    "spelled",
    [
        "https://vendor.example/",
        "https://vendor.example//",
        "https://VENDOR.Example",
        "HTTPS://vendor.example",
        "https://vendor.example:443",
        "https://Vendor.example:443/",
        "https://vendor.example.",
        "https://vendor.example/v1",
        "https://vendor.example/v1/embed-tokens/request",
    ],
)
def test_N22_one_vendor_has_one_set_of_names_however_it_is_spelled(spelled: str) -> None:
    """Budget, members and lines, and what is sealed for it: all as for the plain spelling."""
    plain = "https://vendor.example"
    assert normal_base_url(spelled) == plain
    assert every_name_for(spelled) == every_name_for(plain)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://vendor.example", "https://vendor.example:8443"),
        ("https://vendor.example", "https://other.example"),
        ("http://localhost", "https://localhost"),
        ("http://localhost:80", "http://localhost:443"),
        ("https://vendor.example/a", "https://vendor.example/b"),
        ("https://vendor.example/A", "https://vendor.example/a"),
        ("https://vendor.example/v1x", "https://vendor.example/"),
        ("http://[::1]:8080", "http://[::1]:8081"),
    ],
)
def test_N22_two_vendors_have_two_sets_of_names(one: str, other: str) -> None:
    """Another port, host, scheme or path is another vendor, in any spelling."""
    assert not every_name_for(one) & every_name_for(other)
    assert not every_name_for(one + "/") & every_name_for(other)


@given(
    host=st.sampled_from(["a.example", "xn--bcher-kva.example", "10.0.0.1", "[::1]"]),
    port=st.sampled_from([None, 80, 443, 8443]),
    path=st.sampled_from(["", "/", "/a", "/a/", "/a/v1", "/a/v1/"]),
)
def test_N22_the_one_form_is_its_own_form(host: str, port: int | None, path: str) -> None:
    """Nothing more to mend in what was mended, and upper case changes nothing."""
    url = f"https://{host}{'' if port is None else f':{port}'}"
    normal = normal_base_url(url + path)
    assert normal_base_url(normal) == normal == normal_base_url(url.upper() + path)
    assert not normal.endswith("/")


def every_name_for(base_url: str) -> set[bytes]:
    """Return the names that a fleet before this vendor shares."""
    upstream = UpstreamSettings(base_url=normal_base_url(base_url))  # as `config` does
    names = names_of(Settings(issuer=IssuerSettings(kind="upstream", upstream=upstream)), SECRET)
    return {names.budget, names.queues, names.calls, names.members, names.channel}
