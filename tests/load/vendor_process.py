"""A fake vendor as a process of its own: it can be stopped and resumed, and fails on command.

    python tests/load/vendor_process.py JOURNAL

The first line on standard output is `{"url": ..., "secret": ...}`.  Each line on standard input
names a fault of `FAULTS` that all calls meet from then on, or `heal`.  The arrival of each mint
call goes to the file JOURNAL, in seconds of the machine's monotonic clock, one a line.  Ends with
its standard input.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

from broker.testing import FakeVendor, Refusal, VendorSettings
from broker.testing.vendor import faults
from broker.testing.vendor.faults import Fault

WRITTEN = 0.05
"""Seconds between two writes of the journal."""

LATENCY = 0.05
"""Seconds before each answer."""

FAULTS: dict[str, Callable[[], Fault]] = {
    "unavailable": lambda: faults.error(Refusal.SERVICE_UNAVAILABLE),
    "throttled": lambda: faults.error(Refusal.RATE_LIMITED, retry_after="3"),
    "slow": lambda: faults.slow(4.0),
    "hang": faults.hang,
    "reset": faults.reset,
    "html": faults.html,
    "truncated": faults.truncated,
    "same token": faults.same_token,
}
"""What may be asked for; a pause is met by one call only, the rest by all."""


async def serve(journal: Path) -> None:
    """Answer until standard input ends."""
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    async with FakeVendor(VendorSettings(latency=LATENCY, lifetime=600), seed=1) as vendor:
        print(json.dumps({"url": vendor.url, "secret": vendor.secret.reveal()}), flush=True)
        writing = asyncio.create_task(write(vendor, journal))
        while order := (await orders.readline()).decode().strip():
            if order == "heal":
                vendor.heal()
            else:
                vendor.fail(FAULTS[order](), times=1 if order == "throttled" else None)
        writing.cancel()


async def write(vendor: FakeVendor, journal: Path) -> None:
    """Keep the file up to the journal, for ever."""
    written = 0
    with journal.open("w", encoding="ascii") as out:
        while True:
            calls = vendor.journal.calls
            out.writelines(f"{call.mono:.6f}\n" for call in calls[written:])
            out.flush()
            written = len(calls)
            await asyncio.sleep(WRITTEN)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
