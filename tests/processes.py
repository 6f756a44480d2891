"""Brokers as their operators run them: real processes, with an environment that a test chose."""

import asyncio
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp
import forked

from broker.config.settings import LimitsSettings

AGENT = "A78WKV4515"
TIMEOUT = 120.0
"""Seconds after which something that should happen is taken not to: generous, machines are busy."""

ABSENT = Path(__file__).with_name("absent")

T = TypeVar("T")
Tree = dict[str, Any]


def environment(**variables: str) -> dict[str, str]:
    """Return what a broker is given: nothing of this process but where Python finds things.

    And what coverage.py measures, where this process is measured.  Packages that only tests need
    are kept from it.
    """
    kept = {k: os.environ[k] for k in ("PATH", "COVERAGE_PROCESS_CONFIG") if k in os.environ}
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ABSENT))))
    return {**kept, "PYTHONPATH": path, **variables}


def run(
    *arguments: str, stdin: bytes = b"", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """Run one command to its end."""
    given = environment(**variables)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started("-m", "broker", *arguments, env=given, **pipes) as process:
        try:
            out, told = process.communicate(stdin, TIMEOUT)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.wait(), out, told)


def started(*arguments: str, env: Mapping[str, str], **options: Any) -> subprocess.Popen[bytes]:
    """Start `python -W error *arguments`, without the imports where that makes no difference."""
    if forked.starts_alike(env):
        return forked.Forked(arguments, env=env, **options)
    return subprocess.Popen([sys.executable, "-W", "error", *arguments], env=env, **options)


def toml(tree: Tree) -> str:
    """Write a tree as a configuration file."""
    return "\n".join(_lines(tree, ()))


