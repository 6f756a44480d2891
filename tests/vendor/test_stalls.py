"""N13: the vendor's window holds when the network or the vendor stands still and lets go."""

import asyncio
import secrets
import socket
import time
from pathlib import Path

import pytest
from processes import Broker, Tree, merged
from relaying import Relay, counted, relaying, until, visitor
from standing import StandingVendor, Visitors, relay_settings, standing_vendor, worst_window
from structlog.testing import capture_logs

from broker.errors import BrokerError, BudgetExhausted, UpstreamTimeout, UpstreamUnavailable
from broker.issuers.vendor import calls, client
from broker.pacing.slots import Budget, LocalSlots
from broker.testing import Refusal
from broker.testing.vendor import faults

MINUTE = 6.0
"""Seconds: the shipped budget ten times as fast, so that its minute takes so long."""

WORST = 106 + 8
"""Calls in that minute: what is refilled in it, and the burst."""

STALL = 3.0
"""Seconds for which the vendor stands still: half a minute at this pace."""


def scaled(vendor: StandingVendor, secret: str) -> Tree:
    """Return a relay's settings with that budget; a call's caller waits for half a second."""
    return merged(
        relay_settings(vendor, secret),
        {
            "issuer.upstream": {
                "base_url": vendor.url,
                "api_secret": vendor.key,
                "timeout": "500ms",
            },
            "issuer.budget": {
                "rate": 106,
                "per": "6s",
                "burst": 8,
                "max_wait": "800ms",
                "window": 1068,
            },
        },
    )


async def start(folder: Path, tree: Tree) -> Broker:
    """Start a broker process while the test's loop goes on."""
    own = folder / secrets.token_hex(4)
    own.mkdir()
    return await asyncio.to_thread(Broker.configured, own, tree)


async def test_N13_a_vendor_that_was_suspended_gets_no_more_than_its_window(
    tmp_path: Path,
) -> None:
    """SIGSTOP and SIGCONT of a real vendor, with more askers than there are slots.

    Callers are told in time, and afterwards the pace is what it was.
    """
    secret = secrets.token_urlsafe(24)
    with standing_vendor() as vendor:
        with await start(tmp_path, scaled(vendor, secret)) as broker:
            visitors = Visitors(lambda: [broker.url], secret, 40)
            async with visitors.asking():
                await visitors.served(40)
                with vendor.standing_still():
                    await asyncio.sleep(STALL)
                went_on = time.monotonic()
                await visitors.served(60)
                await asyncio.sleep(max(went_on + MINUTE - time.monotonic(), 0))
            assert await asyncio.to_thread(broker.end) == 0
            assert "broker.defect" not in broker.log()
        arrivals = vendor.arrivals()
    assert worst_window(arrivals, MINUTE) <= WORST
    assert sum(went_on <= at < went_on + MINUTE for at in arrivals) >= 60
    assert visitors.answers[504] >= 1  # a caller's time-out does not wait for the vendor
    assert not {500, 502} & set(visitors.answers)


async def test_N13_a_process_killed_in_a_stall_and_its_successor_share_one_window(
    tmp_path: Path,
) -> None:
    """What the first has out arrives together with what the second has sent: 120 at most."""
    secret = secrets.token_urlsafe(24)
    with standing_vendor() as vendor:
        tree = scaled(vendor, secret)
        running = [await start(tmp_path, tree)]
        visitors = Visitors(lambda: [running[-1].url], secret, 40)
        async with visitors.asking():
            await visitors.served(40)
            with vendor.standing_still():
                await asyncio.sleep(STALL / 2)
                with running[0]:
                    running[0].process.kill()
                running.append(await start(tmp_path, tree))
                await asyncio.sleep(STALL / 2)
            went_on = time.monotonic()
            await visitors.served(60)
            await asyncio.sleep(max(went_on + MINUTE - time.monotonic(), 0))
        with running[1]:
            assert await asyncio.to_thread(running[1].end) == 0
        arrivals = vendor.arrivals()
    assert worst_window(arrivals, MINUTE) <= 120


FEW = Budget(rate=600_000, per=60, burst=4, max_wait=0.3)
"""Four calls may be out; a slot each 0.1 ms, so that nothing else holds anybody up."""


def owed_by(relay: Relay) -> int:
    """Return how many calls may yet arrive that nobody sees the end of."""
    slots = relay.pacer._slots
    assert isinstance(slots, LocalSlots)
    return slots._ledger.owed


async def failures(relay: Relay, count: int) -> list[BrokerError]:
    """Let so many new visitors ask in vain at the same time."""
    return list(await asyncio.gather(*(relay.failure() for _ in range(count))))


