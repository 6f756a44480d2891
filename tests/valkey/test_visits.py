"""What a visit asks of the server: ready bytes where they are the same again, others where not."""

import secrets
from collections import defaultdict
from typing import Any

import pytest
from service import limits

from broker.limits.policy import LimitRule
from broker.model import EmbedToken, LimitName, Secret, TokenRequest
from broker.rules.bucket import Limit
from broker.sealing import Seal
from broker.stores.epochs import KnownEnds
from broker.stores.token_cache import TokenCache
from broker.telemetry.counts import BucketCounts
from broker.testing import FakeClock
from broker.valkey.client.errors import StoreFailed
from broker.valkey.key_names import Names
from broker.valkey.near_cache import NearCache
from broker.valkey.visits import Visits, verdict_of

REQUEST = TokenRequest("web", "A78WKV4515", "9f86d081")


class Server:
    """Takes note of what it is asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    permit = 0

    def link(self, _key: bytes) -> "Server":
        return self

    def send_for(self, packed: bytes, _shape: object, _question: object) -> None:
        self.asked.append(packed)


class Scene:
    """Visits to that server; `owed` is what was charged here while it was away."""

    def __init__(self) -> None:
        clock, self.server, self.owed = FakeClock(), Server(), 0
        self.cache = cache = TokenCache(
            10, keep_until=lambda token: token.dies_mono, mono=clock.mono
        )
        seal = Seal(Secret(secrets.token_urlsafe(48)))
        ends = KnownEnds(str.encode, clock.mono)
        nothing: Any = None
        self.visits = Visits(
            self.server,  # type: ignore[arg-type]  # what is used of one
            Names(secrets.token_bytes(32), "fleet"),
            NearCache(cache, seal, clock, ends, frozenset, nothing),
            limits(),
            clock,
            defaultdict[LimitName, BucketCounts](BucketCounts),
            lambda *_: self.owed,
        )

        self.hold(version=1)

    def hold(self, **fields: int) -> None:
        """Hold a token of this version and epoch."""
        self.cache[REQUEST.key] = EmbedToken(b"", 10**12, 10**18, 10**12, 0, **fields)

    def asked(self) -> bytes:
        """Ask, and return what the server is sent."""
        nobody: Any = None
        assert self.visits.start_visit(REQUEST, 0, nobody, nobody)
        return self.server.asked[-1]


@pytest.fixture
def scene() -> Scene:
    """Make one."""
    return Scene()


def test_the_same_visit_is_packed_once(scene: Scene) -> None:
    """By identity: that is what it is kept for."""
    assert scene.asked() is scene.asked()


def test_what_was_charged_meanwhile_is_carried_and_not_kept(scene: Scene) -> None:
    """S3: each call carries what is owed at its moment; when nothing is, none does."""
    before = scene.asked()
    for owed in (5_000_017, 4_000_013):
        scene.owed = owed
        assert b"\r\n%d\r\n" % owed in scene.asked()
    scene.owed = 0
    assert scene.asked() == before


@pytest.mark.parametrize("held", [{"version": 2}, {"version": 1, "epoch": 3}])
def test_another_token_is_asked_for_by_its_own_numbers(scene: Scene, held: dict[str, int]) -> None:
    """The server compares them with what it has: those of the one before would not do."""
    before = scene.asked()
    scene.hold(**held)
    after = scene.asked()
    assert after != before
    assert after.endswith(
        b"".join(b"$1\r\n%d\r\n" % held.get(name, 0) for name in ("version", "epoch"))
    )
    scene.cache.discard(REQUEST.key)
    assert scene.asked().endswith(b"$0\r\n\r\n" * 2)


def test_other_limits_are_asked_for_at_once(scene: Scene) -> None:
    """L11: what is kept belongs to the rule that it was made of."""
    before = scene.asked()
    scene.visits.limits = limits(fingerprint=(7, 7))
    assert scene.asked() != before


def test_a_limit_of_clients_is_a_second_question(scene: Scene) -> None:
    """Which only `admit` asks."""
    nobody: Any = None
    scene.visits.limits = limits(client=(7, 7))
    assert not scene.visits.start_visit(REQUEST, 0, nobody, nobody)
    assert scene.server.asked == []


def test_no_bucket_refuses_who_could_be_served() -> None:
    """S1: a refusal with room for one more is none that the script would say."""
    limit = Limit(burst=5, interval=1_000_000)
    with pytest.raises(StoreFailed):
        verdict_of(4_000_000, limit, allowed=0)
    assert verdict_of(4_000_001, limit, allowed=0).retry_after == 1
    assert verdict_of(4_000_000, limit, allowed=1).remaining == 1


def test_what_is_near_its_limit_or_would_be_refused_is_counted() -> None:
    """L12: as in memory: less than a fifth of the burst left, and refusals that only rehearse."""
    scene = Scene()
    limit = Limit(burst=10, interval=1_000_000)
    rule, counts = LimitRule(limit, dry_run=True), scene.visits._counts
    for wait, allowed, near, denied in (
        (8_000_000, 1, 0, 0),
        (9_000_000, 1, 1, 0),
        (9_000_001, 0, 1, 1),
        (0, 1, 1, 1),
    ):
        visit = scene.visits.read(REQUEST, rule, None, [allowed, wait, b"-1"])
        assert visit.rejection is None
        assert (counts.near.value, counts.dry_run_denied.value) == (near, denied)
