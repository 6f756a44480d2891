"""What arrived at the vendor, when, and what it was told: the proof that a budget was kept.

An append-only list in order of arrival.  Secrets are held as digests only; tokens not at all.
Times are seconds of the vendor's own clocks, taken when the request's headers had arrived,
before any fault or latency.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from msgspec import Struct
from typing_extensions import override

MINT_PATH = "/v1/embed-tokens/request"
"""The route whose calls the vendor limits, and which this journal counts."""


class Call(Struct):
    """One request.

    Appended on arrival; the body's fields and the answer are filled in when they are known, and
    never changed after that.  `target` is what stood in the request line, `received` counts the
    bytes of the body.  `secret` is the SHA-256 of the api-secret (hex), `problem` what the vendor
    finds wrong with the body, `fault` the name of the fault that met the call, `status`
    the answer (None: none, or none yet).
    """

    mono: float
    wall: float
    method: str
    path: str
    remote: str
    target: str = ""
    received: int = 0
    secret: str | None = None
    user_agent: str | None = None
    traceparent: str | None = None
    request_id: str | None = None
    cookie: str | None = None
    agent: str | None = None
    fingerprint: str | None = None
    model: str | None = None
    problem: str | None = None
    fault: str | None = None
    status: int | None = None

    @property
    def is_mint(self) -> bool:
        """Whether it went to the route that mints."""
        return self.path == MINT_PATH

    @override
    def __repr__(self) -> str:
        parts = f"{self.mono:.6f}, {self.path!r}, agent={self.agent!r}, model={self.model!r}"
        return f"Call({parts}, fault={self.fault!r}, status={self.status})"


class Window(Struct, frozen=True):
    """The fullest window: where it begins (monotonic seconds) and how many calls it holds."""

    start: float
    count: int


Which = Callable[[Call], bool]


def _every(_: Call) -> bool:
    return True


class Journal:
    """All requests since the vendor was made, over restarts of its listener."""

    def __init__(self) -> None:
        self._records: list[Call] = []
        self._read = 0
        self._news = asyncio.Event()

    @property
    def records(self) -> Sequence[Call]:
        """Every request, on any route."""
        return self._records

    @property
    def calls(self) -> list[Call]:
        """The mint calls, whatever they were answered."""
        return [call for call in self._records if call.is_mint]

    def statuses(self) -> Counter[int | None]:
        """How many mint calls were given each answer (None: none)."""
        return Counter(call.status for call in self.calls)

    def worst_window(self, seconds: float = 60.0, where: Which = _every) -> Window:
        """Return the fullest window of this length, the earliest of equals.

        A window contains its beginning and not its end: two calls exactly `seconds` apart are
        never in the same one.
        """
        times = self._times(where)
        worst = Window(0.0, 0)
        first = 0
        for last, now in enumerate(times):
            while now - times[first] >= seconds:
                first += 1
            if last - first + 1 > worst.count:
                worst = Window(times[first], last - first + 1)
        return worst

    def in_window(self, seconds: float, where: Which = _every) -> int:
        """Return the largest number of mint calls in any window of this length."""
        return self.worst_window(seconds, where).count

    def per_second(self, where: Which = _every) -> list[int]:
        """Return the number of mint calls in each second, counted from the first call on."""
        times = self._times(where)
        if not times:
            return []
        counts = Counter(int(now - times[0]) for now in times)
        return [counts[second] for second in range(max(counts) + 1)]

    async def arrived(self, count: int) -> None:
        """Return when that many mint calls have been read, headers and body."""
        while self._read < count:
            self._news.clear()
            await self._news.wait()

    def arrive(self, call: Call) -> None:
        """Append a request whose headers are here."""
        self._records.append(call)

    def read(self, call: Call) -> None:
        """Note that the body of this request is here too."""
        self._read += call.is_mint
        self._news.set()

    def _times(self, where: Which) -> list[float]:
        return [call.mono for call in self._records if call.is_mint and where(call)]

    def __len__(self) -> int:
        return len(self._records)

    @override
    def __repr__(self) -> str:
        return f"Journal(requests={len(self._records)}, mint_calls={len(self.calls)})"
