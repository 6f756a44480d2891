"""Answers as bytes: one write, no header objects.

aiohttp serializes a response from a dictionary of headers; an answer here is formatted once from
known parts, which is a third of the work.  Nothing that a caller sent gets into a head except a
request id of a fixed alphabet, so there is nothing to escape.
"""

from functools import lru_cache
from http import HTTPStatus

from aiohttp import ClientConnectionResetError, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web_request import BaseRequest
from typing_extensions import override

from broker.model import LimitName
from broker.rules.bucket import Limit, Verdict
from broker.units import SECOND

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus
}

JSON_TYPE = "application/json"


class ReadyAnswer(web.StreamResponse):
    """An answer whose bytes are ready; writes them in one piece.

    `StreamResponse.__init__` is skipped on purpose: it makes the header dictionary that this
    class exists to avoid, and nothing else reads what it would set.
    """

    def __init__(self, status: int, head: str, body: bytes, *, close: bool) -> None:
        self._status = status
        self._head = head
        self._payload = body
        self.closes = close

    is_written = False

    @property
    @override
    def keep_alive(self) -> bool:
        return not self.closes

    @override
    def force_close(self) -> None:
        self.closes = True

    def whole(self) -> bytes:
        """Return all of it, for a plain request whose connection is kept."""
        return f"{self._head}\r\n".encode("latin-1") + self._payload

    @override
    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        """Write the whole answer, unless it is written; raises ConnectionError for who is gone."""
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ClientConnectionResetError("the client is gone")
        if not self.is_written:
            transport.write(self._for(request))
        if request.protocol.writing_paused:  # one who does not read gets no other answer meanwhile
            await request.writer.drain()
        return None

    def _for(self, request: BaseRequest) -> bytes:
        old = request.version < (1, 1)
        if self.closes or not request.keep_alive:
            self.closes = True
            connection = "Connection: close\r\n\r\n"
        else:
            connection = "Connection: keep-alive\r\n\r\n" if old else "\r\n"
        payload = b"" if request.method == "HEAD" else self._payload
        return (self._head + connection).encode("latin-1") + payload

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


class GrantHeads:
    """Heads of hand-outs, written into templates: nearly all differ in six numbers only.

    A template holds for a date and a limit.
    """

    def __init__(self) -> None:
        self._date = ""
        self._templates: dict[str, tuple[Limit, str]] = {}

    def write(
        self, line: str, length: int, request_id: str, date: str, verdict: Verdict, wall: int
    ) -> str:
        """Return `head` of a 200, `line` and `limit_headers`, as those would be one by one.

        The verdict is that of the fingerprint limit; `wall` is now, in Unix us.
        """
        full_in = verdict.full_in
        if not verdict.allowed or not full_in:
            start = head(200, length, JSON_TYPE, request_id, date)
            return start + line + limit_headers(LimitName.FINGERPRINT, verdict, wall)
        limit = verdict.limit
        known = self._templates.get(line)
        if known is None or known[0] is not limit or date is not self._date:
            known = self._renew(line, limit, date)
        remaining = verdict.remaining
        return known[1] % (
            length,
            request_id,
            remaining,
            (wall + full_in - 1) // SECOND + 1,
            remaining,
            (full_in - 1) % limit.interval // SECOND + 1,
        )

    def _renew(self, line: str, limit: Limit, date: str) -> tuple[Limit, str]:
        if date is not self._date:
            self._date = date
            self._templates.clear()
        lines, opening = _policy(LimitName.FINGERPRINT, limit)
        template = (
            f"{head(200, _LENGTH, JSON_TYPE, '%s', date).replace(str(_LENGTH), '%d')}{line}{lines}"
            f"X-RateLimit-Remaining: %d\r\nX-RateLimit-Reset: %d\r\n{opening}%d;t=%d\r\n"
        )
        known = self._templates[line] = limit, template
        return known


_LENGTH = 987_654_321
"""Stands for a length in a template."""


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
