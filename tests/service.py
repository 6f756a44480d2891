"""A token service over memory and a fake issuer, with everything in reach that a test may turn.

For tests of the story: they run it in virtual time (`broker.testing.run_virtual`).
"""

import asyncio
import random
from collections.abc import Callable

import msgspec

from broker.issue import IssuedToken, TokenService
from broker.limits.policy import LimitPolicy, LimitRule, Limits
from broker.minting import Minter, MintRules
from broker.model import EmbedToken, LimitName, TokenRequest
from broker.pacing.pacer import NoPacing, Pacer
from broker.rules import bucket
from broker.rules.reuse import ReusePolicy
from broker.sessions.memory import MemorySessions
from broker.stores.base import Rejection
from broker.stores.memory import MemoryStore
from broker.stores.token_cache import TokenCache
from broker.telemetry.cells import MetricLayout
from broker.telemetry.metrics import MintMetrics
from broker.testing import FakeClock, FakeIssuer
from broker.testing.issuer import visitor_mark
from broker.units import SECOND

MINUTE = 60 * SECOND

POLICY = ReusePolicy(enabled=True, ahead=15 * MINUTE, floor=5 * MINUTE, outage=MINUTE)
"""The marks that ship."""

AGENT = "A78WKV4515"
VISITOR = "d3adbeef"
TIMEOUT = 12.0
"""Seconds: the deadline that ships."""

Numbers = tuple[float, int]
"""Of a limit: tokens a minute, and burst."""

ROOMY: Numbers = (60_000, 1_000_000)
"""A limit that no test meets by accident."""


def limits(
    fingerprint: Numbers = ROOMY,
    mints: Numbers = ROOMY,
    agent: Numbers = ROOMY,
    client: Numbers | None = None,
) -> Limits:
    """Limits of which only the interesting one needs to be said."""

    def limit_set(name: LimitName, numbers: Numbers) -> LimitPolicy:
        rate, burst = numbers
        return LimitPolicy(name, LimitRule(bucket.limit(rate, MINUTE, burst)), {})

    return Limits(
        fingerprint=limit_set(LimitName.FINGERPRINT, fingerprint),
        fingerprint_mints=limit_set(LimitName.FINGERPRINT_MINTS, mints),
        agent=limit_set(LimitName.AGENT, agent),
        client=None if client is None else limit_set(LimitName.CLIENT, client),
        max_tracked=1_000_000,
    )


class Service:
    """A service and its surroundings."""

    def __init__(
        self,
        clock: FakeClock,
        *,
        limits: Limits = limits(),  # noqa: B008 - frozen
        pacer: Pacer | None = None,
        policy: ReusePolicy = POLICY,
        mint_timeout: float = 20.0,
        max_tokens: int = 200_000,
        draw: Callable[[], float] | None = None,
        store: type[MemoryStore] = MemoryStore,
    ) -> None:
        self.clock = clock
        self.limits = limits
        self.issuer = FakeIssuer()
        self.tokens = TokenCache(
            max_tokens,
            keep_until=lambda token: token.dies_mono - policy.marks(token.lifetime).outage,
            mono=clock.mono,
        )
        self.store = store(limits, self.tokens, clock)
        self.metrics = MintMetrics(MetricLayout(), "local")
        self.session_store = MemorySessions(200_000, clock)
        self.minter = Minter(
            self.store,
            self.session_store,
            self.issuer,
            NoPacing() if pacer is None else pacer,
            MintRules(policy, mint_timeout),
            clock,
            self.metrics,
            draw or random.Random(20).random,
        )
        self.service = TokenService(self.store, self.minter, policy, clock)

    async def issue(
        self, request: TokenRequest, timeout: float = TIMEOUT
    ) -> IssuedToken | Rejection:
        return await self.service.issue(request, timeout)

    async def hand_out(self, request: TokenRequest, timeout: float = TIMEOUT) -> IssuedToken:
        """Issue a token that no limit refuses."""
        answer = await self.service.issue(request, timeout)
        assert isinstance(answer, IssuedToken)
        return answer

    def begin(self, request: TokenRequest, timeout: float = TIMEOUT) -> "asyncio.Task[IssuedToken]":
        """Let somebody ask, and go on."""
        return asyncio.get_running_loop().create_task(self.hand_out(request, timeout))

    @property
    def mints(self) -> int:
        """Calls of the issuer so far."""
        return len(self.issuer.requests)

    def charged(self, name: LimitName, key: str) -> int:
        """Tokens that this bucket has given and not yet got back."""
        limit_set = getattr(self.limits, name.value)
        verdict = self.store.buckets[name].peek(key, limit_set.rule.limit, self.clock.mono())
        return limit_set.rule.limit.burst - verdict.remaining

    def refreshes(self, reason: str, outcome: str) -> int:
        """Renewals counted so."""
        return int(self.metrics.refreshes[reason, outcome].value)

    async def settled(self) -> None:
        """Wait until nothing is under way, and see that nothing was left behind."""
        await self.service.flights.drained()
        assert not self.service.flights._by_key
        assert asyncio.all_tasks() == {asyncio.current_task()}


def visitor(  # noqa: D103 - a request of which only the interesting part needs to be said
    fingerprint: str = VISITOR,
    *,
    agent: str = AGENT,
    model: str | None = None,
    client: str = "web",
    fresh: bool = False,
) -> TokenRequest:
    return TokenRequest(client, agent, fingerprint, model, fresh)


def session_of(token: EmbedToken) -> str:
    """Read the session back out of a ready answer."""
    return msgspec.json.decode(token.body)["data"]["session_id"]


def belongs_to(token: EmbedToken, request: TokenRequest) -> bool:
    """Whether this token was minted for exactly this client, agent, fingerprint and model."""
    return session_of(token).startswith(visitor_mark(request) + "-")