async def test_N13_a_time_out_frees_the_caller_and_not_the_slot() -> None:
    """Four calls without an answer are all that may be out: then nobody is served, and told so."""
    async with relaying(budget=FEW, timeout=0.2) as relay:
        await relay.request_token()
        hang = relay.vendor.fail(faults.hang())
        assert {type(error) for error in await failures(relay, 4)} == {UpstreamTimeout}
        hang.stop()
        assert (relay.pacer.outstanding, relay.pacer.remaining) == (4, 0)
        error = await relay.failure()
        assert (error.status, error.code) == (503, "SERVICE_UNAVAILABLE")
        assert relay.calls == 5
        await relay.vendor.refuse_connections()
        await until(lambda: relay.pacer.outstanding == 0, "the connections to end")
        await relay.vendor.accept_connections()
        await relay.request_token()


async def test_N13_an_answer_that_comes_late_gives_the_slot_back() -> None:
    """Its token is dropped: whoever asked for it was told that there is none."""
    async with relaying(budget=FEW, timeout=0.2) as relay:
        fingerprint = visitor()
        with relay.vendor.fail(faults.slow(1.0)):
            assert isinstance(await relay.failure(fingerprint), UpstreamTimeout)
        assert relay.pacer.outstanding == 1
        await until(lambda: relay.pacer.outstanding == 0, "the answer")
        assert len(relay.tokens) == 0
        assert relay.statuses == {"none": 1}


async def test_N13_a_late_429_pauses_the_budget() -> None:
    """The vendor's own word about its window counts, whoever has gone meanwhile."""
    async with relaying(budget=FEW, timeout=0.2) as relay:
        slow = faults.combined(
            faults.error(Refusal.RATE_LIMITED, retry_after="7"), faults.slow(0.6)
        )
        relay.vendor.fail(slow, times=1)
        assert isinstance(await relay.failure(), UpstreamTimeout)
        assert relay.paused_for == 0
        await until(lambda: 6 < relay.paused_for <= 7, "the pause")
        assert relay.pacer.outstanding == 0


