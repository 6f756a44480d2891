"""The relay as a backend meets it: no configuration, every reply shape, a key that stays here."""

import asyncio
import json
import re
import secrets
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest
from processes import environment
from relaying import AGENT, TOKEN_PATH, UNLIMITED, House, broker_before, visitor

from broker.testing import FakeVendor, Refusal, Shape
from broker.testing.vendor import faults
from broker.testing.vendor.faults import Fault
from broker.testing.vendor.replies import Answer, json_answer

START = 120.0
"""Seconds that a process may take until it answers, on a machine that is busy with other tests."""


@asynccontextmanager
async def process(
    *arguments: str, folder: Path, environ: Mapping[str, str]
) -> AsyncIterator[Process]:
    """Run the broker's command line with nothing in its environment but this."""
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "broker", *arguments,
        stdout=PIPE, stderr=PIPE, cwd=folder, env=environment(**environ),
    )  # fmt: skip
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()
        started._transport.close()  # type: ignore[attr-defined]


async def url_of(broker: Process) -> str:
    """Read the broker's log until it says where it answers."""
    assert broker.stderr is not None
    async with asyncio.timeout(START):
        while line := await broker.stderr.readline():
            event = json.loads(line)
            if event["event"] == "broker.started":
                url: str = event["url"]
                return url
    raise AssertionError("the broker did not start")


