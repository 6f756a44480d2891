"""The life of a process: started, signalled, reloaded, drained and started again, under load.

Real processes and real sockets.  Nothing here depends on how fast the machine is: where something
takes its time, the test waits until it has happened.
"""

import asyncio
import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from processes import (
    AGENT,
    TIMEOUT,
    Broker,
    Caller,
    Executed,
    Tree,
    environment,
    far_away,
    good,
    merged,
    put,
    read_of,
    run,
    secret_file,
    secret_in,
    toml,
    until,
    until_true,
    write,
)

from broker.testing import FakeVendor, VendorSettings

CONFIG = Path(__file__).parents[2] / "config"
MINTED = 'broker_mint_duration_seconds_count{issuer="local",outcome="minted"}'


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A configuration that serves, with limits that are far away."""
    return merged(good(tmp_path), far_away())


def client_secret(tree: Tree, name: str = "web") -> str:
    """Return the secret of a client."""
    return secret_in(tree["clients"][name]["secret_file"])


def visitor(number: int) -> str:
    """Name a visitor."""
    return f"{number:016x}"


def start_dev(folder: Path, *arguments: str, **variables: str) -> Broker:
    """Start development mode on free ports."""
    free = ("--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
    return Executed("--dev", *free, *arguments, logs=folder, **variables)


def introduction(broker: Broker) -> tuple[dict[str, str], str]:
    """Return the two lines that development mode prints."""
    out = broker.process.stdout
    assert out is not None
    return json.loads(out.readline()), out.readline().decode().rstrip("\n")


class Load:
    """Visitors who ask over and over; what did not go well is kept."""

    def __init__(self, request_token: Callable[[int], Any], visitors: int = 8) -> None:
        self._request_token = request_token
        self.answered = [0] * visitors
        self.failed: list[str] = []
        self.stopping = False

    async def _visit(self, number: int) -> None:
        while not self.stopping:
            try:
                status = await self._request_token(number)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self.failed.append(repr(error))
                return
            if status is None:
                return
            if status != 200:
                self.failed.append(f"status {status}")
                return
            self.answered[number] += 1

    async def more(self, count: int = 4) -> None:
        """Wait until each visitor was answered so many times more: what was under way is over."""
        goals = [answered + count for answered in self.answered]
        await until(
            lambda: (
                bool(self.failed)
                or all(a >= goal for a, goal in zip(self.answered, goals, strict=True))
            )
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        """Keep them asking meanwhile."""
        async with asyncio.TaskGroup() as group:
            for number in range(len(self.answered)):
                group.create_task(self._visit(number))
            try:
                yield self
            finally:
                self.stopping = True


class Polite:
    """Asks as a balancer's callers do, who look away when an answer says `Connection: close`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self.looked_away = 0

    async def request_token(self, number: int) -> int | None:
        """Ask once; None is a good answer, and the last one."""
        status, _, answer = await self._caller.request_token(visitor(number), fresh=number % 2 == 0)
        if answer.headers.get("Connection") == "close" and status == 200:
            self.looked_away += 1
            return None
        return status


