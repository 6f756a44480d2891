"""The real half of `chaos`: processes that are stopped, killed, misled, and a checker beside them.

A broker with two workers on a Valkey, before a fake vendor, its log read through a pipe.  One harm
after the other, at random, each for a random time; then a while of peace.  Everything is a process
of its own, on loopback or a Unix socket, and every signal goes to a pid that was started here.
"""

import asyncio
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import jwt
from vendor_process import FAULTS

TESTS = Path(__file__).resolve().parent.parent
sys.path += [str(TESTS), str(TESTS / "fleet")]

from faked_time import Clock, store_with_clock  # noqa: E402
from processes import toml, write  # noqa: E402
from servers import StoreServer, free_port  # noqa: E402

from broker.testing.vendor.mint import visitor_mark  # noqa: E402

AGENT = "A78WKV4515"
TOKEN_PATH = "/v1/embed-tokens/request"

ALLOWED = 120
"""Calls that the vendor allows in any minute."""

DOCUMENTED = frozenset({200, 429, 502, 503, 504})
"""Statuses that a well-formed request of a known client may get, whatever is broken."""

KNOWN, NEWCOMERS = 300, 0.1
"""Visitors who come again and again, and the share of requests of somebody new."""

RATE = 60.0
"""Requests a second: half of what matters happens between them."""

SCRAPE = 5.0
"""Seconds between two looks at the metrics."""

AFTERMATH = 5.0
"""Seconds after a worker was stopped or killed in which its callers may lose their connection."""

SETTLED = 1 / 6
"""The share of the run after which memory is taken as the level to be kept."""

GROWTH = 1.25
"""Objects of one type, late against early: what leaks grows with the time, five times over."""

GROWN = 2000
"""Objects below which growth is noise: caches fill, tables double."""

RSS_GROWTH = 24 * 2**20
"""Bytes that a process may grow after it has settled: tables that double, fragments."""

COUNT_OBJECTS = """
import collections, gc, os, signal
def _count(*_):
    kinds = collections.Counter(type(thing).__name__ for thing in gc.get_objects())
    path = os.path.join(os.environ["CHAOS_COUNTS"], str(os.getpid()))
    with open(path + ".new", "w") as out:
        out.writelines(f"{n} {kind}\\n" for kind, n in kinds.items())
    os.rename(path + ".new", path)
signal.signal(signal.SIGUSR1, _count)
"""
"""Loaded by every Python of the broker at its start: counts its live objects when it is asked."""


class Broker:
    """The broker's supervisor, and what it was given."""

    def __init__(self, folder: Path, store: StoreServer, vendor: dict[str, str]) -> None:
        self.folder = folder
        self.secret_file = folder / "client"
        self.secret = secrets.token_urlsafe(36)
        write(self.secret_file, self.secret)
        self.key_file = folder / "vendor_key"
        write(self.key_file, vendor["secret"])
        self.url = f"http://127.0.0.1:{free_port()}"
        self.admin_url = f"http://127.0.0.1:{free_port()}"
        self.config = folder / "broker.toml"
        self.tree: dict[str, Any] = {
            "server": {
                "listen": self.url.removeprefix("http://"),
                "workers": 2,
                "drain": "10s",
                "drain_lead": "0s",
            },
            "admin": {"listen": self.admin_url.removeprefix("http://")},
            "clients": {"web": {"secret_file": str(self.secret_file), "agents": ["*"]}},
            "issuer": {
                "kind": "upstream",
                "upstream": {
                    "base_url": vendor["url"],
                    "api_secret_files": [str(self.key_file)],
                },
            },
            "limits": {
                "fingerprint": {"rate": 600, "per": "60s", "burst": 100},
                "fingerprint_mints": {"rate": 60, "per": "60s", "burst": 20},
            },
            "store": {"url": store.url, "encryption_key": secrets.token_urlsafe(48)},
            "log": {"level": "debug"},
        }
        self.counts = folder / "counts"
        self.counts.mkdir()
        hooks = folder / "hooks"
        hooks.mkdir()
        (hooks / "sitecustomize.py").write_text(COUNT_OBJECTS, encoding="utf-8")
        self._environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(hooks),
            "CHAOS_COUNTS": str(self.counts),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, log: Path) -> None:
        """Run it, with a pipe as its standard error that somebody reads already."""
        write(self.config, toml(self.tree))
        command = [sys.executable, "-m", "broker", "serve", "--config", str(self.config)]
        with log.open("wb", buffering=0) as pipe:
            self.process = subprocess.Popen(
                command, stderr=pipe, stdout=subprocess.DEVNULL, env=self._environment
            )

    @property
    def pid(self) -> int:
        """The supervisor's."""
        assert self.process is not None
        return self.process.pid

    def workers(self) -> list[int]:
        """Return the pids of its children, by what the kernel knows."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in children.read_text(encoding="ascii").split()]


class LogReader:
    """Reads the broker's log into a file; can be stopped, or die and come back."""

    def __init__(self, folder: Path) -> None:
        self.pipe, self._file = folder / "log.pipe", folder / "log"
        os.mkfifo(self.pipe)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Read on."""
        with self._file.open("ab") as out:
            self._process = subprocess.Popen(["cat", str(self.pipe)], stdout=out)

    @property
    def pid(self) -> int:
        """Of the process that reads."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Be gone: the next write meets a broken pipe."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def events(self) -> Counter[str]:
        """Count what was written, by event; a line that is torn counts as `torn`."""
        found: Counter[str] = Counter()
        for line in self._file.read_bytes().splitlines():
            try:
                found[json.loads(line)["event"]] += 1
            except (ValueError, KeyError):
                found["torn"] += 1
        return found


