"""Cells in rows: what one process counts, and what all of them have counted together."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from broker.telemetry import exposition
from broker.telemetry.cells import Counter, Row, SharedCells, share, shared
from broker.telemetry.metrics import Metrics

ROWS = 3


@pytest.fixture
def handle() -> Iterator[int]:
    """Shared memory for three processes."""
    handle = share(ROWS, Metrics("local").layout.width)
    yield handle
    os.close(handle)


def shown(metrics: Metrics, shared_cells: SharedCells) -> CollectorRegistry:
    """What a scrape of all rows shows."""
    return exposition.registry(metrics.layout.families, shared_cells, lambda: None)


class TestMetricLayout:
    def test_every_cell_is_handed_out_once(self) -> None:
        """Two metrics in one cell would count each other; a histogram's cells are its own, too."""
        layout = Metrics("upstream", budget=True, shared_store=True, workers=3).layout
        taken: list[int] = []
        for family in layout.families:
            if family.kind.value != "count":
                size = len(family.bounds) + 2 if family.bounds else 1
                for first in family.series.values():
                    taken += range(first, first + size)
        assert sorted(taken) == list(range(layout.width))

    def test_the_layout_is_the_same_in_every_process(self) -> None:
        """Whatever parts a process has: what is not shown has its cells all the same."""
        code = (
            "from broker.telemetry.metrics import Metrics;"
            "print(Metrics('local', workers=2).layout_id)"
        )
        command = [sys.executable, "-W", "error", "-c", code]
        other = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        assert Metrics("local", workers=2, budget=True, shared_store=True).layout_id == other
        assert Metrics("local", workers=3).layout_id != other
        assert (
            Metrics("upstream", workers=2).layout.width == Metrics("local", workers=2).layout.width
        )

    def test_families_of_absent_parts_are_hidden(self) -> None:
        """An empty panel is better than one that promises a store that is not there."""
        bare, full = Metrics("local"), Metrics("local", budget=True, shared_store=True, workers=2)
        names = {f.name for f in full.layout.families if f.shown}
        assert names - {f.name for f in bare.layout.families if f.shown} == {
            "broker_upstream_budget_remaining",
            "broker_upstream_queue_depth",
            "broker_upstream_calls_outstanding",
            "broker_upstream_queue_wait_seconds",
            "broker_store_duration_seconds",
            "broker_store_errors",
            "broker_store_degraded",
            "broker_worker_cpu_seconds",
            "broker_worker_resident_memory_bytes",
        }


