"""Every metric, with its help text.

What happens on each request is counted in plain integers and lists, which a collector reads at
scrape time: prometheus-client's `inc` and `observe` take a lock in Python and would cost more
than the decision they count.  What happens per mint or more rarely uses its classes.

Labels come from enums and other closed sets, never from input, so the number of series is
constant from the first scrape on, and each exists at 0.
"""

import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from typing_extensions import override

from broker.model import LimitName, Outcome
from broker.version import VERSION

BUDGET = "budget"
"""The label of the one rejection that is not a token bucket's."""

REQUEST_BUCKETS = (
    0.00005,
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
"""Seconds, 50 us to 10 s: a reuse takes tens of microseconds, a mint up to its deadline."""

REMAINING_BUCKETS = (60.0, 120.0, 300.0, 420.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0)
"""Seconds of life at hand-out: the floors, the renewal window, and the hour."""

LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Seconds that the event loop woke late."""

WAIT_BUCKETS = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds in the budget's queue; the default longest wait is 8 s."""


_STATUSES = (
    "200",
    "400",
    "401",
    "402",
    "403",
    "404",
    "409",
    "410",
    "422",
    "429",
    "500",
    "502",
    "503",
    "504",
)
"""Statuses that the vendor documents; the label must not grow with its imagination."""

_OTHER, _NONE = "other", "none"


class PlainHistogram:
    """A histogram of plain numbers: `observe` costs a third of a microsecond."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """How many values were counted."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """Return Prometheus' buckets: upper bound as text, number of values up to it."""
        total = 0
        buckets = []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


class BucketStats(Protocol):
    """What the collector reads of a limit's buckets."""

    near: int
    rehearsed: int
    overflowed: int

    def __len__(self) -> int: ...


class TokenStats(Protocol):
    """What the collector reads of the token cache."""

    evicted: int
    expired: int

    def __len__(self) -> int: ...


class MintMetrics:
    """What a mint reports."""

    def __init__(self, registry: CollectorRegistry, issuer: str) -> None:
        duration = Histogram(
            "broker_mint_duration_seconds",
            "Time the issuer took for one token, without the wait for the budget",
            ("issuer", "outcome"),
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.duration = {
            outcome: duration.labels(issuer, outcome) for outcome in ("minted", "refused", "failed")
        }
        refreshes = Counter(
            "broker_refreshes",
            "Mints for a key that held a token: why, and what became of it",
            ("reason", "outcome"),
            registry=registry,
        )
        self.refreshes = {
            (reason, outcome): refreshes.labels(reason, outcome)
            for reason in ("ahead", "floor", "fresh")
            for outcome in ("renewed", "same", "failed")
        }


class UpstreamMetrics:
    """What calls to the vendor report: plain numbers, read at scrape time."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.requests = dict.fromkeys((*_STATUSES, _OTHER, _NONE), 0)
        self.errors = dict.fromkeys(reasons, 0)
        self.breakers: Callable[[], dict[str, bool]] = dict

    def count_status(self, status: int | None) -> None:
        """Count one call by the HTTP status of its answer; None if there was no answer."""
        label = _NONE if status is None else str(status)
        self.requests[label if label in self.requests else _OTHER] += 1

    def collect(self) -> Iterator[Metric]:
        """Yield the families of these numbers."""
        requests = CounterMetricFamily(
            "broker_upstream_requests",
            "Calls to the vendor by the status of its answer; none: there was no answer",
            labels=("status",),
        )
        for status, count in self.requests.items():
            requests.add_metric((status,), count)
        yield requests
        errors = CounterMetricFamily(
            "broker_upstream_errors",
            "Calls to the vendor that gave no token, by what went wrong",
            labels=("reason",),
        )
        for reason, count in self.errors.items():
            errors.add_metric((reason,), count)
        yield errors
        breakers = GaugeMetricFamily(
            "broker_breaker_open",
            "1 while this breaker stops calls to the vendor",
            labels=("breaker",),
        )
        for breaker, is_open in self.breakers().items():
            breakers.add_metric((breaker,), int(is_open))
        yield breakers


class Metrics:
    """All metrics of one broker, on a registry of their own."""

    def __init__(self, issuer: str) -> None:
        # A second series beside each, which nobody asked for.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # has no annotations
        self.registry = CollectorRegistry()
        self.requests = {outcome: PlainHistogram(REQUEST_BUCKETS) for outcome in Outcome}
        self.remaining = PlainHistogram(REMAINING_BUCKETS)
        self.loop_lag = PlainHistogram(LAG_BUCKETS)
        self.queue_wait = PlainHistogram(WAIT_BUCKETS)
        self.rejections = dict.fromkeys([*(name.value for name in LimitName), BUDGET], 0)
        self.mints = MintMetrics(self.registry, issuer)
        self.reloads = Counter(
            "broker_config_reloads",
            "Attempts to reload the configuration",
            ("outcome",),
            registry=self.registry,
        )
        for outcome in ("success", "failure"):
            self.reloads.labels(outcome)
        build = Gauge(
            "broker_build_info",
            "Always 1; the labels tell what runs",
            ("version", "python"),
            registry=self.registry,
        )
        build.labels(VERSION, platform.python_version()).set(1)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def watch(
        self,
        buckets: Callable[[], dict[LimitName, BucketStats]],
        tokens: TokenStats,
        in_flight: Callable[[], int],
        budget: "Callable[[], tuple[int, int]] | None",
        upstream: UpstreamMetrics | None = None,
    ) -> None:
        """Begin to report these parts; `budget` tells slots left and callers waiting."""
        self.registry.register(_Hot(self, buckets, tokens, in_flight, budget))
        if upstream is not None:
            self.registry.register(_Upstream(upstream))


class _Hot(Collector):
    """Reads the plain numbers at scrape time."""

    def __init__(
        self,
        metrics: Metrics,
        buckets: Callable[[], dict[LimitName, BucketStats]],
        tokens: TokenStats,
        in_flight: Callable[[], int],
        budget: Callable[[], tuple[int, int]] | None,
    ) -> None:
        self._metrics = metrics
        self._buckets = buckets
        self._tokens = tokens
        self._in_flight = in_flight
        self._budget = budget

    def describe(self) -> Iterable[Metric]:
        """Name nothing: registering must not scrape."""
        return ()

    @override
    def collect(self) -> Iterator[Metric]:
        yield from self._collect_requests()
        yield from self._collect_limits()
        yield from self._collect_tokens()
        if self._budget is not None:
            yield from self._collect_budget(*self._budget())

    def _collect_requests(self) -> Iterator[Metric]:
        total = CounterMetricFamily(
            "broker_requests", "Token requests by how they ended", labels=("outcome",)
        )
        duration = HistogramMetricFamily(
            "broker_request_duration_seconds",
            "Time from a parsed request head to the answer, by how the request ended",
            labels=("outcome",),
        )
        for outcome, histogram in self._metrics.requests.items():
            total.add_metric((outcome.value,), histogram.count)
            duration.add_metric((outcome.value,), histogram.cumulative(), histogram.sum)
        yield total
        yield duration
        yield _histogram(
            "broker_token_remaining_seconds",
            "Life left of a token when it is handed out",
            self._metrics.remaining,
        )
        yield _histogram(
            "broker_event_loop_lag_seconds",
            "How late the event loop woke a timer, sampled twice a second",
            self._metrics.loop_lag,
        )

    def _collect_limits(self) -> Iterator[Metric]:
        rejections = CounterMetricFamily(
            "broker_rejections",
            "Requests answered 429 by one of our limits, or 503 for want of budget",
            labels=("limit",),
        )
        for limit, count in self._metrics.rejections.items():
            rejections.add_metric((limit,), count)
        near = CounterMetricFamily(
            "broker_near_limit",
            "Requests admitted with less than a fifth of the burst left",
            labels=("limit",),
        )
        rehearsed = CounterMetricFamily(
            "broker_dry_run_rejections",
            "Requests that a limit in dry run would have refused",
            labels=("limit",),
        )
        tracked = GaugeMetricFamily(
            "broker_buckets_tracked", "Buckets held in memory", labels=("limit",)
        )
        overflowed = CounterMetricFamily(
            "broker_buckets_overflowed",
            "Requests decided by a shared overflow bucket, because max_tracked was reached",
            labels=("limit",),
        )
        for name, bucket in self._buckets().items():
            near.add_metric((name.value,), bucket.near)
            rehearsed.add_metric((name.value,), bucket.rehearsed)
            tracked.add_metric((name.value,), len(bucket))
            overflowed.add_metric((name.value,), bucket.overflowed)
        yield from (rejections, near, rehearsed, tracked, overflowed)

    def _collect_tokens(self) -> Iterator[Metric]:
        cached = GaugeMetricFamily("broker_tokens_cached", "Tokens held for reuse")
        cached.add_metric((), len(self._tokens))
        yield cached
        evicted = CounterMetricFamily(
            "broker_tokens_evicted",
            "Tokens that left the cache: by their age, or alive to make room",
            labels=("cause",),
        )
        evicted.add_metric(("expired",), self._tokens.expired)
        evicted.add_metric(("capacity",), self._tokens.evicted)
        yield evicted
        in_flight = GaugeMetricFamily("broker_mints_in_flight", "Mints under way or queued")
        in_flight.add_metric((), self._in_flight())
        yield in_flight

    def _collect_budget(self, remaining: int, waiting: int) -> Iterator[Metric]:
        left = GaugeMetricFamily(
            "broker_upstream_budget_remaining", "Calls that the budget would allow at this moment"
        )
        left.add_metric((), remaining)
        yield left
        depth = GaugeMetricFamily("broker_upstream_queue_depth", "Mints waiting for the budget")
        depth.add_metric((), waiting)
        yield depth
        yield _histogram(
            "broker_upstream_queue_wait_seconds",
            "Time that a mint waited for its slot in the budget",
            self._metrics.queue_wait,
        )


class _Upstream(Collector):
    """Makes the vendor's numbers a collector of their own: they exist with that issuer only."""

    def __init__(self, metrics: UpstreamMetrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        """Name nothing, as above."""
        return ()

    @override
    def collect(self) -> Iterator[Metric]:
        return self._metrics.collect()


def _histogram(name: str, text: str, histogram: PlainHistogram) -> Metric:
    family = HistogramMetricFamily(name, text)
    family.add_metric((), histogram.cumulative(), histogram.sum)
    return family
