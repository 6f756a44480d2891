"""N14: the way out to the vendor, through the proxy that a site prescribes."""

import asyncio
import secrets
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from connect_proxy import ConnectProxy
from flooding import BODIES, HEADS, Flood, FloodServer
from processes import Broker, Caller, good, merged, run, secret_in, toml, until, write
from relaying import UNLIMITED, visitor
from servers import free_port, write_certificates

from broker.app import factory
from broker.config import load as config
from broker.config.schema import ConfigError
from broker.issuers.vendor.egress import check_proxy, proxy_for
from broker.model import Secret
from broker.telemetry.labels import Reason
from broker.testing import FakeVendor

VENDOR = "vendor.example"


class Site:
    """A vendor with TLS that only a proxy can find, and the files of a relay before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_certificates(folder, VENDOR)
        self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.tls.load_cert_chain(folder / "server.crt", folder / "server.key")
        self.vendor = FakeVendor(UNLIMITED, seed=1, tls=self.tls)
        self.environ = {"SSL_CERT_FILE": str(folder / "ca.crt")}

    @property
    def ports(self) -> dict[str, int]:
        """What a proxy knows: the vendor's name, and where it really is."""
        return {f"{VENDOR}:443": int(self.vendor.url.rpartition(":")[2])}

    def configured(self, **upstream: Any) -> str:
        """Write the relay's configuration; returns its path."""
        section = {
            "base_url": f"https://{VENDOR}",
            "api_secret": self.vendor.secret.reveal(),
            **upstream,
        }
        tree = merged(good(self.folder), {"issuer": {"kind": "upstream", "upstream": section}})
        return write(self.folder / "broker.toml", toml(tree))

    async def request_token(self, broker: Broker) -> tuple[int, dict[str, Any]]:
        """Ask for one token."""
        async with Caller(broker, secret_in(str(self.folder / "web"))) as caller:
            status, body, _ = await caller.request_token(visitor())
            return status, body

    async def doctor(self, path: str, **environ: str) -> str:
        """Run the doctor; returns what it prints."""
        given = self.environ | environ
        ended = await asyncio.to_thread(run, "doctor", "--config", path, **given)
        return (ended.stdout + ended.stderr).decode()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """Start the vendor."""
    site = Site(tmp_path)
    async with site.vendor:
        yield site


@asynccontextmanager
async def broker_at(site: Site, path: str, **environ: str) -> AsyncIterator[Broker]:
    """Start a broker beside the vendor's and the proxy's loop."""
    given = site.environ | environ
    broker = await asyncio.to_thread(Broker, "--config", path, logs=site.folder, **given)
    with broker:
        yield broker


def errors_in(metrics: str) -> dict[str, float]:
    """Return the reasons that were counted."""
    name = "broker_upstream_errors_total{reason="
    found = [line.split() for line in metrics.splitlines() if line.startswith(name)]
    return {key.split('"')[1]: float(count) for key, count in found if float(count)}


async def counted(broker: Broker) -> dict[str, float]:
    """Ask the broker for the reasons that it counted."""
    async with Caller(broker, "") as caller, caller.http.get(f"{broker.admin_url}/metrics") as got:
        return errors_in(await got.text())


@pytest.mark.parametrize("way", ["setting", "file", "variable", "lower case", "no scheme"])
async def test_N14_the_proxy_carries_every_call_and_reads_none(site: Site, way: str) -> None:
    """However it is named: a tunnel to the vendor's name, and in it neither key nor token."""
    user = f"relay:{secrets.token_urlsafe(12)}/%"
    quoted = user.replace("%", "%25").replace("/", "%2F")
    async with ConnectProxy(site.ports, user=user) as proxy:
        url = f"http://{quoted}@{proxy.address}"
        upstream, environ = {}, {}
        match way:
            case "setting":
                upstream["proxy"] = url
            case "file":
                upstream["proxy_file"] = write(site.folder / "proxy", url + "\n")
            case "variable":
                environ["HTTPS_PROXY"] = url
            case "lower case":
                environ |= {"https_proxy": url, "HTTPS_PROXY": "http://127.0.0.1:1"}
            case _:
                environ["HTTPS_PROXY"] = url.removeprefix("http://")
        path = site.configured(**upstream)
        async with broker_at(site, path, **environ) as broker:
            status, answer = await site.request_token(broker)
        assert (status, len(site.vendor.journal.calls)) == (200, 1)
        assert proxy.asked == [f"CONNECT {VENDOR}:443 HTTP/1.1"]
        assert site.vendor.secret.reveal().encode() not in proxy.through
        assert answer["data"]["token"].encode() not in proxy.through
        told = await site.doctor(path, **environ)
        assert f"egress proxy: calls to the vendor go through http://{proxy.address}" in told
        assert "the vendor accepts it" in told
        shown = await asyncio.to_thread(run, "config", "show", "--config", path, **environ)
    for text in (told, broker.log(), shown.stdout.decode()):
        assert user.partition(":")[2] not in text
        assert quoted not in text


