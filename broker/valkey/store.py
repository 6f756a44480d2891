"""The shared store: an engine of the Redis protocol, version 7 or later.

Everything of one visitor lies in one slot, so a visit is one script and one round trip; a leader
makes a second one to its agent's slot.  Decisions are the scripts' (`lua/`); here they are asked
for and read.  Times that come back are spans, because the server's clock is not ours.  Every method
raises StoreFailed: what happens then is `shared`'s affair.

Theory of operation.  What was read or minted here is held in `token_cache`, and counts as long as
the script says so.  Ends of visitors are the server's to know.  Those that this replica has caused
or heard of it knows, too (`ends`): while the server is away they hold here all the same, and a
server that has forgotten one is told of it before anybody mints under an older epoch.

Who leads is `leases`' affair.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping

from msgspec import Struct
from typing_extensions import override

from broker.limits.policy import LimitPolicy, Limits
from broker.model import Clock, EmbedToken, LimitName, TokenRequest, visitor_of
from broker.sealing import Seal
from broker.stores.base import Kept, Lease, Rejection, Visit
from broker.stores.epochs import ENDS_LAST, KnownEnds
from broker.stores.token_cache import TokenCache
from broker.tasks import TaskSet
from broker.telemetry.counts import BucketCounts
from broker.valkey import mint_errors
from broker.valkey.client.errors import Reason, StoreFailed, number
from broker.valkey.client.guarded import Operation, StoreClient
from broker.valkey.client.resp import Reply
from broker.valkey.client.scripts import Script, command
from broker.valkey.client.shapes import COUNTED, GET
from broker.valkey.key_names import Names, VisitorKeys, is_epoch
from broker.valkey.leases import LEASE, LEASE_MEMORY, Leases, texts
from broker.valkey.near_cache import NearCache
from broker.valkey.visits import Visits, numbers_of, verdict_of

MOST_ASKED = 1_000
"""Ends that are asked for at a time; a flood of news that nobody believes must not become one."""

_NOTHING = b""

_KEPT = {kept.value.encode(): kept for kept in Kept}

ENDED = b"ended "
"""The news that a visitor was ended, by the name of their epoch: the server tells which it is."""


class ServerAccess(Struct, frozen=True):
    """The server, what keys are called there, and the name by which this process takes leases."""

    server: StoreClient
    names: Names
    replica: str


class KnownHere(Struct, frozen=True):
    """What this process knows and the server may not, because it was away.

    `carried` tells the microseconds that a bucket was charged meanwhile; `ends` are those of
    visitors.
    """

    carried: Callable[[LimitName, str], int]
    ends: KnownEnds


class ValkeyStore:
    """Buckets, tokens and leases on a server that replicas share.

    `token_cache` holds what was read; `counts` are told of decisions; `origins` are those whose
    tokens are good.
    """

    def __init__(
        self,
        access: ServerAccess,
        seal: Seal,
        origins: Callable[[], frozenset[str]],
        token_cache: TokenCache,
        limits: Limits,
        clock: Clock,
        counts: Mapping[LimitName, BucketCounts],
        known_here: KnownHere,
    ) -> None:
        self._server = access.server
        self._names = access.names
        self._near_cache = NearCache(
            token_cache, seal, clock, known_here.ends, origins, self._put_back
        )
        self._limits = limits
        self.visits = Visits(
            access.server,
            access.names,
            self._near_cache,
            limits,
            clock,
            counts,
            known_here.carried,
        )
        self._clock = clock
        self._counts = counts
        self._replica = access.replica.encode()
        self._carried = known_here.carried
        self._ends = known_here.ends
        self._asked: set[bytes] = set()
        self.leases = Leases(access.server, access.names)
        self._tasks = TaskSet()

    def use_limits(self, limits: Limits) -> None:
        """Put other limits in force, for the next request on."""
        self._limits = self.visits.limits = limits

    async def admit(self, request: TokenRequest, key: str) -> Visit:
        """Charge what every request meets, and look for a token.

        One round trip, and one before it where clients have a limit.
        """
        limit = self._limits.client
        if limit is not None:  # a slot of its own; off by default
            rejection = await self._charge(
                limit, request.client, self._names.client(request.client)
            )
            if rejection is not None:
                return Visit(None, rejection, None)
        return await self.visits.make(request, key)

    async def charge_client(self, client: str) -> Rejection | None:
        """Charge the client's limit, where there is one."""
        limit_set = self._limits.client
        if limit_set is None:
            return None
        return await self._charge(limit_set, client, self._names.client(client))

    async def peek(self, request: TokenRequest, key: str) -> EmbedToken | None:
        """Look for a token, charging nothing."""
        return await self.visits.peek(request, key)

    async def lead(
        self, request: TokenRequest, key: str, good: Callable[[EmbedToken], bool]
    ) -> Lease | EmbedToken | Rejection:
        """Become the one who mints, or wait for whoever is; see `base.Store`."""
        names, name = self._names.visitor(request.visitor), self._names.token_name(key)
        mints = self._limits.fingerprint_mints
        rule = mints.for_agent(request.agent)
        known, waited_for = _NOTHING, _NOTHING
        while True:
            reply = await self._request_lease(request, names, name, known, waited_for)
            match reply:
                case [b"token", bytes(version), left, epoch, sealed]:
                    token = self._near_cache.adopt(request, key, version, left, epoch, sealed)
                    if token is not None and good(token):
                        return token
                    known = version
                case [b"wait", bytes(fence), left]:
                    waited_for = fence
                    await self.leases.sleep(names.lease(name), left)
                case [b"failed", bytes(error)]:
                    raise mint_errors.decode(error)
                case [b"denied", int(wait)]:
                    verdict = verdict_of(wait, rule.limit, allowed=0)
                    return Rejection(mints.name, verdict)
                case [b"lead", _, bytes(epoch), *_] if number(epoch) < self._ends.of(
                    request.visitor
                ):
                    await self._tell_end(names.epoch, self._ends.of(request.visitor))
                case [b"lead", bytes(fence), bytes(epoch), int(allowed), int(wait)]:
                    verdict = verdict_of(wait, rule.limit, allowed=allowed)
                    self._counts[mints.name].note(verdict, dry_run=rule.dry_run)
                    return await self._begin(request, key, Lease(number(fence), number(epoch)))
                case _:
                    raise StoreFailed(Reason.OTHER)

    async def keep(self, request: TokenRequest, key: str, token: EmbedToken, lease: Lease) -> Kept:
        """Hold a token for everybody; ends the lease and wakes who waits."""
        lease_name = self._names.visitor(request.visitor).lease(self._names.token_name(key))
        self.leases.drop(lease_name)
        kept = await self._write(request, key, token, lease)
        if kept is Kept.KEPT:
            self._near_cache.hold(key, token)
        return kept

    async def release(self, request: TokenRequest, key: str, lease: Lease) -> bool:
        """End a lease whose token is handed out and not held; False if its visitor was ended."""
        self.abandon(request, key, lease, None)  # apart from the question: nobody waits for it
        name = self._names.visitor(request.visitor).epoch
        epoch = await self._server.command(Operation.RELEASE, name, command(b"GET", name), GET)
        in_force = 0 if epoch is None else number(epoch)
        return lease.epoch == in_force and self._ends.holds(request.visitor, lease.epoch)

    def abandon(
        self, request: TokenRequest, key: str, lease: Lease, error: BaseException | None
    ) -> None:
        """End a lease without a token, in the background; those who wait are told `error`."""
        names, name = self._names.visitor(request.visitor), self._names.token_name(key)
        self.leases.drop(names.lease(name))
        self._tasks.start(
            self.leases.release(names.lease(name), lease.fence, mint_errors.encode(error))
        )

    async def revoke_visitor(self, client: str, fingerprint: str, *keys: str) -> None:
        """Begin a new epoch for this visitor: no token from before it is found again."""
        epoch = await revoke_visitor(self._server, self._names, client, fingerprint, keys)
        self._ends.note(self._names.visitor(visitor_of(client, fingerprint)).epoch, epoch)

    def on_message(self, news: bytes) -> None:
        """Ask the server for an end that somebody tells of: channels are open to more than we."""
        name = news.removeprefix(ENDED)
        if not news.startswith(ENDED) or not is_epoch(name) or len(self._asked) >= MOST_ASKED:
            return
        if name not in self._asked:
            self._asked.add(name)
            self._tasks.start(self._learn_end(name))

    async def close(self) -> None:
        """Wait for what is still being said to the server."""
        await self._tasks.finish()

    async def _learn_end(self, name: bytes) -> None:
        try:
            reply = await self._server.command(Operation.KEEP, name, command(b"GET", name), GET)
            if reply is not None:
                self._ends.note(name, number(reply))
        except StoreFailed:
            pass  # counted; whoever caused the end knows it, and the server
        finally:
            self._asked.discard(name)

    async def _tell_end(self, name: bytes, epoch: int) -> None:
        """Tell a server that has forgotten an end which epoch is in force."""
        _ = await self._server.run(
            Operation.KEEP, Script.REVOKE, (name,), b"%d" % ENDS_LAST, b"%d" % epoch
        )

    async def _write(
        self, request: TokenRequest, key: str, token: EmbedToken, lease: Lease
    ) -> Kept:
        names, name = self._names.visitor(request.visitor), self._names.token_name(key)
        left = token.left(self._clock.mono(), self._clock.wall())
        reply = await self._server.run(
            Operation.KEEP,
            Script.KEEP,
            (names.token(name), names.epoch, names.lease(name)),
            b"%d" % lease.fence,
            b"%d" % lease.epoch,
            b"%d" % max(left, 1),
            self._near_cache.sealed(key, token, lease),
            b"%d" % ENDS_LAST,
        )
        said_, *waiting = texts(reply) or [b""]
        kept = _KEPT.get(said_)
        if kept is None:
            raise StoreFailed(Reason.OTHER, "keep: another word")
        self.leases.wake(waiting, names.lease(name))
        return kept

    def _put_back(self, request: TokenRequest, key: str, token: EmbedToken) -> None:
        self._tasks.start(self._write_again(request, key, token))

    async def _write_again(self, request: TokenRequest, key: str, token: EmbedToken) -> None:
        with contextlib.suppress(StoreFailed):  # counted; the next visit tries again
            _ = await self._write(request, key, token, Lease(token.version, token.epoch))

    async def _request_lease(
        self,
        request: TokenRequest,
        names: VisitorKeys,
        name: bytes,
        known: bytes,
        waited_for: bytes,
    ) -> list[Reply]:
        kind = self._limits.fingerprint_mints
        rule = kind.for_agent(request.agent)
        burst, interval = numbers_of(rule.limit)
        reply = await self._server.run(
            Operation.LEAD,
            Script.LEAD,
            (
                names.bucket("mints", kind.own_bucket(request.agent)),
                names.token(name),
                names.epoch,
                names.lease(name),
            ),
            burst,
            interval,
            b"%d" % self._carried(kind.name, kind.visitor_key(request)),
            b"1" if rule.dry_run else b"0",
            known,
            self._replica,
            b"%d" % LEASE,
            waited_for,
            b"%d" % LEASE_MEMORY,
            b"%d" % ENDS_LAST,
        )
        if not isinstance(reply, list):
            raise StoreFailed(Reason.OTHER)
        return reply

    async def _begin(self, request: TokenRequest, key: str, lease: Lease) -> Lease | Rejection:
        """Meet the agent's limit, and hold on to the lease; ends it if that fails."""
        names, name = self._names.visitor(request.visitor), self._names.token_name(key)
        self.leases.hold(names.lease(name), lease.fence)
        agent = self._limits.agent
        try:
            rejection = await self._charge(
                agent, request.agent, self._names.agent(request.agent), request.agent
            )
        except BaseException:
            self.abandon(request, key, lease, None)
            raise
        if rejection is None:
            return lease
        self.abandon(request, key, lease, rejection.error())
        return rejection

    async def _charge(
        self, kind: LimitPolicy, local_key: str, name: bytes, agent: str = ""
    ) -> Rejection | None:
        """Charge a bucket that is not a visitor's."""
        rule = kind.for_agent(agent)
        burst, interval = numbers_of(rule.limit)
        carried = b"%d" % self._carried(kind.name, local_key)
        reply = await self._server.run(
            Operation.AGENT, Script.SPEND, (name,), burst, interval, carried
        )
        match reply:
            case [int(allowed), int(wait)]:
                verdict = verdict_of(wait, rule.limit, allowed=allowed)
            case _:
                raise StoreFailed(Reason.OTHER)
        self._counts[kind.name].note(verdict, dry_run=rule.dry_run)
        return None if verdict.allowed or rule.dry_run else Rejection(kind.name, verdict)

    @override
    def __repr__(self) -> str:
        return f"ValkeyStore({self.leases!r}, {self._server!r})"


async def revoke_visitor(
    server: StoreClient, names: Names, client: str, fingerprint: str, keys: Iterable[str]
) -> int:
    """Begin a new epoch for a visitor, and tell all replicas; raises StoreFailed.

    `keys` are those of tokens that are known to be theirs.  Returns the epoch.
    """
    visitor = names.visitor(visitor_of(client, fingerprint))
    tokens = [visitor.token(names.token_name(key)) for key in keys]
    reply = await server.run(
        Operation.KEEP, Script.REVOKE, (visitor.epoch, *tokens), b"%d" % ENDS_LAST, b""
    )
    news = command(b"PUBLISH", names.channel, ENDED + visitor.epoch)
    with contextlib.suppress(StoreFailed):  # counted; they ask the server with each visit anyway
        _ = await server.command(Operation.KEEP, names.channel, news, COUNTED)
    return number(reply)
