"""From bytes to a request, or to an error that names field, rule and remedy and quotes nothing."""

import json
import secrets
import uuid
from collections.abc import Callable
from contextlib import suppress

import pytest
from edge import AGENT, Edge, serving, visitor
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BrokerError, Invalid, MissingParam
from broker.model import TokenRequest
from broker.wire import known_bodies
from broker.wire import request as wire
from broker.wire.known_bodies import KnownBodies

GOOD = b'{"agent_id":"A1","fingerprint":"abcd"}'

HEX = st.text("0123456789abcdefABCDEF", min_size=4, max_size=128)
TRACE = f"00-{'a' * 32}-{'b' * 16}-01"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=20,
)


def parse(body: bytes | str | dict[str, object], *, any_fingerprint: bool = False) -> TokenRequest:
    """Parse a body that is given as bytes, text or fields."""
    if isinstance(body, dict):
        body = json.dumps(body)
    data = body.encode() if isinstance(body, str) else body
    return wire.parse(data, "web", any_fingerprint=any_fingerprint)


def refusal(body: bytes | str | dict[str, object], *, any_fingerprint: bool = False) -> str:
    """Return class and message of the error that this body causes."""
    with pytest.raises((Invalid, MissingParam)) as caught:
        parse(body, any_fingerprint=any_fingerprint)
    return f"{type(caught.value).__name__}: {caught.value.message}"


class TestGood:
    def test_the_whole_request(self) -> None:
        """Every field arrives as it was sent; unknown ones are ignored."""
        body = {
            "agent_id": "A1_-z",
            "fingerprint": "ABCDef0123",
            "model": "essence 2",
            "fresh": True,
            "ttl": 60,
            "agentId": "other",
        }
        assert parse(body) == TokenRequest("web", "A1_-z", "ABCDef0123", "essence 2", fresh=True)
        assert parse('{"agent_id":"a","fingerprint":"abcd"}') == TokenRequest(
            "web", "a", "abcd", None
        )

    def test_the_last_of_two_equal_keys_wins(self) -> None:
        """As every JSON library of the callers has it: no second reading of one body."""
        body = (
            '{"agent_id":"first","fingerprint":"aaaa","fresh":true,"model":"m",'
            '"agent_id":"last","fingerprint":"bbbb","fresh":false,"model":null}'
        )
        assert parse(body) == TokenRequest("web", "last", "bbbb", None)

    @pytest.mark.parametrize(
        ("given", "kept"),
        [
            (TRACE, True),
            (f"{TRACE}-what-comes-later", False),
            (f"{TRACE}-", False),
            (f"{TRACE}\n", False),
            (f" {TRACE}", False),
            (TRACE.upper(), False),
            (TRACE.replace("00-", "ff-", 1), False),
            (f"00-{'0' * 32}-{'b' * 16}-01", False),
            (f"00-{'a' * 32}-{'0' * 16}-01", False),
            (TRACE[:-1], False),
            (f"{TRACE},{TRACE}", False),
        ],
    )
    def test_a_traceparent_is_passed_on_whole_or_not_at_all(self, given: str, kept: bool) -> None:
        """W3C Trace Context, section 3.2.2: no tail, no zeros, no version ff, no capitals.

        Sees a `match` where `fullmatch` stands: what follows would reach the vendor's header.
        """
        body = json.dumps({"agent_id": "a", "fingerprint": "abcd"}).encode()
        request = wire.parse(body, "web", any_fingerprint=False, traceparent=given)
        assert request.traceparent == (given if kept else "")

    @pytest.mark.parametrize("agent", ["a", "A78WKV4515", "a-b_c", "x" * 64, "-", "_", "0"])
    def test_agents(self, agent: str) -> None:
        """1 to 64 of a URL-safe alphabet."""
        assert parse({"agent_id": agent, "fingerprint": "abcd"}).agent == agent

    @given(HEX)
    def test_hex_fingerprints_pass_byte_for_byte(self, fingerprint: str) -> None:
        """Opaque: case and length stay, since the vendor keys a memory by the exact bytes."""
        assert parse({"agent_id": "a", "fingerprint": fingerprint}).fingerprint == fingerprint

    @given(st.uuids(), st.booleans())
    def test_uuids_pass_with_their_hyphens(self, value: uuid.UUID, upper: bool) -> None:
        """A UUID is what many sites have already."""
        text = str(value).upper() if upper else str(value)
        assert parse({"agent_id": "a", "fingerprint": text}).fingerprint == text

    @given(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=256))
    def test_any_fingerprint_is_any_printable_one(self, fingerprint: str) -> None:
        """With `fingerprint_format = "any"`, still byte for byte."""
        body = {"agent_id": "a", "fingerprint": fingerprint}
        assert parse(body, any_fingerprint=True).fingerprint == fingerprint

    @pytest.mark.parametrize("model", ["m", "essence", "x" * 64, "é", "a b"])
    def test_models(self, model: str) -> None:
        """1 to 64 printable characters, passed through."""
        body = {"agent_id": "a", "fingerprint": "abcd", "model": model}
        assert parse(body).model == model


