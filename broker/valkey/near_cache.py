"""What this replica has read or minted, ready to be answered, and when that counts.

It saves the transfer and the unsealing of a token, never the question: an entry counts only if the
script says, in the same breath as it counts the request, that its visitor's epoch is still that of
the token.  The version tells whether it is still the newest.  If the server has lost a token that
is held here (a restart, an eviction), this one counts, and is put back.
"""

import sys
from collections.abc import Callable

from typing_extensions import override

from broker.model import Clock, EmbedToken, TokenRequest
from broker.sealing import Seal, Sealed
from broker.stores.base import Lease
from broker.stores.epochs import KnownEnds
from broker.stores.token_cache import TokenCache
from broker.valkey.client.errors import Reason, StoreFailed, number
from broker.valkey.client.resp import Reply


class NearCache:
    """Tokens before the server.

    `origins` are those whose tokens are good; `ends` are those that are known here; `put_back`
    tells the server of a token that it has lost.
    """

    def __init__(
        self,
        cache: TokenCache,
        seal: Seal,
        clock: Clock,
        ends: KnownEnds,
        origins: Callable[[], frozenset[str]],
        put_back: Callable[[TokenRequest, str, EmbedToken], None],
    ) -> None:
        self._cache = cache
        self._seal = seal
        self._clock = clock
        self._ends = ends
        self._origins = origins
        self._put_back = put_back
        self.find_at, self.holds = cache.find_at, ends.holds  # without a call between

    def find(self, key: str) -> EmbedToken | None:
        """Return what is held under this key, whatever the server may say of it."""
        return self._cache.find(key)

    def hold(self, key: str, token: EmbedToken) -> None:
        """Hold a token that the server has, too; not if its key was dropped in that moment."""
        if token.origin in self._origins():
            self._cache[key] = token

    def sealed(self, key: str, token: EmbedToken, lease: Lease) -> bytes:
        """Return the form in which the server keeps it."""
        content = Sealed(
            token.body,
            token.dies_wall,
            token.lifetime,
            token.mark,
            token.origin,
            lease.fence,
            lease.epoch,
        )
        return self._seal.close(key, content)

    def read(
        self,
        request: TokenRequest,
        key: str,
        reply: Reply,
        cached: EmbedToken | None,
    ) -> EmbedToken | None:
        """Read what a visit said about the token."""
        if isinstance(reply, int) and cached is not None:  # as held: in force, by the server
            return cached if self._ends.holds(request.visitor, cached.epoch) else None
        match reply:
            case [_, _, epoch]:
                return self._only_here(request, key, epoch, cached)
            case [_, _, epoch, _, _]:
                return cached if self._is_in_force(request, epoch, cached) else None
            case [_, _, epoch, version, left, sealed]:
                return self.adopt(request, key, version, left, epoch, sealed)
            case _:
                raise StoreFailed(Reason.OTHER)

    def adopt(
        self,
        request: TokenRequest,
        key: str,
        version: Reply,
        left: Reply,
        epoch: Reply,
        sealed: Reply,
    ) -> EmbedToken | None:
        """Unseal a token and hold it; None for one that is not ours to give.

        Version and epoch are sealed with it: a writer of the store brings no ended token back by
        giving it another epoch.  A younger one that is held here stays, and is put back: it was
        minted here while the server was away, or lost there.
        """
        held = self._cache.find(key)
        if held is not None and self._is_younger(request, held, version, epoch):
            self._put_back(request, key, held)
            return held
        content = self._seal.open(key, sealed) if isinstance(sealed, bytes) else None
        if content is None or content.origin not in self._origins():
            return None
        if (content.version, content.epoch) != (number(version), number(epoch)):
            return None
        if not self._ends.holds(request.visitor, content.epoch):
            return None
        mono, wall = self._clock.mono(), self._clock.wall()
        remaining = min(number(left), content.lifetime)
        token = EmbedToken(
            body=content.body,
            dies_mono=mono + remaining,
            dies_wall=min(wall + remaining, content.dies_wall),
            lifetime=content.lifetime,
            mark=content.mark,
            version=content.version,
            epoch=content.epoch,
            origin=sys.intern(content.origin),  # once, not once a token
        )
        self._cache[key] = token
        return token

    def _only_here(
        self, request: TokenRequest, key: str, epoch: Reply, cached: EmbedToken | None
    ) -> EmbedToken | None:
        """The server has no token: the cached one counts if its visitor was not ended since."""
        if cached is None:
            return None
        if not self._is_in_force(request, epoch, cached):
            self._cache.discard(key)
            return None
        self._put_back(request, key, cached)
        return cached

    def _is_in_force(self, request: TokenRequest, epoch: Reply, token: EmbedToken | None) -> bool:
        """Whether its visitor was not ended since, by the server's epoch and by what is known here.

        An epoch that is older than a known end: the server has forgotten it; who mints tells it.
        """
        if token is None or token.epoch != number(epoch):
            return False
        return self._ends.holds(request.visitor, token.epoch)

    def _is_younger(
        self, request: TokenRequest, held: EmbedToken, version: Reply, epoch: Reply
    ) -> bool:
        return held.version > number(version) and self._is_in_force(request, epoch, held)

    @override
    def __repr__(self) -> str:
        return f"NearCache(held={len(self._cache)})"
