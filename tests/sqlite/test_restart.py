"""What a file gives back: what was handed out, what was ended, what was spent; real files."""

import asyncio
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from processes import until
from state_files import HOUR, Broker, a_key, copied, end, held, looked, mint, wide_limits
from structlog.testing import capture_logs

from broker.config.schema import ConfigError
from broker.limits.buckets import BucketTable
from broker.model import LimitName, TokenRequest
from broker.rules.bucket import Limit
from broker.sqlite.records import BUCKETS, BucketsSpent
from broker.sqlite.spent_buckets import SLICE, SpentBuckets
from broker.sqlite.state_file import StateFileFailed
from broker.sqlite.writer import Writer
from broker.stores.base import Kept, Lease
from broker.telemetry.labels import FileError
from broker.units import SECOND


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    """A broker with a file."""
    return Broker(tmp_path / "state.db")


async def test_G11_tokens_and_sessions_are_there_again(broker: Broker) -> None:
    """The same bytes, the life that is left, and the record."""
    request = broker.new_request()
    async with broker.opened() as backend:
        token, session = await mint(broker, backend, request)
    broker.clock.advance(600)
    async with broker.opened() as backend:
        found = await backend.store.peek(request, request.key)
        assert found is not None
        assert found.body == token.body
        assert found.left(broker.clock.mono(), broker.clock.wall()) == HOUR - 600 * SECOND
        assert found.lifetime == HOUR
        assert await backend.sessions.find(session.session_id) == session
        assert await backend.sessions.find_token(session.digest) == session


async def test_G11_a_token_is_in_the_file_before_it_is_handed_out(broker: Broker) -> None:
    """With its session, and an end before it is answered: a copy of that moment has them."""
    request, other = broker.new_request(), broker.new_request()
    async with broker.opened() as backend:
        token, session = await mint(broker, backend, request)
        minted = copied(broker.path, "minted")
        _, ended = await mint(broker, backend, other)
        await end(backend, ended)
        after = copied(broker.path, "ended")
    broker.path = minted
    async with broker.opened() as backend:
        assert await held(backend, request) == token.body
        assert await backend.sessions.find(session.session_id) == session
    broker.path = after
    async with broker.opened() as backend:
        assert await held(backend, other) is None
        assert await backend.sessions.ended(ended.session_id)


async def test_G11_an_end_is_on_the_disk_a_mint_need_not_be(broker: Broker) -> None:
    """What SQLite is told for each commit: an end outlives the machine, a mint the process."""
    async with broker.opened() as backend:
        said: list[str] = []
        backend._slot.writer._file._connection.set_trace_callback(said.append)
        _, session = await mint(broker, backend, broker.new_request())
        assert "PRAGMA synchronous = FULL" not in said
        said.clear()
        await backend.sessions.mark(session, by_client=True)
        await backend.store.revoke_visitor(session.client, session.fingerprint)
        assert "PRAGMA synchronous = FULL" in said


async def test_G11_of_a_key_the_latest_token_counts(broker: Broker) -> None:
    """A renewal stays a renewal; both sessions are on record."""
    request = broker.new_request()
    async with broker.opened() as backend:
        _, first = await mint(broker, backend, request)
        latest, second = await mint(broker, backend, request)
    async with broker.opened() as backend:
        assert await held(backend, request) == latest.body
        assert await backend.sessions.find(first.session_id) == first
        assert await backend.sessions.find(second.session_id) == second


async def test_G9_an_end_stays_an_end(broker: Broker) -> None:
    """Of the token, of the record, of what was minted before it; what came after it lives."""
    request, other = broker.new_request(), broker.new_request()
    async with broker.opened() as backend:
        _, session = await mint(broker, backend, request)
        kept, _ = await mint(broker, backend, other)
        await end(backend, session)
    async with broker.opened() as backend:
        assert await held(backend, request) is None
        assert await backend.sessions.ended(session.session_id)
        assert await backend.sessions.find(session.session_id) is None
        assert await held(backend, other) == kept.body
        again, _ = await mint(broker, backend, request)
    async with broker.opened() as backend:
        assert await held(backend, request) == again.body
        assert await backend.sessions.ended(session.session_id)


