"""What survives a restart, and what must not be believed."""

import asyncio
import os
import resource
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from broker.app import snapshot
from broker.app.snapshot import MAX_CLOCK_SKEW, SnapshotIgnored, Terms
from broker.limits.policy import LimitPolicy, LimitRule, Limits
from broker.model import EmbedToken, LimitName, Secret, Session, TokenRequest
from broker.rules.bucket import Limit
from broker.sessions.memory import MemorySessions
from broker.stores.memory import MemoryStore
from broker.stores.token_cache import TokenCache
from broker.testing import FakeClock

SECOND = 1_000_000
HOUR = 3600 * SECOND
MAX_AGE = 600 * SECOND
ORIGIN = "local here"
TERMS = Terms(origins=frozenset({ORIGIN}), max_age=MAX_AGE, floor=lambda _lifetime: 0)
AGENT = "A78WKV4515"


def new_key() -> Secret:
    """Make a sealing key."""
    return Secret(secrets.token_hex(32))


def limit_set(name: LimitName, burst: int, interval: int) -> LimitPolicy:
    """Make a limit without exceptions."""
    return LimitPolicy(name, LimitRule(Limit(burst=burst, interval=interval)), {})


LIMITS = Limits(
    fingerprint=limit_set(LimitName.FINGERPRINT, 5, 60 * SECOND),
    fingerprint_mints=limit_set(LimitName.FINGERPRINT_MINTS, 2, 600 * SECOND),
    agent=limit_set(LimitName.AGENT, 3, 600 * SECOND),
    client=limit_set(LimitName.CLIENT, 100, 60 * SECOND),
    max_tracked=1000,
)


def store_of(clock: FakeClock, limits: Limits = LIMITS, max_tokens: int = 1000) -> MemoryStore:
    """Build an empty store."""
    tokens = TokenCache(max_tokens, keep_until=lambda token: token.dies_mono, mono=clock.mono)
    return MemoryStore(limits, tokens, clock)


def save(
    path: Path,
    key: Secret,
    store: MemoryStore,
    clock: FakeClock,
    origin: str,
    book: MemorySessions | None = None,
) -> int:
    """Save, with sessions where a test is about them."""
    return snapshot.save(
        path,
        key,
        store,
        MemorySessions(1000, clock) if book is None else book,
        clock,
        frozenset({origin}),
    )


def load(
    path: Path,
    key: Secret,
    store: MemoryStore,
    clock: FakeClock,
    terms: Terms,
    book: MemorySessions | None = None,
) -> int:
    """Load, as above."""
    return snapshot.load(
        path, key, store, MemorySessions(1000, clock) if book is None else book, clock, terms
    )


def restarted(clock: FakeClock, down: float = 0.0) -> FakeClock:
    """Return the clock of a new process on a machine that was off meanwhile."""
    return FakeClock(mono=secrets.randbelow(10**9) + 1, wall=clock.wall() + round(down * SECOND))


def some_ask(agent: str = AGENT) -> TokenRequest:
    """Make the ask of a visitor never seen before."""
    return TokenRequest(client="web", agent=agent, fingerprint=secrets.token_hex(16))


def some_token(clock: FakeClock, lifetime: int = HOUR) -> EmbedToken:
    """Make a token whose mint begins now."""
    return EmbedToken(
        body=b'{"token": "%b"}' % secrets.token_urlsafe(200).encode(),
        dies_mono=clock.mono() + lifetime,
        dies_wall=clock.wall() + lifetime,
        lifetime=lifetime,
        mark=secrets.randbelow(lifetime),
        origin=ORIGIN,
    )


