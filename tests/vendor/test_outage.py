"""Row V6: half an hour without the vendor, at 1/60 of its length, over real sockets.

An hour of a token's life takes a minute here, and so do the marks, the vendor's minute and the
budget; the breaker's pauses stay as they are, so the recovery is the slower for it.
"""

import asyncio
import random
import time

import msgspec
import pytest
from relaying import House, Reply, broker_before, visitor

from broker.testing import FakeVendor, VendorSettings
from broker.testing.vendor.settings import Allowance

LIFETIME, DARK = 60, 30
"""Seconds: of a token's life, and without the vendor."""

OUTAGE_FLOOR = 1.0
"""Seconds of life below which no token is handed out: a minute of the hour."""

VISITORS, RATE = 300, 200
"""Known visitors, and how many of them ask in a second."""

SLACK = 0.7
"""Seconds by which a busy machine may be off."""

DATED = 1.0
"""Seconds by which a token may end before we think: the vendor writes whole ones into it."""

TREE = {
    "issuer": {
        "upstream": {"timeout": "500ms"},
        "budget": {"rate": 95, "per": "1s", "burst": 8, "max_wait": "500ms", "window": 5708},
    },
    "reuse": {"floor": "5s", "floor_in_outage": "1s", "refresh_ahead": "15s"},
    "log": {"level": "error"},
}


class Visitors:
    """People who come again and again; each remembers when their token ends."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.chance = random.Random(6)
        self.ends: dict[str, float] = {visitor(): 0.0 for _ in range(VISITORS)}
        self.seen: list[tuple[float, float, Reply]] = []

    async def request_token(self, fingerprint: str) -> None:
        """Note when it was, the life left of what this visitor then has, and the answer."""
        reply = await self.house.request_token(fingerprint)
        if reply.status == 200:
            claims = self.house.vendor.claims_of(reply.token)
            self.ends[fingerprint] = float(msgspec.convert(claims["exp"], int))
        left = self.ends[fingerprint] - time.time()
        self.seen.append((time.monotonic(), left, reply))

    async def come(self, seconds: float) -> None:
        """Come `RATE` times a second for so long, at an even pace."""
        everybody = list(self.ends)
        ends = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            due = time.monotonic()
            while due < ends:
                group.create_task(self.request_token(self.chance.choice(everybody)))
                due += 1 / RATE
                await asyncio.sleep(max(due - time.monotonic(), 0))


@pytest.mark.parts
async def test_V6_G5_thirty_seconds_in_the_dark() -> None:
    """Served to the floor in outage, then an honest 503; few calls; no stampede afterwards."""
    settings = VendorSettings(ip=Allowance(120, 1), lifetime=LIFETIME)
    async with FakeVendor(settings) as vendor, broker_before(vendor, TREE) as house:
        crowd = Visitors(house)
        while not all(crowd.ends.values()):
            missing = [fingerprint for fingerprint, end in crowd.ends.items() if not end]
            await asyncio.gather(
                *(crowd.request_token(fingerprint) for fingerprint in missing[:40])
            )
            await asyncio.sleep(0.3)
        crowd.seen.clear()
        await crowd.come(34)  # their renewals begin about 45 s after the first of them came
        before = len(vendor.journal.calls)
        dark, errors_before = time.monotonic(), _told(house)
        await vendor.ignore_connections()
        await crowd.come(DARK)
        light = time.monotonic()
        tried = _told(house) - errors_before
        await vendor.accept_connections()
        metrics = await house.scrape()
        waits = house.app.parts.issuer.health.wait(house.app.parts.clock.mono()) / 1e6
        await crowd.come(waits + 8)

        failures = [(at, left, reply) for at, left, reply in crowd.seen if reply.status != 200]
        print(f"answers {len(crowd.seen)}, of these failed {len(failures)}")
        print(f"calls in the dark {tried}, pause when it ended {waits:.1f} s")
        assert metrics['broker_breaker_open{breaker="health"}'] == 1
        assert all(dark < at for at, _, _ in failures)
        # Nobody fails whose token was good enough ...
        assert max(left for _, left, _ in failures) < OUTAGE_FLOOR + SLACK
        # ... and nobody is given one that is not.
        assert min(left for _, left, reply in crowd.seen if reply.status == 200) > (
            OUTAGE_FLOOR - DATED - SLACK
        )
        # All but the probes' own callers are told when to come back.
        statuses = [reply.status for _, _, reply in failures]
        assert statuses.count(503) >= len(statuses) - tried
        assert all(1 <= reply.retry_after <= 60 for _, _, reply in failures if reply.status == 503)
        # Ten calls open the breaker, each pause ends with one probe; what was under way for the
        # half second of the time-out comes on top.
        assert tried <= 10 + 20 + 4
        # Who had to wait is served again, and the vendor was never overrun.
        late = [reply.status for at, _, reply in crowd.seen if at > light + waits + 6]
        assert set(late) == {200}
        assert vendor.journal.in_window(1.0) <= 120
        assert 429 not in vendor.journal.statuses()
        assert len(vendor.journal.calls) > before


def _told(house: House) -> float:
    """Calls to the vendor that gave no token, as the metrics have it."""
    return sum(counter.value for counter in house.app.metrics.upstream.errors.values())