HEX_RULE = (
    "Invalid: fingerprint: must be 4 to 128 hex digits or a UUID, one stable value per device;"
    ' the broker\'s operator can set [limits] fingerprint_format = "any"'
)
ANY_RULE = "Invalid: fingerprint: must be 1 to 256 printable characters"
AGENT_RULE = (
    "Invalid: agent_id: must be 1 to 64 of A-Z a-z 0-9 _ -;"
    " send the agent's code as the vendor shows it"
)
MODEL_RULE = "Invalid: model: must be 1 to 64 printable characters; leave it out for the default"
NOT_JSON = "Invalid: body: not valid JSON in UTF-8; send an object with agent_id and fingerprint"
NOT_OBJECT = "Invalid: body: must be a JSON object with agent_id and fingerprint"


class TestBad:
    @pytest.mark.parametrize(
        "fingerprint",
        [
            *("", "abc", "a" * 129, "abcg", "anonymous", "ab-cd", "abcd\n", " abcd", "0x1234"),
            "-" * 36,
            "9f86d081-884c-4d65-9a2f-eaa0c55ad01",
            "{9f86d081884c7d65}",
            "\uff41\uff42\uff43\uff44",
        ],
    )
    def test_what_is_not_hex_is_told_the_setting(self, fingerprint: str) -> None:
        """The message names the operator's way out; constants such as "anonymous" are caught."""
        assert refusal({"agent_id": "a", "fingerprint": fingerprint}) == HEX_RULE

    @pytest.mark.parametrize("fingerprint", ["", "x" * 257, "a\nb", "\u202ea", "\x7f", "\u200b"])
    def test_any_is_not_everything(self, fingerprint: str) -> None:
        """Control, bidi and invisible characters would make two visitors look like one."""
        body = {"agent_id": "a", "fingerprint": fingerprint}
        assert refusal(body, any_fingerprint=True) == ANY_RULE

    @pytest.mark.parametrize("agent", ["", "x" * 65, "a b", "a/b", "a\n", "é", "a\x00", "\u0430"])
    def test_agents(self, agent: str) -> None:
        """Also a Cyrillic letter that looks like an a."""
        assert refusal({"agent_id": agent, "fingerprint": "abcd"}) == AGENT_RULE

    @pytest.mark.parametrize("model", ["", "x" * 65, "a\nb", "\u202ea", "\x1b[31m"])
    def test_models(self, model: str) -> None:
        """Printable only, like everything that goes on to the vendor."""
        body = {"agent_id": "a", "fingerprint": "abcd", "model": model}
        assert refusal(body) == MODEL_RULE

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("agent_id", 1, "agent_id: expected str, got int"),
            ("agent_id", None, "agent_id: expected str, got null"),
            ("agent_id", ["a"], "agent_id: expected str, got array"),
            ("fingerprint", {"a": 1}, "fingerprint: expected str, got object"),
            ("fingerprint", True, "fingerprint: expected str, got bool"),
            ("model", 5, "model: expected str | null, got int"),
            ("fresh", "true", "fresh: expected bool, got str"),
            ("fresh", 1, "fresh: expected bool, got int"),
            ("fresh", None, "fresh: expected bool, got null"),
        ],
    )
    def test_wrong_types(self, field: str, value: object, message: str) -> None:
        """Nothing is converted: "true" is not true."""
        body = {"agent_id": "a", "fingerprint": "abcd", field: value}
        assert refusal(body) == f"Invalid: {message}"

    @pytest.mark.parametrize("body", ["null", "[]", "1", '"agent_id"', "true", "[" * 8000])
    def test_not_an_object(self, body: str) -> None:
        """However deep it is nested."""
        assert refusal(body) == NOT_OBJECT

    @pytest.mark.parametrize(
        "body",
        [
            b'{"agent_id":"a","x":' + b"[" * 4000 + b"]" * 4000 + b"}",
            b'{"agent_id":"a","x":' + b'{"a":' * 1600 + b"1" + b"}" * 1600 + b"}",
        ],
        ids=range(2),
    )
    def test_O3_deep_nesting_is_an_error_of_the_caller_s(self, body: bytes) -> None:
        """Where the interpreter's stack reaches to its end (3.13), what is nested is ignored."""
        assert refusal(body).startswith(("Invalid: body", "MissingParam: fingerprint"))

    @pytest.mark.parametrize(
        "body",
        [
            b"{",
            b"agent_id=a&fingerprint=abcd",
            b"{'agent_id': 'a'}",
            b'{"agent_id":"a","fingerprint":"abcd"} {}',
            b'{"agent_id":"a","fingerprint":"abcd",}',
            b'{"agent_id":"a","fingerprint":"abcd","x":NaN}',
            b'{"agent_id":"a","fingerprint":"abcd","x":Infinity}',
            b'{"agent_id":"\\ud800","fingerprint":"abcd"}',
            b'{"agent_id":"a","fingerprint":"\\udc00abcd"}',
            b'{"agent_id":"a","fingerprint":"ab\x00cd"}',
            b'\x00{"agent_id":"a","fingerprint":"abcd"}',
            b'\xef\xbb\xbf\xef\xbb\xbf{"agent_id":"a","fingerprint":"abcd"}',
            b' \xef\xbb\xbf{"agent_id":"a","fingerprint":"abcd"}',
            '{"agent_id":"a","fingerprint":"abcd"}'.encode("utf-16"),
            b'{"agent_id":"\xff\xfe","fingerprint":"abcd"}',
        ],
        ids=range(15),
    )
    def test_O3_malformed_json(self, body: bytes) -> None:
        """NaN, lone surrogates, NUL, other encodings."""
        assert refusal(body) == NOT_JSON

    @pytest.mark.parametrize("body", [b"", b" ", b"\r\n\t ", b"\xef\xbb\xbf"])
    def test_an_empty_body_is_told_so(self, body: bytes) -> None:
        """The most common mistake of a first attempt."""
        assert refusal(body) == (
            "MissingParam: agent_id: required; the body is empty, send a JSON object"
        )

    @given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
    def test_no_body_causes_anything_else(self, body: bytes) -> None:
        """Any bytes at all: a request, or one of the two errors."""
        with suppress(Invalid, MissingParam):
            parse(body)

    @pytest.mark.parametrize(
        "place",
        [
            lambda canary: {"agent_id": f"{canary}/", "fingerprint": "abcd"},
            lambda canary: {"agent_id": "a", "fingerprint": canary + "!"},
            lambda canary: {"agent_id": "a", "fingerprint": "abcd", "model": canary + "\n"},
            lambda canary: {"agent_id": "a", "fingerprint": "abcd", "fresh": canary},
            lambda canary: {"agent_id": {canary: 1}, "fingerprint": "abcd"},
            lambda canary: {"agent_id": "a", canary: "abcd"},
            lambda canary: f'{{"agent_id":"{canary}',
            lambda canary: canary,
            lambda canary: [canary],
        ],
    )
    def test_G7_no_message_quotes_what_was_sent(self, place: Callable[[str], object]) -> None:
        """It may be a secret in the wrong field."""
        canary = secrets.token_urlsafe(16)
        sent = place(canary)
        body = sent if isinstance(sent, str) else json.dumps(sent)
        for any_fingerprint in (False, True):
            error = _error_of(body, any_fingerprint=any_fingerprint)
            if error is not None:
                assert canary not in f"{error.message}{error!r}{error}"
                assert error.__cause__ is None
                assert error.__context__ is None or error.__suppress_context__


