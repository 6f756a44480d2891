"""What the vendor's answers mean: every sample, and properties over answers nobody has seen.

A sample is a folder of `tests/samples/`: the body in `answer.json` or `answer.txt`, and in
`meta.toml` why it is there, the rows of the failure modes that it stands for, status, headers,
and the whole reply that is expected.  In bodies, `{{token}}` is a JWT made here, from `[claims]`
whose `iat` and `exp` are seconds from NOW; `{{key}}`, `{{KEY}}` and `{{fingerprint}}` are what
must never come back.  `repeat` and `gzip` make of a small file the body that would be too silly
to keep.
"""

import base64
import gzip
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from broker.issuers.vendor import faults
from broker.issuers.vendor.api import MAX_BODY, MAX_EXTRA, MAX_MESSAGE, build_request, read_answer
from broker.issuers.vendor.replies import (
    BadKey,
    Broken,
    Granted,
    Refused,
    Reply,
    Scope,
    Throttled,
    reason_of,
)
from broker.issuers.vendor.token import claims_of
from broker.model import Minted, TokenRequest
from broker.rules.reuse import MAX_LIFETIME, lifetime_of
from broker.telemetry.labels import Reason
from broker.units import SECOND
from broker.wire.responses import success_body

SAMPLES = Path(__file__).parent.parent / "samples"

NOW = 1_795_348_800
"""Sun, 22 Nov 2026 12:00:00 GMT, in seconds; the moment at which all samples arrive."""

KEY = hashlib.sha256(b"the vendor's key").hexdigest()
FINGERPRINT = hashlib.sha256(b"a visitor").hexdigest()[:32]

JSON = {"Content-Type": "application/json"}
KEY_CODES = {"UNAUTHORIZED", "MISSING_AUTH", "RUNTIME_SUSPENDED"}


def jwt(claims: Mapping[str, object] | str) -> str:
    """Make a token with these claims (or this text in their place), signed by nobody."""
    text = claims if isinstance(claims, str) else json.dumps(claims)
    parts = (b'{"alg":"HS256","typ":"JWT"}', text.encode(), b"not a signature at all")
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


class Sample:
    """One folder."""

    def __init__(self, folder: Path) -> None:
        meta = tomllib.loads((folder / "meta.toml").read_text(encoding="utf-8"))
        self.name = folder.name
        self.rows: list[str] = meta.get("rows", [])
        self.status: int = meta["status"]
        self.headers = CIMultiDict([(name, value) for name, value in meta["headers"]])
        self.token = jwt(_claims(meta.get("claims", {"iat": 0, "exp": 3600})))
        self.body = self._body(folder, meta)
        self.expected = self._reply(meta["expect"])

    def _body(self, folder: Path, meta: Mapping[str, Any]) -> bytes:
        (answer,) = folder.glob("answer.*")
        text = answer.read_text(encoding="utf-8") * meta.get("repeat", 1)
        for name, value in (
            ("token", self.token),
            ("key", KEY),
            ("KEY", KEY.upper()),
            ("fingerprint", FINGERPRINT),
        ):
            text = text.replace("{{" + name + "}}", value)
        body = text.encode()
        return gzip.compress(body) if meta.get("gzip") else body

    def _reply(self, expect: dict[str, Any]) -> Reply:
        match expect.pop("reply"):
            case "granted":
                return Granted(self._minted(expect))
            case "refused":
                return Refused(scope=Scope(expect.pop("scope")), **expect)
            case "bad_key":
                return BadKey(**expect)
            case "throttled":
                wait = expect.get("retry_after")
                return Throttled(None if wait is None else int(wait * SECOND))
            case "broken":
                return Broken(Reason(expect["reason"]))
            case unknown:
                raise ValueError(unknown)

    def _minted(self, expect: dict[str, Any]) -> Minted:
        token = "opaque-token" if b"opaque-token" in self.body else self.token
        return Minted(
            token=token,
            session_id=expect["session_id"],
            expires_at=NOW + expect["expires_in"],
            lifetime=expect["lifetime"] * SECOND,
            whole=lifetime_of(claims_of(token)),
            extra=expect["extra"],
        )

    def read(self) -> Reply:
        """Read the answer, as the issuer would."""
        return read_answer(self.status, self.headers, self.body, NOW * SECOND, (KEY, FINGERPRINT))