class TestDevelopmentMode:
    async def test_introduces_itself_to_programs_and_people(self, tmp_path: Path) -> None:
        """First line: JSON with both addresses and the secret.  Second: curl for a first token."""
        with start_dev(tmp_path) as broker:
            said, line = introduction(broker)
            assert set(said) == {"url", "admin_url", "api_secret"}
            assert (said["url"], said["admin_url"]) == (broker.url, broker.admin_url)
            command = shlex.split(line)
            assert command[:3] == ["curl", "-s", f"{broker.url}/v1/embed-tokens/request"]
            assert command[3:5] == ["-H", f"api-secret: {said['api_secret']}"]
            assert command[5] == "-d"
            assert len(command) == 7
            asked = json.loads(command[6])
            async with Caller(broker, said["api_secret"]) as caller:
                token = await caller.token(asked["fingerprint"], agent=asked["agent_id"])
                assert await caller.token(asked["fingerprint"]) == token
                async with caller.http.get(f"{broker.url}/docs") as docs:
                    assert docs.status == 200
            assert said["api_secret"] not in broker.log()
            print(f"\n{broker.seconds_to_start * 1000:.0f} ms from exec to the first request")
            assert broker.end(signal.SIGINT) == 0

    @pytest.mark.parts
    def test_prints_a_line_that_a_shell_can_run(self, tmp_path: Path) -> None:
        """Pasted as it is, it answers with a token."""
        with start_dev(tmp_path) as broker:
            _, line = introduction(broker)
            done = subprocess.run(line, shell=True, capture_output=True, check=True)
            answer = json.loads(done.stdout)
        assert (answer["success"], answer["status_code"]) == (True, 200)

    async def test_takes_its_secret_from_the_environment(self, tmp_path: Path) -> None:
        """BROKER_DEV_SECRET: for scripts that start it more than once."""
        secret = secret_in(secret_file(tmp_path / "s"))
        with start_dev(tmp_path, BROKER_DEV_SECRET=secret) as broker:
            assert introduction(broker)[0]["api_secret"] == secret
            async with Caller(broker, secret) as caller:
                await caller.token(visitor(1))
                assert broker.reload()["event"] == "broker.reloaded"
                await caller.token(visitor(1))

    @pytest.mark.parametrize("name", ["broker.toml", "dev.toml", "load.toml"])
    async def test_runs_every_configuration_that_ships(self, tmp_path: Path, name: str) -> None:
        """Secrets whose files are not here are made up; the printed one gets a token.

        Flags come before the file: it listens where the flag says.
        """
        with start_dev(
            tmp_path, "--config", str(CONFIG / name), BROKER_LOG__LEVEL="info"
        ) as broker:
            said, _ = introduction(broker)
            assert said["url"] != "http://127.0.0.1:8080"
            async with Caller(broker, said["api_secret"]) as caller:
                await caller.token(visitor(1))
            assert broker.reload()["event"] == "broker.reloaded"

    def test_starts_in_time(self) -> None:
        """How long the imports take and the start beyond them, printed: 300 ms are the aim."""
        code = "import broker.cli.main, broker.telemetry.logs, broker.process.serve, broker.app.dev"
        times = []
        for _ in range(2):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
            times.append(time.perf_counter() - started)
        print(f"\n{min(times) * 1000:.0f} ms for Python and the imports")


async def turned(caller: Caller) -> bool:
    """Whether readiness says no."""
    return await caller.ready() == 503