async def test_N14_other_routes_take_the_same_way(site: Site) -> None:
    """What is passed on goes through the proxy, too, in a tunnel to the vendor's name."""
    async with ConnectProxy(site.ports) as proxy:
        path = site.configured(proxy=f"http://{proxy.address}", pass_through=["/v1/*"])
        secret = secret_in(str(site.folder / "web"))
        headers = {
            "api-secret": site.vendor.secret.reveal(),
            "Authorization": f"Bearer {secret}",
        }
        async with (
            broker_at(site, path, BROKER_CLIENTS__WEB__PASS_THROUGH="true") as broker,
            Caller(broker, secret) as caller,
            caller.http.get(f"{broker.url}/v1/agents", headers=headers) as response,
        ):
            assert response.status == 200
            assert proxy.asked == [f"CONNECT {VENDOR}:443 HTTP/1.1"]
    assert [call.target for call in site.vendor.journal.records] == ["/v1/agents"]


async def test_N14_tls_to_the_proxy_and_tls_inside_of_it(site: Site) -> None:
    """An https:// proxy: its certificate is checked, and so is the vendor's behind it."""
    async with ConnectProxy(site.ports, tls=site.tls) as proxy:
        path = site.configured(proxy=proxy.url)
        async with broker_at(site, path) as broker:
            assert (await site.request_token(broker))[0] == 200
        assert len(proxy.asked) == 1
        environ = {"SSL_CERT_FILE": "/dev/null"}
        async with broker_at(site, path, **environ) as broker:
            assert (await site.request_token(broker))[0] == 502
            assert await counted(broker) == {"tls": 1}
    assert len(site.vendor.journal.calls) == 1


@pytest.mark.parametrize(
    ("user", "known", "reason", "remedy"),
    [
        ("a:b", {}, "proxy_auth", "(407)"),
        (None, {}, "proxy_refused", "permit CONNECT"),
    ],
)
async def test_N14_its_407_and_its_502_are_named(
    site: Site, user: str | None, known: dict[str, int], reason: str, remedy: str
) -> None:
    """In the caller's answer, in the log, as a reason of the metric, and with a remedy."""
    async with ConnectProxy(known, user=user) as proxy:
        path = site.configured(proxy=proxy.url)
        async with broker_at(site, path) as broker:
            status, answer = await site.request_token(broker)
            assert (status, answer["error"]["code"]) == (502, "UPSTREAM_UNAVAILABLE")
            assert answer["error"]["message"].endswith(f": {reason}")
            assert set(await counted(broker)) == {reason}
            (failed,) = broker.logged("broker.embed_token", 1)
            assert failed["reason"] == reason
        assert remedy in await site.doctor(path)
    assert site.vendor.journal.calls == []


@pytest.mark.parametrize("over", ["http", "https"])
@pytest.mark.parametrize("flood", [HEADS[0], HEADS[4], HEADS[7]], ids=lambda flood: flood.name)
async def test_N14_a_proxy_that_never_ends_its_answer_to_connect(
    site: Site, flood: Flood, over: str
) -> None:
    """It is hung up on, and named: the broker is not held up, the vendor is never reached."""
    async with FloodServer(flood, tls=site.tls if over == "https" else None) as proxy:
        async with broker_at(site, site.configured(proxy=proxy.url)) as broker:
            status, answer = await site.request_token(broker)
            assert status == 502
            assert answer["error"]["message"].endswith(": headers_too_large")
            assert await counted(broker) == {"headers_too_large": 1}
        await until(lambda: proxy.over == 1)
    assert site.vendor.journal.calls == []


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"HTTP/1.1 407 Who are you\r\n\r\n", "proxy_auth"),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\n", "proxy_refused"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "tls"),
    ],
    ids=["refusal", "101", "tunnel"],
)
async def test_N14_a_proxy_that_talks_on_behind_its_answer_to_connect(
    site: Site, head: bytes, reason: str
) -> None:
    """A refusal whose page never ends, another protocol, a tunnel with something else in it."""
    async with (
        FloodServer(Flood("", head, b"x" * 65_536, Reason.TLS)) as proxy,
        broker_at(site, site.configured(proxy=proxy.url)) as broker,
    ):
        assert (await site.request_token(broker))[0] == 502
        assert set(await counted(broker)) == {reason}
        await until(lambda: proxy.calls == proxy.over)


