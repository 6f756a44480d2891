"""`broker healthcheck`: what an engine learns of the broker beside it."""

import signal
from pathlib import Path

import pytest
from processes import Broker, good, put, run, toml, write

from broker.cli import probe
from broker.cli.healthcheck import where


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
    assert done.stderr.startswith(f"broker: nobody listens at {found}: ".encode())


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
    told = f"{address} answers, but not in HTTP: is this its [admin] listen?"
    assert done.stderr == f"broker: {told}\n".encode()


def test_where_one_family_is_off_the_other_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a listener on all addresses each is tried, until one is answered."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    monkeypatch.setattr(probe, "ASKED_AT", {"::": ("127.0.0.2", "127.0.0.1")})
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert probe.check(f"[::]:{server.server_port}") == ""


def test_it_needs_to_know_no_more_than_where_to_ask(tmp_path: Path) -> None:
    """By flag or variable without any configuration; beside a file that is already the next one.

    A file that cannot be used yet must not have the engine end a broker that serves.
    """
    with Broker.configured(tmp_path, put(good(tmp_path), "admin.listen", "127.0.0.1:0")) as broker:
        listen = broker.admin_url.removeprefix("http://")
        half = f'[admin]\nlisten = "{listen}"\n[server]\nno_such_key = 1\n'
        config = write(tmp_path / "half.toml", half)
        empty = write(tmp_path / "broken.toml", "[admin\n")
        for done in (
            run("healthcheck", "--admin-listen", listen),
            run("healthcheck", BROKER_ADMIN__LISTEN=listen),
            run("healthcheck", "--config", config),
            run("healthcheck", "--config", empty, "--admin-listen", listen),
        ):
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("listen", ["nonsense", "a\x1bb:1", "unix:relative", "\u0301..:1", ":::1"])
def test_an_address_that_is_none_is_not_healthy(listen: str) -> None:
    """Exit 1 and one printable line: 2 and above mean nothing to an engine."""
    done = run("healthcheck", "--admin-listen", listen)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().removesuffix("\n").isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[admin]",
        "[admin]\nlisten = 1",
        "admin = 1",
        "[admin",
        "a = " + "[" * 5000,
        "\udcff",
        None,
    ],
)
def test_a_file_that_says_no_address_leaves_the_default(tmp_path: Path, text: str | None) -> None:
    """Empty, of another shape, damaged, not UTF-8, absent: the packaged broker is asked."""
    file = tmp_path / "broker.toml"
    if text is not None:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert where(None, {}, file) == where(None, {}, None) == "127.0.0.1:9464"


def test_the_flag_goes_before_the_variable_and_that_before_the_file(tmp_path: Path) -> None:
    """As everywhere; a variable's name in any case, like the broker's own."""
    file = tmp_path / "broker.toml"
    file.write_text('[admin]\nlisten = "f:1"\n', encoding="utf-8")
    assert where("a:1", {"BROKER_ADMIN__LISTEN": "e:1"}, file) == "a:1"
    assert where(None, {"BROKER_admin__listen": "e:1"}, file) == "e:1"
    assert where(None, {"BROKER_ADMIN__LISTEN": ""}, file) == "f:1"
