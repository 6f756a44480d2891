"""Refusals that all replicas remember, and each by itself while the server is away."""

import secrets
import time
from collections.abc import Sequence

import pytest
from replica import Replica, opened
from servers import StoreServer, store_server, valkey_binary
from shared_store_cases import limits_of, request_of

from broker.issuers.negative_cache import ACCOUNT_MEMORY, AGENT_MEMORY, LocalNegativeCache
from broker.issuers.upstream import UpstreamIssuer
from broker.issuers.vendor.client import VendorClient
from broker.issuers.vendor.replies import Refused, Scope
from broker.model import Secret, TokenRequest
from broker.pacing.pacer import BudgetPacer
from broker.pacing.slots import Budget
from broker.telemetry.cells import MetricLayout
from broker.telemetry.metrics import UpstreamMetrics
from broker.testing import FakeClock

pytestmark = pytest.mark.parts

NOT_FOUND = Refused(404, "NOT_FOUND", "no such agent", Scope.AGENT_MODEL)
UNPAID = Refused(402, "PAYMENT_REQUIRED", "caf\u00e9", Scope.ACCOUNT)
BAD = Refused(422, "BAD_FINGERPRINT", "no", Scope.NEVER)


async def test_what_one_was_told_the_other_knows(valkey: StoreServer) -> None:
    """By agent and model, or for the whole account; a bad fingerprint is nobody else's affair."""
    valkey.flush()
    async with (
        opened(Replica(valkey.address, limits_of())) as one,
        opened(Replica(valkey.address, limits_of())) as other,
    ):
        request = request_of()
        one.shared_backend.refusals.remember(request, NOT_FOUND)
        one.shared_backend.refusals.remember(request_of(), BAD)
        await one.settled()
        find = other.shared_backend.refusals.find
        assert await find(request_of()) == NOT_FOUND
        for different in (
            TokenRequest("web", "B", "abcd"),
            TokenRequest("web", request.agent, "abcd", "m"),
            TokenRequest("web", request.agent, "abcd", "-"),
        ):
            assert await find(different) is None
        one.shared_backend.refusals.remember(request, UNPAID)
        await one.settled()
        assert await find(TokenRequest("web", "B", "abcd")) == UNPAID
        assert one.errors == other.errors == {}


async def test_M4_a_success_anywhere_puts_it_right_everywhere(valkey: StoreServer) -> None:
    """At once, for the account and for this agent and model."""
    valkey.flush()
    async with (
        opened(Replica(valkey.address, limits_of())) as one,
        opened(Replica(valkey.address, limits_of())) as other,
    ):
        for refused in (NOT_FOUND, UNPAID):
            one.shared_backend.refusals.remember(request_of(), refused)
        await one.settled()
        other.shared_backend.refusals.forget(request_of())
        await other.settled()
        assert await one.shared_backend.refusals.find(request_of()) is None


async def test_V3_another_account_is_not_refused_for_this_ones_bill(valkey: StoreServer) -> None:
    """By its keys: with a new one the vendor is asked anew, by who has the old one it is not."""
    valkey.flush()
    old, new = [Secret(secrets.token_urlsafe(16))], [Secret(secrets.token_urlsafe(16))]
    async with (
        opened(Replica(valkey.address, limits_of())) as one,
        opened(Replica(valkey.address, limits_of())) as other,
    ):
        for replica in (one, other):
            replica.shared_backend.refusals.use_keys(old)
        one.shared_backend.refusals.remember(request_of(), UNPAID)
        await one.settled()
        assert await other.shared_backend.refusals.find(request_of()) == UNPAID
        one.shared_backend.refusals.use_keys(new)
        await one.settled()
        assert await one.shared_backend.refusals.find(request_of()) is None
        assert await other.shared_backend.refusals.find(request_of()) == UNPAID
        other.shared_backend.refusals.use_keys(new)
        assert await other.shared_backend.refusals.find(request_of()) is None


async def test_V3_an_issuers_refusals_are_of_its_keys() -> None:
    """From its start on, and anew when its list of keys is another one."""

    class Accounts(LocalNegativeCache):
        def use_keys(self, keys: Sequence[Secret]) -> None:
            accounts.append(list(keys))

    accounts: list[list[Secret]] = []
    clock, (one, other) = FakeClock(), (Secret(secrets.token_urlsafe(16)) for _ in range(2))
    issuer = UpstreamIssuer(
        VendorClient("http://127.0.0.1:9", 1.0),
        [one],
        BudgetPacer(Budget(rate=60, per=60, burst=1, max_wait=1), lambda _seconds: None),
        clock,
        UpstreamMetrics(MetricLayout(), shown=True),
        refusals=Accounts(clock),
    )
    issuer.use_keys([one])
    issuer.use_keys([other, one])
    await issuer.close()
    assert accounts == [[one], [other, one]]


async def test_M4_they_end_by_themselves(valkey: StoreServer) -> None:
    """After the time of their class, not before and not never."""
    valkey.flush()
    async with opened(Replica(valkey.address, limits_of())) as replica:
        for refused in (NOT_FOUND, UNPAID):
            replica.shared_backend.refusals.remember(request_of(), refused)
        await replica.settled()
        names = replica.names
        for key, seconds in (
            (names.refused(request_of()), AGENT_MEMORY),
            (names.account(()), ACCOUNT_MEMORY),
        ):
            assert (seconds - 5) * 1000 < valkey.command("PTTL", key) <= seconds * 1000


async def test_noise_in_the_store_refuses_nobody(valkey: StoreServer) -> None:
    """A word of another version, or of somebody else."""
    valkey.flush()
    async with opened(Replica(valkey.address, limits_of())) as replica:
        for noise in (
            *("", "x", "[]", '[404,"A"]', '[404,"A","b","scope"]', "{}", "\xff"),
            *(f'[{status},"A","b","account"]' for status in (200, 302, 401, 500, 999, -1)),
            *(f'[404,"{code}","b","account"]' for code in ("", "a", "A\\n", "A" * 65)),
            *(f'[404,"A","{text}","account"]' for text in ("\\u202e", "\\n", "b" * 1025)),
        ):
            valkey.command("SET", replica.names.account(()), noise)
            assert await replica.shared_backend.refusals.find(request_of()) is None
        assert replica.errors == {}


async def test_S1_while_the_server_is_away_each_goes_by_its_own() -> None:
    """What this one was told still holds here, in time; what it forgot is forgotten."""
    with store_server(valkey_binary()) as server:
        async with opened(Replica(server.address, limits_of(), timeout=0.2)) as replica:
            replica.shared_backend.refusals.remember(request_of(), NOT_FOUND)
            await replica.settled()
            server.pause()
            began = time.monotonic()
            assert await replica.shared_backend.refusals.find(request_of()) == NOT_FOUND
            assert time.monotonic() - began < 1
            replica.shared_backend.refusals.forget(request_of())
            assert await replica.shared_backend.refusals.find(request_of()) is None
            await replica.settled()
            server.resume()
