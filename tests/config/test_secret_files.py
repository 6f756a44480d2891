"""Secret files: whatever changes in them is noticed, and nothing else is."""

import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Broker, Caller, Tree, environment, good, merged, secret_in, until
from test_serve import client_secret

from broker.config import secret_files
from broker.config.files import MAX_FILE
from broker.config.secret_files import SecretFiles

LENGTH = 48


def text() -> str:
    """Return a secret; all have one length."""
    return secrets.token_hex(LENGTH // 2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A secret file, mounted as orchestrators do: a link by way of `..data`."""
    for version in ("..1", "..2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "secret").write_text(text())
        os.utime(tmp_path / version / "secret", ns=(10**18, 10**18))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "secret").symlink_to("..data/secret")
    return tmp_path / "secret"


def rewrite(file: Path) -> None:
    """In place, with the same size, and the time put back to the nanosecond."""
    before = file.stat()
    with file.open("r+") as handle:
        handle.write(text())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )


def swap(file: Path) -> None:
    """Point `..data` elsewhere, at once; size and time stay."""
    link = file.with_name("..data_tmp")
    link.symlink_to("..2")
    link.replace(file.with_name("..data"))


def replace(file: Path) -> None:
    """Put another file of the same size and time in its place."""
    target = file.resolve()
    new = target.with_name("new")
    new.write_text(text())
    os.utime(new, ns=(10**18, 10**18))
    new.replace(target)


def recycle(file: Path) -> None:
    """As above, and the new one has the inode number of the old, which is free again."""
    target = file.resolve()
    inode = target.stat().st_ino
    for _ in range(50):
        target.unlink()
        target.write_text(text())
        os.utime(target, ns=(10**18, 10**18))
        if target.stat().st_ino == inode:
            return


def remove(file: Path) -> None:
    """Leave the link behind."""
    file.resolve().unlink()


def directory(file: Path) -> None:
    """As a container engine makes one where it finds no file."""
    file.unlink()
    file.mkdir()


def cycle(file: Path) -> None:
    """Let it point to itself."""
    file.unlink()
    file.symlink_to(file.name)


def touch(file: Path) -> None:
    """Only its time changes: somebody wants a reload."""
    os.utime(file, ns=(2 * 10**18, 2 * 10**18))


CHANGES = [rewrite, swap, replace, recycle, remove, directory, cycle, touch]


@pytest.mark.parametrize("change", CHANGES)
def test_N12_every_change_is_noticed_once(file: Path, change: Callable[[Path], None]) -> None:
    """Whatever size and time say."""
    files = SecretFiles([str(file)])
    assert [files.changed(), files.changed()] == [False, False]
    change(file)
    assert [files.changed(), files.changed()] == [True, False]


@pytest.mark.parametrize("change", [rewrite, swap, replace, remove])
def test_N12_also_among_thousands(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    """Each look reads a bounded number of them, in turn: every one is read in time."""
    others = [tmp_path / f"other{n}" for n in range(500)]
    for other in others:
        other.write_text(text())
    files = SecretFiles([*map(str, others), str(file)])
    read = list[str]()
    digest = secret_files._digest
    monkeypatch.setattr(secret_files, "_digest", lambda path: (read.append(path), digest(path))[1])
    assert not any(files.changed() for _ in range(10))
    assert len(read) == 10 * secret_files.MOST_READ
    change(file)
    looks = -(-len(others) // secret_files.MOST_READ) + 1
    assert sum(files.changed() for _ in range(looks)) == 1


def test_N12_coarse_times_hide_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows two-second steps, and one that knows no times at all."""
    signature = secret_files._signature

    def coarse(path: str) -> Any:
        found = signature(path)
        return found and (*found[:3], 0)

    monkeypatch.setattr(secret_files, "_signature", coarse)
    files = SecretFiles([str(file)])
    rewrite(file)
    assert files.changed()


def test_N12_a_backup_by_hard_links_is_no_change(file: Path) -> None:
    """It changes the inode's ctime, which is why that is not looked at."""
    files = SecretFiles([str(file)])
    os.link(file.resolve(), file.with_name("backup"))
    file.resolve().chmod(0o600)
    assert not files.changed()


def test_N12_what_reading_would_consume_is_not_read(tmp_path: Path) -> None:
    """A pipe in place of a file: neither waited for nor emptied."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    files = SecretFiles([str(pipe), "no\0path", str(tmp_path / "absent")])
    assert not files.changed()
    pipe.unlink()
    assert files.changed()


def test_N12_a_file_of_which_the_system_says_0_bytes_is_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some mounted file systems do: the size is a hint, the contents tell."""
    real = os.fstat

    def sizeless(handle: int) -> Any:
        known = list(real(handle))
        known[6] = 0
        return os.stat_result(known)

    monkeypatch.setattr(os, "fstat", sizeless)
    files = SecretFiles([str(file)])
    rewrite(file)
    assert files.changed()
    assert not files.changed()


def test_N12_what_lies_behind_a_mebibyte_is_known_by_its_time(tmp_path: Path) -> None:
    """Reading stays bounded."""
    large = tmp_path / "large"
    large.write_bytes(bytes(MAX_FILE + 10))
    files = SecretFiles([str(large)])
    with large.open("r+b") as handle:
        handle.seek(MAX_FILE + 1)
        handle.write(b"x")
    os.utime(large, ns=(1, 1))
    assert files.changed()


def test_N12_lost_permission_is_noticed(tmp_path: Path) -> None:
    """Before the next start fails for it: as another user, because root may read everything."""
    file = tmp_path / "secret"
    file.write_text(text())
    code = (
        "import os, sys\n"
        "from broker.config.secret_files import SecretFiles\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        f"files = SecretFiles([{str(file)!r}])\n"
        "for _ in range(3):\n"
        "    print(files.changed(), flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    file.chmod(0o644)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told = [process.stdout.readline()]
        for mode in (0o000, 0o644):
            file.chmod(mode)
            process.stdin.write("\n")
            process.stdin.flush()
            told.append(process.stdout.readline())
    assert told == ["False\n", "True\n", "True\n"]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A configuration that serves."""
    return merged(good(tmp_path), {})


@pytest.mark.parametrize("change", [rewrite, swap])
async def test_N12_a_running_broker_takes_over_what_looks_the_same(
    tmp_path: Path, tree: Tree, file: Path, change: Callable[[Path], None]
) -> None:
    """A secret of the same length at the same time: the old one is unknown, the new one known."""
    tree["clients"]["web"]["secret_file"] = str(file)
    with Broker.configured(tmp_path, tree) as broker:
        old = client_secret(tree)
        async with Caller(broker, old) as caller:
            assert await caller.valid(old)
            change(file)
            new = secret_in(str(file))
            assert new != old
            await until(lambda: len(broker.events("broker.reloaded")) == 1)
            assert [await caller.valid(old), await caller.valid(new)] == [False, True]
        assert broker.end() == 0


def test_a_look_leaves_no_file_open(file: Path) -> None:
    """Twice a second for years; a file that cannot be read is closed, too."""
    watched = SecretFiles([str(file), str(file.parent)])
    before = _open_files()
    for _ in range(20):
        rewrite(file)
        assert watched.changed()
    assert _open_files() == before


def _open_files() -> int:
    """Count what this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
