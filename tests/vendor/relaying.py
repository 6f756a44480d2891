"""The relay before a vendor that fails on request: real sockets, generated secrets.

`Relay` is the story without its front door (service, budget, issuer, HTTP client) on a clock that a
test may move; the vendor's clock is the same one.  `broker_before` is the whole application and
somebody who asks it over HTTP.
"""

import asyncio
import io
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import msgspec
import structlog
from prometheus_client.parser import text_string_to_metric_families

from broker.app.app import App
from broker.config import load as config
from broker.config.settings import Settings
from broker.errors import BrokerError
from broker.issue import IssuedToken, TokenService
from broker.issuers.upstream import UpstreamIssuer
from broker.issuers.vendor.client import VendorClient
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
from broker.telemetry import logs
from broker.telemetry.cells import Counter, MetricLayout
from broker.telemetry.metrics import MintMetrics, UpstreamMetrics
from broker.testing import FakeClock, FakeVendor, VendorSettings
from broker.testing.vendor.mint import visitor_mark
from broker.units import SECOND

AGENT = "A78WKV4515"
TOKEN_PATH = "/v1/embed-tokens/request"
MINUTE = 60 * SECOND

POLICY = ReusePolicy(enabled=True, ahead=15 * MINUTE, floor=5 * MINUTE, outage=MINUTE)
"""The marks that ship."""

RAISED = Budget(rate=600_000, per=60, burst=100, max_wait=5)
"""For tests that are not about the pace; a slot each 0.1 ms."""

IMPATIENT = Budget(rate=600_000, per=60, burst=100, max_wait=0.5)
"""The same, but nobody waits out a pause: the shortest one has a second."""

UNLIMITED = VendorSettings(ip=None)
"""A vendor that fails only where a test says so."""


def visitor() -> str:
    """Make a new visitor's fingerprint."""
    return secrets.token_hex(16)


def roomy() -> Limits:
    """Limits that no test meets."""

    def limit_set(name: LimitName) -> LimitPolicy:
        return LimitPolicy(name, LimitRule(bucket.limit(60_000, MINUTE, 1_000_000)), {})

    return Limits(
        fingerprint=limit_set(LimitName.FINGERPRINT),
        fingerprint_mints=limit_set(LimitName.FINGERPRINT_MINTS),
        agent=limit_set(LimitName.AGENT),
        client=None,
        max_tracked=1_000_000,
    )


