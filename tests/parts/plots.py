"""Draw the plots of grafana/README.md: four minutes of load and weather, as Prometheus saw them.

    .cache/venv/bin/python tests/parts/plots.py [--folder grafana/plots]

Runs vendor, store, broker, k6, Prometheus and Alertmanager (see `weather`), then asks
Prometheus what the dashboards ask, and writes visitors.svg and vendor.svg.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from chart import Chart, Curve, Points, Span, draw
from weather import Forecast, Phase, Watched, watched

from broker.model import Outcome

ROOT = Path(__file__).parents[2]

LONG = Forecast(
    length=250,
    phases=(
        Phase("surge", 30, 45),
        Phase("slow", 65, 85),
        Phase("failing", 105, 145),
        Phase("throttled", 170, 176),
        Phase("key refused", 192, 212),
        Phase("store away", 226, 234),
    ),
    fair=Phase("fair", 50, 65),
    lifetime=600,
)
"""Long enough for the breaker, which looks at the last 30 s, to open and close again."""

STEP = 2.0
"""Seconds between two points."""

SERVED = {"reused": "#2da44e", "coalesced": "#8ddb8c", "minted": "#218bff"}
REFUSED = {"limited": "#eac54f", "shed": "#fb8f44", "failed": "#cf222e", "mistakes": "#a475f9"}
MISTAKES = "invalid|unauthorized|forbidden"


def main() -> int:
    """Run, ask and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "grafana" / "plots")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, watched(Path(name), LONG) as run:
        write(run, options.folder)
    return 0


def write(run: Watched, folder: Path) -> None:
    """Draw both plots of a run into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, charts in {"visitors": _visitors(run), "vendor": _vendor(run)}.items():
        spans = [Span(phase.name, phase.begins, phase.ends) for phase in run.forecast.phases]
        picture = draw(charts, spans, run.forecast.length)
        (folder / f"{name}.svg").write_text(picture, encoding="utf-8")


def _visitors(run: Watched) -> list[Chart]:
    def rate(outcomes: str) -> Points:
        return _curve(run, f'sum(rate(broker_requests_total{{outcome=~"{outcomes}"}}[5s]))')

    def slowest(outcome: Outcome) -> Points:
        buckets = f'broker_request_duration_seconds_bucket{{outcome="{outcome.value}"}}'
        return _curve(run, f"histogram_quantile(0.99, sum by (le) (rate({buckets}[10s])))")

    colours = SERVED | REFUSED
    return [
        Chart(
            "Requests a second, by outcome",
            [
                Curve(name, colour, rate(MISTAKES if name == "mistakes" else name))
                for name, colour in colours.items()
            ],
            stacked=True,
        ),
        Chart(
            "Time to answer: 99 % are faster",
            [
                Curve(one.value, colours[one.value], slowest(one))
                for one in (Outcome.MINTED, Outcome.LIMITED, Outcome.REUSED)
            ],
            label=_seconds,
            log=True,
        ),
    ]


def _vendor(run: Watched) -> list[Chart]:
    def calls(statuses: str) -> Points:
        return _curve(run, f'sum(rate(broker_upstream_requests_total{{status=~"{statuses}"}}[5s]))')

    def mint(q: float) -> Points:
        buckets = "sum by (le) (rate(broker_mint_duration_seconds_bucket[10s]))"
        return _curve(run, f"histogram_quantile({q}, {buckets})")

    def breaker(name: str) -> Points:
        return _curve(run, f'broker_breaker_open{{breaker="{name}"}}')

    return [
        Chart(
            "Calls to the vendor a second, by status",
            [
                Curve("200", "#2da44e", calls("200")),
                Curve("503", "#cf222e", calls("5..")),
                Curve("429", "#eac54f", calls("429")),
                Curve("403", "#a475f9", calls("40.")),
            ],
            stacked=True,
        ),
        Chart(
            "Mint latency",
            [Curve("99 %", "#0969da", mint(0.99)), Curve("median", "#80ccff", mint(0.5))],
            label=_seconds,
            log=True,
            height=110,
        ),
        Chart(
            "Budget and queue",
            [
                Curve("calls left", "#2da44e", _curve(run, "broker_upstream_budget_remaining")),
                Curve("mints waiting", "#fb8f44", _curve(run, "broker_upstream_queue_depth")),
            ],
            height=110,
        ),
        Chart(
            "Breakers open, and workers without the store",
            [
                Curve("health", "#cf222e", breaker("health")),
                Curve("credentials", "#a475f9", breaker("credentials")),
                Curve("no store", "#57606a", _curve(run, "broker_store_degraded")),
            ],
            label=lambda value: {0.0: "no", 1.0: "yes"}.get(value, ""),
            height=50,
        ),
    ]


def _curve(run: Watched, query: str) -> Points:
    """Ask for one curve, in seconds of the load."""
    found = run.prometheus.curves(query, run.began, run.moment(run.forecast.length), STEP)
    points = next(iter(found.values()), [])
    return [(round(time - run.began, 1), value) for time, value in points]


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size * 0.999:  # 10 ** -3 is not quite a thousandth
            return f"{value / size:g} {unit}"
    return f"{value / 1e-6:.0f} µs"


if __name__ == "__main__":
    sys.exit(main())
