"""Several workers under one supervisor: replaced, reloaded, drained, and counted as one broker.

Real processes and real sockets, on the memory store (see `memory_workers`): what a shared store
adds is tested with the store.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Self

import aiohttp
import pytest
from processes import (
    AGENT,
    TIMEOUT,
    Broker,
    Caller,
    Tree,
    far_away,
    good,
    is_alive,
    merged,
    put,
    read_of,
    run,
    secret_file,
    secret_in,
    toml,
    until,
    until_true,
    wait_for,
    write,
)
from test_serve import (
    RELOADS,
    Load,
    Polite,
    accepts,
    client_secret,
    command_line,
    connect_and_stop_half_way,
    end_impatiently,
    introduction,
    turned,
    visitor,
)

WORKERS = 2
OUTCOMES = ("minted", "reused", "coalesced", "limited", "shed", "failed")


class Workers(Broker):
    """A running broker with two workers."""

    program = (str(Path(__file__).parents[1] / "memory_workers.py"), str(WORKERS))

    @classmethod
    def on(cls, folder: Path, tree: Tree, **variables: str) -> Self:
        """Start one on a configuration file in `folder`."""
        return cls(write(folder / "broker.toml", toml(tree)), logs=folder, **variables)

    def pids(self) -> dict[int, int]:
        """Process ids of the workers, by number."""
        return {int(e["worker"]): int(e["pid"]) for e in self.events("broker.worker_started")}

    def kill_worker(self, number: int, how: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a worker and wait for its replacement; returns the new process id."""
        old = self.pids()[number]
        os.kill(old, how)
        return self.wait_for(lambda: self.pids()[number] != old and self.pids()[number])

    def life(self) -> list[str]:
        """Events that are not about requests."""
        return [e["event"] for e in self.events() if e["event"] != "broker.embed_token"]


