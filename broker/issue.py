"""THE STORY of a request, from a known client's ask to an answer.

    ask -> store: limits of every request, and is there a token?
        -> a good one: answer it (and renew it in the background when its mark has passed)
        -> otherwise join the flight of this key; its leader alone leads among all processes, too:
           meets the mint limits -> mints, in its turn of the budget -> keeps
        -> answer; if the mint failed for a passing reason, an ageing token is still an answer

Everything that decides is elsewhere and pure; everything that touches the world is passed in.
Refusals by a limit are values, because a flood of them must stay cheap; what can go wrong in a
mint is an exception of `broker.errors`.
"""

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable

import structlog
from msgspec import Struct
from msgspec.structs import replace

from broker import errors
from broker.flight import Flight, SingleFlight
from broker.issuers.base import Issuer
from broker.key_backoff import KeyBackoff
from broker.model import Clock, EmbedToken, Minted, Outcome, Session, TokenRequest
from broker.pacing.pacer import Pacer, Priority
from broker.pacing.slots import UNCOUNTED, Slot
from broker.rules import reuse
from broker.rules.bucket import Verdict
from broker.rules.reuse import SECOND, Life
from broker.sessions.admin import digest_of
from broker.sessions.base import SessionStore
from broker.stores.base import Denial, Kept, Lease, Store
from broker.telemetry.logs import RefusalLog
from broker.telemetry.metrics import MintMetrics
from broker.wire.responses import success_body, token_in

log = structlog.get_logger()


class ReusePolicy(Struct, frozen=True):
    """When tokens are reused: microseconds of life left; `enabled` False mints for every ask."""

    enabled: bool
    ahead: int
    floor: int
    outage: int

    def marks(self, lifetime: int) -> reuse.Floors:
        """Fit the configured marks to a token of this lifetime."""
        return reuse.floors(lifetime, self.ahead, self.floor, self.outage)


class IssuedToken(Struct, frozen=True, gc=False):
    """A token for the visitor, how it came about, and the visitor's limit for the headers."""

    token: EmbedToken
    outcome: Outcome
    left: int
    verdict: Verdict | None


class Refusal(Struct, frozen=True, gc=False):
    """A limit said no."""

    denial: Denial


