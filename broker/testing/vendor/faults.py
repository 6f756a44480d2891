"""Everything that can go wrong at the vendor, as values.

A fault changes up to four things about a call: what is said (`answer`, `edit`), how the token is
made (`claims`, `repeat`), when (`delay`), and how it goes onto the wire (`delivery`).  The
functions below make the faults that have been seen; `combined` puts several into one.

Knows nothing of sockets or of the vendor's rules.  A fault's `answer` comes before every rule of
the vendor; the call is charged to the rate limits all the same, as an edge would do it.  Faults
without an `answer` of their own act on whatever the vendor says, refusals included.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import msgspec
from msgspec import Struct
from typing_extensions import override

from broker.testing.vendor.delivery import Cut, Delivery, Drip, Flood, Hang, Reset, Whole
from broker.testing.vendor.replies import Answer, Headers, Refusal, json_answer, refusal

MEBIBYTE = 1024 * 1024

Claims = dict[str, object]


class Fault(Struct, frozen=True, kw_only=True):
    """One way to fail; `name` is what the journal shows, `delay` is in seconds."""

    name: str
    answer: Answer | None = None
    edit: Callable[[Answer], Answer] | None = None
    claims: Callable[[Claims], Claims] | None = None
    repeat: bool = False
    delay: float = 0.0
    delivery: Delivery = Whole()

    @override
    def __repr__(self) -> str:
        return f"Fault({self.name!r})"


HEALTHY = Fault(name="")
"""No fault."""


def combined(*faults: Fault) -> Fault:
    """Return one fault that does all of these; where two set the same thing, the later one wins."""
    return reduce(_over, faults)


def error(
    what: Refusal | tuple[int, str],
    *,
    retry_after: str | Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
) -> Fault:
    """Refuse, with the vendor's envelope.

    `retry_after` is sent as given: any text, and as many headers as there are texts.
    """
    answer = refusal(what)
    values = (retry_after,) if isinstance(retry_after, str) else tuple(retry_after)
    repeated: Headers = tuple(("Retry-After", value) for value in values)
    answer = answer.plus(repeated + tuple((headers or {}).items()))
    code = what.value[1] if isinstance(what, Refusal) else what[1]
    return Fault(name=f"{answer.status} {code}", answer=answer)


def hidden_error(what: Refusal | tuple[int, str]) -> Fault:
    """Refuse with HTTP 200; the real status is in the body only."""
    plain = refusal(what)
    return Fault(name=f"200 for {plain.status}", answer=Answer(200, plain.body))


def bare_unauthorized(status: int = 200) -> Fault:
    """Refuse the key without an envelope."""
    answer = json_answer({"error": "Unauthorized"}, status)
    return Fault(name=f"bare unauthorized {status}", answer=answer)


def html(status: int = 502) -> Fault:
    """Answer with a page of the content delivery network."""
    page = (
        f"<!DOCTYPE html><html><head><title>{status}</title></head><body><h1>{status}</h1></body>"
    )
    return Fault(name=f"html {status}", answer=_text(status, page, "text/html; charset=UTF-8"))


def edge_denied() -> Fault:
    """Answer as the edge does that dislikes a User-Agent: 403 and a line of text."""
    answer = _text(403, "error code: 1010", "text/plain; charset=UTF-8")
    return Fault(name="edge 403", answer=answer)


def redirect(url: str, status: int = 302) -> Fault:
    """Send the caller somewhere else."""
    answer = Answer(status, b"", (("Location", url),))
    return Fault(name=f"redirect {status}", answer=answer)


def body(content: object, status: int = 200, content_type: str = "application/json") -> Fault:
    """Answer with this body: bytes as they are, anything else as JSON."""
    raw = content if isinstance(content, bytes) else msgspec.json.encode(content)
    answer = Answer(status, raw, (("Content-Type", content_type),))
    return Fault(name=f"body {status}", answer=answer)


def tokenless() -> tuple[Fault, ...]:
    """Return every kind of HTTP 200 that holds no usable token, each under its own name."""
    bodies: dict[str, object] = {
        "no data": {"status": "success", "status_code": 200},
        "data null": {"status": "success", "status_code": 200, "data": None},
        "data list": {"status": "success", "status_code": 200, "data": []},
        "data text": {"status": "success", "status_code": 200, "data": "token"},
        "no token": {"status": "success", "status_code": 200, "data": {"sid": "s"}},
        "token null": {"success": True, "data": {"token": None, "sid": "s"}},
        "token number": {"success": True, "data": {"token": 5, "sid": "s"}},
        "token list": {"success": True, "data": {"token": ["t"], "sid": "s"}},
        "token empty": {"success": True, "data": {"token": "", "sid": "s"}},
        "list": [],
        "null": None,
        "number": 200,
        "html page": b"<!DOCTYPE html><title>200</title>",
        "not utf-8": b'{"data":{"token":"\xff\xfe"}}',
        "deep": b'{"data":' * 10_000,
        "empty": b"",
    }
    named = [_named(name, body(content)) for name, content in bodies.items()]
    return (*named, truncated(), bare_unauthorized(), hidden_error(Refusal.UNAUTHORIZED))


def empty() -> Fault:
    """Send the vendor's answer without its body."""
    return Fault(name="empty", edit=lambda answer: Answer(answer.status, b"", answer.headers))


