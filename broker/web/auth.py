"""Who is asking?  The server door: a client secret, never from a browser.

Secrets are compared as SHA-256 digests: the look-up by digest tells an attacker's stopwatch
nothing about the secret, and the comparison itself takes constant time.  Failures of one address
are throttled; a valid secret always passes, so nobody can lock a client out by failing for it.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from aiohttp.hdrs import AUTHORIZATION, ORIGIN
from msgspec import Struct
from multidict import CIMultiDictProxy, istr

from broker.errors import (
    AgentNotAllowed,
    Invalid,
    MissingAuth,
    RateLimited,
    SecretInBrowser,
    Unauthorized,
)
from broker.limits.buckets import BucketTable
from broker.model import LimitName
from broker.rules import bucket, forwarded
from broker.telemetry.counts import BucketCounts
from broker.web.whole_request import Request

API_SECRET = istr("api-secret")
_FORWARDED_FOR = istr("X-Forwarded-For")
_FORWARDED = istr("Forwarded")

FAILED_AUTH_LIMIT = bucket.limit(rate=30, per=60_000_000, burst=30)
"""The vendor's own figure: enough for a deploy with a wrong secret.  It spares us the work; what
stops guessing is the length of secrets, for a right guess passes even when throttled."""

MAX_TRACKED_ADDRESSES = 100_000
"""Failing addresses remembered; further ones share overflow buckets."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Client(Struct, frozen=True):
    """A client as the authenticator knows it: `agents` None means all."""

    name: str
    digest: bytes
    agents: frozenset[str] | None
    allow_origin: bool
    pass_through: bool = False

    def require_agent(self, agent: str) -> None:
        """Raise AgentNotAllowed unless this client may use the agent."""
        if self.agents is not None and agent not in self.agents:
            raise AgentNotAllowed("agent_id: this client may not use this agent; ask the operator")


