"""G9 over real sockets: brokers and workers on one store, sessions ended through each of them."""

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import plain
import pytest
from gateways import AGENT, Broker, brokers
from processes import until
from servers import StoreServer, store_server, valkey_binary

pytestmark = pytest.mark.parts

VERIFY = "/v1/embed-tokens/verify"


def on(server: StoreServer, admin: str, **more: object) -> dict[str, object]:
    """Return the settings of a broker on this store, whose operator has this secret."""
    return {
        "store.url": server.url,
        "store.encryption_key": KEY,
        "store.timeout": "2s",  # a busy machine is no store that is away
        "admin.secret": admin,
        "server.drain_lead": "0s",
        **{name.replace("__", "."): value for name, value in more.items()},
    }


KEY = secrets.token_urlsafe(48)
ADMIN = secrets.token_urlsafe(24)


@pytest.fixture(scope="module")
def store() -> Iterator[StoreServer]:
    """One server for all."""
    with store_server(valkey_binary()) as server:
        yield server


def good(broker: Broker, token: str) -> int:
    """Return what a proxy is told."""
    return plain.get(broker.url + VERIFY, headers={"X-Embed-Token": token}).status_code


def operator(broker: Broker, method: str, path: str, **query: str) -> httpx.Response:
    """Ask the admin listener."""
    return plain.request(
        method,
        f"http://127.0.0.1:{broker.admin_port}/v1/sessions{path}",
        params=query,
        headers={"api-secret": ADMIN},
    )


def introspect(broker: Broker, token: str) -> Any:
    """Ask what a token is."""
    headers = {"api-secret": broker.secret}
    return plain.post(f"{broker.url}/v1/introspect", data={"token": token}, headers=headers).json()


def test_G9_a_session_ended_at_one_replica_is_over_at_the_other(
    store: StoreServer, tmp_path: Path
) -> None:
    """Listed, ended and verified at either; neither hands it out again, at once."""
    one = Broker(tmp_path, on(store, ADMIN))
    two = Broker(tmp_path, on(store, ADMIN)).like(one)
    with brokers(one, two):
        for here, there in ((one, two), (two, one)):
            data = here.token("beefbeef")
            assert there.token("beefbeef") == data, "one store, one token"
            assert (good(here, data["token"]), good(there, data["token"])) == (200, 200)
            assert introspect(there, data["token"])["sid"] == data["session_id"]
            for broker in (here, there):
                listed = operator(broker, "GET", "", agent_id=AGENT).json()["sessions"]
                assert [session["session_id"] for session in listed] == [data["session_id"]]
            ended = operator(there, "DELETE", f"/{data['session_id']}")
            assert (ended.status_code, ended.json()) == (200, {"ended": 1})
            assert (good(here, data["token"]), good(there, data["token"])) == (401, 401)
            assert introspect(here, data["token"]) == {"active": False}
            after = here.token("beefbeef")
            assert after["session_id"] != data["session_id"]
            assert there.token("beefbeef") == after
            operator(here, "DELETE", f"/{after['session_id']}")


