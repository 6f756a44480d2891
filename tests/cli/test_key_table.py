"""`broker keys list`: what the table says of each key at any moment."""

import re
import secrets

from hypothesis import given
from hypothesis import strategies as st

from broker.cli.key_table import rows
from broker.issuers.keyring import NEVER, Key, Keyring
from broker.units import SECOND

NOW = 1_900_000_000
"""Unix seconds: 2030-03-17 17:46:40 UTC."""

moments = st.integers(-2, 2).map(lambda n: (NOW + n) * SECOND)


@given(
    begins=st.lists(moments, min_size=1, max_size=4),
    ends=st.lists(st.one_of(st.just(NEVER), moments), min_size=4, max_size=4),
)
def test_each_key_is_in_the_state_that_its_times_say(begins: list[int], ends: list[int]) -> None:
    """One signs; others verify, will sign, or have ended; each date is that of the key."""
    keys = [
        Key(f"key{n}", secrets.token_bytes(32), signs_from=begin, verifies_until=max(begin, end))
        for n, (begin, end) in enumerate(zip(begins, ends, strict=False))
    ]
    ring = Keyring(keys)
    signing = ring.signing(NOW * SECOND)
    lines = list(rows(ring, NOW))
    assert len(lines) == len(keys)
    for key, line in zip(ring.keys, lines, strict=True):
        name, state = line[:24].rstrip(), line[24:]
        assert name == key.kid
        assert state == _expected(key, signing), key


def _expected(key: Key, signing: str) -> str:
    until = f"verifies until {_date(key.verifies_until)}"
    ends = key.verifies_until != NEVER
    if key.kid == signing:
        return f"signs; {until}" if ends else "signs"
    if key.signs_from > NOW * SECOND:
        return f"verifies; signs from {_date(key.signs_from)}"
    if key.verifies_until <= NOW * SECOND:
        return f"ended {_date(key.verifies_until)}"
    return until if ends else "verifies"


def _date(us: int) -> str:
    """Write a moment of these few seconds; "" for one that is none of them."""
    return f"2030-03-17 17:46:{us // SECOND - NOW + 40} UTC"


def test_a_key_that_never_signs_only_verifies() -> None:
    """It has no beginning that could be told."""
    old = Key("old", secrets.token_bytes(32), signs_from=NEVER, verifies_until=NEVER)
    new = Key("new", secrets.token_bytes(32), signs_from=0, verifies_until=NEVER)
    shown = dict(re.split(" +", line, maxsplit=1) for line in rows(Keyring([old, new]), NOW))
    assert shown == {"old": "verifies", "new": "signs"}
