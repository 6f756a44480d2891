"""S6: the same random trace, decided by rules in Python and by the scripts in a server.

The model below is written from what the scripts' heads promise and from `rules.bucket`, not from
their code; every reply must equal the model's, number for number.  Time is an argument of each step
(as in `replica`), so the trace may let it stand still, step back or jump.  A second trace goes by
the server's own clock, which each reply tells: there keys really end, and a key that ended must
mean what an absent one means.
"""

import random
import re
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self

from foreign import FOREIGN
from msgspec import Struct
from msgspec.structs import replace
from replica import at_given_time
from servers import StoreServer

from broker.rules.bucket import Limit, spend
from broker.valkey.client.resp import Reader
from broker.valkey.client.scripts import Script, command

SECOND = 1_000_000
START = 1_790_000_000_000_000
LEASE, MEMORY = 3 * SECOND, 120 * SECOND
BATCH = 500
"""Steps that are sent together."""

LIMITS = [
    Limit(burst=1, interval=1),
    Limit(burst=1, interval=900),
    Limit(burst=3, interval=333_334),
    Limit(burst=20, interval=SECOND),
    Limit(burst=7, interval=86_400 * SECOND),
    Limit(burst=2**31 - 1, interval=7),
]

GAPS = [0, 0, 0, 1, 2, 500, 333_333, 333_334, SECOND, 3 * SECOND, 60 * SECOND, 86_400 * SECOND]

Reply = Any
Step = tuple[Script | None, list[bytes], list[bytes], Reply]
"""A script, its keys and arguments, and what the model replies.

Without a script: the arguments are a command of somebody who writes what none of ours would."""

FAR = 10**30
"""What counts for a moment that none of ours wrote: it is cut to the furthest that can be."""


class Lease(Struct):
    """What the model knows of a lease."""

    fence: int
    holder: str = ""
    ends: int = 0
    error: bytes = b""
    waiters: dict[str, None] = {}


class Token(Struct, frozen=True):
    """What the model knows of a token."""

    version: int
    dies: int
    epoch: int
    sealed: bytes