@pytest.fixture
def clock() -> FakeClock:
    """Give the process before the restart its clock."""
    return FakeClock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Name a file in a directory of its own."""
    return tmp_path / "snapshot"


def lived_in(clock: FakeClock) -> tuple[MemoryStore, TokenRequest, EmbedToken]:
    """Return a store with one token and a visitor who has used up their mints."""
    store, ask, token = store_of(clock), some_ask(), some_token(clock)

    async def live() -> None:
        store.tokens[ask.key] = token
        await store.admit(ask, ask.key)
        while store.charge_mint(ask) is None:
            pass

    asyncio.run(live())
    return store, ask, token


def assert_ignored(path: Path, key: Secret, clock: FakeClock, reason: str) -> None:
    """Loading says why not, restores nothing at all, and removes the file if it was ours."""
    foreign = path.exists() and not path.read_bytes().startswith(snapshot._MAGIC)
    store = store_of(clock)
    with pytest.raises(SnapshotIgnored, match=reason) as ignored:
        load(path, key, store, clock, TERMS)
    assert ignored.value.__cause__ is None
    assert len(store.tokens) == 0
    assert [len(bucket) for bucket in store.buckets.values()] == [0] * 4
    assert list(path.parent.iterdir()) == ([path] if foreign else [])


# --- what comes back


async def test_the_same_tokens_are_found_after_a_restart(clock: FakeClock, path: Path) -> None:
    """Byte for byte, with the mark once drawn and the life that is really left."""
    store, key, asks = store_of(clock), new_key(), [some_ask() for _ in range(50)]
    kept = {ask.key: some_token(clock, (n + 1) * 60 * SECOND) for n, ask in enumerate(asks)}
    for name, token in kept.items():
        store.tokens[name] = token
    clock.advance(30)
    assert save(path, key, store, clock, ORIGIN) == 50
    after = restarted(clock, down=45)
    new = store_of(after)
    assert load(path, key, new, after, TERMS) == 49
    assert new.tokens.find(asks[0].key) is None
    for ask in asks[1:]:
        left = kept[ask.key].lifetime - 75 * SECOND
        assert new.tokens.find(ask.key) == msgspec.structs.replace(
            kept[ask.key], dies_mono=after.mono() + left, dies_wall=after.wall() + left
        )


async def test_exhausted_buckets_stay_exhausted(clock: FakeClock, path: Path) -> None:
    """Of every limit; the time the broker was down counts as waiting, to the microsecond."""
    store, key, ask = store_of(clock), new_key(), some_ask()
    other = some_ask(agent="another")
    for _ in range(5):
        assert (await store.admit(ask, ask.key)).denial is None
    while store.charge_mint(ask) is None:
        pass
    while store.charge_mint(some_ask()) is None:
        pass
    save(path, key, store, clock, ORIGIN)
    after = restarted(clock, down=59.999_999)
    new = store_of(after)
    load(path, key, new, after, TERMS)
    denial = (await new.admit(ask, ask.key)).denial
    assert denial is not None
    assert (denial.limit, denial.verdict.retry_after) == (LimitName.FINGERPRINT, 1)
    after.advance(0.000_001)
    assert (await new.admit(ask, ask.key)).denial is None
    mints, agent = new.charge_mint(ask), new.charge_mint(some_ask())
    assert mints is not None
    assert (mints.limit, mints.verdict.retry_after) == (
        LimitName.FINGERPRINT_MINTS,
        540 * SECOND,
    )
    assert agent is not None
    assert (agent.limit, agent.verdict.retry_after) == (LimitName.AGENT, 540 * SECOND)
    assert new.charge_mint(other) is None


async def test_half_spent_buckets_and_strangers_come_back_as_they_were(
    clock: FakeClock, path: Path
) -> None:
    """Two of five spent: three are left; who was never seen has all; a full bucket is not saved."""
    store, key, ask = store_of(clock), new_key(), some_ask()
    for _ in range(2):
        await store.admit(ask, ask.key)
    save(path, key, store, clock, ORIGIN)
    after = restarted(clock)
    new = store_of(after)
    load(path, key, new, after, TERMS)
    verdicts = [(await new.admit(who, who.key)).verdict for who in (ask, some_ask())]
    assert [verdict and verdict.remaining for verdict in verdicts] == [2, 4]
    full = restarted(clock, down=599)
    later = store_of(full)
    save(path, key, new, after, ORIGIN)
    load(path, key, later, full, TERMS)
    assert len(later.buckets[LimitName.FINGERPRINT]) == 0


def test_T5_a_token_is_restored_by_the_clock_that_leaves_less(clock: FakeClock, path: Path) -> None:
    """The machine slept for half an hour: only the wall clock knows, and the snapshot with it."""
    store, ask, _ = lived_in(clock)
    clock.step_wall(1800)
    key = new_key()
    save(path, key, store, clock, ORIGIN)
    after = restarted(clock)
    new = store_of(after)
    load(path, key, new, after, TERMS)
    token = new.tokens.find(ask.key)
    assert token is not None
    assert token.left(after.mono(), after.wall()) == HOUR - 1800 * SECOND


def test_T5_a_wall_clock_set_back_meanwhile_gives_no_token_more_than_its_life(
    clock: FakeClock, path: Path
) -> None:
    """Within the allowed skew the snapshot counts as written this moment, not in the future."""
    store, ask, token = lived_in(clock)
    key = new_key()
    save(path, key, store, clock, ORIGIN)
    after = restarted(clock, down=-MAX_CLOCK_SKEW / SECOND)
    new = store_of(after)
    assert load(path, key, new, after, TERMS) == 1
    restored = new.tokens.find(ask.key)
    assert restored is not None
    assert restored.left(after.mono(), after.wall()) == token.lifetime


async def test_more_tokens_than_fit_are_restored_up_to_the_bound(
    clock: FakeClock, path: Path
) -> None:
    """`max_tokens` was lowered: memory obeys the new bound."""
    store, key = store_of(clock), new_key()
    for _ in range(20):
        store.tokens[some_ask().key] = some_token(clock)
    save(path, key, store, clock, ORIGIN)
    after = restarted(clock)
    new = store_of(after, max_tokens=8)
    assert load(path, key, new, after, TERMS) == 8


async def test_an_empty_store_makes_a_snapshot_too(clock: FakeClock, path: Path) -> None:
    """Nothing to remember is no failure."""
    key = new_key()
    assert save(path, key, store_of(clock), clock, ORIGIN) == 0
    assert load(path, key, store_of(clock), clock, TERMS) == 0


# --- what is not believed


def test_no_snapshot_is_no_failure(clock: FakeClock, path: Path) -> None:
    """The first start ever."""
    assert_ignored(path, new_key(), clock, r"^there is none$")


def test_a_snapshot_is_used_once(clock: FakeClock, path: Path) -> None:
    """The file goes when it is read: a crash later brings back nothing that was spent since."""
    store, _, _ = lived_in(clock)
    key = new_key()
    save(path, key, store, clock, ORIGIN)
    load(path, key, store_of(clock), clock, TERMS)
    assert_ignored(path, key, clock, r"^there is none$")


def test_a_tampered_snapshot_is_ignored(clock: FakeClock, path: Path) -> None:
    """Whichever byte is changed, header and nonce included."""
    store, _, _ = lived_in(clock)
    key = new_key()
    save(path, key, store, clock, ORIGIN)
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert_ignored(path, key, clock, r"^(not a snapshot of this version|damaged)")


def test_a_truncated_or_extended_snapshot_is_ignored(clock: FakeClock, path: Path) -> None:
    """A full disk, a copy that broke off, a line feed at the end."""
    store, _, _ = lived_in(clock)
    key = new_key()
    save(path, key, store, clock, ORIGIN)
    good = path.read_bytes()
    for end in range(len(good)):
        path.write_bytes(good[:end])
        assert_ignored(path, key, clock, r"^(not a snapshot of this version|damaged)")
    path.write_bytes(good + b"\n")
    assert_ignored(path, key, clock, r"^damaged, or sealed with another key$")


def test_a_foreign_snapshot_is_ignored(clock: FakeClock, path: Path) -> None:
    """Sealed with another key, or no snapshot at all."""
    store, _, _ = lived_in(clock)
    save(path, new_key(), store, clock, ORIGIN)
    assert_ignored(path, new_key(), clock, r"^damaged, or sealed with another key$")
    path.write_bytes(secrets.token_bytes(500))
    assert_ignored(path, new_key(), clock, r"^not a snapshot of this version$")
    path.write_bytes(b"")
    assert_ignored(path, new_key(), clock, r"^not a snapshot of this version$")


@pytest.mark.parametrize(
    ("down", "reason"),
    [
        (MAX_AGE / SECOND + 0.000_001, r"^written 600 s ago: store.snapshot_max_age$"),
        (86_400, r"^written 86400 s ago: store.snapshot_max_age$"),
        (-MAX_CLOCK_SKEW / SECOND - 0.000_001, r"^written -61 s ago: store.snapshot_max_age$"),
        (-86_400, r"^written -86400 s ago: store.snapshot_max_age$"),
    ],
)
def test_a_snapshot_that_is_old_or_from_the_future_is_ignored(
    clock: FakeClock, path: Path, down: float, reason: str
) -> None:
    """A microsecond over the age or the skew that is allowed, or a day."""
    store, _, _ = lived_in(clock)
    key = new_key()
    save(path, key, store, clock, ORIGIN)
    assert_ignored(path, key, restarted(clock, down), reason)


@pytest.mark.parametrize("down", [MAX_AGE / SECOND, 0.0, -MAX_CLOCK_SKEW / SECOND])
def test_a_snapshot_at_the_edge_of_its_age_is_used(
    clock: FakeClock, path: Path, down: float
) -> None:
    """Exactly the age that is allowed, and exactly the skew."""
    store, ask, _ = lived_in(clock)
    key = new_key()
    save(path, key, store, clock, ORIGIN)
    after = restarted(clock, down)
    new = store_of(after)
    assert load(path, key, new, after, TERMS) == 1
    denial = new.charge_mint(ask)
    assert (denial is None) == (down == MAX_AGE / SECOND)


def test_something_that_is_not_a_file_is_ignored(clock: FakeClock, path: Path) -> None:
    """A directory in its place is named as the reason, without a path in it."""
    path.mkdir()
    with pytest.raises(SnapshotIgnored, match=r"^cannot be read: a directory; name a file in it$"):
        load(path, new_key(), store_of(clock), clock, TERMS)


# --- the file


def test_G7_a_snapshot_tells_nothing_to_who_finds_it(clock: FakeClock, path: Path) -> None:
    """Neither token nor fingerprint nor agent can be read; equal stores make unequal files."""
    store, ask, token = lived_in(clock)
    key = new_key()
    save(path, key, store, clock, ORIGIN)
    raw = path.read_bytes()
    for text in (ask.fingerprint.encode(), AGENT.encode(), token.body[11:30]):
        assert text not in raw
    save(path, key, store, clock, ORIGIN)
    assert path.read_bytes() != raw


@pytest.fixture
def careless_umask() -> Iterator[None]:
    """Let files be made for everybody."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("careless_umask")
