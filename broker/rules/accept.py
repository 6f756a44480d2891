"""What an `Accept` header prefers (RFC 9110 section 12.5.1).

Quality first, then the order in which it is written; what is not acceptable has quality 0.
"""

import math
from typing import NamedTuple


class Range(NamedTuple):
    """One media range: `media` in lower case, its parameters but `q`, its quality from 0 to 1."""

    media: str
    parameters: dict[str, str]
    quality: float


def ranges(accept: str) -> list[Range]:
    """Return the ranges of a header, the preferred ones first; one with a broken `q` is dropped."""
    found = [_range(item) for item in accept.split(",") if item.strip()]
    return sorted((r for r in found if not math.isnan(r.quality)), key=lambda r: -r.quality)


def _range(item: str) -> Range:
    media, *rest = (part.strip() for part in item.split(";"))
    pairs = (part.partition("=") for part in rest)
    parameters = {name.strip().lower(): value.strip(' "') for name, _, value in pairs}
    return Range(media.lower(), parameters, _quality(parameters.pop("q", "1")))


def _quality(text: str) -> float:
    try:
        quality = float(text)
    except ValueError:
        return math.nan
    return quality if 0 <= quality <= 1 else math.nan