class Checker:
    """A crowd that asks all the time, and looks at what it is told."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._chance = random.Random(2)
        self._known = [secrets.token_hex(16) for _ in range(KNOWN)]
        self._tasks: set[asyncio.Task[None]] = set()
        self._samples: dict[str, float] = {}
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.hurt: list[tuple[float, float]] = []
        """From when to when a worker was stopped or dying, by the monotonic clock."""
        self.lost: list[tuple[float, float, str]] = []
        self.memory: list[tuple[float, dict[str, int]]] = []
        self.objects: list[tuple[float, dict[int, Counter[str]]]] = []

    async def request_for_ever(self) -> None:
        """Let one visitor after the other ask, whatever became of those before."""
        timeout = aiohttp.ClientTimeout(total=25)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
            try:
                while True:
                    self._send_next(http)
                    await asyncio.sleep(self._chance.expovariate(RATE))
            finally:  # the session must not close under those who wait
                await asyncio.gather(*self._tasks)

    def _send_next(self, http: aiohttp.ClientSession) -> None:
        newcomer = self._chance.random() < NEWCOMERS
        visitor = secrets.token_hex(16) if newcomer else self._chance.choice(self._known)
        task = asyncio.create_task(self._request_token(http, visitor))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _request_token(self, http: aiohttp.ClientSession, visitor: str) -> None:
        asked = time.monotonic()
        body = {"agent_id": AGENT, "fingerprint": visitor}
        headers = {"api-secret": self._broker.secret}
        try:
            async with http.post(
                self._broker.url + TOKEN_PATH, json=body, headers=headers
            ) as answer:
                said = await answer.json()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.answers[type(error).__name__] += 1
            self.lost.append((asked, time.monotonic(), repr(error)))
            return
        self.answers[str(answer.status)] += 1
        if answer.status not in DOCUMENTED:
            self.wrong.append(f"status {answer.status}: {said}")
        if answer.status == 200:
            self._check_token(said["data"], visitor)
        elif answer.status in (429, 503) and int(answer.headers["Retry-After"]) < 1:
            self.wrong.append("Retry-After below 1")

    def _check_token(self, data: dict[str, Any], visitor: str) -> None:
        """Require that token and session are this visitor's, and alive."""
        mark = visitor_mark(AGENT, visitor)
        claims = jwt.decode(data["token"], options={"verify_signature": False})
        if not data["session_id"].startswith(mark) or claims["sid"] != data["session_id"]:
            self.wrong.append(f"a token of somebody else: {data['session_id']} is not {mark}")
        if claims["exp"] <= time.time():
            self.wrong.append("an expired token")

    async def look_for_ever(self) -> None:
        """Scrape, compare with the last scrape, weigh the processes."""
        timeout = aiohttp.ClientTimeout(total=SCRAPE)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            while True:
                await asyncio.sleep(SCRAPE)
                try:
                    async with http.get(f"{self._broker.admin_url}/metrics") as answer:
                        self._compare(await answer.text())
                except (aiohttp.ClientError, TimeoutError) as error:
                    self.wrong.append(f"a scrape failed: {error!r}")
                await self._weigh()

    def _compare(self, text: str) -> None:
        """Require that no counter has gone back."""
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            base = name.partition("{")[0]
            if base.startswith("broker_") and base.endswith(("_total", "_count", "_bucket")):
                if float(value) < self._samples.get(name, 0.0):
                    self.wrong.append(f"{name} went back to {value}")
                self._samples[name] = float(value)

    async def _weigh(self) -> None:
        pids = [self._broker.pid, *self._broker.workers()]
        now = time.monotonic()
        self.memory.append((now, {str(pid): resident(pid) for pid in pids}))
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        await asyncio.sleep(1)
        counted = {int(file.name): _read_counts(file) for file in _counts(self._broker.counts)}
        self.objects.append((now, {pid: counted[pid] for pid in pids if pid in counted}))

    def excused(self, asked: float, ended: float) -> bool:
        """Whether a worker was being hurt while a request was under way."""
        return any(asked < till + AFTERMATH and ended > since for since, till in self.hurt)


