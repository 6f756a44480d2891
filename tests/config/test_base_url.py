"""N15: what an operator may write as the vendor's address, and the one form that it has inside."""

import secrets
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import Broker, Caller, good, merged, run, toml, write

from broker.config import load as config
from broker.config.schema import ConfigError
from broker.config.validate import normal_base_url
from broker.testing import FakeVendor

MENDED = {
    "https://api.bithuman.ai": "https://api.bithuman.ai",
    "https://api.bithuman.ai/": "https://api.bithuman.ai",
    "HTTPS://API.bitHuman.AI": "https://api.bithuman.ai",
    "https://api.bithuman.ai.": "https://api.bithuman.ai",
    "https://api.bithuman.ai:443": "https://api.bithuman.ai",
    "https://api.bithuman.ai:8443/": "https://api.bithuman.ai:8443",
    "https://api.bithuman.ai/v1": "https://api.bithuman.ai",
    "https://api.bithuman.ai/V1//": "https://api.bithuman.ai",
    "https://api.bithuman.ai//v1/embed-tokens": "https://api.bithuman.ai",
    "https://api.bithuman.ai/v1/embed-tokens/request": "https://api.bithuman.ai",
    "https://api.bithuman.ai/v1/validate/": "https://api.bithuman.ai",
    "https://api.bithuman.ai/v1/v1": "https://api.bithuman.ai",
    "https://gateway.example/vendor/v1/": "https://gateway.example/vendor",
    "https://gateway.example/a/../vendor": "https://gateway.example/vendor",
    "https://gateway.example/v10": "https://gateway.example/v10",
    "https://gateway.example/my-v1": "https://gateway.example/my-v1",
    "https://b\u00fccher.example": "https://xn--bcher-kva.example",
    "https://[2001:DB8:0::1]:443/v1": "https://[2001:db8::1]",
    "http://127.0.0.1:80": "http://127.0.0.1",
    "http://LOCALHOST:8080/v1": "http://localhost:8080",
}

REFUSED = {
    "https://api.bithuman.ai/v1?key=1": "write 'https://api.bithuman.ai'",
    "https://api.bithuman.ai?": "write 'https://api.bithuman.ai'",
    "https://api.bithuman.ai/#mint": "write 'https://api.bithuman.ai'",
    "https://me@api.bithuman.ai/v1": "write 'https://api.bithuman.ai'",
    "http://api.bithuman.ai/v1": "write 'https://api.bithuman.ai'",
    "http://api.bithuman.ai:80": "write 'https://api.bithuman.ai'",
    "http://localhost.bithuman.ai": "write 'https://localhost.bithuman.ai'",
    "http://127.0.0.1.bithuman.ai": "write 'https://127.0.0.1.bithuman.ai'",
    "ftp://api.bithuman.ai": 'expected "https://HOST"',
    "api.bithuman.ai": 'expected "https://HOST"',
    "https://": 'expected "https://HOST"',
    "https://:443": 'expected "https://HOST"',
    "https://api.bithuman.ai:0": 'expected "https://HOST"',
    "https://api.bithuman.ai:65536": 'expected "https://HOST"',
    " https://api.bithuman.ai": 'expected "https://HOST"',
    "https://api bithuman.ai": 'expected "https://HOST"',
    "": 'expected "https://HOST"',
}


def loaded(url: str) -> str:
    """Load a relay's settings with this address; returns the one that is in force."""
    tree = {"issuer": {"kind": "upstream", "upstream": {"base_url": url}}}
    return config.load(None, {}, tree).issuer.upstream.base_url


@pytest.mark.parametrize(("written", "normal"), MENDED.items())
def test_N15_what_differs_in_writing_only_is_mended(written: str, normal: str) -> None:
    """Capitals, slashes, the scheme's own port, and the paths of the API's own calls."""
    assert loaded(written) == normal
    assert loaded(normal) == normal


@pytest.mark.parametrize(("written", "remedy"), REFUSED.items())
def test_N15_what_would_be_lost_or_shown_is_refused_with_the_right_value(
    written: str, remedy: str
) -> None:
    """One line that names the setting and what to write instead."""
    with pytest.raises(ConfigError) as caught:
        loaded(written)
    assert str(caught.value).startswith("issuer.upstream.base_url: ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    "form",
    ["https://me:{}@host", "https://:{}@host/v1", "https://me:{}@host?x#y", "https://me:1/{}@host"],
)
def test_N15_a_password_in_the_address_is_refused_and_not_repeated(form: str) -> None:
    """It would be shown by `config show`, in errors and in the doctor's lines."""
    password = secrets.token_hex(8)
    with pytest.raises(ConfigError) as caught:
        loaded(form.format(password))
    assert password not in str(caught.value)


@given(
    url=st.builds(
        "{}{}{}{}{}".format,
        st.sampled_from(["https://", "HTTPS://", "http://"]),
        st.sampled_from(["127.0.0.1", "LocalHost", "[::1]", "host.example", "Host."]),
        st.sampled_from(["", ":80", ":443", ":8080", ":"]),
        st.sampled_from(["", "/", "/v1", "/V1/", "//v1", "/vendor", "/v2", "/v1x"]),
        st.sampled_from(["", "/", "/v1", "/validate", "/embed-tokens/request", "//", "/v1/v1/"]),
    )
)
def test_N15_the_normal_form_is_its_own(url: str) -> None:
    """Normalizing twice is normalizing once, and never ends in a slash or in `/v1`."""
    try:
        normal = normal_base_url(url)
    except ValueError:
        assert url.startswith("http:")
        return
    assert normal_base_url(normal) == normal
    assert normal == normal_base_url(url.replace("HTTPS", "https"))
    assert not normal.lower().endswith(("/", "/v1", "/v1/validate"))


@pytest.mark.parametrize("tail", ["/v1", "/v1/embed-tokens/request", "/"])
async def test_N15_a_relay_whose_address_has_the_path_in_it_mints(
    tail: str, tmp_path: Path
) -> None:
    """The vendor is asked on the path of its mint call, not on one below it."""
    async with FakeVendor(seed=1) as vendor:
        upstream = {"base_url": vendor.url + tail, "api_secret": vendor.secret.reveal()}
        tree = merged(good(tmp_path), {"issuer": {"kind": "upstream", "upstream": upstream}})
        secret = (tmp_path / "web").read_text(encoding="utf-8").strip()
        with Broker.configured(tmp_path, tree) as broker:
            async with Caller(broker, secret) as caller:
                await caller.token("9f86d081884c7d65")
        assert [call.path for call in vendor.journal.calls] == ["/v1/embed-tokens/request"]


def test_N15_a_start_with_a_password_in_the_address_ends_with_78(tmp_path: Path) -> None:
    """Before anything is opened, and without a word of the password."""
    password = secrets.token_hex(8)
    upstream = {"base_url": f"https://me:{password}@host/v1", "api_secret": "x" * 20}
    tree = merged(good(tmp_path), {"issuer": {"kind": "upstream", "upstream": upstream}})
    path = write(tmp_path / "broker.toml", toml(tree))
    for command in ("serve", "check"):
        ended = run(command, "--config", path)
        assert ended.returncode == 78
        assert b"write 'https://host'" in ended.stderr
        assert password.encode() not in ended.stderr + ended.stdout