class ClientAuthenticator:
    """Identifies clients."""

    def __init__(
        self,
        clients: Sequence[Client],
        trusted_proxies: Sequence[Network],
        now: int,
        counts: BucketCounts | None = None,
        section: str = "[clients]; without them it is the vendor's key",
        wanted: str = "client secret",
    ) -> None:
        self._section = section
        self._wanted = wanted
        self._trusted = tuple(trusted_proxies)
        self._is_trusted = lru_cache(maxsize=1024)(self._look_up)  # parsing takes microseconds
        self._own_origins: frozenset[str] = frozenset()
        self._on_change: list[Callable[[], None]] = []
        self.failures = BucketTable(MAX_TRACKED_ADDRESSES, FAILED_AUTH_LIMIT.depth, now, counts)
        self.use_clients(clients)

    def use_clients(self, clients: Sequence[Client]) -> None:
        """Replace all clients, from the next request on."""
        self._clients: Mapping[bytes, Client] = {c.digest: c for c in clients}
        for tell in self._on_change:
            tell()

    def when_changed(self, tell: Callable[[], None]) -> None:
        """Tell this, too, when clients are replaced: who keeps whom it has recognised."""
        self._on_change.append(tell)

    def trust_origins(self, origins: frozenset[str]) -> None:
        """Exempt these origins from the browser rule."""
        self._own_origins = origins

    def identify(self, request: Request, now: int, *, as_bearer: bool = False) -> Client:
        """Return the client whose secret the request bears; `now` is monotonic microseconds.

        `as_bearer` leaves `api-secret` aside, which is for the vendor then.

        Raises MissingAuth, Unauthorized, RateLimited (an address that keeps failing),
        SecretInBrowser, or Invalid for two secrets in one request.
        """
        headers = request.headers
        try:
            client = self.recognise(headers, as_bearer=as_bearer)
        except MissingAuth:
            self._throttle(request, now)
            raise
        if client is None:
            self._throttle(request, now)
            raise Unauthorized(
                f"unknown {self._wanted}: check it against the broker's {self._section}"
            )
        if ORIGIN in headers and not client.allow_origin:
            self._refuse_browser(headers, client.name)
        return client

    def is_valid(self, request: Request, now: int) -> bool:
        """Whether the secret is a known one; failures count as in `identify`."""
        try:
            self.identify(request, now)
        except Unauthorized:
            return False
        return True

    def recognise(
        self, headers: "CIMultiDictProxy[str]", *, as_bearer: bool = False
    ) -> Client | None:
        """Return the client of this secret, None if nobody has it."""
        secret = (bearer_of if as_bearer else secret_of)(headers, self._wanted)
        return self.holder_of(secret)

    def holder_of(self, secret: str) -> Client | None:
        """Return whose secret this is, None if it is nobody's."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        client = self._clients.get(digest)
        if client is None or not hmac.compare_digest(client.digest, digest):
            return None
        return client

    def trusts(self, peer: str | None) -> bool:
        """Whether this peer's word on what its client asked for counts.

        One on a Unix socket, which has no address, was let in by the mode of the file.
        """
        return self._is_trusted(peer)

    def _look_up(self, peer: str | None) -> bool:
        if not peer:
            return True
        address = forwarded.parse_ip(peer)
        return address is not None and self._in_trusted(address)

    def _in_trusted(self, address: forwarded.Address) -> bool:
        return any(address in network for network in self._trusted)

    def _throttle(self, request: Request, now: int) -> None:
        address = self.address_of(request.headers, request.remote)
        if address is None:
            return
        verdict = self.failures.take(address, FAILED_AUTH_LIMIT, now)
        if not verdict.allowed:
            raise RateLimited(LimitName.AUTH, verdict)

    def _refuse_browser(self, headers: "CIMultiDictProxy[str]", client: str) -> None:
        if headers.get(ORIGIN) not in self._own_origins:
            raise SecretInBrowser(
                "a client secret came with an Origin header, so from a browser: it has leaked into"
                " a page; replace it, and request tokens from your backend",
                client,
            )

    def address_of(self, headers: "CIMultiDictProxy[str]", peer: str | None) -> str | None:
        """Name whose failures are counted: an IPv4 address or an IPv6 /64.

        None if nobody can be named: a trusted proxy said "unknown", or what cannot be read.  Such
        failures are not throttled, for one stranger's would throttle all others.
        """
        address = forwarded.parse_ip(peer) if peer else None
        if not self.trusts(peer):
            return None if address is None else forwarded.subject_of(address)
        hops = forwarded.hops_from_right(
            headers.getall(_FORWARDED_FOR, ()), headers.getall(_FORWARDED, ())
        )
        return forwarded.client_subject(address, hops, is_trusted=self._in_trusted)


def secret_of(headers: "CIMultiDictProxy[str]", wanted: str = "client secret") -> str:
    """Return the secret of the request; raises MissingAuth, or Invalid for two of them.

    `wanted` is what it is called in the message.
    """
    given = headers.getall(API_SECRET, None)
    if given is None:
        return bearer_of(headers, wanted, API_SECRET)
    if len(given) > 1:
        raise Invalid("api-secret: sent twice; send the header once")
    if not given[0]:
        raise MissingAuth(f"api-secret: empty; send the {wanted}")
    return given[0]


def bearer_of(
    headers: "CIMultiDictProxy[str]", wanted: str = "client secret", name: str = "authorization"
) -> str:
    """Return the secret in `Authorization`; raises as `secret_of` does."""
    values = headers.getall(AUTHORIZATION, ())
    if len(values) > 1:
        raise Invalid("authorization: sent twice; send the header once")
    scheme, _, token = values[0].partition(" ") if values else ("", "", "")
    if scheme.lower() != "bearer" or not token.strip():
        how = "in this header" if name == API_SECRET else "here, as Bearer"
        raise MissingAuth(f"{name}: missing; send the {wanted} {how}")
    return token.strip()
