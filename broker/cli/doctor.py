"""Examines the way to the vendor and to the shared store, so that an operator need not guess.

Costs the vendor one cheap call per key and no token, the store some hundred calls under names of
their own.  Each finding is one line: ok, or a problem with its remedy.
"""

import asyncio
import stat
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct
from typing_extensions import override

from broker.app import factory
from broker.clock import SystemClock
from broker.config.settings import Settings
from broker.issuers.vendor.client import Answer, CallFailed, VendorClient
from broker.issuers.vendor.egress import Proxy
from broker.issuers.vendor.headers import vendor_date
from broker.model import Secret
from broker.telemetry.labels import Reason
from broker.units import SECOND

if TYPE_CHECKING:
    from broker.valkey.client.errors import StoreFailed

MAX_SKEW = 30 * SECOND
"""Microseconds: half of the minute that verifiers commonly forgive."""

OLDEST = 7
"""Major version of a store's server: scripts and ACLs are those of 7."""

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


class Finding(Struct, frozen=True):
    """One examined thing; `text` has the remedy if it is not ok."""

    ok: bool
    name: str
    text: str

    @override
    def __str__(self) -> str:
        return f"{'ok     ' if self.ok else 'problem'}  {self.name}: {self.text}"


class _Reply(Struct):
    valid: bool = False