def test_G9_ended_at_one_replica_while_a_mint_is_in_flight_at_the_other(
    store: StoreServer, tmp_path: Path
) -> None:
    """The renewal that was under way is not handed out, and nobody gets what was held."""
    store.flush()
    from broker.testing import FakeVendor
    from broker.testing.vendor import faults

    async def scenario() -> None:
        async with FakeVendor() as vendor:
            relay = {
                "issuer.kind": "upstream",
                "issuer.upstream.base_url": vendor.url,
                "issuer.upstream.api_secret": vendor.secret.reveal(),
                "issuer.budget.burst": 50,
                "issuer.budget.rate": 6000,
                "issuer.budget.window": 6050,
            }
            one = Broker(tmp_path, on(store, ADMIN) | relay)
            two = Broker(tmp_path, on(store, ADMIN) | relay).like(one)
            await asyncio.to_thread(one.start)
            await asyncio.to_thread(two.start)
            try:
                await race(one, two, vendor, faults.slow(6.0))
            finally:
                await asyncio.to_thread(one.kill)
                await asyncio.to_thread(two.kill)

    async def race(one: Broker, two: Broker, vendor: FakeVendor, slow: Any) -> None:
        held = await asyncio.to_thread(one.token, "beefbeef")
        assert await asyncio.to_thread(good, two, held["token"]) == 200
        vendor.fail(slow, times=1)
        known = len(vendor.journal.calls)
        async with httpx.AsyncClient() as client:
            asking = [
                asyncio.create_task(
                    client.post(
                        f"{broker.url}/v1/embed-tokens/request",
                        json={"agent_id": AGENT, "fingerprint": "beefbeef", "fresh": True},
                        headers={"api-secret": broker.secret},
                        timeout=20,
                    )
                )
                for broker in (one, two)
            ]
            await until(lambda: len(vendor.journal.calls) > known)  # who takes its time
            path = f"/{held['session_id']}"
            ended = await asyncio.to_thread(operator, two, "DELETE", path)
            assert ended.status_code == 200
            answers = await asyncio.gather(*asking)
        handed = [a.json()["data"]["session_id"] for a in answers if a.status_code == 200]
        assert held["session_id"] not in handed
        assert {a.status_code for a in answers} <= {200, 503}
        assert 503 in {a.status_code for a in answers}, "the mint that was in flight is no answer"
        for broker in (one, two):
            assert await asyncio.to_thread(good, broker, held["token"]) == 401
        after = await asyncio.to_thread(one.token, "beefbeef")
        assert after["session_id"] != held["session_id"]
        assert await asyncio.to_thread(two.token, "beefbeef") == after

    asyncio.run(scenario())


def test_workers_share_sessions_and_their_supervisor_ends_them(
    store: StoreServer, tmp_path: Path
) -> None:
    """The admin listener is the supervisor's; an end there holds in every worker."""
    store.flush()
    with brokers(Broker(tmp_path, on(store, ADMIN, server__workers=2))) as (broker,):
        made = {broker.token()["session_id"]: None for _ in range(8)}
        listed = operator(broker, "GET", "", agent_id=AGENT, limit="100").json()["sessions"]
        assert {session["session_id"] for session in listed} == made.keys()
        data = broker.token("beefbeef")
        assert operator(broker, "GET", f"/{data['session_id']}").json()["fingerprint"] == "beefbeef"
        assert operator(broker, "DELETE", f"/{data['session_id']}").status_code == 200
        for _ in range(10):  # whichever worker answers
            assert good(broker, data["token"]) == 401
            assert broker.token("beefbeef")["session_id"] != data["session_id"]
        headers = {"api-secret": broker.secret}
        url = f"http://127.0.0.1:{broker.admin_port}/v1/sessions?agent_id={AGENT}"
        assert plain.get(url, headers=headers).status_code == 401


def test_S1_without_the_store_nothing_is_ended_and_signed_tokens_are_still_good(
    tmp_path: Path,
) -> None:
    """`local`: the token proves itself; ending is refused, because it would not hold everywhere."""
    with (
        store_server(valkey_binary()) as store,
        brokers(Broker(tmp_path, on(store, ADMIN))) as (broker,),
    ):
        data = broker.token()
        store.kill()
        assert good(broker, data["token"]) == 200
        ended = operator(broker, "DELETE", f"/{data['session_id']}")
        assert (ended.status_code, ended.headers["Retry-After"]) == (503, "1")
        form = {"token": data["token"]}
        headers = {"api-secret": broker.secret}
        revoked = plain.post(f"{broker.url}/v1/revoke", data=form, headers=headers)
        assert (revoked.status_code, revoked.headers["Retry-After"]) == (503, "1")
        assert good(broker, data["token"]) == 200
