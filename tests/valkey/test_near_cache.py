"""What is held in front of the server: how long what was read there counts."""

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.model import EmbedToken, Secret, TokenRequest
from broker.sealing import Seal
from broker.stores.base import Lease
from broker.stores.epochs import KnownEnds
from broker.stores.token_cache import TokenCache
from broker.testing import FakeClock
from broker.valkey.client.errors import StoreFailed
from broker.valkey.near_cache import NearCache

HOUR = 3600 * 1_000_000
REQUEST = TokenRequest("web", "A78WKV4515", "9f86d081")
ORIGIN = "a key"


def near_cache(clock: FakeClock) -> NearCache:
    """Make one that holds nothing."""
    cache = TokenCache(10, keep_until=lambda token: token.dies_mono, mono=clock.mono)
    ends = KnownEnds(str.encode, clock.mono)
    seal = Seal(Secret(secrets.token_urlsafe(48)))
    return NearCache(cache, seal, clock, ends, lambda: frozenset({ORIGIN}), _put_back)


def _put_back(*_: object) -> None:
    raise AssertionError("nothing was lost")


@given(lifetime=st.integers(1, HOUR), more=st.integers(-HOUR, 2**53 - HOUR))
def test_a_token_never_lives_longer_than_it_was_made_for(lifetime: int, more: int) -> None:
    """By either clock, whatever the server says is left: others may write there, its clock step."""
    clock = FakeClock()
    near, left = near_cache(clock), max(lifetime + more, 1)
    mono, wall = clock.mono(), clock.wall()
    held = EmbedToken(b"{}", mono + lifetime, wall + lifetime, lifetime, 0, origin=ORIGIN)
    sealed = near.sealed(REQUEST.key, held, Lease(7, 3))
    token = near.adopt(REQUEST, REQUEST.key, b"7", left, b"3", sealed)
    assert token is not None
    assert (token.version, token.epoch, token.lifetime) == (7, 3, lifetime)
    assert token.dies_mono == mono + min(left, lifetime)
    assert token.dies_wall == wall + min(left, lifetime)
    assert near.find(REQUEST.key) is token


def test_one_number_stands_for_what_is_held_and_nothing_else() -> None:
    """G9: a server that says "as you have it" to who has nothing is not believed."""
    near = near_cache(FakeClock())
    with pytest.raises(StoreFailed):
        near.read(REQUEST, REQUEST.key, 0, None)


def test_an_end_that_is_known_here_counts_beside_the_number() -> None:
    """G9: the server has forgotten it, and calls the token in force."""
    clock = FakeClock()
    ends = KnownEnds(str.encode, clock.mono)
    near = near_cache(clock)
    near._ends = ends
    held = EmbedToken(b"{}", HOUR, HOUR, HOUR, 0, version=7, epoch=3, origin=ORIGIN)
    assert near.read(REQUEST, REQUEST.key, 0, held) is held
    ends.note(REQUEST.visitor.encode(), 4)
    assert near.read(REQUEST, REQUEST.key, 0, held) is None
