"""D1, D5: where no file can be kept, and disks that fill up or fail while it is."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from processes import good, merged, run, toml, until, write
from state_files import Broker, end, held, looked, mint

from broker.config.schema import ConfigError
from broker.errors import NotDurable
from broker.sqlite.location import examine
from broker.telemetry.labels import FileError

OTHER_USER = 65_534


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    """A broker with a file in a folder of its own."""
    (tmp_path / "state").mkdir()
    return Broker(tmp_path / "state" / "state.db")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few pages; it takes the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def tree(folder: Path, file: Path) -> str:
    """Write a configuration that keeps its state there."""
    return write(
        folder / "broker.toml", toml(merged(good(folder), {"store.url": f"sqlite://{file}"}))
    )


async def refused(broker: Broker) -> str:
    """Open, and return why that is refused."""
    with pytest.raises(ConfigError) as caught:
        async with broker.opened():
            pass
    assert str(caught.value).startswith("store.url: ")
    return str(caught.value)


@pytest.mark.parametrize("command", ["serve", "check", "doctor"])
def test_D1_a_folder_that_is_missing(tmp_path: Path, command: str) -> None:
    """78, or a problem of the doctor's: with the command that makes it."""
    path = tree(tmp_path, tmp_path / "nowhere" / "state.db")
    done = run(command, "--config", path)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == (1 if command == "doctor" else 78), said
    assert f"there is no folder {tmp_path}/nowhere; make it for the broker's user" in said
    assert f"install -d -m 0700 -o {os.geteuid()} {tmp_path}/nowhere" in said


def test_D1_check_and_doctor_say_when_it_is_well(tmp_path: Path) -> None:
    """And leave nothing behind."""
    (tmp_path / "state").mkdir()
    path = tree(tmp_path, tmp_path / "state" / "state.db")
    assert run("check", "--config", path).stdout == b"configuration ok\n"
    said = run("doctor", "--config", path).stdout.decode()
    assert (
        f"ok       store.url: {tmp_path}/state/state.db can be written; no broker uses it" in said
    )
    assert list((tmp_path / "state").iterdir()) == []


def test_D1_check_only_notes_it_where_secrets_are_not_here_either(tmp_path: Path) -> None:
    """A configuration is checked elsewhere than it runs."""
    path = tree(tmp_path, tmp_path / "nowhere" / "state.db")
    (tmp_path / "web").unlink()
    done = run("check", "--config", path)
    assert (done.returncode, done.stdout) == (0, b"configuration ok\n")
    assert b"note: store.url: there is no folder" in done.stderr


async def test_D1_a_folder_that_may_not_be_written(broker: Broker) -> None:
    """The folder is named, whose rights are at fault, and who it must be given to."""
    async with broker.opened():
        pass  # what is imported by then need not be read by another user
    with closed_folder() as folder:
        broker.path, user = folder / "state.db", os.geteuid()
        assert user != 0
        said = await refused(broker)
        assert said.startswith(
            f"store.url: cannot write to {folder}: Permission denied;"
            f" give it to the broker's user (chown {user}, chmod u+rwx), "
        )
        with pytest.raises(ConfigError) as examined:
            examine(broker.path, {})
        assert str(examined.value) == said
        assert list(folder.iterdir()) == []


@contextmanager
def closed_folder() -> Iterator[Path]:
    """Make a folder that may be looked into and not written, also by those who run as root."""
    with TemporaryDirectory(dir="/tmp") as name:  # everybody may go there
        folder, before = Path(name), os.geteuid()
        folder.chmod(0o555)
        if before == 0:
            os.seteuid(OTHER_USER)
        try:
            yield folder
        finally:
            os.seteuid(before)
            folder.chmod(0o700)


async def test_D5_a_link_in_its_place(broker: Broker, tmp_path: Path) -> None:
    """Not followed: who made it would choose what is written."""
    (tmp_path / "theirs").write_bytes(b"x")
    for name in ("state.db", "state.db-wal", "state.db.lock"):
        link = broker.path.with_name(name)
        link.symlink_to(tmp_path / "theirs")
        assert f"{name} is a link" in await refused(broker)
        link.unlink()
    assert (tmp_path / "theirs").read_bytes() == b"x"


async def test_D5_a_second_name(broker: Broker, tmp_path: Path) -> None:
    """Of somebody else's file, which would be written into."""
    (tmp_path / "theirs").write_bytes(b"x")
    for name in ("state.db", "state.db-wal", "state.db.lock", "state.db.new"):
        link = broker.path.with_name(name)
        link.hardlink_to(tmp_path / "theirs")
        assert f"{name} has a second name" in await refused(broker)
        link.unlink()
    assert (tmp_path / "theirs").read_bytes() == b"x"


