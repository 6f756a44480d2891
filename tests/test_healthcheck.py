"""`broker healthcheck`: what an engine learns of the broker beside it."""

import signal
from pathlib import Path

import pytest
from processes import Broker, good, put, run, toml, write


@pytest.mark.parametrize("kind", ["tcp", "everywhere", "unix"])
def test_a_ready_broker_is_healthy_a_draining_or_absent_one_is_not(
    tmp_path: Path, kind: str
) -> None:
    """Exit 0 and no word; else 1 and one line: whatever the admin listener is on."""
    tree = put(good(tmp_path), "server.drain_lead", "5s")
    listen = {"tcp": "127.0.0.1:0", "everywhere": "0.0.0.0:0", "unix": f"unix:{tmp_path}/a"}[kind]
    with Broker.configured(tmp_path, put(tree, "admin.listen", listen)) as broker:
        port = broker.admin_url.rpartition(":")[2]
        found = listen if kind == "unix" else f"{listen.rpartition(':')[0]}:{port}"
        config = write(tmp_path / "found.toml", toml(put(tree, "admin.listen", found)))
        done = run("healthcheck", "--config", config)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        broker.send(signal.SIGTERM)
        broker.wait_for(lambda: broker.events("broker.draining"))
        done = run("healthcheck", "--config", config)
        told = b"broker: not ready: /readyz answers 503\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, b"", told)
    done = run("healthcheck", "--config", config)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(f"broker: no answer at {found}: ".encode())


def test_something_else_at_that_address_is_not_healthy(tmp_path: Path) -> None:
    """A port that was taken by a server that is no broker, or that says nothing."""
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-x\r\n")

        threading.Thread(target=answer, daemon=True).start()
        path = write(tmp_path / "broker.toml", toml(put(good(tmp_path), "admin.listen", address)))
        done = run("healthcheck", "--config", path)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == f"broker: no answer at {address}: BadStatusLine\n".encode()
