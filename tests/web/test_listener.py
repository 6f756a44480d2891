"""Listeners on real addresses, and what an operator is told about those that cannot be had."""

import asyncio
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.web import listener as module
from broker.web.listener import SOCKET_MODE, CannotListen, listen

BACKLOG = 16


async def opened(address: str) -> tuple[asyncio.Server, str]:
    """Listen with a protocol that says nothing."""
    return await listen(asyncio.Protocol, address, "server.listen", BACKLOG)


async def refusal(address: str) -> str:
    """Return what the operator is told about an address."""
    with pytest.raises(CannotListen) as caught:
        await opened(address)
    return str(caught.value)


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Somebody else's socket, that answers."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)
        yield server


def leave_stale(path: Path) -> None:
    """Leave a socket as a killed process does: the file is there, nobody listens."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)


class TestTcp:
    async def test_port_0_chooses_one_and_names_it(self) -> None:
        """The URL is that under which it answers."""
        server, url = await opened("127.0.0.1:0")
        async with server:
            port = int(url.removeprefix("http://127.0.0.1:"))
            assert port == server.sockets[0].getsockname()[1] > 0
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            await writer.wait_closed()

    @pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
    async def test_ipv6_has_brackets_in_its_url(self) -> None:
        """As RFC 3986 wants them."""
        try:
            server, url = await opened("[::1]:0")
        except CannotListen as error:
            assert "[::1]:0: this machine has no such address" in str(error)  # noqa: PT017
            return
        async with server:
            assert url == f"http://[::1]:{server.sockets[0].getsockname()[1]}"

    async def test_port_in_use_is_said(self) -> None:
        """Setting, address, reason, remedy."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            address = f"127.0.0.1:{other.getsockname()[1]}"
            assert await refusal(address) == (
                f"server.listen: cannot listen on {address}: in use; stop the other process,"
                " or choose another with --listen or [server] listen"
            )

    async def test_foreign_address_is_said(self) -> None:
        """192.0.2.0/24 is for documentation: no machine has it."""
        assert await refusal("192.0.2.1:0") == (
            "server.listen: cannot listen on 192.0.2.1:0: this machine has no such address"
        )

    async def test_unknown_host_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the resolver's words; no resolver is asked here."""
        loop = asyncio.get_running_loop()

        async def unknown(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(loop, "getaddrinfo", unknown)
        assert await refusal("nowhere.invalid:80") == (
            "server.listen: cannot listen on nowhere.invalid:80: Name or service not known"
        )


class TestUnixSocket:
    async def test_is_for_owner_and_group(self, tmp_path: Path) -> None:
        """Mode 0660, whatever the umask."""
        path = tmp_path / "broker.sock"
        before = os.umask(0)
        try:
            server, url = await opened(f"unix:{path}")
        finally:
            os.umask(before)
        async with server:
            assert url == f"unix:{path}"
            assert stat.S_IMODE(path.stat().st_mode) == SOCKET_MODE == 0o660
            _, writer = await asyncio.open_unix_connection(path)
            writer.close()
            await writer.wait_closed()

    async def test_replaces_one_that_nobody_answers(self, tmp_path: Path) -> None:
        """A killed process leaves its socket; the next start must not need a hand."""
        path = tmp_path / "broker.sock"
        leave_stale(path)
        server, _ = await opened(f"unix:{path}")
        async with server:
            _, writer = await asyncio.open_unix_connection(path)
            writer.close()
            await writer.wait_closed()

    async def test_leaves_one_that_answers_to_its_owner(self, tmp_path: Path) -> None:
        """It is refused, and still works for those who use it."""
        path = tmp_path / "broker.sock"
        with listening(path) as owner:
            assert await refusal(f"unix:{path}") == (
                f"server.listen: cannot listen on unix:{path}: in use; stop the other process,"
                " or choose another with --listen or [server] listen"
            )
            owner.settimeout(1)
            owner.accept()[0].close()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))

    async def test_leaves_one_whose_queue_is_full(self, tmp_path: Path) -> None:
        """A process that hangs is alive: asking must neither wait for it nor take its place."""
        path = tmp_path / "broker.sock"
        with listening(path) as owner:
            owner.listen(0)
            clients = [socket.socket(socket.AF_UNIX) for _ in range(8)]
            for client in clients:
                client.setblocking(False)
                client.connect_ex(str(path))
            assert "in use" in await refusal(f"unix:{path}")
            for client in clients:
                client.close()
        assert path.exists()

    async def test_leaves_a_file_that_is_none(self, tmp_path: Path) -> None:
        """A wrong path must not cost anybody a file."""
        path = tmp_path / "notes.txt"
        path.write_bytes(b"mine")
        assert await refusal(f"unix:{path}") == (
            f"server.listen: cannot listen on unix:{path}: there is a file that is not a socket"
        )
        assert path.read_text(encoding="utf-8") == "mine"

    async def test_in_no_folder_is_said(self, tmp_path: Path) -> None:
        """The folder is the operator's to make."""
        address = f"unix:{tmp_path}/nowhere/broker.sock"
        assert (
            await refusal(address) == f"server.listen: cannot listen on {address}: no such folder"
        )

    async def test_in_a_closed_folder_is_said(self, tmp_path: Path) -> None:
        """Permission denied, and what to do about it."""
        folder = tmp_path / "closed"
        folder.mkdir()
        folder.chmod(0o500)
        address = f"unix:{folder}/broker.sock"
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            told = await refusal(address)
        finally:
            os.seteuid(before)
        assert told == (
            f"server.listen: cannot listen on {address}: permission denied; choose a port above"
            " 1023 or a folder of the broker's own"
        )

    async def test_with_a_name_too_long_is_said(self, tmp_path: Path) -> None:
        """The kernel takes 107 bytes."""
        told = await refusal(f"unix:{tmp_path}/{'x' * 120}")
        assert told.endswith("AF_UNIX path too long")


def test_remedies_are_one_line_each() -> None:
    """Exit 69 comes with exactly one line."""
    assert [text for text in module._REMEDIES.values() if not text.isprintable()] == []
