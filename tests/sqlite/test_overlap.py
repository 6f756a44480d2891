"""D2, D9: two real processes and one file."""

import asyncio
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from processes import (
    Broker,
    Caller,
    Tree,
    environment,
    good,
    merged,
    run,
    secret_in,
    toml,
    until,
    write,
)
from web.edge import serving

from broker.web.listener import CannotListen


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A broker that drains at once, with a file."""
    url = f"sqlite://{tmp_path / 'state.db'}"
    return merged(good(tmp_path), {"store.url": url, "server.drain": "0s"})


async def test_D2_the_second_one_ends_with_69_and_names_the_first(
    tmp_path: Path, tree: Tree
) -> None:
    """After it has waited for as long as a drain may take; the first one notices nothing."""
    secret = secret_in(tree["clients"]["web"]["secret_file"])
    with Broker.configured(tmp_path, tree) as first:
        path = write(tmp_path / "second.toml", toml(tree))
        second = await asyncio.to_thread(run, "serve", "--config", path)
        assert second.returncode == 69
        said = second.stderr.decode()
        assert f"is in use by process {first.process.pid}; stop it" in said
        assert "broker.state_file_in_use" in said
        async with Caller(first, secret) as caller:
            token = await caller.token("cafe")
            assert await caller.token("cafe") == token
        assert first.events("broker.defect") == []


async def test_D9_a_deploy_whose_processes_overlap_loses_nothing(
    tmp_path: Path, tree: Tree
) -> None:
    """The new one starts first, the old one is stopped then: what it handed out is there."""
    secret = secret_in(tree["clients"]["web"]["secret_file"])
    visitors = [f"{number:016x}" for number in range(50)]
    with Broker.configured(tmp_path, tree) as old:
        starting = asyncio.ensure_future(asyncio.to_thread(Broker.configured, tmp_path, tree))
        await until(lambda: any(waits(log) for log in tmp_path.glob("log.*")))
        async with Caller(old, secret) as caller:
            tokens = [await caller.token(visitor) for visitor in visitors]
        assert not starting.done()
        assert await asyncio.to_thread(old.end) == 0
        with await starting as new:
            async with Caller(new, secret) as caller:
                assert [await caller.token(visitor) for visitor in visitors] == tokens
            assert new.events("broker.state_file_in_use")[0]["pid"] == str(old.process.pid)
            assert new.end() == 0


async def test_D9_processes_that_overlap_may_have_the_same_addresses(
    tmp_path: Path, tree: Tree
) -> None:
    """While the old one has the file, its addresses are not looked at: both become free with it."""
    with Broker.configured(tmp_path, tree) as old:
        taken = {
            "server.listen": urlsplit(old.url).netloc,
            "admin.listen": urlsplit(old.admin_url).netloc,
        }
        same = merged(tree, taken)
        starting = asyncio.ensure_future(asyncio.to_thread(Broker.configured, tmp_path, same))
        await until(lambda: any(waits(log) for log in tmp_path.glob("log.*")))
        assert await asyncio.to_thread(old.end) == 0
        with await starting as new:
            assert (new.url, new.admin_url) == (old.url, old.admin_url)
            assert new.end() == 0


def waits(log: Path) -> bool:
    """Whether the process that writes this log waits for another one."""
    return "broker.state_file_in_use" in log.read_text(encoding="utf-8")


def test_N9_one_that_waits_for_the_file_can_be_stopped(tmp_path: Path, tree: Tree) -> None:
    """It never began, and says nothing of a failure."""
    with Broker.configured(tmp_path, tree):
        path = write(tmp_path / "second.toml", toml(tree))
        command = [sys.executable, "-m", "broker", "serve", "--config", path]
        with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment()) as second:
            assert second.stderr is not None
            assert b"broker.state_file_in_use" in second.stderr.readline()
            second.send_signal(signal.SIGTERM)
            assert second.wait(30) == 0
            assert second.stderr.read() == b""


async def test_D2_a_start_that_cannot_listen_gives_the_file_up(tmp_path: Path) -> None:
    """At once, and in the same process: whoever starts next finds nobody in its way."""
    store = {"store": {"url": f"sqlite://{tmp_path / 'state.db'}"}}
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = {"server": {"listen": f"127.0.0.1:{other.getsockname()[1]}"}}
        with pytest.raises(CannotListen):
            async with serving({**store, **taken}):
                pass
    async with serving(store) as edge:
        assert edge.events("broker.state_file_in_use") == []
        assert (await edge.request_token()).status == 200