class Model:
    """All that the scripts of visitors and agents decide, in Python."""

    def __init__(self) -> None:
        self.buckets: dict[str, int] = {}
        self.tokens: dict[str, Token] = {}
        self.epochs: dict[str, int | None] = {}
        self.leases: dict[str, Lease] = {}

    def spend(self, bucket: str, limit: Limit, carried: int, now: int) -> tuple[bool, int]:
        """Charge a bucket; returns whether it is allowed, and the wait until full."""
        full_at = max(self.buckets.get(bucket, 0), now + carried)
        self.buckets[bucket], verdict = spend(full_at, limit, now)
        return verdict.allowed, verdict.full_in

    def spoil(self, draw: random.Random, visitor: str) -> list[bytes] | None:
        """Let somebody write over a number of this visitor; returns the command, if there is one.

        What is no number of ours counts as an exhausted bucket, an epoch that no token has, no
        token, no fence, and a lease that has just begun.
        """
        written = draw.choice(FOREIGN).encode("latin-1")
        bucket, epoch = f"{visitor}bshared", f"{visitor}e"
        token, lease = f"{visitor}t{draw.randrange(2)}", f"{visitor}l{draw.randrange(2)}"
        match draw.choice(["bucket", "epoch", "version", "dies", "of", "fence", "ends"]):
            case "bucket":
                self.buckets[bucket] = FAR
                return [b"SET", bucket.encode(), written]
            case "epoch":
                self.epochs[epoch] = None
                return [b"SET", epoch.encode(), written]
            case "fence" | "ends" as field if found := self.leases.get(lease):
                setattr(found, field, FAR if field == "ends" else 0)
                return [b"HSET", lease.encode(), field.encode(), written]
            case "version" | "dies" | "of" as field if known := self.tokens.get(token):
                field = "epoch" if field == "of" else field
                self.tokens[token] = replace(known, **{field: 0 if field != "epoch" else -1})
                return [b"HSET", token.encode(), field.encode(), written]
        return None

    def held(self, token: str, epoch: int | None, now: int) -> Token | None:
        """Return what may be handed out."""
        found = self.tokens.get(token)
        if found is None or not found.version or found.epoch != epoch or found.dies <= now:
            return None
        return found

    def visit(
        self, keys: list[str], limit: Limit, carried: int, charge: bool, dry: bool, known: int,
        under: int, now: int,
    ) -> Reply:  # fmt: skip
        """Decide a visit."""
        bucket, token, visitor = keys
        allowed, wait = self.spend(bucket, limit, carried, now) if charge else (True, 0)
        if not allowed and not dry:
            return [0, wait]
        epoch = self.epochs.get(visitor, 0)
        reply: list[Reply] = [int(allowed), wait, text(-1 if epoch is None else epoch)]
        if found := self.held(token, epoch, now):
            if found.version == known and epoch == under and allowed:
                return wait
            reply += [text(found.version), found.dies - now]
            if found.version != known:
                reply.append(found.sealed)
        return reply

    def lead(
        self, keys: list[str], limit: Limit, dry: bool, known: int, me: str, waited: int, now: int
    ) -> Reply:
        """Decide who leads."""
        bucket, token, visitor, name = keys
        epoch = self.epochs.get(visitor, 0)
        if epoch is None:
            epoch = self.epochs[visitor] = now
        found = self.held(token, epoch, now)
        if found is not None and found.version != known:
            return [b"token", text(found.version), found.dies - now, text(epoch), found.sealed]
        lease = self.leases.get(name)
        if lease is not None and lease.fence:
            if lease.error and lease.fence == waited:
                return [b"failed", lease.error]
            left = min(lease.ends - now, LEASE)
            if left > 0 and lease.holder != me:
                lease.waiters[me] = None
                lease.ends = now + left
                return [b"wait", text(lease.fence), left]
        allowed, wait = self.spend(bucket, limit, 0, now)
        if not allowed and not dry:
            return [b"denied", wait]
        before = [lease.fence if lease else 0]
        before.append(self.tokens[token].version if token in self.tokens else 0)
        fence = max(now, max(before) + 1)
        waiters = lease.waiters if lease else {}
        self.leases[name] = Lease(fence, me, now + LEASE, b"", waiters)
        return [b"lead", text(fence), text(epoch), int(allowed), wait]

    def keep(
        self, keys: list[str], fence: int, begun: int, left: int, sealed: bytes, now: int
    ) -> Reply:
        """Decide whether a token is kept."""
        token, visitor, name = keys
        epoch = self.epochs.get(visitor, 0)
        lease = self.leases.get(name)
        succeeded = lease is not None and lease.fence > fence
        waiters = [] if lease is None or succeeded else [w.encode() for w in lease.waiters]
        if not succeeded:
            self.leases.pop(name, None)
        if epoch != begun:
            return [b"ended", *waiters]
        if succeeded or (token in self.tokens and self.tokens[token].version > fence):
            return [b"superseded", *waiters]
        self.tokens[token] = Token(fence, now + left, epoch, sealed)
        return [b"kept", *waiters]

    def renew(self, name: str, fence: int, now: int) -> Reply:
        """Decide whether a lease goes on."""
        lease = self.leases.get(name)
        if lease is None or lease.fence != fence:
            return 0
        lease.ends = now + LEASE
        return 1

    def abandon(self, name: str, fence: int, error: bytes) -> Reply:
        """End a lease without a token."""
        lease = self.leases.get(name)
        if lease is None or lease.fence != fence:
            return []
        self.leases[name] = Lease(fence, error=error)
        return [waiter.encode() for waiter in lease.waiters]

    def revoke(self, keys: list[str], known: int, now: int) -> Reply:
        """End a visitor, or bring back an epoch that is known."""
        visitor, *tokens = keys
        before = self.epochs.get(visitor) or 0
        self.epochs[visitor] = max(known, before) if known else max(now, before + 1)
        for token in tokens:
            self.tokens.pop(token, None)
        return text(self.epochs[visitor] or 0)


def text(number: int) -> bytes:
    """Return how numbers that may be long come back."""
    return b"%d" % number


def steps(seed: int) -> Iterator[tuple[Step, int]]:
    """Draw steps for ever, each with its moment."""
    draw, model, now = random.Random(seed), Model(), START
    fences: dict[str, tuple[int, int]] = {}
    while True:
        now += draw.choice(GAPS)
        if draw.random() < 0.002:
            now = START + draw.randrange(2 * 86_400 * SECOND)  # the server's clock was set
        step = _step(draw, model, fences, now)
        yield step, now