def test_only_the_owner_can_read_a_snapshot(clock: FakeClock, path: Path) -> None:
    """Mode 0600 under any umask, also where a file with another mode was."""
    store, _, _ = lived_in(clock)
    path.write_bytes(b"old")
    path.chmod(0o666)
    save(path, new_key(), store, clock, ORIGIN)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_snapshot_is_replaced_and_never_overwritten(clock: FakeClock, path: Path) -> None:
    """Who has the old one open still reads all of it; no other file is left behind."""
    store, _, _ = lived_in(clock)
    key = new_key()
    save(path, key, store, clock, ORIGIN)
    before = path.read_bytes()
    with path.open("rb") as reader:
        save(path, key, store, clock, ORIGIN)
        assert reader.read() == before
    assert path.read_bytes() != before
    assert list(path.parent.iterdir()) == [path]


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow over a hundred bytes.

    No fixture: pytest writes its progress before fixtures end, and that may be a file, too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_the_old_snapshot(clock: FakeClock, path: Path) -> None:
    """The disk fills half-way: the error is raised, the old file is whole, no half one is left."""
    store, ask, _ = lived_in(clock)
    key = new_key()
    save(path, key, store, clock, ORIGIN)
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match="too large"):
        save(path, key, store, clock, ORIGIN)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == before
    new = store_of(clock)
    assert load(path, key, new, clock, TERMS) == 1
    assert new.tokens.find(ask.key) is not None


