"""`broker keys`, and a rotation under load: real processes, real files."""

import asyncio
import json
import re
import secrets
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import (
    Broker,
    Caller,
    Tree,
    far_away,
    good,
    merged,
    put,
    run,
    secret_in,
    toml,
    until_true,
    write,
)
from web.edge import serving, visitor

from broker.cli.keys import delay
from broker.config.settings import Duration


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A broker whose keys are in a file that `keys rotate` writes."""
    local = {"keys_file": str(tmp_path / "keys.json")}
    return put(good(tmp_path), "issuer.local", local)


@pytest.fixture
def path(tmp_path: Path, tree: Tree) -> str:
    """Return its configuration file."""
    return write(tmp_path / "broker.toml", toml(tree))


def kids_in(tree: Tree) -> list[str]:
    """Return the names in the file, in their order."""
    text = Path(tree["issuer"]["local"]["keys_file"]).read_text()
    return [key["kid"] for key in json.loads(text)["keys"]]


@given(
    us=st.one_of(st.integers(1, 10**7), st.sampled_from([500_000, 1_000_000, 10_000_000])),
    moment=st.floats(1.8e9, 1.9e9),
)
def test_a_key_never_signs_sooner_than_it_was_told_to(us: int, moment: float) -> None:
    """The file has whole seconds; 500 ms are not none of them."""
    after = delay(Duration(us), moment)
    assert int(moment) + after >= moment + us / 1_000_000 > int(moment) + after - 1.0
    assert delay(Duration(0), moment) == 0


class TestCommands:
    def test_rotate_makes_the_file_then_adds_to_it(self, path: str, tree: Tree) -> None:
        """The first key signs at once, the next one later; both are listed, no secret is."""
        first = run("keys", "rotate", "--config", path)
        assert (first.returncode, first.stderr) == (0, b"")
        second = run("keys", "rotate", "--config", path, "--after", "5m")
        listed = run("keys", "list", "--config", path)
        assert second.stdout == listed.stdout
        old, new = kids_in(tree)
        lines = listed.stdout.decode().splitlines()
        date = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
        assert re.fullmatch(rf"{old} +signs; verifies until {date}", lines[0])
        assert re.fullmatch(rf"{new} +verifies; signs from {date}", lines[1])
        text = Path(tree["issuer"]["local"]["keys_file"]).read_text()
        for secret in re.findall(r'"secret": "([^"]+)"', text):
            assert secret not in (first.stdout + second.stdout + listed.stdout).decode()

    def test_drop_old_ends_what_the_old_keys_signed(self, path: str, tree: Tree) -> None:
        """Somebody has seen a key: only the new one is left, and it signs."""
        run("keys", "rotate", "--config", path)
        token = run("mint", "A1", "--fingerprint", "beef", "--config", path).stdout
        assert run("verify", "--config", path, stdin=token).returncode == 0
        run("keys", "rotate", "--config", path)
        assert run("verify", "--config", path, stdin=token).returncode == 0
        run("keys", "rotate", "--config", path, "--drop-old")
        assert len(kids_in(tree)) == 1
        done = run("verify", "--config", path, stdin=token)
        assert (done.returncode, done.stderr) == (1, b"not valid: no key fits\n")

    def test_list_shows_keys_that_are_configured_one_by_one(self, tmp_path: Path) -> None:
        """Those have no schedule: one signs, the others verify."""
        tree = good(tmp_path)
        key = write(tmp_path / "two", secrets.token_urlsafe(32) + "\n")
        tree = put(tree, "issuer.local.keys.two.secret_file", key)
        tree = put(tree, "issuer.local.signing_key", "two")
        path = write(tmp_path / "static.toml", toml(tree))
        listed = run("keys", "list", "--config", path)
        assert re.fullmatch(rb"two +signs\none +verifies\n", listed.stdout)

    def test_rotate_says_what_stops_it(self, tmp_path: Path, path: str, tree: Tree) -> None:
        """No such setting, somebody else's file, no folder, a wrong span: nothing is written."""
        static = write(tmp_path / "static.toml", toml(good(tmp_path)))
        done = run("keys", "rotate", "--config", static)
        assert (done.returncode, b"issuer.local.keys_file: not set" in done.stderr) == (78, True)
        keys = Path(tree["issuer"]["local"]["keys_file"])
        keys.write_text("mine")
        done = run("keys", "rotate", "--config", path)
        assert (done.returncode, keys.read_text()) == (1, "mine")
        assert b"not written by `broker keys rotate`" in done.stderr
        nowhere = put(tree, "issuer.local.keys_file", "/nowhere/keys.json")
        elsewhere = write(tmp_path / "nowhere.toml", toml(nowhere))
        done = run("keys", "rotate", "--config", elsewhere)
        assert (done.returncode, done.stderr) == (
            1,
            b"broker: cannot write /nowhere/keys.json: No such file or directory\n",
        )
        assert run("keys", "rotate", "--config", path, "--after", "soon").returncode == 64

    def test_a_configuration_with_such_a_file_is_checked(self, path: str, tree: Tree) -> None:
        """`check` says how to make it, as does `serve`; two forms are too many."""
        for command in ("check", "serve"):
            done = run(command, "--config", path)
            told = b"make it with `broker keys rotate`" in done.stderr
            assert (done.returncode, told) == (78, True)
        run("keys", "rotate", "--config", path)
        for name, value in (("signing_key", "x"), ("keys.x.secret", secrets.token_hex(32))):
            both = put(tree, f"issuer.local.{name}", value)
            done = run("check", "--config", write(Path(f"{path}.both"), toml(both)))
            assert (done.returncode, b"are both set: keep one" in done.stderr) == (78, True), done
        write(Path(tree["issuer"]["local"]["keys_file"]), "{}")
        done = run("check", "--config", path)
        assert (done.returncode, b"issuer.local.keys_file: " in done.stderr) == (78, True)