class TestSharedRows:
    def test_counters_and_histograms_add_up(self, handle: int) -> None:
        """A scrape shows what all processes counted, as if it had been one."""
        width = Metrics("local").layout.width
        rows = shared(handle, width).rows
        processes = [Metrics("local", shared_store=True, cells=row) for row in rows]
        for number, process in enumerate(processes, start=1):
            for _ in range(number):
                process.rejections["agent"].inc()
                process.store.errors["timeout"] += 2
                process.store.duration["visit"].observe(0.00007)
        seen = shown(processes[0], shared(handle, width))
        value = seen.get_sample_value
        assert value("broker_rejections_total", {"limit": "agent"}) == 6
        assert value("broker_store_errors_total", {"reason": "timeout"}) == 12
        visits = {"operation": "visit"}
        assert value("broker_store_duration_seconds_count", visits) == 6
        assert value("broker_store_duration_seconds_sum", visits) == pytest.approx(6 * 0.00007)
        assert value("broker_store_duration_seconds_bucket", {**visits, "le": "5e-05"}) == 0
        assert value("broker_store_duration_seconds_bucket", {**visits, "le": "0.0001"}) == 6

    def test_gauges_follow_their_rule(self, handle: int) -> None:
        """Tokens add up; a breaker that one process has opened is open; of one budget the most."""
        width = Metrics("upstream").layout.width
        rows = shared(handle, width).rows
        first, second, _ = (Metrics("upstream", budget=True, cells=row) for row in rows)
        for process, number in ((first, 1), (second, 4)):
            process.tokens.cached.set(number)
            process.budget.remaining.set(number)
        second.upstream.breakers["health"].set(True)
        value = shown(first, shared(handle, width)).get_sample_value
        assert value("broker_tokens_cached") == 5
        assert value("broker_upstream_budget_remaining") == 4
        assert value("broker_breaker_open", {"breaker": "health"}) == 1
        assert value("broker_breaker_open", {"breaker": "credentials"}) == 0
        assert [labels["version"] for labels in _labels(first, handle, width)] != []
        assert value("broker_build_info", _labels(first, handle, width)[0]) == 1

    def test_what_is_true_of_several_is_true_once(self, handle: int) -> None:
        """Gauges that are 1 while something is so: alerts and dashboards look for the 1."""
        width = Metrics("upstream").layout.width
        for row in shared(handle, width).rows:
            process = Metrics("upstream", shared_store=True, cells=row)
            process.store.degraded.set(True)
            process.process.reload_failed.set(True)
            process.process.fast_lane_off.set(True)
            for breaker in process.upstream.breakers.values():
                breaker.set(True)
        seen = shown(process, shared(handle, width)).collect()
        told = {m.name: {s.value for s in m.samples} for m in seen if "1 while" in m.documentation}
        assert set(told) >= {
            "broker_breaker_open",
            "broker_config_reload_failed",
            "broker_fast_lane_off",
            "broker_store_degraded",
        }
        assert set(map(frozenset, told.values())) == {frozenset({1.0})}

    def test_O8_what_a_dead_process_counted_stays_and_what_it_held_goes(self, handle: int) -> None:
        """Its replacement counts on in the same row."""
        width = Metrics("local").layout.width
        rows = shared(handle, width).rows
        dead = Metrics("local", cells=rows[1])
        dead.rejections["agent"] += 5
        dead.remaining.observe(3000)
        dead.tokens.cached.set(7)
        dead.layout.drop_gauges(rows[1])
        value = shown(dead, shared(handle, width)).get_sample_value
        assert value("broker_tokens_cached") == 0
        replacement = Metrics("local", cells=rows[1])
        replacement.rejections["agent"].inc()
        assert value("broker_rejections_total", {"limit": "agent"}) == 6
        assert value("broker_token_remaining_seconds_count") == 1
        assert value("broker_token_remaining_seconds_sum") == 3000

    def test_another_process_counts_in_the_same_memory(self, handle: int) -> None:
        """The descriptor is all it needs."""
        code = (
            "import sys; from broker.telemetry.cells import shared;"
            "from broker.telemetry.metrics import Metrics;"
            "row = shared(int(sys.argv[1]), int(sys.argv[2])).rows[2];"
            "m = Metrics('local', cells=row); m.mints.refreshes['ahead', 'same'] += 1"
        )
        width = Metrics("local").layout.width
        command = [sys.executable, "-W", "error", "-c", code, str(handle), str(width)]
        subprocess.run(command, check=True, pass_fds=(handle,))
        value = shown(Metrics("local"), shared(handle, width)).get_sample_value
        assert value("broker_refreshes_total", {"reason": "ahead", "outcome": "same"}) == 1


def _labels(metrics: Metrics, handle: int, width: int) -> list[dict[str, str]]:
    families = shown(metrics, shared(handle, width)).collect()
    return [s.labels for f in families if f.name == "broker_build_info" for s in f.samples]


@given(st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(0, 10)), max_size=50))
def test_rows_sum_like_one_process(steps: list[tuple[int, int]]) -> None:
    """However the counting is spread over processes, the sum is what one would have counted."""
    cells: list[Row] = [[0.0], [0.0], [0.0]]
    counters = [Counter(row) for row in cells]
    for row, amount in steps:
        counters[row] += amount
    assert SharedCells(cells).total(0) == sum(amount for _, amount in steps)
    assert SharedCells(cells).maximum(0) == max(counter.value for counter in counters)
