"""Metrics: all there from the start, valid in both formats, constant in number, and true."""

import re
import secrets
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import until_true
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain_text
from web.edge import AGENT, OTHER_AGENT, Edge, raise_file_limit, samples, serving, visitor

from broker.clock import SystemClock
from broker.model import LimitName, TokenRequest
from broker.pacing.pacer import Priority
from broker.telemetry import exposition
from broker.telemetry.cells import MetricLayout, SharedCells
from broker.telemetry.labels import BackgroundTask
from broker.telemetry.metrics import REQUEST_BUCKETS

OPEN = "application/openmetrics-text; version=1.0.0"

LIMITS = {limit.value for limit in LimitName}
OUTCOMES = {
    *("minted", "reused", "coalesced", "limited", "invalid", "unauthorized", "forbidden"),
    *("shed", "failed"),
}

Labels = dict[str, set[str]]

DOCUMENTED: dict[str, tuple[str, Labels]] = {
    "broker_requests": ("counter", {"outcome": OUTCOMES}),
    "broker_request_duration_seconds": ("histogram", {"outcome": OUTCOMES}),
    "broker_mint_duration_seconds": (
        "histogram",
        {"issuer": {"local"}, "outcome": {"minted", "refused", "failed"}},
    ),
    "broker_rejections": ("counter", {"limit": {*LIMITS, "budget"}}),
    "broker_near_limit": ("counter", {"limit": LIMITS}),
    "broker_dry_run_rejections": ("counter", {"limit": LIMITS}),
    "broker_mints_in_flight": ("gauge", {}),
    "broker_token_checks": ("counter", {"verdict": {"good", "refused"}}),
    "broker_sessions_ended": ("counter", {}),
    "broker_sessions_recorded": ("gauge", {}),
    "broker_tokens_cached": ("gauge", {}),
    "broker_tokens_evicted": ("counter", {"cause": {"expired", "capacity"}}),
    "broker_refreshes": (
        "counter",
        {"reason": {"ahead", "floor", "fresh"}, "outcome": {"renewed", "same", "failed"}},
    ),
    "broker_token_remaining_seconds": ("histogram", {}),
    "broker_buckets_tracked": ("gauge", {"limit": LIMITS}),
    "broker_buckets_overflowed": ("counter", {"limit": LIMITS}),
    "broker_event_loop_lag_seconds": ("histogram", {}),
    "broker_config_reloads": ("counter", {"outcome": {"success", "failure"}}),
    "broker_build_info": ("gauge", {"version": set(), "python": set()}),
    "broker_workers": ("gauge", {}),
    "broker_connections": ("gauge", {}),
    "broker_fast_lane_off": ("gauge", {}),
    "broker_log_lines_dropped": ("counter", {}),
    "broker_config_reload_failed": ("gauge", {}),
    "broker_worker_restarts": ("counter", {}),
    "broker_worker_hangs": ("counter", {}),
    "broker_background_restarts": ("counter", {"task": {task.value for task in BackgroundTask}}),
}
"""What an operator is promised of a local issuer: kind and the closed sets of its labels."""

WITH_A_BUDGET: dict[str, tuple[str, Labels]] = {
    "broker_upstream_budget_remaining": ("gauge", {}),
    "broker_upstream_queue_depth": ("gauge", {}),
    "broker_upstream_calls_outstanding": ("gauge", {}),
    "broker_upstream_queue_wait_seconds": ("histogram", {}),
}

BUDGET = {"rate": 60, "per": "60s", "burst": 4, "max_wait": "1s"}


@pytest.fixture(autouse=True, scope="module")
def _many_files() -> None:
    raise_file_limit()


async def families(edge: Edge, form: str) -> dict[str, Metric]:
    """Scrape in one of the formats and parse it strictly; ours only."""
    accept, parse = (OPEN, open_metrics) if form == "open" else ("text/plain", plain_text)
    reply = await edge.admin("/metrics", Accept=accept)
    assert reply.status == 200
    found: dict[str, Metric] = {}
    for family in parse(reply.body.decode()):
        assert family.name not in found, f"{family.name} is there twice"
        found[family.name] = family
    return {name: family for name, family in found.items() if name.startswith("broker_")}


def labels_of(family: Metric) -> Labels:
    """Return the values of each label of a family, bucket bounds aside."""
    values: Labels = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label != "le":
                values.setdefault(label, set()).add(value)
    return values


