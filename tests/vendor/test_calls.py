"""Calls that outlive their callers: which of them are given up, and when."""

import asyncio
from collections.abc import Callable

import pytest

from broker.issuers.vendor.calls import SEEN, Answer, CallFailed, Calls
from broker.pacing.slots import Slot
from broker.testing import FakeClock, run_virtual


class NotedSlot(Slot):
    """A slot that tells how it was given back."""

    def __init__(self) -> None:
        super().__init__(None, lambda: None)
        self.abandoned = False

    @property
    def is_settled(self) -> bool:
        return self.abandoned

    def abandon(self) -> None:
        self.abandoned = True


async def nothing_is_read() -> bool:
    """Be a vendor that answers no question."""
    return False


async def nobody_hears(_answer: Answer) -> None:
    """Hear of a late answer."""


def test_N13_an_answer_gives_up_what_is_older_than_a_connection_s_death() -> None:
    """A younger call may just be on its way: only one that somebody has received counts as read."""

    async def main(clock: FakeClock) -> None:
        calls = Calls(1.0, nobody_hears, nothing_is_read)
        hung = NotedSlot()

        async def hang(_arrived: Callable[[], None]) -> Answer:
            await asyncio.Event().wait()
            raise AssertionError

        async def answer(arrived: Callable[[], None]) -> Answer:
            arrived()
            raise CallFailed(calls_reason)

        with pytest.raises(CallFailed) as failed:
            await calls.make(hang, hung)
        calls_reason = failed.value.reason
        for passed, is_given_up in ((SEEN - 2.0, False), (2.0, True)):
            await asyncio.sleep(passed)
            with pytest.raises(CallFailed):
                await calls.make(answer, NotedSlot())
            assert hung.abandoned is is_given_up
        await calls.close()

    run_virtual(main)


def test_N13_an_answer_says_nothing_about_calls_that_were_made_later() -> None:
    """The vendor had read the one that it answers, however old that is, and what was before it."""

    async def main(_: FakeClock) -> None:
        calls, before, after = Calls(1.0, nobody_hears, nothing_is_read), NotedSlot(), NotedSlot()
        read = asyncio.Event()

        async def hang(_arrived: Callable[[], None]) -> Answer:
            await asyncio.Event().wait()
            raise AssertionError

        async def answer(arrived: Callable[[], None]) -> Answer:
            await read.wait()
            arrived()
            raise AssertionError

        for send, slot in ((hang, before), (answer, NotedSlot()), (hang, after)):
            with pytest.raises(CallFailed):
                await calls.make(send, slot)
        await asyncio.sleep(3 * SEEN)
        assert not before.abandoned
        read.set()
        await asyncio.sleep(0.1)
        assert (before.abandoned, after.abandoned) == (True, False)
        await calls.close()

    run_virtual(main)
