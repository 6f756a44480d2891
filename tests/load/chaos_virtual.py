"""The virtual half of `chaos`: hours of a relay's life in minutes, before a vendor made of timers.

The story, the budget, the relay and the stores in memory are the real ones; the vendor's client is
replaced by a simulation that keeps what a network keeps: what was sent while the vendor stands
still arrives when it goes on, also if its caller has gone.
"""

import asyncio
import gc
import logging
import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping

import jwt
import msgspec
import structlog
from multidict import CIMultiDict

from broker.errors import BrokerError
from broker.issue import IssuedToken, TokenService
from broker.issuers.upstream import UpstreamIssuer
from broker.issuers.vendor.client import Answer, CallFailed
from broker.limits.policy import LimitPolicy, LimitRule, Limits
from broker.minting import Minter, MintRules
from broker.model import LimitName, Secret, TokenRequest
from broker.pacing.pacer import BudgetPacer
from broker.pacing.slots import Budget
from broker.rules import bucket
from broker.rules.reuse import ReusePolicy
from broker.sessions.memory import MemorySessions
from broker.stores.memory import MemoryStore
from broker.stores.token_cache import TokenCache
from broker.telemetry.cells import MetricLayout
from broker.telemetry.labels import Reason
from broker.telemetry.metrics import MintMetrics, UpstreamMetrics
from broker.testing import FakeClock, run_virtual
from broker.testing.vendor.mint import visitor_mark
from broker.units import SECOND

AGENT = "A78WKV4515"
ALLOWED, MINUTE = 120, 60 * SECOND
SHIPPED = Budget(rate=106, per=60, burst=8, max_wait=8)
POLICY = ReusePolicy(enabled=True, ahead=15 * MINUTE, floor=5 * MINUTE, outage=MINUTE)
LIFETIME = 3600

KNOWN, NEWCOMERS, RATE = 5000, 0.05, 2.5
"""Visitors who come back, the share of requests of somebody new, requests a second: as much as the
budget can just serve."""

TIMEOUT = 12.0
"""Seconds of a caller."""

STALLS = (1.0, 5.0, 30.0, 90.0)
"""Seconds that the vendor stands still."""

GROWTH, SETTLED = 1.3, 1 / 6
"""Live objects at the end against those after the first sixth of the run."""


