"""The way out to the vendor: directly, or through a proxy that the site prescribes.

Pure: settings and environment in, a `Proxy` or None out; opens nothing.  Precedence, first hit:

1. a vendor on this machine is asked directly: no proxy reaches our loopback;
2. `[issuer.upstream] proxy`, which may say "direct"; NO_PROXY is not asked, because the setting
   is for this one address;
3. `https_proxy`, then `HTTPS_PROXY`, unless `no_proxy` or `NO_PROXY` names the vendor.

A vendor elsewhere is asked by HTTPS only, so HTTP_PROXY never counts, and the proxy sees a CONNECT
with the vendor's name: neither the key nor a token.  A proxy's password is a secret.
"""

import ipaddress
from base64 import b64encode
from collections.abc import Mapping

from msgspec import Struct
from typing_extensions import override
from yarl import URL

from broker.model import Secret

DIRECT = "direct"
"""What the setting says to go without a proxy whatever the environment holds."""

_EXPECTED = 'expected "http://HOST:PORT", "https://HOST:PORT" or "direct"'


class Proxy(Struct, frozen=True):
    """A proxy that opens tunnels (CONNECT, RFC 9110 section 9.3.6).

    `url` is without user and password, `authorization` the header's value that says who we are,
    None where it need not know; `source` names the setting or variable that it is from.
    """

    url: URL
    authorization: Secret | None
    source: str

    @override
    def __repr__(self) -> str:
        return f"Proxy({str(self.url)!r}, source={self.source!r})"


def proxy_for(base_url: str, given: Secret | None, environ: Mapping[str, str]) -> Proxy | None:
    """Return the proxy that calls to `base_url` go through; None means directly.

    Raises ValueError, without any part of the value, for one that cannot be used.
    """
    vendor = URL(base_url)
    if vendor.scheme != "https" or _on_loopback(vendor.host or ""):
        return None
    if given is not None:
        if given.reveal() == DIRECT:
            return None
        return _parse(given.reveal(), "issuer.upstream.proxy")
    name = next((name for name in ("https_proxy", "HTTPS_PROXY") if environ.get(name)), None)
    if name is None or _excepted(vendor, environ):
        return None
    text = environ[name]
    return _parse(text if "://" in text else f"http://{text}", name)


def check_proxy(given: Secret, where: str) -> None:
    """Raise ValueError, which says where it was found, for a setting that cannot be used."""
    if given.reveal() != DIRECT:
        _parse(given.reveal(), where)


def _parse(text: str, source: str) -> Proxy:
    try:
        url = URL(text)
        usable = bool(url.host and url.port) and url.scheme in ("http", "https")
    except ValueError:
        raise ValueError(f"{source}: not a URL; {_EXPECTED}") from None
    if not usable or url.path.strip("/") or url.query_string or url.fragment:
        raise ValueError(f"{source}: {_EXPECTED}")
    return Proxy(url.origin(), _authorization(url), source)


def _authorization(url: URL) -> Secret | None:
    if url.user is None and url.password is None:
        return None
    pair = f"{url.user or ''}:{url.password or ''}".encode()
    return Secret(f"Basic {b64encode(pair).decode()}")


def _on_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _excepted(vendor: URL, environ: Mapping[str, str]) -> bool:
    """Whether NO_PROXY names the vendor; entries are parted by commas or blanks."""
    entries = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    return any(_names(entry, vendor) for entry in entries.lower().replace(",", " ").split())


def _names(entry: str, vendor: URL) -> bool:
    """Whether an entry means the vendor: `*`, a name and all below it, an address, a network.

    An entry with a port means that port only.
    """
    host = vendor.host or ""
    entry = entry.removesuffix(f":{vendor.port}").strip("[]")
    if entry == "*":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = entry.removeprefix("*").strip(".")
        return bool(name) and (host == name or host.endswith(f".{name}"))
    try:
        return address in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
