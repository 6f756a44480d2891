"""`broker mint --url` against servers that are no brokers: the secret and the output are safe."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from web.edge import AGENT, visitor

from broker.cli import mint

SECRET = "the-secret-of-a-client"


class Answers:
    """A server that answers each request as told, and keeps what it was sent."""

    def __init__(self) -> None:
        self.status, self.headers, self.body = 200, dict[str, str](), b""
        self.asked: list[tuple[str, str | None]] = []
        answers = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                answers.asked.append((self.path, self.headers["api-secret"]))
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(answers.status)
                for name, value in answers.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answers.body)))
                self.end_headers()
                self.wfile.write(answers.body)

            def do_GET(self) -> None:
                self.do_POST()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def answers() -> Iterator[Answers]:
    """One that runs."""
    made = Answers()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def test_a_redirect_is_not_followed(answers: Answers) -> None:
    """Whoever is at its end would be sent the client secret."""
    answers.status, answers.headers = 307, {"Location": f"{answers.url}/elsewhere"}
    with pytest.raises(mint.CannotMint):
        mint.request_token(answers.url, SECRET, AGENT, visitor())
    assert answers.asked == [("/v1/embed-tokens/request", SECRET)]


@pytest.mark.parametrize("token", ["", "no token", "\x1b[2J.e.y", "<b>.x.y"])
def test_what_is_no_token_is_not_printed(answers: Answers, token: str) -> None:
    """A script puts the output into a page: 69, and one line."""
    answers.body = json.dumps({"data": {"token": token}}).encode()
    with pytest.raises(mint.CannotMint, match="answered something else than a token"):
        mint.request_token(answers.url, SECRET, AGENT, visitor())


@pytest.mark.parametrize(("status", "kind"), [(499, mint.Refused), (500, mint.CannotMint)])
def test_a_failure_of_the_server_is_no_refusal(
    answers: Answers, status: int, kind: Callable[[], Exception]
) -> None:
    """From 500 on the same command may do later."""
    answers.status, answers.body = status, b"{}"
    with pytest.raises(mint.CannotMint) as caught:
        mint.request_token(answers.url, SECRET, AGENT, visitor())
    assert type(caught.value) is kind
