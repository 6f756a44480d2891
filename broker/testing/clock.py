"""Time that moves when it is told to."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from typing_extensions import override

from broker.model import Clock

T = TypeVar("T")

TICK = 0.000_001
"""Seconds that every turn of a virtual loop takes at least.  Under a frozen clock code that waits
for time to pass by yielding (aiolimiter does) would spin for ever."""


class FakeClock(Clock):
    """Two clocks in microseconds that stand still until they are moved, together or apart."""

    def __init__(self, mono: int = 1_000_000_000, wall: int = 1_800_000_000_000_000) -> None:
        self._mono = mono
        self._wall = wall

    @override
    def mono(self) -> int:
        return self._mono

    @override
    def wall(self) -> int:
        return self._wall

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks."""
        self.step_mono(seconds)
        self.step_wall(seconds)

    def step_mono(self, seconds: float) -> None:
        """Move the monotonic clock only; the wall clock has been set back."""
        self._mono += round(seconds * 1_000_000)

    def step_wall(self, seconds: float) -> None:
        """Move the wall clock only: somebody set it, or the machine was suspended."""
        self._wall += round(seconds * 1_000_000)


class _SkippingSelector(selectors.BaseSelector):
    """Waits for nothing: where a loop would sleep, its clock jumps."""

    def __init__(self, skip: Callable[[float], None]) -> None:
        self._selector = selectors.DefaultSelector()
        self._skip = skip

    @override
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("a virtual loop waits for something that no timer will bring")
        self._skip(max(timeout, TICK))
        return self._selector.select(0)

    @override
    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.register(fileobj, events, data)

    @override
    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._selector.unregister(fileobj)

    @override
    def close(self) -> None:
        self._selector.close()

    @override
    def get_map(self) -> Any:
        return self._selector.get_map()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose timers are due at once: an hour of waiting takes as long as its work.

    For code without sockets.  `clock` follows the loop's time on both of its clocks.
    """

    def __init__(self) -> None:
        self.clock = FakeClock()
        self._virtual_time = 1000.0
        super().__init__(_SkippingSelector(self._skip))

    @override
    def time(self) -> float:
        return self._virtual_time

    def _skip(self, seconds: float) -> None:
        self._virtual_time += seconds
        self.clock.advance(seconds)


def run_virtual(main: Callable[[FakeClock], Coroutine[Any, Any, T]]) -> T:
    """Run `main` on a virtual loop; it is given the clock that follows the loop's time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        return runner.run(main(loop.clock))
