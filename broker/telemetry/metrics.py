"""Every metric, with its help text.

What is counted is one of the shared cells, an addition that costs nothing beside the decision it
counts: prometheus-client's own `inc` and `observe` take a lock in Python, and do not see other
processes.  `scrape` puts the cells of all processes together.

Labels come from enums and other closed sets, never from input, so the number of series is
constant from the first scrape on, and each exists at 0.  Every process hands out all cells, also
those of parts that it does not have (a relay's, a shared store's), so that all have one layout;
only the families of parts that are there are shown.
"""

import platform
from typing import TypeVar
from zlib import crc32

from broker.model import LimitName, Outcome
from broker.telemetry.cells import Histogram, MetricLayout, Row
from broker.telemetry.counts import BucketCounts, TokenCounts
from broker.telemetry.labels import BackgroundTask, Reason
from broker.telemetry.pass_through_metrics import PassThroughMetrics
from broker.telemetry.state_file_metrics import StateFileMetrics
from broker.version import VERSION

BUDGET = "budget"
"""The label of the one rejection that is not a token bucket's."""

LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Seconds that the event loop woke late."""

REQUEST_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, *LAG_BUCKETS, 2.5, 5.0, 10.0)
"""Seconds, 50 us to 10 s: a reuse takes tens of microseconds, a mint up to its deadline."""

STORE_BUCKETS = REQUEST_BUCKETS[:13]
"""Seconds, 50 us to 500 ms: an operation takes tens of microseconds, and is given up at 50 ms."""

REMAINING_BUCKETS = (60.0, 120.0, 300.0, 420.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0)
"""Seconds of life at hand-out: the floors, the renewal window, and the hour."""

WAIT_BUCKETS = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds in the budget's queue; the default longest wait is 8 s."""


_STATUSES = tuple(map(str, (200, 400, 401, 402, 403, 404, 409, 410, 422, 429, 500, 502, 503, 504)))
"""Statuses that the vendor documents; the label must not grow with its imagination."""

_OTHER, _NONE = "other", "none"

OPERATIONS = (
    "visit",
    "lead",
    "agent",
    "keep",
    "release",
    "renew",
    "budget",
    "heartbeat",
    "refusal",
    "session",
)
"""What is asked of a shared store."""

STORE_ERRORS = (
    *("timeout", "connection", "readonly", "loading"),
    *("out_of_memory", "cluster_down", "script", "other"),
)
"""How a shared store fails."""

_T = TypeVar("_T")


class Metrics:
    """All metrics of one process.

    `budget`, `shared_store`, `state_file`, `pass_through` tell whether there is one; `workers` how
    many a supervisor keeps, 0 without one.  `cells` is this process' row of shared cells.
    """

    def __init__(
        self,
        issuer: str,
        *,
        budget: bool = False,
        shared_store: bool = False,
        state_file: bool = False,
        pass_through: bool = False,
        workers: int = 0,
        cells: Row | None = None,
    ) -> None:
        layout = self.layout = MetricLayout(cells)
        self.requests = _requests(layout)
        self.remaining = layout.histograms(
            "broker_token_remaining_seconds",
            "Life left of a token when it is handed out",
            REMAINING_BUCKETS,
        )[()]
        self.loop_lag = layout.histograms(
            "broker_event_loop_lag_seconds",
            "How late the event loop woke a timer, sampled twice a second",
            LAG_BUCKETS,
        )[()]
        self.rejections = _by_label(
            layout.counters(
                "broker_rejections",
                "Requests answered 429 by one of our limits, or 503 for want of budget",
                limit=[*(name.value for name in LimitName), BUDGET],
            )
        )
        self.limits = LimitMetrics(layout)
        self.tokens = TokenMetrics(layout)
        self.mints = MintMetrics(layout, issuer)
        self.sessions = SessionMetrics(layout)
        self.budget = BudgetMetrics(layout, shown=budget)
        self.upstream = UpstreamMetrics(layout, shown=issuer == "upstream")
        self.store = StoreMetrics(layout, shown=shared_store)
        self.state_file = StateFileMetrics(layout, shown=state_file)
        self.pass_through = PassThroughMetrics(layout, shown=pass_through)
        self.process = ProcessMetrics(layout, workers)

    @property
    def layout_id(self) -> str:
        """Names the meaning of every cell: processes that share cells must agree on it."""
        meaning = repr([(f.name, f.kind, f.series, f.bounds) for f in self.layout.families])
        return f"{VERSION} {crc32(meaning.encode()):08x}"


