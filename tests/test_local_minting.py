"""Mints that wait for nothing: the same as by way of a flight, without a task."""

import asyncio
import random
import secrets
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from service import AGENT, MINUTE, POLICY, TIMEOUT, limits, visitor

from broker.app import wiring
from broker.clock import SystemClock
from broker.config import load
from broker.errors import RateLimited
from broker.issue import IssuedToken, TokenService
from broker.issuers.keyring import Keyring
from broker.issuers.local import LocalIssuer
from broker.key_backoff import CAP
from broker.limits.policy import Limits
from broker.local_minting import LocalMinter
from broker.minting import Minter, MintRules
from broker.model import Outcome, TokenRequest
from broker.pacing.pacer import NoPacing
from broker.rules.reuse import ReusePolicy
from broker.sessions.memory import MemorySessions
from broker.stores.base import Rejection
from broker.stores.memory import MemoryStore
from broker.stores.token_cache import TokenCache
from broker.telemetry.cells import MetricLayout
from broker.telemetry.metrics import MintMetrics
from broker.testing import FakeClock, run_virtual
from broker.units import SECOND
from broker.wire.responses import data_in

KEY = secrets.token_bytes(32)

TIGHT = limits(fingerprint=(60, 3), mints=(1, 2), agent=(60, 4))


class Signer:
    """A service that signs its tokens; `at_once` or by way of flights."""

    def __init__(
        self,
        clock: FakeClock,
        *,
        at_once: bool,
        limits: Limits = limits(),  # noqa: B008 - frozen
        policy: ReusePolicy = POLICY,
    ) -> None:
        self.clock = clock
        ring = Keyring.of({"a": KEY}, "a")
        self.issuer = LocalIssuer(ring, "embed-token-broker", "embed", clock)
        self.tokens = TokenCache(100, lambda token: token.dies_mono, clock.mono)
        self.store = MemoryStore(limits, self.tokens, clock)
        self.sessions = MemorySessions(100, clock)
        self.metrics = MintMetrics(MetricLayout(), "local")
        rules, draw = MintRules(policy, 20.0), random.Random(20).random
        self.minter: Minter
        if at_once:
            self.minter = LocalMinter(
                self.store, self.sessions, self.issuer, rules, clock, self.metrics, draw
            )
        else:
            self.minter = Minter(
                self.store, self.sessions, self.issuer, NoPacing(), rules, clock, self.metrics, draw
            )
        self.service = TokenService(self.store, self.minter, policy, clock)

    def begin(self, request: TokenRequest) -> object:
        return self.service.begin(request, self.clock.mono())

    def seen(self, result: IssuedToken | Rejection | RateLimited) -> object:
        """Say what a caller and an operator can see, but for what is drawn at random."""
        numbers = [counter.value for counter in self.metrics.refreshes.values()]
        kept = [len(self.tokens), len(self.sessions), len(self.minter.backoff)]
        if not isinstance(result, IssuedToken):
            return result.limit, _seconds(result.verdict.retry_after), numbers, kept
        assert result.verdict is not None
        token, left = result.token, result.verdict.remaining
        times = [*map(_seconds, (result.left, result.wall, token.dies_mono, token.dies_wall))]
        held = token.lifetime, token.mark, token.version, token.epoch, token.origin
        session = self.sessions._sessions.get(data_in(token.body).session_id)
        assert session is not None
        of = session.client, session.agent, session.fingerprint, session.model, session.digest
        lives = session.expires - session.issued
        return result.outcome, left, times, held, of, lives, numbers, kept