Harm = Callable[[], Awaitable[None]]


class Harms:
    """What is done to the parts; each returns when it is over."""

    def __init__(
        self,
        store: StoreServer,
        clock: Clock,
        vendor: asyncio.subprocess.Process,
        broker: Broker,
        reader: LogReader,
        checker: Checker,
        chance: random.Random,
    ) -> None:
        self._store, self._clock, self._vendor = store, clock, vendor
        self._broker, self._reader, self._checker = broker, reader, checker
        self._chance = chance
        self._offset = 0
        self.done: Counter[str] = Counter()
        self._all: dict[str, Harm] = {
            "store stopped": lambda: self._stopped(store.pid, 0.2, 15),
            "vendor stopped": lambda: self._stopped(vendor.pid, 1, 40),
            "worker stopped": self._worker_stopped,
            "log reader stopped": lambda: self._stopped(reader.pid, 5, 30),
            "log reader gone": self._reader_gone,
            "worker killed": self._worker_killed,
            "reload": self._reload,
            "broken file": self._broken_file,
            "secret rewritten": self._rewritten,
            "vendor fault": self._vendor_fault,
            "store clock stepped": self._clock_stepped,
        }

    async def harm_for_ever(self) -> None:
        """Do one after the other, at times two at once."""
        while True:
            names = self._chance.sample(list(self._all), k=self._chance.choice((1, 1, 2)))
            self.done.update(names)
            await asyncio.gather(*(self._all[name]() for name in names))
            await asyncio.sleep(self._chance.uniform(1, 10))

    async def _stopped(self, pid: int, least: float, most: float) -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._chance.uniform(least, most))
        finally:
            with suppress(ProcessLookupError):  # whoever hangs may have been ended meanwhile
                os.kill(pid, signal.SIGCONT)

    async def _worker_stopped(self) -> None:
        since = time.monotonic()
        workers = self._broker.workers()
        if workers:
            await self._stopped(self._chance.choice(workers), 1, 20)
        self._checker.hurt.append((since, time.monotonic()))

    async def _worker_killed(self) -> None:
        now = time.monotonic()
        self._checker.hurt.append((now, now))
        workers = self._broker.workers()
        if workers:
            with suppress(ProcessLookupError):
                os.kill(self._chance.choice(workers), signal.SIGKILL)

    async def _reader_gone(self) -> None:
        self._reader.kill()
        await asyncio.sleep(self._chance.uniform(1, 10))
        self._reader.start()

    async def _reload(self) -> None:
        limits = self._broker.tree["limits"]["fingerprint"]
        limits["burst"] = self._chance.randint(80, 120)
        write(self._broker.config, toml(self._broker.tree))
        os.kill(self._broker.pid, signal.SIGHUP)

    async def _broken_file(self) -> None:
        write(self._broker.config, "[server]\nlisten = ???\n")
        os.kill(self._broker.pid, signal.SIGHUP)
        await asyncio.sleep(self._chance.uniform(1, 5))
        write(self._broker.config, toml(self._broker.tree))
        os.kill(self._broker.pid, signal.SIGHUP)

    async def _rewritten(self) -> None:
        self._broker.key_file.write_bytes(self._broker.key_file.read_bytes())
        write(self._broker.secret_file, self._broker.secret)

    async def _vendor_fault(self) -> None:
        await self._order(self._chance.choice(list(FAULTS)))
        await asyncio.sleep(self._chance.uniform(1, 12))
        await self._order("heal")

    async def _order(self, order: str) -> None:
        assert self._vendor.stdin is not None
        self._vendor.stdin.write(f"{order}\n".encode())
        await self._vendor.stdin.drain()

    async def _clock_stepped(self) -> None:
        self._offset += self._chance.choice((1, 5, 30, 3600, -5, -3600))
        self._clock.set(f"{self._offset:+d}s")


