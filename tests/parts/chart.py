"""Curves over the seconds of a run, as SVG: small, and legible on light and dark pages.

A picture is several charts below each other with one time axis; what happened when is a grey span
through all of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, LEFT, RIGHT, GAP = 860, 62, 132, 46
"""Pixels: of the picture, left and right of the charts, and above each of them."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A named line; seconds and values."""

    name: str
    colour: str
    points: Points


@dataclass(frozen=True)
class Chart:
    """Curves in one frame; `stacked` adds them up, `log` has decades."""

    title: str
    curves: Sequence[Curve]
    label: Callable[[float], str] = "{:g}".format
    stacked: bool = False
    log: bool = False
    height: int = 170


@dataclass(frozen=True)
class Span:
    """Something that went on from one second to another."""

    name: str
    begins: float
    ends: float


def draw(charts: Sequence[Chart], spans: Sequence[Span], seconds: float) -> str:
    """Return the picture."""
    height = sum(chart.height + GAP for chart in charts) + 30
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    font = 'font-family="system-ui,sans-serif" font-size="12" fill="#24292f"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#fff"/>',
    ]
    top = 0
    for number, chart in enumerate(charts):
        top += GAP
        frame = Frame(chart, top, seconds)
        parts += frame.drawn(spans, named=number == 0)
        top += chart.height
    parts += [*_time_axis(top, seconds), "</svg>"]
    return "\n".join(parts) + "\n"


def _x(second: float, seconds: float) -> float:
    return LEFT + second / seconds * (WIDTH - LEFT - RIGHT)


def _time_axis(top: int, seconds: float) -> Iterator[str]:
    step = next(step for step in (5, 10, 30, 60) if seconds / step <= 10 or step == 60)
    for second in range(0, int(seconds) + 1, step):
        text = f"{second // 60}:{second % 60:02}"
        x = _x(second, seconds)
        yield f'<text x="{x:.0f}" y="{top + 18}" text-anchor="middle" fill="#57606a">{text}</text>'


class Frame:
    """Where the values of one chart are on the picture."""

    def __init__(self, chart: Chart, top: int, seconds: float) -> None:
        self._chart = chart
        self._top = top
        self._seconds = seconds
        self._layers = _stacked(chart.curves) if chart.stacked else list(chart.curves)
        values = [value for curve in self._layers for _, value in curve.points if value > 0]
        if chart.log:
            self._low = 10.0 ** math.floor(math.log10(min(values, default=1.0)))
            self._high = 10.0 ** math.ceil(math.log10(max(values, default=10.0)))
        else:
            self._low, self._high = 0.0, max(values, default=1.0) * 1.05

    def drawn(self, spans: Sequence[Span], *, named: bool) -> Iterator[str]:
        """Yield title, spans (with their names above, where wanted), grid, curves, legend."""
        chart, top = self._chart, self._top
        title_at = top - (24 if named else 10)
        yield f'<text x="{LEFT}" y="{title_at}" font-weight="600">{escape(chart.title)}</text>'
        for span in spans:
            x, ends = _x(span.begins, self._seconds), _x(span.ends, self._seconds)
            yield (
                f'<rect x="{x:.1f}" y="{top}" width="{ends - x:.1f}" height="{chart.height}" '
                'fill="#d0d7de" opacity="0.55"/>'
            )
            if named:
                yield (
                    f'<text x="{(x + ends) / 2:.0f}" y="{top - 6}" text-anchor="middle" '
                    f'font-size="11" fill="#57606a">{escape(span.name)}</text>'
                )
        for value in self._ticks():
            if not chart.label(value):
                continue
            y = self._y(value)
            yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#d8dee4"/>'
            text = escape(chart.label(value))
            yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        for curve in reversed(self._layers):
            yield self._path(curve)
        for number, curve in enumerate(reversed(chart.curves) if chart.stacked else chart.curves):
            x, y = WIDTH - RIGHT + 14, top + 14 + 18 * number
            yield f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{curve.colour}"/>'
            yield f'<text x="{x + 16}" y="{y}">{escape(curve.name)}</text>'

    def _path(self, curve: Curve) -> str:
        if self._chart.stacked and curve.points:
            first, last = (_x(curve.points[n][0], self._seconds) for n in (0, -1))
            return (
                f'<path d="M{first:.0f} {self._y(0):.1f}{self._along(curve.points)}'
                f'L{last:.0f} {self._y(0):.1f}Z" fill="{curve.colour}"/>'
            )
        pieces = "".join(f"M{self._along(piece)[1:]}" for piece in _unbroken(curve.points))
        return f'<path d="{pieces}" fill="none" stroke="{curve.colour}" stroke-width="1.6"/>'

    def _along(self, points: Points) -> str:
        return "".join(f"L{_x(t, self._seconds):.0f} {self._y(v):.1f}" for t, v in points)

    def _ticks(self) -> list[float]:
        if self._chart.log:
            decades = range(round(math.log10(self._low)), round(math.log10(self._high)) + 1)
            return [10.0**decade for decade in decades]
        step = 10.0 ** math.floor(math.log10(self._high))
        step *= next(factor for factor in (0.2, 0.5, 1, 2) if self._high / (step * factor) <= 5)
        return [step * n for n in range(int(self._high / step) + 1)]

    def _y(self, value: float) -> float:
        if self._chart.log:
            low, high = math.log10(self._low), math.log10(self._high)
            share = (math.log10(max(value, self._low)) - low) / (high - low)
        else:
            share = value / self._high
        return self._top + self._chart.height * (1 - share)


def _unbroken(points: Points) -> Iterator[Points]:
    """Cut a line where values are missing: nothing happened, so nothing is drawn."""
    steps = [after[0] - before[0] for before, after in pairwise(points)]
    usual = min(steps, default=0.0)
    cuts = [n + 1 for n, step in enumerate(steps) if step > 1.5 * usual]
    for begins, ends in pairwise([0, *cuts, len(points)]):
        yield points[begins:ends]


def _stacked(curves: Sequence[Curve]) -> list[Curve]:
    """Put each curve on top of those before it; where one has no value, it adds nothing."""
    below: dict[float, float] = dict.fromkeys(
        sorted({t for curve in curves for t, _ in curve.points}), 0.0
    )
    layers = []
    for curve in curves:
        own = dict(curve.points)
        below = {t: height + own.get(t, 0.0) for t, height in below.items()}
        layers.append(Curve(curve.name, curve.colour, list(below.items())))
    return layers
