"""With the store away, "unknown" and "cannot know" are two answers: row N21, on real processes.

A vendor's token proves nothing by itself; the replica that did not hand it out knows it from the
store alone.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from processes import merged
from replicas import Replica, away, back, replicas, tree_for, until, visitor
from servers import StoreServer, store_server, valkey_binary

from broker.testing import FakeVendor

pytestmark = pytest.mark.parts


class Answer(msgspec.Struct):
    """What a route said."""

    status: int
    headers: dict[str, str]
    body: bytes


class VisitListener:
    """A client of one replica, and its operator."""

    def __init__(self, replica: Replica, secret: str, admin: str) -> None:
        self.replica = replica
        self._client = {"api-secret": secret}
        self._operator = {"api-secret": admin}

    async def revoke(self, token: str) -> Answer:
        return await self._form("revoke", token)

    async def introspect(self, token: str) -> Answer:
        return await self._form("introspect", token)

    async def verify(self, token: str) -> Answer:
        url = f"{self.replica.broker.url}/v1/embed-tokens/verify"
        return await self._send("GET", url, {"X-Embed-Token": token})

    async def session(self, method: str, path: str) -> Answer:
        url = f"{self.replica.broker.admin_url}/v1/sessions{path}"
        return await self._send(method, url, self._operator)

    async def _form(self, route: str, token: str) -> Answer:
        url = f"{self.replica.broker.url}/v1/{route}"
        return await self._send("POST", url, self._client, {"token": token})

    async def _send(
        self, method: str, url: str, headers: dict[str, str], form: dict[str, str] | None = None
    ) -> Answer:
        async with self.replica.http.request(method, url, headers=headers, data=form) as answer:
            return Answer(answer.status, dict(answer.headers), await answer.read())


@pytest.fixture
def frail() -> Iterator[StoreServer]:
    """A store that the test may stop."""
    with store_server(valkey_binary()) as server:
        yield server


@asynccontextmanager
async def two(
    folder: Path, store: StoreServer, vendor: FakeVendor | None, on_error: str = "local"
) -> AsyncIterator[tuple[VisitListener, VisitListener]]:
    """Run two replicas and ask them as their client and their operator."""
    admin = secrets.token_urlsafe(24)
    tree = merged(
        tree_for(folder, store, vendor), {"admin.secret": admin, "store.on_error": on_error}
    )
    async with replicas(folder, tree) as fleet:
        one, other = (VisitListener(replica, replica._secret, admin) for replica in fleet)
        try:
            yield one, other
        finally:
            store.resume()


def cannot_know(answer: Answer) -> bool:
    """Whether it is a 503 that says when to come back, and why."""
    if answer.status != 503:
        return False
    assert answer.headers["Retry-After"] == "1"
    assert b"the shared store is away" in answer.body
    return True


@pytest.mark.parametrize("on_error", ["local", "closed"])
async def test_N21_nothing_is_unknown_while_the_store_is_away(
    frail: StoreServer, vendor: FakeVendor, tmp_path: Path, on_error: str
) -> None:
    """A vendor's token at the replica that did not hand it out: 503 to whoever asks about it.

    Nothing is ended by that, and as soon as the store is back the same request ends it for all.
    """
    async with two(tmp_path, frail, vendor, on_error) as (one, other):
        fleet = [one.replica, other.replica]
        fingerprint = visitor()
        minted = await one.replica.request_token(fingerprint)
        path = f"/{minted.session}"
        frail.pause()
        await away(fleet)
        assert cannot_know(await other.revoke(minted.token))
        assert cannot_know(await other.introspect(minted.token))
        assert cannot_know(await other.verify(minted.token))
        for caller in (one, other):
            assert cannot_know(await caller.revoke(minted.token))
            assert cannot_know(await caller.session("GET", path))
            assert cannot_know(await caller.session("DELETE", path))
            assert cannot_know(await caller.session("DELETE", f"{path}?scope=visitor"))
            assert cannot_know(await caller.session("GET", "?agent_id=A1"))
        if on_error == "local":  # who handed it out goes by its own record
            assert (await one.verify(minted.token)).status == 200
            assert b'"active":true' in (await one.introspect(minted.token)).body.replace(b" ", b"")
        else:
            assert cannot_know(await one.verify(minted.token))
            assert cannot_know(await one.introspect(minted.token))
        frail.resume()
        await back(fleet)
        assert (await one.replica.request_token(fingerprint)).token == minted.token
        assert (await other.session("GET", path)).status == 200
        assert (await other.revoke(minted.token)).status == 200
        for caller in (one, other):
            assert (await caller.verify(minted.token)).status == 401
            assert (await caller.session("GET", path)).status == 404
        assert (await one.replica.request_token(fingerprint)).session != minted.session


@pytest.mark.parametrize("on_error", ["local", "closed"])
async def test_N21_a_signed_token_proves_itself_but_its_end_needs_the_store(
    frail: StoreServer, tmp_path: Path, on_error: str
) -> None:
    """`local`: good by its proof and by the ends this replica knows; `closed`: 503.

    What is no token of ours is known to be none without any store.
    """
    async with two(tmp_path, frail, None, on_error) as (one, other):
        minted = await one.replica.request_token()
        ended = await other.replica.request_token()
        assert (await other.revoke(ended.token)).status == 200
        frail.pause()
        await away([one.replica, other.replica])
        assert (await other.verify("no token")).status == 401
        assert (await other.revoke("no token")).status == 200
        assert cannot_know(await other.revoke(minted.token))
        if on_error == "local":
            assert (await other.verify(minted.token)).status == 200
            assert (await other.verify(ended.token)).status == 401, "it has ended it itself"
        else:
            assert cannot_know(await other.verify(minted.token))
            assert cannot_know(await other.introspect(minted.token))
        frail.resume()
        await back([one.replica, other.replica])
        assert (await other.revoke(minted.token)).status == 200
        assert (await one.verify(minted.token)).status == 401


async def test_N21_a_revoke_that_was_answered_holds_for_what_was_minted_alone(
    frail: StoreServer, vendor: FakeVendor, tmp_path: Path
) -> None:
    """Minted at one replica without the store, ended at the other as soon as that has it again.

    The record may reach the store before or after that; what was answered with 200 is over.
    """
    async with two(tmp_path, frail, vendor) as (one, other):
        frail.pause()
        await away([one.replica, other.replica])
        fingerprint = visitor()
        served = []

        async def is_served() -> bool:
            served.append(await one.replica.request_token(fingerprint))
            return served[-1].status == 200

        await until(is_served, "a mint of its own share", 60)
        minted = served[-1]
        frail.resume()

        async def is_revoked() -> bool:
            answer = await other.revoke(minted.token)
            return answer.status == 200 or not cannot_know(answer)

        await until(is_revoked, "the end")
        await back([one.replica])

        async def is_over() -> bool:
            told = await asyncio.gather(one.verify(minted.token), other.verify(minted.token))
            return [answer.status for answer in told] == [401, 401]

        await until(is_over, "the end to hold everywhere")
        after = await one.replica.request_token(fingerprint)
        assert after.session != minted.session
