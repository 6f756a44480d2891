"""The vendor's keys: row V3, and what a dead key costs.

The vendor counts failed authentication against our address and stops answering it, so what is
counted here is the vendor's own journal, not what the broker says of itself.
"""

import asyncio
import secrets
import time
from pathlib import Path

import pytest
import structlog
from relaying import (
    IMPATIENT,
    UNLIMITED,
    House,
    Relay,
    broker_before,
    relaying,
    until,
    vendor_on,
    visitor,
)

from broker.model import Secret
from broker.pacing.slots import Budget
from broker.rules.breaker import KEY_PAUSE
from broker.testing import FakeClock, FakeVendor, Refusal, VendorSettings
from broker.testing.vendor import faults
from broker.testing.vendor.journal import Call
from broker.testing.vendor.settings import Allowance
from broker.units import SECOND

SHIPPED = Budget(rate=106, per=60, burst=8, max_wait=8)


def failed(call: Call) -> bool:
    """Whether a call was a failed authentication, or throttled as one."""
    return call.status in (401, 403, 429)


def test_the_shipped_budget_is_the_one_that_is_tested() -> None:
    """The figures here are those of the settings."""
    from broker.config.settings import BudgetSettings as Section

    section = Section()
    assert Budget(section.rate, section.per.seconds, section.burst, section.max_wait.seconds) == (
        SHIPPED
    )


@pytest.mark.parametrize("says", [None, *list(Refusal)[:3]])
async def test_V3_a_dead_key_is_tried_once_and_then_left_alone(
    relay: Relay, says: Refusal | None
) -> None:
    """One call tells; after it callers get 502 and the vendor gets nothing for 30 s."""
    relay.vendor.revoke_secret(relay.vendor.secret, says)
    for _ in range(50):
        error = await relay.failure()
        assert (error.status, error.code) == (502, "UPSTREAM_UNAVAILABLE")
        assert error.message == "the vendor refuses the broker's own key; its operator is told"
    assert relay.calls == 1
    assert relay.errors == {"bad_key": 1}
    assert relay.issuer.credentials.is_open
    assert not relay.issuer.health.is_open
    relay.clock.advance(KEY_PAUSE / SECOND - 0.001)
    await relay.failure()
    assert relay.calls == 1
    relay.clock.advance(0.001)
    await relay.failure()
    await relay.failure()
    assert relay.calls == 2


async def test_V3_at_any_request_rate_a_dead_key_fails_fewer_than_ten_times_a_minute() -> None:
    """Ten virtual minutes of askers without end: two probes a minute, and never two at once."""
    async with relaying() as relay:
        relay.vendor.revoke_secret(relay.vendor.secret)
        await relay.failure()
        for _ in range(600):
            outcomes = await asyncio.gather(*(relay.failure() for _ in range(10)))
            assert {error.status for error in outcomes} == {502}
            relay.clock.advance(1)
        assert relay.calls == 20
        assert relay.vendor.journal.in_window(60, where=failed) == 2


async def test_V3_a_key_that_dies_under_full_traffic_with_a_full_queue() -> None:
    """Mints that waited for their turn when the key was refused are told so: none is sent.

    The budget is the one that ships, with its burst saved up, five times as fast.
    """
    fast = Budget(rate=530, per=60, burst=8, max_wait=1.6)
    async with relaying(budget=fast) as relay:
        await asyncio.sleep(0)
        await until(lambda: relay.pacer.remaining == 8, "a whole burst")
        relay.vendor.revoke_secret(relay.vendor.secret)
        errors = await asyncio.gather(*(relay.failure() for _ in range(200)))
        assert {error.status for error in errors} <= {502, 503}
        assert relay.pacer.depth == 0
        assert relay.vendor.journal.in_window(60, where=failed) <= 9
        relay.clock.advance(30)
        await relay.failure()
        assert relay.vendor.journal.in_window(60, where=failed) < 10