def test_G3_a_floor_raised_over_a_restart_holds_for_restored_tokens(
    clock: FakeClock, path: Path
) -> None:
    """Their mark is lifted to it, so the next access below the new floor mints."""
    key, (store, ask, token) = new_key(), lived_in(clock)
    save(path, key, store, clock, ORIGIN)
    new = store_of(clock)
    raised = msgspec.structs.replace(TERMS, floor=lambda lifetime: lifetime - 1)
    load(path, key, new, clock, raised)
    found = new.tokens.find(ask.key)
    assert found is not None
    assert found.mark == token.lifetime - 1


def test_the_tokens_of_another_issuer_do_not_come_back(clock: FakeClock, path: Path) -> None:
    """Nor those of a key that was taken out: verifiers would refuse them for an hour."""
    key, (store, _, _) = new_key(), lived_in(clock)
    save(path, key, store, clock, "local elsewhere")
    assert_ignored(path, key, clock, r"^of another issuer")


def test_N20_each_token_comes_back_with_the_key_that_signed_it(
    clock: FakeClock, path: Path
) -> None:
    """Of two keys one is taken out: its tokens stay out, what else there was comes back."""
    key, (store, ask, token) = new_key(), lived_in(clock)
    other = some_ask()
    store.tokens[other.key] = msgspec.structs.replace(token, origin="local dropped")
    book = MemorySessions(1000, clock)
    book.restore([], {"ended": "web"})
    both = frozenset({ORIGIN, "local dropped"})
    assert snapshot.save(path, key, store, book, clock, both) == 2
    new, new_book = store_of(clock), MemorySessions(1000, clock)
    assert load(path, key, new, clock, TERMS, new_book) == 1
    assert new.tokens.find(ask.key) == token
    assert new.tokens.find(other.key) is None
    assert new_book.marks == {"ended": "web"}
    assert new.charge_mint(ask) is not None, "the bucket is as exhausted as before"


