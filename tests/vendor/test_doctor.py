"""`broker doctor` before a vendor: each line is ok, or a problem with its remedy."""

import asyncio
import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
from processes import run, secret_file, toml, write
from redis.exceptions import RedisError
from relaying import UNLIMITED
from servers import (
    StoreCluster,
    StoreServer,
    free_port,
    redis_binary,
    store_server,
    valkey_binary,
)

from broker.cli.doctor import Finding, examine
from broker.config import load as config
from broker.config.schema import ConfigError
from broker.testing import FakeVendor, Refusal
from broker.testing.vendor import faults
from broker.valkey.client.scripts import acl_line

VALIDATE = "/v1/validate"


async def examined(vendor: FakeVendor, **upstream: Any) -> list[Finding]:
    """Run the doctor, which has a loop of its own, beside the vendor."""
    section = {"base_url": vendor.url, "api_secret": vendor.secret.reveal(), **upstream}
    if "api_secret_files" in upstream:
        del section["api_secret"]
    tree = {"issuer": {"kind": "upstream", "upstream": section}}
    settings = config.load(None, {}, tree)
    return await asyncio.to_thread(examine, settings, {})


def lines(findings: list[Finding]) -> list[str]:
    """Render the findings as the command prints them."""
    return [str(finding) for finding in findings]


async def test_a_good_relay(vendor: FakeVendor) -> None:
    """Reached, clock, key; nothing was minted."""
    assert lines(await examined(vendor)) == [
        f"ok       {vendor.url}: answers without a redirect, plain HTTP on this machine",
        "ok       clock: within 1 s of the vendor's",
        "ok       vendor key 1: the vendor accepts it",
    ]
    assert [call.path for call in vendor.journal.records] == [VALIDATE]
    assert vendor.journal.calls == []


@pytest.mark.parametrize("says", [None, Refusal.RUNTIME_SUSPENDED])
async def test_a_dead_key_among_good_ones(
    vendor: FakeVendor, tmp_path: Path, says: Refusal | None
) -> None:
    """Each key has a line of its own, in the order of the list."""
    keys = [vendor.add_secret() for _ in range(3)]
    files = []
    for number, key in enumerate(keys):
        file = tmp_path / f"key{number}"
        file.write_text(key.reveal() + "\n")
        file.chmod(0o600)
        files.append(str(file))
    vendor.revoke_secret(keys[1], says)
    found = await examined(vendor, api_secret_files=files)
    (problem,) = [finding for finding in found if not finding.ok]
    assert str(problem) == (
        "problem  vendor key 2: the vendor refuses it: make a new one in the vendor's dashboard"
    )
    assert [finding.key for finding in found if finding.key.startswith("vendor key")] == [
        "vendor key 1",
        "vendor key 2",
        "vendor key 3",
    ]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
async def test_a_key_file_that_others_can_read(
    vendor: FakeVendor, tmp_path: Path, mode: int
) -> None:
    """The mode, and the command that repairs it; a group is others, too."""
    file = tmp_path / "key"
    file.write_text(vendor.secret.reveal())
    file.chmod(mode)
    found = await examined(vendor, api_secret_files=[str(file)])
    assert lines(found)[0] == (
        f"problem  issuer.upstream.api_secret_files: {file} has mode {mode:04o},"
        f" others can read it: chmod 600 {file}"
    )
    file.chmod(0o600)
    assert (await examined(vendor, api_secret_files=[str(file)]))[0].ok


@pytest.mark.skipif(os.geteuid() != 0, reason="root reads what others cannot")
def test_root_is_told_what_a_service_cannot_read(tmp_path: Path) -> None:
    """By the mode of the file or of a folder above it; what the service's user owns is left out."""
    with TemporaryDirectory(dir="/tmp") as name:  # the folders of a test are root's alone
        folder = Path(name)
        folder.chmod(0o755)
        closed = folder / "secrets"
        closed.mkdir(mode=0o700)
        files = {"own": folder / "own", "web": folder / "web", "key": closed / "key"}
        for path in files.values():
            secret_file(path)
            path.chmod(0o600)
        os.chown(files["own"], 65534, 65534)
        os.chown(files["key"], 65534, 65534)
        tree = {
            "admin": {"secret_file": str(files["own"])},
            "clients": {"web": {"secret_file": str(files["web"]), "agents": ["*"]}},
            "issuer": {"local": {"keys": {"one": {"secret_file": str(files["key"])}}}},
        }
        found = examine(config.load(None, {}, tree), {})
        assert [finding.ok for finding in found] == [True] * 4
        assert str(found[-1]) == (
            f"ok       files: only root can read {files['web']}, {files['key']}: a service with a"
            " user of its own needs a unit that hands over each (LoadCredential), or it ends with"
            " 78; a running one has the copies that were made when it started"
        )
        os.chown(closed, 65534, 65534)
        os.chown(files["web"], 65534, 65534)
        assert "files" not in [finding.key for finding in examine(config.load(None, {}, tree), {})]