def _requests(layout: MetricLayout) -> dict[Outcome, Histogram]:
    name = "broker_request_duration_seconds"
    durations = layout.histograms(
        name,
        "Time from a parsed request head to the answer, by how the request ended",
        REQUEST_BUCKETS,
        outcome=[outcome.value for outcome in Outcome],
    )
    layout.count("broker_requests", "Token requests by how they ended", of=name)
    return {outcome: durations[outcome.value,] for outcome in Outcome}


class LimitMetrics:
    """What the buckets of each limit report."""

    def __init__(self, layout: MetricLayout) -> None:
        limits = [name.value for name in LimitName]
        near = layout.counters(
            "broker_near_limit",
            "Requests admitted with less than a fifth of the burst left",
            limit=limits,
        )
        dry_run_denied = layout.counters(
            "broker_dry_run_rejections",
            "Requests that a limit in dry run would have refused",
            limit=limits,
        )
        tracked = layout.totals("broker_buckets_tracked", "Buckets held in memory", limit=limits)
        overflowed = layout.counters(
            "broker_buckets_overflowed",
            "Requests decided by a shared overflow bucket, because max_tracked was reached",
            limit=limits,
        )
        self.tracked = {name: tracked[name.value,] for name in LimitName}
        self.counts = {
            name: BucketCounts(near[key], dry_run_denied[key], overflowed[key])
            for name in LimitName
            for key in [(name.value,)]
        }


class TokenMetrics:
    """What the tokens held in this process report."""

    def __init__(self, layout: MetricLayout) -> None:
        self.cached = layout.totals("broker_tokens_cached", "Tokens held for reuse")[()]
        evicted = layout.counters(
            "broker_tokens_evicted",
            "Tokens that left the cache: by their age, or alive to make room",
            cause=("expired", "capacity"),
        )
        self.counts = TokenCounts(expired=evicted["expired",], evicted=evicted["capacity",])


class MintMetrics:
    """What a mint reports."""

    def __init__(self, layout: MetricLayout, issuer: str) -> None:
        outcomes = ("minted", "refused", "failed")
        duration = layout.histograms(
            "broker_mint_duration_seconds",
            "Time the issuer took for one token, without the wait for the budget",
            REQUEST_BUCKETS,
            issuer=(issuer,),
            outcome=outcomes,
        )
        self.duration = {outcome: duration[issuer, outcome] for outcome in outcomes}
        self.refreshes = layout.counters(
            "broker_refreshes",
            "Mints for a key that held a token: why, and what became of it",
            reason=("ahead", "floor", "fresh"),
            outcome=("renewed", "same", "failed"),
        )
        self.in_flight = layout.totals("broker_mints_in_flight", "Mints under way or queued")[()]


class SessionMetrics:
    """What is asked about tokens, and what is known of sessions."""

    def __init__(self, layout: MetricLayout) -> None:
        self.checks = _by_label(
            layout.counters(
                "broker_token_checks",
                "Tokens that somebody asked about: verify and introspect, by the verdict",
                verdict=("good", "refused"),
            )
        )
        self.ended = layout.counters("broker_sessions_ended", "Sessions that were ended")[()]
        self.recorded = layout.totals(
            "broker_sessions_recorded", "Sessions that this process has on record"
        )[()]


class BudgetMetrics:
    """What the queue for the vendor's budget reports."""

    def __init__(self, layout: MetricLayout, *, shown: bool) -> None:
        self.remaining = layout.maxima(
            "broker_upstream_budget_remaining",
            "Calls that the budget would allow at this moment",
            shown=shown,
        )[()]
        self.queue_depth = layout.totals(
            "broker_upstream_queue_depth",
            "Mints waiting for the budget",
            shown=shown,
        )[()]
        self.outstanding = layout.totals(
            "broker_upstream_calls_outstanding",
            "Calls to the vendor that are out, and count as if they arrived now",
            shown=shown,
        )[()]
        self.queue_wait = layout.histograms(
            "broker_upstream_queue_wait_seconds",
            "Time that a mint waited for its slot in the budget",
            WAIT_BUCKETS,
            shown=shown,
        )[()]


