"""Many askers, one mint: rows F1-F6 and F9 on the flights alone, then every interleaving."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from broker.errors import ServiceUnavailable, UpstreamUnavailable
from broker.flight import Flight, SingleFlight

TRACE: ContextVar[str] = ContextVar("trace", default="nobody's")


async def ticks(count: int = 5) -> None:
    """Let everything happen that is due."""
    for _ in range(count):
        await asyncio.sleep(0)


class Mint:
    """A mint that ends when it is told to; `runs` counts how often it was started."""

    def __init__(self, *, sent: bool = False) -> None:
        self.runs = 0
        self.cancelled = 0
        self.sent = sent
        self.trace = ""
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def __call__(self, flight: Flight[str]) -> str:
        self.runs += 1
        self.trace = TRACE.get()
        flight.sent = self.sent
        try:
            return await asyncio.shield(self.end)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def join_all(
    flights: SingleFlight[str], count: int, mint: Callable[[Flight[str]], Awaitable[str]]
) -> "list[asyncio.Task[tuple[str, bool]]]":
    """Let so many ask, and go on; a patience of 5 s ends a test that would wait for ever."""
    loop = asyncio.get_running_loop()
    return [loop.create_task(flights.join("key", mint, 5.0)) for _ in range(count)]


async def test_F1_a_thousand_askers_share_one_mint_and_one_of_them_leads() -> None:
    """However many ask for a key at once, its mint is started once and all get its outcome."""
    flights: SingleFlight[str] = SingleFlight()
    mint = Mint()
    callers = join_all(flights, 1000, mint)
    await ticks()
    mint.end.set_result("token")
    assert await asyncio.gather(*callers) == [("token", True)] + [("token", False)] * 999
    assert (mint.runs, len(flights), flights._by_key) == (1, 0, {})


async def test_F2_the_first_asker_leaves_and_the_others_land() -> None:
    """The mint belongs to the flight: whoever started it may go."""
    flights: SingleFlight[str] = SingleFlight()
    mint = Mint()
    first, *others = join_all(flights, 3, mint)
    await ticks()
    first.cancel()
    await ticks()
    mint.end.set_result("token")
    assert await asyncio.gather(*others) == [("token", False)] * 2
    assert first.cancelled()
    assert (mint.runs, mint.cancelled) == (1, 0)


async def test_F3_a_deserted_flight_that_only_queues_is_cancelled_and_nothing_stays() -> None:
    """Once all have left, a mint that costs nothing yet ends at once."""
    flights: SingleFlight[str] = SingleFlight()
    mint = Mint()
    callers = join_all(flights, 3, mint)
    await ticks()
    for caller in callers:
        caller.cancel()
    await ticks()
    assert (mint.runs, mint.cancelled, len(flights), flights._by_key) == (1, 1, 0, {})


async def test_F3_a_flight_that_is_deserted_as_it_begins_is_cancelled() -> None:
    """In the very turn: a mint that was begun is told by a CancelledError, so it can clean up.

    One that waits for a turn of its own has not begun, and never does.
    """
    flights: SingleFlight[str] = SingleFlight()
    mint = Mint()
    asking = flights.join("key", mint)
    asking.send(None)
    asking.close()
    await ticks()
    assert (mint.runs, mint.cancelled, len(flights), flights._by_key) == (0, 0, 0, {})


async def test_F3_a_deserted_flight_whose_request_is_out_finishes() -> None:
    """What is paid for is brought home, though nobody waits for it any more."""
    flights: SingleFlight[str] = SingleFlight()
    mint = Mint(sent=True)
    (caller,) = join_all(flights, 1, mint)
    await ticks()
    caller.cancel()
    await ticks()
    assert (mint.cancelled, len(flights)) == (0, 1)
    late = join_all(flights, 1, mint)[0]
    await ticks()
    mint.end.set_result("token")
    assert await late == ("token", False)
    assert (mint.runs, len(flights), flights._by_key) == (1, 0, {})


async def test_F3_whoever_comes_in_the_moment_of_desertion_starts_afresh() -> None:
    """A new asker never inherits the cancellation of those who went."""
    flights: SingleFlight[str] = SingleFlight()
    old, new = Mint(), Mint()
    (leaver,) = join_all(flights, 1, old)
    await ticks()
    leaver.cancel()
    (comer,) = join_all(flights, 1, new)  # both happen in the next turn of the loop
    await ticks()
    new.end.set_result("token")
    assert await comer == ("token", True)
    assert (old.cancelled, new.runs) == (1, 1)


async def test_F4_a_failed_mint_fails_everybody_once() -> None:
    """All waiters get that one error: no retry for each, and nobody gets None."""
    flights: SingleFlight[str] = SingleFlight()
    mint = Mint()
    callers = join_all(flights, 100, mint)
    await ticks()
    error = UpstreamUnavailable("down")
    mint.end.set_exception(error)
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert all(outcome is error for outcome in outcomes)
    assert (mint.runs, len(flights)) == (1, 0)


async def test_F5_the_end_of_an_old_flight_does_not_remove_a_newer_one() -> None:
    """An old mint that takes its time to be cancelled ends after its successor has started."""
    flights: SingleFlight[str] = SingleFlight()
    may_end = asyncio.get_running_loop().create_future()

    async def slow_to_stop(_flight: Flight[str]) -> str:
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            await may_end

    (leaver,) = join_all(flights, 1, slow_to_stop)
    await ticks()
    leaver.cancel()
    await ticks()
    mint = Mint()
    (first,) = join_all(flights, 1, mint)
    await ticks()
    may_end.set_result(None)
    await ticks()
    (second,) = join_all(flights, 1, mint)
    await ticks()
    mint.end.set_result("token")
    assert await asyncio.gather(first, second) == [("token", True), ("token", False)]
    assert (mint.runs, len(flights), flights._by_key) == (1, 0, {})


async def test_F6_a_failure_that_nobody_awaits_is_silent() -> None:
    """Neither a background failure nor one after the last waiter reaches the loop's handler."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, about: complaints.append(about))
    flights: SingleFlight[str] = SingleFlight()
    background, sent = Mint(), Mint(sent=True)
    assert flights.start_background("other", background)
    (leaver,) = join_all(flights, 1, sent)
    await ticks()
    leaver.cancel()
    await ticks()
    for mint in (background, sent):
        mint.end.set_exception(UpstreamUnavailable("down"))
    await flights.drained()
    del background, sent, mint, leaver
    await ticks()
    gc.collect()
    assert complaints == []
    assert (len(flights), flights._by_key) == (0, {})