@pytest.mark.parametrize("over", ["http", "https"])
@pytest.mark.parametrize("flood", [HEADS[0], BODIES[0]], ids=lambda flood: flood.name)
async def test_N14_a_vendor_that_never_ends_its_answer_behind_a_proxy(
    site: Site, flood: Flood, over: str
) -> None:
    """TLS, and TLS in TLS: the bounds hold inside of a tunnel, too."""
    async with (
        FloodServer(flood, tls=site.tls) as vendor,
        ConnectProxy(
            {f"{VENDOR}:443": vendor.port}, tls=site.tls if over == "https" else None
        ) as proxy,
        broker_at(site, site.configured(proxy=proxy.url)) as broker,
    ):
        assert (await site.request_token(broker))[0] == 502
        assert await counted(broker) == {flood.reason.value: 1}
        await until(lambda: vendor.over == 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "proxy.invalid"])
async def test_N14_a_proxy_that_is_not_there(site: Site, host: str) -> None:
    """No connection and no address are the proxy's fault, not the vendor's."""
    path = site.configured(proxy=f"http://{host}:{free_port()}")
    async with broker_at(site, path) as broker:
        assert (await site.request_token(broker))[0] == 502
        assert set(await counted(broker)) == {"proxy_connect"}
    assert "no connection to the egress proxy" in await site.doctor(path)


async def test_N14_a_reload_takes_over_another_proxy(site: Site) -> None:
    """A password that was changed needs no restart."""
    user = f"relay:{secrets.token_urlsafe(12)}"
    async with ConnectProxy(site.ports, user=user) as proxy:
        file = write(site.folder / "proxy", f"http://relay:old@{proxy.address}")
        async with broker_at(site, site.configured(proxy_file=file)) as broker:
            assert (await site.request_token(broker))[0] == 502
            write(Path(file), f"http://{user}@{proxy.address}")
            await asyncio.to_thread(broker.reload)
            assert (await site.request_token(broker))[0] == 200


async def test_N14_a_reload_keeps_the_proxy(site: Site) -> None:
    """Also one that names another vendor, which needs a restart: the old one's calls go its way."""
    async with ConnectProxy(site.ports) as proxy:
        path = site.configured(proxy=proxy.url)
        async with broker_at(site, path) as broker:
            for base_url in (f"https://{VENDOR}", "https://other.example"):
                site.configured(proxy=proxy.url, base_url=base_url)
                told = await asyncio.to_thread(broker.reload)
                assert told["event"] == "broker.reloaded"
                asked = len(proxy.asked)
                assert (await site.request_token(broker))[0] == 200
                assert len(proxy.asked) == asked + 1, "a connection of its own, by the proxy"
            assert told["needs_restart"] == ["issuer.upstream.base_url"]


async def test_N14_a_vendor_on_loopback_is_asked_directly(tmp_path: Path) -> None:
    """As every program does that reads HTTPS_PROXY: a proxy's loopback is another machine's."""
    async with ConnectProxy({}) as proxy, FakeVendor(UNLIMITED, seed=1) as vendor:
        upstream = {"base_url": vendor.url, "api_secret": vendor.secret.reveal()}
        tree = merged(good(tmp_path), {"issuer": {"kind": "upstream", "upstream": upstream}})
        path = write(tmp_path / "broker.toml", toml(tree))
        variables = {"HTTPS_PROXY": proxy.url, "HTTP_PROXY": proxy.url, "https_proxy": proxy.url}
        with await asyncio.to_thread(
            Broker, "--config", path, logs=tmp_path, **variables
        ) as broker:
            async with Caller(broker, secret_in(str(tmp_path / "web"))) as caller:
                await caller.token(visitor())
        assert proxy.asked == []


def way(base_url: str, given: str | None = None, **environ: str) -> str | None:
    """Return the proxy's address, None for the direct way."""
    secret = None if given is None else Secret(given)
    proxy = proxy_for(base_url, secret, environ)
    return None if proxy is None else str(proxy.url)


