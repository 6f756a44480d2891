"""THE STORY of a request, from a known client's request to an answer.

    request -> store: limits of every request, and is there a token?
        -> a valid one: answer it (and renew it in the background when its mark has passed)
        -> none, and a mint waits for nothing: mint (`local_minting`)
           Where the store is in memory a request has ended here by a few calls (`begin`);
           all others go on as work that may wait (`finish`).
        -> otherwise join the flight of this key; its leader mints (`minting`)
        -> answer; if the mint failed for a passing reason, an ageing token is still an answer

Everything that decides is elsewhere and pure; everything that touches the world is passed in.
Refusals by a limit are values, because a flood of them must stay cheap; what can go wrong in a
mint is an exception of `broker.errors`.
"""

from collections.abc import Callable

from msgspec import Struct

from broker import errors
from broker.flight import Flight, SingleFlight, Work
from broker.minting import Mint, Minter
from broker.model import Clock, EmbedToken, Minted, Outcome, TokenRequest
from broker.pacing.pacer import Priority
from broker.rules import reuse
from broker.rules.bucket import Verdict
from broker.rules.reuse import Life, ReusePolicy
from broker.stores.base import Rejection, Store, Visit

Lead = Callable[[Flight[EmbedToken]], Work[EmbedToken]]
"""What the leader of a flight does."""


class IssuedToken(Struct, frozen=True, gc=False):
    """A token for the visitor, how it came about, and the visitor's limit for the headers.

    `left` are the microseconds of life that it had at the moment `wall` (Unix us).  `minted` is
    what the issuer gave, where the token was made within this request.
    """

    token: EmbedToken
    outcome: Outcome
    left: int
    wall: int
    verdict: Verdict | None
    minted: Minted | None = None


Answered = IssuedToken | Rejection
"""How a request ends that does not fail."""

_REUSED, _MINTED = Outcome.REUSED, Outcome.MINTED
"""The name of an enum's member is looked up in half a microsecond (Python 3.11)."""