async def test_V3_with_two_dead_keys_a_probe_tries_both_and_no_more(relay: Relay) -> None:
    """Each key of the list may have been the one that was repaired, so a probe asks for each."""
    second = relay.vendor.add_secret()
    relay.issuer.use_keys([relay.vendor.secret, second])
    relay.vendor.revoke_secret(relay.vendor.secret)
    relay.vendor.revoke_secret(second)
    await relay.failure()
    for _ in range(300):
        await asyncio.gather(*(relay.failure() for _ in range(20)))
        relay.clock.advance(1)
    assert relay.vendor.journal.in_window(60, where=failed) == 4
    by_key = [call.secret for call in relay.vendor.journal.calls]
    assert by_key == [relay.vendor.secret.digest().hex(), second.digest().hex()] * 10


async def test_V3_a_revoked_first_key_of_two_no_caller_notices(relay: Relay) -> None:
    """The call that meets the refusal goes on with the next key; the first is not asked again."""
    second = relay.vendor.add_secret()
    relay.issuer.use_keys([relay.vendor.secret, second])
    await relay.request_token()
    relay.vendor.revoke_secret(relay.vendor.secret)
    all_issued = await asyncio.gather(*(relay.request_token() for _ in range(5)))
    assert len(all_issued) == 5
    before = relay.calls
    for _ in range(20):
        await relay.request_token()
    late = relay.vendor.journal.calls[before:]
    assert {call.secret for call in late} == {second.digest().hex()}
    assert not relay.issuer.credentials.is_open
    assert relay.vendor.journal.in_window(3600, where=failed) <= 5


async def test_V3_after_a_rotation_nobody_in_the_queue_tries_the_old_key() -> None:
    """The key is chosen when the call goes out, not when its mint began to wait."""
    slow = Budget(rate=1200, per=60, burst=1, max_wait=5)
    async with relaying(budget=slow) as relay:
        second = relay.vendor.add_secret()
        relay.issuer.use_keys([relay.vendor.secret, second])
        relay.vendor.revoke_secret(relay.vendor.secret)
        all_issued = await asyncio.gather(*(relay.request_token() for _ in range(10)))
        assert len(all_issued) == 10
        assert relay.vendor.journal.in_window(60, where=failed) == 1


async def test_V3_refusals_that_turn_into_429_stay_a_matter_of_the_key() -> None:
    """A vendor that throttles failed authentication must not look like one that is busy."""
    settings = VendorSettings(ip=None, failures=Allowance(1, 3600))
    async with relaying(settings, budget=IMPATIENT) as relay:
        relay.vendor.revoke_secret(relay.vendor.secret)
        assert (await relay.failure()).status == 502
        for _ in range(5):
            relay.clock.advance(30)
            assert (await relay.failure()).status == 502
            assert relay.paused_for == 0
        assert [call.status for call in relay.vendor.journal.calls] == [403, *[429] * 5]
        assert relay.errors == {"bad_key": 1, "rate_limited": 5}


async def test_V3_a_429_with_a_good_key_is_not_a_matter_of_the_key() -> None:
    """The other way round: after an accepted key a 429 pauses the budget, and is a 503."""
    async with relaying(budget=IMPATIENT) as relay:
        await relay.request_token()
        relay.vendor.fail(faults.error(Refusal.RATE_LIMITED, retry_after="7"))
        error = await relay.failure()
        assert (error.status, error.code) == (503, "SERVICE_UNAVAILABLE")
        assert not relay.issuer.credentials.is_open
        assert 6 < relay.paused_for <= 7


async def test_V3_an_answer_that_is_not_the_vendor_s_own_condemns_no_key(relay: Relay) -> None:
    """A page of the edge, a bare status, an unknown code: passing faults, whatever the status."""
    for fault in (
        faults.edge_denied(),
        faults.html(401),
        faults.html(403),
        faults.error((401, "SOMETHING_NEW")),
        faults.error((403, "SOMETHING_NEW")),
    ):
        with relay.vendor.fail(fault):
            await relay.failure()
        assert not relay.issuer.credentials.is_open
        assert not relay.issuer.credentials.rejected
    await relay.request_token()


