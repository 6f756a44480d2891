"""Examines the way to the vendor: one cheap call per key, and no token."""

from http import HTTPStatus
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from broker.cli.finding import Finding, Level
from broker.clock import SystemClock
from broker.config.settings import Settings
from broker.config.validate import is_loopback
from broker.issuers.vendor.client import Answer, CallFailed, VendorClient
from broker.issuers.vendor.egress import Proxy
from broker.issuers.vendor.headers import vendor_date
from broker.model import Secret
from broker.telemetry.labels import Reason
from broker.units import SECOND

MAX_SKEW = 30 * SECOND
"""Microseconds: half of the minute that verifiers commonly forgive."""

_REMEDIES = {
    Reason.DNS: "the name is not known: check base_url and the resolver",
    Reason.TLS: "no trusted TLS: check base_url, the CA certificates, and proxies in between",
    Reason.CONNECT: "no connection: check the firewall and egress rules",
    Reason.PROXY_CONNECT: "no connection to the egress proxy: check its address and the firewall",
    Reason.PROXY_AUTH: "the egress proxy wants a user and a password (407): put them into the file"
    " of issuer.upstream.proxy_file",
    Reason.PROXY_REFUSED: "the egress proxy opens no way there: permit CONNECT to the vendor in it,"
    ' or go without it by issuer.upstream.proxy = "direct"',
    Reason.HEADERS_TOO_LARGE: "headers beyond 64 KiB, 512 lines or 256 KiB in all, or over 16"
    " interim answers: look at what an edge or a proxy in between adds",
    Reason.TIMEOUT: "no answer in time: check the network, or raise issuer.upstream.timeout",
}


NOTHING_LISTENS = "no connection: nothing listens there; is it started, and is the port right?"
"""Where the vendor is on this machine: one for tests, or a proxy of one's own."""


class _Reply(Struct):
    valid: bool = False


async def examine(settings: Settings, keys: list[Secret], proxy: Proxy | None) -> list[Finding]:
    """Ask the vendor about each key; what fails for one would fail for all."""
    upstream = settings.issuer.upstream
    client = VendorClient(upstream.base_url, upstream.timeout.seconds, proxy)
    findings = [] if proxy is None else [_through(proxy)]
    try:
        for number, key in enumerate(keys, 1):
            try:
                answer = await client.validate(key)
            except CallFailed as failed:
                remedy = _remedy(failed.reason, upstream.base_url)
                return [*findings, Finding(Level.PROBLEM, upstream.base_url, remedy)]
            if number == 1:
                findings += [_reached(upstream.base_url, answer), _skew(answer)]
            findings.append(_key(number, answer))
    finally:
        await client.close()
    return findings


def _remedy(reason: Reason, base_url: str) -> str:
    if reason is Reason.CONNECT and is_loopback(urlsplit(base_url).hostname or ""):
        return NOTHING_LISTENS
    return _REMEDIES.get(reason, f"the call failed: {reason.value}")


def _through(proxy: Proxy) -> Finding:
    known = "with a user and a password" if proxy.authorization else "without a password"
    text = f"calls to the vendor go through {proxy.url}, {known} ({proxy.source})"
    return Finding(Level.OK, "egress proxy", text)


def _reached(base_url: str, answer: Answer) -> Finding:
    if HTTPStatus.MULTIPLE_CHOICES <= answer.status < HTTPStatus.BAD_REQUEST:
        target = answer.headers.get("Location", "somewhere else")[:200]
        text = (
            f"redirects to {target!r}, which is never followed: put the final address into base_url"
        )
        return Finding(Level.PROBLEM, base_url, text)
    secure = "TLS is trusted" if base_url.startswith("https:") else "plain HTTP on this machine"
    return Finding(Level.OK, base_url, f"answers without a redirect, {secure}")


def _skew(answer: Answer) -> Finding:
    now = SystemClock().wall()
    theirs = vendor_date(answer.headers, now)
    if theirs is None:
        return Finding(Level.OK, "clock", "the vendor sent no Date to compare with")
    skew = abs(theirs - now)
    seconds = skew // SECOND
    if skew <= MAX_SKEW:
        return Finding(Level.OK, "clock", f"within {seconds + 1} s of the vendor's")
    return Finding(
        Level.PROBLEM, "clock", f"{seconds} s off the vendor's: synchronize it (chrony, NTP)"
    )


def _key(number: int, answer: Answer) -> Finding:
    name = f"vendor key {number}"
    try:
        valid = msgspec.json.decode(answer.body, type=_Reply).valid
    except msgspec.DecodeError:
        valid = False
    if answer.status == HTTPStatus.OK and valid:
        return Finding(Level.OK, name, "the vendor accepts it")
    if answer.status in (HTTPStatus.OK, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        text = "the vendor refuses it: make a new one in the vendor's dashboard"
        return Finding(Level.PROBLEM, name, text)
    return Finding(Level.PROBLEM, name, f"cannot tell: the vendor answered {answer.status}")