def _step(  # noqa: PLR0911 - a branch a script
    draw: random.Random, model: Model, fences: dict[str, tuple[int, int]], now: int
) -> Step:
    visitor = f"{{v{draw.randrange(12)}}}"
    key = draw.randrange(2)
    place = draw.randrange(len(LIMITS))
    limit = LIMITS[place]
    if draw.random() < 0.01 and (spoiled := model.spoil(draw, visitor)):
        return None, [], spoiled, None
    bucket = f"{visitor}b{place if draw.random() < 0.9 else 'shared'}"
    token, epoch, lease = f"{visitor}t{key}", f"{visitor}e", f"{visitor}l{key}"
    numbers = [b"%d" % limit.burst, b"%d" % limit.interval]
    carried = draw.choice([0, 0, 0, draw.randrange(2 * limit.depth)])
    fence, begun = fences.get(lease, (1, 0))
    if draw.random() < 0.1:
        fence = max(fence - draw.randrange(3), 1)
    match draw.choices(range(7), [40, 10, 20, 12, 6, 6, 2])[0]:
        case 0:
            charge, dry = draw.random() < 0.8, draw.random() < 0.1
            held = model.tokens.get(token)
            known = held.version if held and draw.random() < 0.5 else 0
            arguments = [*numbers, b"%d" % carried, b"%d" % charge, b"%d" % dry]
            under = held.epoch + (draw.random() < 0.1) if held else 0
            arguments += [b"%d" % known, b"%d" % under] if known else [b"", b""]
            reply = model.visit(
                [bucket, token, epoch], limit, carried, charge, dry, known, under, now
            )
            return Script.VISIT, encoded(bucket, token, epoch), arguments, reply
        case 1:
            allowed, wait = model.spend(bucket, limit, carried, now)
            arguments = [*numbers, b"%d" % carried]
            return Script.SPEND, encoded(bucket), arguments, [int(allowed), wait]
        case 2:
            me, dry = draw.choice("ABC"), draw.random() < 0.1
            held = model.tokens.get(token)
            known = held.version if held and draw.random() < 0.6 else 0
            waited = fence if draw.random() < 0.3 else 0
            keys = [bucket, token, epoch, lease]
            reply = model.lead(keys, limit, dry, known, me, waited, now)
            if reply[0] == b"lead":
                fences[lease] = int(reply[1]), int(reply[2])
            arguments = [*numbers, b"0", b"%d" % dry, b"%d" % known if known else b"", me.encode()]
            arguments += [b"%d" % LEASE, b"%d" % waited if waited else b"", b"%d" % MEMORY]
            arguments.append(b"%d" % MEMORY)
            return Script.LEAD, encoded(*keys), arguments, reply
        case 3:
            left, sealed = draw.choice([1, 999, SECOND, 3600 * SECOND]), draw.randbytes(20)
            reply = model.keep([token, epoch, lease], fence, begun, left, sealed, now)
            arguments = [b"%d" % fence, b"%d" % begun, b"%d" % left, sealed, b"%d" % MEMORY]
            return Script.KEEP, encoded(token, epoch, lease), arguments, reply
        case 4:
            arguments = [b"%d" % fence, b"%d" % LEASE, b"%d" % MEMORY]
            return Script.RENEW, encoded(lease), arguments, model.renew(lease, fence, now)
        case 5:
            error = draw.choice([b"", b"why"])
            arguments = [b"%d" % fence, error, b"%d" % MEMORY]
            return Script.ABANDON, encoded(lease), arguments, model.abandon(lease, fence, error)
        case _:
            told = (
                (model.epochs.get(epoch) or 0) + draw.choice([-1, 0, 1])
                if draw.random() < 0.3
                else 0
            )
            known = b"%d" % told if told > 0 else b""
            keys = [epoch, token] if draw.random() < 0.5 else [epoch]
            reply = model.revoke(keys, max(told, 0), now)
            return Script.REVOKE, encoded(*keys), [b"%d" % MEMORY, known], reply


def encoded(*keys: str) -> list[bytes]:
    """Return keys as they are sent."""
    return [key.encode() for key in keys]


