"""What every store does: one body, run on each of them.

A store's test module subclasses `StoreContract` and gives it the fixture `open_store`.  Time passes
when the contract says so; how a store arranges that is the fixture's affair.
"""

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import pytest
from msgspec.structs import replace

from broker.limits.policy import LimitPolicy, LimitRule, Limits
from broker.model import EmbedToken, LimitName, TokenRequest
from broker.rules import bucket
from broker.rules.bucket import Limit, Verdict
from broker.stores.base import Kept, Lease, Rejection, Store, Visit

SECOND = 1_000_000
HOUR = 3600 * SECOND
AGENT, OTHER_AGENT = "A78WKV4515", "A02XYZ9981"

WIDE = Limit(burst=100_000, interval=1)
"""A limit that no test meets."""


class Opened(Protocol):
    """A store that is open, and what a test needs beside it."""

    store: Store

    def moments(self) -> tuple[int, int]:
        """Return the monotonic and the wall clock's microsecond, as tokens are stamped."""
        ...

    async def pass_time(self, us: int) -> None:
        """Let microseconds pass, for the store too."""
        ...

    def use_limits(self, limits: Limits) -> None:
        """Put other limits in force."""
        ...


OpenStore = Callable[[Limits], Awaitable[Opened]]


def limits_of(
    fingerprint: Limit = WIDE,
    mints: Limit = WIDE,
    agent: Limit = WIDE,
    client: Limit | None = None,
    *,
    overrides: Mapping[LimitName, Mapping[str, Limit]] | None = None,
    dry_run: frozenset[LimitName] = frozenset(),
) -> Limits:
    """Make limits of which only those given can be met."""

    def rule(name: LimitName, limit: Limit) -> LimitRule:
        return LimitRule(limit, name in dry_run)

    def limit_set(name: LimitName, limit: Limit) -> LimitPolicy:
        others = (overrides or {}).get(name, {})
        return LimitPolicy(name, rule(name, limit), {a: rule(name, o) for a, o in others.items()})

    return Limits(
        fingerprint=limit_set(LimitName.FINGERPRINT, fingerprint),
        fingerprint_mints=limit_set(LimitName.FINGERPRINT_MINTS, mints),
        agent=limit_set(LimitName.AGENT, agent),
        client=None if client is None else limit_set(LimitName.CLIENT, client),
        max_tracked=1_000_000,
    )


def request_of(
    fingerprint: str | None = None, client: str = "web", agent: str = AGENT
) -> TokenRequest:
    """Make a request, of a visitor never seen before unless one is named."""
    return TokenRequest(
        client=client, agent=agent, fingerprint=fingerprint or secrets.token_hex(16)
    )


def token_at(opened: Opened, lifetime: int = HOUR) -> EmbedToken:
    """Make a token whose mint begins now."""
    mono, wall = opened.moments()
    return EmbedToken(
        body=secrets.token_bytes(300),
        dies_mono=mono + lifetime,
        dies_wall=wall + lifetime,
        lifetime=lifetime,
        mark=lifetime // 5,
        origin="a key",
    )


class AwaitedVisit:
    """Hears what a store says to a question."""

    def __init__(self) -> None:
        self.said: asyncio.Future[Visit | Exception | None] = asyncio.Future()

    def tell(self, said: Visit | Exception | None) -> None:
        self.said.set_result(said)


async def visit(opened: Opened, request: TokenRequest) -> Visit:
    """Ask as the story does: by a question where the store takes one."""
    asked = AwaitedVisit()
    if opened.store.start_visit(request, opened.moments()[0], asked):
        assert not asked.said.done(), "told within the call"
        said = await asked.said
        if isinstance(said, Exception):
            raise said
        if said is not None:
            return said
    return await opened.store.admit(request, request.key)


async def admitted(opened: Opened, request: TokenRequest, times: int) -> int:
    """Count the visits that pass of this many, one after the other."""
    return sum([(await visit(opened, request)).rejection is None for _ in range(times)])