def _seconds(span: int) -> int:
    """Round: a turn of the virtual loop takes a microsecond, and a flight takes some."""
    return (span + SECOND // 4) // SECOND


_VISITORS = st.sampled_from(["d3adbeef", "0badcafe", "feedf00d"])

_STEPS = st.one_of(
    st.tuples(st.just("request"), _VISITORS, st.booleans()),
    st.tuples(st.just("end"), _VISITORS, st.just(False)),
    st.tuples(st.just("pass"), st.integers(0, 300).map(str), st.just(False)),
)

PASSES = 7.3
"""Seconds; no multiple is a mark of reuse, nor three quarters, where `_seconds` goes up."""


@given(st.lists(_STEPS, max_size=30), st.booleans(), st.booleans())
def test_at_once_a_mint_is_what_it_is_in_a_flight(
    steps: list[tuple[str, str, bool]],
    tight: bool,
    reuses: bool,
) -> None:
    """Tokens, limits, refusals, sessions, counts: after any history, at the same moments."""
    policy = POLICY if reuses else ReusePolicy(False, 15 * MINUTE, 5 * MINUTE, MINUTE)
    bounds, histories = TIGHT if tight else limits(), []

    async def main(clock: FakeClock) -> None:
        signer = Signer(clock, at_once=not histories, limits=bounds, policy=policy)
        seen = []
        for step, what, fresh in steps:
            if step == "pass":
                clock.advance(int(what) * PASSES)
            elif step == "end":
                await signer.store.revoke_visitor("web", what)
            else:
                result: IssuedToken | Rejection | RateLimited
                try:
                    result = await signer.service.issue(visitor(what, fresh=fresh), TIMEOUT)
                except RateLimited as error:
                    result = error
                await signer.service.flights.drained()
                seen.append(signer.seen(result))
        histories.append(seen)

    run_virtual(main)
    run_virtual(main)
    assert histories[0] == histories[1]


def test_a_mint_that_waits_for_nothing_is_made_within_the_request() -> None:
    """Not even a loop runs; the token is reused, recorded, and good."""
    signer = Signer(FakeClock(), at_once=True)
    made, again = signer.begin(visitor()), signer.begin(visitor())
    assert isinstance(made, IssuedToken)
    assert isinstance(again, IssuedToken)
    assert (made.outcome, again.outcome) == (Outcome.MINTED, Outcome.REUSED)
    assert again.token is made.token
    assert (len(signer.sessions), len(signer.service.flights)) == (1, 0)


def test_a_limit_on_mints_refuses_within_the_request() -> None:
    """As a value, and the visitor's next request goes by what was spent."""
    signer = Signer(FakeClock(), at_once=True, limits=limits(mints=(1, 1)))
    assert isinstance(signer.begin(visitor()), IssuedToken)
    refused = signer.begin(visitor(fresh=True))
    assert isinstance(refused, Rejection)
    assert refused.limit.value == "fingerprint_mints"
    assert isinstance(signer.begin(visitor()), IssuedToken), "the token of before is still there"


def test_a_flight_that_is_under_way_is_joined() -> None:
    """A renewal in the background has begun: who insists on a fresh token gets that one."""

    async def main(clock: FakeClock) -> None:
        signer = Signer(clock, at_once=True)
        made = signer.begin(visitor())
        assert isinstance(made, IssuedToken)
        clock.advance((made.left - 6 * MINUTE) / SECOND)
        ahead = asyncio.create_task(signer.service.issue(visitor(), TIMEOUT))
        await asyncio.sleep(0)
        assert visitor().key in signer.service.flights
        fresh = await signer.service.issue(visitor(fresh=True), TIMEOUT)
        assert isinstance(fresh, IssuedToken)
        assert fresh.outcome is Outcome.COALESCED
        assert isinstance(await ahead, IssuedToken)
        assert len(signer.sessions) == 2

    run_virtual(main)


def test_a_key_whose_mint_met_a_defect_backs_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next request waits its time in a flight; the one after it is served at once again."""

    async def main(clock: FakeClock) -> None:
        signer = Signer(clock, at_once=True)
        with monkeypatch.context() as broken:
            broken.setattr(signer.issuer, "sign", _fail)
            with pytest.raises(ZeroDivisionError):
                signer.begin(visitor())
        assert signer.minter.backoff.failures(visitor().key) == 1
        signer.minter.backoff._failing[visitor().key].not_before = clock.mono() + SECOND
        before = clock.mono()
        made = await signer.service.issue(visitor(), TIMEOUT)
        assert isinstance(made, IssuedToken)
        assert clock.mono() - before >= SECOND
        assert isinstance(signer.begin(visitor(fresh=True)), IssuedToken)

    run_virtual(main)


def test_a_mint_at_once_ends_the_row_of_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose next failure is the first again: it doubles no wait."""
    clock = FakeClock()
    signer, key = Signer(clock, at_once=True), visitor().key
    for _ in range(3):
        with monkeypatch.context() as broken:
            broken.setattr(signer.issuer, "sign", _fail)
            with pytest.raises(ZeroDivisionError):
                signer.begin(visitor(fresh=True))
        assert signer.minter.backoff.failures(key) == 1
        clock.advance(CAP / SECOND)
        assert isinstance(signer.begin(visitor(fresh=True)), IssuedToken)
        assert signer.minter.backoff.failures(key) == 0


def _fail(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("store", "budget", "at_once"),
    [("memory", False, True), ("memory", True, False), ("sqlite", False, True)],
)
def test_what_is_put_together_mints_at_once_where_it_can(
    tmp_path: Path, store: str, *, budget: bool, at_once: bool
) -> None:
    """A budget makes a signature wait, a file does not; an agent's mints are paced by its limit."""
    tree = {
        "clients": {"web": {"secret": secrets.token_urlsafe(24), "agents": [AGENT]}},
        "issuer": {"local": {"keys": {"a": {"secret": secrets.token_urlsafe(48)}}}},
        "store": {"url": "memory://" if store == "memory" else f"sqlite://{tmp_path}/state.db"},
    }
    if budget:
        tree["issuer"]["budget"] = {"rate": 60}

    async def main() -> bool:
        parts = wiring.build(load.from_tree(tree), {}, SystemClock(), None)
        return isinstance(parts.minter, LocalMinter)

    assert asyncio.run(main()) is at_once
