"""Answers as bytes: one write, no header objects.

aiohttp serializes a response from a dictionary of headers; an answer here is put together from
known parts, which is a third of the work.  Nothing that a caller sent gets into a head except a
request id of a fixed alphabet, so there is nothing to escape.

Handlers return an `Answer`.  The fast lane writes it as it is; for aiohttp's own loop it is made a
response (`ReadyAnswer`), which costs more than all the rest of a refusal.
"""

from collections.abc import Awaitable
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from aiohttp import ClientConnectionResetError, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web_request import BaseRequest
from msgspec import Struct
from typing_extensions import override

from broker.model import LimitName
from broker.rules.bucket import Limit, Verdict
from broker.units import SECOND

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus
}

JSON_TYPE = "application/json"


class Answer(Struct, gc=False):
    """An answer: its head without the closing empty line, its body, whether it is the last one.

    `is_written`: its handler has written it, piece by piece; only `status` and `closes` count then.
    """

    status: int
    head: bytes
    body: bytes
    closes: bool = False
    is_written: bool = False

    @override
    def __repr__(self) -> str:
        return f"Answer({self.status}, {len(self.body)} bytes)"


async def outcome_of(answer: Answer | Awaitable[Answer]) -> Answer:
    """Return an answer that a handler gives now, or later."""
    return answer if isinstance(answer, Answer) else await answer


class ReadyAnswer(web.StreamResponse):
    """An answer for aiohttp's loop; writes its bytes in one piece, unless that was done already.

    `StreamResponse.__init__` is skipped on purpose: it makes the header dictionary that this
    class exists to avoid, and nothing else reads what it would set.
    """

    def __init__(self, answer: Answer, *, is_written: bool = False) -> None:
        self._status = answer.status
        self._head = answer.head
        self._payload = answer.body
        self._closes = answer.closes
        self._is_written = is_written or answer.is_written

    @classmethod
    async def of(cls, answer: Answer | Awaitable[Answer]) -> "ReadyAnswer":
        """Return what a handler gives now, or later."""
        return cls(await outcome_of(answer))

    @property
    @override
    def keep_alive(self) -> bool:
        return not self._closes

    @override
    def force_close(self) -> None:
        self._closes = True

    @override
    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        """Write the whole answer, unless it is written; raises ConnectionError for who is gone."""
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ClientConnectionResetError("the client is gone")
        if not self._is_written:
            transport.write(self._for(request))
        if request.protocol.writing_paused:  # one who does not read gets no other answer meanwhile
            await request.writer.drain()
        return None

    def _for(self, request: BaseRequest) -> bytes:
        old = request.version < (1, 1)
        if self._closes or not request.keep_alive:
            self._closes = True
            connection = b"Connection: close\r\n\r\n"
        else:
            connection = b"Connection: keep-alive\r\n\r\n" if old else b"\r\n"
        payload = b"" if request.method == "HEAD" else self._payload
        return self._head + connection + payload

    @override
    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: `prepare` wrote everything."""

    @override
    def __repr__(self) -> str:
        return f"ReadyAnswer({self._status}, {len(self._payload)} bytes)"


def head(
    status: int, length: int, content_type: str, request_id: str, date: str, cache: str = "no-store"
) -> str:
    """Return the part of a head that every answer has, without the closing empty line.

    `cache` is Cache-Control: tokens are never stored; only the public files of `script` differ.
    """
    return (
        f"{_STATUS_LINES[status]}Content-Type: {content_type}\r\nContent-Length: {length}\r\n"
        f"Cache-Control: {cache}\r\nX-Content-Type-Options: nosniff\r\nDate: {date}\r\n"
        f"X-Request-Id: {request_id}\r\n"
    )


class Heads:
    """Heads of answers, put together from two pieces and a request id.

    What is before the id differs with status, type and length, what is behind it with what a limit
    says, and many requests of one second are told the same: both are kept until the next.  `wall`
    is now, in Unix us.
    """

    def __init__(self) -> None:
        self._date = ""
        self._until = 0  # Unix us at which the next second begins
        self._openings: dict[tuple[int, int, str, str], bytes] = {}
        self._of_tokens: dict[int, bytes] = {}
        self._of_refusals: dict[int, bytes] = {}
        self._tails: dict[_Said, bytes] = {}

    def date(self, wall: int) -> str:
        """Return the date as a header has it."""
        if not 0 < self._until - wall <= SECOND:
            self._begin(wall)
        return self._date

    def plain(
        self,
        status: int,
        length: int,
        content_type: str,
        request_id: str,
        wall: int,
        cache: str = "no-store",
    ) -> bytes:
        """Return what `head` does, as bytes."""
        if not 0 < self._until - wall <= SECOND:
            self._begin(wall)
        opening = self._opening(status, length, content_type, cache)
        return opening + request_id.encode() + CRLF

    def _opening(self, status: int, length: int, content_type: str, cache: str) -> bytes:
        """Return what is before the request id, in this second."""
        said = status, length, content_type, cache
        known = self._openings.get(said)
        if known is None:
            if len(self._openings) >= MOST_KEPT:
                self._openings.clear()
            text = head(status, length, content_type, _ID, self._date, cache).partition(_ID)[0]
            known = self._openings[said] = text.encode("latin-1")
        return known

    def _begin(self, wall: int) -> None:
        """Forget what was told in another second."""
        second = wall // SECOND
        self._date = formatdate(second, usegmt=True)
        self._until = (second + 1) * SECOND
        for kept in (self._openings, self._of_tokens, self._of_refusals, self._tails):
            kept.clear()

    def _open(self, openings: dict[int, bytes], status: int, length: int) -> bytes:
        """Return the opening of an answer that many have, and keep it by its length."""
        if len(openings) >= MOST_KEPT:
            openings.clear()
        known = openings[length] = self._opening(status, length, JSON_TYPE, "no-store")
        return known

    def refusal(
        self,
        name: LimitName,
        length: int,
        request_id: str,
        verdict: Verdict,
        wall: int,
    ) -> bytes:
        """Return `head` of a 429, `limit_headers` and `Retry-After` of the limit that refused."""
        if not 0 < self._until - wall <= SECOND:
            self._begin(wall)
        opening = self._of_refusals.get(length) or self._open(self._of_refusals, 429, length)
        limit, retry = verdict.limit, retry_after_seconds(verdict.retry_after)
        full_at = -(-(wall + verdict.full_in) // SECOND)
        said = LIMIT_LABELS[name], limit, verdict.remaining, full_at, retry
        known = self._tails.get(said)
        if known is None:
            text = f"\r\n{limit_headers(name, verdict, wall)}Retry-After: {retry}\r\n"
            known = self._keep(said, text)
        return b"%b%b%b" % (opening, request_id.encode(), known)

    def write(self, line: str, length: int, request_id: str, verdict: Verdict, wall: int) -> bytes:
        """Return `head` of a 200, `line` and `limit_headers`, as those would be one by one.

        The verdict is that of the fingerprint limit.
        """
        if not 0 < self._until - wall <= SECOND:
            self._begin(wall)
        opening = self._of_tokens.get(length) or self._open(self._of_tokens, 200, length)
        full_in, limit = verdict.full_in, verdict.limit
        if not verdict.allowed or not full_in:
            tail = line + limit_headers(LimitName.FINGERPRINT, verdict, wall)
            return b"%b%b\r\n%b" % (opening, request_id.encode(), tail.encode())
        interval = limit.interval
        full_at, next_in = (wall + full_in - 1) // SECOND, (full_in - 1) % interval // SECOND
        said = line, limit, verdict.remaining, full_at, next_in
        known = self._tails.get(said)
        if known is None:
            text = f"\r\n{line}{limit_headers(LimitName.FINGERPRINT, verdict, wall)}"
            known = self._keep(said, text)
        return b"%b%b%b" % (opening, request_id.encode(), known)

    def _keep(self, said: "_Said", text: str) -> bytes:
        if len(self._tails) >= MOST_KEPT:
            self._tails.clear()
        known = self._tails[said] = text.encode("latin-1")
        return known


_Said = tuple[str, Limit, int, int, int]
"""What a limit says in one second: to a hit or by its name, and in seconds."""

MOST_KEPT = 1024
"""Pieces of a kind that are kept within a second, 400 bytes each.  Of one limit there are as many
as its burst, times the seconds until it is full."""

CRLF = b"\r\n"

LIMIT_LABELS = {name: name.value for name in LimitName}
"""An enum's value is looked up in half a microsecond (Python 3.11), and refusals must be cheap."""