def _claims(offsets: Mapping[str, Any]) -> dict[str, Any]:
    moments = {name: NOW + offsets[name] for name in ("iat", "exp") if name in offsets}
    return {**offsets, **moments}


ALL = [Sample(folder) for folder in sorted(SAMPLES.iterdir())]


@pytest.mark.parametrize("sample", ALL, ids=lambda sample: "-".join((*sample.rows, sample.name)))
def test_sample_means_what_it_says(sample: Sample) -> None:
    """Each stored answer is read as exactly the reply beside it."""
    assert sample.read() == sample.expected


def test_every_code_and_status_of_the_tables_has_a_sample() -> None:
    """No row of the classification stands there untried."""
    replies = [sample.expected for sample in ALL]
    codes = {reply.code for reply in replies if isinstance(reply, Refused | BadKey)}
    statuses = {reply.status for reply in replies if isinstance(reply, Refused)}
    assert set(faults.BY_CODE) - codes == {"RATE_LIMITED"}  # read as Throttled: no code
    assert set(faults.BY_STATUS) == statuses


def test_every_reason_that_an_answer_can_have_has_a_sample() -> None:
    """Reasons that are not in the samples are those of calls without an answer."""
    seen = {reason_of(sample.expected) for sample in ALL}
    silent = {Reason.TIMEOUT, Reason.CONNECT, Reason.DNS, Reason.TLS, Reason.RESET}
    proxies = {Reason.PROXY_CONNECT, Reason.PROXY_AUTH, Reason.PROXY_REFUSED}
    assert set(Reason) - seen == silent | proxies | {Reason.HEADERS_TOO_LARGE}
    assert None in seen


@pytest.mark.parametrize("code", sorted(faults.BY_CODE))
@pytest.mark.parametrize("status", [200, *range(400, 430), 451, 499])
def test_V2_any_code_with_any_status_has_one_meaning(status: int, code: str) -> None:
    """Tables in reverse: what a caller, a key or the memory may learn from each pair."""
    body = json.dumps({"error": {"code": code, "message": "so it is"}}).encode()
    reply = read_answer(status, JSON, body, NOW * SECOND)
    real = faults.BY_CODE[code][0] if status == 200 else status
    if real == 429:
        assert reply == (
            Refused(429, code, "so it is", Scope.NEVER)
            if code == "SESSION_LIMIT"
            else Throttled(None)
        )
    elif code in KEY_CODES:
        bad = real in {401, 403}
        assert reply == (BadKey(code) if bad else Broken(Reason.UNEXPECTED_STATUS))
    elif real not in {400, 402, 403, 404, 409, 410, 422}:
        assert reply == Broken(Reason.UNEXPECTED_STATUS)
    elif real == 400:
        assert reply == Refused(400, code, "so it is", Scope.NEVER)
    elif code == "RATE_LIMITED":
        assert reply == Throttled(None)
    else:
        assert isinstance(reply, Refused)
        assert (reply.status, reply.code) == (real, code)
        assert reply.scope is faults.BY_CODE[code][1]


# --- the request


def test_request_has_agent_and_fingerprint() -> None:
    """Without a model the body holds two fields and nothing else."""
    request = TokenRequest(client="web", agent="A00AAA0000", fingerprint="0Aff-00")
    assert build_request(request) == b'{"agent_id":"A00AAA0000","fingerprint":"0Aff-00"}'


def test_request_has_the_model_when_one_is_asked_for() -> None:
    """Nothing of the client, and no wish for a fresh token, leaves the house."""
    request = TokenRequest(
        client="web", agent="a", fingerprint="beef", model="Essence v2", fresh=True
    )
    assert build_request(request) == b'{"agent_id":"a","fingerprint":"beef","model":"Essence v2"}'


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=256))
def test_fingerprint_arrives_unchanged(fingerprint: str) -> None:
    """Whatever a fingerprint is made of, a JSON parser gets back exactly that."""
    sent = json.loads(build_request(TokenRequest(client="web", agent="a", fingerprint=fingerprint)))
    assert sent == {"agent_id": "a", "fingerprint": fingerprint}


# --- answers nobody has seen