def truncated(share: float = 0.5) -> Fault:
    """Send this share of the body as if it were all: valid HTTP, broken JSON."""
    return Fault(
        name="truncated",
        edit=lambda it: Answer(it.status, it.body[: int(len(it.body) * share)], it.headers),
    )


def huge(size: int = 10 * MEBIBYTE) -> Fault:
    """Put `size` bytes of white space before the body: still valid JSON, with a good token.

    So a client that reads without a bound succeeds, and a test of the bound can tell.
    """
    padding = b" " * size
    return Fault(name="huge", edit=lambda it: Answer(it.status, padding + it.body, it.headers))


def gzip_bomb(size: int = 64 * MEBIBYTE) -> Fault:
    """Do as `huge` does, compressed: a thousandth of `size` on the wire, all of it in memory."""
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    block = b" " * MEBIBYTE
    packed = [packer.compress(block) for _ in range(size // MEBIBYTE)]
    packed += [packer.compress(b" " * (size % MEBIBYTE)), packer.flush(zlib.Z_FULL_FLUSH)]
    padding = b"".join(packed)

    def edit(answer: Answer) -> Answer:
        rest = packer.copy()
        raw = padding + rest.compress(answer.body) + rest.flush()
        return Answer(answer.status, raw, (*answer.headers, ("Content-Encoding", "gzip")))

    return Fault(name="gzip bomb", edit=edit)


def hang() -> Fault:
    """Read the request and never answer."""
    return Fault(name="hang", delivery=Hang())


def slow(seconds: float) -> Fault:
    """Answer this much later."""
    return Fault(name="slow", delay=seconds)


def reset(after: int | None = None) -> Fault:
    """Reset the connection after so many bytes of the body; None: before the status line."""
    return Fault(name="reset", delivery=Reset(after))


def cut(after: int, *, hold: bool = False) -> Fault:
    """Send the first bytes of the body, then close the connection, or go silent with `hold`."""
    return Fault(name="cut", delivery=Cut(after=after, hold=hold))


def overlong(extra: int = 100, *, hold: bool = False) -> Fault:
    """Send the whole body under a Content-Length that promises more; then as in `cut`."""
    return Fault(name="overlong", delivery=Cut(extra=extra, hold=hold))


def drip(interval: float = 1.0, chunk: int = 1) -> Fault:
    """Send the body `chunk` bytes at a time, `interval` seconds apart."""
    return Fault(name="drip", delivery=Drip(interval, chunk))


def large(size: int = 100 * MEBIBYTE, *, framed: bool = True) -> Fault:
    """Answer with so many zero bytes, streamed; with their number told before, or in chunks."""
    answer = Answer(200, b"", (("Content-Type", "application/octet-stream"),))
    return Fault(name="large", answer=answer, delivery=Flood(size, framed))


def same_token() -> Fault:
    """Give the visitor the token it already has; a visitor without one gets a new one."""
    return Fault(name="same token", repeat=True)


def claims(*, without: Sequence[str] = (), **values: object) -> Fault:
    """Make tokens with these claims instead, whatever their type, and without some others."""

    def edit(original: Claims) -> Claims:
        changed = {**original, **values}
        return {name: value for name, value in changed.items() if name not in without}

    return Fault(name="claims", claims=edit)


def lifetime(seconds: float) -> Fault:
    """Make tokens whose `exp` is this long after their `iat`; negative: before it."""

    def edit(original: Claims) -> Claims:
        issued = original["iat"]
        if not isinstance(issued, int | float):
            raise TypeError("another fault made iat something else than a number")
        return {**original, "exp": issued + seconds}

    return Fault(name=f"lifetime {seconds}", claims=edit)


def _text(status: int, text: str, content_type: str) -> Answer:
    return Answer(status, text.encode(), (("Content-Type", content_type),))


def _named(name: str, fault: Fault) -> Fault:
    return msgspec.structs.replace(fault, name=name)


def _over(first: Fault, second: Fault) -> Fault:
    """Return `first` with everything that `second` sets."""
    return Fault(
        name=f"{first.name}, {second.name}",
        answer=second.answer or first.answer,
        edit=second.edit or first.edit,
        claims=second.claims or first.claims,
        repeat=second.repeat or first.repeat,
        delay=second.delay or first.delay,
        delivery=first.delivery if second.delivery == Whole() else second.delivery,
    )