@pytest.mark.parametrize(
    ("base_url", "given", "environ", "expected"),
    [
        ("https://a.example", None, {}, None),
        ("https://a.example", None, {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ("https://a.example", None, {"HTTPS_PROXY": ""}, None),
        ("https://a.example", None, {"https_proxy": "", "HTTPS_PROXY": "p:1"}, "http://p:1"),
        ("https://a.example", None, {"HTTP_PROXY": "http://p:1"}, None),
        ("https://a.example", "https://q:2", {"HTTPS_PROXY": "http://p:1"}, "https://q:2"),
        ("https://a.example", "https://q:2", {"NO_PROXY": "*"}, "https://q:2"),
        ("https://a.example", "direct", {"HTTPS_PROXY": "http://p:1"}, None),
        ("http://127.0.0.1:9", "http://p:1", {}, None),
        ("https://localhost:9", None, {"HTTPS_PROXY": "http://p:1"}, None),
        ("https://[::1]", None, {"HTTPS_PROXY": "http://p:1"}, None),
        ("https://10.1.2.3", None, {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
    ],
)
def test_N14_the_setting_wins_over_the_environment(
    base_url: str, given: str | None, environ: dict[str, str], expected: str | None
) -> None:
    """And a vendor on this machine over both."""
    assert way(base_url, given, **environ) == expected


@pytest.mark.parametrize(
    ("host", "no_proxy", "direct"),
    [
        ("api.vendor.example", "*", True),
        ("api.vendor.example", "api.vendor.example", True),
        ("api.vendor.example", "API.Vendor.Example", True),
        ("api.vendor.example", "vendor.example", True),
        ("api.vendor.example", ".vendor.example", True),
        ("api.vendor.example", "*.vendor.example", True),
        ("api.vendor.example", "other, vendor.example", True),
        ("api.vendor.example", "other vendor.example", True),
        ("api.vendor.example", "vendor.example:443", True),
        ("api.vendor.example", "vendor.example:8443", False),
        ("api.vendor.example", "dor.example", False),
        ("api.vendor.example", "example.api", False),
        ("api.vendor.example", "", False),
        ("api.vendor.example", ",,", False),
        ("api.vendor.example", ".", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "11.0.0.0/8", False),
        ("10.1.2.3", "1.2.3", False),
        ("[2001:db8::1]", "2001:db8::/32", True),
        ("[2001:db8::1]", "[2001:db8::1]", True),
        ("[2001:db8::1]", "2001:db9::/32", False),
    ],
)
def test_N14_who_needs_no_proxy(host: str, no_proxy: str, *, direct: bool) -> None:
    """NO_PROXY as curl reads it, and networks besides; lower case wins."""
    environ = {"HTTPS_PROXY": "http://p:1"}
    expected = None if direct else "http://p:1"
    assert way(f"https://{host}", **environ, NO_PROXY=no_proxy) == expected
    both = environ | {"no_proxy": no_proxy, "NO_PROXY": "*"}
    assert way(f"https://{host}", **both) == (expected if no_proxy else None)


@pytest.mark.parametrize(
    "value",
    ["", "socks5://{}@p:1", "{}", "http://u:{}@p:x", "http://u:{}@", "http://u:{}@p:1/?{}", "p:{}"],
)
def test_N14_a_proxy_that_cannot_be_used_is_refused_without_repeating_it(value: str) -> None:
    """At load: what was expected is said, what was given is not, for it may be a password."""
    password = secrets.token_hex(8)
    upstream = {"base_url": "https://a.example", "proxy": value.format(password, password)}
    upstream["api_secret"] = secrets.token_urlsafe(24)
    settings = config.load(None, {}, {"issuer": {"kind": "upstream", "upstream": upstream}})
    with pytest.raises(ConfigError) as caught:
        factory.check(settings, {})
    assert str(caught.value).startswith("issuer.upstream.proxy: ")
    assert password not in str(caught.value)


def test_N14_no_repr_shows_the_password() -> None:
    """Neither that of the proxy nor that of the settings."""
    password = secrets.token_hex(8)
    proxy = proxy_for("https://a.example", Secret(f"http://u:{password}@p:1"), {})
    tree = {"issuer": {"upstream": {"proxy": f"http://u:{password}@p:1"}}}
    settings = config.load(None, {}, tree)
    assert proxy is not None
    assert password not in repr(proxy) + repr(settings) + repr(msgspec.structs.asdict(proxy))


def test_N14_a_setting_is_checked_where_it_is_written() -> None:
    """A proxy, or the word for none; where it was found is said of any other."""
    for usable in ("direct", "http://p:1", "https://u:w@p:1"):
        check_proxy(Secret(usable), "here")
    for bad in ("", "Direct", "p:1", "ftp://p:1", "http://p:1/x"):
        with pytest.raises(ValueError, match=r"^here: "):
            check_proxy(Secret(bad), "here")
