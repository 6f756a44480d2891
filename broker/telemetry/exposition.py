"""What Prometheus reads: the rows of the shared cells, put together into one set of families."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from typing_extensions import override

from broker.telemetry.cells import Family, Kind, SharedCells


def registry(
    families: Sequence[Family], shared_cells: SharedCells, publish: Callable[[], None]
) -> CollectorRegistry:
    """Return a registry that shows these families, and those of this process itself.

    `publish` brings the gauges of this process up to date; it is called before each scrape.
    """
    made = CollectorRegistry()
    made.register(_Broker(families, shared_cells, publish))
    ProcessCollector(registry=made)
    PlatformCollector(registry=made)
    GCCollector(registry=made)
    return made


class _Broker(Collector):
    """Sums the shared cells at scrape time."""

    def __init__(
        self, families: Sequence[Family], shared_cells: SharedCells, publish: Callable[[], None]
    ) -> None:
        self._families = families
        self._shared_cells = shared_cells
        self._publish = publish

    def describe(self) -> Iterable[Metric]:
        """Name nothing: registering must not scrape."""
        return ()

    @override
    def collect(self) -> Iterator[Metric]:
        self._publish()
        for family in self._families:
            if family.shown:
                yield _render(family, self._shared_cells)


def _render(family: Family, shared_cells: SharedCells) -> Metric:
    name, text, labels = family.name, family.text, family.labels
    match family.kind:
        case Kind.COUNTER:
            counter = CounterMetricFamily(name, text, labels=labels)
            for values, index in family.series.items():
                counter.add_metric(values, shared_cells.total(index))
            return counter
        case Kind.COUNT:
            count = CounterMetricFamily(name, text, labels=labels)
            for values, index in family.series.items():
                count.add_metric(values, _cumulative(family, shared_cells, index)[-1][1])
            return count
        case Kind.TOTAL | Kind.MAXIMUM | Kind.PRIVATE:
            read = shared_cells.total if family.kind is Kind.TOTAL else shared_cells.maximum
            gauge = GaugeMetricFamily(name, text, labels=labels)
            for values, index in family.series.items():
                gauge.add_metric(values, read(index))
            return gauge
        case Kind.HISTOGRAM:
            histogram = HistogramMetricFamily(name, text, labels=labels)
            for values, index in family.series.items():
                end = index + len(family.bounds) + 1
                buckets = _cumulative(family, shared_cells, index)
                histogram.add_metric(values, buckets, shared_cells.total(end))
            return histogram


def _cumulative(family: Family, shared_cells: SharedCells, index: int) -> list[tuple[str, float]]:
    """Return Prometheus' buckets: upper bound as text, number of values up to it."""
    total = 0.0
    buckets = []
    for offset, bound in enumerate((*map(str, family.bounds), "+Inf")):
        total += shared_cells.total(index + offset)
        buckets.append((bound, total))
    return buckets
