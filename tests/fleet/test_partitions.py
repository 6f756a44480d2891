"""N13 on the wire: the way to the vendor is cut, packets are dropped, and nobody is told."""

import asyncio
import secrets
import sys
import time
from pathlib import Path

import pytest
from networks import network
from processes import merged
from replicas import Replica, until

VENDOR = Path(__file__).resolve().parent.parent / "vendor"
sys.path.append(str(VENDOR))

from processes import Broker  # noqa: E402
from standing import Visitors, relay_settings, standing_vendor, worst_window  # noqa: E402

pytestmark = pytest.mark.parts

MINUTE = 6.0
"""Seconds: the shipped budget ten times as fast."""

WORST = 106 + 8
"""Calls in that minute: what is refilled in it, and the burst."""

OUT = "broker_upstream_calls_outstanding"


async def test_N13_a_partition_that_heals_and_one_that_does_not(tmp_path: Path) -> None:
    """What was sent into the first arrives when it heals: it is part of the window all the time.

    In the second, connections are made and nothing that is sent on them arrives.  The kernel ends
    them after half a minute: what was sent can arrive no more, and the slots are free, long before
    a call is given up otherwise.
    """
    secret = secrets.token_urlsafe(24)
    with network() as net:
        place, home = net.add(), net.add()
        with standing_vendor(home.prefix, home.address) as vendor:
            port = int(vendor.url.rpartition(":")[2])
            place.reach_as_loopback(home.address, port)
            tree = merged(
                relay_settings(vendor, secret),
                {
                    "server.listen": f"{place.address}:8080",
                    "admin.listen": f"{place.address}:9464",
                    "issuer.upstream": {
                        "base_url": f"http://127.0.0.1:{port}",
                        "api_secret": vendor.key,
                        "timeout": "500ms",
                    },
                    "issuer.budget": {
                        "rate": 106,
                        "per": "6s",
                        "burst": 8,
                        "max_wait": "800ms",
                        "window": 1068,
                    },
                },
            )
            broker = await asyncio.to_thread(Broker.configured, tmp_path, tree, place.prefix)
            replica = Replica(broker, secret)
            try:
                visitors = Visitors(lambda: [broker.url], secret, 40)
                async with visitors.asking():
                    await visitors.served(40)
                    home.cut_off_from(place.address)
                    await asyncio.sleep(3)
                    home.heal()
                    healed = time.monotonic()
                    await visitors.served(60)
                    await asyncio.sleep(max(healed + MINUTE - time.monotonic(), 0))
                    home.drop_what_carries_data(place.address)
                    await asyncio.sleep(1)
                assert visitors.answers[500] == 0
                cut = time.monotonic()
                assert await replica.metric(OUT) >= 1
                await until(lambda: _nothing_out(replica), "the kernel's time-out", 90)
                assert time.monotonic() - cut > 10  # a caller's patience and connecting end sooner
            finally:
                await replica.close()
            arrived = vendor.arrivals()
    assert worst_window(arrived, MINUTE) <= WORST


async def _nothing_out(replica: Replica) -> bool:
    await asyncio.sleep(0.2)
    return await replica.metric(OUT) == 0
