"""N13 on the wire: the way to the vendor is cut, packets are dropped, and nobody is told."""

import asyncio
import time
from pathlib import Path

import pytest
from networks import Place, network
from processes import good, merged
from replicas import UNLIMITED, Crowd, Replica, start, until

from broker.testing import FakeVendor

pytestmark = pytest.mark.parts

MINUTE = 6.0
"""Seconds: the shipped budget ten times as fast."""

WORST = 106 + 8
"""Calls in that minute: what is refilled in it, and the burst."""

OUT = "broker_upstream_calls_outstanding"


async def test_N13_a_partition_that_heals_and_one_that_does_not(tmp_path: Path) -> None:
    """What was sent into the first arrives when it heals: it is part of the window all the time.

    In the second the kernel ends the connections after half a minute: what was sent on them can
    arrive no more, and their slots are free, long before a call is given up otherwise.
    """
    with network() as net:
        place = net.add()
        async with FakeVendor(UNLIMITED, seed=1, host=net.here, monotonic=time.monotonic) as vendor:
            port = int(vendor.url.rpartition(":")[2])
            place.reach_as_loopback(net.here, port)
            tree = merged(
                good(tmp_path),
                {
                    "server.listen": f"{place.address}:8080",
                    "admin.listen": f"{place.address}:9464",
                    "issuer.kind": "upstream",
                    "issuer.upstream": {
                        "base_url": f"http://127.0.0.1:{port}",
                        "api_secret": vendor.secret.reveal(),
                        "timeout": "500ms",
                    },
                    "issuer.budget": {"rate": 106, "per": "6s", "burst": 8, "max_wait": "800ms"},
                },
            )
            replica = await start(tmp_path, tree, place.prefix)
            try:
                async with Crowd() as crowd:
                    crowd.let("asker", replica, 40)
                    await vendor.journal.arrived(40)
                    _cut(place, port)
                    await asyncio.sleep(3)
                    place.heal()
                    healed = time.monotonic()
                    before = len(vendor.journal.calls)
                    await vendor.journal.arrived(before + 60)
                    await asyncio.sleep(max(healed + MINUTE - time.monotonic(), 0))
                    _cut(place, port)
                    await asyncio.sleep(1)
                    await crowd.stop()
                    assert not {500} & set(crowd.statuses("asker"))
                assert vendor.journal.in_window(MINUTE) <= WORST
                cut = time.monotonic()
                assert await replica.metric(OUT) >= 1
                await until(lambda: _nothing_out(replica), "the kernel's time-out", 90)
                assert (
                    time.monotonic() - cut > 10
                )  # a caller's patience, and connecting, end sooner
            finally:
                await replica.close()


def _cut(place: Place, port: int) -> None:
    """Drop every packet to and from the vendor, and no others: what is asked here goes on."""
    place.run("iptables", "-A", "OUTPUT", "-p", "tcp", "--dport", str(port), "-j", "DROP")
    place.run("iptables", "-A", "INPUT", "-p", "tcp", "--sport", str(port), "-j", "DROP")


async def _nothing_out(replica: Replica) -> bool:
    await asyncio.sleep(0.2)
    return await replica.metric(OUT) == 0