async def lead(opened: Opened, request: TokenRequest) -> Lease:
    """Become the one who mints for this key."""
    lease = await opened.store.lead(request, request.key, nothing_is_good)
    assert isinstance(lease, Lease)
    return lease


async def keep(opened: Opened, request: TokenRequest, token: EmbedToken) -> EmbedToken:
    """Keep a token as its leader does; returns it as others will find it."""
    lease = await lead(opened, request)
    token = replace(token, version=lease.fence, epoch=lease.epoch)
    assert await opened.store.keep(request, request.key, token, lease) is Kept.KEPT
    return token


async def mint_denied(opened: Opened, request: TokenRequest) -> Rejection | None:
    """Charge a mint and give it up at once."""
    lead = await opened.store.lead(request, request.key, nothing_is_good)
    if isinstance(lead, Rejection):
        return lead
    assert isinstance(lead, Lease)
    opened.store.abandon(request, request.key, lead, None)
    return None


def nothing_is_good(_token: EmbedToken) -> bool:
    """Want a mint whatever is held."""
    return False


async def minted(opened: Opened, request: TokenRequest, times: int) -> int:
    """Count the mints that are admitted of this many."""
    return sum([await mint_denied(opened, request) is None for _ in range(times)])


def refused_by(rejection: Rejection | None) -> tuple[LimitName, int] | None:
    """Name the limit and its wait, None where nothing was refused."""
    return None if rejection is None else (rejection.limit, rejection.verdict.retry_after)


