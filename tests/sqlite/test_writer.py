"""What the thread writes, in which rows, and what it does when that fails; real files."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from processes import until
from state_files import Broker, end, held, mint

from broker.errors import NotDurable, NotEnded
from broker.model import TokenRequest
from broker.sqlite.records import ENDS, MINTS, Record, SessionEnded, SessionMade
from broker.sqlite.state_file import StateFileFailed
from broker.sqlite.writer import PROBE, Writer
from broker.stores.epochs import CELLS
from broker.telemetry.labels import FileError


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    """A broker with a file, which hands tokens out before they are in it."""
    made = Broker(tmp_path / "state.db")
    made.waits = False
    return made


def failing(writer: Writer, patch: pytest.MonkeyPatch, error: Callable[[], Exception]) -> list[int]:
    """Let each commit fail; returns how many records each had."""
    tried: list[int] = []

    def write(records: Sequence[Record]) -> None:
        tried.append(len(records))
        raise error()

    patch.setattr("broker.sqlite.writer.RETRY", 0.01)
    patch.setattr(writer, "_write", write)
    return tried


def broken() -> Exception:
    """What a disk that fails does."""
    return StateFileFailed(FileError.IO, "broken")


async def test_G6_an_end_counts_as_an_end_and_a_mint_as_a_mint(broker: Broker) -> None:
    """However they come together: neither takes the room of the other, nor pushes it out."""
    request, ended = broker.new_request(), broker.new_request()
    async with broker.opened() as backend:
        writer = backend._slot.writer
        sessions = [broker.session(request) for _ in range(300)]
        end = broker.session(ended)
        for some in (sessions[:150], sessions[150:]):
            writer.add_all([SessionMade(session) for session in some])
            writer.add_end(SessionEnded(end.session_id, end.client))
        assert await writer.end_written()
        counts = writer._ledger._counts
        assert (counts[MINTS.number], counts[ENDS.number]) == (300, 2)
    async with broker.opened() as backend:
        counts = backend._slot.writer._ledger._counts
        assert (counts[MINTS.number], counts[ENDS.number]) == (300, 2)
        assert await backend.sessions.ended(end.session_id)
        assert await backend.sessions.find(sessions[-1].session_id) is not None


async def test_D1_a_retry_seals_a_part_only(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the disk fails; then everything is written, in the order of its coming."""
    broker.most = 10_000
    request = broker.new_request()
    sessions = [broker.session(request) for _ in range(3 * PROBE)]
    async with broker.opened() as backend:
        writer = backend._slot.writer
        with monkeypatch.context() as patch:
            tried = failing(writer, patch, broken)
            writer.add_all([SessionMade(session) for session in sessions])
            await until(lambda: len(tried) >= 5)
            assert max(tried[1:]) <= PROBE
            assert backend.is_degraded
            assert len(writer._pending) >= len(sessions) - PROBE, "nothing is given up"
        assert await writer.end_written()
        await until(lambda: not backend.is_degraded)
        assert writer.lost == 0
    async with broker.opened() as backend:
        for session in sessions[-100:]:
            assert await backend.sessions.find(session.session_id) == session