class TestPromises:
    @pytest.mark.parametrize("form", ["plain", "open"])
    @pytest.mark.parametrize("budget", [None, BUDGET])
    async def test_every_documented_metric_is_there_before_the_first_request(
        self, form: str, budget: dict[str, object] | None
    ) -> None:
        """Name, kind, label values, help; and not one more that nobody documented."""
        promised = DOCUMENTED if budget is None else {**DOCUMENTED, **WITH_A_BUDGET}
        async with serving({"issuer": {"budget": budget}} if budget else None) as edge:
            found = await families(edge, form)
            assert set(found) == set(promised)
            for name, (kind, labels) in promised.items():
                family = found[name]
                assert family.type == kind, name
                assert len(family.documentation) > 10, name
                if name == "broker_build_info":
                    assert labels_of(family).keys() == labels.keys()
                else:
                    assert labels_of(family) == labels, name

    async def test_every_series_starts_at_0(self) -> None:
        """A rate over the first event is right only if its series was there before."""
        async with serving({"issuer": {"budget": BUDGET}}) as edge:
            scraped = await edge.scrape()
        volatile = ("process_", "python_", "broker_event_loop_lag", "broker_build_info")
        volatile += ("broker_workers",)
        started = {name: n for name, n in scraped.items() if not name.startswith(volatile)}
        assert len(started) > 300
        assert {name: n for name, n in started.items() if n} == {}
        assert [n for name, n in scraped.items() if name.startswith("broker_build_info")] == [1]
        assert scraped["broker_workers"] == 1

    async def test_every_combination_of_labels_is_there(self) -> None:
        """Outcomes of two labels at once as well."""
        async with serving() as edge:
            found = await families(edge, "plain")
        for name, (kind, labels) in DOCUMENTED.items():
            combinations = 1
            for values in labels.values():
                combinations *= max(len(values), 1)
            ending = "_count" if kind == "histogram" else ""
            series = [
                s for s in found[name].samples if s.name.endswith(ending) and "le" not in s.labels
            ]
            series = [s for s in series if not s.name.endswith("_sum")]
            assert len(series) == combinations, name

    async def test_histograms_reach_from_50_us_to_10_s(self) -> None:
        """A reuse takes tens of microseconds, a mint up to its deadline."""
        async with serving() as edge:
            found = await families(edge, "plain")
        for name in ("broker_request_duration_seconds", "broker_mint_duration_seconds"):
            bounds = {s.labels["le"] for s in found[name].samples if "le" in s.labels}
            assert {float(bound) for bound in bounds} == {*REQUEST_BUCKETS, float("inf")}
            assert (min(REQUEST_BUCKETS), max(REQUEST_BUCKETS)) == (0.00005, 10.0)


async def _one_of_each(edge: Edge, secrets_of: dict[str, str]) -> None:
    """Cause each outcome that a caller can cause, in different numbers."""
    fingerprint = visitor()
    for _ in range(3):
        await edge.request_token(fingerprint)  # minted, reused, reused
    await edge.request_token(fingerprint, fresh=True)
    for _ in range(2):
        await edge.post(b"{")
    for _ in range(4):
        await edge.fail_to_log_in()
    await edge.request_token(headers=[("Origin", "null")])
    await edge.request_token(agent=OTHER_AGENT, secret=secrets_of["narrow"])