class Relay:
    """Service, budget, issuer and HTTP client before `vendor`.

    With `owing` nobody knows yet what a process before it has left out.
    """

    def __init__(
        self,
        vendor: FakeVendor,
        clock: FakeClock,
        *,
        budget: Budget = RAISED,
        keys: list[Secret] | None = None,
        timeout: float = 5.0,
        base_url: str | None = None,
        policy: ReusePolicy = POLICY,
        draw: Callable[[], float] = lambda: 0.0,
        owing: bool = False,
    ) -> None:
        self.vendor = vendor
        self._owing = owing
        self.clock = clock
        self.upstream = UpstreamMetrics(MetricLayout(), shown=True)
        self.metrics = MintMetrics(MetricLayout(), "upstream")
        self.waits: list[float] = []
        self.pacer = BudgetPacer(budget, self.waits.append)
        self.issuer = UpstreamIssuer(
            VendorClient(base_url or vendor.url, timeout),
            keys or [vendor.secret],
            self.pacer,
            clock,
            self.upstream,
            draw,
        )
        self.tokens = TokenCache(
            200_000,
            keep_until=lambda token: token.dies_mono - policy.marks(token.lifetime).outage,
            mono=clock.mono,
        )
        self.store = MemoryStore(roomy(), self.tokens, clock)
        self.session_store = MemorySessions(200_000, clock)
        rules = MintRules(policy, 18.0)
        self.minter = Minter(
            self.store,
            self.session_store,
            self.issuer,
            self.pacer,
            rules,
            clock,
            self.metrics,
            draw,
        )
        self.service = TokenService(self.store, self.minter, policy, clock)

    async def open(self) -> None:
        await self.pacer.start()
        if not self._owing:
            self.pacer._slots.answered()
        burst = self.pacer._budget.burst
        if self.pacer._budget.depth < 0.02:
            await until(lambda: self.pacer.remaining == burst, "a whole burst")

    async def close(self) -> None:
        await self.service.flights.close()
        await self.pacer.close()
        await self.issuer.close()

    async def request_token(
        self,
        fingerprint: str | None = None,
        *,
        agent: str = AGENT,
        model: str | None = None,
        fresh: bool = False,
        client: str = "web",
        timeout: float = 12.0,
    ) -> IssuedToken:
        """Ask for a token; a fingerprint left out is a new visitor's."""
        request = TokenRequest(client, agent, fingerprint or visitor(), model, fresh)
        answer = await self.service.issue(request, timeout)
        assert isinstance(answer, IssuedToken)
        return answer

    def begin(self, fingerprint: str | None = None, **how: Any) -> "asyncio.Task[IssuedToken]":
        """Let somebody ask, and go on."""
        return asyncio.get_running_loop().create_task(self.request_token(fingerprint, **how))

    async def failure(self, fingerprint: str | None = None, **how: Any) -> BrokerError:
        """Ask in vain; returns what the caller is told."""
        try:
            answer = await self.request_token(fingerprint, **how)
        except BrokerError as error:
            return error
        raise AssertionError(f"a token: {answer!r}")

    async def settled(self) -> None:
        """Wait until no mint is under way."""
        await self.service.flights.drained()

    async def arrived(self, count: int) -> None:
        """Return when that many mint calls have reached the vendor."""
        async with asyncio.timeout(10):
            await self.vendor.journal.arrived(count)

    @property
    def calls(self) -> int:
        """Mint calls that have reached the vendor."""
        return len(self.vendor.journal.calls)

    @property
    def errors(self) -> dict[str, int]:
        """The counted upstream errors that are not 0."""
        return counted(self.upstream.errors)

    @property
    def statuses(self) -> dict[str, int]:
        """The counted upstream statuses that are not 0."""
        return counted(self.upstream.requests)

    def refreshes(self, reason: str, outcome: str) -> int:
        """Renewals counted so."""
        return int(self.metrics.refreshes[reason, outcome].value)

    @property
    def paused_for(self) -> float:
        """Seconds for which the budget gives out nothing."""
        left = self.pacer._paused_until - asyncio.get_running_loop().time()
        return left if self.pacer._paused else 0.0


def counted(counters: Mapping[str, Counter]) -> dict[str, int]:
    """Return the counters that are not 0."""
    return {label: int(counter.value) for label, counter in counters.items() if counter.value}


def vendor_on(clock: FakeClock, settings: VendorSettings = UNLIMITED) -> FakeVendor:
    """Make a vendor whose clocks are this clock."""
    return FakeVendor(
        settings,
        seed=1,
        monotonic=lambda: clock.mono() / SECOND,
        wall=lambda: clock.wall() / SECOND,
    )


@asynccontextmanager
async def relaying(
    settings: VendorSettings = UNLIMITED, *, clock: FakeClock | None = None, **how: Any
) -> AsyncIterator[Relay]:
    """Run a vendor and a relay before it; nothing may be left under way."""
    clock = clock or FakeClock()
    async with vendor_on(clock, settings) as vendor:
        relay = Relay(vendor, clock, **how)
        await relay.open()
        try:
            yield relay
        finally:
            await relay.close()
        assert len(relay.service.flights) == 0


def session_of(issued: IssuedToken) -> str:
    """Read the session back out of the ready answer."""
    session: str = msgspec.json.decode(issued.token.body)["data"]["session_id"]
    return session


def token_of(issued: IssuedToken) -> str:
    """Read the token back out of the ready answer."""
    token: str = msgspec.json.decode(issued.token.body)["data"]["token"]
    return token


def belongs_to(
    issued: IssuedToken, fingerprint: str, agent: str = AGENT, model: str | None = None
) -> bool:
    """Whether the vendor made this token for exactly this agent, visitor and model."""
    return session_of(issued).startswith(visitor_mark(agent, fingerprint, model) + "-")


class Reply(msgspec.Struct):
    """What the broker answered, and after how many seconds."""

    status: int
    headers: Any
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def data(self) -> dict[str, Any]:
        assert self.status == 200, self.body
        data: dict[str, Any] = self.json["data"]
        return data

    @property
    def token(self) -> str:
        token: str = self.data["token"]
        return token

    @property
    def code(self) -> str:
        """The error's code; the whole envelope is checked on the way."""
        error = self.json["error"]
        assert self.json == {
            "success": False,
            "status": "error",
            "status_code": self.status,
            "error": {
                "code": error["code"],
                "message": error["message"],
                "httpStatus": self.status,
            },
        }
        code: str = error["code"]
        return code

    @property
    def reused(self) -> bool:
        hit: bool = self.headers["Cache-Status"] == "embed-token-broker; hit"
        return hit

    @property
    def retry_after(self) -> int:
        return int(self.headers["Retry-After"])


