"""A round of housekeeping: what it purges, what it flushes, and what each gauge says after it."""

from itertools import count
from types import SimpleNamespace
from typing import Any

from typing_extensions import override

from broker.app.gc_tuning import GcTuner
from broker.app.housekeeping import Housekeeping
from broker.issuers.upstream import UpstreamIssuer
from broker.model import LimitName
from broker.telemetry.metrics import Metrics
from broker.telemetry.readiness import Readiness
from broker.testing import FakeClock


class Sized:
    """Something that holds a number of entries, and purges them one at a call."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.asked_at: list[int] = []

    def __len__(self) -> int:
        return self.left

    def purge_expired(self, *now: int) -> bool:
        self.asked_at += now
        self.left -= self.left > 0
        return self.left > 0


class Upstream(UpstreamIssuer):
    """Whose breakers are as the test wants; it calls nobody."""

    def __init__(self, *, credentials: bool, health: bool) -> None:
        self.credentials: Any = SimpleNamespace(is_open=credentials)
        self.health: Any = SimpleNamespace(is_open=health)

    @override
    def __repr__(self) -> str:
        return "Upstream()"


class Kept(Sized):
    """A part with something behind it: a server or a file."""

    def __init__(self, size: int, *, degraded: bool = False, refuses: bool = False) -> None:
        super().__init__(size)
        self.is_degraded, self.refuses = degraded, refuses
        self.published = 0
        self.buckets = {name: Sized(20 + n) for n, name in enumerate(LimitName)}

    def publish(self) -> None:
        self.published += 1

    def tell_buckets(self) -> bool:
        return self.purge_expired()


class Parts:
    """The parts of a broker that has everything, each with a number of its own."""

    def __init__(self, *, shared: Kept | None = None, durable: Kept | None = None) -> None:
        sizes = count(1)
        self.clock = FakeClock()
        self.metrics = Metrics("upstream", shared_store=True, state_file=True)
        self.readiness = Readiness()
        self.store, self.session_store = Kept(next(sizes)), Sized(next(sizes))
        self.token_cache = Sized(next(sizes))
        self.token_service = SimpleNamespace(flights=Sized(next(sizes)))
        self.authenticator = SimpleNamespace(failures=Sized(next(sizes)))
        self.admin_authenticator = SimpleNamespace(failures=Sized(next(sizes)))
        self.pacer = SimpleNamespace(remaining=11.5, depth=12, outstanding=13)
        self.issuer = Upstream(credentials=True, health=False)
        self.shared_backend, self.durable = shared, durable
        self.flushed_at: list[int] = []
        self.refusal_logs = [SimpleNamespace(flush=self.flushed_at.append)] * 3


def housekeeping(parts: Any) -> Housekeeping:
    """Keep house for these parts; nothing is collected."""
    return Housekeeping(parts, GcTuner())


def test_each_gauge_says_what_its_part_has() -> None:
    """None is left out, and none has the number of another."""
    parts = Parts(shared=Kept(0, degraded=True), durable=Kept(0, degraded=True))
    housekeeping(parts).publish()
    metrics = parts.metrics
    tracked = {name: gauge.value for name, gauge in metrics.limits.tracked.items()}
    expected: dict[LimitName, float] = {n: len(b) for n, b in parts.store.buckets.items()}
    assert tracked == {**expected, LimitName.AUTH: len(parts.authenticator.failures)}
    assert metrics.sessions.recorded.value == len(parts.session_store)
    assert metrics.tokens.cached.value == len(parts.token_cache)
    assert metrics.mints.in_flight.value == len(parts.token_service.flights)
    budget = metrics.budget
    shown = budget.remaining.value, budget.queue_depth.value, budget.outstanding.value
    assert shown == (11.5, 12, 13)
    assert (metrics.store.degraded.value, metrics.state_file.degraded.value) == (1, 1)
    breakers = metrics.upstream.breakers
    assert (breakers["credentials"].value, breakers["health"].value) == (1, 0)
    parts.issuer = Upstream(credentials=False, health=True)
    housekeeping(parts).publish()
    assert (breakers["credentials"].value, breakers["health"].value) == (0, 1)


def test_a_process_counts_until_it_drains() -> None:
    """`broker_workers` is the number of processes that take requests."""
    parts = Parts()
    for draining in (False, True):
        parts.readiness.draining = draining
        housekeeping(parts).publish()
        assert parts.metrics.process.workers.value == (not draining)


def test_a_round_tells_readiness_how_server_and_file_are() -> None:
    """And that they are well again; whatever was refused is told, the metrics of the file, too."""
    shared, durable = Kept(0, degraded=True, refuses=True), Kept(0, degraded=True)
    for parts in (Parts(shared=shared), Parts(durable=durable)):
        keeper, readiness = housekeeping(parts), parts.readiness
        for away in (True, False):
            shared.is_degraded = shared.refuses = durable.is_degraded = away
            keeper.do_round()
            assert readiness.degraded is away
            assert readiness.refuses is (away and parts.shared_backend is not None)
            assert parts.metrics.tokens.cached.value == len(parts.token_cache)
        assert parts.flushed_at == [parts.clock.mono()] * 6
    assert durable.published == 2


async def test_a_purge_goes_on_until_nothing_is_left() -> None:
    """In each part to its end, however many steps another one takes."""
    durable = Kept(4)
    parts = Parts(durable=durable)
    failures = parts.authenticator.failures, parts.admin_authenticator.failures
    await housekeeping(parts).purge()
    for part in (parts.store, parts.session_store, durable, *failures):
        assert len(part) == 0
    for each in failures:
        assert set(each.asked_at) == {parts.clock.mono()}