async def test_F6_a_mint_that_is_cancelled_is_told_as_unavailable_and_not_kept() -> None:
    """Waiters of a flight that was cancelled under them get an error of ours; the next works."""
    flights: SingleFlight[str] = SingleFlight()
    mint = Mint()
    callers = join_all(flights, 2, mint)
    await ticks()
    await flights.close()
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert [(type(error), error.retry_after) for error in outcomes] == [
        (ServiceUnavailable, 1_000_000)
    ] * 2
    again = Mint()
    (caller,) = join_all(flights, 1, again)
    await ticks()
    again.end.set_result("token")
    assert await caller == ("token", True)


@pytest.mark.parametrize("leaver_first", [True, False])
async def test_F9_leaving_in_the_tick_of_the_landing_hurts_nobody(leaver_first: bool) -> None:
    """Half leave in the very turn in which the token arrives; the other half have it."""
    flights: SingleFlight[str] = SingleFlight()
    mint = Mint()
    callers = join_all(flights, 100, mint)
    await ticks()
    if leaver_first:
        for caller in callers[::2]:
            caller.cancel()
    mint.end.set_result("token")
    await asyncio.sleep(0)
    for caller in callers[::2]:
        caller.cancel()
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert outcomes[1::2] == [("token", False)] * 50
    assert all(
        isinstance(outcome, asyncio.CancelledError) or outcome[0] == "token"
        for outcome in outcomes[::2]
    )
    assert (mint.runs, len(flights), flights._by_key) == (1, 0, {})


