"""The metrics of a state file, with their help texts; `metrics` has all others."""

from broker.telemetry.cells import MetricLayout
from broker.telemetry.labels import FileError


class StateFileMetrics:
    """What a state file reports."""

    def __init__(self, layout: MetricLayout, *, shown: bool) -> None:
        self.degraded = layout.maxima(
            "broker_state_file_degraded",
            "1 while what is handed out or ended is not sure to survive the process",
            shown=shown,
        )[()]
        errors = layout.counters(
            "broker_state_file_errors",
            "Attempts to write to the state file that failed, by what went wrong",
            shown=shown,
            reason=[kind.value for kind in FileError],
        )
        self.errors = {kind: errors[kind.value,] for kind in FileError}
        self.late = layout.counters(
            "broker_state_file_late",
            "Tokens that were handed out before they were in the state file",
            shown=shown,
        )[()]
        self.moved_aside = layout.maxima(
            "broker_state_file_moved_aside",
            "1 if this process found its state file unusable at the start, and began without it",
            shown=shown,
        )[()]
        self.bytes = layout.totals(
            "broker_state_file_bytes", "Bytes of the state file and its log", shown=shown
        )[()]