async def connect_and_stop_half_way(broker: Broker, secret: str) -> tuple[Any, Any, bytes]:
    """Send a request but for its last bytes; returns the connection and these bytes."""
    host, port = broker.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"agent_id": AGENT, "fingerprint": visitor(77)}).encode()
    head = (
        f"POST /v1/embed-tokens/request HTTP/1.1\r\nHost: b\r\napi-secret: {secret}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body[:-5])
    await writer.drain()
    return reader, writer, body[-5:]


class TestDrain:
    async def test_O6_loses_no_request(self, tmp_path: Path, tree: Tree) -> None:
        """SIGTERM under load: readiness turns first, requests are still taken, then it ends.

        Callers do as balancers do: they look away when readiness turns or an answer says
        `Connection: close`.  None of their requests fails, a half-sent one is finished, exit 0.
        """
        slow = merged(tree, {"server.drain_lead": "4s", "server.drain": "20s"})
        secret = client_secret(tree)
        with Broker.configured(tmp_path, slow) as broker:
            async with Caller(broker, secret) as caller:
                polite = Polite(caller)
                load = Load(polite.request_token)
                async with load.running():
                    await load.more()
                    assert await caller.ready() == 200
                    reader, writer, rest = await connect_and_stop_half_way(broker, secret)
                    broker.send(signal.SIGTERM)
                    await until_true(lambda: turned(caller))
                    status, _, answer = await caller.request_token(visitor(78))
                    assert (status, answer.headers.get("Connection")) == (200, "close")
                    await until(lambda: polite.looked_away + len(load.failed) == 8)
                assert load.failed == []
                await until(lambda: not accepts(broker))
                writer.write(rest)
                answer_bytes = await asyncio.wait_for(reader.read(), TIMEOUT)
                assert answer_bytes.startswith(b"HTTP/1.1 200 OK\r\n")
                assert b"Connection: close\r\n" in answer_bytes
                writer.close()
            assert await asyncio.to_thread(broker.wait) == 0
            names = [e["event"] for e in broker.events() if e["event"] != "broker.embed_token"]
            assert names == ["broker.started", "broker.draining", "broker.stopped"]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    async def test_O6_ends_at_once_at_a_second_signal(
        self, tmp_path: Path, tree: Tree, number: signal.Signals
    ) -> None:
        """Who cannot wait asks twice: exit code 128 + the number, long before the drain is over.

        Within a second it is the same wish: `timeout` sends it to the process and to its group.
        """
        slow = merged(tree, {"server.drain_lead": "10m", "server.drain": "10m"})
        with Broker.configured(tmp_path, slow) as broker:
            broker.send(number)
            broker.wait_for(lambda: broker.events("broker.draining"))
            assert end_impatiently(broker, number) == 128 + number
            assert broker.events("broker.stopped") == []
            assert len(broker.events("broker.aborted")) == 1

    async def test_obeys_a_signal_that_meets_the_start(self, tmp_path: Path, tree: Tree) -> None:
        """Whoever has read "started" may signal: no signal finds its default in force."""
        with Broker.configured(tmp_path, tree) as broker:
            broker.send(signal.SIGHUP)
            assert broker.end() == 0


def end_impatiently(broker: Broker, number: signal.Signals) -> int:
    """Ask again after more than a second; returns the exit code."""
    time.sleep(1.1)  # what comes earlier is the same wish
    return broker.end(number)


def accepts(broker: Broker) -> bool:
    """Whether the data listener takes connections."""
    host, port = broker.url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


RELOADS = 'broker_config_reloads_total{{outcome="{}"}}'


async def reloaded(broker: Broker, to: Tree | str) -> dict[str, Any]:
    """Replace the configuration and reload; returns the event that says how it went."""
    path = broker.folder / "broker.toml"
    write(path, to if isinstance(to, str) else toml(to))
    return await asyncio.to_thread(broker.reload)


async def operator_gets(caller: Caller, secret: str) -> int:
    """Ask for a visitor's sessions as the operator; returns the status."""
    url = f"{caller.admin_url}/v1/sessions?fingerprint={visitor(0)}"
    async with caller.http.get(url, headers={"api-secret": secret}) as answer:
        return answer.status


class TestReload:
    async def test_O7_takes_over_a_rotated_admin_secret(self, tmp_path: Path, tree: Tree) -> None:
        """The file changed: the old secret opens nothing any more.

        Sees a reload that leaves the operator's clients out.
        """
        admin = secret_file(tmp_path / "admin")
        old = secret_in(admin)
        with Broker.configured(tmp_path, merged(tree, {"admin.secret_file": admin})) as broker:
            async with Caller(broker, client_secret(tree)) as caller:
                assert await operator_gets(caller, old) == 200
                new = secret_in(secret_file(tmp_path / "admin"))
                await until(lambda: len(broker.events("broker.reloaded")) == 1)
                assert [await operator_gets(caller, s) for s in (old, new)] == [401, 200]

    async def test_a_failed_one_is_told_until_it_is_mended(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """By a gauge, so that an alert lasts as long as the fault; a defect counts as well."""
        with Broker.configured(tmp_path, tree) as broker:
            async with Caller(broker, client_secret(tree)) as caller:
                seen = [await caller.metric("broker_config_reload_failed")]
                for text in ("[server\n", toml(tree)):
                    await reloaded(broker, text)
                    seen.append(await caller.metric("broker_config_reload_failed"))
        assert seen == [0, 1, 0]

    async def test_O7_loses_no_request(self, tmp_path: Path, tree: Tree) -> None:
        """SIGHUP under load: clients and keys rotate without a gap, and every token verifies."""
        in_use = [client_secret(tree)]
        keys = {name: secret_file(tmp_path / name) for name in ("k1", "k2")}
        tables = {name: {"secret_file": path} for name, path in keys.items()}
        second = {"secret_file": secret_file(tmp_path / "second"), "agents": ["*"]}
        tokens: set[str] = set()
        current = merged(tree, {"issuer.local.keys.k1": tables["k1"]})
        current = put(current, "issuer.local.signing_key", "k1")
        with Broker.configured(tmp_path, current) as broker:
            async with Caller(broker, "") as caller:

                async def request_token(number: int) -> int:
                    status, body, _ = await caller.request_token(
                        visitor(number), secret=in_use[0], fresh=True
                    )
                    if status == 200:
                        tokens.add(body["data"]["token"])
                    return status

                load = Load(request_token)
                async with load.running():
                    await load.more()
                    current = put(current, "clients.second", second)
                    await reloaded(broker, current)
                    in_use[0] = secret_in(second["secret_file"])
                    await load.more()
                    current = put(current, "clients", {"second": second})
                    await reloaded(broker, current)
                    assert not await caller.valid(client_secret(tree))
                    current = put(current, "issuer.local.keys.k2", tables["k2"])
                    await reloaded(broker, current)
                    await load.more()
                    current = put(current, "issuer.local.signing_key", "k2")
                    assert (await reloaded(broker, current))["needs_restart"] == []
                    await load.more()
                assert load.failed == []
                assert await caller.metric(RELOADS.format("success")) == 4
        by_key: dict[str, set[str]] = {name: set() for name in keys}
        for token in tokens:
            kid = jwt.get_unverified_header(token)["kid"]
            claims = jwt.decode(token, secret_in(keys[kid]), ["HS256"], audience="embed")
            by_key[kid].add(claims["sub"])
        assert by_key == {"k1": {AGENT}, "k2": {AGENT}}

    async def test_O7_changes_nothing_when_the_file_is_broken(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """All or nothing: good parts of a bad file are not used; counted, and one line each."""
        secret = client_secret(tree)
        other = {"secret_file": secret_file(tmp_path / "other"), "agents": ["*"]}
        with Broker.configured(tmp_path, tree) as broker:
            async with Caller(broker, secret) as caller:

                async def request_token(number: int) -> int:
                    return (await caller.request_token(visitor(number), fresh=True))[0]

                load = Load(request_token)
                bad = put(put(tree, "clients", {"other": other}), "limits.agent.rate", 0)
                weak = put(put(tree, "clients", {"other": other}), "issuer.local.keys", {})
                async with load.running():
                    told = [
                        await reloaded(broker, bad),
                        await reloaded(broker, weak),
                        await reloaded(broker, "[server\n"),
                    ]
                    await load.more()
                    assert await caller.valid(secret)
                    assert not await caller.valid(secret_in(other["secret_file"]))
                assert load.failed == []
                assert await caller.metric(RELOADS.format("success")) == 0
                assert await caller.metric(RELOADS.format("failure")) == 3
            assert [event["level"] for event in told] == ["error"] * 3
            assert told[0]["error"].startswith("limits.agent: rate must be")
            assert told[1]["error"].startswith("issuer.local.keys: no key to sign with")
            assert "is not valid TOML" in told[2]["error"]
            assert broker.events("broker.reload_failed") == told

    async def test_L11_puts_other_limits_in_force_at_once(self, tmp_path: Path, tree: Tree) -> None:
        """Raised, lowered, broken: the next request shows what holds; what was spent stays so."""
        per_hour = {"rate": 1, "per": "1h"}

        def with_burst(burst: int) -> str:
            limited = put(tree, "limits.fingerprint", {**per_hour, "burst": burst})
            return write(tmp_path / "broker.toml", toml(limited))

        with Broker("--config", with_burst(2), logs=tmp_path) as broker:
            async with Caller(broker, client_secret(tree)) as caller:

                async def request_token() -> tuple[int, str, str]:
                    status, _, answer = await caller.request_token(visitor(1))
                    head = answer.headers
                    return status, head["X-RateLimit-Limit"], head["X-RateLimit-Remaining"]

                assert [await request_token() for _ in range(3)] == [
                    (200, "2", "1"),
                    (200, "2", "0"),
                    (429, "2", "0"),
                ]
                with_burst(4)
                broker.reload()
                assert [await request_token() for _ in range(3)] == [
                    (200, "4", "1"),
                    (200, "4", "0"),
                    (429, "4", "0"),
                ]
                with_burst(0)
                assert broker.reload()["event"] == "broker.reload_failed"
                assert await request_token() == (429, "4", "0")
                with_burst(1)
                broker.reload()
                status, _, answer = await caller.request_token(visitor(1))
                assert (status, answer.headers["X-RateLimit-Limit"]) == (429, "1")
                assert 3500 < int(answer.headers["Retry-After"]) <= 3600

    async def test_follows_the_format_of_fingerprints(self, tmp_path: Path, tree: Tree) -> None:
        """It is among the limits, so it follows a reload, too."""
        with Broker.configured(tmp_path, tree) as broker:
            async with Caller(broker, client_secret(tree)) as caller:
                assert (await caller.request_token("alice"))[0] == 400
                loose = put(tree, "limits.fingerprint_format", "any")
                write(tmp_path / "broker.toml", toml(loose))
                broker.reload()
                assert (await caller.request_token("alice"))[0] == 200

    async def test_names_what_needs_a_restart(self, tmp_path: Path, tree: Tree) -> None:
        """Sections that a running process cannot follow are in the event, and left as they were."""
        with Broker.configured(tmp_path, tree) as broker:
            changed = merged(
                tree,
                {
                    "server.deadline": "7s",
                    "reuse.enabled": False,
                    "issuer.local.audience": "others",
                    "log.level": "debug",
                },
            )
            write(tmp_path / "broker.toml", toml(changed))
            assert broker.reload()["needs_restart"] == [
                "server",
                "reuse",
                "issuer.local.audience",
            ]
            async with Caller(broker, client_secret(tree)) as caller:
                token = await caller.token(visitor(1))
                assert await caller.token(visitor(1)) == token
            told = broker.logged("broker.embed_token", 2)
            assert [event["level"] for event in told] == ["info", "debug"]

    def test_tells_what_the_environment_overrides(self, tmp_path: Path, tree: Tree) -> None:
        """At the start and at each reload; a flag comes before both, so nothing is said of it."""
        path = write(tmp_path / "broker.toml", toml(put(tree, "server.drain", "9s")))
        variables = {"BROKER_SERVER__DRAIN": "5s", "BROKER_SERVER__LISTEN": "127.0.0.1:1"}
        flags = ("--listen", "127.0.0.1:0")
        with Broker("--config", path, *flags, logs=tmp_path, **variables) as broker:
            broker.reload()
            told = broker.events("broker.file_overridden")
            names = [event["event"] for event in broker.events()]
        assert [event["variables"] for event in told] == [
            {"server.drain": "BROKER_SERVER__DRAIN"}
        ] * 2
        noted = "broker.file_overridden"
        assert names == [noted, "broker.started", noted, "broker.reloaded"]

    @pytest.mark.parametrize(
        "setting", ["admin.secret_file", "store.encryption_key_file", "store.password_file"]
    )
    def test_fails_where_the_next_restart_would(
        self, tmp_path: Path, tree: Tree, setting: str
    ) -> None:
        """A file that cannot be read is told now, also of a section that waits for a restart.

        A reload that says nothing but `needs_restart` sends the operator into a restart that ends
        with 78, and stays there.
        """
        with Broker.configured(tmp_path, tree) as broker:
            path = write(tmp_path / "broker.toml", toml(put(tree, setting, "/nowhere/secret")))
            failed = broker.reload()
            assert (failed["event"], failed["error"]) == (
                "broker.reload_failed",
                f"{setting}: cannot read /nowhere/secret: No such file or directory",
            )
            write(Path(path), toml(tree))
            assert broker.reload()["needs_restart"] == []

    def test_names_a_sealing_key_that_has_changed(self, tmp_path: Path, tree: Tree) -> None:
        """It seals what is shared from the next start on; nothing else in that file is noticed."""
        sealing = tmp_path / "sealing"
        nobody = {"url": f"unix://{tmp_path}/nobody", "encryption_key_file": secret_file(sealing)}
        tree = put(tree, "store", nobody)
        with Broker.configured(tmp_path, tree) as broker:
            assert broker.reload()["needs_restart"] == []
            secret_file(sealing)
            reloaded = broker.wait_for(lambda: broker.events("broker.reloaded")[1:])
            assert reloaded[0]["needs_restart"] == ["store.encryption_key"]

    async def test_D7_a_sealing_key_opens_the_state_file_from_then_on(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """At once, and no start is needed: a crash right after it loses nothing."""
        sealing = tmp_path / "sealing"
        store = {"url": f"sqlite://{tmp_path}/state.db"}
        tree = put(tree, "store", {**store, "encryption_key_file": secret_file(sealing)})
        with Broker.configured(tmp_path, tree) as broker:
            async with Caller(broker, client_secret(tree)) as caller:
                token = await caller.token(visitor(1))
                secret_file(sealing)
                look = partial(broker.logged, "broker.reloaded", 1)
                assert (await asyncio.to_thread(look))[0]["needs_restart"] == []
                async with caller.http.post(
                    f"{caller.url}/v1/revoke",
                    data={"token": await caller.token(visitor(2))},
                    headers={"api-secret": caller.secret},
                ) as answer:
                    assert answer.status == 200  # the keys were written before it
                assert await asyncio.to_thread(broker.end, signal.SIGKILL) == -signal.SIGKILL
        with Broker.configured(tmp_path, tree) as broker:
            async with Caller(broker, client_secret(tree)) as caller:
                assert await caller.token(visitor(1)) == token

    async def test_O7_happens_by_itself_when_a_secret_changes(
        self, tmp_path: Path, tree: Tree
    ) -> None:
        """A rotated file is in force within about a second, without a signal.

        While the new file is half written, the old secret stays in force.
        """
        file = Path(tree["clients"]["web"]["secret_file"])
        old = secret_in(str(file))
        with Broker.configured(tmp_path, tree) as broker:
            async with Caller(broker, old) as caller:
                truncate(file)
                broker.wait_for(lambda: broker.events("broker.reload_failed"))
                assert await caller.valid(old)
                new = secret_in(secret_file(file))
                changed = time.monotonic()
                await until_true(lambda: caller.valid(new))
                print(f"\nin force after {time.monotonic() - changed:.2f} s")
                assert not await caller.valid(old)
            broker.wait_for(lambda: broker.events()[-1]["event"] == "broker.reloaded")
            events = [e["event"] for e in broker.events() if e["event"] != "broker.embed_token"]
            assert events == [
                "broker.started",
                "broker.secret_files_changed",
                "broker.reload_failed",
                "broker.secret_files_changed",
                "broker.reloaded",
            ]


def truncate(file: Path) -> None:
    """Begin to write a file anew, as an editor does."""
    file.write_bytes(b"")


@pytest.fixture
def lasting(tmp_path: Path, tree: Tree) -> Tree:
    """A configuration with a state file, and an agent whose visitors get two requests an hour."""
    return merged(
        tree,
        {
            "store.url": f"sqlite://{tmp_path / 'state.db'}",
            "limits.fingerprint.overrides.SCARCE": {"rate": 1, "per": "1h", "burst": 2},
        },
    )


class TestStateFile:
    async def test_V12_restart_under_load_mints_nothing_anew(
        self, tmp_path: Path, lasting: Tree
    ) -> None:
        """The same tokens after it, no mint, and an exhausted bucket stays exhausted."""
        secret = client_secret(lasting)
        visitors = 40
        held: dict[int, str] = {}
        changed: list[int] = []
        with Broker.configured(tmp_path, lasting) as before:
            async with Caller(before, secret) as caller:
                for number in range(visitors):
                    held[number] = await caller.token(visitor(number))
                for expected in (200, 200, 429):
                    assert (await caller.request_token(visitor(1), agent="SCARCE"))[0] == expected

                async def request_token(number: int) -> int | None:
                    status, body, answer = await caller.request_token(visitor(number))
                    if status == 200 and body["data"]["token"] != held[number]:
                        changed.append(number)
                    return None if answer.headers.get("Connection") == "close" else status

                load = Load(request_token)
                async with load.running():
                    await load.more()
                    assert await asyncio.to_thread(before.end) == 0
        assert (tmp_path / "state.db").stat().st_mode & 0o777 == 0o600
        sealed = (tmp_path / "state.db").read_bytes()
        assert [t for t in held.values() if t.encode() in sealed] == []
        with Broker.configured(tmp_path, lasting) as after:
            async with Caller(after, secret) as caller:
                for number in range(visitors):
                    assert await caller.token(visitor(number)) == held[number]
                assert (await caller.request_token(visitor(1), agent="SCARCE"))[0] == 429
                assert (await caller.request_token(visitor(2), agent="SCARCE"))[0] == 200
                assert await caller.metric(MINTED) == 1
            assert after.events("broker.state_file_opened")[0]["tokens"] == visitors + 1
        assert changed == []

    async def test_V12_a_mint_that_its_caller_has_left_is_kept(
        self, tmp_path: Path, lasting: Tree
    ) -> None:
        """It is paid for: the drain waits for it, and the next start hands it out.

        Sees a drain that does not wait for flights without a caller.
        """
        async with FakeVendor(VendorSettings(latency=2.0)) as vendor:
            paid = write(tmp_path / "vendor", vendor.secret.reveal() + "\n")
            relay = {
                "kind": "upstream",
                "upstream": {"base_url": vendor.url, "api_secret_files": [paid]},
            }
            tree = put(lasting, "issuer", relay)
            with Broker.configured(tmp_path, tree) as before:
                async with Caller(before, client_secret(tree)) as caller:
                    asking = asyncio.ensure_future(caller.request_token(visitor(1)))
                    await until(lambda: len(vendor.journal.calls) == 1)
                    asking.cancel()
                    await asyncio.wait([asking])
                    assert await asyncio.to_thread(before.end) == 0
            with Broker.configured(tmp_path, tree) as after:
                async with Caller(after, client_secret(tree)) as caller:
                    assert await caller.token(visitor(1))
            assert len(vendor.journal.calls) == 1

    async def test_outlives_a_start_that_failed(self, tmp_path: Path, lasting: Tree) -> None:
        """A start whose port is taken leaves the file as it was: the next one finds everything."""
        secret = client_secret(lasting)
        with Broker.configured(tmp_path, lasting) as broker:
            async with Caller(broker, secret) as caller:
                token = await caller.token(visitor(1))
            assert broker.end() == 0
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            taken = put(lasting, "server.listen", f"127.0.0.1:{port}")
            path = write(tmp_path / "taken.toml", toml(taken))
            assert run("serve", "--config", path).returncode == 69
        with Broker.configured(tmp_path, lasting) as broker:
            async with Caller(broker, secret) as caller:
                assert await caller.token(visitor(1)) == token


class TestClientThatDoesNotRead:
    """It holds its connection, and nothing else."""

    @pytest.mark.parametrize("listener", ["data", "admin"])
    async def test_N1_it_delays_no_end_and_the_file_is_closed(
        self, tmp_path: Path, lasting: Tree, listener: str
    ) -> None:
        """Neither its own time-out nor that of the end decides: exit code 0, as without it."""
        with Broker.configured(tmp_path, put(lasting, "server.drain", "2s")) as broker:
            async with Caller(broker, client_secret(lasting)) as caller:
                await caller.token(visitor(1))
            with stuck(broker.url if listener == "data" else broker.admin_url):
                assert broker.end() == 0
            assert broker.events("broker.defect") == []
        assert not (tmp_path / "state.db-wal").exists(), "a close puts the log into the file"


@contextmanager
def stuck(url: str) -> Iterator[None]:
    """Ask and read no answer, until the listener has taken nothing for a second."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        client.settimeout(1.0)
        with suppress(TimeoutError):
            while True:
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: broker\r\n\r\n" * 100)
        yield


class TestUnixSocket:
    async def test_serves_and_survives_a_kill(self, tmp_path: Path, tree: Tree) -> None:
        """After kill -9 the next start takes the stale socket's place; a live one is left alone."""
        path = tmp_path / "s"
        unix = put(tree, "server.listen", f"unix:{path}")
        secret = client_secret(tree)
        with Broker.configured(tmp_path, unix) as broker:
            assert broker.url == f"unix:{path}"
            async with Caller(broker, secret) as caller:
                await caller.token(visitor(1))
                second = run("serve", "--config", str(tmp_path / "broker.toml"))
                assert second.returncode == 69
                assert b"in use; stop the other process" in second.stderr
                await caller.token(visitor(2))
            assert broker.end(signal.SIGKILL) == -signal.SIGKILL
        assert path.is_socket()
        with Broker.configured(tmp_path, unix) as broker:
            async with Caller(broker, secret) as caller:
                await caller.token(visitor(1))
            assert broker.end() == 0

    def test_is_in_the_curl_line_of_development_mode(self, tmp_path: Path) -> None:
        """The line works there as well."""
        path = tmp_path / "s"
        with Broker(
            "--dev", "--listen", f"unix:{path}", "--admin-listen", "127.0.0.1:0", logs=tmp_path
        ) as broker:
            said, line = introduction(broker)
        assert said["url"] == f"unix:{path}"
        assert shlex.split(line)[2:5] == [
            "--unix-socket",
            str(path),
            "http://localhost/v1/embed-tokens/request",
        ]


def command_line(number: int) -> str:
    """Return what every user of the machine sees of a process."""
    return read_of(number, "cmdline")


async def test_G7_process_list_shows_no_secret(tmp_path: Path, tree: Tree) -> None:
    """Neither the command line nor the log of a working broker has a secret, key or token."""
    loud = put(tree, "log.level", "debug")
    secret = client_secret(tree)
    key = secret_in(tree["issuer"]["local"]["keys"]["one"]["secret_file"])
    with Executed.configured(tmp_path, loud) as broker:
        async with Caller(broker, secret) as caller:
            token = await caller.token(visitor(0xCAFE))
            await caller.token(visitor(0xCAFE))
        assert len(broker.logged("broker.embed_token", 2)) == 2
        seen = broker.log() + command_line(broker.process.pid)
    canaries = {"secret": secret, "key": key, "token": token, "visitor": visitor(0xCAFE)}
    assert [name for name, canary in canaries.items() if canary in seen] == []
