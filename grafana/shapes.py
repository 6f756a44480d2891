"""The kinds of panels, and what the pages share: colours, selectors, quantiles.

In a query `@` stands for the chosen job and instances, `[~]` for the interval that Grafana derives
from the scrape's.  `alarm` is where an alert of config/prometheus/rules.yml draws its line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves over time; `queries` by their legend, `unit` as Grafana calls it."""

    title: str
    unit: str
    description: str
    queries: Mapping[str, str]
    alarm: float | None = None
    stacked: bool = False
    colours: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stat(Panel):
    """One number.  `text` is what of it is shown; `nothing` stands for no data, if that is fine."""

    text: str = "value"
    nothing: str = "-"


@dataclass(frozen=True, kw_only=True)
class States(Panel):
    """Bars of states; `words` gives each value its word and colour."""

    words: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Heat(Panel):
    """A histogram over time."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A heading and its panels, `across` of them side by side."""

    title: str
    panels: Sequence[Panel]
    across: int = 3
    height: int = 8


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """One page; alerts link to its `uid`."""

    name: str
    uid: str
    title: str
    description: str
    rows: Sequence[Row]


OUTCOMES = {
    "reused": "green",
    "coalesced": "light-green",
    "minted": "blue",
    "limited": "yellow",
    "shed": "orange",
    "failed": "red",
    "invalid": "purple",
    "unauthorized": "dark-purple",
    "forbidden": "dark-red",
}
"""One colour each wherever they appear; what a visitor does not feel is green or blue."""

TOKENS = 'outcome=~"minted|reused|coalesced"'


def quantiles(metric: str, *wanted: float) -> dict[str, str]:
    """Queries for quantiles of a histogram without labels, by their name."""
    return {
        f"p{q * 100:g}": f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{{@}}[~])))"
        for q in wanted
    }
