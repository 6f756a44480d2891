"""The nouns.  Parsed at the rim, frozen, and without anything of HTTP in them.

Values that live as long as a token are `msgspec.Struct`s with `gc=False`: they hold only
strings, bytes and numbers, so the garbage collector has no business visiting a million of them.
"""

import hashlib
import re
from collections.abc import Mapping
from copy import copy
from enum import Enum
from typing import Protocol

from msgspec import Struct
from msgspec.structs import force_setattr
from typing_extensions import override

SEPARATOR = "\x1f"
"""Joins the parts of a key.  No part can contain it: agents are ASCII words, fingerprints and
models printable, client names checked at load.  So two keys are equal only if every part is."""


LONGEST_AGENT = 64

AGENT_ID = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_AGENT}}}")
"""Agent codes look like A78WKV4515 today; older ones do not, so this is kept loose."""

AGENT_RULE = "1 to 64 of A-Z a-z 0-9 _ -"
"""`AGENT_ID` in words."""

MIN_KEY_BYTES = 32
"""Of what signs or seals: RFC 7518 section 3.2 wants at least the size of the hash's output."""


class Secret:
    """A string that masks itself wherever it could be printed by accident."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the secret itself: for the one place that needs it."""
        return self._value

    def digest(self) -> bytes:
        """SHA-256 of the secret, the form in which secrets are compared."""
        return hashlib.sha256(self._value.encode()).digest()

    @override
    def __repr__(self) -> str:
        return "Secret('**********')"

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.digest() == self.digest()

    @override
    def __hash__(self) -> int:
        return hash(self.digest())


class TokenRequest(Struct, frozen=True, gc=False):
    """One visitor's request for a token, as a known client made it.

    `fingerprint` is opaque: checked, never changed, because the vendor keys a visitor's memory
    by its exact bytes.  `model` None means "the agent's default" and is a key of its own.
    `visitor` and `key` follow from the rest, and are made with it: each request asks for them.
    """

    client: str
    agent: str
    fingerprint: str
    model: str | None = None
    fresh: bool = False
    request_id: str = ""
    """Passed on to the vendor, so that one id leads through both logs."""
    traceparent: str = ""
    """W3C Trace Context of the caller, passed on; empty if there is none."""
    visitor: str = ""
    """Key of what is counted for one visitor of one client."""
    key: str = ""
    """Key under which this request's token is reused: client, agent, fingerprint, model."""

    def __post_init__(self) -> None:
        client, fingerprint = self.client, self.fingerprint
        force_setattr(self, "visitor", visitor_of(client, fingerprint))
        force_setattr(self, "key", token_key(client, self.agent, fingerprint, self.model or ""))

    def sent_with(self, request_id: str, traceparent: str) -> "TokenRequest":
        """Return the same as one request asked for it, with that request's id and trace.

        With the same key, too, not an equal one: a table that holds it finds it by its identity.
        """
        sent = copy(self)
        force_setattr(sent, "request_id", request_id)
        force_setattr(sent, "traceparent", traceparent)
        return sent

    @override
    def __repr__(self) -> str:
        return f"TokenRequest(client={self.client!r}, agent={self.agent!r}, model={self.model!r})"


class Minted(Struct, frozen=True):
    """What an issuer gives: the token and what came with it.

    `lifetime` is the microseconds it has left on arrival.  `whole` is the life it was made for,
    counted from the start of the mint; it differs where the vendor handed out an old token again,
    and 0 stands for "the same".  `expires_at` is the token's own `exp` (Unix seconds); `extra` are
    further fields of the vendor's `data` object that callers get unchanged.  `origin` names what
    signed it, one of the issuer's `signer_ids`.  `body` is the ready answer, where the issuer has
    made it with the token.
    """

    token: str
    session_id: str
    expires_at: int
    lifetime: int
    whole: int = 0
    extra: Mapping[str, object] = {}
    origin: str = ""
    body: bytes = b""

    @override
    def __repr__(self) -> str:
        return f"Minted(token={name_of(self.token)}, lifetime={self.lifetime})"


class EmbedToken(Struct, frozen=True, gc=False):
    """A token that is held for reuse: the ready answer, six numbers and a name.

    `body` is the JSON answer, byte for byte; the token is not held a second time.  `dies_mono`
    and `dies_wall` are the microsecond of expiry on the monotonic and on the wall clock;
    `lifetime` and `mark` (life left at which it asks for a successor) are microseconds.
    `version` is the fence under which it was minted, `epoch` its visitor's at that moment.
    `origin` names what signed it: a token is gone with its key, wherever it is kept.
    """

    body: bytes
    dies_mono: int
    dies_wall: int
    lifetime: int
    mark: int
    version: int = 0
    epoch: int = 0
    origin: str = ""

    def left(self, mono: int, wall: int) -> int:
        """Microseconds of life left; of the two clocks the one that leaves less decides."""
        by_mono = self.dies_mono - mono
        by_wall = self.dies_wall - wall
        if by_wall < by_mono:  # each request asks; `min` takes several times as long
            return by_wall
        return by_mono

    @override
    def __repr__(self) -> str:
        return f"EmbedToken(dies_wall={self.dies_wall}, lifetime={self.lifetime})"


class Session(Struct, frozen=True, gc=False):
    """One visitor's session, from mint to expiry: what a token stands for.

    `issued` and `expires` are Unix seconds, as in the token.  `client` is empty where a token does
    not say whose it is, `model` where none was asked for.  `digest` is the SHA-256 of the token
    where only a record can tell whether it is good; empty where it proves itself.
    """

    session_id: str
    client: str
    agent: str
    fingerprint: str
    model: str
    issued: int
    expires: int
    digest: bytes = b""

    @property
    def key(self) -> str:
        """Key under which its token is reused."""
        return token_key(self.client, self.agent, self.fingerprint, self.model)

    @override
    def __repr__(self) -> str:
        return f"Session({self.session_id!r}, client={self.client!r}, agent={self.agent!r})"


class Outcome(Enum):
    """How a request ended; the label of the request metrics and of the canonical log event."""

    __hash__ = object.__hash__  # Enum's own is Python code, and every request looks one up

    MINTED = "minted"
    REUSED = "reused"
    COALESCED = "coalesced"
    LIMITED = "limited"
    INVALID = "invalid"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    SHED = "shed"
    FAILED = "failed"


class LimitName(Enum):
    """The limits that can refuse a request; also the label of the rejection metrics."""

    __hash__ = object.__hash__  # as in Outcome

    FINGERPRINT = "fingerprint"
    FINGERPRINT_MINTS = "fingerprint_mints"
    AGENT = "agent"
    CLIENT = "client"
    AUTH = "auth"


class Clock(Protocol):
    """Two clocks in microseconds: one that never steps, one that knows the date."""

    def mono(self) -> int:
        """Microseconds since some fixed moment; never goes back."""
        ...

    def wall(self) -> int:
        """Microseconds since 1970 (Unix time); may step."""
        ...


def visitor_of(client: str, fingerprint: str) -> str:
    """Return the key of what is counted for one visitor of one client."""
    return f"{client}{SEPARATOR}{fingerprint}"


def token_key(client: str, agent: str, fingerprint: str, model: str) -> str:
    """Return the key under which a token is reused; `model` is empty for the agent's default."""
    return f"{client}{SEPARATOR}{agent}{SEPARATOR}{fingerprint}{SEPARATOR}{model}"


def name_of(token: str) -> str:
    """Name a token without showing it: the start of its SHA-256, enough to match two log lines."""
    return hashlib.sha256(token.encode()).hexdigest()[:12]