@pytest.mark.parametrize("skew", [300.0, -300.0])
async def test_a_clock_that_is_off(vendor: FakeVendor, skew: float) -> None:
    """By how much, and how to put it right."""
    vendor.settings = msgspec.structs.replace(UNLIMITED, skew=skew)
    clock = next(finding for finding in await examined(vendor) if finding.key == "clock")
    assert not clock.ok
    assert clock.text.split(" ")[0] in ("298", "299", "300", "301")
    assert clock.text.endswith("s off the vendor's: synchronize it (chrony, NTP)")


async def test_a_redirect(vendor: FakeVendor) -> None:
    """Where it points to, which is where the base URL should."""
    async with FakeVendor(UNLIMITED) as other:
        vendor.fail(faults.redirect(other.url), path=VALIDATE)
        found = await examined(vendor)
        assert lines(found)[0] == (
            f"problem  {vendor.url}: redirects to '{other.url}', which is never followed:"
            " put the final address into base_url"
        )
        assert len(other.journal) == 0


async def test_nobody_listens(vendor: FakeVendor) -> None:
    """One line, with a remedy: on this machine no firewall is in the way."""
    await vendor.refuse_connections()
    told = "no connection: nothing listens there; is it started, and is the port right?"
    assert lines(await examined(vendor)) == [f"problem  {vendor.url}: {told}"]


async def test_nobody_answers(vendor: FakeVendor) -> None:
    """The same for silence."""
    vendor.fail(faults.hang(), path=VALIDATE)
    (finding,) = await examined(vendor, timeout="100ms")
    assert not finding.ok
    assert finding.text.startswith("no answer in time")


async def test_no_tls(vendor: FakeVendor) -> None:
    """HTTPS to a server that speaks plain HTTP."""
    base_url = vendor.url.replace("http:", "https:")
    (finding,) = await examined(vendor, base_url=base_url)
    assert not finding.ok
    assert finding.text.startswith("no trusted TLS")


@pytest.mark.parametrize("fault", [faults.html(), faults.error(Refusal.INTERNAL_ERROR)])
async def test_a_vendor_that_is_unwell_says_nothing_about_the_key(
    vendor: FakeVendor, fault: faults.Fault
) -> None:
    """A problem, but not the key's."""
    vendor.fail(fault, path=VALIDATE)
    key = (await examined(vendor))[-1]
    assert not key.ok
    assert key.text == f"cannot tell: the vendor answered {fault.answer.status}"  # type: ignore[union-attr]


def test_no_key_at_all_is_a_configuration_error() -> None:
    """As it is for `serve`: 78."""
    done = run("doctor", BROKER_ISSUER__KIND="upstream")
    assert (done.returncode, done.stderr) == (78, b"")
    assert b"problem  issuer.upstream.api_secret_files: no vendor key; set it" in done.stdout


async def test_G7_no_key_is_sent_by_settings_that_were_not_meant(
    vendor: FakeVendor, tmp_path: Path
) -> None:
    """A value that does not fit is left out, and its default may be another host."""
    upstream = {"base_url": vendor.url, "api_secret": vendor.secret.reveal()}
    tree = {"issuer": {"kind": "upstream", "upstream": upstream}, "server": {"deadline": 5}}
    path = write(tmp_path / "broker.toml", toml(tree))
    done = await asyncio.to_thread(run, "doctor", "--config", path)
    assert (done.returncode, done.stderr) == (78, b"")
    assert done.stdout.startswith(b"problem  server.deadline: a duration needs")
    assert vendor.journal.records == []