async def test_a_background_mint_is_joined_and_survives_its_joiner() -> None:
    """A visitor who joins a renewal and leaves again does not take the renewal with them."""
    flights: SingleFlight[str] = SingleFlight()
    mint = Mint()
    assert flights.start_background("key", mint)
    assert not flights.start_background("key", mint)
    leaver, stayer = join_all(flights, 2, mint)
    await ticks()
    leaver.cancel()
    await ticks()
    stayer.cancel()
    await ticks()
    assert (mint.cancelled, len(flights)) == (0, 1)
    (late,) = join_all(flights, 1, mint)
    await ticks()
    mint.end.set_result("token")
    assert await late == ("token", False)
    assert mint.runs == 1


async def test_the_first_asker_s_context_does_not_leak_into_the_mint() -> None:
    """Log fields and traces of whoever happened to be first stay with them."""
    flights: SingleFlight[str] = SingleFlight()
    mint = Mint()
    TRACE.set("the first asker's")
    (caller,) = join_all(flights, 1, mint)
    await ticks()
    mint.end.set_result("token")
    await caller
    assert mint.trace == "nobody's"


class Boom(Exception):
    """What a mint of the machine fails with."""


class Started:
    """A mint that the machine has seen start."""

    def __init__(self, key: str, number: int, flight: Flight[str]) -> None:
        self.key = key
        self.token = f"{key}-{number}"
        self.flight = flight
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.over = False
        self.was_cancelled = False

    @property
    def alive(self) -> bool:
        """Whether it still runs, and nobody has told it to stop."""
        task = self.flight.task
        return not self.over and task is not None and not task.cancelling()


KEYS = st.sampled_from(["red", "blue"])
PICKS = st.integers(0, 20)


