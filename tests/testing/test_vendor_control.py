"""The fake vendor as a command: faults by name, set from outside, and a line for each request."""

import asyncio
import io
import json
import re
import secrets
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import aiohttp
import pytest
from aiohttp import web
from documents import TEXT

from broker.cli.fake_vendor import DEFAULT_LISTEN
from broker.testing import FakeVendor
from broker.testing.vendor.control import CONTROL_PATH, Control
from broker.testing.vendor.journal import Call
from broker.testing.vendor.named import NAMED, BadFault, fault_named

AGENT = "A78WKV4515"
MINT = "/v1/embed-tokens/request"
ROOT = Path(__file__).parents[2]
START = 120.0

GOOD = {"=BYTES": "=3", "=SPAN": "=500ms", "=URL": "=http://a.example/", "=CODE": "=PLAN_REQUIRED"}
"""An argument for each form."""


async def _nothing() -> bytes:
    return b""


@pytest.mark.parametrize("name", NAMED)
def test_every_name_makes_a_fault(name: str) -> None:
    """With its argument, and without where it may be left out."""
    form = NAMED[name][0]
    plain = form.strip("[]")
    if not form.startswith("="):
        assert fault_named(name).name
    if plain:
        assert fault_named(name + GOOD.get(plain, "=7")).name


@pytest.mark.parametrize(
    "text",
    ["", "nothing", "hang=3", "slow", "slow=x", "cut", "cut=x", "refuse=NO_SUCH_CODE", "reset=x"],
)
def test_what_is_no_fault(text: str) -> None:
    """The message says what there is, or how it is written."""
    with pytest.raises(BadFault, match=r"there are|write"):
        fault_named(text)


def test_every_fault_in_the_pages_is_one() -> None:
    """A page whose `curl -s` is refused would look as if it had worked."""
    named = re.findall(r'(?:--fault |"fault": ")([^\s`"[]+)', TEXT)
    assert len(named) > 3
    for name in set(named) - {"help", "NAME"}:
        assert fault_named(name).name


@pytest.mark.parametrize(
    ("text", "status"), [("refuse=429", 429), ("refuse=plan_required", 403), ("refuse=503", 503)]
)
def test_a_refusal_is_named_by_code_or_status(text: str, status: int) -> None:
    answer = fault_named(text).answer
    assert answer is not None
    assert answer.status == status


async def control(vendor, method, content=None, headers=None):
    async with (
        aiohttp.ClientSession() as http,
        http.request(method, vendor.url + CONTROL_PATH, data=content, headers=headers) as response,
    ):
        return response.status, await response.json()