async def test_G9_an_end_ends_a_token_that_is_on_its_way_into_the_file(broker: Broker) -> None:
    """Its record is there before the end's: neither this process nor the next hands it out."""
    request = broker.new_request()
    async with broker.opened() as backend:
        lease = await backend.store.lead(request, request.key, lambda _: False)
        assert isinstance(lease, Lease)
        keeping = asyncio.ensure_future(
            backend.store.keep(request, request.key, broker.token(), lease)
        )
        await asyncio.sleep(0)
        await backend.store.revoke_visitor(request.client, request.fingerprint)
        assert await keeping is Kept.ENDED
        assert await held(backend, request) is None
    async with broker.opened() as backend:
        assert await held(backend, request) is None


async def test_N20_what_a_dropped_key_signed_stays_out(broker: Broker) -> None:
    """Also when the key was dropped while the broker was down; the others come back."""
    broker.signers = frozenset({"old", "new"})
    by_old, by_new = broker.new_request(), broker.new_request()
    async with broker.opened() as backend:
        await mint(broker, backend, by_old, origin="old")
        kept, _ = await mint(broker, backend, by_new, origin="new")
    broker.signers = frozenset({"new"})
    async with broker.opened() as backend:
        assert await held(backend, by_old) is None
        assert await held(backend, by_new) == kept.body


async def test_G3_a_floor_that_was_raised_meanwhile_holds(broker: Broker) -> None:
    """A mark that was drawn before lies below the new floor: it is raised with it."""
    request = broker.new_request()
    async with broker.opened() as backend:
        token, _ = await mint(broker, backend, request)
    broker.floor = token.mark + 7
    async with broker.opened() as backend:
        found = await backend.store.peek(request, request.key)
        assert found is not None
        assert found.mark == token.mark + 7


async def test_G6_of_more_than_fit_the_latest_come_back(broker: Broker) -> None:
    """A smaller bound after the restart: nobody is evicted for somebody older."""
    requests = [broker.new_request() for _ in range(20)]
    async with broker.opened() as backend:
        for request in requests:
            await mint(broker, backend, request)
    broker.most = 5
    async with broker.opened() as backend:
        found = [await held(backend, request) is not None for request in requests]
        assert found == [False] * 15 + [True] * 5
        assert backend.store.tokens.counts.evicted.value == 0


async def test_G6_of_more_sessions_than_fit_the_latest_come_back(broker: Broker) -> None:
    """Those that memory held before; what has expired takes nobody's place."""
    broker.most = 10
    async with broker.opened() as backend:
        lasting = [(await mint(broker, backend, broker.new_request()))[1] for _ in range(16)]
        brief = [broker.session(broker.new_request(), life=60 * SECOND) for _ in range(3)]
        for session in brief:
            await backend.sessions.record(session)
        broker.clock.advance(61)
        minted = await mint(broker, backend, broker.new_request())
        lasting.append(minted[1])
    async with broker.opened() as backend:
        found = [await backend.sessions.find(each.session_id) is not None for each in lasting]
        assert found == [False] * 7 + [True] * 10
        assert await backend.sessions.find_token(minted[1].digest) == minted[1]
        assert len(backend.sessions) == 10


async def test_G9_a_session_that_is_recorded_for_nobody_is_forgotten(broker: Broker) -> None:
    """Its visitor was ended while it was minted: no record of it comes back."""
    request = broker.new_request()
    async with broker.opened() as backend:
        session = broker.session(request)
        await backend.sessions.record(session)
        await backend.sessions.forget(session)
    async with broker.opened() as backend:
        assert await backend.sessions.find(session.session_id) is None
        assert not await backend.sessions.ended(session.session_id)


@pytest.mark.parametrize("stop", ["drain", "crash"])
async def test_V12_a_spent_bucket_stays_spent(broker: Broker, stop: str) -> None:
    """If it is more than half spent: told once a second and at the end; time goes on refilling."""
    broker.limits = wide_limits(Limit(burst=4, interval=60 * SECOND))
    spent, fresh = broker.new_request(), broker.new_request()
    async with broker.opened() as backend:
        for _ in range(4):
            await backend.store.admit(spent, spent.key)
        await backend.store.admit(fresh, fresh.key)
        if stop == "crash":
            looked(backend)
            await backend.store.revoke_visitor("nobody", "at all")  # waits for the commit
            crashed = copied(broker.path)
    if stop == "crash":
        broker.path = crashed
    broker.clock.advance(60)
    async with broker.opened() as backend:
        verdicts = [(await backend.store.admit(spent, spent.key)).rejection for _ in range(2)]
        assert verdicts[0] is None
        assert verdicts[1] is not None
        assert verdicts[1].limit is LimitName.FINGERPRINT
        again = [(await backend.store.admit(fresh, fresh.key)).rejection for _ in range(4)]
        assert again == [None] * 4, "less than half spent: full after a restart"