class CallerMachine(RuleBasedStateMachine):
    """Random histories: who asks, who leaves, what lands, and how often the loop turns between.

    A rule without a `tick` after it happens in the same turn of the loop as the next one: so
    landings, cancellations and newcomers meet in every order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.SelectorEventLoop()
        self.complaints: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _loop, about: self.complaints.append(about))
        self.flights: SingleFlight[str] = SingleFlight()
        self.mints: list[Started] = []
        self.callers: list[tuple[str, asyncio.Task[tuple[str, bool]]]] = []
        self.left: set[asyncio.Task[tuple[str, bool]]] = set()
        self.landed: set[str] = set()
        self.failed: set[str] = set()
        self.closes = False

    @initialize(closes=st.booleans())
    def choose_the_end(self, closes: bool) -> None:
        self.closes = closes

    def mint_of(self, key: str) -> Callable[[Flight[str]], Awaitable[str]]:
        async def mint(flight: Flight[str]) -> str:
            started = Started(key, len(self.mints), flight)
            self.mints.append(started)
            try:
                return await started.end
            except asyncio.CancelledError:
                started.was_cancelled = True
                assert not flight.sent, "a mint that was paid for has been cancelled"
                raise
            finally:
                started.over = True

        return mint

    def turn_loop(self, count: int) -> None:
        for _ in range(count):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()

    @rule(key=KEYS, count=st.integers(1, 3))
    def join(self, key: str, count: int) -> None:
        for _ in range(count):
            task = self.loop.create_task(self.flights.join(key, self.mint_of(key)))
            self.callers.append((key, task))

    @rule(key=KEYS)
    def renew_in_background(self, key: str) -> None:
        async def start() -> None:
            self.flights.start_background(key, self.mint_of(key))

        self.loop.run_until_complete(start())

    @precondition(lambda self: self.callers)
    @rule(pick=PICKS)
    def leave(self, pick: int) -> None:
        _, task = self.callers[pick % len(self.callers)]
        if task.cancel():
            self.left.add(task)

    @precondition(lambda self: self.callers)
    @rule(key=KEYS)
    def leave_together(self, key: str) -> None:
        for asked, task in self.callers:
            if asked == key and task.cancel():
                self.left.add(task)

    @precondition(lambda self: self.mints)
    @rule(pick=PICKS)
    def send(self, pick: int) -> None:
        mint = self.mints[pick % len(self.mints)]
        if mint.alive:
            mint.flight.sent = True

    @precondition(lambda self: self.mints)
    @rule(pick=PICKS, succeeds=st.booleans())
    def end(self, pick: int, succeeds: bool) -> None:
        mint = self.mints[pick % len(self.mints)]
        if mint.end.done():
            return
        if succeeds:
            self.landed.add(mint.token)
            mint.end.set_result(mint.token)
        else:
            self.failed.add(mint.key)
            mint.end.set_exception(Boom(mint.key))

    @rule(count=st.integers(1, 4))
    def tick(self, count: int) -> None:
        self.turn_loop(count)

    @invariant()
    def one_living_mint_a_key(self) -> None:
        living = [mint.key for mint in self.mints if mint.alive]
        assert len(living) == len(set(living))

    @invariant()
    def entries_are_tasks_under_way(self) -> None:
        for flight in self.flights._by_key.values():
            assert flight.task in self.flights._tasks

    @invariant()
    def each_got_what_was_theirs(self) -> None:
        for key, task in self.callers:
            if not task.done():
                continue
            if task.cancelled():
                assert task in self.left
            elif (error := task.exception()) is None:
                token, _leads = task.result()
                assert token.startswith(f"{key}-")
                assert token in self.landed
            else:
                assert isinstance(error, Boom), "an asker inherited somebody else's end"
                assert str(error) == key
                assert key in self.failed

    def teardown(self) -> None:
        self.turn_loop(1)  # askers that have not begun do so
        if self.closes:
            self.loop.run_until_complete(self.flights.close())
        else:
            while not all(task.done() for _, task in self.callers) or len(self.flights):
                self.turn_loop(3)
                for mint in self.mints:
                    if not mint.end.done():
                        self.landed.add(mint.token)
                        mint.end.set_result(mint.token)
            self.each_got_what_was_theirs()
        self.turn_loop(5)
        assert all(task.done() for _, task in self.callers), "an asker was forgotten"
        for _, task in self.callers:
            if not task.cancelled():
                task.exception()
        assert (len(self.flights), self.flights._by_key) == (0, {})
        assert asyncio.all_tasks(self.loop) == set()
        assert all(mint.over and not mint.flight._waiters for mint in self.mints)
        self.mints.clear()
        self.callers.clear()
        self.left.clear()
        gc.collect(0)
        self.turn_loop(1)
        self.loop.close()
        assert self.complaints == []


def test_F2_F3_F5_F6_F9_every_interleaving_of_asking_leaving_landing_and_failing() -> None:
    """At most one living mint a key, everybody gets their own key's outcome, nothing is left."""
    run_state_machine_as_test(
        CallerMachine,
        settings=settings(
            max_examples=150,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def _flights() -> list[Flight[str]]:
    return [each for each in gc.get_objects() if isinstance(each, Flight)]


@pytest.mark.parametrize("ending", ["fails", "outlasts its waiters"])
async def test_G6_nothing_of_an_ended_flight_is_left_to_the_collector(ending: str) -> None:
    """The collector is told to overlook what lives long, so a ring of references would stay."""
    of_others = _flights()  # of tests that failed, whose tracebacks are kept
    flights: SingleFlight[str] = SingleFlight()
    gate = asyncio.Event()

    async def mint(_flight: Flight[str]) -> str:
        await gate.wait()
        raise UpstreamUnavailable("no token")

    timeout = 0.0 if ending == "outlasts its waiters" else None
    waiting = [asyncio.create_task(flights.join(f"{n}", mint, timeout)) for n in range(50)]
    await asyncio.sleep(0)
    gc.collect()
    gc.disable()
    try:
        gate.set()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(outcome, Exception) for outcome in outcomes)
        del waiting, outcomes
        await flights.drained()
        await asyncio.sleep(0)
        assert [each for each in _flights() if not any(each is one for one in of_others)] == []
    finally:
        gc.enable()
