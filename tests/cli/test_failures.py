"""What is said when a broker does not answer: what failed, where, and what to do about it."""

import errno
import re
import secrets
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import AGENT, Broker, good, put, run, secret_in
from servers import write_certificates

from broker.cli import mint, probe
from broker.cli.failures import explained
from broker.cli.mint import CannotMint

SECRET = secrets.token_urlsafe(24)
VISITOR = "9f86d081884c7d65"


@contextmanager
def server(
    answer: bytes | None, tls: ssl.SSLContext | None = None, *, resets: bool = False
) -> Iterator[str]:
    """Run a server that reads a little and answers so, None for not at all; yields HOST:PORT.

    `resets`: it ends with a reset, as one that is killed before it has read all.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        kept = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                kept.append(connection)
                try:
                    if tls is not None:
                        connection = tls.wrap_socket(connection, server_side=True)
                        kept.append(connection)
                    connection.recv(65536)
                    if resets:
                        no_linger = struct.pack("ii", 1, 0)
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
                        connection.close()
                    elif answer is not None:
                        connection.sendall(answer)
                        connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in kept:
                connection.close()


def told(url: str) -> str:
    """Return what `mint --url` says of it."""
    with pytest.raises(CannotMint) as caught:
        mint.request_token(url, SECRET, AGENT, VISITOR)
    assert type(caught.value) is CannotMint  # which is 69
    assert SECRET not in str(caught.value)
    return str(caught.value)


class TestMint:
    def test_a_port_that_nobody_listens_on(self) -> None:
        """Refused at once: the broker does not run."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert told(url) == f"nobody listens at {url}: is the broker running?"

    def test_a_name_that_nobody_has(self) -> None:
        """RFC 2606 keeps .invalid free for this."""
        url = "http://broker.invalid:8080"
        expected = f"the name in {url} is not known (DNS): check its spelling and the resolver"
        assert told(url) == expected

    def test_a_server_that_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the time that is waited for an answer."""
        monkeypatch.setattr(mint, "TIMEOUT", 0.2)
        with server(None) as address:
            url = f"http://{address}"
            assert told(url) == f"no answer from {url} within 200ms: is it the broker's address?"

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            (b"SSH-2.0-x\r\n", "answers, but not in HTTP: is it the broker's address?"),
            (b"", "closed the connection before its answer was whole: look at its log"),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
                "answers, but not in JSON: is it the broker's address?",
            ),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n{}",
                "closed the connection before its answer was whole: look at its log",
            ),
        ],
    )
    def test_something_else_that_answers(self, answer: bytes, expected: str) -> None:
        """Another protocol, an end, a page, half a body."""
        with server(answer) as address:
            assert told(f"http://{address}") == f"http://{address} {expected}"

    def test_a_server_that_resets_the_connection(self) -> None:
        """There was a way to it."""
        with server(None, resets=True) as address:
            url, remedy = f"http://{address}", "look at its log"
            expected = f"{url} closed the connection before its answer was whole: {remedy}"
            assert told(url) == expected

    def test_tls_where_there_is_none(self) -> None:
        """HTTPS was written for a plain port."""
        with server(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") as address:
            url = f"https://{address}"
            remedy = "write http://, or the address of the proxy that does"
            assert told(url) == f"TLS: {url} does not speak it: {remedy}"

    def test_a_certificate_that_is_not_trusted(self, tmp_path: Path) -> None:
        """Of an authority that this machine does not know; the remedy works."""
        write_certificates(tmp_path, "localhost")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
        answer = b'HTTP/1.1 200 OK\r\nContent-Length: 29\r\n\r\n{"data": {"token": "e.yJ.x"}}'
        with server(answer, context) as address:
            url = f"https://{address}"
            assert re.fullmatch(
                rf"TLS: the certificate of {url} is not trusted \(.+\): use the name that is in it,"
                " or set SSL_CERT_FILE to its authority",
                told(url),
            )
            words = ("mint", AGENT, "--fingerprint", VISITOR, "--url", url)
            given = {"BROKER_API_SECRET": SECRET, "SSL_CERT_FILE": str(tmp_path / "ca.crt")}
            done = run(*words, **given)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"e.yJ.x\n", b"")

    def test_a_socket_that_is_not_there(self, tmp_path: Path) -> None:
        """Nobody has made it, or nobody listens on it any more."""
        path = tmp_path / "s"
        assert told(f"unix:{path}") == (
            f"nobody listens at unix:{path}: there is no such socket; is the broker running?"
        )
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
        assert told(f"unix:{path}") == f"nobody listens at unix:{path}: is the broker running?"

    def test_a_url_that_is_none(self) -> None:
        """One line, no traceback."""
        assert told("http://[::1").startswith("http://[::1 is no address of a broker: write http")

    def test_a_socket_is_asked(self, tmp_path: Path) -> None:
        """`--url unix:/path`: where a sidecar listens."""
        tree = put(good(tmp_path), "server.listen", f"unix:{tmp_path}/s")
        secret = secret_in(tree["clients"]["web"]["secret_file"])
        with Broker.configured(tmp_path, tree) as broker:
            words = ("mint", AGENT, "--fingerprint", VISITOR, "--url", broker.url)
            done = run(*words, BROKER_API_SECRET=secret)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.count(b".") == 2


class TestHealthcheck:
    def test_names_what_failed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody there, silence, an unknown name; each with what to look at."""
        monkeypatch.setattr(probe, "TIMEOUT", 0.2)
        listens = "is this its [admin] listen?"
        path = f"unix:{tmp_path}/s"
        expected = "there is no such socket; is the broker running, and"
        assert probe.check(path) == f"nobody listens at {path}: {expected} {listens}"
        with server(None) as address:
            assert probe.check(address) == f"no answer from {address} within 200ms: {listens}"
        with server(b"SSH-2.0-x\r\n") as address:
            assert probe.check(address) == f"{address} answers, but not in HTTP: {listens}"
        expected = "is not known (DNS): check its spelling and the resolver"
        assert probe.check("broker.invalid:9464") == f"the name in broker.invalid:9464 {expected}"


def test_a_socket_of_somebody_else(tmp_path: Path) -> None:
    """Who may not use it is told so; root, who runs some of these tests, may use every one."""
    path, error = tmp_path / "s", PermissionError(errno.EACCES, "no")
    assert explained(f"unix:{path}", error, 1.0) == (
        f"no permission to use unix:{path}: the socket is for its owner and group (mode 0660)"
    )


@pytest.mark.parametrize("kind", [ConnectionResetError, BrokenPipeError, KeyError])
def test_whatever_else_happens_has_a_line(kind: Callable[[], Exception]) -> None:
    """No empty text, no traceback."""
    assert "http://b" in explained("http://b", kind(), 1.0)


def test_an_answer_that_is_no_text_is_no_matter_of_names() -> None:
    """Though Python's error is of the family of those for names that cannot be written."""
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    assert "answers, but not in JSON" in explained("http://broker.example", error, 1.0)


def test_an_error_of_the_system_without_words_is_named() -> None:
    """By its kind; no "None" stands where the reason would."""
    assert explained("http://b", OSError(), 1.0) == "no way to http://b: OSError"
