"""G9 as a whole story, in virtual time: a session that was ended is never handed out again."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from service import POLICY, Service, session_of, visitor

from broker import errors
from broker.issue import IssuedToken
from broker.issuers.keyring import BadToken
from broker.model import Outcome, Session
from broker.sessions.admin import TokenIntrospector
from broker.telemetry.cells import MetricLayout
from broker.telemetry.metrics import SessionMetrics
from broker.testing import FakeClock, run_virtual
from broker.units import SECOND
from broker.wire.responses import token_in

MINUTE = 60


class Ended:
    """A service, its sessions, and what was ended when."""

    def __init__(self, clock: FakeClock, seed: int = 1, *, reuse: bool = True) -> None:
        self.chance = random.Random(seed)
        self.clock = clock
        policy = replace(POLICY, enabled=reuse)
        self.service = Service(clock, policy=policy, draw=self.chance.random)
        self.service.issuer.delay = 1.0
        self.sessions = TokenIntrospector(
            self.service.issuer,
            self.service.session_store,
            self.service.store,
            SessionMetrics(MetricLayout()),
        )
        self.ended: dict[str, int] = {}
        self.handed: list[tuple[str, int]] = []

    async def request_token(self, fingerprint: str = "beef", *, fresh: bool = False) -> None:
        """Ask, and note which session came when."""
        try:
            answer = await self.service.issue(visitor(fingerprint, fresh=fresh))
        except errors.BrokerError:
            return
        assert isinstance(answer, IssuedToken)
        self.handed.append((session_of(answer.token), self.clock.mono()))

    async def end(self, session_id: str, *, all_of_them: bool = False) -> None:
        """End a session, and note when that was answered."""
        live = {s.session_id: s for s in self.live()}
        session = live.get(session_id)
        if not await self.sessions.end(session_id, visitor=all_of_them):
            return
        assert session is not None
        for other in live.values():
            if other is session or (all_of_them and other.fingerprint == session.fingerprint):
                self.ended.setdefault(other.session_id, self.clock.mono())

    def live(self) -> list[Session]:
        return [session for _, session in self.service.session_store._sessions.items()]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), reuse=st.booleans())
def test_G9_after_an_end_is_answered_nobody_gets_that_session(seed: int, *, reuse: bool) -> None:
    """A crowd asks, insists and comes back for an hour, while sessions and visitors are ended.

    The vendor gives an old token again now and then.
    """

    async def main(clock: FakeClock) -> Ended:
        story = Ended(clock, seed, reuse=reuse)
        chance = story.chance
        tasks = []
        for _ in range(80):
            story.service.issuer.same = chance.random() < 0.2
            fingerprint = f"{chance.randrange(3):04x}"
            asking = story.request_token(fingerprint, fresh=chance.random() < 0.3)
            tasks.append(asyncio.get_running_loop().create_task(asking))
            if chance.random() < 0.3 and story.live():
                session = chance.choice(story.live())
                await story.end(session.session_id, all_of_them=chance.random() < 0.3)
            if chance.random() < 0.4:
                await asyncio.sleep(chance.choice([0.0, 0.3, 1.1, 700.0]))
        await asyncio.gather(*tasks)
        await story.service.settled()
        return story

    story = run_virtual(main)
    assert story.handed
    assert story.ended
    for session_id, moment in story.handed:
        assert moment <= story.ended.get(session_id, moment), "handed out after its end"


@pytest.mark.parametrize("reuse", [True, False])
def test_G9_an_end_wins_over_the_mint_that_is_in_flight(*, reuse: bool) -> None:
    """The leader and all who joined are told to ask again; the next one gets another session.

    Also where no token is held for reuse.
    """

    async def main(clock: FakeClock) -> None:
        story = Ended(clock, reuse=reuse)
        await story.request_token()
        held = story.live()[0]
        crowd = [story.service.begin(visitor("beef", fresh=True)) for _ in range(20)]
        await asyncio.sleep(0.5)
        await story.end(held.session_id)
        outcomes = await asyncio.gather(*crowd, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {errors.SessionEnded}
        assert story.live() == [], "what was minted for nobody is no session"
        after = await story.service.hand_out(visitor("beef"))
        assert after.outcome is Outcome.MINTED
        assert [s.session_id for s in story.live()] == [session_of(after.token)]
        assert story.service.mints == 3

    run_virtual(main)


def test_G9_an_ended_token_is_no_way_out_of_an_outage() -> None:
    """Below the floor, the vendor gone: an ageing token is an answer, one that was ended is not."""

    async def main(clock: FakeClock) -> None:
        story = Ended(clock)
        await story.request_token()
        held = story.live()[0]

        def down(_request: object) -> None:
            raise errors.UpstreamUnavailable("down")

        story.service.issuer.fail = down
        await asyncio.sleep(57 * MINUTE)
        again = await story.service.hand_out(visitor("beef"))
        assert session_of(again.token) == held.session_id
        await asyncio.sleep(10)
        asking = story.service.begin(visitor("beef"))
        await asyncio.sleep(0.5)
        await story.end(held.session_id)
        with pytest.raises(errors.BrokerError):
            await asking
        with pytest.raises(errors.UpstreamUnavailable):
            await story.service.hand_out(visitor("beef"))

    run_virtual(main)


def test_G9_a_session_that_the_vendor_opens_again_stays_ended() -> None:
    """It gives the token that it gave before: refused, until there is another."""

    async def main(clock: FakeClock) -> None:
        story = Ended(clock)
        await story.request_token()
        held = story.live()[0]
        await story.end(held.session_id)
        story.service.issuer.same = True
        with pytest.raises(errors.SessionEnded):
            await story.service.hand_out(visitor("beef"))
        assert story.live() == []
        story.service.issuer.same = False
        after = await story.service.hand_out(visitor("beef"))
        assert session_of(after.token) != held.session_id

    run_virtual(main)


def test_G9_a_record_that_comes_after_its_end_brings_no_token_back() -> None:
    """What the vendor gave again was looked up before the end and written down after it."""

    async def main(clock: FakeClock) -> None:
        story = Ended(clock)
        handed = await story.service.hand_out(visitor("beef"))
        (session,) = story.live()
        token = token_in(handed.token.body)
        assert await story.sessions.check(token) == session
        await story.end(session.session_id)
        await story.service.session_store.record(session)
        with pytest.raises(BadToken, match="revoked"):
            await story.sessions.check(token)

    run_virtual(main)


def test_a_session_is_on_record_before_its_token_is_handed_out() -> None:
    """With its visitor, its agent and our own reckoning of its end; once, however often reused."""

    async def main(clock: FakeClock) -> None:
        story = Ended(clock)
        began = clock.wall() // SECOND
        for _ in range(3):
            await story.request_token("beef")
        (session,) = story.live()
        assert (session.client, session.agent, session.fingerprint) == ("web", "A78WKV4515", "beef")
        assert (session.issued, session.expires) == (began, began + 3600)
        assert len(session.digest) == 32

    run_virtual(main)