class House:
    """A running broker before `vendor`, and a backend that asks it; `secret` is the backend's."""

    def __init__(self, app: App, vendor: FakeVendor, log: io.StringIO, secret: str) -> None:
        self.app = app
        self.vendor = vendor
        self.log = log
        self.secret = secret
        self.http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60)
        )

    async def request_token(
        self,
        fingerprint: str | None = None,
        *,
        agent: str = AGENT,
        secret: str | None = None,
        headers: Mapping[str, str] | None = None,
        **fields: object,
    ) -> Reply:
        """Ask for a token; a fingerprint left out is a new visitor's."""
        body = {"agent_id": agent, "fingerprint": fingerprint or visitor(), **fields}
        own = {"api-secret": secret or self.secret, **(headers or {})}
        began = time.perf_counter()
        async with self.http.post(
            self.app.url + TOKEN_PATH, data=msgspec.json.encode(body), headers=own
        ) as response:
            content = await response.read()
            took = time.perf_counter() - began
            return Reply(response.status, response.headers, content, took)

    async def arrived(self, count: int) -> None:
        """Return when that many mint calls have reached the vendor."""
        async with asyncio.timeout(10):
            await self.vendor.journal.arrived(count)

    async def scrape_text(self) -> str:
        async with self.http.get(f"{self.app.admin_url}/metrics") as response:
            return await response.text()

    async def scrape(self) -> dict[str, float]:
        """Read the metrics, as `name{label="value"}`."""
        return {
            _series(sample.name, sample.labels): sample.value
            for family in text_string_to_metric_families(await self.scrape_text())
            for sample in family.samples
        }

    def events(self, name: str) -> list[dict[str, Any]]:
        """What was logged under this name."""
        lines = [msgspec.json.decode(line) for line in self.log.getvalue().splitlines()]
        return [event for event in lines if event["event"] == name]


def _series(name: str, labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name}{{{inner}}}" if inner else name


def relay_tree(vendor: FakeVendor) -> dict[str, Any]:
    """Settings of a relay on free ports whose pace no test meets."""
    return {
        "server": {"listen": "127.0.0.1:0", "drain": "1s", "drain_lead": "0s"},
        "admin": {"listen": "127.0.0.1:0"},
        "issuer": {
            "kind": "upstream",
            "upstream": {"base_url": vendor.url, "api_secret": vendor.secret.reveal()},
            "budget": {"rate": 600_000, "burst": 1000, "max_wait": "5s", "window": 601_000},
        },
        "limits": {
            "fingerprint": {"rate": 600_000, "burst": 100_000},
            "fingerprint_mints": {"rate": 600_000, "burst": 100_000},
        },
        "log": {"level": "debug"},
    }


@asynccontextmanager
async def broker_before(
    vendor: FakeVendor, tree: Mapping[str, Any] | None = None
) -> AsyncIterator[House]:
    """Run a broker with these settings on top of `relay_tree`; no defect may be in its log."""
    secret = secrets.token_urlsafe(24)
    clients = {"clients": {"web": {"secret": secret, "agents": ["*"]}}}

    def load() -> Settings:
        return config.load(None, {}, tree or {}, relay_tree(vendor) | clients)

    log = io.StringIO()
    settings = load()
    with logging_to(log, settings):
        app = App(settings, load, {})
        await app.start()
        house = House(app, vendor, log, secret)
        try:
            yield house
        finally:
            await house.http.close()
            app.stop()
            await app.run()
        for bug in ("broker.defect", "broker.background_restarted"):
            assert bug not in log.getvalue(), log.getvalue()
        assert len(app.parts.token_service.flights) == 0


@contextmanager
def logging_to(stream: io.StringIO, settings: Settings) -> Iterator[None]:
    """Log to a stream, and leave pytest's own logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []  # or `force` would close pytest's
    logs.configure(settings.log, stream)
    try:
        yield
    finally:
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(level)


async def until(condition: Callable[[], object], what: str, timeout: float = 10.0) -> None:
    """Ask every few milliseconds until `condition()` is true; fails after `timeout` seconds."""
    ends = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < ends, f"waited {timeout:g} s for {what}"
        await asyncio.sleep(0.005)
