"""The plots: well-formed, complete, inside their frames, and honest about gaps."""

import re
from xml.etree import ElementTree as ET

import pytest
from chart import LEFT, RIGHT, WIDTH, Chart, Curve, Span, draw

pytestmark = pytest.mark.parts

SVG = "{http://www.w3.org/2000/svg}"


def drawn(chart: Chart, *spans: Span) -> ET.Element:
    """Draw a chart of a minute and read it back."""
    return ET.fromstring(draw([chart], spans, 60))


def paths(picture: ET.Element, colour: str) -> list[str]:
    """Return what is drawn in a colour."""
    found = picture.iter(f"{SVG}path")
    return [p.get("d", "") for p in found if colour in (p.get("stroke"), p.get("fill"))]


def points(path: str) -> list[tuple[float, float]]:
    """Return the corners of a path."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_everything_has_its_name() -> None:
    """Title, curves and spans, whatever characters they have."""
    chart = Chart("a < b", [Curve("R&D", "#123456", [(0, 1), (60, 2)])])
    texts = {text.text for text in drawn(chart, Span("rain", 10, 20)).iter(f"{SVG}text")}
    assert {"a < b", "R&D", "rain", "0:00", "1:00"} <= texts


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_curves_stay_inside_their_frame(log: bool, stacked: bool) -> None:
    """Zeros, small and large values."""
    values = [(0.0, 0.0), (20.0, 0.0004), (40.0, 7.0), (60.0, 1234.5)]
    chart = Chart(
        "t", [Curve("a", "#a", values), Curve("b", "#b", values)], log=log, stacked=stacked
    )
    for colour in ("#a", "#b"):
        (path,) = paths(drawn(chart), colour)
        for x, y in points(path):
            assert LEFT <= x <= WIDTH - RIGHT
            assert 46 <= y <= 46 + chart.height


def test_a_stack_adds_up() -> None:
    """The upper curve is the sum; where one has no value, it adds nothing."""
    lower, upper = [(0.0, 1.0), (30.0, 1.0), (60.0, 1.0)], [(0.0, 1.0), (60.0, 3.0)]
    chart = Chart("t", [Curve("low", "#a", lower), Curve("high", "#b", upper)], stacked=True)
    picture = drawn(chart)
    (below,), (above,) = paths(picture, "#a"), paths(picture, "#b")
    ground = points(above)[0][1]
    heights = [ground - y for _, y in points(above)[1:-1]]
    unit = ground - points(below)[1][1]
    assert heights == pytest.approx([2 * unit, unit, 4 * unit], abs=0.2)


def test_a_gap_is_not_bridged() -> None:
    """Where there was no value for a while, there is no line."""
    there = [(float(t), 1.0) for t in (*range(0, 20, 2), *range(40, 60, 2))]
    (path,) = paths(drawn(Chart("t", [Curve("a", "#a", there)])), "#a")
    assert path.count("M") == 2
    assert len(points(path)) == len(there)


def test_a_curve_without_values_is_only_named() -> None:
    """A run may have had none of it."""
    picture = drawn(Chart("t", [Curve("none", "#a", [])]))
    assert [points(path) for path in paths(picture, "#a")] == [[]]
    assert "none" in {text.text for text in picture.iter(f"{SVG}text")}
