"""What a mint is where nothing of it waits: tokens signed here, for a store in memory.

    lead: meet the limits on mints -> sign -> record the session -> cache the token

The same steps as in `minting`, in the same order, by plain calls.  Nobody can join a mint that is
over before anybody else runs, so it needs no flight; a key that backs off, and a renewal in the
background, take the other way.
"""

import random
import time
from collections.abc import Callable

from typing_extensions import override

from broker.issuers.local import LIFETIME, LocalIssuer
from broker.minting import Minter, MintRules
from broker.model import Clock, EmbedToken, Minted, TokenRequest
from broker.pacing.pacer import NoPacing
from broker.rules import reuse
from broker.sessions.memory import MemorySessions
from broker.stores.base import Lease, Rejection
from broker.stores.memory import MemoryStore
from broker.telemetry.metrics import MintMetrics


class LocalMinter(Minter):
    """Makes mints that wait for nothing."""

    def __init__(
        self,
        store: MemoryStore,
        sessions: MemorySessions,
        issuer: LocalIssuer,
        rules: MintRules,
        clock: Clock,
        metrics: MintMetrics,
        draw: Callable[[], float] = random.random,
    ) -> None:
        super().__init__(store, sessions, issuer, NoPacing(), rules, clock, metrics, draw)
        self._memory = store
        self._records = sessions
        self._signer = issuer
        self._note_signed = metrics.duration["minted"].observe
        self._nearest, self._window = reuse.renewal_window(rules.reuse.marks(LIFETIME))

    @override
    def mint_at_once(
        self, request: TokenRequest, cached: EmbedToken | None, now: int
    ) -> tuple[EmbedToken, Minted] | Rejection | None:
        some_failed = now < self.backoff.forgotten_at
        if some_failed and self.backoff.left(request.key):
            return None
        try:
            lease = self._memory.lead_at_once(request, now)
            made = self._sign(request, lease, now) if isinstance(lease, Lease) else lease
        except Exception:  # a defect, which is told where it is answered
            self.backoff.note_failure(request.key)
            raise
        is_made = not isinstance(made, Rejection)
        if some_failed and is_made:
            self.backoff.forget(request.key)
        if cached is not None:  # and not handed out: `fresh` was asked for
            self._metrics.refreshes["fresh", "renewed" if is_made else "failed"].inc()
        return made

    def _sign(self, request: TokenRequest, lease: Lease, now: int) -> tuple[EmbedToken, Minted]:
        """Make the token, which lives from now on; a lease in memory ends by itself."""
        wall, began = self._clock.wall(), time.perf_counter()
        minted = self._signer.sign(request, wall)
        self._note_signed(time.perf_counter() - began)
        token = EmbedToken(
            minted.body,
            now + LIFETIME,
            wall + LIFETIME,
            LIFETIME,
            self._nearest + int(self._draw() * self._window),
            lease.fence,
            lease.epoch,
            minted.origin,
        )
        self._records.record_at_once(self._session_of(request, minted, token, wall))
        if self._policy.enabled:
            self._memory.keep_at_once(request, request.key, token, now)
        return token, minted
