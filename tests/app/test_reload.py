"""A reload in this process: what it names, what it keeps, and what it puts in force."""

import secrets
from typing import Any

import pytest
from msgspec.structs import replace
from processes import put
from web.edge import AGENT, Edge, serving, visitor

from broker.app.reload import check_restart, in_force, needs_restart
from broker.config import load as config
from broker.config.schema import ConfigError
from broker.config.settings import Settings

SEALED = {
    "store": {"url": "valkey://127.0.0.1:1", "encryption_key": secrets.token_urlsafe(48)},
    "issuer": {"kind": "upstream", "upstream": {"api_secret": secrets.token_urlsafe(30)}},
}

CHANGES: dict[str, tuple[object, list[str]]] = {
    "server.deadline": ("9s", ["server"]),
    "admin.listen": ("127.0.0.1:1", ["admin"]),
    "reuse.floor": ("4m", ["reuse"]),
    "sessions.max_recorded": (77, ["sessions"]),
    "store.timeout": ("77ms", ["store"]),
    "issuer.budget.burst": (3, ["issuer"]),
    "issuer.local.issuer": ("other", ["issuer.local.issuer"]),
    "issuer.local.audience": ("other", ["issuer.local.audience"]),
    "issuer.upstream.base_url": ("https://other.example", ["issuer.upstream.base_url"]),
    "issuer.upstream.timeout": ("7s", ["issuer.upstream.timeout"]),
    "issuer.upstream.pass_through": (["/v1/x"], ["issuer.upstream.pass_through"]),
    "issuer.upstream.api_secret": ("k" * 30, []),
    "issuer.upstream.proxy": ("http://p:1", []),
    "limits.fingerprint_format": ("any", []),
    "log.level": ("debug", []),
    "clients.web.agents": (["*"], []),
}
"""A change of each kind, and what a restart is needed for; nothing else is told."""


@pytest.mark.parametrize("dotted", CHANGES)
def test_what_needs_a_restart_is_named_and_not_put_in_force(dotted: str) -> None:
    """Everything else is in force at once; what waits is as it was."""
    value, named = CHANGES[dotted]
    old, new = (config.from_tree(tree) for tree in (SEALED, put(SEALED, dotted, value)))
    assert old != new
    assert needs_restart(old, new) == named
    held = in_force(old, new)
    assert held == (old if named else new)
    assert needs_restart(old, held) == []


def test_another_kind_of_issuer_is_told_once_and_keeps_the_old_one() -> None:
    """A sealing key that has changed is told beside it."""
    old = config.from_tree(SEALED)
    new = config.from_tree(put(SEALED, "issuer.kind", "local"))
    assert needs_restart(old, new) == ["issuer"]
    assert needs_restart(old, old, other_key=True) == ["store.encryption_key"]
    assert in_force(old, new).issuer == old.issuer


def test_files_that_wait_for_a_restart_are_read_only_if_something_does() -> None:
    """A reload that says nothing but `needs_restart` must not lead into a start that fails."""
    old = config.from_tree(SEALED)
    broken = replace(old, issuer=replace(old.issuer, upstream=_no_key(old)))
    check_restart(broken, replace(broken, log=replace(old.log, level="debug")), {})
    new = config.from_tree(put(SEALED, "server.deadline", "9s"))
    with pytest.raises(ConfigError, match=r"issuer\.upstream|clients"):
        check_restart(old, replace(new, issuer=replace(new.issuer, upstream=_no_key(new))), {})


def _no_key(settings: Settings) -> Any:
    return replace(settings.issuer.upstream, api_secret_files=("/nowhere/key",), api_secret=None)


async def reloaded(edge: Edge, **keys: str) -> bool:
    """Reload with these signing keys, the first of which signs."""
    settings = edge.app._settings
    local = {name: {"secret": secret} for name, secret in keys.items()}
    tree = {"issuer": {"local": {"keys": local, "signing_key": next(iter(keys))}}}
    issuer = config.from_tree(tree).issuer
    edge.app.reloader._load = lambda: replace(settings, issuer=issuer)
    return await edge.app.reloader.reload()


async def test_N20_cached_tokens_outlive_a_reload_unless_their_key_is_gone() -> None:
    """The same keys, or one more, change nothing for visitors; one that is gone ends its tokens."""
    async with serving() as edge:
        fingerprint, more = visitor(), secrets.token_urlsafe(48)
        first = await edge.request_token(fingerprint)
        for keys in ({"main": edge.key}, {"main": edge.key, "more": more}):
            assert await reloaded(edge, **keys)
            again = await edge.request_token(fingerprint)
            assert (again.token, again.header("Cache-Status")) == (
                first.token,
                "embed-token-broker; hit",
            )
        assert await reloaded(edge, more=more)
        other = await edge.request_token(fingerprint)
        assert other.token != first.token
        assert len(edge.app.parts.token_cache) == 1


async def test_O7_a_reload_puts_all_of_it_in_force() -> None:
    """Clients, limits, the log's level and the format of fingerprints; and none if one is bad."""
    async with serving(level="info") as edge:
        settings = edge.app._settings
        tree = {
            "limits": {"fingerprint_format": "any", "agent": {"rate": 1, "burst": 1}},
            "clients": {"web": {"secret": edge.secret, "agents": [AGENT]}},
            "log": {"format": "json", "level": "debug"},
        }
        new = config.from_tree(tree)
        changed = replace(settings, limits=new.limits, clients=new.clients, log=new.log)
        web = replace(new.clients["web"], secret_file="/nowhere/web", secret=None)
        edge.app.reloader._load = lambda: replace(changed, clients={"web": web})
        assert await edge.app.reloader.reload() is False
        assert (await edge.request_token("no digits")).status == 400
        edge.app.reloader._load = lambda: changed
        assert await edge.app.reloader.reload() is True
        assert (await edge.request_token("no digits")).status == 200
        assert (await edge.request_token(agent="B12XYZ9876")).code == "AGENT_NOT_ALLOWED"
        assert (await edge.request_token(visitor())).status == 429
        assert edge.app.parts.routes.tokens.debug
        process = edge.app.metrics.process
        counts = process.reloads["success"].value, process.reloads["failure"].value
        assert (counts, process.reload_failed.value) == ((1, 1), 0)