class TokenService:
    """Answers asks.

    `mint_timeout` is how many seconds a mint may take, its turn in the budget included; it may
    outlive its callers, its token is then cached.
    """

    def __init__(
        self,
        store: Store,
        book: SessionStore,
        issuer: Issuer,
        pacer: Pacer,
        policy: ReusePolicy,
        clock: Clock,
        metrics: MintMetrics,
        mint_timeout: float,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._book = book
        self._issuer = issuer
        self._pacer = pacer
        self._policy = policy
        self._clock = clock
        self._metrics = metrics
        self._mint_timeout = mint_timeout
        self._draw = draw
        self.flights: SingleFlight[EmbedToken] = SingleFlight()
        self.renewal_log = RefusalLog()
        self.patience = KeyBackoff(clock, draw)

    async def issue(self, ask: TokenRequest, patience: float) -> IssuedToken | Refusal:
        """Answer one ask within `patience` seconds; raises what a mint raises."""
        key = ask.key
        visit = await self._store.visit(ask, key)
        if visit.denial is not None:
            return Refusal(visit.denial)
        held = visit.token if self._policy.enabled else None
        if held is None or ask.fresh:
            return await self._mint_for(ask, key, held, visit.verdict, patience)
        left = self._left(held)
        if left > held.mark:  # most requests end here; a mark never lies below the floor
            return IssuedToken(held, Outcome.REUSED, left, visit.verdict)
        match reuse.life(left, held.mark, self._policy.marks(held.lifetime)):
            case Life.FRESH | Life.RENEW:
                self._renew_ahead(ask, key, held)
                return IssuedToken(held, Outcome.REUSED, left, visit.verdict)
            case Life.STALE:
                return await self._renew_now(ask, key, held, visit.verdict, patience)
            case Life.DEAD:
                return await self._mint_for(ask, key, None, visit.verdict, patience)

    async def _mint_for(
        self,
        ask: TokenRequest,
        key: str,
        held: EmbedToken | None,
        verdict: Verdict | None,
        patience: float,
    ) -> IssuedToken:
        """Start or join the mint of this key; with `held` it is a renewal."""
        urgency = Priority.FIRST if held is None else Priority.MANDATORY

        async def mint(flight: Flight[EmbedToken]) -> EmbedToken:
            return await self._mint(flight, ask, key, held, urgency)

        try:
            token, leader = await self.flights.join(key, mint, patience)
        except TimeoutError as error:
            raise errors.UpstreamTimeout("no token was minted before the deadline") from error
        left = self._require_life(token, held)
        return IssuedToken(token, Outcome.MINTED if leader else Outcome.COALESCED, left, verdict)

    async def _renew_now(
        self,
        ask: TokenRequest,
        key: str,
        held: EmbedToken,
        verdict: Verdict | None,
        patience: float,
    ) -> IssuedToken:
        """Below the floor: mint; fall back on what is held if that fails for a passing reason."""
        left = self._left(held)
        if self.patience.left(key):
            return IssuedToken(held, Outcome.REUSED, left, verdict)
        try:
            return await self._mint_for(ask, key, held, verdict, patience)
        except errors.BrokerError as error:
            if not error.transient:
                raise
            found = await self._store.look(ask, key)  # what was held may have been ended meanwhile
            left = 0 if found is None else self._left(found)
            if found is None or left < self._policy.marks(found.lifetime).outage:
                raise
            return IssuedToken(found, Outcome.REUSED, left, verdict)

    def _renew_ahead(self, ask: TokenRequest, key: str, held: EmbedToken) -> None:
        """Past its mark: mint the successor in the background, if that is cheap at this moment."""
        if self.patience.left(key) or not self._pacer.plenty:
            return

        async def mint(flight: Flight[EmbedToken]) -> EmbedToken:
            return await self._mint(flight, ask, key, held, Priority.AHEAD)

        self.flights.start_background(key, mint)

    async def _mint(
        self,
        flight: Flight[EmbedToken],
        ask: TokenRequest,
        key: str,
        held: EmbedToken | None,
        urgency: Priority,
    ) -> EmbedToken:
        """The flight of one key: what only its leader meets, once for all who wait."""
        try:
            async with asyncio.timeout(self._mint_timeout):
                await self.patience.wait(key)
                await self._issuer.check(ask)
                lead = await self._store.lead(ask, key, self._better_than(held))
                if isinstance(lead, EmbedToken):
                    return lead
                if isinstance(lead, Denial):
                    raise errors.RateLimited(lead.limit, lead.verdict)  # noqa: TRY301 - the story
                token = await self._make(flight, ask, key, held, urgency, lead)
        except (TimeoutError, errors.BrokerError) as error:
            self._count_refresh(ask, held, urgency, "failed")
            if flight.background or _says_wait(error):
                self.patience.note_failure(key)  # or each access would try again
            if flight.background:
                self._report_renewal(error, ask)
            if isinstance(error, TimeoutError):
                raise errors.UpstreamTimeout("the mint did not finish in time") from error
            raise
        except Exception:
            self.patience.note_failure(key)
            if flight.background or flight.deserted:
                log.exception("broker.defect")  # nobody waits: it would vanish
            raise
        same = held is not None and token.body == held.body
        self._count_refresh(ask, held, urgency, "same" if same else "renewed")
        return token

    async def _make(
        self,
        flight: Flight[EmbedToken],
        ask: TokenRequest,
        key: str,
        held: EmbedToken | None,
        urgency: Priority,
        lease: Lease,
    ) -> EmbedToken:
        """Call the issuer and hold what it made; the lease ends here, whatever happens."""
        turn = _Turn(self._pacer, urgency, ask.client, flight, self._clock)
        try:
            minted = await self._timed(self._issuer.mint(ask, turn), turn)
            turn.settle()
            session = None
            if held is not None and minted.token == token_in(held.body):
                token = self._same_again(key, held, lease)
            else:
                token = self._ready(minted, turn.mono, turn.wall, lease)
                self._require_floor(token)
                self.patience.forget(key)
                session = await self._record(ask, minted, token, turn.wall)
            await self._keep(ask, key, token, lease, session)
        except BaseException as error:
            turn.settle()
            modest = urgency is Priority.AHEAD and isinstance(error, errors.BudgetExhausted)
            # a visitor who waits elsewhere has a claim to a turn that a renewal has not
            self._store.abandon(ask, key, lease, None if modest else error)
            raise
        return token

    async def _keep(
        self, ask: TokenRequest, key: str, token: EmbedToken, lease: Lease, session: Session | None
    ) -> None:
        """Hold the token, where tokens are reused; raises SessionEnded if its visitor was ended."""
        if self._policy.enabled:
            lives = await self._store.keep(ask, key, token, lease) is not Kept.ENDED
        else:
            lives = await self._store.release(ask, key, lease)
        if not lives:
            if session is not None:
                await self._book.forget(session)  # nobody was given its token
            raise errors.SessionEnded

    async def _record(
        self, ask: TokenRequest, minted: Minted, token: EmbedToken, began: int
    ) -> Session:
        """Write the session down before its token is held: what is handed out can be ended."""
        if not self._issuer.proves and await self._book.ended(minted.session_id):
            raise errors.SessionEnded  # the vendor gave one again; what is signed here is new
        session = Session(
            session_id=minted.session_id,
            client=ask.client,
            agent=ask.agent,
            fingerprint=ask.fingerprint,
            model=ask.model or "",
            issued=began // SECOND,
            expires=token.dies_wall // SECOND,
            digest=b"" if self._issuer.proves else digest_of(minted.token),
        )
        await self._book.record(session)
        return session

    def _same_again(self, key: str, held: EmbedToken, lease: Lease) -> EmbedToken:
        """The vendor has nothing newer: renew ahead after half of the life above the floor.

        Who asks for a fresh one, or below the floor, meets the back-off of a failing key.
        """
        self.patience.note_failure(key)
        if held.epoch != lease.epoch:  # what the vendor gives again was ended meanwhile
            raise errors.SessionEnded
        left, floor = self._left(held), self._policy.marks(held.lifetime).floor
        mark = min(held.mark, floor + max(left - floor, 0) // 2)
        return replace(held, mark=mark, version=lease.fence, epoch=lease.epoch)

    def _require_floor(self, token: EmbedToken) -> None:
        floor = self._policy.marks(token.lifetime).floor
        if self._left(token) < floor or token.lifetime <= 0:
            raise errors.UpstreamUnavailable("the token had expired, or nearly, when it arrived")

    def _report_renewal(self, error: BaseException, ask: TokenRequest) -> None:
        """Write the first failure of a kind in a minute: an outage fails them all, again."""
        if self.renewal_log.first(f"renewal {type(error).__name__}", self._clock.mono()):
            log.warning("broker.renewal_failed", error=_code(error), client=ask.client)

    async def _timed(self, mint: Awaitable[Minted], turn: "_Turn") -> Minted:
        """Measure what the issuer took, without the wait for its turns."""
        started = time.perf_counter()
        outcome = "failed"
        try:
            minted = await mint
            outcome = "minted"
        except errors.UpstreamRefused:
            outcome = "refused"
            raise
        finally:
            if turn.taken:
                seconds = time.perf_counter() - started - turn.waited
                self._metrics.duration[outcome].observe(seconds)
        return minted

    def _ready(self, minted: Minted, mono: int, wall: int, lease: Lease) -> EmbedToken:
        """Make the answer's bytes and draw the renewal mark, once for the life of the token.

        It dies a whole life after the mint was started (`mono`, `wall`), or when what it has left
        now is over, whichever comes first.
        """
        whole = minted.whole or minted.lifetime
        return EmbedToken(
            body=success_body(minted),
            dies_mono=min(mono + whole, self._clock.mono() + minted.lifetime),
            dies_wall=min(wall + whole, self._clock.wall() + minted.lifetime),
            lifetime=whole,
            mark=reuse.renewal_mark(self._policy.marks(whole), self._draw),
            version=lease.fence,
            epoch=lease.epoch,
            origin=sys.intern(minted.origin or self._issuer.origin),  # once, not once a token
        )

    def _better_than(self, held: EmbedToken | None) -> Callable[[EmbedToken], bool]:
        """Tell a good token that arrived since this flight's first asker looked."""

        def better(found: EmbedToken) -> bool:
            if not self._policy.enabled or (held is not None and found.version == held.version):
                return False
            return self._left(found) >= self._policy.marks(found.lifetime).floor

        return better

    def _require_life(self, token: EmbedToken, held: EmbedToken | None) -> int:
        """Return the life left at this moment; raises if the answer would come too late."""
        left = self._left(token)
        marks = self._policy.marks(token.lifetime)
        again = held is not None and token.body == held.body
        if left <= 0 or left < (marks.outage if again else marks.floor):
            raise errors.UpstreamUnavailable("the token expired before it could be handed out")
        return left

    def _left(self, token: EmbedToken) -> int:
        return token.left(self._clock.mono(), self._clock.wall())

    def _count_refresh(
        self, ask: TokenRequest, held: EmbedToken | None, urgency: Priority, outcome: str
    ) -> None:
        if held is None:
            return
        reason = "ahead" if urgency is Priority.AHEAD else "floor"
        if ask.fresh:
            reason = "fresh"
        self._metrics.refreshes[reason, outcome].inc()


class _Turn:
    """A mint's turns in the budget.

    Marks the flight as sent, and notes the moment from which the token's life is counted.
    """

    def __init__(
        self,
        pacer: Pacer,
        urgency: Priority,
        client: str,
        flight: Flight[EmbedToken],
        clock: Clock,
    ) -> None:
        self._take = pacer.turn
        self._urgency = urgency
        self._client = client
        self._flight = flight
        self._clock = clock
        self._slot = UNCOUNTED
        self.waited = 0.0
        self.taken = False
        self.mono, self.wall = clock.mono(), clock.wall()

    async def __call__(self) -> Slot:
        self.settle()
        if self.taken and self._flight.deserted:
            raise errors.UpstreamUnavailable("nobody waits for another try")
        began = time.perf_counter()
        self._flight.sent = False
        try:
            self._slot = await self._take(self._present_urgency, self._client)
        finally:
            self.waited += time.perf_counter() - began
        self._flight.sent = self.taken = True
        self.mono, self.wall = self._clock.mono(), self._clock.wall()
        return self._slot

    def settle(self) -> None:
        """Give the slot back, unless the issuer keeps it."""
        if not self._slot.kept:
            self._slot.settle()

    @property
    def _present_urgency(self) -> Priority:
        """A renewal ahead of time that a visitor has joined may no longer be put off."""
        if self._urgency is Priority.AHEAD and self._flight.awaited:
            return Priority.MANDATORY
        return self._urgency


def _says_wait(error: BaseException) -> bool:
    """Whether this failure of a mint is the vendor's, and a passing one: the key backs off."""
    return isinstance(error, TimeoutError) or (
        isinstance(error, errors.VendorError) and error.transient
    )


def _code(error: BaseException) -> str:
    return error.code if isinstance(error, errors.BrokerError) else "UPSTREAM_TIMEOUT"
