"""Every session store keeps the contract; beside it, what only the one in memory can show."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from state_files import Broker

pytest.register_assert_rewrite("session_contract")

from session_contract import (  # noqa: E402 - rewritten first
    AGENT,
    EVERYTHING,
    OpenedSessionStore,
    OpenSessionStore,
    SessionStoreContract,
    recorded,
    session_of,
)

from broker.model import Session  # noqa: E402
from broker.sessions.base import MARK_LIFE, Place, SessionsFull  # noqa: E402
from broker.sessions.memory import FREED_AT_ONCE, SLICE, MemorySessions  # noqa: E402
from broker.testing import FakeClock, run_virtual  # noqa: E402
from broker.units import SECOND  # noqa: E402


class OpenedMemorySessions(OpenedSessionStore):
    """The session store in memory, on a clock that stands still."""

    def __init__(self, most: int = 1000, most_ended: int = 1000) -> None:
        self.clock = FakeClock()
        self.memory = self.session_store = MemorySessions(most, self.clock, most_ended)

    def wall(self) -> int:
        return self.clock.wall()

    async def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    async def size(self) -> int:
        return len(self.memory) + self.memory.ended_count


class TestMemorySessions(SessionStoreContract):
    """The contract, in memory."""

    @pytest.fixture
    def open_session_store(self) -> OpenSessionStore:
        async def opened() -> OpenedSessionStore:
            return OpenedMemorySessions()

        return opened


class OpenedDurableSessions(OpenedMemorySessions):
    """The session store with a file behind it."""

    def __init__(self, broker: Broker, sessions: MemorySessions) -> None:
        self.clock = broker.clock
        self.memory = self.session_store = sessions


class TestDurableSessions(SessionStoreContract):
    """The contract, with a file."""

    @pytest.fixture
    async def open_session_store(self, tmp_path: Path) -> AsyncIterator[OpenSessionStore]:
        async with AsyncExitStack() as stack:

            async def opened() -> OpenedSessionStore:
                broker = Broker(tmp_path / f"{secrets.token_hex(4)}.db")
                backend = await stack.enter_async_context(broker.opened())
                return OpenedDurableSessions(broker, backend.sessions)

            yield opened


async def test_G6_records_are_bounded_and_the_oldest_makes_room() -> None:
    """Counted; a record that comes again is young again."""
    opened = OpenedMemorySessions(most=3)
    first, *others = [await recorded(opened, token=f"t{n}") for n in range(3)]
    await opened.session_store.record(first)
    late = await recorded(opened)
    assert len(opened.memory) == 3
    assert await opened.session_store.find(others[0].session_id) is None
    assert await opened.session_store.find_token(others[0].digest) is None
    for kept in (first, others[1], late):
        assert await opened.session_store.find(kept.session_id) == kept


async def test_G6_no_client_s_records_push_out_another_s() -> None:
    """The one that has most makes room, for itself and for others; all of it is given back."""
    opened = OpenedMemorySessions(most=6)
    quiet = [await recorded(opened, client="quiet") for _ in range(2)]
    loud = [await recorded(opened, client="loud") for _ in range(50)]
    assert [await opened.session_store.find(s.session_id) for s in quiet] == quiet
    held = [s for s in loud if await opened.session_store.find(s.session_id)]
    assert held == loud[-4:]
    late = await recorded(opened, client="quiet")
    assert [await opened.session_store.find(s.session_id) for s in (*quiet, late)] == [*quiet, late]
    assert await opened.session_store.find(held[0].session_id) is None
    opened.clock.advance(3601)
    opened.memory.purge_expired()
    assert (len(opened.memory), opened.memory._orders) == (0, {})


async def test_G6_ends_are_bounded_and_none_is_forgotten_for_another() -> None:
    """At the bound nothing more can be ended; what was ended stays so, also if it comes again."""
    opened = OpenedMemorySessions(most_ended=5)
    ended = [await recorded(opened) for _ in range(5)]
    for session in ended:
        await opened.end(session)
    live = await recorded(opened)
    with pytest.raises(SessionsFull):
        await opened.end(live)
    await opened.end(ended[0])
    assert [await opened.session_store.ended(s.session_id) for s in ended] == [True] * 5
    assert await opened.session_store.find(live.session_id) == live


async def test_G6_a_client_leaves_ends_to_others() -> None:
    """It may end while it has fewer marks than are free: half, then a quarter for the next one.

    The operator may use all that is left; what has been forgotten counts no more.
    """
    opened = OpenedMemorySessions(most_ended=8)
    granted = {}
    for client in ("one", "two", "three"):
        granted[client] = 0
        for _ in range(10):
            with suppress(SessionsFull):
                await opened.end(await recorded(opened, client=client), by_client=True)
                granted[client] += 1
    assert granted == {"one": 4, "two": 2, "three": 1}
    await opened.end(await recorded(opened, client="one"))
    with pytest.raises(SessionsFull):
        await opened.end(await recorded(opened, client="one"))
    for _ in range(2):
        opened.clock.advance(MARK_LIFE / SECOND + 1)
        opened.memory.purge_expired()
    for _ in range(4):
        await opened.end(await recorded(opened, client="one"), by_client=True)


async def test_G6_ends_of_the_time_before_are_a_client_s_still() -> None:
    """As long as they are remembered they count, whichever generation they are in."""
    opened = OpenedMemorySessions(most_ended=8)

    async def ends() -> int:
        granted = 0
        for _ in range(8):
            with suppress(SessionsFull):
                await opened.end(await recorded(opened, client="one"), by_client=True)
                granted += 1
        return granted

    for _ in range(2):
        await opened.end(await recorded(opened, client="one"), by_client=True)
    opened.clock.advance(MARK_LIFE / SECOND + 1)
    opened.memory.purge_expired()
    assert await ends() == 2  # as if it had ended all four by now


async def test_G9_a_token_that_was_told_twice_is_its_later_session_s() -> None:
    """A vendor repeats a token under another session: what is forgotten is the first one alone."""
    opened = OpenedMemorySessions()
    first = await recorded(opened, token="t", fingerprint="f")
    later = await recorded(opened, token="t", fingerprint="f")
    await opened.session_store.forget(first)
    assert await opened.session_store.find_token(later.digest) == later


async def test_M1_what_is_over_is_given_back() -> None:
    """Records when they expire; ends when no token of theirs can live, not a moment earlier."""
    opened = OpenedMemorySessions()
    for number in range(50):
        await recorded(opened, token=f"t{number}")
    gone = await recorded(opened)
    await opened.end(gone)
    for _ in range(int(MARK_LIFE / SECOND)):
        opened.clock.advance(1)
        opened.memory.purge_expired()
        assert await opened.session_store.ended(gone.session_id)
    assert len(opened.memory) == 0
    assert not opened.memory._by_digest
    opened.clock.advance(MARK_LIFE / SECOND + 1)
    opened.memory.purge_expired()
    assert not await opened.session_store.ended(gone.session_id)
    assert repr(opened.session_store) == "MemorySessions(sessions=0, ended=0)"


def test_a_long_listing_lets_others_have_their_turn() -> None:
    """And sees a session store that changes under it as it was when it began."""

    async def main(clock: FakeClock) -> None:
        session_store = MemorySessions(100_000, clock)
        expires = clock.wall() // SECOND + 3600
        for number in range(10_000):
            await session_store.record(
                Session(f"{number:06}", "web", AGENT, "beef", "", 0, expires)
            )
        turns = 0

        async def others() -> None:
            nonlocal turns
            for _ in range(5):
                turns += 1
                await session_store.record(session_of(OpenedMemorySessions()))
                await asyncio.sleep(0)

        task = asyncio.get_running_loop().create_task(others())
        page = await session_store.page(EVERYTHING, Place(), 3)
        assert [session.session_id for session in page] == ["000000", "000001", "000002"]
        assert turns >= 4
        await task

    run_virtual(main)


async def test_an_expired_session_is_not_found() -> None:
    """From the second of its expiry on, by its id and by its token, before anybody tidies up."""
    opened = OpenedMemorySessions()
    session = await recorded(opened, token="t", life=60)
    opened.clock.advance(59.9)
    assert await opened.session_store.find(session.session_id) == session
    opened.clock.advance(0.1)
    assert len(opened.memory) == 1, "the record is still there"
    assert await opened.session_store.find(session.session_id) is None
    assert await opened.session_store.find_token(session.digest) is None
    assert await opened.session_store.page(EVERYTHING, Place(), 10) == []


async def test_M1_many_records_that_expire_together_go_a_slice_at_a_time() -> None:
    """And marks that were given up: no step of housekeeping stops the loop for long."""
    opened = OpenedMemorySessions(most=10 * SLICE, most_ended=10 * SLICE)
    for _ in range(3 * SLICE):
        await opened.end(await recorded(opened))
        await recorded(opened)
    opened.clock.advance(3601)
    for left in (2 * SLICE, SLICE, 0):
        assert opened.memory.purge_expired() or not left
        assert len(opened.memory) == left
    opened.clock.advance(MARK_LIFE / SECOND)
    assert not opened.memory.purge_expired()
    assert opened.memory.ended_count == 3 * SLICE
    opened.clock.advance(MARK_LIFE / SECOND)
    assert opened.memory.purge_expired()
    assert (opened.memory.ended_count, len(opened.memory._leftovers)) == (0, 3 * SLICE)
    await opened.end(await recorded(opened))
    assert len(opened.memory._leftovers) == 3 * SLICE - FREED_AT_ONCE
    while opened.memory.purge_expired():
        pass
    assert not opened.memory._leftovers


async def test_G6_what_expires_first_goes_first_in_whatever_order_it_came() -> None:
    """A vendor gives an old token: its record is the first that makes room, and that expires."""
    opened = OpenedMemorySessions(most=3)
    late, soon, middle = [await recorded(opened, life=life) for life in (300, 100, 200)]
    await recorded(opened, life=300)
    assert await opened.session_store.find(soon.session_id) is None
    opened.clock.advance(200)
    opened.memory.purge_expired()
    assert await opened.session_store.find(middle.session_id) is None
    assert await opened.session_store.find(late.session_id) == late
    assert len(opened.memory) == 2


@given(
    gaps=st.lists(
        st.sampled_from([1, 60, MARK_LIFE // SECOND // 2, MARK_LIFE // SECOND]), max_size=12
    ),
    at=st.integers(0, 12),
)
def test_G9_an_end_is_known_for_its_whole_time(gaps: list[int], at: int) -> None:
    """However often and whenever housekeeping looks; and not for much more than twice that."""

    async def main() -> None:
        opened = OpenedMemorySessions()
        session = await recorded(opened)
        marked: int | None = None
        for number, gap in enumerate([*gaps, 1]):
            if number == min(at, len(gaps)):
                await opened.end(session)
                marked = opened.clock.mono()
            opened.clock.advance(gap)
            for _ in range(3):
                opened.memory.purge_expired()
            if marked is not None and opened.clock.mono() - marked < MARK_LIFE:
                assert opened.memory.knows_end(session.session_id)

    asyncio.run(main())
