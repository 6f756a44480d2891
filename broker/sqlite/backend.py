"""Puts the store with a file behind it together: opens it, watches it, closes it."""

import asyncio
import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import structlog
from msgspec import Struct

from broker.clock import sleep_unless
from broker.limits.policy import Limits
from broker.model import Clock, Secret
from broker.rules.durable import Moment
from broker.sqlite.location import Lock, StateFileInUse, require_usable
from broker.sqlite.opening import Keys, Opened, open_state
from broker.sqlite.restored import Terms
from broker.sqlite.spent_buckets import SpentBuckets
from broker.sqlite.state_file import StateFileFailed
from broker.sqlite.store import DurableSessions, DurableStore, WriterSlot
from broker.sqlite.writer import Writer
from broker.stores.token_cache import TokenCache
from broker.tasks import aside
from broker.telemetry.metrics import Metrics

log = structlog.get_logger()

LOCK_INTERVAL = 0.1
"""Seconds between attempts to lock a file that another process uses."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class FileSettings(Struct, frozen=True):
    """Where the file is, who may open it, how much it holds, how long to wait for another process.

    `floor` gives the floor of life for a token's lifetime; `waits`: whether tokens are in the file
    before they are handed out; `timeout` is seconds.
    """

    path: Path
    keys: Keys
    most_tokens: int
    most_sessions: int
    floor: Callable[[int], int]
    waits: bool
    timeout: float

    @property
    def most_mints(self) -> int:
        """Records in the file: twice what is held, because what was pushed out is in it, too."""
        return 2 * (self.most_tokens + self.most_sessions)


class DurableBackend:
    """A store and sessions with a file behind them.  `open` before the first request."""

    def __init__(
        self,
        settings: FileSettings,
        limits: Limits,
        tokens: TokenCache,
        clock: Clock,
        metrics: Metrics,
        signer_ids: Callable[[], frozenset[str]],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._signer_ids = signer_ids
        self._slot = WriterSlot()
        self._lock = Lock(settings.path)
        self._boot = _boot_id()
        self._failing = False
        self._seen: dict[object, int] = {}
        self._keys_written = self._keys_wanted = frozenset(settings.keys.now)
        self._keys_missed = False
        self.store = DurableStore(limits, tokens, clock, metrics, self._slot, waits=settings.waits)
        self.sessions = DurableSessions(settings.most_sessions, clock, self._slot)
        self._spent = SpentBuckets(self.store.buckets, clock.mono, self._slot.add_all)

    async def open(self, stopping: asyncio.Event) -> None:
        """Open the file and take over what is in it.

        Waits for another process that is about to end, at most until `stopping`.  Raises
        ConfigError where nothing can be kept, StateFileInUse.
        """
        settings = self._settings
        _ = await aside(lambda: require_usable(settings.path))
        await self._take_lock(stopping)
        try:
            terms = Terms(self._signer_ids(), settings.floor, settings.most_tokens)
            with _collector_at_rest():
                opened = await aside(
                    lambda: open_state(
                        settings.path, settings.keys, terms, self._moment, settings.most_mints
                    )
                )
                self._take_over(opened)
        except BaseException:
            self._lock.release()
            raise
        writer = Writer(opened, self._moment, settings.most_mints)
        self._slot.fill(writer)
        writer.start()
        self._report(opened)

    async def _take_lock(self, stopping: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        ends, is_logged = loop.time() + self._settings.timeout, False
        while not self._lock.take():
            if not is_logged:
                is_logged = True
                log.info("broker.state_file_in_use", pid=self._lock.owner)
            if stopping.is_set() or loop.time() >= ends:
                raise StateFileInUse(
                    self._settings.path, self._lock.owner, stopped=stopping.is_set()
                )
            await sleep_unless(stopping, LOCK_INTERVAL)

    def _take_over(self, opened: Opened) -> None:
        state, now = opened.state, self._clock.mono()
        self.store.tokens.restore(reversed(state.tokens.items()))
        self.sessions.restore(reversed(state.sessions.values()), state.marks)
        for name, table in self.store.buckets.items():
            table.take_spent()  # from now on they are noted
            entries = state.buckets.get(name.value, {})
            table.restore(entries, now)
            self._spent.adopt(name, entries, now)

    def _report(self, opened: Opened) -> None:
        if opened.moved is not None:
            why, target = opened.moved
            log.error("broker.state_file_moved_aside", reason=why, to=str(target))
            self._metrics.state_file.moved_aside.set(1)
        state = opened.state
        log.info(
            "broker.state_file_opened",
            path=str(self._settings.path),
            tokens=len(state.tokens),
            sessions=len(state.sessions),
        )

    @property
    def is_degraded(self) -> bool:
        """Whether what is handed out or ended now is not sure to survive the process."""
        return self._slot.is_filled and self._slot.writer.is_degraded

    def tell_buckets(self) -> bool:
        """Tell the file of spent buckets, some at a time; False if that was all for now."""
        return self._spent.step(can_tell=not self.is_degraded)

    def publish(self) -> None:
        """Bring metrics and log of the file up to date: about twice a second."""
        writer = self._slot.writer
        metrics = self._metrics.state_file
        for kind, count in list(writer.failures.items()):
            metrics.errors[kind] += count - self._seen.get(kind, 0)
            self._seen[kind] = count
        metrics.bytes.set(writer.size)
        failing = self.is_degraded
        if failing and not self._failing:
            log.error("broker.state_file_failed", **_why(writer.failure))
        elif self._failing and not failing:
            log.info("broker.state_file_recovered", lost=writer.lost)
        self._failing = failing
        self._watch_keys()

    def _watch_keys(self) -> None:
        """Tell when a restart would find the file, and no key that opens it."""
        if not self._slot.writer.owes_keys:
            self._keys_written, self._keys_missed = self._keys_wanted, False
        elif self._failing and self._keys_written.isdisjoint(self._keys_wanted):
            if not self._keys_missed:
                log.error("broker.state_file_keys_unwritten")
            self._keys_missed = True

    def use_keys(self, keys: Sequence[Secret]) -> None:
        """Let these keys open the file from now on."""
        self._keys_wanted = frozenset(keys)
        self._slot.writer.use_keys(keys)

    async def close(self) -> None:
        """Write what is left, and give the file to the next process."""
        if not self._slot.is_filled:
            self._lock.release()
            return
        self._spent.finish()
        if not await aside(self._slot.writer.close):
            log.error("broker.state_file_failed", reason="slow", detail="not closed in time")
        self._lock.release()

    def _moment(self) -> Moment:
        return Moment(self._boot, self._clock.mono(), self._clock.wall())


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Let the collector wait: nothing that is read is garbage, and to look takes a third longer."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _why(failure: StateFileFailed | None) -> dict[str, str]:
    if failure is None:
        return {"reason": "slow", "detail": "a commit takes longer than a second"}
    return {"reason": failure.kind.value, "detail": str(failure)}


def _boot_id() -> str:
    """Name the start of the machine, "" where it has no name."""
    try:
        return _BOOT.read_text("ascii").strip()
    except (OSError, ValueError):
        return ""