@pytest.mark.parametrize("fault", [faults.bare_unauthorized(), faults.bare_unauthorized(401)])
async def test_V3_the_old_bare_refusal_means_the_key(relay: Relay, fault: faults.Fault) -> None:
    """`{"error": "Unauthorized"}`, with 200 too, as some endpoints answered until 06/2026."""
    relay.vendor.fail(fault)
    assert (await relay.failure()).status == 502
    assert relay.issuer.credentials.is_open
    assert relay.calls == 1


async def test_V3_new_keys_are_tried_at_once_and_a_good_one_opens_the_way(relay: Relay) -> None:
    """`use_keys` forgives; the same list again forgives nothing."""
    relay.vendor.revoke_secret(relay.vendor.secret)
    await relay.failure()
    relay.issuer.use_keys([relay.vendor.secret])
    await relay.failure()
    assert relay.calls == 1
    relay.issuer.use_keys([relay.vendor.add_secret()])
    await relay.request_token()
    assert not relay.issuer.credentials.is_open
    assert not relay.issuer.credentials.rejected


async def test_V3_a_key_that_is_refused_again_is_told_of_again(relay: Relay) -> None:
    """Once each time it dies: what an operator has mended may break a second time."""
    secret = relay.vendor.secret
    with structlog.testing.capture_logs() as told:
        for _ in range(2):
            relay.vendor.revoke_secret(secret)
            for _ in range(2):
                await relay.failure()
                relay.clock.advance(KEY_PAUSE / SECOND)
            relay.vendor.add_secret(secret.reveal())
            await relay.request_token()
    refused = [each["key"] for each in told if each["event"] == "broker.upstream_key_refused"]
    assert refused == [1, 1]


async def test_V3_a_new_key_that_is_bad_too_is_tried_once(relay: Relay) -> None:
    """And the breaker is as closed to callers as before."""
    relay.vendor.revoke_secret(relay.vendor.secret)
    await relay.failure()
    relay.issuer.use_keys([Secret(secrets.token_urlsafe(16))])
    outcomes = await asyncio.gather(*(relay.failure() for _ in range(50)))
    assert {error.status for error in outcomes} == {502}
    assert relay.calls == 2


async def test_V3_T9_cached_tokens_are_answered_whatever_the_key() -> None:
    """In their renewal window too; attempts to renew are as rare as a failing key's are."""
    async with relaying(draw=lambda: 0.999) as relay:
        known = visitor()
        held = await relay.request_token(known)
        relay.vendor.revoke_secret(relay.vendor.secret)
        relay.clock.advance(50 * 60)  # ten minutes left: past the mark
        for tries in range(1, 4):
            for _ in range(50):
                assert (await relay.request_token(known)).token is held.token
                await relay.settled()
            assert relay.refreshes("ahead", "failed") == tries
            relay.clock.advance(6)  # past the longest back-off, not past the breaker's pause
        assert relay.calls == 2


