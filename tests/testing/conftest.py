"""A fake vendor on a clock of our own, and somebody who calls it over real HTTP."""

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec
import pytest

from broker.testing.vendor.vendor import FakeVendor

AGENT = "A78WKV4515"


class Ticks:
    """A monotonic clock, in seconds, that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Reply(msgspec.Struct):
    """What came back."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> dict:
        return msgspec.json.decode(self.body)

    @property
    def code(self) -> str:
        return self.json["error"]["code"]

    @property
    def token(self) -> str:
        return self.json["data"]["token"]

    @property
    def session(self) -> str:
        data = self.json["data"]
        return data["session_id"] if "session_id" in data else data["sid"]


class Caller:
    """A client of the vendor; `source` is the IP it calls from."""

    def __init__(self, vendor: FakeVendor, source: str = "127.0.0.1") -> None:
        self.vendor = vendor
        connector = aiohttp.TCPConnector(local_addr=(source, 0))
        timeout = aiohttp.ClientTimeout(total=5)
        self.http = aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            headers={"Accept-Encoding": "identity"},  # or the vendor compresses
        )

    def request_token(
        self,
        agent: object = AGENT,
        fingerprint: object = "f1",
        model: object = None,
        *,
        secret: str | None = "",
        path: str = "/v1/embed-tokens/request",
        body: bytes | None = None,
        **options: object,
    ) -> "aiohttp.client._RequestContextManager":
        """Begin a request; `secret` "" means the vendor's own, None means none."""
        request = {"agent_id": agent, "fingerprint": fingerprint}
        if model is not None:
            request["model"] = model
        headers = dict(options.pop("headers", {}))
        if secret is not None:
            headers["api-secret"] = secret or self.vendor.secret.reveal()
        data = msgspec.json.encode(request) if body is None else body
        url = self.vendor.url + path
        return self.http.post(url, data=data, headers=headers, allow_redirects=False, **options)

    async def mint(self, *args: object, **options: object) -> Reply:
        async with self.request_token(*args, **options) as response:
            return Reply(response.status, response.headers, await response.read())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.http.close()


@pytest.fixture
def new_caller() -> type[Caller]:
    """For tests that make a vendor of their own: modules here cannot import each other."""
    return Caller


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
async def vendor(ticks: Ticks) -> AsyncIterator[FakeVendor]:
    async with FakeVendor(seed=1, monotonic=ticks) as vendor:
        yield vendor


@pytest.fixture
async def caller(vendor: FakeVendor) -> AsyncIterator[Caller]:
    async with Caller(vendor) as caller:
        yield caller