async def test_O7_what_a_dropped_key_signed_is_not_handed_out_again(
    tmp_path: Path, tree: Tree
) -> None:
    """`--drop-old`: held tokens are gone with their key; a rotation without it keeps them."""
    config = write(tmp_path / "broker.toml", toml(tree))
    run("keys", "rotate", "--config", config)
    secret = secret_in(tree["clients"]["web"]["secret_file"])
    with Broker.configured(tmp_path, tree) as broker:
        async with Caller(broker, secret) as caller:

            async def rotate(count: int, *how: str) -> str:
                await asyncio.to_thread(run, "keys", "rotate", "--config", config, *how)
                await until_true(lambda: reloaded(broker, count))
                return await caller.token("beef")

            first = await caller.token("beef")
            assert await rotate(1, "--after", "0s") == first
            second = await rotate(2, "--drop-old")
            assert second != first
            assert await verified(caller, first) == 401
            assert await verified(caller, second) == 200
            assert await caller.metric('broker_tokens_evicted_total{cause="capacity"}') == 0


async def reloaded(broker: Broker, count: int) -> bool:
    """Whether it has taken over its files so often."""
    return len(broker.events("broker.reloaded")) >= count


async def test_O7_keys_rotate_under_load_without_a_gap(tmp_path: Path, tree: Tree) -> None:
    """Two brokers with one file, tokens without a pause, two rotations.

    Every answer is a 200, every token is good at both brokers from its first moment on, and all
    three keys have signed.
    """
    config = write(tmp_path / "broker.toml", toml(tree))
    tree = merged(tree, far_away())
    run("keys", "rotate", "--config", config)
    secret = secret_in(tree["clients"]["web"]["secret_file"])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with (
        Broker.configured(tmp_path / "a", tree) as one,
        Broker.configured(tmp_path / "b", tree) as two,
    ):
        async with Caller(one, secret) as first, Caller(two, secret) as second:
            await rotate_under_load((first, second), config)
        for broker in (one, two):
            assert broker.events("broker.reload_failed") == []
            assert len(broker.events("broker.reloaded")) >= 2


async def rotate_under_load(callers: tuple[Caller, Caller], config: str) -> None:
    """Ask for tokens and show each to both brokers, while keys turn twice."""
    tokens: list[str] = []
    stop = asyncio.Event()

    async def load(number: int) -> None:
        while not stop.is_set():
            minted = await callers[number % 2].token(secrets.token_hex(8))
            assert await verdicts(callers, minted) == {200}
            tokens.append(minted)

    tasks = [asyncio.create_task(load(number)) for number in range(4)]
    for rotation in range(2, 4):
        await asyncio.to_thread(run, "keys", "rotate", "--config", config, "--after", "2s")
        await until_true(lambda count=rotation: signed_by(tokens, count))
    stop.set()
    await asyncio.gather(*tasks)
    for token in tokens[:: max(len(tokens) // 200, 1)]:
        assert await verdicts(callers, token) == {200}
    for caller in callers:
        assert await caller.metric('broker_requests_total{outcome="failed"}') == 0


async def signed_by(tokens: list[str], count: int) -> bool:
    """Whether this many keys have signed: a header names its key as soon as there are two."""
    return len({token.partition(".")[0] for token in tokens}) > count


async def verdicts(callers: tuple[Caller, Caller], token: str) -> set[int]:
    """Return what both say."""
    return {await verified(caller, token) for caller in callers}


async def verified(caller: Caller, token: str) -> int:
    """Return what a proxy would be told."""
    url = f"{caller.url}/v1/embed-tokens/verify"
    async with caller.http.get(url, headers={"X-Embed-Token": token}) as answer:
        assert isinstance(answer, aiohttp.ClientResponse)
        return answer.status


async def test_O7_a_reload_that_changes_no_key_keeps_what_is_cached() -> None:
    """Or each of them, and each secret that is rotated, would be a flood of mints."""
    async with serving() as edge:
        minted = await edge.request_token(who := visitor())
        assert await edge.app.reloader.reload()
        assert (await edge.request_token(who)).token == minted.token