class UpstreamMetrics:
    """What calls to the vendor report."""

    def __init__(self, layout: MetricLayout, *, shown: bool) -> None:
        self.requests = _by_label(
            layout.counters(
                "broker_upstream_requests",
                "Calls to the vendor by the status of its answer; none: there was no answer",
                shown=shown,
                status=(*_STATUSES, _OTHER, _NONE),
            )
        )
        self.errors = _by_label(
            layout.counters(
                "broker_upstream_errors",
                "Calls to the vendor that gave no token, by what went wrong",
                shown=shown,
                reason=[reason.value for reason in Reason],
            )
        )
        self.validations = _by_label(
            layout.counters(
                "broker_upstream_validations",
                "Questions whether the vendor reads, asked while calls hang, by what came of them",
                shown=shown,
                outcome=("answered", "none"),
            )
        )
        self.breakers = _by_label(
            layout.maxima(
                "broker_breaker_open",
                "1 while this breaker stops calls to the vendor",
                shown=shown,
                breaker=("credentials", "health"),
            )
        )

    def count_status(self, status: int | None) -> None:
        """Count one call by the HTTP status of its answer; None if there was no answer."""
        label = _NONE if status is None else str(status)
        self.requests[label if label in self.requests else _OTHER].inc()


class StoreMetrics:
    """What a shared store reports."""

    def __init__(self, layout: MetricLayout, *, shown: bool) -> None:
        self.duration = _by_label(
            layout.histograms(
                "broker_store_duration_seconds",
                "Time from asking the store to its answer or failure, by what was asked",
                STORE_BUCKETS,
                shown=shown,
                operation=OPERATIONS,
            )
        )
        self.errors = _by_label(
            layout.counters(
                "broker_store_errors",
                "Operations that the store failed, by what went wrong",
                shown=shown,
                reason=STORE_ERRORS,
            )
        )
        self.degraded = layout.maxima(
            "broker_store_degraded",
            "1 while a process works without the shared store",
            shown=shown,
        )[()]


class ProcessMetrics:
    """What is told about processes: the configuration they follow, and workers, if there are any.

    A supervisor sees its workers' use of the machine; it cannot be added up from their own
    `process_...`, which nobody scrapes.
    """

    def __init__(self, layout: MetricLayout, workers: int) -> None:
        self.reloads = _by_label(
            layout.counters(
                "broker_config_reloads",
                "Attempts to reload the configuration",
                outcome=("success", "failure"),
            )
        )
        self.reload_failed = layout.maxima(
            "broker_config_reload_failed",
            "1 while the last attempt to reload has failed: the settings before it are in force",
        )[()]
        _tell_build(layout)
        self.log_lines_dropped = layout.counters(
            "broker_log_lines_dropped",
            "Log lines that were lost, because standard error was full, gone or failed",
        )[()]
        self.workers = layout.totals("broker_workers", "Processes that take requests")[()]
        self.beat = layout.private("beat")
        """Monotonic seconds of the last sign of life, by the clock of the machine; 0: takes no
        connections (any more)."""
        self.connections = layout.totals(
            "broker_connections", "Connections that are open on the data listener"
        )[()]
        self.fast_lane_off = layout.maxima(
            "broker_fast_lane_off", "1 while a process answers every request by the ordinary path"
        )[()]
        self.restarts = layout.counters(
            "broker_worker_restarts", "Workers that died and were replaced"
        )[()]
        self.hangs = layout.counters(
            "broker_worker_hangs",
            "Workers that gave no sign of life, or never became ready, and were killed",
        )[()]
        background = layout.counters(
            "broker_background_restarts",
            "Background tasks that ended, by an exception or by themselves, and were begun anew",
            task=[name.value for name in BackgroundTask],
        )
        self.background = {name: background[name.value,] for name in BackgroundTask}
        shown = workers > 0
        indices = [str(index) for index in range(1, workers + 1)]
        self.cpu = _by_label(
            layout.counters(
                "broker_worker_cpu_seconds",
                "CPU time of this worker and those that it replaced, user and system",
                shown=shown,
                worker=indices,
            )
        )
        self.memory = _by_label(
            layout.totals(
                "broker_worker_resident_memory_bytes",
                "Resident memory of this worker",
                shown=shown,
                worker=indices,
            )
        )


def _tell_build(layout: MetricLayout) -> None:
    build = layout.maxima(
        "broker_build_info",
        "Always 1; the labels tell what runs",
        version=(VERSION,),
        python=(platform.python_version(),),
    )
    for gauge in build.values():
        gauge.set(1)


def _by_label(cells: dict[tuple[str, ...], _T]) -> dict[str, _T]:
    """Look up by the value of the only label."""
    return {value: cell for (value,), cell in cells.items()}