@pytest.mark.parametrize("instead", [False, True])
async def test_D5_a_file_that_is_taken_away_while_it_is_used(
    broker: Broker, *, instead: bool
) -> None:
    """What is written into it is lost with the process: degraded, and no end is confirmed."""
    async with broker.opened() as backend:
        request = broker.new_request()
        _, session = await mint(broker, backend, request)
        broker.path.rename(broker.path.with_name("elsewhere"))
        if instead:
            broker.path.touch()
        await until(lambda: backend.is_degraded)
        with pytest.raises(NotDurable):
            await end(backend, session)
        token, _ = await mint(broker, backend, request)
        assert await held(backend, request) == token.body
        assert backend.is_degraded


@pytest.mark.parametrize("content", ["text", "database"])
async def test_D5_somebody_else_s_file(broker: Broker, content: str) -> None:
    """Left as it is, whatever it is; a folder and a pipe are refused, too."""
    import sqlite3
    from contextlib import closing

    if content == "text":
        broker.path.write_text("dear diary" * 1000)
    else:
        with closing(sqlite3.connect(broker.path)) as connection, connection:
            connection.execute("CREATE TABLE diary (entry TEXT)")
    before = broker.path.read_bytes()
    assert "is not a state file of the broker, and is left alone" in await refused(broker)
    assert broker.path.read_bytes() == before
    broker.path.unlink()
    broker.path.mkdir()
    assert "is not a regular file" in await refused(broker)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
async def test_D5_another_user_s_file(broker: Broker) -> None:
    """Refused with both users' numbers; root examines a service's file without being told off."""
    from broker.sqlite import location

    async with broker.opened():
        pass
    os.chown(broker.path, OTHER_USER, OTHER_USER)
    said = await refused(broker)
    assert f"belongs to user {OTHER_USER} and not to 0" in said
    assert f"chown 0 {broker.path}" in said
    for path in (broker.path.parent, *broker.path.parent.iterdir()):
        os.chown(path, OTHER_USER, OTHER_USER)
    location.examine(broker.path, {})


@pytest.mark.parts
async def test_D1_full_at_the_start(small_disk: Path, tmp_path: Path) -> None:
    """78 with the remedy, from the start, `check` and the doctor."""
    filled(small_disk)
    broker = Broker(small_disk / "state.db")
    assert "make room there" in await refused(broker)
    path = tree(tmp_path, broker.path)
    for command, code in (("serve", 78), ("check", 78), ("doctor", 1)):
        done = run(command, "--config", path)
        assert done.returncode == code
        assert b"No space left on device; make room there" in done.stdout + done.stderr or (
            command == "serve" and b"make room there" in done.stderr
        )


def filled(folder: Path) -> Path:
    """Use up a small disk."""
    path = folder / "filler"
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return path


@pytest.mark.parts
async def test_D1_full_while_it_runs(small_disk: Path) -> None:
    """Served and counted; an end is 503 and holds; all of it is written when there is room."""
    broker = Broker(small_disk / "state.db")
    before, during, ended = broker.new_request(), broker.new_request(), broker.new_request()
    async with broker.opened() as backend:
        await mint(broker, backend, before)
        _, session = await mint(broker, backend, ended)
        filler = filled(small_disk)
        requests = [broker.new_request() for _ in range(30)]
        for request in requests:
            await mint(broker, backend, request)
        token, _ = await mint(broker, backend, during)
        assert await held(backend, during) == token.body
        with pytest.raises(NotDurable, match="holds until the broker restarts only"):
            await end(backend, session)
        assert await held(backend, ended) is None
        assert await backend.sessions.ended(session.session_id)
        looked(backend)
        assert backend.is_degraded
        assert broker.metrics.state_file.errors[FileError.FULL].value > 0
        assert broker.metrics.state_file.late.value > 0
        filler.unlink()
        await until(lambda: not backend.is_degraded)
        looked(backend)
        await end(backend, session)
    async with broker.opened() as backend:
        assert await held(backend, during) == token.body
        assert [await held(backend, request) is not None for request in requests] == [True] * 30
        assert await held(backend, ended) is None
        assert await backend.sessions.ended(session.session_id)


def remount(folder: Path, how: str) -> None:
    """Let a disk be written, or no more."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


@pytest.mark.parts
async def test_D1_read_only_at_the_start(small_disk: Path, tmp_path: Path) -> None:
    """A file system that is mounted read-only, with a file of before on it."""
    broker = Broker(small_disk / "state.db")
    async with broker.opened() as backend:
        await mint(broker, backend, broker.new_request())
    remount(small_disk, "ro")
    assert "Read-only file system; mount it for writing" in await refused(broker)
    path = tree(tmp_path, broker.path)
    for command, code in (("serve", 78), ("check", 78), ("doctor", 1)):
        done = run(command, "--config", path)
        assert done.returncode == code
        assert b"Read-only file system; mount it for writing" in done.stdout + done.stderr
    remount(small_disk, "rw")
    async with broker.opened():
        assert broker.metrics.state_file.moved_aside.value == 0