class TestTruth:
    async def test_outcomes_and_histograms_count_what_happened(self) -> None:
        """Each request is in exactly one outcome, with its duration; remaining life at hand-out."""
        narrow = secrets.token_urlsafe(24)
        clients = {"narrow": {"secret": narrow, "agents": [AGENT]}}
        async with serving({"clients": clients}, clock=SystemClock()) as edge:
            await _one_of_each(edge, {"narrow": narrow})
            scraped = await edge.scrape()
        expected = {
            **dict.fromkeys(OUTCOMES, 0),
            "minted": 2,
            "reused": 2,
            "invalid": 2,
            "unauthorized": 4,
            "forbidden": 2,
        }
        for outcome, count in expected.items():
            label = f'{{outcome="{outcome}"}}'
            assert scraped[f"broker_requests_total{label}"] == count, outcome
            assert scraped[f"broker_request_duration_seconds_count{label}"] == count
            assert (scraped[f"broker_request_duration_seconds_sum{label}"] > 0) is (count > 0)
        assert scraped["broker_token_remaining_seconds_count"] == 4
        assert 4 * 3500 < scraped["broker_token_remaining_seconds_sum"] <= 4 * 3595
        assert scraped["broker_tokens_cached"] == 1
        assert scraped["broker_mints_in_flight"] == 0
        minted = '{issuer="local",outcome="minted"}'
        assert scraped[f"broker_mint_duration_seconds_count{minted}"] == 2
        assert scraped['broker_refreshes_total{outcome="renewed",reason="fresh"}'] == 1
        assert scraped['broker_buckets_tracked{limit="fingerprint"}'] == 1
        assert scraped['broker_buckets_tracked{limit="agent"}'] == 1
        assert scraped['broker_buckets_tracked{limit="auth"}'] == 1

    async def test_M3_rejections_equal_the_429s_that_clients_saw(self) -> None:
        """Every limit at once, joiners of a refused mint and failed log-ins included."""
        limits = {
            "fingerprint": {"rate": 1, "per": "1h", "burst": 8},
            "fingerprint_mints": {"rate": 1, "per": "1h", "burst": 2},
            "agent": {"rate": 1, "per": "1h", "burst": 20},
            "client": {"rate": 1, "per": "1h", "burst": 290},
        }
        async with serving({"limits": limits}) as edge:
            visitors = [visitor() for _ in range(10)]
            replies = []
            for _ in range(12):
                replies += await edge.all_at_once(edge.asking(v, fresh=True) for v in visitors)
            sent = [edge.asking() for _ in range(50)]
            sent += [edge.asking(agent=OTHER_AGENT) for _ in range(150)]
            wrong = secrets.token_urlsafe(20)
            sent += [edge.asking(secret=wrong) for _ in range(40)]
            sent += [edge.posting(b"", path="/v1/validate", secret=wrong) for _ in range(10)]
            replies += await edge.all_at_once(sent)
            scraped = await edge.scrape()
        seen: dict[str, int] = {}
        for reply in replies:
            if reply.status == 429:
                limit = re.fullmatch(r"limit (\w+) reached: .*", reply.message)
                assert limit is not None
                seen[limit[1]] = seen.get(limit[1], 0) + 1
        assert seen.keys() == LIMITS
        for limit_name, count in seen.items():
            assert scraped[f'broker_rejections_total{{limit="{limit_name}"}}'] == count, limit_name
        on_the_token_route = sum(seen.values()) - sum(r.status == 429 for r in replies[-10:])
        assert scraped['broker_requests_total{outcome="limited"}'] == on_the_token_route

    async def test_near_limit_counts_before_it_hurts(self) -> None:
        """Of a burst of ten the last two are near: less than a fifth is left."""
        limits = {"fingerprint": {"rate": 1, "per": "1h", "burst": 10}}
        async with serving({"limits": limits}) as edge:
            fingerprint = visitor()
            counts = []
            for _ in range(11):
                await edge.request_token(fingerprint)
                scraped = await edge.scrape()
                counts.append(scraped['broker_near_limit_total{limit="fingerprint"}'])
        assert counts == [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2]

    async def test_evictions_by_cause(self) -> None:
        """Alive to make room, or dead: two different worries."""
        async with serving({"reuse": {"max_tokens": 5}}) as edge:
            for _ in range(8):
                await edge.request_token()
            scraped = await edge.scrape()
            assert scraped['broker_tokens_evicted_total{cause="capacity"}'] == 3
            assert scraped["broker_tokens_cached"] == 5
            edge.time.advance(3600)
            edge.app.parts.store.purge_expired()
            scraped = await edge.scrape()
            assert scraped['broker_tokens_evicted_total{cause="expired"}'] == 5
            assert scraped["broker_tokens_cached"] == 0

    async def test_a_loop_that_stood_is_seen(self) -> None:
        """By the time that a round of housekeeping came late."""
        async with serving() as edge:

            async def is_told() -> bool:
                time.sleep(0.5)  # noqa: ASYNC251 - the loop stands, whenever the round was due
                return (await edge.scrape())["broker_event_loop_lag_seconds_sum"] >= 0.4

            await until_true(is_told)

    async def test_reloads_by_outcome(self) -> None:
        """A broken file is counted, and changes nothing."""
        from broker.config.schema import ConfigError

        async with serving() as edge:
            assert await edge.app.reloader.reload() is True

            def broken() -> Any:
                raise ConfigError("limits.agent: rate must be a positive, finite number")

            edge.app.reloader._load = broken
            assert await edge.app.reloader.reload() is False
            scraped = await edge.scrape()
            assert scraped['broker_config_reloads_total{outcome="success"}'] == 1
            assert scraped['broker_config_reloads_total{outcome="failure"}'] == 1
            assert (await edge.request_token()).status == 200

    async def test_the_budget_is_visible(self) -> None:
        """A pacer starts empty, so that a restart adds no burst."""
        async with serving({"issuer": {"budget": BUDGET}}) as edge:
            scraped = await edge.scrape()
        assert scraped["broker_upstream_budget_remaining"] == 0
        assert scraped["broker_upstream_queue_depth"] == 0

    async def test_calls_that_are_out_are_visible(self) -> None:
        """Until the slot is given back; nobody waits meanwhile."""
        name = "broker_upstream_calls_outstanding"
        async with serving({"issuer": {"budget": {**BUDGET, "rate": 100_000}}}) as edge:
            assert edge.app.parts.pacer is not None
            slot = await edge.app.parts.pacer.acquire(Priority.FIRST, "web")
            scraped = await edge.scrape()
            assert (scraped[name], scraped["broker_upstream_queue_depth"]) == (1, 0)
            slot.settle()
            assert (await edge.scrape())[name] == 0


