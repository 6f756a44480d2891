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

from broker.issuers.local import LocalIssuer
from broker.minting import Mint, Minter, MintRules
from broker.model import Clock, EmbedToken
from broker.pacing.pacer import NoPacing
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

    @override
    def mint_at_once(self, mint: Mint, now: int) -> EmbedToken | Rejection | None:
        if self.backoff.left(mint.key):
            return None
        try:
            lease = self._memory.lead_at_once(mint.request, now)
            if isinstance(lease, Lease):
                return self._sign(mint, lease, now)
        except Exception:  # a defect, which is told where it is answered
            self.backoff.note_failure(mint.key)
            raise
        self._count_refresh(mint, "failed")
        return lease

    def _sign(self, mint: Mint, lease: Lease, now: int) -> EmbedToken:
        """Make the token; a lease in memory ends by itself."""
        request, wall, began = mint.request, self._clock.wall(), time.perf_counter()
        minted = self._signer.sign(request, wall)
        self._metrics.duration["minted"].observe(time.perf_counter() - began)
        token = self._ready(minted, now, wall, lease)
        self.backoff.forget(mint.key)
        self._records.record_at_once(self._session_of(request, minted, token, wall))
        if self._policy.enabled:
            self._memory.keep_at_once(request, mint.key, token, lease)
        self._count_refresh(mint, "renewed")
        return token
