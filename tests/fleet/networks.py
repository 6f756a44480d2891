"""Network namespaces, so that a test can cut a replica off from the store and from nothing else.

One bridge on this machine, where the vendor listens; each process under test has a namespace of
its own, with one address on that bridge.  Names and addresses are drawn, and all is taken away.
"""

import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


class Network:
    """A bridge and the namespaces on it; `here` is this machine's address there."""

    def __init__(self) -> None:
        self._name = f"etb{secrets.token_hex(3)}"
        self._prefix = f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(200) + 20}"
        self._names: list[str] = []
        self.here = f"{self._prefix}.1"

    def open(self) -> None:
        """Make the bridge."""
        assert os.geteuid() == 0, "network namespaces need root: run this test as root"
        _run("ip", "link", "add", self._name, "type", "bridge")
        _run("ip", "addr", "add", f"{self.here}/24", "dev", self._name)
        _run("ip", "link", "set", self._name, "up")

    def add(self) -> "Place":
        """Make a namespace with an address."""
        number = len(self._names) + 2
        name, inner = f"{self._name}-{number}", f"{self._name}v{number}"
        address = f"{self._prefix}.{number}"
        _run("ip", "netns", "add", name)
        self._names.append(name)
        _run("ip", "link", "add", inner, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", inner, "master", self._name)
        _run("ip", "link", "set", inner, "up")
        place = Place(name, address)
        place.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
        place.run("ip", "link", "set", "eth0", "up")
        place.run("ip", "link", "set", "lo", "up")
        return place

    def close(self) -> None:
        """Take everything away; what runs in a namespace must have ended."""
        for name in self._names:
            _run("ip", "netns", "del", name)
        _run("ip", "link", "del", self._name)


class Place:
    """A namespace; `prefix` is the command that runs another one in it."""

    def __init__(self, name: str, address: str) -> None:
        self.prefix = ("ip", "netns", "exec", name)
        self.address = address

    def run(self, *command: str) -> None:
        """Run a command in it, to its end."""
        _run(*self.prefix, *command)

    def cut_off_from(self, address: str) -> None:
        """Drop every packet to and from an address; nobody is told."""
        self.run("iptables", "-A", "OUTPUT", "-d", address, "-j", "DROP")
        self.run("iptables", "-A", "INPUT", "-s", address, "-j", "DROP")

    def drop_what_carries_data(self, address: str) -> None:
        """Let connections from an address be made, and drop all that is sent on them."""
        sizes = ("-m", "length", "--length", "100:65535")  # an answer to a handshake is shorter
        self.run("iptables", "-A", "INPUT", "-s", address, "-p", "tcp", *sizes, "-j", "DROP")

    def heal(self) -> None:
        """Let everything through again."""
        self.run("iptables", "-F")

    def reach_as_loopback(self, address: str, port: int) -> None:
        """Let 127.0.0.1 here be another place: a vendor without TLS may be nowhere else."""
        self.run("sysctl", "-q", "-w", "net.ipv4.conf.all.route_localnet=1")
        rule = ("-p", "tcp", "--dport", str(port), "-j")
        self.run(
            *("iptables", "-t", "nat", "-A", "OUTPUT", "-d", "127.0.0.1", *rule),
            *("DNAT", "--to-destination", f"{address}:{port}"),
        )
        self.run("iptables", "-t", "nat", "-A", "POSTROUTING", "-d", address, *rule, "MASQUERADE")


@contextmanager
def network() -> Iterator[Network]:
    """Make a network for one test."""
    made = Network()
    made.open()
    try:
        yield made
    finally:
        made.close()


def _run(*command: str) -> None:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