class TestSeries:
    async def test_M3_their_number_is_constant_after_100_000_agents_and_visitors(self) -> None:
        """Labels never come from input: not agents, visitors, models, paths, methods, secrets."""
        async with serving({"limits": {"agent": {"burst": 10}}}, level="error") as edge:
            now = edge.app.parts.clock.mono()
            before = (await edge.scrape()).keys()
            for n in range(100_000):
                request = TokenRequest("web", f"agent{n}", f"{n:032x}")
                visit = await edge.app.parts.store.admit(request, request.key)
                assert visit.rejection is None
                assert edge.app.parts.store.charge_mint(request, now) is None
            for n in range(2_000):
                await edge.app.parts.token_service.issue(
                    TokenRequest("web", f"agent{n}", f"{n:016x}", f"m{n}"), 10
                )
            for n in range(20):
                await edge.request_token(agent=f"a{n}", model=f"m{n}")
                await edge.get(f"/{n}", method=["GET", "PUT", "OPTIONS"][n % 3])
                await edge.fail_to_log_in()
            scraped = await edge.scrape()
        assert scraped.keys() == before
        assert scraped['broker_buckets_tracked{limit="agent"}'] == 100_020
        assert scraped['broker_buckets_tracked{limit="fingerprint"}'] == 102_020
        assert scraped["broker_tokens_cached"] == 2_020

    async def test_counters_only_grow(self) -> None:
        """Scrape by scrape, in any traffic."""
        async with serving() as edge:
            last: dict[str, float] = {}
            fingerprint = visitor()
            for n in range(30):
                await edge.request_token(fingerprint if n % 2 else None, fresh=n % 3 == 0)
                scraped = await edge.scrape()
                for name, value in last.items():
                    if re.search(r"_total|_count|_bucket", name):
                        assert scraped[name] >= value, name
                last = scraped


@settings(deadline=None)  # a machine may be busy
@given(st.lists(st.floats(0, 20) | st.sampled_from(REQUEST_BUCKETS)))
def test_a_histogram_counts_as_prometheus_does(values: list[float]) -> None:
    """A value on a bound belongs to that bucket; buckets are cumulative and end in all."""
    layout = MetricLayout()
    histogram = layout.histograms("h", "", REQUEST_BUCKETS)[()]
    layout.count("c", "", of="h")
    for value in values:
        histogram.observe(value)
    registry = exposition.registry(layout.families, SharedCells([layout.cells]), lambda: None)
    assert registry.get_sample_value("h_count") == len(values)
    assert registry.get_sample_value("c_total") == len(values)
    assert registry.get_sample_value("h_sum") == pytest.approx(sum(values))
    for bound in (*REQUEST_BUCKETS, float("inf")):
        label = "+Inf" if bound == float("inf") else str(bound)
        assert registry.get_sample_value("h_bucket", {"le": label}) == _at_most(values, bound)


def _at_most(values: Iterable[float], bound: float) -> int:
    return sum(value <= bound for value in values)


def test_samples_reads_what_prometheus_client_writes() -> None:
    """Guards the helper of these tests: labels and values as they stand."""
    assert samples('# TYPE a gauge\na{x="1",y="2"} 3\nb 4\n') == {'a{x="1",y="2"}': 3, "b": 4}
