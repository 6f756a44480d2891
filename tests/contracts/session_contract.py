"""What every store of sessions does: one body, run on each."""

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

import pytest
from msgspec.structs import replace

from broker.errors import SessionTaken
from broker.model import Session
from broker.sessions.base import MARK_LIFE, Place, Query, SessionsFull, SessionStore, place_of
from broker.units import SECOND

AGENT = "A78WKV4515"
HOUR = 3600
MOST_DISOWNED = 5
"""Of the session stores that are opened here, where they keep such notes at all."""
EVERYTHING = Query(agent=AGENT)
"""All of a test's sessions, for they are of one agent unless the test is about that."""


class OpenedSessionStore(Protocol):
    """A session store, its clock, and a way to let time pass."""

    session_store: SessionStore

    def wall(self) -> int:
        """Microseconds since 1970, as the session store sees them."""
        ...

    async def pass_time(self, seconds: float) -> None:
        """Let this much time go by."""
        ...

    async def size(self) -> int:
        """How many records, lists, ends and notes it keeps."""
        ...

    async def end(self, session: Session, *, by_client: bool = False) -> None:
        """End a session as the service does."""
        await self.session_store.mark(session, by_client=by_client)
        await self.session_store.forget(session)


OpenSessionStore = Callable[[], Awaitable[OpenedSessionStore]]


def session_of(
    opened: OpenedSessionStore,
    *,
    life: int = HOUR,
    agent: str = AGENT,
    fingerprint: str = "",
    client: str = "web",
    token: str = "",
) -> Session:
    """Make a session that begins now; what is left out is new."""
    now = opened.wall() // SECOND
    return Session(
        session_id=secrets.token_hex(16),
        client=client,
        agent=agent,
        fingerprint=fingerprint or secrets.token_hex(8),
        model="",
        issued=now,
        expires=now + life,
        digest=hashlib.sha256(token.encode()).digest() if token else b"",
    )


async def recorded(opened: OpenedSessionStore, **how: object) -> Session:
    """Make a session and write it down."""
    session = session_of(opened, **how)  # type: ignore[arg-type]
    await opened.session_store.record(session)
    return session


async def everything(session_store: SessionStore, query: Query, limit: int) -> list[Session]:
    """Turn all pages."""
    found: list[Session] = []
    after = Place()
    while page := await session_store.page(query, after, limit):
        assert len(page) <= limit
        found += page
        after = place_of(page[-1])
    return found