def _lines(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    plain = {name: value for name, value in tree.items() if not isinstance(value, Mapping)}
    if path:
        yield f"[{'.'.join(json.dumps(part) for part in path)}]"
    for name, value in plain.items():
        yield f"{json.dumps(name)} = {_scalar(value)}"
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _lines(value, (*path, name))


def _scalar(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value)


def write(path: Path, text: str) -> str:
    """Replace a file at once, as a deploy does; returns its path as text."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
    return str(path)


def secret_file(path: Path) -> str:
    """Make a file with a secret that nobody knows yet; returns its path as text."""
    return write(path, secrets.token_urlsafe(36) + "\n")


def secret_in(path: str) -> str:
    """Return the secret in a file."""
    return Path(path).read_text(encoding="utf-8").removesuffix("\n")


def good(folder: Path) -> Tree:
    """Return the smallest configuration that serves, with its secret files in `folder`."""
    return {
        "server": {"listen": "127.0.0.1:0", "drain": "10s", "drain_lead": "0s"},
        "admin": {"listen": "127.0.0.1:0"},
        "clients": {"web": {"secret_file": secret_file(folder / "web"), "agents": ["*"]}},
        "issuer": {"local": {"keys": {"one": {"secret_file": secret_file(folder / "one")}}}},
    }


def far_away() -> Tree:
    """Return changes to a tree, by path: every limit that is on by default lets all pass."""
    shipped = LimitsSettings()
    names = [n for n in shipped.__struct_fields__ if hasattr(getattr(shipped, n), "burst")]
    return {f"limits.{name}": {"rate": 1_000_000, "burst": 1_000_000} for name in names}


def put(tree: Tree, dotted: str, value: object) -> Tree:
    """Return the tree with one key set, by its path."""
    name, _, rest = dotted.partition(".")
    inner = tree.get(name, {})
    return {
        **tree,
        name: put(inner if isinstance(inner, dict) else {}, rest, value) if rest else value,
    }


def merged(tree: Tree, changes: Mapping[str, object]) -> Tree:
    """Return the tree with several keys set, by their paths."""
    for dotted, value in changes.items():
        tree = put(tree, dotted, value)
    return tree


class Broker:
    """A running broker.  Leaving the context ends it; what it logged stays."""

    program: tuple[str, ...] = ("-m", "broker", "serve")
    """What Python runs."""

    is_executed = False
    """Whether an interpreter is started for it: for tests of that, and of what the kernel shows."""

    def __init__(
        self, *arguments: str, logs: Path, prefix: Sequence[str] = (), **variables: str
    ) -> None:
        self.folder = logs
        self._logs = logs / f"log.{secrets.token_hex(4)}"
        began = time.perf_counter()
        with self._logs.open("wb") as out:
            options = {"stdout": subprocess.PIPE, "stderr": out, "env": environment(**variables)}
            if prefix or self.is_executed:
                command = [*prefix, sys.executable, "-W", "error", *self.program, *arguments]
                self.process = subprocess.Popen(command, **options)
            else:
                self.process = started(*self.program, *arguments, **options)
        try:
            self.started = self.wait_for(lambda: self.events("broker.started"))[0]
        except BaseException:
            self.process.kill()
            self.process.wait()
            self._close()
            raise
        self.seconds_to_start = time.perf_counter() - began

    @classmethod
    def configured(
        cls, folder: Path, tree: Tree, prefix: Sequence[str] = (), **variables: str
    ) -> Self:
        """Start one on a configuration file in `folder`; `prefix` is a command that runs it."""
        path = write(folder / "broker.toml", toml(tree))
        return cls("--config", path, logs=folder, prefix=prefix, **variables)

    @property
    def url(self) -> str:
        return str(self.started["url"])

    @property
    def admin_url(self) -> str:
        return str(self.started["admin_url"])

    def log(self) -> str:
        """Return everything it has logged."""
        return self._logs.read_text(encoding="utf-8")

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the events it has logged, of one name or all of them."""
        whole, _, _ = self.log().rpartition("\n")  # the last line may still be on its way
        lines = [line for line in whole.splitlines() if line.strip()]
        events = [_event(line) for line in lines]
        return [event for event in events if name in (None, event["event"])]

    def logged(self, name: str, count: int) -> list[dict[str, Any]]:
        """Return the events of one name once there are so many: an answer waits for no line."""
        return self.wait_for(lambda: len(self.events(name)) >= count and self.events(name)) or []

    def wait_for(self, look: Callable[[], T]) -> T:
        """Return what `look` finds as soon as it finds something."""

        def alive() -> T:
            ended = self.process.poll()
            found = look()
            assert found or ended is None, f"exit code {ended}\n{self.log()}"
            return found

        return wait_for(alive, self.log)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def reload(self) -> dict[str, Any]:
        """Send SIGHUP; returns the event that says how it went."""
        before = len(self._reloads())
        self.send(signal.SIGHUP)
        return self.wait_for(lambda: self._reloads()[before:])[0]

    def _reloads(self) -> list[dict[str, Any]]:
        names = {"broker.reloaded", "broker.reload_failed"}
        return [event for event in self.events() if event["event"] in names]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        self.send(number)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()


def _event(line: str) -> dict[str, Any]:
    """Read a line of either format; the console's is for people, so only its names are read."""
    if line.startswith("{"):
        event: dict[str, Any] = json.loads(line)
        return event
    plain = re.sub(r"\x1b\[[0-9;]*m", "", line)
    words = plain.split()
    fields = dict(word.split("=", 1) for word in words if "=" in word)
    return {"event": next((w for w in words if w.startswith("broker.")), ""), **fields}


def read_of(pid: int, name: str) -> str:
    """Return what the kernel tells of a process, e.g. `stat`; nothing where it has just ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_alive(pid: int) -> bool:
    """Whether this process exists, and has not ended."""
    state = read_of(pid, "stat").rpartition(")")[2].split()[:1]
    return bool(state) and state[0] not in "ZX"


def children_of(pid: int) -> set[int]:
    """Return the processes that this one has started, by whichever of its threads."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return set()
    told = [read_of(pid, f"task/{thread.name}/children") for thread in threads]
    return {int(child) for child in " ".join(told).split()}


def wait_for(look: Callable[[], T], explain: Callable[[], str] = str) -> T:
    """Poll until `look` returns something; for processes, whose time is not ours."""
    began = time.monotonic()
    while time.monotonic() < began + TIMEOUT:
        found = look()
        if found:
            return found
        time.sleep(_pause(began))
    raise AssertionError(f"waited in vain: {explain()}")


async def until_true(look: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that has to be asked for."""
    began = time.monotonic()
    async with asyncio.timeout(TIMEOUT):
        while not await look():  # noqa: ASYNC110 - as below
            await asyncio.sleep(_pause(began))


async def until(look: Callable[[], bool]) -> None:
    """Wait for something that other tasks bring about."""
    began = time.monotonic()
    async with asyncio.timeout(TIMEOUT):
        while not look():  # noqa: ASYNC110 - what is looked at is in another process
            await asyncio.sleep(_pause(began))


def _pause(began: float) -> float:
    """Return the seconds to the next look: a tenth of the wait so far, for a look takes CPU."""
    return min(max((time.monotonic() - began) / 10, 0.005), 0.05)


class Executed(Broker):
    """A running broker for which an interpreter was started."""

    is_executed = True


class Caller:
    """A backend that asks a broker for tokens."""

    def __init__(self, broker: Broker, secret: str) -> None:
        socket = broker.url.removeprefix("unix:") if broker.url.startswith("unix:") else None
        self.url = "http://broker" if socket else broker.url
        self.admin_url = broker.admin_url
        self.secret = secret
        connector = aiohttp.UnixConnector(socket) if socket else aiohttp.TCPConnector(limit=0)
        self.http = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT)
        )

    async def request_token(
        self,
        fingerprint: str,
        *,
        agent: str = AGENT,
        secret: str | None = None,
        fresh: bool = False,
    ) -> tuple[int, dict[str, Any], aiohttp.ClientResponse]:
        """Ask for a token; returns status, body and the answer itself."""
        async with self.http.post(
            f"{self.url}/v1/embed-tokens/request",
            json={"agent_id": agent, "fingerprint": fingerprint, "fresh": fresh},
            headers={"api-secret": secret or self.secret},
        ) as answer:
            return answer.status, await answer.json(), answer

    async def token(self, fingerprint: str, *, agent: str = AGENT, fresh: bool = False) -> str:
        """Ask for a token and require one."""
        status, body, _ = await self.request_token(fingerprint, agent=agent, fresh=fresh)
        assert status == 200, body
        token: str = body["data"]["token"]
        return token

    async def valid(self, secret: str) -> bool:
        """Whether the broker knows this secret."""
        url = f"{self.url}/v1/validate"
        async with self.http.post(url, headers={"api-secret": secret}) as answer:
            body = await answer.json()
        return body == {"valid": True}

    async def ready(self) -> int:
        """Return the status of the admin listener's /readyz."""
        async with self.http.get(f"{self.admin_url}/readyz") as answer:
            return answer.status

    async def metric(self, sample: str) -> float:
        """Return the value of one sample, named as in the exposition."""
        async with self.http.get(f"{self.admin_url}/metrics") as answer:
            text = await answer.text()
        found = [line for line in text.splitlines() if line.startswith(f"{sample} ")]
        assert len(found) == 1, f"{sample} in\n{text}"
        return float(found[0].split()[-1])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.close()