async def run(folder: Path, seconds: float, seed: int) -> list[str]:
    """Run it; returns what was wrong."""
    chance = random.Random(seed)
    with store_with_clock(folder) as (store, clock):
        async with AsyncExitStack() as stack:
            journal = folder / "journal"
            vendor, said = await stack.enter_async_context(_vendor(journal))
            reader = LogReader(folder)
            reader.start()
            stack.callback(reader.kill)
            broker = Broker(folder, store, said)
            broker.start(reader.pipe)
            stack.callback(_end, broker)
            await _ready(broker)
            checker = Checker(broker)
            harms = Harms(store, clock, vendor, broker, reader, checker, chance)
            began = time.monotonic()
            work = [
                asyncio.create_task(coroutine)
                for coroutine in (
                    checker.request_for_ever(),
                    checker.look_for_ever(),
                    harms.harm_for_ever(),
                )
            ]
            done, _ = await asyncio.wait(work, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            for task in done:
                task.result()  # a defect of this program ends it at once
            print(f"harms done                {dict(harms.done)}")
            os.kill(broker.pid, signal.SIGTERM)
            code = await asyncio.to_thread(broker.process.wait, 30)  # type: ignore[union-attr]
            return judge(checker, reader, journal, began, seconds, code)


def judge(
    checker: Checker, reader: LogReader, journal: Path, began: float, seconds: float, code: int
) -> list[str]:
    """Print the figures; returns what was wrong."""
    wrong = list(checker.wrong)
    calls = [float(line) for line in journal.read_text(encoding="ascii").split()]
    window = worst_window(calls)
    unexcused = [lost for lost in checker.lost if not checker.excused(lost[0], lost[1])]
    events = reader.events()
    print(f"answers                   {dict(checker.answers)}")
    print(f"connections lost          {len(checker.lost)}, without a worker hurt {len(unexcused)}")
    print(f"calls to the vendor       {len(calls)}, in the fullest minute {window}")
    print(f"log events                {dict(events.most_common())}")
    print(f"exit code                 {code}")
    wrong += [f"a connection was lost: {error}" for _, _, error in unexcused]
    if window > ALLOWED:
        wrong.append(f"{window} calls in a minute")
    if events["broker.defect"]:
        wrong.append(f"{events['broker.defect']} defects in the log")
    if code:
        wrong.append(f"exit code {code}")
    settled, late = began + seconds * SETTLED, began + seconds * (1 - SETTLED)
    return wrong + _grown_memory(checker, settled, late) + _grown_objects(checker, settled, late)


def worst_window(calls: list[float], length: float = 60.0) -> int:
    """Return the most calls in any window of `length` seconds."""
    worst = first = 0
    for last, moment in enumerate(calls):
        while moment - calls[first] >= length:
            first += 1
        worst = max(worst, last - first + 1)
    return worst


def _grown_memory(checker: Checker, settled: float, late: float) -> list[str]:
    """Compare the heaviest process of the first sixth's end with that of the last sixth."""
    early = [max(rss.values()) for at, rss in checker.memory if settled <= at < settled + 60]
    end = [max(rss.values()) for at, rss in checker.memory if at >= late]
    if not early or not end:
        return ["the run was too short to judge memory"]
    print(f"resident memory           {max(early) >> 20} -> {max(end) >> 20} MiB (fullest process)")
    return ["memory grew"] if max(end) > max(early) + RSS_GROWTH else []


def _grown_objects(checker: Checker, settled: float, late: float) -> list[str]:
    """Compare counts of live objects by type, in the process that has most of them.

    Not over all: how many processes there are depends on who was just killed.
    """
    early = [_most(kinds.values()) for at, kinds in checker.objects if settled <= at < settled + 60]
    end = [_most(kinds.values()) for at, kinds in checker.objects if at >= late]
    if not early or not end:
        return ["the run was too short to judge objects"]
    before, after = _most(early), _most(end)
    print(f"live objects              {before.total()} -> {after.total()} (fullest process)")
    return [
        f"objects of type {kind} grew from {before[kind]} to {count}"
        for kind, count in after.items()
        if count > before[kind] * GROWTH + GROWN
    ]


def _most(samples: Iterable[Counter[str]]) -> Counter[str]:
    most: Counter[str] = Counter()
    for sample in samples:
        most |= sample
    return most


def _counts(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix != ".new"]


def _read_counts(file: Path) -> Counter[str]:
    pairs = (line.split(" ", 1) for line in file.read_text(encoding="utf-8").splitlines())
    return Counter({kind: int(count) for count, kind in pairs})


def resident(pid: int) -> int:
    """Bytes of a process in memory, 0 if it is gone."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def _vendor(
    journal: Path,
) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, str]]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("vendor_process.py")),
        str(journal),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(await process.stdout.readline())
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.wait()


async def _ready(broker: Broker) -> None:
    async with aiohttp.ClientSession() as http, asyncio.timeout(30):
        while True:
            with suppress(aiohttp.ClientError):
                async with http.get(f"{broker.admin_url}/readyz") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)


def _end(broker: Broker) -> None:
    if broker.process is not None and broker.process.poll() is None:
        broker.process.kill()
        broker.process.wait()