class TokenService:
    """Answers requests; `flights` are the mints under way, by key."""

    def __init__(self, store: Store, minter: Minter, policy: ReusePolicy, clock: Clock) -> None:
        self._store = store
        self._visit, self.start_visit = store.visit, store.start_visit
        self._minter = minter
        self._policy = policy
        self._clock = clock
        self.flights: SingleFlight[EmbedToken] = SingleFlight()

    async def issue(self, request: TokenRequest, timeout: float) -> IssuedToken | Rejection:
        """Answer one request within `timeout` seconds; raises what a mint raises."""
        begun = self.begin(request, self._clock.mono())
        return begun if isinstance(begun, Answered) else await self.finish(request, begun, timeout)

    def begin(
        self, request: TokenRequest, now: int, visit: Visit | None = None
    ) -> IssuedToken | Rejection | Visit | None:
        """Answer at once, if that can be; what is returned else is for `finish`.

        `now` is the monotonic clock in microseconds; `visit` is what the store has said already, to
        whoever started the visit (`start_visit`).
        """
        if visit is None:
            visit = self._visit(request, now)
            if visit is None:
                return None
        if visit.rejection is not None:
            return visit.rejection
        cached = visit.token
        if cached is None or request.fresh or not self._policy.enabled:
            return self._mint_at_once(request, visit, now)
        wall = self._clock.wall()
        left = cached.left(now, wall)
        if left > cached.mark:  # most requests end here; a mark never lies below the floor
            return IssuedToken(cached, _REUSED, left, wall, visit.verdict)
        return visit

    async def finish(
        self, request: TokenRequest, visit: Visit | None, timeout: float
    ) -> IssuedToken | Rejection:
        """Answer what was begun and had to wait, as `issue` does."""
        if visit is None:
            visit = await self._store.admit(request, request.key)
            begun = self.begin(request, self._clock.mono(), visit)
            if isinstance(begun, Answered):
                return begun
        key = request.key
        cached = visit.token if self._policy.enabled else None
        if cached is None or request.fresh:
            return await self._mint(request, key, cached, visit.verdict, timeout)
        reused = self._reused(cached, visit.verdict)
        match reuse.life(reused.left, cached.mark, self._policy.marks(cached.lifetime)):
            case Life.FRESH | Life.RENEW:
                self._renew_ahead(Mint(request, key, cached, Priority.AHEAD))
                return reused
            case Life.STALE:
                return await self._renew_now(request, key, cached, visit.verdict, timeout)
            case Life.DEAD:
                return await self._mint(request, key, None, visit.verdict, timeout)

    def _mint_at_once(
        self, request: TokenRequest, visit: Visit, now: int
    ) -> IssuedToken | Rejection | Visit:
        """Mint where nothing of it waits; the visit itself where something does."""
        if request.key in self.flights:
            return visit
        cached = visit.token if self._policy.enabled else None
        made = self._minter.mint_at_once(request, cached, now)
        if made is None:
            return visit
        if isinstance(made, Rejection):
            return made
        token, minted = made
        life = token.lifetime  # all of it is left: the moment at which it began has just been read
        return IssuedToken(token, _MINTED, life, token.dies_wall - life, visit.verdict, minted)

    async def _mint(
        self,
        request: TokenRequest,
        key: str,
        cached: EmbedToken | None,
        verdict: Verdict | None,
        timeout: float,
    ) -> IssuedToken:
        """Start or join the mint of this key; with `cached` it is a renewal."""
        mint = _mint_of(request, cached)
        try:
            token, leader = await self.flights.join(key, self._leading(mint), timeout)
        except TimeoutError as error:
            raise errors.UpstreamTimeout("no token was minted before the deadline") from error
        return self._handed_out(token, _MINTED if leader else Outcome.COALESCED, cached, verdict)

    def _handed_out(
        self,
        token: EmbedToken,
        outcome: Outcome,
        cached: EmbedToken | None,
        verdict: Verdict | None,
    ) -> IssuedToken:
        """Answer with what was minted; raises UpstreamUnavailable if it is too late for that."""
        wall = self._clock.wall()
        left = token.left(self._clock.mono(), wall)
        self._require_life(token, left, cached)
        return IssuedToken(token, outcome, left, wall, verdict)

    async def _renew_now(
        self,
        request: TokenRequest,
        key: str,
        cached: EmbedToken,
        verdict: Verdict | None,
        timeout: float,
    ) -> IssuedToken:
        """Below the floor: mint; fall back on the old token if that fails for a passing reason."""
        if self._minter.backoff.left(key):
            return self._reused(cached, verdict)
        try:
            return await self._mint(request, key, cached, verdict, timeout)
        except errors.BrokerError as error:
            if not error.transient:
                raise
            found = await self._store.peek(request, key)  # the old one may have been revoked
            if found is None:
                raise
            reused = self._reused(found, verdict)
            if reused.left < self._policy.marks(found.lifetime).outage:
                raise
            return reused

    def _renew_ahead(self, mint: Mint) -> None:
        """Past its mark: mint the successor in the background, if that is cheap at this moment."""
        if self._minter.may_renew_ahead(mint.key):
            self.flights.start_background(mint.key, self._leading(mint))

    def _leading(self, mint: Mint) -> Lead:
        async def lead(flight: Flight[EmbedToken]) -> EmbedToken:
            return await self._minter.mint(flight, mint)

        return lead

    def _require_life(self, token: EmbedToken, left: int, cached: EmbedToken | None) -> None:
        """Raise if the answer would come too late."""
        marks = self._policy.marks(token.lifetime)
        again = cached is not None and token.body == cached.body
        if left <= 0 or left < (marks.outage if again else marks.floor):
            raise errors.UpstreamUnavailable("the token expired before it could be handed out")

    def _reused(self, token: EmbedToken, verdict: Verdict | None) -> IssuedToken:
        wall = self._clock.wall()
        left = token.left(self._clock.mono(), wall)
        return IssuedToken(token, _REUSED, left, wall, verdict)


def _mint_of(request: TokenRequest, cached: EmbedToken | None) -> Mint:
    priority = Priority.FIRST if cached is None else Priority.MANDATORY
    return Mint(request, request.key, cached, priority)