def _error_of(body: str, *, any_fingerprint: bool) -> BrokerError | None:
    try:
        parse(body, any_fingerprint=any_fingerprint)
    except BrokerError as error:
        return error
    return None


async def test_the_setting_reaches_the_route() -> None:
    """`[limits] fingerprint_format` decides which of the two rules is in force."""
    async with serving({"limits": {"fingerprint_format": "any"}}) as edge:
        assert (await edge.request_token("visitor 7")).status == 200
        assert (await edge.request_token("\u202e")).message == ANY_RULE.removeprefix("Invalid: ")
    async with serving({"limits": {"fingerprint_format": "hex"}}) as edge:
        assert (await edge.request_token("visitor 7")).message == HEX_RULE.removeprefix("Invalid: ")


async def test_the_last_of_two_equal_keys_wins_on_the_wire(edge: Edge) -> None:
    """The token is for the last agent, not for the first."""
    fingerprint = visitor()
    body = f'{{"agent_id":"first","agent_id":"{AGENT}","fingerprint":"{fingerprint}","x":[{{}}]}}'
    reply = await edge.post(body.encode())
    assert reply.body == (await edge.request_token(fingerprint)).body


class TestKnownBodies:
    def read(
        self,
        bodies: KnownBodies,
        body: bytes,
        *,
        client: str = "web",
        any_fingerprint: bool = False,
    ) -> TokenRequest:
        read = bodies.read(body, client, any_fingerprint=any_fingerprint)
        if isinstance(read, BrokerError):
            raise read
        return read

    def test_the_same_bytes_mean_the_same_for_another_request(self) -> None:
        """Its client is its own, and no id or trace of a request is kept."""
        bodies, body = KnownBodies(), b'{"agent_id":"A1","fingerprint":"abcd","fresh":true}'
        for client in ("web", "app", "app", "web"):
            request = self.read(bodies, body, client=client)
            assert request == TokenRequest(client, "A1", "abcd", None, True)
        assert self.read(bodies, body, client="web") is request
        sent = request.sent_with("id", TRACE)
        assert sent == TokenRequest("web", "A1", "abcd", None, True, "id", TRACE)
        assert (sent.key is request.key, request.request_id, request.traceparent) == (True, "", "")
        assert len(bodies) == 1

    @given(
        st.lists(
            st.tuples(
                st.sampled_from([b"{}", b"[", b'{"agent_id":"A1","fingerprint":"no hex"}', GOOD]),
                st.sampled_from(["web", "app"]),
                st.booleans(),
            )
        )
    )
    def test_each_is_what_it_is_when_it_is_read(self, given: list[tuple[bytes, str, bool]]) -> None:
        """Good or wrong, and wrong in the same way, whatever came before."""
        bodies = KnownBodies()
        for body, client, any_fingerprint in given:
            read = bodies.read(body, client, any_fingerprint=any_fingerprint)
            if body != GOOD and not (any_fingerprint and b"no hex" in body):
                with pytest.raises(BrokerError) as wrong:
                    wire.parse(body, client, any_fingerprint=any_fingerprint)
                assert isinstance(read, BrokerError)
                assert (type(read), read.message) == (wrong.type, wrong.value.message)
            else:
                assert read == wire.parse(body, client, any_fingerprint=any_fingerprint)

    def test_G6_wrong_ones_push_out_nothing_and_hold_on_to_nothing(self) -> None:
        """They have a small table of their own; an error there has no frames of a request."""
        bodies = KnownBodies()
        good = self.read(bodies, GOOD)
        first = bodies.read(b'{"n":"0"}', "web", any_fingerprint=False)
        assert bodies.read(b'{"n":"0"}', "app", any_fingerprint=False) is first
        for number in range(10 * known_bodies.MAX_WRONG):
            error = bodies.read(b'{"n":"%d"}' % number, "web", any_fingerprint=False)
            assert isinstance(error, BrokerError)
            assert (error.__traceback__, error.__context__, error.__cause__) == (None,) * 3
        assert len(bodies._wrong) <= 2 * known_bodies.MAX_WRONG
        padded = b"{" + b" " * known_bodies.LONGEST
        first = bodies.read(padded, "web", any_fingerprint=False)
        assert bodies.read(padded, "web", any_fingerprint=False) is not first
        assert self.read(bodies, GOOD) is good

    def test_a_looser_rule_leaves_nothing_behind_for_a_stricter_one(self) -> None:
        """A reload may turn `fingerprint_format` from "any" to "hex"."""
        bodies, body = KnownBodies(), b'{"agent_id":"A1","fingerprint":"no hex"}'
        for _ in range(2):
            assert self.read(bodies, body, any_fingerprint=True).fingerprint == "no hex"
            with pytest.raises(Invalid):
                self.read(bodies, body)

    def test_G6_they_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two generations; what is asked for stays; long ones are read each time."""
        monkeypatch.setattr(known_bodies, "MAX_KNOWN", 10)
        bodies = KnownBodies()
        template = '{"agent_id":"A1","fingerprint":"%08x"}'
        for number in range(100):
            assert self.read(bodies, (template % number).encode()).fingerprint == f"{number:08x}"
            assert self.read(bodies, (template % 0).encode()).fingerprint == "0" * 8
        assert len(bodies) <= 20
        assert (template % 0).encode() in bodies._young
        padded = (template % 1).encode() + b" " * known_bodies.LONGEST
        assert self.read(bodies, padded).fingerprint == "00000001"
        assert padded not in bodies._young