_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(["", "error", "success", "\u202e", jwt({})])
)
_names = st.sampled_from(
    [
        "error", "code", "message", "httpStatus", "status", "status_code", "success", "data",
        "token", "sid", "session_id",
    ]
) | st.text(max_size=8)  # fmt: skip
_documents = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_names, inner, max_size=6),
    max_leaves=20,
)
_codes = st.sampled_from([*sorted(faults.BY_CODE), "Unauthorized", "unauthorized", "X"])
_numbers = st.sampled_from([200, 400, 401, 403, 404, 409, 429, 500])
_marks = {
    "success": st.booleans() | _leaves,
    "status": st.sampled_from(["success", "error"]) | _leaves,
    "status_code": _numbers | _leaves,
}
_details = st.fixed_dictionaries(
    {"code": _codes}, optional={"message": _leaves, "httpStatus": _numbers | _leaves}
)
_data = st.fixed_dictionaries(
    {"token": st.just(jwt({})) | _leaves}, optional={"sid": _leaves, "model": _documents}
)
_envelopes = st.fixed_dictionaries(
    {"error": _details | _codes | _leaves}, optional={**_marks, "data": _data}
) | st.fixed_dictionaries({"data": _data | _leaves}, optional=_marks)
"""Documents that are nearly the vendor's: fields are missing, or of any type."""

_bodies = (
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | _documents.map(lambda document: json.dumps(document).encode())
)
_statuses = _numbers | st.integers(-1, 1000)
_headers = st.dictionaries(
    st.sampled_from(["Date", "Retry-After", "Content-Encoding", "X-RateLimit-Remaining"])
    | st.text(max_size=10),
    st.text(max_size=40),
    max_size=4,
)