class SimulatedVendor:
    """Takes the place of the vendor's client; times are the loop's."""

    base_url = "https://vendor.invalid"
    timeout = 10.0

    def __init__(self, clock: FakeClock, chance: random.Random) -> None:
        self._clock, self._chance = clock, chance
        self._key = "k" * 32
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._minted = 0
        self.fault = ""
        self.arrivals: list[float] = []

    async def mint(
        self,
        _key: Secret,
        body: bytes,
        _headers: Mapping[str, str],
        arrived: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Answer like the vendor, some time; raises CallFailed."""
        if self.fault == "refused":
            raise CallFailed(Reason.CONNECT)
        arriving = asyncio.ensure_future(self._arrive())  # goes on when the caller has gone
        await asyncio.shield(arriving)
        await asyncio.sleep(self._chance.uniform(0.02, 0.4))
        if self.fault == "reset":
            raise CallFailed(Reason.RESET)
        if self.fault == "hang":
            await asyncio.sleep(1000)
        if self.fault == "slow":
            await asyncio.sleep(self._chance.uniform(1, 12))
        arrived()
        return self._answer(msgspec.json.decode(body))

    async def close(self) -> None:
        """Nothing is open."""

    async def stand_still(self, seconds: float) -> None:
        """Read nothing for so long, then everything."""
        self._goes_on.clear()
        await asyncio.sleep(seconds)
        self._goes_on.set()

    async def _arrive(self) -> None:
        await asyncio.sleep(self._chance.uniform(0.001, 0.05))
        await self._goes_on.wait()
        self.arrivals.append(asyncio.get_running_loop().time())

    def _answer(self, asked: dict[str, str]) -> Answer:
        if self.fault == "unavailable":
            return Answer(503, CIMultiDict(), b"{}")
        if self.fault == "throttled":
            self.fault = ""
            error = {"error": {"code": "RATE_LIMITED", "message": "slow down", "httpStatus": 429}}
            return Answer(429, CIMultiDict({"Retry-After": "4"}), msgspec.json.encode(error))
        self._minted += 1
        session = f"{visitor_mark(asked['agent_id'], asked['fingerprint'])}-{self._minted}"
        issued = self._clock.wall() // SECOND
        claims = {"sid": session, "iat": issued, "exp": issued + LIFETIME}
        data = {"token": jwt.encode(claims, self._key, "HS256"), "sid": session}
        said = {"status": "success", "status_code": 200, "data": data}
        return Answer(200, CIMultiDict(), msgspec.json.encode(said))


class Site:
    """The broker's parts, as the application puts them together for a relay."""

    def __init__(self, clock: FakeClock, vendor: SimulatedVendor, chance: random.Random) -> None:
        self.clock = clock
        self.pacer = BudgetPacer(SHIPPED, lambda _seconds: None)
        self.issuer = UpstreamIssuer(
            vendor,  # type: ignore[arg-type]  # stands in for the client
            [Secret("vendor-key-of-a-simulation")],
            self.pacer,
            clock,
            UpstreamMetrics(MetricLayout(), shown=True),
            chance.random,
        )
        tokens = TokenCache(
            200_000,
            keep_until=lambda token: token.dies_mono - POLICY.marks(token.lifetime).outage,
            mono=clock.mono,
        )
        self.store = MemoryStore(_limits(), tokens, clock)
        self.session_store = MemorySessions(200_000, clock)
        metrics = MintMetrics(MetricLayout(), "upstream")
        rules = MintRules(POLICY, 24.0)
        minter = Minter(
            self.store,
            self.session_store,
            self.issuer,
            self.pacer,
            rules,
            clock,
            metrics,
            chance.random,
        )
        self.service = TokenService(self.store, minter, POLICY, clock)

    async def do_rounds(self) -> None:
        """Do twice a second what the application does."""
        while True:
            await asyncio.sleep(0.5)
            self.store.purge_expired()
            self.session_store.purge_expired()


def _limits() -> Limits:
    def limit_set(name: LimitName, rate: int, burst: int) -> LimitPolicy:
        return LimitPolicy(name, LimitRule(bucket.limit(rate, MINUTE, burst)), {})

    return Limits(
        fingerprint=limit_set(LimitName.FINGERPRINT, 60, 20),
        fingerprint_mints=limit_set(LimitName.FINGERPRINT_MINTS, 6, 6),
        agent=limit_set(LimitName.AGENT, 6000, 1000),
        client=None,
        max_tracked=1_000_000,
    )


class Run:
    """One run: a crowd, harms, and what was found."""

    def __init__(self, clock: FakeClock, hours: float, seed: int) -> None:
        self._clock = clock
        self._seconds = hours * 3600
        self._chance = random.Random(seed)
        self.vendor = SimulatedVendor(clock, self._chance)
        self._site = Site(clock, self.vendor, self._chance)
        self._known = [f"{number:032x}" for number in range(KNOWN)]
        self._tasks: set[asyncio.Task[None]] = set()
        self.answers: Counter[str] = Counter()
        self.harms: Counter[str] = Counter()
        self.objects: list[int] = []
        self.wrong: list[str] = []

    async def live(self) -> None:
        """Let all of it happen."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._seconds
        await self._site.pacer.start()
        beside = [
            loop.create_task(work)
            for work in (self._site.do_rounds(), self._harm(), self._count_objects())
        ]
        while loop.time() < ends and not any(task.done() for task in beside):
            newcomer = self._chance.random() < NEWCOMERS
            visitor = self._chance.randbytes(16).hex() if newcomer else self._familiar()
            task = loop.create_task(self._request_token(visitor))
            self._tasks.add(task)
            task.add_done_callback(self._answered)
            await asyncio.sleep(self._chance.expovariate(RATE))
        for task in beside:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*beside, *self._tasks, return_exceptions=True)
        await self._site.service.flights.close()
        await self._site.pacer.close()
        await self._site.issuer.close()

    def _answered(self, task: asyncio.Task[None]) -> None:
        """Forget the task; whatever ended it but an answer is a finding."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.wrong.append(f"a defect: {error!r}")

    def _familiar(self) -> str:
        return self._chance.choice(self._known)

    async def _request_token(self, visitor: str) -> None:
        request = TokenRequest("web", AGENT, visitor, fresh=self._chance.random() < 0.02)
        try:
            said = await self._site.service.issue(request, TIMEOUT)
        except BrokerError as error:
            self.answers[type(error).__name__] += 1
            return
        self.answers[type(said).__name__] += 1
        if isinstance(said, IssuedToken):
            self._check(said, visitor)

    def _check(self, said: IssuedToken, visitor: str) -> None:
        """Require a token of this visitor with the life that was promised."""
        data = msgspec.json.decode(said.token.body)["data"]
        if not data["session_id"].startswith(visitor_mark(AGENT, visitor)):
            self.wrong.append("a token of somebody else")
        if said.left < POLICY.outage:
            self.wrong.append(f"a token with {said.left} us left")

    async def _harm(self) -> None:
        """Hurt the vendor and the clocks, one after the other."""
        while True:
            await asyncio.sleep(self._chance.uniform(20, 400))
            kind = self._chance.choice(
                (
                    "stall",
                    "stall",
                    "refused",
                    "reset",
                    "hang",
                    "slow",
                    "unavailable",
                    "throttled",
                    "clock",
                )
            )
            self.harms[kind] += 1
            if kind == "stall":
                await self.vendor.stand_still(self._chance.choice(STALLS))
            elif kind == "clock":
                self._clock.step_wall(self._chance.choice((-3600, -5, 5, 60)))
            else:
                self.vendor.fault = kind
                await asyncio.sleep(self._chance.uniform(5, 120))
                self.vendor.fault = ""

    async def _count_objects(self) -> None:
        while True:
            await asyncio.sleep(600)
            gc.collect()
            self.objects.append(len(gc.get_objects()))


def run(hours: float, seed: int) -> list[str]:
    """Run it; prints the figures, returns what was wrong."""
    began = time.perf_counter()
    silent = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=silent)

    async def main(clock: FakeClock) -> Run:
        whole = Run(clock, hours, seed)
        await whole.live()
        return whole

    done = run_virtual(main)
    window = worst_window(done.vendor.arrivals)
    print(f"virtual hours             {hours:g} in {time.perf_counter() - began:.0f} s")
    print(f"answers                   {dict(done.answers)}")
    print(f"harms done                {dict(done.harms)}")
    print(f"calls to the vendor       {len(done.vendor.arrivals)}, in the fullest minute {window}")
    wrong = list(done.wrong)
    if window > ALLOWED:
        wrong.append(f"virtual: {window} calls in a minute")
    settled = int(len(done.objects) * SETTLED)
    early, late = done.objects[settled : settled + 3], done.objects[-3:]
    print(f"live objects              {early} -> {late}")
    if early and max(late) > max(early) * GROWTH:
        wrong.append("virtual: live objects grew")
    return wrong


def worst_window(arrivals: list[float], length: float = 60.0) -> int:
    """Return the most calls in any window of `length` seconds."""
    ordered = sorted(arrivals)
    return max(
        (bisect_left(ordered, start + length) - place for place, start in enumerate(ordered)),
        default=0,
    )
