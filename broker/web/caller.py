"""What a token request says: its head, beside the secret, and its body."""

from msgspec import Struct
from multidict import istr
from typing_extensions import override

from broker.model import TokenRequest
from broker.web import body
from broker.web.auth import Client
from broker.web.whole_request import Request, WholeRequest
from broker.wire.request import well_formed

_TRACEPARENT = istr("traceparent")


class Caller(Struct, frozen=True, gc=False):
    """Who asks, and in which trace: a well-formed `traceparent`, or an empty string."""

    client: Client
    traceparent: str


class KnownCall(Struct, frozen=True, gc=False):
    """All that is read of a token request; nothing of it is decided by anything else."""

    caller: Caller
    request: TokenRequest

    @override
    def __repr__(self) -> str:
        return f"KnownCall(agent={self.request.agent!r})"


def caller_of(request: Request, client: Client) -> Caller:
    """Read the rest of a known client's head; raises UnsupportedType for an encoded body."""
    body.require_plain(request.headers)
    caller = Caller(client, well_formed(request.headers.get(_TRACEPARENT, "")))
    if isinstance(request, WholeRequest):
        request.facts = caller
    return caller
