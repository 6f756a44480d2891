"""The metrics of what is passed on to the vendor, with help texts; `metrics` has all others."""

from broker.telemetry.cells import MetricLayout
from broker.telemetry.labels import PassedOutcome

PASSED_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Seconds: a list takes tens of milliseconds, speech or a large file up to minutes."""


class PassThroughMetrics:
    """What requests for the vendor's other routes report."""

    def __init__(self, layout: MetricLayout, *, shown: bool) -> None:
        name = "broker_pass_through_duration_seconds"
        durations = layout.histograms(
            name,
            "Time from the parsed head of a request for another route of the vendor to its end",
            PASSED_BUCKETS,
            shown=shown,
            outcome=[outcome.value for outcome in PassedOutcome],
        )
        layout.count(
            "broker_pass_through_requests",
            "Requests for other routes of the vendor, by how they ended",
            of=name,
        )
        self.duration = {outcome: durations[outcome.value,] for outcome in PassedOutcome}
        self.in_flight = layout.totals(
            "broker_pass_through_in_flight",
            "Requests for other routes of the vendor that are under way",
            shown=shown,
        )[()]