class TestWithoutConfiguration:
    async def test_two_variables_make_a_relay(self, vendor: FakeVendor, tmp_path: Path) -> None:
        """The vendor's key and the base URL; a backend changes its own base URL, nothing else."""
        key = vendor.secret.reveal()
        environ = {
            "BITHUMAN_API_SECRET": key,
            "BROKER_ISSUER__UPSTREAM__BASE_URL": vendor.url,
        }
        serve = ("serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
        async with process(*serve, folder=tmp_path, environ=environ) as broker:
            url = await url_of(broker)
            async with aiohttp.ClientSession() as http:
                request = {"agent_id": AGENT, "fingerprint": visitor()}

                async def mint(secret: str) -> tuple[int, dict, str]:
                    headers = {"api-secret": secret}
                    async with http.post(
                        url + TOKEN_PATH, json=request, headers=headers
                    ) as response:
                        cached = response.headers.get("Cache-Status", "")
                        return response.status, await response.json(), cached

                status, first, cached = await mint(key)
                assert (status, cached) == (200, "embed-token-broker; fwd=miss")
                assert vendor.claims_of(first["data"]["token"])["agent_id"] == AGENT
                assert await mint(key) == (200, first, "embed-token-broker; hit")
                status, answer, _ = await mint(secrets.token_urlsafe(24))
                assert (status, answer["error"]["code"]) == (401, "UNAUTHORIZED")
            assert len(vendor.journal.calls) == 1
            command_line = await asyncio.to_thread(Path(f"/proc/{broker.pid}/cmdline").read_bytes)
            assert key.encode() not in command_line
            broker.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.05)
            broker.send_signal(signal.SIGTERM)  # the second one ends it at once
            out, log = await asyncio.wait_for(broker.communicate(), START)
        assert key.encode() not in out + log
        assert first["data"]["token"].encode() not in out + log

    @pytest.mark.parametrize("switched_off", [False, True])
    async def test_other_routes_are_passed_on_with_the_same_base_url(
        self, vendor: FakeVendor, tmp_path: Path, switched_off: bool
    ) -> None:
        """All of /v1/ and /v2/, with the key that the caller sends; unless that is switched off."""
        key = vendor.secret.reveal()
        environ = {
            "BITHUMAN_API_SECRET": key,
            "BROKER_ISSUER__UPSTREAM__BASE_URL": vendor.url,
            **({"BROKER_ISSUER__UPSTREAM__PASS_THROUGH": ""} if switched_off else {}),
        }
        serve = ("serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
        async with process(*serve, folder=tmp_path, environ=environ) as broker:
            url = await url_of(broker)
            async with aiohttp.ClientSession(headers={"api-secret": key}) as http:
                statuses = []
                for target in ("/v1/agents?limit=20", "/v2/credit-summaries", "/v3/x", "/other"):
                    async with http.get(url + target) as response:
                        statuses.append(response.status)
                async with http.get(f"{url}/v1/agents", headers={"api-secret": "x"}) as response:
                    statuses.append(response.status)
        assert statuses == ([404] * 5 if switched_off else [200, 200, 404, 404, 401])
        seen = [(call.target, call.secret) for call in vendor.journal.records]
        mine = vendor.secret.digest().hex()
        passed = [("/v1/agents?limit=20", mine), ("/v2/credit-summaries", mine)]
        assert seen == ([] if switched_off else passed)

    async def test_a_variable_makes_it_a_local_issuer_without_them(self, tmp_path: Path) -> None:
        """The key in the environment does not keep anybody from signing here."""
        environ = {
            "BITHUMAN_API_SECRET": secrets.token_urlsafe(24),
            "BROKER_ISSUER__KIND": "local",
            "BROKER_ISSUER__LOCAL__KEYS__A__SECRET": secrets.token_urlsafe(48),
            "BROKER_CLIENTS__WEB__SECRET": secrets.token_urlsafe(24),
            "BROKER_CLIENTS__WEB__AGENTS": "*",
            "BROKER_STORE__URL": "memory://",
        }
        async with process("check", folder=tmp_path, environ=environ) as broker:
            out, log = await asyncio.wait_for(broker.communicate(), START)
        assert (broker.returncode, out) == (0, b"configuration ok\n"), log

    @pytest.mark.parametrize(
        "listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:8080", "localhost.example:1"]
    )
    async def test_on_any_other_address_than_loopback_it_does_not_start(
        self, tmp_path: Path, listen: str
    ) -> None:
        """Exit 78 and one line that says why: the key must not serve a network."""
        environ = {"BITHUMAN_API_SECRET": secrets.token_urlsafe(24)}
        async with process("serve", "--listen", listen, folder=tmp_path, environ=environ) as broker:
            out, log = await asyncio.wait_for(broker.communicate(), START)
        assert broker.returncode == 78
        assert out == b""
        (line,) = log.decode().splitlines()
        assert line.startswith("broker: clients: required when server.listen is not on loopback")

    async def test_private_network_to_another_machine_is_refused(self, tmp_path: Path) -> None:
        """The key would go over the network in the clear."""
        environ = {
            "BITHUMAN_API_SECRET": secrets.token_urlsafe(24),
            "BROKER_ISSUER__UPSTREAM__BASE_URL": "http://vendor.example",
        }
        async with process("serve", folder=tmp_path, environ=environ) as broker:
            _, log = await asyncio.wait_for(broker.communicate(), START)
        assert broker.returncode == 78
        assert b"http would show the key to the network" in log

    async def test_the_vendor_itself_as_a_process(self, tmp_path: Path) -> None:
        """`broker fake-vendor`: its first line says where and with which key; then it mints."""
        fake = ("fake-vendor", "--listen", "127.0.0.1:0", "--latency", "1ms")
        async with process(*fake, folder=tmp_path, environ={}) as vendor:
            assert vendor.stdout is not None
            line = await asyncio.wait_for(vendor.stdout.readline(), START)
            told = json.loads(line)
            assert set(told) == {"url", "api_secret"}
            body = {"agent_id": AGENT, "fingerprint": visitor()}
            headers = {"api-secret": told["api_secret"]}
            async with (
                aiohttp.ClientSession() as http,
                http.post(told["url"] + TOKEN_PATH, json=body, headers=headers) as response,
            ):
                assert response.status == 200
                answer = await response.json()
                assert answer["status"] == "success"
                assert int(response.headers["X-RateLimit-Remaining"]) == 119
            vendor.send_signal(signal.SIGINT)
            _, log = await asyncio.wait_for(vendor.communicate(), START)
            assert vendor.returncode == 0
            assert re.fullmatch(rf"POST   {TOKEN_PATH}  200  [0-9.]+ ms\n", log.decode())

    async def test_the_vendor_s_process_says_what_is_wrong_with_its_address(
        self, tmp_path: Path
    ) -> None:
        """64 for one that is none, 69 for one that is taken; one line each."""
        async with FakeVendor() as taken:
            port = taken.url.rpartition(":")[2]
            for listen, code in (("unix:/tmp/x", 64), ("nowhere", 64), (f"127.0.0.1:{port}", 69)):
                fake = ("fake-vendor", "--listen", listen)
                async with process(*fake, folder=tmp_path, environ={}) as vendor:
                    out, log = await asyncio.wait_for(vendor.communicate(), START)
                assert (vendor.returncode, out) == (code, b"")
                (line,) = log.decode().splitlines()
                assert re.match(r"broker(:| fake-vendor: argument) --listen: ", line)


