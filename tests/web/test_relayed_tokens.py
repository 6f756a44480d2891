"""Tokens of the vendor: known by what was handed out, since only the vendor can verify them."""

import json
import secrets
from codecs import BOM_UTF8
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlencode

from edge import AGENT, Edge, Reply, request, serving, visitor

from broker.testing import FakeVendor
from broker.testing.vendor import faults
from broker.testing.vendor.faults import Fault
from broker.testing.vendor.replies import Answer

VERIFY = "/v1/embed-tokens/verify"


@asynccontextmanager
async def relaying(vendor: FakeVendor) -> AsyncIterator[Edge]:
    """Run a broker in front of this vendor."""
    upstream = {"base_url": vendor.url, "api_secret": vendor.secret.reveal()}
    budget = {"rate": 6000, "burst": 100, "window": 6100}
    tree = {"issuer": {"kind": "upstream", "upstream": upstream, "budget": budget}}
    async with serving(tree) as edge:
        yield edge


async def form(edge: Edge, path: str, token: str) -> Reply:
    """Post a token."""
    body = urlencode({"token": token}).encode()
    return await edge.raw(request("POST", path, [("api-secret", edge.secret)], body))


async def test_a_token_of_the_vendor_is_good_while_it_is_recorded() -> None:
    """Verified and introspected from the record; unknown ones, and real ones of others, are not."""
    async with FakeVendor() as vendor, relaying(vendor) as edge:
        fingerprint = visitor()
        minted = await edge.request_token(fingerprint)
        good = await edge.get(VERIFY, X_Embed_Token=minted.token)
        assert (good.status, good.body) == (200, b"")
        told = {name: value for name, value in good.headers if name.startswith("X-Embed-")}
        expires = int(told.pop("X-Embed-Expires"))
        assert 0 <= minted.json["data"]["expires_at"] - expires <= 10
        assert told == {
            "X-Embed-Session": minted.session,
            "X-Embed-Agent": AGENT,
            "X-Embed-Fingerprint": fingerprint,
        }
        active = (await form(edge, "/v1/introspect", minted.token)).json
        assert active["active"] is True
        assert (active["sid"], active["client_id"]) == (minted.session, "web")
        for unknown in (minted.token[:-1], minted.token + "A", secrets.token_urlsafe(40)):
            assert (await edge.get(VERIFY, X_Embed_Token=unknown)).status == 401
        edge.time.advance(3601)
        assert (await edge.get(VERIFY, X_Embed_Token=minted.token)).status == 401
        assert (await form(edge, "/v1/introspect", minted.token)).json == {"active": False}


async def test_G9_a_revoked_session_that_the_vendor_opens_again_is_not_handed_out() -> None:
    """The vendor returns the token it gave before: ended here is ended; another is welcome."""
    async with FakeVendor() as vendor, relaying(vendor) as edge:
        fingerprint = visitor()
        minted = await edge.request_token(fingerprint)
        assert (await form(edge, "/v1/revoke", minted.token)).status == 200
        assert (await edge.get(VERIFY, X_Embed_Token=minted.token)).status == 401
        vendor.fail(faults.same_token(), times=1)
        again = await edge.request_token(fingerprint)
        assert (again.status, again.code) == (503, "SERVICE_UNAVAILABLE")
        after = await edge.request_token(fingerprint)
        assert after.session != minted.session


async def test_N8_a_byte_order_mark_is_no_part_of_json_on_either_side() -> None:
    """Some editors and edges put one before everything; one, and no more."""

    def marked(times: int) -> Fault:
        return Fault(
            name="marked",
            edit=lambda it: Answer(it.status, BOM_UTF8 * times + it.body, it.headers),
        )

    async with FakeVendor() as vendor, relaying(vendor) as edge:
        body = json.dumps({"agent_id": AGENT, "fingerprint": visitor()}).encode()
        with vendor.fail(marked(1)):
            reply = await edge.post(BOM_UTF8 + body)
            assert reply.status == 200, reply.body
            assert reply.token
        assert (await edge.post(BOM_UTF8 * 2 + body)).code == "VALIDATION_ERROR"
        with vendor.fail(marked(2)):
            assert (await edge.request_token(visitor())).status in {502, 503}
        scraped = await edge.scrape()
        assert scraped['broker_upstream_errors_total{reason="not_json"}'] >= 1