def examine(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Return every finding; raises ConfigError for a configuration that cannot be used."""
    factory.check(settings, environ)
    findings = [_file(name, Path(file)) for name, file in factory.secret_files(settings)]
    if settings.issuer.kind == "upstream":
        keys, proxy = (
            factory.vendor_keys(settings, environ),
            factory.vendor_proxy(settings, environ),
        )
        findings += asyncio.run(_vendor(settings, keys, proxy))
    if factory.store_address(settings) is not None:
        findings += asyncio.run(_store(settings))
    return findings or [
        Finding(ok=True, name="configuration", text="complete; nothing else to examine")
    ]


async def _store(settings: Settings) -> list[Finding]:
    """Do once what the broker does with the store; then look at it, if that is permitted."""
    from broker.cli.doctor_store import rehearsed  # noqa: PLC0415 - as below
    from broker.valkey.client.errors import StoreFailed  # noqa: PLC0415 - the store's client is slow to import

    address = factory.store_address(settings)
    assert address is not None  # or there is nothing to look at
    findings = [_clear_text()] if factory.shows_password(settings) else []
    where = address.shown
    async with rehearsed(address, factory.store_access(settings)) as witness:
        told = await witness.ask(b"INFO")
        fields = _fields(told)
        role = await witness.ask(b"ROLE") if witness.failures and not fields else None
    if fields.get("redis_mode") == _SENTINEL or _is_sentinel(role):
        return [*findings, _problem(where, _IS_SENTINEL)]
    plain = [each for each in witness.failures if each.detail in _BY_WORD]
    problems = [_store_problem(each, where) for each in plain or witness.failures]
    problems += [*_slow(witness.fastest, where), *_by_its_own_words(fields, where)]
    if problems:
        return [*findings, *dict.fromkeys(problems)]
    if isinstance(told, StoreFailed):
        return [*findings, _not_seen(where)]
    return [*findings, _eviction(where, fields)]


def _is_sentinel(role: object) -> bool:
    """Whether this is what a Sentinel says of itself."""
    return isinstance(role, list) and role[:1] == [_SENTINEL.encode()]


_SENTINEL = "sentinel"

_IS_SENTINEL = (
    "is a Sentinel, which has no keys: put the address of the primary into store.url, or one that"
    " follows it (a virtual address, a proxy, a service)"
)

_IS_REPLICA = "is a replica and takes no writes: put the address of the primary into store.url"

_BY_WORD = {
    "READONLY": _IS_REPLICA,
    "OOM": "is full and evicts nothing: raise its maxmemory, or give the broker one of its own",
    "NOPERM": "refuses the broker's user something it needs, a command, a key or a channel: give it"
    " the line of `broker store acl`",
    "NOAUTH": "asks for a password: set store.password_file, and store.username if it has users",
    "WRONGPASS": "refuses user or password (WRONGPASS): check store.username and"
    " store.password_file",
    "MISCONF": "takes no writes because it cannot save them: mend its disk, or set"
    " stop-writes-on-bgsave-error no",
    "NOREPLICAS": "takes no writes because too few replicas follow it: mend them, or lower its"
    " min-replicas-to-write",
    "LOADING": "is loading its data: try again when it has",
    "unknown command": "does not know EVAL or EVALSHA: the broker decides in scripts; remove the"
    " rename-command of its configuration, or use another server",
    "max number of clients reached": "has no connection left: raise its maxclients; each worker of"
    " each broker needs two",
}
"""What to do, by the server's own word."""


def _store_problem(failed: "StoreFailed", where: str) -> Finding:
    known = _BY_WORD.get(failed.detail)
    if known is not None:
        return _problem(where, known)
    reason = f"{failed.reason.value}{': ' if failed.detail else ''}{failed.detail}"
    if failed.reason.value == "cluster_down":
        return _problem(
            where,
            f"says that another server has the keys ({reason}): write valkey+cluster:// for a"
            " cluster, and look whether it is well",
        )
    if failed.reason.value in ("timeout", "connection", "other"):
        text = f"{where} does not answer ({reason}): check store.url, user and password, TLS"
        return Finding(ok=False, name="store", text=text)
    return _problem(where, f"refuses what the broker does ({reason}): look into its log")


def _problem(where: str, text: str) -> Finding:
    return Finding(ok=False, name="store", text=f"{where} {text}")


def _slow(fastest: float, where: str) -> list[Finding]:
    """Judge by the fastest of some hundred calls, so that a busy machine is no slow store."""
    from broker.cli.doctor_store import TIMEOUT  # noqa: PLC0415 - as above
    from broker.valkey.client.guarded import OPERATION_TIMEOUT  # noqa: PLC0415 - as above

    if not OPERATION_TIMEOUT <= fastest < TIMEOUT:
        return []
    took, waits = round(fastest * 1000), round(OPERATION_TIMEOUT * 1000)
    return [_problem(where, f"takes {took} ms for a call, the broker waits {waits}: put it nearer")]


def _fields(told: object) -> dict[str, str]:
    """Read what INFO told; nothing where it was not permitted."""
    if not isinstance(told, bytes):
        return {}
    pairs = (line.partition(":") for line in told.decode("utf-8", "replace").split("\r\n"))
    return {name: value for name, _, value in pairs}


def _by_its_own_words(fields: Mapping[str, str], where: str) -> list[Finding]:
    """Judge what a rehearsal cannot see: a replica that takes writes loses them."""
    found = []
    if fields.get("role") == "slave":
        found.append(_problem(where, _IS_REPLICA))
    version = fields.get("valkey_version") or fields.get("redis_version") or ""
    if version.partition(".")[0].isdigit() and int(version.partition(".")[0]) < OLDEST:
        found.append(_problem(where, f"is of version {version}: at least {OLDEST} is needed"))
    return found


def _clear_text() -> Finding:
    text = (
        "crosses the network in clear text: write valkeys://, unless nobody else can listen there"
    )
    return Finding(ok=False, name="store.password", text=text)


def _not_seen(where: str) -> Finding:
    text = (
        f"{where} does all that the broker needs; whether it evicts was not seen: that needs +info,"
        " or look whether its maxmemory-policy is noeviction"
    )
    return Finding(ok=True, name="store", text=text)


def _eviction(where: str, fields: Mapping[str, str]) -> Finding:
    """Judge by INFO memory: what is evicted is a limit that is full again, or an end forgotten."""
    policy, most = fields.get("maxmemory_policy", "?"), fields.get("maxmemory", "0")
    if policy == "noeviction":
        return Finding(ok=True, name="store", text=f"{where} answers, and evicts nothing")
    if most == "0":
        text = f"{where} answers; with a maxmemory it would evict ({policy}): set noeviction"
        return Finding(ok=True, name="store", text=text)
    text = f"{where} evicts ({policy}), limits and ends, too: set maxmemory-policy noeviction"
    return Finding(ok=False, name="store", text=text)


async def _vendor(settings: Settings, keys: list[Secret], proxy: Proxy | None) -> list[Finding]:
    upstream = settings.issuer.upstream
    client = VendorClient(upstream.base_url, upstream.timeout.seconds, proxy)
    findings = [] if proxy is None else [_through(proxy)]
    try:
        for number, key in enumerate(keys, 1):
            try:
                answer = await client.validate(key)
            except CallFailed as failed:
                remedy = _REMEDIES.get(failed.reason, f"the call failed: {failed.reason.value}")
                return [*findings, Finding(ok=False, name=upstream.base_url, text=remedy)]
            if number == 1:
                findings += [_reached(upstream.base_url, answer), _skew(answer)]
            findings.append(_key(number, answer))
    finally:
        await client.close()
    return findings


def _through(proxy: Proxy) -> Finding:
    known = "with a user and a password" if proxy.authorization else "without a password"
    text = f"calls to the vendor go through {proxy.url}, {known} ({proxy.source})"
    return Finding(ok=True, name="egress proxy", text=text)


def _reached(base_url: str, answer: Answer) -> Finding:
    if HTTPStatus.MULTIPLE_CHOICES <= answer.status < HTTPStatus.BAD_REQUEST:
        target = answer.headers.get("Location", "somewhere else")[:200]
        text = (
            f"redirects to {target!r}, which is never followed: put the final address into base_url"
        )
        return Finding(ok=False, name=base_url, text=text)
    secure = "TLS is trusted" if base_url.startswith("https:") else "plain HTTP on this machine"
    return Finding(ok=True, name=base_url, text=f"answers without a redirect, {secure}")


def _skew(answer: Answer) -> Finding:
    now = SystemClock().wall()
    theirs = vendor_date(answer.headers, now)
    if theirs is None:
        return Finding(ok=True, name="clock", text="the vendor sent no Date to compare with")
    skew = abs(theirs - now)
    seconds = skew // SECOND
    if skew <= MAX_SKEW:
        return Finding(ok=True, name="clock", text=f"within {seconds + 1} s of the vendor's")
    return Finding(
        ok=False, name="clock", text=f"{seconds} s off the vendor's: synchronize it (chrony, NTP)"
    )


def _key(number: int, answer: Answer) -> Finding:
    name = f"vendor key {number}"
    try:
        valid = msgspec.json.decode(answer.body, type=_Reply).valid
    except msgspec.DecodeError:
        valid = False
    if answer.status == HTTPStatus.OK and valid:
        return Finding(ok=True, name=name, text="the vendor accepts it")
    if answer.status in (HTTPStatus.OK, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        text = "the vendor refuses it: make a new one in the vendor's dashboard"
        return Finding(ok=False, name=name, text=text)
    return Finding(ok=False, name=name, text=f"cannot tell: the vendor answered {answer.status}")


def _file(name: str, path: Path) -> Finding:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        text = f"{path} has mode {mode:04o}, others can read it: chmod 600 {path}"
        return Finding(ok=False, name=name, text=text)
    return Finding(ok=True, name=name, text=f"{path} is readable by its owner only")
