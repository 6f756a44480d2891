"""What only the leader of a flight does, once for all who wait: mint one token.

    wait while the key backs off -> has the issuer refused this before?
        -> lead among all processes, too: is there a token now? meet the limits on mints
        -> mint, in its turn of the budget -> record the session -> cache the token

Everything that touches the world is passed in.  What goes wrong is an exception of
`broker.errors`; the lease of the key ends in any case.
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
from broker.flight import Flight
from broker.issuers.base import Issuer
from broker.key_backoff import KeyBackoff
from broker.model import Clock, EmbedToken, Minted, Session, TokenRequest
from broker.pacing.pacer import Pacer, Priority
from broker.pacing.slots import UNCOUNTED, Slot
from broker.rules import reuse
from broker.rules.reuse import ReusePolicy
from broker.sessions.admin import digest_of
from broker.sessions.base import SessionStore
from broker.stores.base import Kept, Lease, Rejection, Store
from broker.telemetry.logs import RefusalLog
from broker.telemetry.metrics import MintMetrics
from broker.units import SECOND
from broker.wire.responses import success_body, token_in

log = structlog.get_logger()


class Mint(Struct, frozen=True):
    """A mint to be made: for which request and key, after which token, and how urgent it is."""

    request: TokenRequest
    key: str
    cached: EmbedToken | None
    priority: Priority


class MintRules(Struct, frozen=True):
    """When tokens are reused, and how many seconds a mint may take, its turn included."""

    reuse: ReusePolicy
    timeout: float


class Minter:
    """Makes mints.  One may outlive its callers; its token is cached then.

    `draw` gives numbers in [0, 1).
    """

    def __init__(
        self,
        store: Store,
        sessions: SessionStore,
        issuer: Issuer,
        pacer: Pacer,
        rules: MintRules,
        clock: Clock,
        metrics: MintMetrics,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._issuer = issuer
        self._pacer = pacer
        self._policy, self._timeout = rules.reuse, rules.timeout
        self._clock = clock
        self._metrics = metrics
        self._draw = draw
        self.renewal_log = RefusalLog()
        self.backoff = KeyBackoff(clock, draw)

    def mint_at_once(
        self, _request: TokenRequest, _cached: EmbedToken | None, _now: int
    ) -> tuple[EmbedToken, Minted] | Rejection | None:
        """Do what `mint` does, if nothing of it waits; None where it does.

        `_now` is the monotonic clock (us), at which the store had nothing better than `_cached`,
        and from which the token lives its whole life.
        """
        return None

    def may_renew_ahead(self, key: str) -> bool:
        """Whether a renewal ahead of time is cheap at this moment: no back-off, and headroom."""
        return not self.backoff.left(key) and self._pacer.has_headroom

    async def mint(self, flight: Flight[EmbedToken], mint: Mint) -> EmbedToken:
        """Return the token of this flight; raises errors.BrokerError."""
        try:
            async with asyncio.timeout(self._timeout):
                token = await self._lead(flight, mint)
        except (TimeoutError, errors.BrokerError) as error:
            self._count_refresh(mint, "failed")
            if flight.background or _says_wait(error):
                self.backoff.note_failure(mint.key)  # or each access would try again
            if flight.background:
                self._report_renewal(error, mint.request)
            if isinstance(error, TimeoutError):
                raise errors.UpstreamTimeout("the mint did not finish in time") from error
            raise
        except Exception:
            self.backoff.note_failure(mint.key)
            if flight.background or flight.deserted:
                log.exception("broker.defect")  # nobody waits: it would vanish
            raise
        same = mint.cached is not None and token.body == mint.cached.body
        self._count_refresh(mint, "same" if same else "renewed")
        return token

    async def _lead(self, flight: Flight[EmbedToken], mint: Mint) -> EmbedToken:
        """Become the one who mints this key, or return what another process has minted."""
        await self.backoff.wait(mint.key)
        await self._issuer.check(mint.request)
        lead = await self._store.lead(mint.request, mint.key, self._better_than(mint.cached))
        if isinstance(lead, EmbedToken):
            return lead
        if isinstance(lead, Rejection):
            raise lead.error()
        return await self._make(flight, mint, lead)

    async def _make(self, flight: Flight[EmbedToken], mint: Mint, lease: Lease) -> EmbedToken:
        """Call the issuer and cache what it made; the lease ends here, whatever happens."""
        turn = _Turn(self._pacer, mint.priority, mint.request.client, flight, self._clock)
        try:
            minted = await self._timed(self._issuer.mint(mint.request, turn), turn)
            turn.settle()
            session, is_their_own = None, True
            if mint.cached is not None and minted.token == token_in(mint.cached.body):
                token = self._same_again(mint.key, mint.cached, lease)
            else:
                token = self._ready(minted, turn.mono, turn.wall, lease)
                self.backoff.forget(mint.key)
                session = await self._record(mint.request, minted, token, turn.wall)
                is_their_own = session is not None
            await self._keep(mint, token, lease, session, cache=is_their_own)
        except BaseException as error:
            turn.settle()
            modest = mint.priority is Priority.AHEAD and isinstance(error, errors.BudgetExhausted)
            # a visitor who waits elsewhere has a claim to a turn that a renewal has not
            self._store.abandon(mint.request, mint.key, lease, None if modest else error)
            raise
        return token

    async def _keep(
        self, mint: Mint, token: EmbedToken, lease: Lease, session: Session | None, *, cache: bool
    ) -> None:
        """Cache it, if tokens are reused and it may be; raises SessionEnded for who was revoked."""
        if self._policy.enabled and cache:
            lives = await self._store.keep(mint.request, mint.key, token, lease) is not Kept.ENDED
        else:
            lives = await self._store.release(mint.request, mint.key, lease)
        if not lives:
            if session is not None:
                await self._sessions.forget(session)  # nobody was given its token
            raise errors.SessionEnded

    async def _record(
        self, request: TokenRequest, minted: Minted, token: EmbedToken, began: int
    ) -> Session | None:
        """Write the session down before its token is cached: what is handed out can be revoked.

        None for one that is another visitor's (a vendor, or a cache before it, that repeats
        itself): then the token is for this flight only, because to revoke it for the other one
        must end it here, too, and no cache knows of that.
        """
        if not self._issuer.proves and await self._sessions.ended(minted.session_id):
            raise errors.SessionEnded  # the vendor gave one again; what is signed here is new
        session = self._session_of(request, minted, token, began)
        try:
            await self._sessions.record(session)
        except errors.SessionTaken:
            if self.renewal_log.first("session taken", self._clock.mono()):
                log.warning("broker.session_repeated", client=request.client)
            return None
        return session

    def _session_of(
        self, request: TokenRequest, minted: Minted, token: EmbedToken, began: int
    ) -> Session:
        return Session(
            minted.session_id,
            request.client,
            request.agent,
            request.fingerprint,
            request.model or "",
            began // SECOND,
            token.dies_wall // SECOND,
            b"" if self._issuer.proves else digest_of(minted.token),
        )

    def _same_again(self, key: str, cached: EmbedToken, lease: Lease) -> EmbedToken:
        """The vendor has nothing newer: renew ahead after half of the life above the floor.

        Who asks for a fresh one, or below the floor, meets the back-off of a failing key.
        """
        self.backoff.note_failure(key)
        if cached.epoch != lease.epoch:  # what the vendor gives again was ended meanwhile
            raise errors.SessionEnded
        left, floor = self._left(cached), self._policy.marks(cached.lifetime).floor
        mark = min(cached.mark, floor + max(left - floor, 0) // 2)
        return replace(cached, mark=mark, version=lease.fence, epoch=lease.epoch)

    def _report_renewal(self, error: BaseException, request: TokenRequest) -> None:
        """Write the first failure of a kind in a minute: an outage fails them all, again."""
        if self.renewal_log.first(f"renewal {type(error).__name__}", self._clock.mono()):
            log.warning("broker.renewal_failed", error=_code(error), client=request.client)

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
        now is over, whichever comes first.  Raises UpstreamUnavailable for one below its floor.
        """
        whole = minted.whole or minted.lifetime
        marks = self._policy.marks(whole)
        mono_now, wall_now = self._clock.mono(), self._clock.wall()
        token = EmbedToken(
            body=minted.body or success_body(minted),
            dies_mono=min(mono + whole, mono_now + minted.lifetime),
            dies_wall=min(wall + whole, wall_now + minted.lifetime),
            lifetime=whole,
            mark=reuse.renewal_mark(marks, self._draw),
            version=lease.fence,
            epoch=lease.epoch,
            origin=sys.intern(minted.origin or self._issuer.signer_id),  # once, not once a token
        )
        if token.left(mono_now, wall_now) < marks.floor or whole <= 0:
            raise errors.UpstreamUnavailable("the token had expired, or nearly, when it arrived")
        return token

    def _better_than(self, cached: EmbedToken | None) -> Callable[[EmbedToken], bool]:
        """Tell a good token that arrived since this flight's first caller looked."""

        def better(found: EmbedToken) -> bool:
            if not self._policy.enabled or (cached is not None and found.version == cached.version):
                return False
            return self._left(found) >= self._policy.marks(found.lifetime).floor

        return better

    def _left(self, token: EmbedToken) -> int:
        return token.left(self._clock.mono(), self._clock.wall())

    def _count_refresh(self, mint: Mint, outcome: str) -> None:
        if mint.cached is None:
            return
        reason = "ahead" if mint.priority is Priority.AHEAD else "floor"
        if mint.request.fresh:
            reason = "fresh"
        self._metrics.refreshes[reason, outcome].inc()


class _Turn:
    """A mint's turns in the budget.

    Marks the flight as sent, and notes the moment from which the token's life is counted.
    """

    def __init__(
        self,
        pacer: Pacer,
        priority: Priority,
        client: str,
        flight: Flight[EmbedToken],
        clock: Clock,
    ) -> None:
        self._take = pacer.acquire
        self._priority = priority
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
            self._slot = await self._take(self._present_priority, self._client)
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
    def _present_priority(self) -> Priority:
        """A renewal ahead of time that a visitor has joined may no longer be put off."""
        if self._priority is Priority.AHEAD and self._flight.awaited:
            return Priority.MANDATORY
        return self._priority


def _says_wait(error: BaseException) -> bool:
    """Whether this failure of a mint is the vendor's, and a passing one: the key backs off."""
    return isinstance(error, TimeoutError) or (
        isinstance(error, errors.VendorError) and error.transient
    )


def _code(error: BaseException) -> str:
    return error.code if isinstance(error, errors.BrokerError) else "UPSTREAM_TIMEOUT"