class TestShapes:
    @pytest.mark.parametrize("model", [None, "essence"])
    @pytest.mark.parametrize("shape", Shape)
    async def test_every_reply_shape_becomes_the_contract_s(
        self, house: House, shape: Shape, model: str | None
    ) -> None:
        """Both generations' fields at once; what else the vendor sent passes through."""
        vendor = house.vendor
        vendor.settings = msgspec.structs.replace(UNLIMITED, shape=shape)
        fields = {} if model is None else {"model": model}
        reply = await house.request_token("ab" * 16, **fields)
        claims = vendor.claims_of(reply.token)
        extra: dict[str, object] = {}
        if shape in (Shape.MODELS, Shape.NEWEST):
            extra["supported_models"] = [model or "fake-model"]
        if shape is Shape.NEWEST or (shape is Shape.MODELS and model):
            extra["model"] = model or "fake-model"
        assert reply.json == {
            "success": True,
            "status": "success",
            "status_code": 200,
            "data": {
                "token": reply.token,
                "session_id": claims["sid"],
                "sid": claims["sid"],
                "expires_at": claims["exp"],
                **extra,
            },
        }
        (call,) = vendor.journal.calls
        assert (call.agent, call.fingerprint, call.model) == (AGENT, "ab" * 16, model)
        assert (await house.request_token("ab" * 16, **fields)).body == reply.body

    @pytest.mark.parametrize(
        "fingerprint", ["ABCDEF", "abcdef", "00112233-4455-6677-8899-AABBCCDDEEFF"]
    )
    async def test_a_fingerprint_goes_out_byte_for_byte(
        self, house: House, fingerprint: str
    ) -> None:
        """The vendor keys a visitor's memory by it: no case is folded, no hyphen dropped."""
        await house.request_token(fingerprint)
        assert [call.fingerprint for call in house.vendor.journal.calls] == [fingerprint]

    async def test_new_fields_of_the_vendor_pass_through_and_ours_do_not_yield(
        self, house: House
    ) -> None:
        """Whatever shallow field is added reaches the caller; session and expiry stay ours."""

        def add(answer: Answer) -> Answer:
            said = msgspec.json.decode(answer.body)
            said["data"] |= {"sid": "s1", "expires_at": "never", "quota": {"left": 3}, "a": [1]}
            return json_answer(said)

        with house.vendor.fail(Fault(name="new fields", edit=add)):
            got = (await house.request_token()).data
        assert got["quota"] == {"left": 3}
        assert got["a"] == [1]
        assert (got["session_id"], got["sid"]) == ("s1", "s1")
        assert got["expires_at"] == house.vendor.claims_of(got["token"])["exp"]


class TestTheKeyStays:
    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    async def test_V9_a_redirect_is_not_followed(self, house: House, status: int) -> None:
        """To another host or to itself: 502, and nobody else hears of us."""
        async with FakeVendor(UNLIMITED) as other:
            for target in (other.url + TOKEN_PATH, TOKEN_PATH):
                with house.vendor.fail(faults.redirect(target, status)):
                    before = len(house.vendor.journal.calls)
                    reply = await house.request_token()
                assert (reply.status, reply.code) == (502, "UPSTREAM_UNAVAILABLE")
                assert len(house.vendor.journal.calls) == before + 1
            assert len(other.journal) == 0
        metrics = await house.scrape()
        assert metrics['broker_upstream_errors_total{reason="redirect"}'] == 2

    async def test_G7_nothing_secret_gets_out_whatever_happens(self, vendor: FakeVendor) -> None:
        """Keys, client secret, tokens, fingerprints: not in logs at debug level, metrics, errors.

        The vendor puts the key and the fingerprint into its own messages and bodies.
        """
        second = vendor.add_secret()
        key, spare = vendor.secret.reveal(), second.reveal()
        tree = {
            "issuer": {
                "upstream": {"timeout": "200ms", "api_secret": key},
                "budget": {"rate": 600_000, "burst": 1000, "max_wait": "500ms", "window": 601_000},
            }
        }
        told: list[str] = []
        canaries = {"the key": key, "half of it": key[:24], "the second key": spare}
        async with broker_before(vendor, tree) as house:
            canaries["the client's secret"] = house.secret
            for number, fault in enumerate(_everything(key)):
                fingerprint = visitor()
                canaries[f"fingerprint {number}"] = fingerprint
                with vendor.fail(fault):
                    reply = await house.request_token(fingerprint, agent=f"a{number}")
                if reply.status != 200:
                    told.append(reply.body.decode() + str(dict(reply.headers)))
                reply = await house.request_token(fingerprint)
                if reply.status == 200:
                    canaries[f"token {number}"] = reply.token
            vendor.revoke_secret(vendor.secret)
            told.append((await house.request_token()).body.decode())
            told.append((await house.request_token(secret=spare)).body.decode())
            told.append(await house.scrape_text())
            told.append(
                repr(house.app.parts.issuer)
                + repr(house.app.parts.token_service.flights)
                + repr(vendor)
            )
        assert sum(name.startswith("token") for name in canaries) > 10
        out = house.log.getvalue() + "\n".join(told)
        assert len(house.log.getvalue()) > 1000
        assert [name for name, text in canaries.items() if text in out] == []


def _everything(key: str) -> list[faults.Fault]:
    """A fault of every kind, with the key in what the vendor says."""
    echo = {"code": "VALIDATION_ERROR", "message": f"bad key {key}", "httpStatus": 400}
    return [
        faults.HEALTHY,
        faults.body({"error": echo}, 400),
        faults.body(f"<h1>{key}</h1>".encode(), 400, "text/html"),
        faults.body({"error": {**echo, "code": key[:30].upper()}}, 403),
        faults.body({"error": {**echo, "message": key.upper()}}, 422),
        faults.error((400, "VALIDATION_ERROR"), headers={"X-Request-Id": key}),
        faults.redirect(f"http://127.0.0.1:1/{key}"),
        faults.same_token(),
        faults.claims(without=["exp"]),
        faults.lifetime(-5),
        faults.hang(),
        faults.edge_denied(),
        *faults.tokenless()[:8],
        *(faults.error(what) for what in list(Refusal)[5:] if what is not Refusal.RATE_LIMITED),
    ]
