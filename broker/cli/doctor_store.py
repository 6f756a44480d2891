"""Examines the shared store by a trial, and by what the server says of itself."""

from collections.abc import Mapping

from broker.app import factory
from broker.cli import preflight
from broker.cli.finding import Finding, Level
from broker.cli.store_trial import TIMEOUT, trial
from broker.config.settings import Settings
from broker.valkey.client.errors import StoreFailed

OLDEST = 7
"""Major version of a store's server: scripts and ACLs are those of 7."""


async def examine(settings: Settings) -> list[Finding]:
    """Do once what the broker does with the store; then look at it, if that is permitted."""
    address = factory.store_address(settings)
    assert address is not None  # or there is nothing to look at
    findings = list(preflight.shown_password(settings, Level.PROBLEM))
    where = address.shown
    async with trial(address, factory.store_access(settings)) as witness:
        told = await witness.call(b"INFO")
        fields = _fields(told)
        role = await witness.call(b"ROLE") if witness.failures and not fields else None
    if fields.get("redis_mode") == _SENTINEL or _is_sentinel(role):
        return [*findings, _problem(where, _IS_SENTINEL)]
    plain = [each for each in witness.failures if each.detail in _BY_WORD]
    problems = [_store_problem(each, where) for each in plain or witness.failures]
    problems += _slow(witness.fastest, settings.store.timeout.seconds, where)
    problems += _by_its_own_words(fields, where)
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


def _store_problem(failed: StoreFailed, where: str) -> Finding:
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
        return Finding(Level.PROBLEM, "store", text)
    return _problem(where, f"refuses what the broker does ({reason}): look into its log")


def _problem(where: str, text: str) -> Finding:
    return Finding(Level.PROBLEM, "store", f"{where} {text}")


def _slow(fastest: float, waits: float, where: str) -> list[Finding]:
    """Judge by the fastest of some hundred calls, so that a busy machine is no slow store."""
    if not waits <= fastest < TIMEOUT:
        return []
    took, most = round(fastest * 1000), round(waits * 1000)
    said = f"takes {took} ms for a call, the broker waits {most}"
    return [_problem(where, f"{said}: put it nearer, or raise store.timeout")]


def _fields(told: object) -> dict[str, str]:
    """Read what INFO told; nothing where it was not permitted."""
    if not isinstance(told, bytes):
        return {}
    pairs = (line.partition(":") for line in told.decode("utf-8", "replace").split("\r\n"))
    return {name: value for name, _, value in pairs}


def _by_its_own_words(fields: Mapping[str, str], where: str) -> list[Finding]:
    """Judge what a trial cannot see: a replica that takes writes loses them."""
    found = []
    if fields.get("role") == "slave":
        found.append(_problem(where, _IS_REPLICA))
    version = fields.get("valkey_version") or fields.get("redis_version") or ""
    if version.partition(".")[0].isdigit() and int(version.partition(".")[0]) < OLDEST:
        found.append(_problem(where, f"is of version {version}: at least {OLDEST} is needed"))
    return found


def _not_seen(where: str) -> Finding:
    text = (
        f"{where} does all that the broker needs; whether it evicts was not seen: that needs +info,"
        " or look whether its maxmemory-policy is noeviction"
    )
    return Finding(Level.OK, "store", text)


def _eviction(where: str, fields: Mapping[str, str]) -> Finding:
    """Judge by INFO memory: what is evicted is a limit that is full again, or an end forgotten."""
    policy, most = fields.get("maxmemory_policy", "?"), fields.get("maxmemory", "0")
    if policy == "noeviction":
        return Finding(Level.OK, "store", f"{where} answers, and evicts nothing")
    if most == "0":
        text = f"{where} answers; with a maxmemory it would evict ({policy}): set noeviction"
        return Finding(Level.OK, "store", text)
    text = f"{where} evicts ({policy}), limits and ends, too: set maxmemory-policy noeviction"
    return Finding(Level.PROBLEM, "store", text)