async def test_N2_a_defect_in_what_comes_late_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it any more: it would vanish."""
    async with relaying(budget=FEW, timeout=0.2) as relay:

        async def fail(_answer: object) -> None:
            raise RuntimeError

        monkeypatch.setattr(relay.issuer._calls, "_late", fail)
        with relay.vendor.fail(faults.slow(1.0)), capture_logs() as told:
            assert isinstance(await relay.failure(), UpstreamTimeout)
            await until(lambda: not len(relay.issuer._calls), "the answer")
        assert [event["event"] for event in told] == ["broker.defect"]


async def test_N13_a_mint_that_is_given_up_leaves_its_call_out() -> None:
    """The mint's own time-out, not the call's: the slot is outstanding until the answer."""
    async with relaying(budget=FEW) as relay:
        relay.minter._timeout = 0.1
        with relay.vendor.fail(faults.slow(0.6)):
            assert isinstance(await relay.failure(), UpstreamTimeout)
            assert relay.pacer.outstanding == 1
            await until(lambda: relay.pacer.outstanding == 0, "the answer")


async def test_N13_a_call_that_hangs_while_the_vendor_answers_others_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The vendor reads, so it has read that one: a few that hang do not use up the budget."""
    monkeypatch.setattr(calls, "SEEN", 0.3)
    async with relaying(budget=FEW, timeout=0.5) as relay:
        await relay.request_token()
        relay.vendor.fail(faults.hang(), times=3)
        await failures(relay, 3)
        assert relay.pacer.outstanding == 3
        await asyncio.sleep(0.3)
        await relay.request_token()
        await until(lambda: relay.pacer.outstanding == 0, "the slots")
        await until(lambda: len(relay.issuer._calls) == 0, "the calls")
        assert owed_by(relay) == 3  # one that a proxy holds has not arrived
        await relay.request_token()
        assert owed_by(relay) == 0


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a call be taken for received after 0.3 s."""
    monkeypatch.setattr(calls, "SEEN", 0.3)
    monkeypatch.setattr(calls, "LOOK", 0.05)


def questions(relay: Relay) -> list[str]:
    """Return the paths of what was asked beside mints."""
    return [call.path for call in relay.vendor.journal.records if not call.is_mint]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("after_start", [True, False])
async def test_N13_calls_that_are_swallowed_are_given_up_when_the_vendor_answers_a_question(
    *, after_start: bool
) -> None:
    """All that may be out hang, so no younger call can show that the vendor is well for others."""
    count = 2 if after_start else 4
    async with relaying(budget=FEW, timeout=0.5, owing=after_start) as relay:
        if not after_start:
            await relay.request_token()
        with relay.vendor.fail(faults.hang()):
            await failures(relay, count)
        assert relay.pacer.outstanding == count
        owed = owed_by(relay)
        await until(lambda: relay.pacer.outstanding == 0, "the slots")
        assert owed_by(relay) == owed + count  # they may arrive yet: only a mint clears that
        await until(lambda: len(relay.issuer._calls) == 0, "the calls")
        assert questions(relay) == [client.VALIDATE_PATH]
        assert counted(relay.upstream.validations) == {"answered": 1}
        await relay.request_token()
        assert owed_by(relay) == 0
        assert relay.statuses == {"200": 2 - after_start, "none": count}
        await until(lambda: not len(relay.issuer._calls._probing), "the end of the watch")


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("answer", [Refusal.UNAUTHORIZED, Refusal.INTERNAL_ERROR, "a page"])
async def test_N13_what_the_answer_to_the_question_says_is_no_matter(
    answer: Refusal | str,
) -> None:
    """Any answer shows that the vendor reads; breakers, keys and pauses learn nothing from it."""
    fault = faults.html() if isinstance(answer, str) else faults.error(answer)
    async with relaying(budget=FEW, timeout=0.5) as relay:
        await relay.request_token()
        relay.vendor.fail(fault, path=client.VALIDATE_PATH)
        before = relay.issuer.credentials, relay.issuer._passed_over.copy()
        hang = relay.vendor.fail(faults.hang())
        await failures(relay, 4)
        health = relay.issuer.health
        hang.stop()
        await until(lambda: relay.pacer.outstanding == 0, "the slots")
        assert (relay.issuer.credentials, relay.issuer._passed_over) == before
        assert relay.issuer.health == health
        assert relay.errors == {"timeout": 4}
        await relay.request_token()


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("how", ["hang", "reset", "refused"])
async def test_N13_a_question_without_an_answer_changes_nothing(how: str) -> None:
    """The vendor stands still, or cannot be reached any more: what is out may yet arrive."""
    async with relaying(budget=FEW, timeout=0.5) as relay:
        await relay.request_token()
        fault = faults.reset() if how == "reset" else faults.hang()
        relay.vendor.fail(fault, path=client.VALIDATE_PATH)
        hang = relay.vendor.fail(faults.hang())
        await failures(relay, 4)
        if how == "refused":
            await relay.vendor._listener.refuse()
        tried = relay.upstream.validations["none"]
        await until(lambda: tried.value >= 2, "two questions")
        assert counted(relay.upstream.validations) == {"none": tried.value}
        assert (relay.pacer.outstanding, owed_by(relay)) == (4, 0)
        hang.stop()
        assert isinstance(await relay.failure(), BudgetExhausted)


@pytest.mark.usefixtures("soon")
async def test_N13_an_edge_that_answers_all_but_mints_lets_few_of_them_out() -> None:
    """Two at a time, until two bursts are owed: then a call hangs for as long as one may."""
    async with relaying(budget=FEW, timeout=0.5) as relay:
        await relay.request_token()
        relay.vendor.fail(faults.hang())
        asked = relay.upstream.validations["answered"]
        async with asyncio.timeout(20):
            while owed_by(relay) < 8:
                await failures(relay, 3)
        await failures(relay, 3)
        assert asked.value == 3
        assert relay.calls == 1 + 4 + 2 + 2 + 2
        await asyncio.sleep(1)
        await failures(relay, 3)
        assert (asked.value, relay.calls, relay.pacer.outstanding) == (3, 11, 2)


@pytest.mark.usefixtures("soon")
async def test_N13_nobody_is_asked_while_there_is_room_or_somebody_waits() -> None:
    """Three of four hang: the next mint shows all that there is to know.  Nor while it may."""
    async with relaying(budget=FEW, timeout=0.5) as relay:
        await relay.request_token()
        relay.vendor.fail(faults.hang(), times=3)
        await failures(relay, 3)
        await asyncio.sleep(0.6)
        assert (relay.pacer.outstanding, questions(relay)) == (3, [])
        relay.issuer._calls._timeout = 10.0
        relay.vendor.fail(faults.hang(), times=1)
        asking = relay.begin()
        await relay.arrived(5)
        await asyncio.sleep(0.6)
        assert (relay.pacer.outstanding, questions(relay)) == (4, [])
        asking.cancel()
        await until(lambda: relay.pacer.outstanding == 0, "the slots")


@pytest.mark.usefixtures("soon")
async def test_N13_a_question_under_way_ends_with_the_process() -> None:
    """It is nobody's call: nothing is left of it."""
    async with relaying(budget=FEW, timeout=0.5) as relay:
        await relay.request_token()
        relay.vendor.fail(faults.hang(), path=None)
        await failures(relay, 4)
        await until(lambda: questions(relay), "a question")
        await relay.issuer.close()
        assert not len(relay.issuer._calls._probing)


