"""Tokens that begin alike are the tokens that a library would make of all their claims."""

import json
import secrets

import jwt
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from broker.issuers.keyring import Keyring
from broker.issuers.template import Template


class Varying(Struct):
    """Two claims that differ from token to token."""

    unlike_others: str
    number: int


@given(
    st.dictionaries(st.text(min_size=1, max_size=9), st.text(max_size=40), min_size=1, max_size=3),
    st.lists(st.text(max_size=150), min_size=2, max_size=3),
    st.lists(st.sampled_from([32, 63, 64, 65, 100]), min_size=1, max_size=3),
)
def test_what_a_template_signs_is_what_a_library_makes_of_the_claims(
    constant: dict[str, str], varying: list[str], sizes: list[int]
) -> None:
    """Header, both kinds of claims, signature: of one key after another, time after time."""
    keys = {f"key{number}": secrets.token_bytes(size) for number, size in enumerate(sizes)}
    ring = Keyring.of(keys, "key0")
    for key in ring.keys:
        template = Template(key, ring.header_of(key), constant)
        for number, text in enumerate(varying):
            token = template.sign(Varying(text, number))
            read = jwt.api_jws.decode_complete(token, key.secret, ["HS256"])
            claims = {**constant, "unlike_others": text, "number": number}
            assert json.loads(read["payload"]) == claims
            named = {"kid": key.kid} if len(keys) > 1 else {}
            assert read["header"] == {"alg": "HS256", "typ": "JWT", **named}
        assert repr(template) == "Template()"