class TestControl:
    @pytest.fixture
    async def open_vendor(self) -> AsyncIterator[FakeVendor]:
        vendor = FakeVendor(seed=1)
        vendor.open_control()
        async with vendor:
            yield vendor

    async def test_sets_tells_and_takes_back(self, open_vendor, new_caller):
        """For so many calls, on the mint's path unless another one is named."""
        async with new_caller(open_vendor) as caller:
            order = json.dumps({"fault": "rate-limited=7s", "times": 1})
            status, told = await control(open_vendor, "POST", order)
            assert status == 200
            assert told["set"] == [{"fault": "429 RATE_LIMITED", "left": 1, "met": 0}]
            refused = await caller.mint()
            assert (refused.status, refused.headers["Retry-After"]) == (429, "7")
            assert (await caller.mint()).status == 200
            order = json.dumps({"fault": "refuse=500", "path": "*"})
            assert (await control(open_vendor, "POST", order))[0] == 200
            assert (await caller.mint(path="/v1/agent/generate")).status == 500
            status, told = await control(open_vendor, "GET")
            assert told["set"] == [{"fault": "500 INTERNAL_ERROR", "left": None, "met": 1}]
            assert set(told["known"]) == {name + form for name, (form, _, _) in NAMED.items()}
            assert (await control(open_vendor, "DELETE"))[1]["set"] == []
            assert (await caller.mint(path="/v1/agent/generate")).status == 200
        assert CONTROL_PATH not in {call.path for call in open_vendor.journal.records}

    async def test_the_latest_is_met_whatever_was_set_at_the_start(self, open_vendor, new_caller):
        """One for so many calls first, and what was there before it again afterwards."""
        open_vendor.fail(fault_named("refuse=500"))
        async with new_caller(open_vendor) as caller:
            await control(open_vendor, "POST", json.dumps({"fault": "refuse=503"}))
            assert (await caller.mint()).status == 503
            for code in (429, 402):
                order = {"fault": f"refuse={code}", "times": 1}
                await control(open_vendor, "POST", json.dumps(order))
            assert [(await caller.mint()).status for _ in range(3)] == [429, 402, 503]
            _, told = await control(open_vendor, "GET")
        assert told["set"] == [
            {"fault": "503 SERVICE_UNAVAILABLE", "left": None, "met": 2},
            {"fault": "500 INTERNAL_ERROR", "left": None, "met": 0},
        ]

    @pytest.mark.parametrize(
        "content",
        [
            *("", "no json", "[]", "{}", '{"fault": "none"}', '{"fault": "hang", "x": 1}'),
            *('{"fault": "hang", "times": 0}', '{"fault": "hang", "times": -1}'),
        ],
    )
    async def test_bad_orders_change_nothing(self, open_vendor, content):
        status, told = await control(open_vendor, "POST", content)
        assert (status, told["error"]["code"]) == (400, "VALIDATION_ERROR")
        assert told["status_code"] == told["error"]["httpStatus"] == 400
        assert (await control(open_vendor, "GET"))[1]["set"] == []

    async def test_no_page_may_and_no_other_method(self, open_vendor):
        page = {"Origin": "http://shop.example"}
        assert (await control(open_vendor, "DELETE", headers=page))[0] == 403
        status, told = await control(open_vendor, "PUT")
        assert (status, told["error"]["code"]) == (405, "METHOD_NOT_ALLOWED")
        assert "takes GET, POST, DELETE" in told["error"]["message"]

    async def test_a_large_order_is_refused_without_a_traceback(self, open_vendor, caplog):
        """One of more than aiohttp reads at a time."""
        status, told = await control(open_vendor, "POST", io.BytesIO(bytes(1024**2 + 1)))
        assert (status, told["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")
        assert caplog.records == []

    @pytest.mark.parametrize("path", ["/_control", "/_control/", "/_control/faults"])
    async def test_a_path_beside_it_is_told_where_it_is(self, open_vendor, path):
        """And is in no journal: it is not the vendor's."""
        async with aiohttp.ClientSession() as http, http.get(open_vendor.url + path) as response:
            told = await response.json()
        assert (response.status, told["error"]["code"]) == (404, "NOT_FOUND")
        assert "set and shown at /_control/fault" in told["error"]["message"]
        assert open_vendor.journal.records == []

    @pytest.mark.parametrize(
        ("peer", "status"),
        [
            *(("192.0.2.7", 403), ("2001:db8::7", 403), ("fe80::7%eth0", 403), (None, 403)),
            *(("127.0.0.1", 200), ("::1", 200), ("::ffff:127.0.0.1", 200)),
            ("::ffff:192.0.2.7", 403),
        ],
    )
    async def test_only_this_machine_may_wherever_it_listens(self, open_vendor, peer, status):
        """It asks for no secret."""
        request = SimpleNamespace(
            remote=peer, path=CONTROL_PATH, headers={}, method="GET", read=_nothing
        )
        answer = await Control(open_vendor._plan).answer(cast("web.BaseRequest", request))
        assert answer.status == status

    async def test_is_not_there_unless_it_was_opened(self, vendor):
        status, told = await control(vendor, "GET")
        assert (status, told["error"]["code"]) == (404, "NOT_FOUND")


async def test_each_request_is_told_at_its_end(new_caller) -> None:
    """Also one that never gets an answer."""
    told: list[Call] = []
    vendor = FakeVendor(seed=1)
    vendor.tell(lambda call, seconds: told.append(call) if seconds >= 0 else None)
    async with vendor, new_caller(vendor) as caller:
        await caller.mint()
        with vendor.fail(fault_named("reset")), pytest.raises(aiohttp.ClientError):
            await caller.mint()
    assert [(call.path, call.status, call.fault) for call in told] == [
        (MINT, 200, None),
        (MINT, None, "reset"),
    ]


def test_its_port_is_not_that_of_a_gateway() -> None:
    """Whoever tries both on one machine can."""
    files = [path for path in (ROOT / "config").rglob("*") if path.suffix in {".conf", ".yaml"}]
    files += (ROOT / "config").rglob("*Caddyfile")
    port = DEFAULT_LISTEN.rpartition(":")[2]
    assert files
    assert not [path for path in files if port in path.read_text(encoding="utf-8")]


async def test_the_command_fails_on_command_and_tells_no_secret(tmp_path) -> None:
    """Faults and latency act together; lines name method, path, status, time and fault."""
    secret = secrets.token_urlsafe(24)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "broker", "fake-vendor", "--listen", "127.0.0.1:0"),
        *("--fault", "slow=10ms", "--fault", "refuse=PLAN_REQUIRED", "--latency", "20ms"),
        stdout=PIPE, stderr=PIPE, cwd=tmp_path, env={"BITHUMAN_API_SECRET": secret},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = json.loads(await asyncio.wait_for(process.stdout.readline(), START))["url"]
        headers = {"api-secret": secret}
        body = {"agent_id": AGENT, "fingerprint": "f1"}
        async with asyncio.timeout(START), aiohttp.ClientSession(headers=headers) as http:
            async with http.post(f"{url}{MINT}?token={secret}", json=body) as response:
                assert response.status == 403
            async with http.get(f"{url}/v1/agents?limit=1") as response:
                assert response.status == 200
        process.send_signal(signal.SIGINT)
        _, log = await asyncio.wait_for(process.communicate(), START)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()
    lines = log.decode().splitlines()
    assert len(lines) == 2
    mint = re.fullmatch(rf"POST   {MINT}  403  ([0-9.]+) ms  slow, 403 PLAN_REQUIRED", lines[0])
    assert mint is not None
    assert float(mint[1]) >= 29.0  # the latency and what the fault adds, by a clock that may round
    assert re.fullmatch(r"GET    /v1/agents  200  [0-9.]+ ms", lines[1])


@pytest.mark.parametrize(("fault", "code"), [("nothing", 64), ("slow", 64), ("help", 0)])
async def test_the_flag_is_checked_before_anything_listens(tmp_path, fault, code) -> None:
    """One line that says what there is; `help` lists it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "broker", "fake-vendor", "--fault", fault),
        stdout=PIPE, stderr=PIPE, cwd=tmp_path,
    )  # fmt: skip
    out, log = await asyncio.wait_for(process.communicate(), START)
    process._transport.close()
    assert process.returncode == code
    assert len(log.splitlines()) == (1 if code else 0)
    assert len(out.splitlines()) == (0 if code else len(NAMED))
