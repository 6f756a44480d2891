"""The system's clocks, as the rest of the broker sees them: integers, in microseconds.

And what waits on a clock and on something else at once.
"""

import asyncio
import contextlib
import time

from typing_extensions import override

from broker.model import Clock


class SystemClock(Clock):
    """`time.monotonic` and `time.time`."""

    @override
    def mono(self) -> int:
        """Microseconds since some fixed moment; never goes back."""
        return time.monotonic_ns() // 1000

    @override
    def wall(self) -> int:
        """Microseconds since 1970; may step."""
        return time.time_ns() // 1000


async def sleep_unless(event: asyncio.Event, seconds: float) -> None:
    """Sleep, but not longer than until the event."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
