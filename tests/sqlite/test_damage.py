"""D4: a file that is cut or flipped opens with all but its tail, or is moved aside; never worse."""

import random
import shutil
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from state_files import Broker, end, held, mint

from broker.config.schema import ConfigError
from broker.model import TokenRequest
from broker.sqlite.location import NEW

CUTS = FLIPS = 200
"""Of random places; a minute, so they are run with what takes longer."""
HEADER = 100
"""Bytes of SQLite's header: each of them is flipped."""


async def test_D4_a_process_without_memory_moves_no_good_file_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not start; with memory it does, and has everything."""
    broker = Broker(tmp_path / "state.db")
    request = broker.new_request()
    async with broker.opened() as backend:
        token, session = await mint(broker, backend, request)
        _, ended = await mint(broker, backend, broker.new_request())
        await end(backend, ended)

    class Short(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if statement.startswith("SELECT id"):
                raise MemoryError  # what the module says for SQLITE_NOMEM
            return super().execute(statement, *values)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Short))
        with pytest.raises(ConfigError, match="out of memory"):
            async with broker.opened():
                pass
    assert broker.metrics.state_file.moved_aside.value == 0
    async with broker.opened() as backend:
        assert await held(backend, request) == token.body
        assert await backend.sessions.find(session.session_id) == session
        assert await backend.sessions.ended(ended.session_id)


class Written:
    """A file as a kill leaves it, and what was answered before."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.history: list[tuple[TokenRequest, bytes]] = []
        self.ended: list[TokenRequest] = []
        self.path = broker.path

    async def write(self, visitors: int) -> "Written":
        """Mint for visitors, and end some of them in between."""
        async with self.broker.opened() as backend:
            for number in range(visitors):
                request = self.broker.new_request()
                token, session = await mint(self.broker, backend, request)
                self.history.append((request, token.body))
                if number % 10 == 5:
                    await end(backend, session)
                    self.ended.append(request)
            self.copy_to(self.path.with_name("killed.db"))
        return self

    def copy_to(self, target: Path) -> None:
        """Copy the file and its log."""
        for name in ("", "-wal"):
            source = self.path.with_name(self.path.name + name)
            target.with_name(target.name + name).unlink(missing_ok=True)
            if source.exists():
                shutil.copyfile(source, target.with_name(target.name + name))

    async def judge(self, path: Path) -> tuple[bool, int]:
        """Open a damaged copy; returns whether it was moved aside, and how many tokens it gave."""
        self.broker.path = path
        async with self.broker.opened() as backend:
            found = [await held(backend, request) for request, _ in self.history]
            moved = bool(self.broker.metrics.state_file.moved_aside.value)
            assert len(list(path.parent.glob(f"{path.name}.*-2*"))) == (1 + _has_wal(path)) * moved
            for (_, body), given in zip(self.history, found, strict=True):
                assert given in (body, None), "of somebody else"
            again, _ = await mint(self.broker, backend, self.history[0][0])
            assert await held(backend, self.history[0][0]) == again.body
        return moved, sum(given is not None for given in found)


def _has_wal(path: Path) -> bool:
    return any(each.name.endswith("-wal") for each in path.parent.glob(f"{path.name}.*-2*"))


@pytest.fixture
async def written(tmp_path: Path) -> Written:
    """A hundred tokens, ten ends; most of it is in the log."""
    return await Written(Broker(tmp_path / "state.db")).write(100)


@pytest.mark.parts
async def test_D4_the_log_cut_at_any_length(written: Written, tmp_path: Path) -> None:
    """All but the tail: what is missing was written after what is there."""
    killed = tmp_path / "killed.db"
    size = killed.with_name("killed.db-wal").stat().st_size
    for number in range(CUTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        written.path = killed
        written.copy_to(folder / "state.db")
        with (folder / "state.db-wal").open("r+b") as wal:
            wal.truncate(random.randrange(size + 1))
        written.broker.path = folder / "state.db"
        async with written.broker.opened() as backend:
            assert written.broker.metrics.state_file.moved_aside.value == 0
            live = [
                await held(backend, request) == body
                for request, body in written.history
                if request not in written.ended
            ]
        assert live == sorted(live, reverse=True), "a prefix of the history"
        shutil.rmtree(folder)


@pytest.mark.parts
@pytest.mark.parametrize("what", ["file", "log", "header"])
async def test_D4_any_single_byte_flipped(written: Written, tmp_path: Path, what: str) -> None:
    """In the file, in its header, in its log: opened or moved aside; the broker works."""
    source = written.path if what != "log" else tmp_path / "killed.db"
    name = "state.db-wal" if what == "log" else "state.db"
    content = source.with_name(source.name + name.removeprefix("state.db")).read_bytes()
    used = [at for at, byte in enumerate(content) if byte]  # half of a page may be free
    aside = whole = 0
    for number in range(HEADER if what == "header" else FLIPS):
        folder = tmp_path / f"{what}{number}"
        folder.mkdir()
        written.path = source
        written.copy_to(folder / "state.db")
        raw = bytearray((folder / name).read_bytes())
        place = number if what == "header" else random.choice(used)
        raw[place] ^= 1 << random.randrange(8)
        (folder / name).write_bytes(raw)
        moved, found = await written.judge(folder / "state.db")
        aside += moved
        whole += found == len(written.history) - len(written.ended)
        shutil.rmtree(folder)
    if what == "log":
        assert aside == 0, "its own checksums cut it"
    else:
        assert aside > 0
    if what == "file":
        assert aside > whole, "most bytes are of sealed rows"


async def test_D4_a_row_of_another_place_does_not_open(written: Written) -> None:
    """Two rows that change places, as who can write the file may do: moved aside as a whole."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(written.path)) as connection, connection:
        connection.execute("UPDATE embed_token_broker_log SET id = -1 WHERE id = 1")
        connection.execute("UPDATE embed_token_broker_log SET id = 1 WHERE id = 2")
        connection.execute("UPDATE embed_token_broker_log SET id = 2 WHERE id = -1")
    assert await written.judge(written.path) == (True, 0)


@pytest.mark.parametrize("size", [0, 1, 15, 100, 4095, 4096, 8192])
async def test_D4_the_file_cut(written: Written, size: int) -> None:
    """Without a log: nothing at all is a new one, everything else is moved aside or refused."""
    from broker.config.schema import ConfigError

    with written.path.open("r+b") as file:
        file.truncate(size)
    if 0 < size < 72:
        with pytest.raises(ConfigError, match="is not a state file of the broker"):
            await written.judge(written.path)
        assert written.path.stat().st_size == size
    else:
        assert await written.judge(written.path) == (size > 0, 0)


async def test_D4_a_log_that_is_left_without_its_file_is_not_taken_for_its_successor_s(
    tmp_path: Path,
) -> None:
    """It is another file's: SQLite would play it back into the new one."""
    broker = Broker(tmp_path / "state.db")
    left = [broker.path.with_name(broker.path.name + name) for name in ("-wal", "-journal")]
    left += [broker.path.with_name(broker.path.name + NEW + name) for name in ("", "-wal")]
    for path in left:
        path.write_bytes(b"nobody's")
    request = broker.new_request()
    async with broker.opened() as backend:
        _, session = await mint(broker, backend, request)
    assert not any(path.exists() for path in left)
    async with broker.opened() as backend:
        assert await backend.sessions.find(session.session_id) == session