async def test_G7_no_line_shows_a_key(vendor: FakeVendor) -> None:
    """Neither a good one nor a bad one."""
    bad = secrets.token_urlsafe(24)
    found = lines(await examined(vendor)) + lines(await examined(vendor, api_secret=bad))
    assert vendor.secret.reveal() not in "".join(found)
    assert bad not in "".join(found)


@pytest.fixture
def server() -> Iterator[StoreServer]:
    """A Valkey that a broker could use, by TCP."""
    with store_server(valkey_binary(), tcp=True) as server:
        yield server


async def of_store(store: dict[str, object]) -> list[str]:
    """Return what the doctor says of a store."""
    tree = {
        "clients": {"web": {"secret": secrets.token_urlsafe(32), "agents": ["*"]}},
        "issuer": {"local": {"keys": {"one": {"secret": secrets.token_urlsafe(48)}}}},
        "store": {"encryption_key": secrets.token_urlsafe(48), **store},
    }
    return lines(await asyncio.to_thread(examine, config.load(None, {}, tree), {}))


@pytest.mark.parts
async def test_a_store_that_evicts(server: StoreServer) -> None:
    """Limits that were exhausted would be full again: a problem once there is a bound."""
    where = server.url.removeprefix("valkey://")
    assert await of_store({"url": server.url}) == [
        f"ok       store: {where} answers, and evicts nothing"
    ]
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    (told,) = await of_store({"url": server.url})
    assert told.startswith(
        f"ok       store: {where} answers; with a maxmemory it would evict (allkeys"
    )
    server.command("CONFIG", "SET", "maxmemory", "100mb")
    (told,) = await of_store({"url": server.url})
    assert told == (
        f"problem  store: {where} evicts (allkeys-lru), limits and ends, too: set maxmemory-policy"
        " noeviction"
    )


@pytest.mark.parts
async def test_a_store_that_does_not_let_the_doctor_look(server: StoreServer) -> None:
    """The broker's own user may not: that is said, and is no problem."""
    password = secrets.token_urlsafe(16)
    server.command("ACL", "SETUSER", *acl_line("broker", f">{password}").split()[1:])
    store = {"url": server.url, "username": "broker", "password": password}
    (told,) = await of_store(store)
    assert told.startswith("ok       store: ")
    assert "+info" in told
    server.command("ACL", "SETUSER", "broker", "+info")
    (told,) = await of_store(store)
    assert told.endswith("answers, and evicts nothing")
    (told,) = await of_store(store | {"password": "wrong-one"})
    assert told.startswith("problem  store: ")
    assert "WRONGPASS" in told
    assert "wrong-one" not in told


async def test_a_store_that_is_not_there() -> None:
    """Why there is no connection, in the system's words."""
    (told,) = await of_store({"url": f"valkey://127.0.0.1:{free_port()}"})
    assert told.startswith("problem  store: 127.0.0.1:")
    assert "does not answer (connection: Connection refused)" in told


async def test_a_password_that_others_can_read() -> None:
    """In clear text to another machine: told before anything is sent."""
    first, *_ = await of_store({"url": "valkey://store.invalid", "password": "p" * 20})
    assert first == (
        "problem  store.password: crosses the network in clear text: write valkeys://, or set"
        " server.private_network = true where nobody else can listen"
    )


SCRIPTS_OFF = ("--rename-command", "EVAL", "", "--rename-command", "EVALSHA", "")

REPLICA = "is a replica and takes no writes: put the address of the primary into store.url"


async def problem_of(server: StoreServer, **more: object) -> str:
    """Return the one problem that the doctor finds."""
    (told,) = await of_store({"url": server.url, **more})
    assert told.startswith("problem  store: "), told
    return told


@pytest.mark.parts
@pytest.mark.parametrize("read_only", ["yes", "no"])
async def test_N17_a_replica(server: StoreServer, read_only: str) -> None:
    """It takes no writes, or takes them and loses them."""
    _, port = server.address.hosts[0]
    options = ["--replicaof", "127.0.0.1", str(port), "--replica-read-only", read_only]
    with store_server(redis_binary(), *options, tcp=True) as replica:
        assert (await problem_of(replica)).endswith(REPLICA)