class Talk:
    """A plain connection: everything is written, then everything read."""

    def __init__(self, server: StoreServer) -> None:
        address = server.address
        if address.path:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(address.path)
        else:
            self._socket = socket.create_connection(address.hosts[0])
        self._reader = Reader()

    def send(self, commands: list[bytes]) -> list[Reply]:
        """Return a reply a command; an error is one, too."""
        self._socket.sendall(b"".join(commands))
        replies: list[Reply] = []
        while len(replies) < len(commands):
            reply = self._reader.take()
            if reply is False:
                self._reader.feed(self._socket.recv(1 << 20))
            else:
                replies.append(reply)
        return replies

    def load(self, source: str) -> bytes:
        """Give the server a script; returns its name."""
        (name,) = self.send([command(b"SCRIPT", b"LOAD", source.encode())])
        assert isinstance(name, bytes), name
        return name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def compare(server: StoreServer, count: int, seed: int) -> Counter[str]:
    """Run a trace of `count` steps; raises AssertionError at the first reply that differs.

    Returns how often each script gave each kind of reply.
    """
    kinds, trace = Counter[str](), steps(seed)
    with Talk(server) as talk:
        names = {script: talk.load(at_given_time(script.source)) for script in Script}
        for first in range(0, count, BATCH):
            batch = [next(trace) for _ in range(min(BATCH, count - first))]
            replies = talk.send([_packed(names, step, now) for step, now in batch])
            for (step, now), reply in zip(batch, replies, strict=True):
                assert _same(step, reply), f"after {kinds.total()} steps, at {now}: {step}, {reply}"
                kinds[f"{step[0].value} {_kind(reply)}" if step[0] else "spoiled"] += 1
    return kinds


def _packed(names: dict[Script, bytes], step: Step, now: int) -> bytes:
    script, keys, arguments, _ = step
    if script is None:
        return command(*arguments)
    return command(b"EVALSHA", names[script], b"%d" % len(keys), *keys, *arguments, b"%d" % now)


def _same(step: Step, reply: Reply) -> bool:
    script, _, _, expected = step
    if script is None:
        return not isinstance(reply, Exception)
    if script in (Script.KEEP, Script.ABANDON):
        return _same_waiters(reply, expected)
    return bool(reply == expected)


def _same_waiters(reply: Reply, expected: Reply) -> bool:
    """Waiters come in the order of the server's hash."""
    return isinstance(reply, list) and sorted(reply) == sorted(expected)


def _kind(reply: Reply) -> str:
    match reply:
        case [bytes(word), *_] if word.isalpha() and len(word) > 1:
            return word.decode()
        case [int(allowed), _, *rest]:
            return f"{'allowed' if allowed else 'denied'} {len(rest)}"
        case _:
            return "done" if reply else "nothing"


def telling_time(source: str) -> str:
    """Let a script reply what time it was by the server's clock, and what it would reply anyhow."""
    source, found = re.subn(r"^local function now_us\(\)$", "local function server_us()", source,
                            flags=re.MULTILINE)  # fmt: skip
    assert found == 1
    return f"""local server_us, NOW
local function now_us()
  NOW = NOW or server_us()
  return NOW
end
local function whole()
{source.replace("local function server_us", "function server_us", 1)}
end
local reply = whole()
return {{string.format('%.0f', now_us()), reply}}
"""


def compare_by_server_clock(server: StoreServer, count: int, seed: int) -> Counter[str]:
    """Charge buckets in real time, so that their keys end; the rule replays with the told time."""
    draw, model, kinds = random.Random(seed), Model(), Counter[str]()
    with Talk(server) as talk:
        name = talk.load(telling_time(Script.SPEND.source))
        for _ in range(0, count, 20):
            charges = [_charge(draw) for _ in range(20)]
            replies = talk.send([_packed_charge(name, *charge) for charge in charges])
            for (bucket, limit, carried), reply in zip(charges, replies, strict=True):
                assert isinstance(reply, list), reply
                now, (allowed, wait) = int(reply[0]), reply[1]
                expected = model.spend(bucket, limit, carried, now)
                assert (allowed, wait) == expected, f"{bucket} {limit} {carried} at {now}: {reply}"
                kinds["allowed" if allowed else "denied"] += 1
    return kinds


def _charge(draw: random.Random) -> tuple[str, Limit, int]:
    place = draw.randrange(len(LIMITS))
    carried = draw.choice([0, 0, 0, 0, draw.randrange(1, 2_000)])
    return f"real{draw.randrange(3)}-{place}", LIMITS[place], carried


def _packed_charge(name: bytes, bucket: str, limit: Limit, carried: int) -> bytes:
    numbers = [b"%d" % number for number in (limit.burst, limit.interval, carried)]
    return command(b"EVALSHA", name, b"1", bucket.encode(), *numbers)