class StoreContract:
    """The behaviours."""

    # --- tokens

    async def test_an_unknown_visitor_is_admitted_and_has_no_token(
        self, open_store: OpenStore
    ) -> None:
        """The verdict is the fingerprint limit's, whole."""
        limit = Limit(burst=20, interval=SECOND)
        opened = await open_store(limits_of(limit))
        verdict = Verdict(True, 19, SECOND, 0, limit)
        assert await visit(opened, request_of()) == Visit(verdict, None, None)

    async def test_a_token_that_is_kept_is_found(self, open_store: OpenStore) -> None:
        """By `visit` and by `look`, unchanged, again and again."""
        opened, request = await open_store(limits_of()), request_of()
        token = await keep(opened, request, token_at(opened))
        for _ in range(3):
            assert await opened.store.peek(request, request.key) == token
            assert (await visit(opened, request)).token == token

    async def test_a_later_token_replaces_the_one_before(self, open_store: OpenStore) -> None:
        """A renewal leaves one token under the key: its own."""
        opened, request = await open_store(limits_of()), request_of()
        await keep(opened, request, token_at(opened))
        later = await keep(opened, request, token_at(opened))
        assert await opened.store.peek(request, request.key) == later

    async def test_T5_a_dead_token_is_not_found(self, open_store: OpenStore) -> None:
        """At its last microsecond at the latest it is gone, or says itself that it is over."""
        opened, request = await open_store(limits_of()), request_of()
        await keep(opened, request, token_at(opened, lifetime=60 * SECOND))
        await opened.pass_time(59 * SECOND)
        held = await opened.store.peek(request, request.key)
        assert held is not None
        assert held.left(*opened.moments()) == SECOND
        await opened.pass_time(SECOND)
        gone = await opened.store.peek(request, request.key)
        assert gone is None or gone.left(*opened.moments()) <= 0

    async def test_G8_a_token_is_found_under_its_own_key_only(self, open_store: OpenStore) -> None:
        """F7: another client, agent, fingerprint, model, or the same text cut elsewhere."""
        opened = await open_store(limits_of())
        requests = [
            TokenRequest("web", AGENT, "abcd", None),
            TokenRequest("web", AGENT, "abcd", "m"),
            TokenRequest("web", AGENT, "abcdm", None),
            TokenRequest("web", AGENT, "ABCD", None),
            TokenRequest("web", AGENT, "abc", "dm"),
            TokenRequest("web", f"{AGENT}a", "bcd", None),
            TokenRequest("web", AGENT.lower(), "abcd", None),
            TokenRequest("webA", AGENT[1:], "abcd", None),
            TokenRequest("shop", AGENT, "abcd", None),
            TokenRequest("web", AGENT, "caf\u00e9", None),
            TokenRequest("web", AGENT, "cafe\u0301", None),
            TokenRequest("web", AGENT, f"abcd|{AGENT}", None),
            TokenRequest("web", AGENT, "abcd", "|"),
        ]
        tokens = []
        for request in requests:
            assert (await visit(opened, request)).token is None
            tokens.append(await keep(opened, request, token_at(opened)))
        assert [(await visit(opened, request)).token for request in requests] == tokens

    async def test_looking_charges_nothing(self, open_store: OpenStore) -> None:
        """Neither limit of visits nor limit of mints."""
        opened, request = await open_store(limits_of(Limit(1, HOUR), Limit(1, HOUR))), request_of()
        for _ in range(10):
            await opened.store.peek(request, request.key)
        assert await admitted(opened, request, 2) == 1
        assert await minted(opened, request, 2) == 1

    async def test_a_refused_visitor_is_not_shown_a_token(self, open_store: OpenStore) -> None:
        """The rejection names limit and wait; the token stays for the next visit that passes."""
        limit = Limit(burst=1, interval=60 * SECOND)
        opened, request = await open_store(limits_of(limit)), request_of()
        token = await keep(opened, request, token_at(opened))
        await visit(opened, request)
        verdict = Verdict(False, 0, 60 * SECOND, 60 * SECOND, limit)
        rejection = Rejection(LimitName.FINGERPRINT, verdict)
        assert await visit(opened, request) == Visit(verdict, rejection, None)
        await opened.pass_time(60 * SECOND)
        assert (await visit(opened, request)).token == token

    # --- the life of a visitor

    async def test_G9_an_ended_visitor_has_no_token(self, open_store: OpenStore) -> None:
        """None of theirs on any agent or model; what is minted afterwards is found as ever."""
        opened, request = await open_store(limits_of()), request_of()
        requests = [
            request,
            request_of(request.fingerprint, agent=OTHER_AGENT),
            replace(request, model="m"),
        ]
        for each in requests:
            await keep(opened, each, token_at(opened))
        await opened.store.revoke_visitor(request.client, request.fingerprint)
        for each in requests:
            assert await opened.store.peek(each, each.key) is None
            assert (await visit(opened, each)).token is None
            token = await keep(opened, each, token_at(opened))
            assert (await visit(opened, each)).token == token

    async def test_G9_ending_one_visitor_leaves_others_alone(self, open_store: OpenStore) -> None:
        """Also the one who has the same fingerprint with another client."""
        opened, request = await open_store(limits_of()), request_of()
        others = [
            request_of(),
            replace(request, client="shop"),
            request_of(request.fingerprint + "0"),
        ]
        tokens = [await keep(opened, other, token_at(opened)) for other in others]
        await opened.store.revoke_visitor(request.client, request.fingerprint)
        assert [(await visit(opened, other)).token for other in others] == tokens

    async def test_G9_an_end_wins_over_a_mint_under_way(self, open_store: OpenStore) -> None:
        """Its token is refused to its own leader, and nobody finds it."""
        opened, request = await open_store(limits_of()), request_of()
        lease = await lead(opened, request)
        await opened.store.revoke_visitor(request.client, request.fingerprint)
        token = replace(token_at(opened), version=lease.fence, epoch=lease.epoch)
        assert await opened.store.keep(request, request.key, token, lease) is Kept.ENDED
        assert await opened.store.peek(request, request.key) is None

    async def test_G9_what_is_not_held_is_handed_out_unless_its_visitor_was_ended(
        self, open_store: OpenStore
    ) -> None:
        """Released: nobody finds it, the next one leads at once, and an end in between is told."""
        opened, request = await open_store(limits_of()), request_of()
        assert await opened.store.release(request, request.key, await lead(opened, request)) is True
        assert await opened.store.peek(request, request.key) is None
        lease = await lead(opened, request)
        await opened.store.revoke_visitor(request.client, request.fingerprint)
        assert await opened.store.release(request, request.key, lease) is False
        assert await opened.store.release(request, request.key, await lead(opened, request)) is True

    # --- who leads

    async def test_a_leader_is_given_a_token_that_is_good_instead(
        self, open_store: OpenStore
    ) -> None:
        """It arrived since they looked: no limit of mints is charged."""
        opened = await open_store(limits_of(mints=Limit(2, HOUR)))
        request = request_of()
        token = await keep(opened, request, token_at(opened))
        for _ in range(3):
            assert await opened.store.lead(request, request.key, lambda _token: True) == token
        assert await minted(opened, request, 3) == 1

    async def test_S4_fences_only_grow(self, open_store: OpenStore) -> None:
        """Whatever became of the lease before: kept, given up, or refused by a limit between."""
        opened, request = await open_store(limits_of()), request_of()
        fences = []
        for round_ in range(6):
            lease = await lead(opened, request)
            fences.append(lease.fence)
            if round_ % 2:
                opened.store.abandon(request, request.key, lease, None)
            else:
                token = replace(token_at(opened), version=lease.fence, epoch=lease.epoch)
                assert await opened.store.keep(request, request.key, token, lease) is Kept.KEPT
        assert fences == sorted(set(fences))

    # --- limits

    @pytest.mark.parametrize(
        ("rate", "burst"), [(0.05, 1), (0.5, 4), (3, 1), (50, 7), (2_000, 3), (100_000, 50)]
    )
    async def test_L1_no_window_admits_more_than_burst_and_refill(
        self, open_store: OpenStore, rate: float, burst: int
    ) -> None:
        """Under a schedule drawn at random, between any two admissions."""
        limit = bucket.limit(rate, SECOND, burst)
        opened, request = await open_store(limits_of(limit)), request_of()
        chance = random.Random(f"{rate} {burst}")
        times, now = [], 0
        for _ in range(300):
            gap = chance.choice([0, 0, limit.interval // 3, limit.interval, 2 * limit.depth])
            gap = chance.randint(0, gap)
            now += gap
            await opened.pass_time(gap)
            if (await visit(opened, request)).rejection is None:
                times.append(now)
        for first, start in enumerate(times):
            for last in range(first, len(times)):
                window = times[last] - start
                assert last - first + 1 <= burst + window // limit.interval

    async def test_L2_a_bucket_that_refills_in_a_millisecond_still_limits(
        self, open_store: OpenStore
    ) -> None:
        """Sixty requests of one moment, one passes."""
        opened = await open_store(limits_of(bucket.limit(1000, SECOND, 1)))
        assert await admitted(opened, request_of(), 60) == 1

    async def test_L3_idling_for_less_than_the_refill_gives_less_than_the_burst(
        self, open_store: OpenStore
    ) -> None:
        """One token an interval gone by, none for a part of one."""
        limit = Limit(burst=5, interval=SECOND)
        opened, request = await open_store(limits_of(limit)), request_of()
        for idle, expected in [(0, 5), (SECOND - 1, 0), (1, 1), (4 * SECOND - 1, 3), (HOUR, 5)]:
            await opened.pass_time(idle)
            assert await admitted(opened, request, 7) == expected

    async def test_L5_a_refusal_charges_nothing(self, open_store: OpenStore) -> None:
        """Who hammers waits no longer than who waits."""
        opened, request = await open_store(limits_of(Limit(burst=1, interval=SECOND))), request_of()
        await visit(opened, request)
        for _ in range(9):
            await opened.pass_time(SECOND // 10)
            assert await admitted(opened, request, 5) == 0
        await opened.pass_time(SECOND // 10)
        assert await admitted(opened, request, 1) == 1

    async def test_L5_a_refusal_by_an_earlier_limit_charges_no_later_one(
        self, open_store: OpenStore
    ) -> None:
        """client before fingerprint; fingerprint_mints before agent."""  # noqa: D403 - limits' names
        opened = await open_store(
            limits_of(Limit(2, HOUR), Limit(1, HOUR), Limit(2, HOUR), Limit(1, HOUR))
        )
        request = request_of()
        assert refused_by((await visit(opened, request)).rejection) is None
        for _ in range(5):
            assert refused_by((await visit(opened, request)).rejection) == (LimitName.CLIENT, HOUR)
        other = request_of(request.fingerprint, client="web2")
        assert refused_by((await visit(opened, other)).rejection) is None
        assert refused_by(await mint_denied(opened, request)) is None
        for _ in range(5):
            refusal = refused_by(await mint_denied(opened, request))
            assert refusal == (LimitName.FINGERPRINT_MINTS, HOUR)
        assert refused_by(await mint_denied(opened, request_of())) is None
        assert refused_by(await mint_denied(opened, request_of())) == (LimitName.AGENT, HOUR)
        opened.use_limits(limits_of(Limit(2, HOUR)))
        told = [refused_by((await visit(opened, request)).rejection) for _ in range(2)]
        assert told == [None, (LimitName.FINGERPRINT, HOUR)]

    async def test_L5_what_is_not_for_a_token_meets_the_client_s_limit_alone(
        self, open_store: OpenStore
    ) -> None:
        """From the bucket that visits are charged to; where there is none, nothing refuses."""
        opened = await open_store(limits_of(client=Limit(2, HOUR)))
        request = request_of()
        assert refused_by((await visit(opened, request)).rejection) is None
        told = [refused_by(await opened.store.charge_client(request.client)) for _ in range(2)]
        assert told == [None, (LimitName.CLIENT, HOUR)]
        assert refused_by((await visit(opened, request)).rejection) == (LimitName.CLIENT, HOUR)
        opened.use_limits(limits_of())
        assert await opened.store.charge_client(request.client) is None

    async def test_L5_what_an_earlier_limit_admitted_stays_charged(
        self, open_store: OpenStore
    ) -> None:
        """The agent's limit refuses: the visitor's mint is spent all the same."""
        opened = await open_store(limits_of(mints=Limit(2, HOUR), agent=Limit(1, HOUR)))
        await mint_denied(opened, request_of())
        request = request_of()
        told = [refused_by(await mint_denied(opened, request)) for _ in range(3)]
        assert told == [
            (LimitName.AGENT, HOUR),
            (LimitName.AGENT, HOUR),
            (LimitName.FINGERPRINT_MINTS, HOUR),
        ]

    async def test_visits_charge_no_mints_and_mints_no_visits(self, open_store: OpenStore) -> None:
        """So reuse never eats an agent's budget."""
        opened = await open_store(limits_of(Limit(3, HOUR), Limit(2, HOUR), Limit(10, HOUR)))
        request = request_of()
        assert await admitted(opened, request, 5) == 3
        assert await minted(opened, request, 5) == 2
        assert await minted(opened, request_of(), 5) == 2

    async def test_who_shares_a_bucket(self, open_store: OpenStore) -> None:
        """Visits and mints: client and fingerprint; agent: all clients; client: all visitors."""
        opened = await open_store(
            limits_of(Limit(1, HOUR), Limit(1, HOUR), Limit(3, HOUR), Limit(4, HOUR))
        )
        request = request_of()
        elsewhere = request_of(request.fingerprint, agent=OTHER_AGENT)
        foreign = request_of(request.fingerprint, client="shop")
        told = [
            refused_by((await visit(opened, who)).rejection)
            for who in (request, elsewhere, foreign, request_of(), request_of(), request_of())
        ]
        spent, client = (LimitName.FINGERPRINT, HOUR), (LimitName.CLIENT, HOUR)
        assert told == [None, spent, None, None, None, client]
        mints = [
            refused_by(await mint_denied(opened, who))
            for who in (
                request,
                elsewhere,
                foreign,
                request_of(),
                request_of(),
                request_of(agent=OTHER_AGENT),
            )
        ]
        spent, agent = (LimitName.FINGERPRINT_MINTS, HOUR), (LimitName.AGENT, HOUR)
        assert mints == [None, spent, None, None, agent, None]

    @pytest.mark.parametrize("burst", [1, 30])
    async def test_L6_of_many_at_once_exactly_the_burst_passes(
        self, open_store: OpenStore, burst: int
    ) -> None:
        """A thousand concurrent visits of one visitor, a thousand mints on one agent."""
        opened = await open_store(limits_of(Limit(burst, HOUR), agent=Limit(burst, HOUR)))
        request = request_of()
        visits = await asyncio.gather(*(visit(opened, request) for _ in range(1000)))
        assert sum(seen.rejection is None for seen in visits) == burst
        mints = await asyncio.gather(*(mint_denied(opened, request_of()) for _ in range(1000)))
        assert sum(rejection is None for rejection in mints) == burst

    @pytest.mark.parametrize("rate", [0.01, 3, 7_000])
    async def test_L9_waiting_exactly_retry_after_succeeds_a_tick_less_fails(
        self, open_store: OpenStore, rate: float
    ) -> None:
        """Of each limit that can refuse."""
        limit = bucket.limit(rate, SECOND, 2)
        for limits, mints in [
            (limits_of(limit), False),
            (limits_of(client=limit), False),
            (limits_of(mints=limit), True),
            (limits_of(agent=limit), True),
        ]:
            opened, request = await open_store(limits), request_of()

            async def refusal(
                opened: Opened = opened, request: TokenRequest = request, *, mints: bool = mints
            ) -> int:
                rejection = (
                    await mint_denied(opened, request)
                    if mints
                    else (await visit(opened, request)).rejection
                )
                return 0 if rejection is None else rejection.verdict.retry_after

            assert [await refusal(), await refusal()] == [0, 0]
            wait = await refusal()
            assert wait >= 1
            await opened.pass_time(wait - 1)
            assert await refusal() == 1
            await opened.pass_time(1)
            assert await refusal() == 0

    async def test_L10_remaining_agrees_with_what_follows(self, open_store: OpenStore) -> None:
        """It counts down to zero, and then the next one is refused."""
        opened, request = await open_store(limits_of(Limit(burst=4, interval=SECOND))), request_of()
        told = [await visit(opened, request) for _ in range(6)]
        assert [seen.verdict and seen.verdict.remaining for seen in told] == [3, 2, 1, 0, 0, 0]
        assert [seen.rejection is None for seen in told] == [True] * 4 + [False] * 2

    async def test_overrides_hold_for_their_agent_only(self, open_store: OpenStore) -> None:
        """More or less than the others have."""
        opened = await open_store(
            limits_of(
                Limit(2, HOUR),
                Limit(2, HOUR),
                Limit(2, HOUR),
                overrides={
                    LimitName.FINGERPRINT: {OTHER_AGENT: Limit(5, HOUR)},
                    LimitName.FINGERPRINT_MINTS: {OTHER_AGENT: Limit(1, HOUR)},
                    LimitName.AGENT: {OTHER_AGENT: Limit(3, HOUR)},
                },
            )
        )
        assert await admitted(opened, request_of(), 9) == 2
        assert await admitted(opened, request_of(agent=OTHER_AGENT), 9) == 5
        assert await minted(opened, request_of(), 9) == 2
        assert [await minted(opened, request_of(agent=OTHER_AGENT), 9) for _ in range(5)] == [
            *[1] * 3,
            0,
            0,
        ]

    async def test_G6_a_shallow_override_gives_a_deep_limit_nothing_back(
        self, open_store: OpenStore
    ) -> None:
        """Asking on another agent, with quicker tokens, must not open the door that was closed."""
        quick = {OTHER_AGENT: Limit(burst=1, interval=SECOND)}
        opened = await open_store(
            limits_of(
                Limit(3, HOUR),
                Limit(3, HOUR),
                overrides={LimitName.FINGERPRINT: quick, LimitName.FINGERPRINT_MINTS: quick},
            )
        )
        request = request_of()
        quicker = request_of(request.fingerprint, agent=OTHER_AGENT)
        assert await admitted(opened, request, 9) == 3
        assert await minted(opened, request, 9) == 3
        for _ in range(5):
            assert await admitted(opened, quicker, 2) == 1
            assert await minted(opened, quicker, 2) == 1
            assert await admitted(opened, request, 2) == 0
            assert await minted(opened, request, 2) == 0
            await opened.pass_time(SECOND)

    async def test_L11_other_limits_hold_from_the_next_request_on(
        self, open_store: OpenStore
    ) -> None:
        """Raised: the difference is there at once; lowered: nobody waits by the old interval."""
        opened, request = await open_store(limits_of(Limit(2, SECOND))), request_of()
        assert await admitted(opened, request, 9) == 2
        opened.use_limits(limits_of(Limit(20, SECOND)))
        assert await admitted(opened, request, 30) == 18
        opened.use_limits(limits_of(Limit(20, HOUR)))
        assert await admitted(opened, request, 30) == 19
        opened.use_limits(limits_of(Limit(5, SECOND)))
        rejection = (await visit(opened, request)).rejection
        assert refused_by(rejection) == (LimitName.FINGERPRINT, SECOND)
        await opened.pass_time(SECOND)
        assert await admitted(opened, request, 9) == 1

    async def test_L11_the_clients_limit_can_come_and_go(self, open_store: OpenStore) -> None:
        """It is off by default; a reload turns it on, and another one off."""
        opened, request = await open_store(limits_of()), request_of()
        assert await admitted(opened, request, 9) == 9
        opened.use_limits(limits_of(client=Limit(2, HOUR)))
        assert await admitted(opened, request, 9) == 2
        opened.use_limits(limits_of())
        assert await admitted(opened, request, 9) == 9
        opened.use_limits(limits_of(client=Limit(2, HOUR)))
        assert await admitted(opened, request, 9) == 0

    async def test_L12_a_dry_run_denies_nobody(self, open_store: OpenStore) -> None:
        """The verdict says what would have been; the limits beside it bite as ever."""
        limit = Limit(1, HOUR)
        every = frozenset(LimitName)
        opened = await open_store(limits_of(limit, limit, limit, limit, dry_run=every))
        request = request_of()
        told = [await visit(opened, request) for _ in range(3)]
        assert [seen.rejection for seen in told] == [None] * 3
        assert [seen.verdict and seen.verdict.allowed for seen in told] == [True, False, False]
        assert await minted(opened, request, 5) == 5
        opened.use_limits(
            limits_of(limit, limit, limit, dry_run=frozenset({LimitName.FINGERPRINT_MINTS}))
        )
        assert refused_by(await mint_denied(opened, request)) == (LimitName.AGENT, HOUR)

    async def test_L13_hostile_names_are_limited_each_on_its_own(
        self, open_store: OpenStore
    ) -> None:
        """Empty, huge, braces, colons, NUL, right-to-left: one token each, and none for another."""
        opened = await open_store(limits_of(Limit(1, HOUR), Limit(1, HOUR)))
        names = [
            *("", " ", "{}", "{", "}", "{a}", "{a}b", ":", "::", "a:b", "a", "b", "\x00", "a\x00"),
            *("\u202ea", "\u202e", "a\u202e", "%s", "*", "?", "[a]", "\r\n", "\n", "None", "0"),
            *("\u00e9", "e\u0301", "\ud800", "x" * 65_536, "x" * 65_537, "-1", "__proto__"),
        ]
        requests = [TokenRequest("web", AGENT, name) for name in names]
        for count in (admitted, minted):
            assert [await count(opened, request, 3) for request in requests] == [1] * len(requests)
            assert [await count(opened, request, 1) for request in requests] == [0] * len(requests)

    async def test_T5_time_that_stands_still_admits_no_more_than_the_burst(
        self, open_store: OpenStore
    ) -> None:
        """A clock that stalls refills nothing, and refuses for as long as it stalls."""
        opened, request = await open_store(limits_of(Limit(burst=3, interval=1))), request_of()
        assert await admitted(opened, request, 1000) == 3
        await opened.pass_time(1)
        assert await admitted(opened, request, 1000) == 1