class Started(Workers):
    """One for which interpreters were started, as the kernel shows."""

    is_executed = True


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A configuration that serves, with limits that are far away."""
    return merged(good(tmp_path), far_away())


async def requests_in(caller: Caller) -> float:
    """How many token requests all workers have counted."""
    return sum(
        [await caller.metric(f'broker_requests_total{{outcome="{name}"}}') for name in OUTCOMES]
    )


async def request_tokens(workers: Broker, caller: Caller, visitors: int = 16) -> int:
    """Ask over 16 new connections at once until every worker has answered; returns how often.

    Mostly the first time: but a busy machine may let one worker sleep through a burst.
    """
    seen: set[str] = set()
    asked = 0

    async def request_token(number: int) -> None:
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(connector=connector) as http:
            body = {"agent_id": AGENT, "fingerprint": visitor(number % visitors)}
            headers = {"api-secret": caller.secret}
            url = f"{workers.url}/v1/embed-tokens/request"
            async with http.post(url, json=body, headers=headers) as answer:
                assert answer.status == 200
                seen.add(answer.headers["X-Request-Id"].partition("-")[0])

    async with asyncio.timeout(TIMEOUT):
        while len(seen) < WORKERS:
            await asyncio.gather(*(request_token(number) for number in range(16)))
            asked += 16
    return asked


def scraped_counters(text: str) -> dict[str, float]:
    """Everything in a scrape that may only grow."""
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("broker_"))
    grows = ("_total", "_count", "_sum", "_bucket")
    return {n: float(v) for n, v in samples.items() if n.partition("{")[0].endswith(grows)}


class TestDeath:
    async def test_O8_a_killed_worker_is_replaced_and_nothing_that_it_counted_is_lost(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """`kill -9`: the sums are those of the answers before and after, no counter ever falls."""
        with Workers.on(tmp_path, tree) as workers:
            async with Caller(workers, client_secret(tree)) as caller:
                scrapes: list[dict[str, float]] = []

                async def scrape() -> None:
                    async with caller.http.get(f"{workers.admin_url}/metrics") as answer:
                        scrapes.append(scraped_counters(await answer.text()))

                async def watch() -> None:
                    while True:
                        await scrape()
                        await asyncio.sleep(0.02)

                watching = asyncio.ensure_future(watch())
                asked = await request_tokens(workers, caller)
                assert await requests_in(caller) == asked
                for number in (1, 2):
                    await asyncio.to_thread(workers.kill_worker, number)
                    assert await requests_in(caller) == asked
                asked += await request_tokens(workers, caller)
                watching.cancel()
                await scrape()
                assert await requests_in(caller) == asked
                assert await caller.metric("broker_token_remaining_seconds_count") == asked
                assert await caller.metric("broker_worker_restarts_total") == 2
                assert await caller.metric("broker_workers") == WORKERS
                assert len(scrapes) > 5
                for before, after in pairwise(scrapes):
                    assert before.keys() == after.keys()
                    assert [name for name in before if after[name] < before[name]] == []
            died = workers.events("broker.worker_died")
            assert [(e["level"], e["worker"], e["reason"], e["again_in_s"]) for e in died] == [
                ("error", 1, "SIGKILL", 0.1),
                ("error", 2, "SIGKILL", 0.1),
            ]
            assert workers.end() == 0

    async def test_O8_under_load_only_the_dead_workers_own_connections_notice(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """The socket stays open: nobody is refused, and what was counted was asked."""
        asked = answered = 0
        with Workers.on(tmp_path, tree) as workers:
            async with Caller(workers, client_secret(tree)) as caller:

                async def request_token(number: int) -> int:
                    nonlocal asked, answered
                    asked += 1
                    try:
                        status = (await caller.request_token(visitor(number)))[0]
                    except aiohttp.ClientConnectorError:
                        raise  # refused: the door was closed
                    except (aiohttp.ClientError, OSError):
                        return 200  # its worker died under it
                    answered += 1
                    return status

                load = Load(request_token, visitors=16)
                async with load.running():
                    await load.more()
                    for _ in range(2):
                        await asyncio.to_thread(workers.kill_worker, 1)
                        await load.more()
                assert load.failed == []
                assert answered <= await requests_in(caller) <= asked
                assert asked - answered <= 2 * 16
            waits = [e["again_in_s"] for e in workers.events("broker.worker_died")]
            assert waits == [0.1, 0.2]  # it had not been well in between

    async def test_a_worker_that_is_told_to_end_drains_and_is_replaced(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """SIGTERM to one worker by hand, as often as one likes: its answers end first."""
        with Workers.on(tmp_path, put(tree, "server.drain_lead", "200ms")) as workers:
            async with Caller(workers, client_secret(tree)) as caller:

                async def request_token(number: int) -> int:
                    return (await caller.request_token(visitor(number), fresh=True))[0]

                load = Load(request_token)
                async with load.running():
                    await load.more()
                    os.kill(workers.pids()[1], signal.SIGTERM)
                    await asyncio.to_thread(workers.kill_worker, 1, signal.SIGTERM)
                    await load.more()
                assert load.failed == []
            assert workers.events("broker.worker_died")[0]["reason"] == "exit code 0"


class TestReload:
    async def test_O7_a_rolling_reload_loses_no_request(self, tmp_path: Path, tree: Tree) -> None:
        """Clients rotate in all workers without a gap; however many there are, it is one reload."""
        secret = [client_secret(tree)]
        second = {"secret_file": secret_file(tmp_path / "second"), "agents": ["*"]}
        both = put(tree, "clients.second", second)
        with Workers.on(tmp_path, tree) as workers:
            async with Caller(workers, "") as caller:

                async def request_token(number: int) -> int:
                    return (
                        await caller.request_token(visitor(number), secret=secret[0], fresh=True)
                    )[0]

                load = Load(request_token, visitors=16)
                async with load.running():
                    await load.more()
                    write(tmp_path / "broker.toml", toml(both))
                    told = await asyncio.to_thread(workers.reload)
                    assert (told["event"], told["needs_restart"]) == ("broker.reloaded", [])
                    secret[0] = secret_in(second["secret_file"])
                    await load.more()
                    write(tmp_path / "broker.toml", toml(put(tree, "clients", {"second": second})))
                    await asyncio.to_thread(workers.reload)
                    await load.more()
                assert load.failed == []
                caller.secret = client_secret(tree)
                statuses = {(await caller.request_token(visitor(n)))[0] for n in range(16)}
                assert statuses == {401}
                assert await caller.metric(RELOADS.format("success")) == 2
                assert await caller.metric(RELOADS.format("failure")) == 0
            assert len(workers.logged("broker.reloaded", 2)) == 2

    async def test_O7_changes_nothing_when_the_file_is_broken(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """Checked before any worker hears of it, those to come included: counted once, one line."""
        other = {"secret_file": secret_file(tmp_path / "other"), "agents": ["*"]}
        bad = put(put(tree, "clients", {"other": other}), "issuer.local.keys", {})
        with Workers.on(tmp_path, tree) as workers:
            async with Caller(workers, client_secret(tree)) as caller:
                write(tmp_path / "broker.toml", toml(bad))
                told = await asyncio.to_thread(workers.reload)
                assert told["error"].startswith("issuer.local.keys: no key to sign with")
                assert {await caller.valid(caller.secret) for _ in range(8)} == {True}
                assert await caller.metric(RELOADS.format("failure")) == 1
                await asyncio.to_thread(workers.kill_worker, 1)
                await request_tokens(workers, caller)
            assert len(workers.events("broker.reload_failed")) == 1

    async def test_fails_where_the_next_restart_would(self, tmp_path: Path, tree: Tree) -> None:
        """The supervisor reads files of sections that wait for a restart, too."""
        with Workers.on(tmp_path, tree) as workers:
            wrong = put(tree, "admin.secret_file", "/nowhere/secret")
            write(tmp_path / "broker.toml", toml(wrong))
            told = await asyncio.to_thread(workers.reload)
            assert told["error"] == (
                "admin.secret_file: cannot read /nowhere/secret: No such file or directory"
            )

    async def test_a_replacement_follows_what_the_others_follow(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """Reloaded settings, not those of the start, nor a file that was changed since.

        What needs a restart stays as it was at the start, in a new worker, too.
        """
        first = client_secret(tree)
        second = {"secret_file": secret_file(tmp_path / "second"), "agents": ["*"]}
        changed = merged(tree, {"clients": {"second": second}, "server.deadline": "1s"})
        with Workers.on(tmp_path, tree) as workers:
            async with Caller(workers, first) as caller:
                write(tmp_path / "broker.toml", toml(changed))
                told = await asyncio.to_thread(workers.reload)
                assert told["needs_restart"] == ["server"]
                await asyncio.to_thread(Path(tree["clients"]["web"]["secret_file"]).unlink)
                write(tmp_path / "broker.toml", "[server\n")
                for number in (1, 2):
                    await asyncio.to_thread(workers.kill_worker, number)
                caller.secret = secret_in(second["secret_file"])
                await request_tokens(workers, caller)
                assert not await caller.valid(first)

    async def test_O7_happens_once_when_a_secret_changes(self, tmp_path: Path, tree: Tree) -> None:
        """The supervisor watches files, for all."""
        file = Path(tree["clients"]["web"]["secret_file"])
        old = secret_in(str(file))
        with Workers.on(tmp_path, tree) as workers:
            async with Caller(workers, old) as caller:
                new = secret_in(secret_file(file))
                workers.wait_for(lambda: workers.events("broker.reloaded"))
                caller.secret = new
                await request_tokens(workers, caller)
                assert not await caller.valid(old)
                assert await caller.metric(RELOADS.format("success")) == 1
            assert workers.life()[-2:] == ["broker.secret_files_changed", "broker.reloaded"]


class TestDrain:
    async def test_O6_loses_no_request(self, tmp_path: Path, tree: Tree) -> None:
        """Readiness turns everywhere, requests are still taken, all of them end, exit 0.

        SIGTERM goes to every process, as service managers send it, and workers heed no other.  A
        half-sent request is finished when nobody is let in any more.
        """
        slow = merged(tree, {"server.drain_lead": "4s", "server.drain": "20s"})
        with Workers.on(tmp_path, slow) as workers:
            pids = list(workers.pids().values())
            async with Caller(workers, client_secret(tree)) as caller:
                polite = Polite(caller)
                load = Load(polite.request_token)
                async with load.running():
                    await load.more()
                    assert await caller.ready() == 200
                    half = await connect_and_stop_half_way(workers, caller.secret)
                    workers.send(signal.SIGTERM)
                    for pid in pids:
                        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                            os.kill(pid, number)
                    await until_true(lambda: turned(caller))
                    status, _, answer = await caller.request_token(visitor(78))
                    assert (status, answer.headers.get("Connection")) == (200, "close")
                    await until(lambda: polite.looked_away + len(load.failed) == 8)
                assert load.failed == []
                await until(lambda: not accepts(workers))
                assert any(map(is_alive, pids))
                assert await finished(*half)
            assert await asyncio.to_thread(workers.wait) == 0
        assert [pid for pid in pids if is_alive(pid)] == []
        assert workers.life()[-3:] == ["broker.started", "broker.draining", "broker.stopped"]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_O6_a_second_signal_ends_everybody_at_once(
        self, tmp_path: Path, tree: Tree, number: signal.Signals
    ) -> None:
        """Exit code 128 + the number, and no worker is left."""
        slow = merged(tree, {"server.drain_lead": "10m", "server.drain": "10m"})
        with Workers.on(tmp_path, slow) as workers:
            pids = list(workers.pids().values())
            workers.send(number)
            workers.wait_for(lambda: workers.events("broker.draining"))
            assert end_impatiently(workers, number) == 128 + number
            wait_for(lambda: not any(map(is_alive, pids)))
            assert workers.events("broker.stopped") == []

    @pytest.mark.parametrize("draining", [False, True])
    async def test_workers_drain_when_their_supervisor_is_killed(
        self, tmp_path: Path, tree: Tree, *, draining: bool
    ) -> None:
        """`kill -9`: what is under way is answered, then the address is free for a successor.

        Also in the lead of a drain, which nobody waits for any more.
        """
        slow = merged(tree, {"server.drain_lead": "10m", "server.drain": "10m"})
        with Workers.on(tmp_path, slow) as workers:
            pids = list(workers.pids().values())
            half = await connect_and_stop_half_way(workers, client_secret(tree))
            await asyncio.sleep(0.2)  # until it is being read: the kernel tells nobody
            if draining:
                workers.send(signal.SIGTERM)
                workers.wait_for(lambda: workers.events("broker.draining"))
            assert workers.end(signal.SIGKILL) == -signal.SIGKILL
            await until(lambda: sum(map(is_alive, pids)) < WORKERS)
            assert await finished(*half)
            await until(lambda: not any(map(is_alive, pids)))
            with socket.create_server(("127.0.0.1", int(workers.url.rpartition(":")[2]))):
                pass  # nobody has it any more


async def finished(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rest: bytes) -> bool:
    """Send the rest of a request; returns whether it is answered with a token."""
    writer.write(rest)
    answer = await asyncio.wait_for(reader.read(), TIMEOUT)
    writer.close()
    return answer.startswith(b"HTTP/1.1 200 OK\r\n")


class TestOneBroker:
    async def test_serves_on_a_unix_socket(self, tmp_path: Path, tree: Tree) -> None:
        """Both workers take connections there, too; a live socket is left alone."""
        path = tmp_path / "s"
        with Workers.on(tmp_path, put(tree, "server.listen", f"unix:{path}")) as workers:
            assert workers.url == f"unix:{path}"
            seen = set()
            async with AsyncExitStack() as stack:  # whoever holds more leaves the door to the other
                for number in range(16):
                    caller = await stack.enter_async_context(Caller(workers, client_secret(tree)))
                    answers = [await caller.request_token(visitor(number)) for _ in range(2)]
                    seen |= {a.headers["X-Request-Id"].partition("-")[0] for _, _, a in answers}
            assert len(seen) == WORKERS
            second = Path(str(tmp_path / "broker.toml"))
            done = run("serve", "--config", str(second))
            assert (done.returncode, b"in use; stop the other" in done.stderr) == (69, True)
            assert workers.end() == 0

    async def test_visitors_have_one_name_in_the_log(self, tmp_path: Path, tree: Tree) -> None:
        """Whichever worker writes the line."""
        loud = put(tree, "log.level", "debug")
        with Workers.on(tmp_path, loud) as workers:
            async with Caller(workers, client_secret(tree)) as caller:
                await request_tokens(workers, caller, visitors=1)

            def writers() -> set[str]:
                lines = workers.events("broker.embed_token")
                return {line["request_id"].partition("-")[0] for line in lines}

            workers.wait_for(lambda: len(writers()) == WORKERS)
            assert len({line["visitor"] for line in workers.events("broker.embed_token")}) == 1

    async def test_development_secrets_are_the_same_in_all_and_in_no_process_list(
        self, tmp_path: Path
    ) -> None:
        """They are made once and travel over the workers' own socket; metrics are those of all."""
        with Started("--dev", logs=tmp_path) as workers:
            said, _ = introduction(workers)
            secret = said["api_secret"]
            async with Caller(workers, secret) as caller:
                asked = await request_tokens(workers, caller)
                assert (await asyncio.to_thread(workers.reload))["event"] == "broker.reloaded"
                await asyncio.to_thread(workers.kill_worker, 1)
                asked += await request_tokens(workers, caller)
                async with caller.http.get(f"{workers.url}/metrics") as answer:
                    text = await answer.text()
                assert f"\nbroker_token_remaining_seconds_count {asked}.0\n" in text
                assert f"\nbroker_workers {WORKERS}.0\n" in text
            lines = [command_line(pid) for pid in (workers.process.pid, *workers.pids().values())]
            assert all("broker.process.worker" in line for line in lines[1:])
            places = [*lines, *map(environment_of, workers.pids().values()), workers.log()]
            assert [place for place in places if secret in place] == []

    async def test_says_what_each_worker_takes_of_the_machine(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """CPU and memory by number; CPU of a dead one stays in the sum."""
        with Started.on(tmp_path, tree) as workers:
            async with Caller(workers, client_secret(tree)) as caller:
                cpu = 'broker_worker_cpu_seconds_total{worker="1"}'
                before = await caller.metric(cpu)
                memory = await caller.metric('broker_worker_resident_memory_bytes{worker="2"}')
                assert before > 0.05
                assert 10e6 < memory < 1e9
                await asyncio.to_thread(workers.kill_worker, 1)
                assert await caller.metric(cpu) > before

    async def test_a_worker_obeys_its_supervisor_and_not_the_signals_of_its_group(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """A reload or Ctrl-C that goes to all of a service's processes: the supervisor leads."""
        with Workers.on(tmp_path, tree) as workers:
            async with Caller(workers, client_secret(tree)) as caller:
                before = workers.pids()
                for pid in before.values():
                    os.kill(pid, signal.SIGHUP)
                    os.kill(pid, signal.SIGINT)
                await request_tokens(workers, caller)
                assert (await asyncio.to_thread(workers.reload))["event"] == "broker.reloaded"
                assert workers.pids() == before
                assert await caller.metric("broker_worker_restarts_total") == 0
            assert len(workers.events("broker.reloaded")) == 1
            assert workers.events("broker.worker_died") == []


def environment_of(pid: int) -> str:
    """What a process was given as its environment."""
    return read_of(pid, "environ")


class TestStart:
    def test_needs_a_shared_store(self, tmp_path: Path, tree: Tree) -> None:
        """Exit 78, one line with reason and remedy; `--workers` comes before the file."""
        path = write(tmp_path / "broker.toml", toml(put(tree, "server.workers", 4)))
        rule = (
            "broker: server.workers: more than 1 needs a shared store, because each worker would"
            " have limits, tokens and a budget of its own, and a state file is one process'; set"
            " store.url to a Valkey, or workers = 1\n"
        )
        for arguments in (("serve", "--config", path), ("serve", "--dev", "--workers", "2")):
            done = run(*arguments)
            assert (done.returncode, done.stderr.decode()) == (78, rule)
        assert run("check", "--config", path).returncode == 78
        with Broker("--config", path, "--workers", "1", logs=tmp_path) as broker:
            assert "workers" not in broker.started

    @pytest.mark.parametrize("workers", ["0", "-1", "65", "many"])
    def test_refuses_numbers_that_are_none(self, workers: str) -> None:
        """A closed range: each worker has a row, a label and a process."""
        done = run("serve", "--dev", "--workers", workers)
        assert done.returncode == 78
        assert done.stderr.startswith(b"broker: server.workers: expected ")
        assert done.stderr.count(b"\n") == 1

    @pytest.mark.parametrize("section", ["server", "admin"])
    def test_a_port_in_use_is_one_error(self, tmp_path: Path, tree: Tree, section: str) -> None:
        """Bound before any worker is started."""
        import subprocess

        with socket.create_server(("127.0.0.1", 0)) as other:
            address = f"127.0.0.1:{other.getsockname()[1]}"
            path = write(tmp_path / "broker.toml", toml(put(tree, f"{section}.listen", address)))
            command = [sys.executable, "-W", "error", *Workers.program, path]
            done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
        assert done.returncode == 69
        told = f"broker: {section}.listen: cannot listen on {address}: in use"
        assert done.stderr.decode().startswith(told)
        assert done.stderr.count(b"\n") == 1

    def test_starts_in_time(self, tmp_path: Path, tree: Tree) -> None:
        """How long until both workers take requests, printed."""
        with Started.on(tmp_path, tree) as workers:
            print(f"\n{workers.seconds_to_start * 1000:.0f} ms until {WORKERS} workers are ready")
            started = time.monotonic()
            assert workers.end() == 0
            print(f"{(time.monotonic() - started) * 1000:.0f} ms to end, without a lead")
            assert workers.life()[:3] == [*["broker.worker_started"] * 2, "broker.started"]
            assert workers.started["workers"] == WORKERS