class TestKeyFile:
    """The whole broker, with the key in a file, on the system's clocks."""

    @staticmethod
    def tree(*files: Path) -> dict[str, object]:
        return {
            "issuer": {
                "upstream": {"api_secret_files": [str(file) for file in files]},
                "budget": {"rate": 1060, "burst": 8, "window": 1068, "max_wait": "8s"},
            }
        }

    async def test_V3_a_dead_key_recovers_within_a_second_of_its_file_s_change(
        self, vendor: FakeVendor, tmp_path: Path
    ) -> None:
        """Without restart; meanwhile callers see 502 and the vendor sees a handful of failures."""
        key = tmp_path / "key"
        key.write_text(vendor.secret.reveal() + "\n")
        async with broker_before(vendor, self.tree(key)) as house:
            vendor.revoke_secret(vendor.secret)
            await _besiege(house, rounds=40)
            failures = vendor.journal.in_window(60, where=failed)
            assert 1 <= failures <= 8  # those that were under way before the first answer
            metrics = await house.scrape()
            assert metrics['broker_breaker_open{breaker="credentials"}'] == 1
            assert metrics['broker_upstream_errors_total{reason="bad_key"}'] == failures
            assert metrics['broker_rejections_total{limit="budget"}'] == 0
            fresh = tmp_path / "fresh"
            fresh.write_text(vendor.add_secret().reveal() + "\n")
            fresh.replace(key)
            changed = time.monotonic()
            async with asyncio.timeout(10):
                while (reply := await house.request_token()).status != 200:
                    assert reply.status == 502
                    await asyncio.sleep(0.02)
            assert time.monotonic() - changed < 2  # half of it is the polling; on an idle machine
            metrics = await house.scrape()
            assert metrics['broker_breaker_open{breaker="credentials"}'] == 0
            assert metrics['broker_config_reloads_total{outcome="success"}'] == 1
            (refused,) = house.events("broker.upstream_key_refused")
            assert (refused["key"], refused["code"]) == (1, "RUNTIME_SUSPENDED")

    async def test_V3_a_key_file_that_is_half_written_changes_nothing(
        self, vendor: FakeVendor, tmp_path: Path
    ) -> None:
        """An empty file is an error in the log and in the metrics; the old key stays in force."""
        key = tmp_path / "key"
        key.write_text(vendor.secret.reveal())
        async with broker_before(vendor, self.tree(key)) as house:
            key.write_text("")
            assert await house.app.reloader.reload() is False
            assert (await house.request_token()).status == 200
            (event,) = house.events("broker.reload_failed")
            assert "is empty" in event["error"]


async def _besiege(house: House, rounds: int) -> None:
    for _ in range(rounds):
        replies = await asyncio.gather(*(house.request_token() for _ in range(10)))
        assert {(reply.status, reply.code) for reply in replies} == {(502, "UPSTREAM_UNAVAILABLE")}


async def test_V8_of_those_who_queue_only_one_becomes_the_probe() -> None:
    """They came before the key was refused; their turns come while the probe is out."""
    slow = Budget(rate=240, per=60, burst=2, max_wait=5)
    async with relaying(budget=slow) as relay:
        relay.vendor.revoke_secret(relay.vendor.secret)
        crowd = [relay.begin() for _ in range(6)]
        await until(lambda: relay.issuer.credentials.is_open, "the refusal")
        before = relay.calls  # two, where the second's turn came before the first's answer
        with relay.vendor.fail(faults.hang()):
            relay.clock.advance(30)
            await relay.arrived(before + 1)
            await until(lambda: sum(task.done() for task in crowd) == 5, "the others' answers")
            assert relay.calls == before + 1
            await relay.vendor.refuse_connections()
            outcomes = await asyncio.gather(*crowd, return_exceptions=True)
        assert {type(outcome).__name__ for outcome in outcomes} == {"UpstreamUnavailable"}


async def test_V8_a_probe_of_the_key_that_is_cancelled_does_not_wedge_the_breaker() -> None:
    """The probe's callers leave and the broker's own timeout ends it: another probe follows."""
    clock = FakeClock()
    async with vendor_on(clock, UNLIMITED) as vendor:
        relay = Relay(vendor, clock)
        relay.minter._timeout = 0.05
        await relay.open()
        vendor.revoke_secret(vendor.secret)
        await relay.failure()
        vendor.add_secret(vendor.secret.reveal())
        clock.advance(30)
        with vendor.fail(faults.hang()):
            await relay.failure()
        assert relay.issuer.credentials.is_open
        clock.advance(10)
        await relay.request_token()
        assert not relay.issuer.credentials.is_open
        await relay.close()