async def test_D1_who_waits_for_what_is_behind_the_part_is_told_when_it_is_written(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part alone makes no end durable."""
    request = broker.new_request()
    broker.most = 10_000
    async with broker.opened() as backend:
        writer = backend._slot.writer
        really = writer._write
        with monkeypatch.context() as patch:
            tried = failing(writer, patch, broken)
            writer.add_all([SessionMade(broker.session(request)) for _ in range(2 * PROBE)])
            await until(lambda: len(tried) >= 1)

            def write(records: Sequence[Record]) -> None:
                if len(records) > PROBE:
                    raise broken()
                really(records)

            patch.setattr(writer, "_write", write)
            writer.add_all([SessionMade(broker.session(request)) for _ in range(3 * PROBE)])
            with pytest.raises(NotDurable):
                await backend.store.revoke_visitor(request.client, request.fingerprint)


async def test_G6_ends_that_wait_for_a_disk_are_bounded(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without room is not made, and says so; the operator's have more; repeats take none."""
    monkeypatch.setattr("broker.sqlite.writer.WAITING_ENDS", 10)
    async with broker.opened() as backend:
        minted = [
            (request, (await mint(broker, backend, request))[1]) for request in made(broker, 9)
        ]
        writer = backend._slot.writer
        assert await writer.end_written()
        with monkeypatch.context() as patch:
            _ = failing(writer, patch, broken)
            for _ in range(3):
                for _, session in minted[:5]:
                    with pytest.raises(NotDurable):
                        await end(backend, session)
            assert writer._waiting_ends() == 10
            (request, refused), (_, operated) = minted[5:7]
            with pytest.raises(NotEnded, match="was not ended"):
                await end(backend, refused)
            assert not await backend.sessions.ended(refused.session_id)
            assert await held(backend, request) is not None
            await backend.sessions.mark(operated, by_client=False)
            assert await backend.sessions.ended(operated.session_id)
        await until(lambda: not backend.is_degraded)
        await until(lambda: writer._waiting_ends() == 0)
        await end(backend, refused)
    async with broker.opened() as backend:
        for request, session in minted[:7]:
            assert await backend.sessions.ended(session.session_id)
            assert await held(backend, request) is None or session is operated
        for request, _ in minted[7:]:
            assert await held(backend, request) is not None


def made(broker: Broker, count: int) -> list[TokenRequest]:
    """Requests of visitors whose ends are told apart in memory: cells of epochs are shared."""
    found: dict[int, TokenRequest] = {}
    while len(found) < count:
        request = broker.new_request()
        found[hash(request.visitor) % CELLS] = request
    return list(found.values())


async def test_G6_what_the_thread_has_in_hand_counts_as_waiting(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is tried: as much as fits is kept, those that came first; no end is lost."""
    sessions = [broker.session(broker.new_request()) for _ in range(50)]
    async with broker.opened() as backend:
        writer = backend._slot.writer
        writer._most = 20
        with monkeypatch.context() as patch:
            tried = failing(writer, patch, broken)
            for session in sessions:
                tried.clear()
                writer.add(SessionMade(session))
                writer.add_end(SessionEnded(session.session_id, session.client))
                await until(lambda: len(tried) > 0)
                assert len(writer._pending) + writer._in_hand <= 20 + len(sessions)
            assert writer.lost == 30
        assert await writer.end_written()
        assert writer._waiting_ends() == 0
    async with broker.opened() as backend:
        assert len(backend.sessions) == 0  # all of them were ended
        for session in sessions:
            assert await backend.sessions.ended(session.session_id)


async def test_N2_a_defect_loses_nothing_and_is_told(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is answered with 503 and pending, the broker degraded until it is written."""
    request = broker.new_request()
    async with broker.opened() as backend:
        await mint(broker, backend, request)
        writer = backend._slot.writer
        with monkeypatch.context() as patch:
            patch.setattr("broker.sqlite.writer.MOST_DEFECTS", 10**9)
            _ = failing(writer, patch, lambda: ValueError("a defect"))
            with pytest.raises(NotDurable):
                await backend.store.revoke_visitor(request.client, request.fingerprint)
            assert backend.is_degraded
            assert writer.failures[FileError.OTHER] >= 1
        await until(lambda: not backend.is_degraded)
    async with broker.opened() as backend:
        assert await held(backend, request) is None


@pytest.mark.parametrize("error", [broken, lambda: ValueError("a defect")])
async def test_D1_who_waits_is_told_when_the_state_says_so(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]
) -> None:
    """The writer's thread is slow between the two: readiness and metrics must not contradict."""
    async with broker.opened() as backend:
        writer = backend._slot.writer
        told: list[tuple[bool, bool]] = []
        tell = writer._tell

        def heard(waiting: Sequence[asyncio.Future[bool]], *, written: bool) -> None:
            if waiting:
                told.append((written, writer.is_degraded))
            tell(waiting, written=written)

        monkeypatch.setattr(writer, "_tell", heard)
        assert await writer.end_written()
        with monkeypatch.context() as patch:
            _ = failing(writer, patch, error)
            writer.add(SessionMade(broker.session(broker.new_request())))
            assert not await writer.end_written()
        assert told == [(True, False), (False, True)]


async def test_N2_what_a_defect_keeps_out_for_ever_is_given_up(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some tries, counted as lost: what comes later is written."""
    request = broker.new_request()
    async with broker.opened() as backend:
        writer = backend._slot.writer
        with monkeypatch.context() as patch:
            tried = failing(writer, patch, lambda: ValueError("a defect"))
            writer.add(SessionMade(broker.session(request)))
            writer.add_end(SessionEnded("another", "web"))
            await until(lambda: writer.lost == 2)
            assert writer._waiting_ends() == 0
            assert len(tried) >= 3
        later = broker.session(request)
        await backend.sessions.record(later)
        assert await writer.end_written()
        await until(lambda: not backend.is_degraded)
    async with broker.opened() as backend:
        assert await backend.sessions.find(later.session_id) == later


async def test_N2_an_end_that_was_given_up_is_written_when_it_is_asked_for_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told to the file once, and is not in it: that it is known here does not count."""
    request = broker.new_request()
    async with broker.opened() as backend:
        _, session = await mint(broker, backend, request)
        writer = backend._slot.writer
        assert await writer.end_written()
        with monkeypatch.context() as patch:
            _ = failing(writer, patch, lambda: ValueError("a defect"))
            with pytest.raises(NotDurable):
                await end(backend, session)
            await until(lambda: writer.lost >= 1 and writer._waiting_ends() == 0)
        await until(lambda: not backend.is_degraded)
        await end(backend, session)
    async with broker.opened() as backend:
        assert await backend.sessions.ended(session.session_id)
        assert await held(backend, request) is None


@pytest.mark.parametrize("waits", [False, True])
async def test_a_store_says_whether_it_waits(broker: Broker, *, waits: bool) -> None:
    """Who mints goes by that: what does not wait may be asked without a task."""
    broker.waits = waits
    async with broker.opened() as backend:
        assert backend.store.waits is waits


async def test_G9_what_is_ended_again_takes_no_room(broker: Broker) -> None:
    """A client that repeats itself must not push out what others have ended; a new token counts."""
    request = broker.new_request()
    async with broker.opened() as backend:
        counts = backend._slot.writer._ledger._counts
        _, session = await mint(broker, backend, request)
        for _ in range(100):
            await end(backend, session)
        assert await backend._slot.writer.end_written()
        assert counts[ENDS.number] == 2
        _, another = await mint(broker, backend, request)
        assert await held(backend, request) is not None
        await end(backend, session)
        assert await held(backend, request) is None
        assert await backend._slot.writer.end_written()
        assert counts[ENDS.number] == 3
    async with broker.opened() as backend:
        assert await held(backend, request) is None
        assert await backend.sessions.ended(session.session_id)
        assert await backend.sessions.find(another.session_id) is not None


async def test_G9_an_end_is_in_the_file_soon_and_not_in_its_log_alone(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged log is cut off without a word; damage in the file is found."""
    monkeypatch.setattr("broker.sqlite.writer.CHECKPOINT", 3600.0)
    async with broker.opened() as backend:
        writer = backend._slot.writer
        _, session = await mint(broker, backend, broker.new_request())
        await until(lambda: not writer._is_dirty and writer._checkpoint_at > 0)
        await mint(broker, backend, broker.new_request())
        await end(backend, session)
        await until(lambda: not writer._is_dirty)


async def test_the_metrics_of_the_file_say_how_it_is(broker: Broker) -> None:
    """Each failure is counted once, however often they are brought up to date in between."""
    async with broker.opened() as backend:
        counter = broker.metrics.state_file.errors[FileError.FULL]
        for failures in (2, 2, 5):
            backend._slot.writer.failures[FileError.FULL] = failures
            backend.publish()
            assert counter.value == failures
        backend._slot.writer.add_all([SessionMade(broker.session(broker.new_request()))])
        assert await backend._slot.writer.end_written()
        backend.publish()
        assert broker.metrics.state_file.bytes.value == backend._slot.writer.size > 0