@pytest.mark.parts
async def test_N17_a_sentinel(server: StoreServer, tmp_path: Path) -> None:
    """Named as such, by its own word; and its scheme is refused at load, with the way out."""
    _, port = server.address.hosts[0]
    own = free_port()
    config_file = tmp_path / "sentinel.conf"
    config_file.write_text(
        f"port {own}\nbind 127.0.0.1\ndir {tmp_path}\nsentinel monitor m 127.0.0.1 {port} 1\n",
        encoding="utf-8",
    )
    command = [redis_binary(), str(config_file), "--sentinel"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
    try:
        told = ""
        async with asyncio.timeout(30):
            while "is a Sentinel, which has no keys" not in told:
                (told,) = await of_store({"url": f"valkey://127.0.0.1:{own}"})
        assert "put the address of the primary into store.url" in told
    finally:
        process.kill()
        await process.wait()
    for scheme in ("valkey+sentinel", "redis+sentinel", "redis-sentinel", "rediss+sentinel"):
        with pytest.raises(ConfigError, match="Sentinel is not asked for the primary: name that"):
            await of_store({"url": f"{scheme}://127.0.0.1:{own}/m"})


@pytest.mark.parts
async def test_N17_scripts_that_are_switched_off() -> None:
    """Nothing works there, however well it answers."""
    with store_server(redis_binary(), *SCRIPTS_OFF, tcp=True) as bare:
        assert "does not know EVAL or EVALSHA" in await problem_of(bare)


@pytest.mark.parts
async def test_N17_a_full_server() -> None:
    """It evicts nothing, as it should, and has no room left."""
    with store_server(redis_binary(), "--maxmemory", "2mb", tcp=True) as full:
        with full.client() as client, suppress(RedisError):
            for number in range(100):
                client.set(f"filler {number}", "x" * 100_000)
        assert "is full and evicts nothing: raise its maxmemory" in await problem_of(full)


@pytest.mark.parts
async def test_N17_a_server_without_a_connection_left() -> None:
    """Also where there is one for calls and none for the subscription."""
    with store_server(redis_binary(), "--maxclients", "10", tcp=True) as busy, ExitStack() as stack:
        for _ in range(9):
            stack.enter_context(socket.create_connection(busy.address.hosts[0]))
        assert "has no connection left: raise its maxclients" in await problem_of(busy)
        stack.enter_context(socket.create_connection(busy.address.hosts[0]))
        assert "has no connection left: raise its maxclients" in await problem_of(busy)


@pytest.mark.parts
async def test_N17_a_server_that_cannot_save_or_has_too_few_replicas(server: StoreServer) -> None:
    """It refuses writes for a while, whoever asks."""
    server.command("CONFIG", "SET", "min-replicas-to-write", "1")
    assert "too few replicas follow it" in await problem_of(server)


RIGHTS = [part.removeprefix("+") for part in acl_line("u", ">p").split() if part.startswith("+")]


@pytest.mark.parts
async def test_N17_every_missing_right_is_found(server: StoreServer) -> None:
    """Each command of the broker's line, its keys, its channels; with all of them it is well."""
    password = secrets.token_urlsafe(16)
    line = acl_line("broker", f">{password}").split()[1:]
    store = {"url": server.url, "username": "broker", "password": password}

    async def told(rights: list[str]) -> str:
        server.command("ACL", "SETUSER", "broker", "reset", *rights[1:])
        server.command("SCRIPT", "FLUSH")
        (said,) = await of_store(store)
        return said

    assert (await told(line)).startswith("ok       store: ")
    assert server.all_keys() == [], "nothing is left behind"
    missed = []
    for right in [*(f"+{name}" for name in RIGHTS), "~etb:*", "&etb:*"]:
        said = await told([part for part in line if part != right])
        if not said.startswith("problem  store: ") or "broker store acl" not in said:
            missed.append((right, said))
    assert missed == []


@pytest.mark.parts
async def test_N17_a_cluster(valkey_cluster: StoreCluster) -> None:
    """Well by its own scheme; by the other one, that it is one; one primary that is full shows."""
    (told,) = await of_store({"url": valkey_cluster.url})
    assert told.startswith("ok       store: ")
    node = valkey_cluster.masters[0]
    assert "write valkey+cluster://" in await problem_of(node)
    full = valkey_cluster.masters[-1]
    full.command("CONFIG", "SET", "maxmemory", "1")
    try:
        (told,) = await of_store({"url": valkey_cluster.url})
        assert "is full and evicts nothing" in told
    finally:
        full.command("CONFIG", "SET", "maxmemory", "0")