def test_N20_a_token_of_a_dropped_key_is_not_even_saved(clock: FakeClock, path: Path) -> None:
    """Held by accident, for an issuer that no longer stands behind it."""
    key, (store, _, token) = new_key(), lived_in(clock)
    store.tokens[some_ask().key] = msgspec.structs.replace(token, origin="local dropped")
    store.tokens[some_ask().key] = msgspec.structs.replace(token, origin="")
    assert save(path, key, store, clock, ORIGIN) == 1


def test_G9_no_token_of_an_ended_visitor_is_held_after_a_restart(
    clock: FakeClock, path: Path
) -> None:
    """What was held for them at the moment of the end is not sealed; a stranger's is."""
    key, (store, ask, token) = new_key(), lived_in(clock)
    other = some_ask()
    store.tokens[other.key] = token
    asyncio.run(store.revoke_visitor(ask.client, ask.fingerprint))
    assert save(path, key, store, clock, ORIGIN) == 1
    new = store_of(clock)
    assert load(path, key, new, clock, TERMS) == 1
    assert new.tokens.find(ask.key) is None
    assert new.tokens.find(other.key) is not None


def test_G9_what_was_ended_stays_ended(path: Path, clock: FakeClock) -> None:
    """A restart brings back the sessions that live, and none that was ended or has expired."""
    key, book = new_key(), MemorySessions(1000, clock)
    wall = clock.wall() // SECOND

    def session(name: str, life: int, digest: bytes = b"") -> Session:
        return Session(name, "web", AGENT, "beef", "", wall, wall + life, digest)

    async def before() -> None:
        for one in (session("a", 3600), session("b", 3600, b"B" * 32), session("c", 30)):
            await book.record(one)
        await book.mark(session("a", 3600), by_client=True)
        await book.forget(session("a", 3600))

    asyncio.run(before())
    save(path, key, store_of(clock), clock, ORIGIN, book)
    after = restarted(clock, 60)
    new = MemorySessions(1000, after)
    load(path, key, store_of(after), after, TERMS, new)

    async def then() -> None:
        assert await new.ended("a")
        assert not await new.ended("b")
        assert [await new.find(name) for name in "abc"] == [
            None,
            session("b", 3600, b"B" * 32),
            None,
        ]
        assert await new.find_token(b"B" * 32) == session("b", 3600, b"B" * 32)

    asyncio.run(then())