async def test_N13_who_is_refused_in_a_stall_is_told_why() -> None:
    """Not that the budget is used up: that is a matter of demand, this one of the vendor."""
    async with relaying(budget=FEW, timeout=0.5) as relay:
        await relay.request_token()
        relay.vendor.fail(faults.hang())
        await failures(relay, 4)
        error = await relay.failure()
        assert isinstance(error, BudgetExhausted)
        assert str(error) == "the vendor does not answer: calls that are out use up the budget"
        relay.pacer.pause_for(60)
        assert str(await relay.failure()) == "the vendor's budget is used up"


async def test_N13_calls_that_are_out_when_a_process_ends_are_owed() -> None:
    """They may lie unread before a vendor that stands still."""
    async with relaying(budget=FEW, timeout=0.5) as relay:
        await relay.request_token()
        relay.vendor.fail(faults.hang(), times=3)
        await failures(relay, 3)
        assert (relay.pacer.outstanding, owed_by(relay)) == (3, 0)
        await relay.issuer.close()
        assert (relay.pacer.outstanding, owed_by(relay)) == (0, 3)


async def test_N13_a_call_out_for_as_long_as_one_may_be_is_owed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its slot is free again for two calls at a time, until the vendor answers one."""
    monkeypatch.setattr(calls, "LONGEST", 0.5)
    async with relaying(budget=FEW, timeout=0.2) as relay:
        await relay.request_token()
        hang = relay.vendor.fail(faults.hang())
        await failures(relay, 4)
        await until(lambda: relay.pacer.outstanding == 0, "the end of what is waited for")
        errors = await failures(relay, 4)
        assert sorted(type(error).__name__ for error in errors) == [
            *["BudgetExhausted"] * 2,
            *["UpstreamTimeout"] * 2,
        ]
        assert relay.pacer.outstanding == 2
        hang.stop()
        await until(lambda: relay.pacer.outstanding == 0, "those two")
        await relay.request_token()
        await asyncio.gather(*(relay.request_token() for _ in range(4)))


async def test_N13_the_head_of_an_answer_settles_its_call() -> None:
    """A body that drips for ever holds nothing: the call has arrived."""
    async with relaying(budget=FEW, timeout=0.5) as relay:
        relay.vendor.fail(faults.drip(0.05), times=1)
        asking = relay.begin()
        await relay.arrived(1)
        await until(lambda: relay.pacer.outstanding == 0, "the head")
        with pytest.raises(UpstreamTimeout):
            await asking
        await until(lambda: len(relay.issuer._calls) == 0, "the call to be dropped")


async def test_N13_a_call_that_could_not_be_sent_is_settled_at_once() -> None:
    """No connection, nothing that could arrive; so with each of its retries."""
    async with relaying(budget=FEW) as relay:
        await relay.vendor.refuse_connections()
        for _ in range(4):
            assert isinstance(await relay.failure(), UpstreamUnavailable)
        assert relay.pacer.outstanding == 0


async def test_N13_retries_and_second_keys_are_outstanding_each_in_their_turn() -> None:
    """Two calls of one mint are never out together, and neither is forgotten."""
    async with relaying(budget=FEW) as relay:
        relay.vendor.revoke_secret(relay.vendor.secret)
        second = relay.vendor.add_secret()
        relay.issuer.use_keys([relay.vendor.secret, second])
        most: list[int] = []
        relay.vendor.fail(
            faults.HEALTHY, where=lambda _call: most.append(relay.pacer.outstanding) or False
        )
        await relay.request_token()
        relay.vendor.fail(faults.html(), times=1)
        await relay.request_token()
        assert relay.calls == 4
        assert most == [1] * 4
        assert relay.pacer.outstanding == 0


async def test_N13_the_kernel_ends_a_connection_whose_peer_has_vanished() -> None:
    """Every connection to the vendor has the time-out for what is not acknowledged, in ms."""
    async with relaying(budget=FEW) as relay:
        relay.vendor.fail(faults.slow(0.3), times=1)
        asking = relay.begin()
        await relay.arrived(1)
        connector = relay.issuer._client._session.connector
        assert connector is not None
        (connection,) = connector._acquired
        transport = connection.transport
        assert transport is not None
        its_own: socket.socket = transport.get_extra_info("socket")
        told = its_own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert told == client.VANISHED * 1000
        await asking


async def test_N13_what_is_out_shows_in_the_metrics() -> None:
    """`outstanding` while a call is out, and none when it is over."""
    async with relaying(budget=FEW) as relay:
        relay.vendor.fail(faults.slow(0.3), times=1)
        asking = relay.begin()
        await relay.arrived(1)
        assert relay.pacer.outstanding == 1
        assert repr(relay.pacer).endswith("outstanding=1)")
        await asking
        assert relay.pacer.outstanding == 0