def _is_object(body: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(body)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


@given(_statuses, _headers, _bodies)
def test_garbage_is_neither_a_token_nor_a_bad_key(
    status: int, headers: dict[str, str], body: bytes
) -> None:
    """No answer raises; only JSON that says so, with the right status, grants or condemns."""
    _require_grounds(status, _is_object(body), read_answer(status, headers, body, NOW * SECOND))


@settings(max_examples=500)  # one answer in fifteen has consequences
@given(st.sampled_from([200, 401, 403]) | _numbers, _envelopes)
@example(401, {"error": "Unauthorized"})
@example(200, {"data": {"token": "x"}})
def test_what_is_nearly_the_vendors_is_judged_by_what_it_says(
    status: int, document: dict[str, Any]
) -> None:
    """The same for envelopes with fields that are absent, contradict each other, or mistyped."""
    reply = read_answer(status, JSON, json.dumps(document).encode(), NOW * SECOND)
    _require_grounds(status, document, reply)


def _require_grounds(status: int, document: dict[str, Any] | None, reply: Reply) -> None:
    """Require for a reply that has consequences that the answer gave grounds for it."""
    if isinstance(reply, Throttled | Broken):
        return
    assert document is not None
    error = document.get("error")
    match reply:
        case Granted(minted):
            assert status == 200
            assert document["data"]["token"] == minted.token
            assert not error
            assert document.get("success") is not False
            assert document.get("status") != "error"
            assert 0 <= minted.lifetime <= MAX_LIFETIME
            assert json.loads(success_body(minted))["data"]["token"] == minted.token
        case BadKey():
            assert status in {200, 401, 403}
            assert error == "Unauthorized" or document["error"]["code"] in KEY_CODES
        case Refused(real, code):
            assert status in {200, real}
            assert real in {400, 402, 403, 404, 409, 410, 422, 429}
            assert document["error"]["code"] == code


@given(_statuses, _headers, st.text("<>html/ errorUNATHIZD:1", max_size=100))
def test_V3_pages_of_the_edge_never_condemn_the_key(
    status: int, headers: dict[str, str], page: str
) -> None:
    """Text is text, with any status: at most a throttle, else a passing fault."""
    reply = read_answer(status, headers, page.encode(), NOW * SECOND)
    assert isinstance(reply, Throttled if status == 429 else Broken)


@given(_statuses.filter(lambda status: status != 429), st.integers(1, 50))
def test_V4_an_oversized_answer_is_not_even_parsed(status: int, over: int) -> None:
    """Beyond the bound there is no token, whatever the body says."""
    body = json.dumps({"data": {"token": jwt({})}}).encode()
    reply = read_answer(status, JSON, body.ljust(MAX_BODY + over), NOW * SECOND)
    assert isinstance(reply, Broken)


def test_V4_an_answer_of_exactly_the_bound_is_read() -> None:
    """The bound belongs to what is allowed."""
    body = json.dumps({"data": {"token": jwt({})}}).encode()
    assert isinstance(read_answer(200, JSON, body.ljust(MAX_BODY), NOW * SECOND), Granted)


# --- messages


@given(
    before=st.text(max_size=80),
    after=st.text(max_size=80),
    secret=st.text(st.characters(categories=["L", "N", "P"]), min_size=4, max_size=60),
    change=st.sampled_from([str, str.upper, str.lower, str.title]),
)
@example("key ", "", "s\u00dfecret", str.upper)
def test_G7_no_message_shows_a_private_text(
    before: str, after: str, secret: str, change: Callable[[str], str]
) -> None:
    """A message that quotes what is private, in any case, is replaced as a whole."""
    said = f"{before}{change(secret)}{after}"
    reply = _refusal(said, (KEY, secret))
    if secret.casefold() in said.casefold():
        assert reply.message == "the vendor refused this request"
    assert len(reply.message) <= MAX_MESSAGE
    assert reply.message.isprintable()
    assert reply.message.strip() == reply.message != ""


@given(st.integers(6, 64), st.text(" .,;'\"()", min_size=1, max_size=3))
def test_G7_not_even_a_part_of_a_key_is_shown(length: int, end: str) -> None:
    """A prefix, as some APIs quote it, is masked by its looks."""
    reply = _refusal(f"Invalid key {KEY[:length]}{end}", ())
    assert KEY[:6] not in reply.message
    assert reply.message.startswith("Invalid key [...]")


def test_G7_private_text_is_found_across_odd_spaces() -> None:
    """Blanks are made alike on both sides before they are compared."""
    reply = _refusal("no visitor 'two \n words' here", ("two   words",))
    assert reply.message == "the vendor refused this request"


def test_an_empty_private_text_hides_nothing() -> None:
    """A key that is not set is no reason to withhold messages."""
    assert _refusal("Agent not found", ("", " ")).message == "Agent not found"


def _refusal(message: str, private: tuple[str, ...]) -> Refused:
    body = json.dumps({"error": {"code": "NOT_FOUND", "message": message}}).encode()
    reply = read_answer(404, JSON, body, NOW * SECOND, private)
    assert isinstance(reply, Refused)
    return reply


# --- further fields


@given(st.dictionaries(_names, _documents, max_size=30))
def test_further_fields_are_bounded_and_never_ours(fields: dict[str, Any]) -> None:
    """What passes through fits its room, can be encoded, and overrides nothing of ours."""
    body = json.dumps({"data": {**fields, "token": jwt({})}}).encode()
    reply = read_answer(200, JSON, body, NOW * SECOND)
    assert isinstance(reply, Granted)
    extra = reply.minted.extra
    assert extra.keys() <= fields.keys() - {"token", "session_id", "sid", "expires_at"}
    assert (
        len(json.dumps(extra, separators=(",", ":"), ensure_ascii=False).encode()) < 2 * MAX_EXTRA
    )
    assert {**json.loads(success_body(reply.minted))["data"]}.keys() >= extra.keys()


def test_further_fields_share_one_room() -> None:
    """Many small fields are bounded like one large: those that come first stay."""
    fields = {f"field{n:04}": "x" * 50 for n in range(1000)}
    body = json.dumps({"data": {**fields, "token": jwt({})}}).encode()
    reply = read_answer(200, JSON, body, NOW * SECOND)
    assert isinstance(reply, Granted)
    size = sum(
        len(json.dumps({name: value}, separators=(",", ":")))
        for name, value in reply.minted.extra.items()
    )
    assert MAX_EXTRA - 70 < size <= MAX_EXTRA
    assert (
        list(reply.minted.extra)
        == sorted(reply.minted.extra)
        == list(fields)[: len(reply.minted.extra)]
    )


def test_G7_replies_show_no_token() -> None:
    """A reply can be logged: the token is in it as the start of its digest."""
    token = jwt({"exp": NOW})
    body = json.dumps({"data": {"token": token}}).encode()
    assert token not in repr(read_answer(200, JSON, body, NOW * SECOND))