class SessionStoreContract:
    """Behaviours of every session store."""

    async def test_what_was_recorded_is_found_whole(
        self, open_session_store: OpenSessionStore
    ) -> None:
        """By its id and by its token's digest, every field; anything else is not."""
        opened = await open_session_store()
        signed = await recorded(opened)
        relayed = await recorded(opened, token="t1", client="shop", fingerprint="zoé \x1f %")
        assert await opened.session_store.find(signed.session_id) == signed
        assert await opened.session_store.find(relayed.session_id) == relayed
        assert await opened.session_store.find_token(relayed.digest) == relayed
        for unknown in ("", "x", relayed.session_id[:-1], "*", "é", "a" * 128):
            assert await opened.session_store.find(unknown) is None
        for digest in (b"", signed.digest, b"\0" * 32):
            assert await opened.session_store.find_token(digest) is None

    async def test_a_session_lives_until_its_last_second_has_come(
        self, open_session_store: OpenSessionStore
    ) -> None:
        """Then it is neither found nor listed."""
        opened = await open_session_store()
        brief = await recorded(opened, life=2, token="brief")
        assert await opened.session_store.find(brief.session_id) == brief
        await opened.pass_time(2.01)
        assert await opened.session_store.find(brief.session_id) is None
        assert await opened.session_store.find_token(brief.digest) is None
        assert await opened.session_store.page(EVERYTHING, Place(), 10) == []

    async def test_G9_an_ended_session_is_gone_and_remembered(
        self, open_session_store: OpenSessionStore
    ) -> None:
        """Not found, not listed, known as ended; others are as they were; twice is once."""
        opened = await open_session_store()
        one, other = await recorded(opened, token="one"), await recorded(opened)
        for _ in range(2):
            await opened.end(one)
            assert await opened.session_store.find(one.session_id) is None
            assert await opened.session_store.find_token(one.digest) is None
            assert await opened.session_store.ended(one.session_id)
        assert await opened.session_store.page(EVERYTHING, Place(), 10) == [other]
        assert not await opened.session_store.ended(other.session_id)
        assert not await opened.session_store.ended("")

    async def test_G6_tokens_that_nobody_knows_fill_no_store(
        self, open_session_store: OpenSessionStore
    ) -> None:
        """A client may name any text as a token: what is kept of that has a bound, for each client.

        What it can revoke besides, others can, and what was noted is, is as if it had not tried.
        """
        opened = await open_session_store()
        recorded_before = await recorded(opened, token="known")
        before = await opened.size()
        digests = [secrets.token_bytes(32) for _ in range(4 * MOST_DISOWNED)]
        for digest in digests:
            with suppress(SessionsFull):
                assert await opened.session_store.disown(digest, "web") is None
        assert await opened.size() <= before + MOST_DISOWNED + 1
        assert await opened.session_store.disown(digests[0], "web") is None, "it is noted already"
        assert await opened.session_store.disown(digests[-1], "shop") is None
        await opened.end(recorded_before, by_client=True)
        assert await opened.session_store.ended(recorded_before.session_id)

    async def test_G9_an_end_that_stopped_half_way_can_be_asked_for_again(
        self, open_session_store: OpenSessionStore
    ) -> None:
        """A mark leaves the record, by which the session is found; then both may be repeated."""
        opened = await open_session_store()
        session = await recorded(opened, token="t")
        for _ in range(2):
            await opened.session_store.mark(session, by_client=True)
            assert await opened.session_store.ended(session.session_id)
            assert await opened.session_store.find(session.session_id) == session
            assert await opened.session_store.find_token(session.digest) == session
        for _ in range(2):
            await opened.session_store.forget(session)
            assert await opened.session_store.find(session.session_id) is None
        assert await opened.session_store.ended(session.session_id)

    async def test_G9_a_session_that_nobody_recorded_can_be_ended(
        self, open_session_store: OpenSessionStore
    ) -> None:
        """Its token was signed by another process, or its record had to make room."""
        opened = await open_session_store()
        stranger = session_of(opened)
        await opened.end(stranger)
        assert await opened.session_store.ended(stranger.session_id)

    async def test_a_session_that_comes_again_is_one(
        self, open_session_store: OpenSessionStore
    ) -> None:
        """The vendor may return a session; the later record holds."""
        opened = await open_session_store()
        first = await recorded(opened, token="first", life=60)
        again = Session(
            first.session_id, "web", AGENT, first.fingerprint, "", first.issued, first.expires + 60
        )
        await opened.session_store.record(again)
        assert await opened.session_store.find(first.session_id) == again
        assert await everything(opened.session_store, EVERYTHING, 10) == [again]

    @pytest.mark.parametrize("what", ["id", "token"])
    async def test_G8_G9_what_is_another_visitor_s_is_not_written_down(
        self, open_session_store: OpenSessionStore, what: str
    ) -> None:
        """A vendor that repeats itself: the first one keeps it, whole, until it is ended."""
        opened = await open_session_store()
        first = await recorded(opened, token="once")
        second = session_of(opened, token="once" if what == "token" else "another")
        if what == "id":
            second = replace(second, session_id=first.session_id)
        for field in ("client", "agent", "fingerprint", "model"):
            same = replace(
                first, session_id=second.session_id, digest=second.digest, **{field: "other"}
            )
            with pytest.raises(SessionTaken):
                await opened.session_store.record(same)
        assert await opened.session_store.find(first.session_id) == first
        assert await opened.session_store.find_token(first.digest) == first
        if what == "id":
            assert await opened.session_store.find_token(second.digest) is None
        else:
            assert await opened.session_store.find(second.session_id) is None
        assert await opened.session_store.page(EVERYTHING, Place(), 10) == [first]
        await opened.session_store.forget(first)
        await opened.session_store.record(second)
        assert await opened.session_store.find(second.session_id) == second

    async def test_G8_one_session_for_two_visitors_at_once_is_one_s(
        self, open_session_store: OpenSessionStore
    ) -> None:
        """Not both, and not neither for long: whoever asks again gets what is theirs."""
        opened = await open_session_store()
        first = session_of(opened, token="once")
        second = replace(first, fingerprint="another")
        done = await asyncio.gather(
            *map(opened.session_store.record, (first, second)), return_exceptions=True
        )
        assert sum(result is None for result in done) <= 1
        found = await opened.session_store.find(first.session_id)
        assert found in (None, first, second)
        if found is not None:
            assert await opened.session_store.find_token(first.digest) == found

    async def test_pages_have_everything_once_in_the_order_of_expiry(
        self, open_session_store: OpenSessionStore
    ) -> None:
        """For any size of page, also where many expire in the same second."""
        opened = await open_session_store()
        made = [await recorded(opened, life=HOUR + number // 9) for number in range(40)]
        wanted = sorted(made, key=place_of)
        for limit in (1, 2, 7, 40, 1000):
            assert await everything(opened.session_store, EVERYTHING, limit) == wanted

    async def test_pages_are_of_an_agent_a_visitor_or_both(
        self, open_session_store: OpenSessionStore
    ) -> None:
        """To the letter, over all clients."""
        opened = await open_session_store()
        a1 = await recorded(opened, agent="A1", fingerprint="beef", client="web")
        a2 = await recorded(opened, agent="A2", fingerprint="beef", client="shop")
        other = await recorded(opened, agent="A1", fingerprint="beef00")

        async def ids(query: Query) -> set[str]:
            return {s.session_id for s in await everything(opened.session_store, query, 2)}

        assert await ids(Query(agent="A1")) == {a1.session_id, other.session_id}
        assert await ids(Query(fingerprint="beef")) == {a1.session_id, a2.session_id}
        assert await ids(Query("A2", "beef")) == {a2.session_id}
        assert await ids(Query("A2", "beef00")) == set()
        assert await ids(Query("A")) == await ids(Query("a1")) == set()

    async def test_what_ends_between_two_pages_moves_nothing(
        self, open_session_store: OpenSessionStore
    ) -> None:
        """The place is a value, not a count: nobody is skipped, even if its own session ends."""
        opened = await open_session_store()
        made = sorted([await recorded(opened) for _ in range(9)], key=place_of)
        first = await opened.session_store.page(EVERYTHING, Place(), 3)
        assert list(first) == made[:3]
        for gone in (made[0], made[2], made[4]):
            await opened.end(gone)
        rest = await opened.session_store.page(EVERYTHING, place_of(made[2]), 10)
        assert list(rest) == [made[3], *made[5:]]

    async def test_many_ends_at_once_are_all_remembered(
        self, open_session_store: OpenSessionStore
    ) -> None:
        """Whoever ends them, and however they interleave with records."""
        opened = await open_session_store()
        made = [session_of(opened, token=f"t{number}") for number in range(50)]
        await asyncio.gather(*(opened.session_store.record(session) for session in made))
        ends = [opened.end(session) for session in made[::2]]
        more = [opened.session_store.record(session_of(opened)) for _ in range(25)]
        await asyncio.gather(*ends, *more)
        for number, session in enumerate(made):
            assert await opened.session_store.ended(session.session_id) == (number % 2 == 0)
            assert (await opened.session_store.find(session.session_id) is None) == (
                number % 2 == 0
            )

    def test_marks_outlive_every_token(self) -> None:
        """An hour of life, and the minute by which an expiry is forgiven."""
        assert MARK_LIFE >= (HOUR + 60) * SECOND