_ID = "\0"
"""Stands for a request id; in a head that is one it cannot be."""


def limit_headers(name: LimitName, verdict: Verdict, wall: int) -> str:
    """Return both generations of rate-limit headers for one limit; `wall` is now, in Unix us.

    The vendor's `X-RateLimit-*` (Reset: Unix seconds when full) and the IETF's `RateLimit` and
    `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers: w in seconds, t until one more).
    """
    lines, opening = _policy(name, verdict.limit)
    remaining, full_in = verdict.remaining, verdict.full_in
    if not verdict.allowed:
        tail = f";t={retry_after_seconds(verdict.retry_after)}"
    elif full_in:
        tail = f";t={-(-verdict.next_in // 1_000_000)}"
    else:
        tail = ""
    return (
        f"{lines}X-RateLimit-Remaining: {remaining}\r\n"
        f"X-RateLimit-Reset: {-(-(wall + full_in) // 1_000_000)}\r\n"
        f"{opening}{remaining}{tail}\r\n"
    )


@lru_cache(maxsize=1024)
def _policy(name: LimitName, limit: Limit) -> tuple[str, str]:
    """What depends on the configuration only: whole lines, and the start of the RateLimit line."""
    window = -(-limit.depth // 1_000_000)
    lines = (
        f"X-RateLimit-Limit: {limit.burst}\r\n"
        f'RateLimit-Policy: "{name.value}";q={limit.burst};w={window}\r\n'
    )
    return lines, f'RateLimit: "{name.value}";r='


def retry_after_seconds(wait: int) -> int:
    """Whole seconds for `Retry-After` from microseconds: rounded up, never 0."""
    return max(-(-wait // 1_000_000), 1)