@pytest.mark.parametrize("most", [1, 60, 100_000])
async def test_a_spent_bucket_is_told_a_few_times_only(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """However long somebody leans on it; and what is full again leaves the file."""
    monkeypatch.setattr("broker.sqlite.spent_buckets.MOST", most)
    monkeypatch.setattr("broker.sqlite.spent_buckets.SLACK", 10)
    told = min(most, 100)
    broker.limits = wide_limits(Limit(burst=2, interval=10 * SECOND))
    requests = [broker.new_request() for _ in range(100)]
    sizes = []
    async with broker.opened() as backend:
        for _ in range(60):
            for request in requests:
                await backend.store.admit(request, request.key)
            broker.clock.advance(1)
            looked(backend)
            await backend.store.revoke_visitor("nobody", "at all")
            sizes.append(sum(len(waits) for waits in backend._spent._full_at.values()))
            assert backend._spent._written <= 3 * told + 10
        broker.clock.advance(60)
        looked(backend)
        await until(lambda: not backend._slot.writer._ledger.places_of(BUCKETS))
    assert max(sizes) == told


async def test_V12_a_full_list_of_spent_buckets_takes_others_when_they_are_full_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound of those that are told: what is full again makes room, at once."""
    monkeypatch.setattr("broker.sqlite.spent_buckets.MOST", 3)
    broker.limits = wide_limits(Limit(burst=4, interval=60 * SECOND))
    before, after = [broker.new_request() for _ in range(5)], broker.new_request()
    async with broker.opened() as backend:
        for request in before:
            for _ in range(4):
                await backend.store.admit(request, request.key)
        looked(backend)
        assert sum(map(len, backend._spent._full_at.values())) == 3
        broker.clock.advance(300)
        for _ in range(4):
            await backend.store.admit(after, after.key)
        looked(backend)
        await backend.store.revoke_visitor("nobody", "at all")  # waits for the commit
        crashed = copied(broker.path)
    broker.path = crashed
    async with broker.opened() as backend:
        assert (await backend.store.admit(after, after.key)).rejection is not None


async def test_V12_what_was_spent_while_the_disk_hung_is_told_afterwards(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noted ones are drained meanwhile, so that nothing grows, and told all at once then."""
    broker.limits = wide_limits(Limit(burst=4, interval=60 * SECOND))
    request = broker.new_request()
    async with broker.opened() as backend:
        with monkeypatch.context() as patch:
            patch.setattr(type(backend), "is_degraded", True)
            for _ in range(4):
                await backend.store.admit(request, request.key)
            looked(backend)
            assert not backend.store.buckets[LimitName.FINGERPRINT].take_spent()
        broker.clock.advance(1)
        looked(backend)
        await backend.store.revoke_visitor("nobody", "at all")  # waits for the commit
        crashed = copied(broker.path)
    broker.path = crashed
    async with broker.opened() as backend:
        assert (await backend.store.admit(request, request.key)).rejection is not None


async def test_a_round_of_spent_buckets_is_cut_into_steps(broker: Broker) -> None:
    """No step has more than its slice, in a round that tells everything anew neither."""
    table = BucketTable(10 * SLICE, 60 * SECOND, broker.clock.mono())
    told: list[BucketsSpent] = []
    spent = SpentBuckets({LimitName.FINGERPRINT: table}, broker.clock.mono, told.extend)
    table.take_spent()
    limit, rounds = Limit(burst=2, interval=30 * SECOND), 3
    for _ in range(rounds):
        for number in range(4 * SLICE):
            table.take(f"{number}", limit, broker.clock.mono())
            table.take(f"{number}", limit, broker.clock.mono())
        steps = [len(told)]
        while spent.step(can_tell=True):
            steps.append(len(told))
        grown = [after - before for before, after in pairwise(steps)]
        assert len(steps) >= 4
        assert all(each <= 1 for each in grown[:4])
        assert max(len(record.full_at) for record in told) <= SLICE
        broker.clock.advance(1)
    whole = [record for record in told if record.whole]
    assert sum(len(record.full_at) for record in whole) == 4 * SLICE


async def test_D8_a_clock_a_day_ahead_or_behind(broker: Broker) -> None:
    """Nothing lives longer than it would have; an end holds; no bucket locks anybody out."""
    broker.limits = wide_limits(Limit(burst=4, interval=60 * SECOND))
    request, ended, spent = broker.new_request(), broker.new_request(), broker.new_request()
    async with broker.opened() as backend:
        await mint(broker, backend, request)
        _, session = await mint(broker, backend, ended)
        await end(backend, session)
        for _ in range(4):
            await backend.store.admit(spent, spent.key)
    for days in (1, -1):
        broker.clock.step_wall(days * 86_400)
        async with broker.opened() as backend:
            found = await backend.store.peek(request, request.key)
            if days == 1:
                assert found is None, "as in a process whose clock is set forward"
            elif found is not None:
                left = found.left(broker.clock.mono(), broker.clock.wall())
                assert left <= HOUR
            assert await backend.sessions.ended(session.session_id)
            assert await held(backend, ended) is None
        broker.clock.step_wall(-days * 86_400)
        async with broker.opened() as backend:
            assert await backend.sessions.ended(session.session_id)


async def test_D8_a_machine_that_restarts_with_its_clock_behind(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No monotonic clock tells then: what is on record does, and a token never gains life."""
    request = broker.new_request()
    monkeypatch.setattr("broker.sqlite.backend._boot_id", lambda: "before")
    async with broker.opened() as backend:
        await mint(broker, backend, request)
        broker.clock.advance(1800)
        await mint(broker, backend, broker.new_request())
    monkeypatch.setattr("broker.sqlite.backend._boot_id", lambda: "after")
    broker.clock.step_mono(-broker.clock.mono() / SECOND + 5)
    broker.clock.step_wall(-86_400)
    async with broker.opened() as backend:
        found = await backend.store.peek(request, request.key)
        assert found is not None
        assert found.left(broker.clock.mono(), broker.clock.wall()) == HOUR - 1800 * SECOND


async def test_D7_keys_rotate_and_nothing_is_lost(broker: Broker) -> None:
    """[a] -> [b, a] -> [b] with a start after each step; then keys that nobody has seen."""
    request, (first,) = broker.new_request(), broker.keys
    second = a_key()
    async with broker.opened() as backend:
        token, _ = await mint(broker, backend, request)
    for keys in ((second, first), (second,)):
        broker.keys = keys
        async with broker.opened() as backend:
            assert await held(backend, request) == token.body
    broker.keys = (first,)
    async with broker.opened() as backend:
        assert await held(backend, request) is None, "the old key opens it no more"
        assert broker.metrics.state_file.moved_aside.value == 1
    names = [path.name for path in broker.path.parent.iterdir()]
    assert sum(name.startswith("state.db.unreadable-") for name in names) == 1


async def test_D7_keys_that_change_while_it_runs(broker: Broker) -> None:
    """A reload wraps the data key anew: at once, not at the next start."""
    request, second = broker.new_request(), a_key()
    async with broker.opened() as backend:
        token, _ = await mint(broker, backend, request)
        backend.use_keys([second])
        await backend.store.revoke_visitor("nobody", "at all")
        crashed = copied(broker.path)
    broker.path, broker.keys = crashed, (second,)
    async with broker.opened() as backend:
        assert await held(backend, request) == token.body


async def test_D7_keys_that_change_twice_while_nothing_can_be_written(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said as soon as no key of now opens the file, once; degraded until one does."""
    request, (first,), second, third = broker.new_request(), broker.keys, a_key(), a_key()
    said = "broker.state_file_keys_unwritten"
    async with broker.opened() as backend:
        token, _ = await mint(broker, backend, request)
        writer = backend._slot.writer
        with monkeypatch.context() as patch, capture_logs() as logged:
            patch.setattr("broker.sqlite.writer.RETRY", 0.01)
            patch.setattr(writer._file, "use_keys", full)
            backend.use_keys([second, first])
            await until(lambda: backend.is_degraded)
            looked(backend)
            assert said not in [event["event"] for event in logged], "the first one opens it"
            backend.use_keys([second])
            backend.use_keys([third])
            for _ in range(3):
                looked(backend)
            assert [event["event"] for event in logged].count(said) == 1
            assert backend.is_degraded
            crashed = copied(broker.path)
        await until(lambda: not backend.is_degraded)
        with capture_logs() as logged:
            looked(backend)
        assert said not in [event["event"] for event in logged]
        written = copied(broker.path, "written")
    for broker.path, key in ((crashed, first), (written, third)):
        broker.keys = (key,)
        async with broker.opened() as backend:
            assert await held(backend, request) == token.body


def full(*_arguments: object) -> None:
    """Fail as a disk without room does."""
    raise StateFileFailed(FileError.FULL, "full")


async def test_D7_keys_that_change_while_others_are_written(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last ones count, and are written next."""
    request, last = broker.new_request(), a_key()
    async with broker.opened() as backend:
        token, _ = await mint(broker, backend, request)
        writer = backend._slot.writer
        really = writer._file.use_keys

        def use_keys(wrapped: Sequence[bytes]) -> None:
            monkeypatch.setattr(writer._file, "use_keys", really)
            writer.use_keys([last])
            really(wrapped)

        monkeypatch.setattr(writer._file, "use_keys", use_keys)
        backend.use_keys([a_key()])
        await until(lambda: not writer.owes_keys)
    broker.keys = (last,)
    async with broker.opened() as backend:
        assert await held(backend, request) == token.body


async def test_G11_the_oldest_that_come_back_are_the_first_to_go(broker: Broker) -> None:
    """As they would have been without a restart."""
    broker.most = 5
    requests = [broker.new_request() for _ in range(5)]
    async with broker.opened() as backend:
        for request in requests:
            await mint(broker, backend, request)
    async with broker.opened() as backend:
        for _ in range(2):
            await mint(broker, backend, broker.new_request())
        found = [await held(backend, request) is not None for request in requests]
        assert found == [False] * 2 + [True] * 3


async def test_D8_a_clock_that_was_set_back_while_it_ran(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latest moment on record counts, wherever it stands in the file."""
    request, later = broker.new_request(), broker.new_request()
    monkeypatch.setattr("broker.sqlite.backend._boot_id", lambda: "")
    async with broker.opened() as backend:
        await mint(broker, backend, request)
        broker.clock.advance(1800)
        await mint(broker, backend, broker.new_request())
        broker.clock.step_wall(-1200)
        await mint(broker, backend, later)
    async with broker.opened() as backend:
        for each, left in ((request, 1800), (later, 2400)):
            found = await backend.store.peek(each, each.key)
            assert found is not None
            assert found.left(broker.clock.mono(), broker.clock.wall()) == left * SECOND


async def test_D7_a_sealing_key_that_is_set_later_takes_over(broker: Broker) -> None:
    """The issuer's key opens what was sealed for it; from then on the sealing key alone does."""
    request, issuer_keys = broker.new_request(), broker.keys
    async with broker.opened() as backend:
        token, _ = await mint(broker, backend, request)
    broker.keys, broker.also = (a_key(),), issuer_keys
    async with broker.opened() as backend:
        assert await held(backend, request) == token.body
    broker.keys, broker.also = issuer_keys, ()
    async with broker.opened() as backend:
        assert await held(backend, request) is None


async def test_D2_one_process_uses_a_file(broker: Broker) -> None:
    """The second one is told who has it, and disturbs nothing; afterwards it may."""
    from broker.sqlite.location import StateFileInUse, owner_of

    request = broker.new_request()
    async with broker.opened() as backend:
        token, _ = await mint(broker, backend, request)
        with pytest.raises(StateFileInUse, match=r"in use by process \d+; stop it"):
            async with broker.opened():
                pass
        assert owner_of(broker.path) is not None
        assert await held(backend, request) == token.body
    assert owner_of(broker.path) is None
    async with broker.opened() as backend:
        assert await held(backend, request) == token.body


async def test_D9_a_new_process_waits_for_the_old_one(broker: Broker) -> None:
    """And has everything that the old one wrote until its end."""
    request = broker.new_request()
    broker.timeout = 30.0
    async with broker.opened() as old:
        new = broker.made()
        opening = asyncio.ensure_future(new.open(asyncio.Event()))
        token, _ = await mint(broker, old, request)
        assert not opening.done()
    await opening
    assert await held(new, request) == token.body
    await new.close()


async def test_G6_the_file_is_bounded_and_shrinks_again(broker: Broker) -> None:
    """More mints than it may hold: the oldest go; when all is over, so does the room."""
    broker.most = 50
    broker.waits = False
    async with broker.opened() as backend:
        empty = backend._slot.writer.size
        for _ in range(40):
            for _ in range(20):
                await mint(broker, backend, broker.new_request())
            assert await backend._slot.writer.end_written()
        ledger = backend._slot.writer._ledger
        await until(lambda: ledger._counts[0] <= 200)
        # its size is told once a round of housekeeping
        await until(lambda: backend._slot.writer.size > 4 * (empty + 65_536))
        broker.clock.advance(3700)
        await until(lambda: len(ledger) == 0)
    async with broker.opened() as backend:
        await until(lambda: backend._slot.writer.size <= empty + 65_536)


async def test_a_newer_schema_is_left_alone(broker: Broker) -> None:
    """78, and the file as it was: another version may read it."""
    import sqlite3
    from contextlib import closing

    async with broker.opened():
        pass
    with closing(sqlite3.connect(broker.path)) as connection, connection:
        connection.execute("UPDATE meta SET value = 9 WHERE name = 'schema'")
        connection.execute("PRAGMA user_version = 9")
    before = broker.path.read_bytes()
    with pytest.raises(ConfigError, match="has the schema 9, and this version knows 1"):
        async with broker.opened():
            pass
    assert broker.path.read_bytes() == before


async def test_O1_nothing_of_it_can_be_read(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither token, session, fingerprint, client, agent nor key, in anything that is written.

    File, log and temporary files, deleted ones, too, are read at each statement.
    """
    connect, seen = sqlite3.connect, dict[str, set[bytes]]()

    class Watched(sqlite3.Connection):
        def __init__(self, *arguments: Any, **how: Any) -> None:
            super().__init__(*arguments, **how)
            self.set_trace_callback(lambda _statement: look(tmp_path, seen))

    monkeypatch.setattr(sqlite3, "connect", partial(connect, factory=Watched))
    client, agent, fingerprint, model, signer = (f"{it}-{secrets.token_hex(16)}" for it in "cafms")
    request = TokenRequest(client, agent, fingerprint, model)
    broker.limits, broker.signers = wide_limits(Limit(2, 3600 * SECOND)), frozenset({signer})
    async with broker.opened() as backend:
        for _ in range(2):
            await backend.store.admit(request, request.key)
        looked(backend)
        token, session = await mint(broker, backend, request, origin=signer)
        await end(backend, session)
        again, _ = await mint(broker, backend, request, origin=signer)
        look(tmp_path, seen)
    async with broker.opened() as backend:
        assert await held(backend, request) == again.body
        assert (await backend.store.admit(request, request.key)).rejection is not None
        look(tmp_path, seen)
    assert {"state.db", "state.db-wal", "state.db.new"} <= set(seen)
    written = b"".join(content for contents in seen.values() for content in contents)
    key = backend._slot.writer._data_key
    bodies = [token.body, again.body, session.digest]
    names = [client, agent, fingerprint, model, session.session_id, signer]
    names += [each.reveal() for each in (key, *broker.keys)]
    for canary in bodies + [name.encode() for name in names]:
        assert canary not in written
    assert broker.path.stat().st_mode & 0o777 == 0o600


def look(folder: Path, seen: dict[str, set[bytes]]) -> None:
    """Read what is in a folder, and SQLite's temporary files, which have no name any more."""
    for handle in (*Path("/proc/self/fd").iterdir(), *folder.iterdir()):
        with suppress(FileNotFoundError):  # it was closed, or taken away, meanwhile
            path = handle.readlink() if handle.is_symlink() else handle
            if path.parent == folder or path.name.startswith("etilqs_"):
                seen.setdefault(path.name, set()).add(handle.read_bytes())


async def test_G6_what_waits_for_a_disk_that_hangs_is_bounded(broker: Broker) -> None:
    """Tokens and sessions beyond the bound are lost to the file, counted; no end is."""
    broker.waits = False
    async with broker.opened() as backend:
        writer = backend._slot.writer
        writer._most = 10
        with hanging(writer):
            for _ in range(30):
                await mint(broker, backend, broker.new_request())
            ended = broker.session(broker.new_request())
            await backend.sessions.mark(ended, by_client=True)
            assert len(writer._pending) <= 10 + 1
            assert writer.lost >= 60 - 10 - 2
    async with broker.opened() as backend:
        assert await backend.sessions.ended(ended.session_id)


@contextmanager
def hanging(writer: Writer) -> Iterator[None]:
    """Keep the thread from writing: it waits for a lock, as for a disk."""
    really, held = writer._file.append, threading.Lock()

    def append(*arguments: Any, **how: Any) -> None:
        with held:
            really(*arguments, **how)

    with pytest.MonkeyPatch.context() as patch, held:
        patch.setattr(writer._file, "append", append)
        yield
